"""What each architecture's names and keys mean.  A new family is one more entry in HUGGING_FACE and in GGUF.

A key that changes the result is read (`facts`), or has the one value that this code computes (`fixed`); a key that
does not is in NEUTRAL_KEYS or `neutral`; any other key is refused by name, because guessing its meaning would give
fluent but wrong text.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tpmpi.config import ModelConfig
from tpmpi.formats.source import FormatError


@dataclass(frozen=True)
class Family:
    """How one architecture of a format maps to ours."""

    facts: Mapping[str, object]  # key: what it is where the file leaves it out; REQUIRED where nothing can be assumed
    fixed: Mapping[str, tuple]  # key: the values that mean what this code computes
    neutral: frozenset[str]  # keys without influence on the result
    config: Callable[[dict], ModelConfig]  # from the facts, defaults filled in
    tensors: Mapping[str, str]  # our name without 'layers/': theirs, with {} for the layer's number
    ignored_tensors: re.Pattern  # tensors that hold nothing that the configuration does not say


REQUIRED = object()
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80


def read_facts(values: Mapping[str, object], family: Family, neutral: Callable[[str], bool], where: str) -> dict:
    """The facts among `values`, each key checked.  Raises FormatError for a key or value that is not understood."""
    for key, value in values.items():
        if key in family.facts or key in family.neutral or neutral(key):
            continue
        if key not in family.fixed:
            raise FormatError(
                f'{where}: unknown key {key!r} (value {short(value)}); '
                'tpmpi does not know what it means for the result')
        if not any(value is known or (type(value) is type(known) and value == known) for known in family.fixed[key]):
            raise FormatError(
                f'{where}: {key} is {short(value)}; supported is {" or ".join(map(short, family.fixed[key]))} only')
    facts = {}
    for key, default in family.facts.items():
        facts[key] = values.get(key, default)
        if facts[key] is REQUIRED:
            raise FormatError(f'{where}: {key} is missing')
    return facts


def short(value) -> str:
    """A value for a message, however long or deep a hostile file makes it."""
    return SHORT.repr(value)


def whole(facts: Mapping, key: str, where: str) -> int:
    """A fact that must be a whole number."""
    value = facts[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise FormatError(f'{where}: {key} is {short(value)}; expected a whole number')
    return value


def number(facts: Mapping, key: str, where: str) -> float:
    """A fact that must be a finite number."""
    value = facts[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e300:
        raise FormatError(f'{where}: {key} is {short(value)}; expected a number')
    return float(value)


def their_name(name: str, table: Mapping[str, str]) -> str:
    """The name that a family gives to our tensor `name`."""
    if name.startswith('layers/'):
        _, layer, rest = name.split('/')
        return table[rest].format(layer)
    return table[name]


# ---- Hugging Face

HF_WHERE = 'config.json'

# Names, versions, training and generation settings, which the computation never reads.
NEUTRAL_KEYS = frozenset((
    'architectures', 'model_type', 'transformers_version', '_name_or_path', 'name_or_path', 'torch_dtype', 'dtype',
    '_attn_implementation', '_attn_implementation_autoset', '_flash_attn_2_enabled', 'attn_implementation', 'use_cache',
    'initializer_range', 'attention_dropout', 'attention_probs_dropout_prob', 'hidden_dropout', 'hidden_dropout_prob',
    'resid_pdrop', 'gradient_checkpointing', 'bos_token_id', 'eos_token_id', 'pad_token_id', 'unk_token_id',
    'sep_token_id', 'decoder_start_token_id', 'tokenizer_class', 'prefix', 'return_dict', 'return_dict_in_generate',
    'output_hidden_states', 'output_attentions', 'output_scores', 'torchscript', 'use_bfloat16', 'id2label', 'label2id',
    'problem_type', 'task_specific_params', 'finetuning_task', 'chunk_size_feed_forward', 'transformers.js_config',
    'is_llama_config', 'unsloth_fixed', 'unsloth_version', 'do_sample', 'temperature', 'top_k', 'top_p', 'typical_p',
    'min_length', 'max_length', 'max_new_tokens', 'repetition_penalty', 'length_penalty', 'no_repeat_ngram_size',
    'num_beams', 'num_beam_groups', 'diversity_penalty', 'early_stopping', 'num_return_sequences', 'bad_words_ids',
    'begin_suppress_tokens', 'suppress_tokens', 'encoder_no_repeat_ngram_size', 'exponential_decay_length_penalty',
    'forced_bos_token_id', 'forced_eos_token_id', 'remove_invalid_values',
))


def rope_theta(facts: Mapping, where: str = HF_WHERE) -> float:
    """The base of plain RoPE, from `rope_parameters` (transformers 5) or `rope_theta`.  Refuses any scaling by name.

    As in transformers, `rope_scaling` stands for `rope_parameters` where both are given, and a `rope_theta` inside
    goes before the one beside.
    """
    key = 'rope_scaling' if facts['rope_scaling'] else 'rope_parameters'
    inner = facts[key] or {}
    if not isinstance(inner, dict):
        raise FormatError(f'{where}: {key} is {short(inner)}; expected null or an object')
    inner = dict(inner)
    kinds = {name: inner.pop(name) for name in ('rope_type', 'type') if name in inner}
    theta = inner.pop('rope_theta', facts['rope_theta'])
    if any(kind not in (None, 'default') for kind in kinds.values()):
        kind = next(kind for kind in kinds.values() if kind not in (None, 'default'))
        raise FormatError(f'{where}: {key} asks for RoPE of type {short(kind)}; supported is "default", plain RoPE')
    if inner.pop('partial_rotary_factor', 1.0) != 1.0:
        raise FormatError(f'{where}: {key} rotates a part of each head; supported is partial_rotary_factor 1.0 only')
    if inner:
        raise FormatError(
            f'{where}: {key} holds {next(iter(inner))!r}; tpmpi does not know what it means for plain RoPE')
    return number({'rope_theta': theta}, 'rope_theta', where)


def llama_config(facts: dict) -> ModelConfig:
    """transformers' LlamaConfig."""
    heads, hidden = whole(facts, 'num_attention_heads', HF_WHERE), whole(facts, 'hidden_size', HF_WHERE)
    if facts['head_dim'] is None:
        if heads < 1 or hidden % heads:
            raise FormatError(f'{HF_WHERE}: hidden_size {hidden} is no multiple of num_attention_heads {heads}, '
                              'and head_dim is not given')
        facts = facts | {'head_dim': hidden // heads}
    if facts['num_key_value_heads'] is None:
        facts = facts | {'num_key_value_heads': heads}
    if not isinstance(facts['tie_word_embeddings'], bool):
        raise FormatError(
            f'{HF_WHERE}: tie_word_embeddings is {short(facts["tie_word_embeddings"])}; expected true or false')
    return ModelConfig(
        vocab_size=whole(facts, 'vocab_size', HF_WHERE), hidden_size=hidden,
        num_layers=whole(facts, 'num_hidden_layers', HF_WHERE), num_heads=heads,
        num_kv_heads=whole(facts, 'num_key_value_heads', HF_WHERE), head_dim=whole(facts, 'head_dim', HF_WHERE),
        ffn_size=whole(facts, 'intermediate_size', HF_WHERE),
        max_positions=whole(facts, 'max_position_embeddings', HF_WHERE),
        norm_eps=number(facts, 'rms_norm_eps', HF_WHERE), rope_theta=rope_theta(facts),
        tie_embeddings=facts['tie_word_embeddings'])


HUGGING_FACE = {
    'LlamaForCausalLM': Family(
        # defaults: transformers.LlamaConfig of 5.23
        facts={
            'vocab_size': 32000, 'hidden_size': 4096, 'intermediate_size': 11008, 'num_hidden_layers': 32,
            'num_attention_heads': 32, 'num_key_value_heads': None, 'head_dim': None, 'max_position_embeddings': 2048,
            'rms_norm_eps': 1e-6, 'tie_word_embeddings': False, 'rope_theta': 10000.0, 'rope_scaling': None,
            'rope_parameters': None},
        fixed={
            'hidden_act': ('silu', 'swish'), 'attention_bias': (False, None), 'mlp_bias': (False, None),
            'pretraining_tp': (1, None), 'rope_interleaved': (False,), 'partial_rotary_factor': (1.0, 1, None),
            'sliding_window': (None,), 'is_decoder': (False, True), 'is_encoder_decoder': (False,),
            'add_cross_attention': (False,), 'cross_attention_hidden_size': (None,), 'tie_encoder_decoder': (False,),
            'pruned_heads': ({}, None), 'quantization_config': (None,)},
        neutral=frozenset(),
        config=llama_config,
        tensors={
            'embedding': 'model.embed_tokens.weight', 'final_norm': 'model.norm.weight', 'head': 'lm_head.weight',
            'attn_norm': 'model.layers.{}.input_layernorm.weight', 'q': 'model.layers.{}.self_attn.q_proj.weight',
            'k': 'model.layers.{}.self_attn.k_proj.weight', 'v': 'model.layers.{}.self_attn.v_proj.weight',
            'attn_out': 'model.layers.{}.self_attn.o_proj.weight',
            'mlp_norm': 'model.layers.{}.post_attention_layernorm.weight',
            'gate': 'model.layers.{}.mlp.gate_proj.weight', 'up': 'model.layers.{}.mlp.up_proj.weight',
            'down': 'model.layers.{}.mlp.down_proj.weight'},
        ignored_tensors=re.compile(r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq')),
}


# ---- GGUF

GGUF_WHERE = 'GGUF metadata'

# What the file is called and how it was made.  Keys of the tokenizer are checked by gguf_tokenizer.py.
NEUTRAL_PREFIXES = ('general.', 'quantize.', 'tokenizer.', 'mradermacher.')


def gguf_llama_config(facts: dict) -> ModelConfig:
    """llama.cpp's keys of `llama`, without that prefix; `tied` and `vocab_size` come from the tensors."""
    heads, hidden = whole(facts, 'attention.head_count', GGUF_WHERE), whole(facts, 'embedding_length', GGUF_WHERE)
    if heads < 1 or (facts['attention.key_length'] is None and hidden % heads):
        raise FormatError(f'{GGUF_WHERE}: {heads} query heads do not divide the hidden size {hidden}, '
                          'and llama.attention.key_length is not given')
    filled = facts | {key: hidden // heads if facts[key] is None else facts[key]
                      for key in ('attention.key_length', 'attention.value_length')}
    if filled['attention.head_count_kv'] is None:
        filled['attention.head_count_kv'] = heads
    head_dim = whole(filled, 'attention.key_length', GGUF_WHERE)
    for key in ('attention.value_length', 'rope.dimension_count'):
        if filled[key] is not None and whole(filled, key, GGUF_WHERE) != head_dim:
            raise FormatError(f'{GGUF_WHERE}: llama.{key} is {filled[key]}; supported is the head size {head_dim} only')
    return ModelConfig(
        vocab_size=facts['vocab_size'], hidden_size=hidden, num_layers=whole(facts, 'block_count', GGUF_WHERE),
        num_heads=heads, num_kv_heads=whole(filled, 'attention.head_count_kv', GGUF_WHERE), head_dim=head_dim,
        ffn_size=whole(facts, 'feed_forward_length', GGUF_WHERE),
        max_positions=whole(facts, 'context_length', GGUF_WHERE),
        norm_eps=number(facts, 'attention.layer_norm_rms_epsilon', GGUF_WHERE),
        rope_theta=number(facts, 'rope.freq_base', GGUF_WHERE), tie_embeddings=facts['tied'])


GGUF = {
    'llama': Family(
        facts={
            'vocab_size': None, 'tied': None, 'embedding_length': REQUIRED, 'block_count': REQUIRED,
            'feed_forward_length': REQUIRED, 'context_length': REQUIRED, 'attention.head_count': REQUIRED,
            'attention.head_count_kv': None, 'attention.key_length': None, 'attention.value_length': None,
            'attention.layer_norm_rms_epsilon': REQUIRED, 'rope.dimension_count': None, 'rope.freq_base': 10000.0},
        fixed={
            'rope.scaling.type': ('none',), 'rope.scaling.factor': (1.0, 0.0), 'rope.scaling.attn_factor': (1.0,),
            'rope.scaling.finetuned': (False,), 'rope.scale_linear': (1.0,), 'expert_count': (0,),
            'expert_used_count': (0,), 'attention.causal': (True,)},
        neutral=frozenset(),
        config=gguf_llama_config,
        tensors={
            'embedding': 'token_embd.weight', 'final_norm': 'output_norm.weight', 'head': 'output.weight',
            'attn_norm': 'blk.{}.attn_norm.weight', 'q': 'blk.{}.attn_q.weight', 'k': 'blk.{}.attn_k.weight',
            'v': 'blk.{}.attn_v.weight', 'attn_out': 'blk.{}.attn_output.weight', 'mlp_norm': 'blk.{}.ffn_norm.weight',
            'gate': 'blk.{}.ffn_gate.weight', 'up': 'blk.{}.ffn_up.weight', 'down': 'blk.{}.ffn_down.weight'},
        ignored_tensors=re.compile(r'(?!)')),  # none
}
