"""What the keys and tensor names of each architecture of GGUF mean.  A new one is one more entry in GGUF.

A GGUF file says less than a config.json: much of what a model is lies in llama.cpp's code.  Source of every constant here is
its src/models/NAME.cpp (load_arch_hparams and the graph), src/llama-model.cpp (defaults of keys, llama_model_rope_type) and
src/llama-hparams.h, of https://github.com/ggml-org/llama.cpp as llama-cpp-python 0.3.36 has it.  Biases, norms of Q and K
and a separate head are there where their tensors are.  Where llama.cpp passes over a key that transformers obeys, as the
window of Phi-3 or YaRN's beta_fast, the key is obeyed: it is what the model was trained with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from tpmpi.config import ModelConfig
from tpmpi.formats import views
from tpmpi.formats.families import (
    REQUIRED,
    Change,
    Family,
    Place,
    Taken,
    expert,
    flat,
    for_each_head,
    for_each_kv_head,
    interleaved,
    number,
    of_qkv,
    part,
    short,
    truth,
    whole,
)
from tpmpi.formats.gguf_rope import ROPE_FIXED, ROPE_KEYS, ROPE_TENSORS, rope_facts
from tpmpi.formats.source import FormatError, TensorSource

GGUF_WHERE = 'GGUF metadata'

# What the file is called and how it was made.  Keys of the tokenizer are checked by gguf_tokenizer.py.
NEUTRAL_PREFIXES = ('general.', 'quantize.', 'tokenizer.', 'mradermacher.')

Found = Mapping[str, TensorSource]
RMS_EPS, LAYER_EPS = 'attention.layer_norm_rms_epsilon', 'attention.layer_norm_epsilon'
KEYS = {
    'vocab_size': None, 'embedding_length': REQUIRED, 'block_count': REQUIRED, 'feed_forward_length': REQUIRED,
    'context_length': REQUIRED, 'attention.head_count': REQUIRED, 'attention.head_count_kv': None,
    'attention.key_length': None, 'attention.value_length': None} | ROPE_KEYS
FIXED = {
    'attention.causal': (True,), 'pooling_type': (0, 3), 'nextn_predict_layers': (0,), 'leading_dense_block_count': (0,),
    'attention.max_alibi_bias': (0.0,), 'attention.clamp_kqv': (0.0,), 'attention.temperature_scale': (0.0,),
    'tensor_data_layout': ('Meta AI original pth',)} | ROPE_FIXED
NO_EXPERTS = {'expert_count': (0,), 'expert_used_count': (0,)}
EXPERT_KEYS = {'expert_count': 0, 'expert_used_count': 0, 'expert_feed_forward_length': 0,
               'expert_shared_feed_forward_length': 0}
EXPERTS_FIXED = {'expert_group_count': (0, 1), 'expert_group_used_count': (0, 1), 'expert_weights_scale': (0.0, 1.0),
                 'expert_gating_func': (0, 1)}  # 1: softmax
WINDOW_KEYS = {'attention.sliding_window': 0, 'attention.sliding_window_pattern': None, 'rope.freq_base_swa': None}
GRANITE_KEYS = {'logit_scale': REQUIRED, 'residual_scale': 0.0, 'embedding_scale': 0.0, 'attention.scale': 0.0}


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp computes for an architecture, beyond what is common to all."""

    facts: Mapping[str, object] = field(default_factory=dict)  # of ModelConfig, which no key says
    keys: Mapping[str, object] = field(default_factory=dict)  # beside KEYS; as Family.facts
    fixed: Mapping[str, tuple] = field(default_factory=dict)
    neutral: frozenset[str] = frozenset()
    more: Callable[[dict, dict, Found], dict] = lambda keys, facts, found: {}  # facts that follow from keys and tensors
    neighbours: bool = False  # RoPE turns the pairs (2i, 2i + 1) of a head: LLAMA_ROPE_TYPE_NORM
    experts: bool = False
    normalize_experts: bool = False
    gate_up: bool = False  # ffn_up holds gate, then up

    @property
    def eps(self) -> str:
        return LAYER_EPS if self.facts.get('norm') == 'layer' else RMS_EPS

    def family(self, found: Found) -> Family:
        """The meaning of keys and tensors for a file with these tensors."""
        experts = (EXPERT_KEYS, EXPERTS_FIXED | {'expert_weights_norm': (self.normalize_experts,)})
        keys, fixed = experts if self.experts else ({}, NO_EXPERTS)
        return Family(
            facts=KEYS | {self.eps: REQUIRED} | keys | self.keys, fixed=FIXED | fixed | self.fixed, neutral=self.neutral,
            config=functools.partial(config_of, self, found), tensors=tensor_table(self, found), ignored_tensors=ROPE_TENSORS)


# ---- configuration


def same(keys: Mapping, key: str) -> int:
    """A whole number, or one for each layer where all are the same."""
    value = keys[key]
    if isinstance(value, list) and value:
        if len(set(value)) > 1:
            raise FormatError(f'{GGUF_WHERE}: {key} is {short(value)}; supported is one number for all layers only')
        value = value[0]
    return whole({key: value}, key, GGUF_WHERE)


def config_of(architecture: Architecture, found: Found, keys: dict) -> ModelConfig:
    """The configuration, from the keys without the architecture's prefix and from what tensors there are."""
    heads, hidden = same(keys, 'attention.head_count'), whole(keys, 'embedding_length', GGUF_WHERE)
    if heads < 1 or (keys['attention.key_length'] is None and hidden % heads):
        raise FormatError(f'{GGUF_WHERE}: {heads} query heads do not divide the hidden size {hidden}, '
                          'and attention.key_length is not given')
    dims = {key: hidden // heads if keys[key] is None else whole(keys, key, GGUF_WHERE)
            for key in ('attention.key_length', 'attention.value_length')}
    head_dim = dims['attention.key_length']
    if dims['attention.value_length'] != head_dim:
        raise FormatError(f'{GGUF_WHERE}: attention.value_length is {dims["attention.value_length"]}; '
                          f'supported is the head size {head_dim} only')
    facts = {
        'vocab_size': found['token_embd.weight'].shape[0], 'hidden_size': hidden,
        'num_layers': whole(keys, 'block_count', GGUF_WHERE), 'num_heads': heads, 'head_dim': head_dim,
        'num_kv_heads': heads if keys['attention.head_count_kv'] is None else same(keys, 'attention.head_count_kv'),
        'ffn_size': same(keys, 'feed_forward_length'), 'max_positions': whole(keys, 'context_length', GGUF_WHERE),
        'norm_eps': number(keys, architecture.eps, GGUF_WHERE), 'tie_embeddings': 'output.weight' not in found,
        'norm_bias': 'output_norm.bias' in found, 'head_bias': 'output.bias' in found,
        'qkv_bias': 'blk.0.attn_q.bias' in found or 'blk.0.attn_qkv.bias' in found,
        'attn_out_bias': 'blk.0.attn_output.bias' in found, 'mlp_bias': 'blk.0.ffn_up.bias' in found}
    if 'blk.0.attn_q_norm.weight' in found:
        facts['qk_norm'] = 'head'
    ModelConfig(**facts, rope_theta=None)  # sizes first: what follows makes lists of them
    if 'rope_theta' not in architecture.facts:
        facts |= rope_facts(keys, found, facts, GGUF_WHERE)
    facts |= expert_facts(architecture, keys, found) | architecture.facts
    return ModelConfig(**facts | architecture.more(keys, facts, found))


def expert_facts(architecture: Architecture, keys: dict, found: Found) -> dict:
    """Facts of a mixture of experts; none where there are no experts."""
    if not architecture.experts or same(keys, 'expert_count') == 0:
        return {}
    return {
        'num_experts': same(keys, 'expert_count'), 'experts_per_token': same(keys, 'expert_used_count'),
        'expert_ffn_size': same(keys, 'expert_feed_forward_length') or same(keys, 'feed_forward_length'),
        'normalize_experts': architecture.normalize_experts,
        'shared_ffn_size': same(keys, 'expert_shared_feed_forward_length')}


def window_facts(period: int, keys: dict, facts: dict, found: Found) -> dict:
    """A window in all layers but every `period`-th, where the file does not say which (load_swa_pattern).

    0 makes it all layers, and so does a period of 0 in llama.cpp.
    """
    window, layers = whole(keys, 'attention.sliding_window', GGUF_WHERE), facts['num_layers']
    if window == 0:
        return {}
    pattern = keys['attention.sliding_window_pattern']
    if isinstance(pattern, list):
        if len(pattern) != layers or not all(isinstance(value, int) for value in pattern):
            raise FormatError(f'{GGUF_WHERE}: attention.sliding_window_pattern is {short(pattern)}; expected true or false for '
                              f'each of {layers} layers')
        sliding = tuple(i for i in range(layers) if pattern[i])
    else:
        period = period if pattern is None else whole(keys, 'attention.sliding_window_pattern', GGUF_WHERE)
        sliding = tuple(i for i in range(layers) if period == 0 or i % period < period - 1)
    return {'window': window, 'window_layers': sliding}


def cohere2(keys: dict, facts: dict, found: Found) -> dict:
    """Layers without a window have no RoPE."""
    window = window_facts(4, keys, facts, found)
    sliding = window.get('window_layers', ())
    return window | scaled_logits(keys, facts, found) | {
        'nope_layers': tuple(i for i in range(facts['num_layers']) if i not in sliding)}


def scaled_logits(keys: dict, facts: dict, found: Found) -> dict:
    return {'logit_multiplier': number(keys, 'logit_scale', GGUF_WHERE) or 1.0}


def gemma(keys: dict, facts: dict, found: Found) -> dict:
    return {'embedding_multiplier': facts['hidden_size'] ** 0.5}


def gemma_scale(largest: int, facts: dict) -> dict:
    """The 27B model, which llama.cpp knows by its number of layers, has query_pre_attn_scalar = hidden / heads."""
    return {'attention_scale': (facts['hidden_size'] // facts['num_heads']) ** -0.5} if facts['num_layers'] == largest else {}


def gemma2(keys: dict, facts: dict, found: Found) -> dict:
    return gemma(keys, facts, found) | gemma_scale(46, facts) | window_facts(2, keys, facts, found) | local_rope(keys) | {
        'attention_softcap': number(keys, 'attn_logit_softcapping', GGUF_WHERE),
        'logit_softcap': number(keys, 'final_logit_softcapping', GGUF_WHERE)}


def gemma3(keys: dict, facts: dict, found: Found) -> dict:
    """Layers with a window have a RoPE of their own, which is not stretched; linear scaling is in context_length already."""
    window = window_facts(6, keys, facts, found)
    return gemma(keys, facts, found) | gemma_scale(62, facts) | window | (local_rope(keys, 10000.0) if window else {}) | {
        'logit_softcap': number(keys, 'final_logit_softcapping', GGUF_WHERE) or None,
        'max_positions': whole(keys, 'context_length', GGUF_WHERE)}


def local_rope(keys: dict, otherwise: float | None = None) -> dict:
    """RoPE of layers with a window."""
    given = keys['rope.freq_base_swa']
    return {'local_rope_theta': otherwise if given is None else number(keys, 'rope.freq_base_swa', GGUF_WHERE)}


def olmo2(keys: dict, facts: dict, found: Found) -> dict:
    """OLMo 2, and OLMo 3, whose layers with a window have RoPE that is not stretched."""
    window = window_facts(4, keys, facts, found)
    return window | (local_rope(keys, facts['rope_theta']) if window else {})


def mistral3(keys: dict, facts: dict, found: Found) -> dict:
    """Queries grow from the original context length on: n_attn_temp_floor_scale = n_ctx_orig_yarn."""
    growth = number(keys, 'attention.temperature_scale', GGUF_WHERE)
    original = keys['rope.scaling.original_context_length']
    positions = facts['max_positions'] if original is None else whole(keys, 'rope.scaling.original_context_length', GGUF_WHERE)
    return {'query_growth': growth, 'query_growth_positions': positions} if growth else {}


def granite(keys: dict, facts: dict, found: Found) -> dict:
    """Multipliers; rope.scaling.finetuned = false takes RoPE away (granite.cpp)."""
    scale = {key: number(keys, key, GGUF_WHERE) for key in GRANITE_KEYS}
    if not scale['logit_scale']:
        raise FormatError(f'{GGUF_WHERE}: logit_scale is 0; logits are divided by it')
    has_rope = truth(keys, 'rope.scaling.finetuned', GGUF_WHERE)
    return {
        'logit_multiplier': 1 / scale['logit_scale'], 'residual_multiplier': scale['residual_scale'] or 1.0,
        'embedding_multiplier': scale['embedding_scale'] or 1.0, 'attention_scale': scale['attention.scale'] or None,
        'rope_theta': facts['rope_theta'] if has_rope else None}


def qwen_moe(keys: dict, facts: dict, found: Found) -> dict:
    """Sizes that are not given follow from feed_forward_length."""
    count, ffn = same(keys, 'expert_used_count'), same(keys, 'feed_forward_length')
    given = same(keys, 'expert_feed_forward_length')
    return {'expert_ffn_size': given or ffn // max(1, count)}


def qwen2_moe(keys: dict, facts: dict, found: Found) -> dict:
    shared = same(keys, 'expert_shared_feed_forward_length') or same(keys, 'feed_forward_length')
    return qwen_moe(keys, facts, found) | {'shared_ffn_size': shared, 'shared_gate': True}


def phi3(keys: dict, facts: dict, found: Found) -> dict:
    """llama.cpp turns the window off; it is in the file, and in transformers."""
    return {'window': whole(keys, 'attention.sliding_window', GGUF_WHERE) or None}


def gpt2(keys: dict, facts: dict, found: Found) -> dict:
    positions = found.get('position_embd.weight')
    if positions is None:
        raise FormatError(f'{GGUF_WHERE}: gpt2 without a tensor position_embd.weight')
    return {'learned_positions': positions.shape[0]}


def gptneox(keys: dict, facts: dict, found: Found) -> dict:
    parallel = truth(keys, 'use_parallel_residual', GGUF_WHERE)
    return {'parallel_block': parallel, 'parallel_mlp_norm': parallel}


def stablelm(keys: dict, facts: dict, found: Found) -> dict:
    """llama.cpp asks for the tensor, not for use_parallel_residual, which says true in files of sequential models, too."""
    return {'parallel_block': 'blk.0.ffn_norm.weight' not in found}


# ---- tensors


def tensor_table(architecture: Architecture, found: Found) -> dict[str, str | Taken]:
    """Where each tensor of ours is in a file with these tensors."""
    table = {
        'embedding': 'token_embd.weight', 'position_embedding': 'position_embd.weight', 'final_norm': 'output_norm.weight',
        'head': 'output.weight', 'attn_norm': layer('attn_norm'), 'attn_out': layer('attn_output'),
        'attn_post_norm': layer('post_attention_norm'), 'mlp_norm': layer('ffn_norm'), 'mlp_post_norm': layer('post_ffw_norm'),
        'gate': layer('ffn_gate'), 'up': layer('ffn_up'), 'down': layer('ffn_down'), 'router': layer('ffn_gate_inp'),
        'shared/gate': layer('ffn_gate_shexp'), 'shared/up': layer('ffn_up_shexp'), 'shared/down': layer('ffn_down_shexp'),
        'shared/gate_by_token': Taken(layer('ffn_gate_inp_shexp'), (one_row,))}
    fused = 'blk.0.attn_qkv.weight' in found
    for index, name in enumerate('qkv'):
        order = (interleaved(kv=name == 'k'),) if architecture.neighbours and name != 'v' else ()
        cut = (of_qkv(index),) if fused else ()
        table[name] = Taken(layer('attn_qkv' if fused else f'attn_{name}'), cut + order)
        if 'blk.0.attn_q.bias' in found:  # also beside a fused matrix
            table[f'{name}_bias'] = Taken(f'blk.{{}}.attn_{name}.bias', order)
        if name != 'v':
            table[f'{name}_norm'] = Taken(layer(f'attn_{name}_norm'), (gains(architecture, name),) + order)
    if architecture.gate_up:
        table |= {'gate': Taken(layer('ffn_up'), (part(0),)), 'up': Taken(layer('ffn_up'), (part(1),))}
    one_by_one = 'blk.0.ffn_gate.0.weight' in found  # as files had them until 2024-04
    for name in ('gate', 'up', 'down'):
        table[f'experts/{name}'] = (
            f'blk.{{}}.ffn_{name}.{{}}.weight' if one_by_one else Taken(layer(f'ffn_{name}_exps'), (expert,)))
    return table


def layer(name: str) -> str:
    return f'blk.{{}}.{name}.weight'


def one_row(source: TensorSource, place: Place) -> TensorSource:
    """[hidden] -> [1, hidden]."""
    return views.reshaped(source, (1, place.config.hidden_size))


def gains(architecture: Architecture, name: str) -> Change:
    """Gains of the norm of Q or K: one vector for all heads, one for each, or one over all."""
    def change(source: TensorSource, place: Place) -> TensorSource:
        if len(source.shape) == 2:
            return flat(source, place)
        if place.config.qk_norm == 'head':
            return (for_each_head if name == 'q' else for_each_kv_head)(source, place)
        return source
    return change


LLAMA = Architecture(experts=True, normalize_experts=True, neighbours=True)
GRANITE = Architecture(experts=True, normalize_experts=True, neighbours=True, more=granite,
                       keys=GRANITE_KEYS | {'rope.scaling.finetuned': True})
GEMMA = {'activation': 'gelu_tanh'}
COHERE = {'norm': 'layer', 'parallel_block': True}
OF_2019 = {'norm': 'layer', 'gated': False, 'activation': 'gelu_tanh'}  # of gptneox, too, where transformers has 'gelu'
GGUF = {
    'llama': LLAMA,
    'mistral3': replace(LLAMA, keys={'attention.temperature_scale': 0.0}, more=mistral3),
    'smollm3': Architecture(neighbours=True, more=lambda keys, facts, found: {
        'nope_layers': tuple(range(3, facts['num_layers'], 4))}),  # n_no_rope_layer_step = 4
    'qwen2': Architecture(),
    'qwen3': Architecture(),
    'qwen2moe': Architecture(experts=True, more=qwen2_moe),
    'qwen3moe': Architecture(experts=True, normalize_experts=True, more=qwen_moe),
    'gemma': Architecture(GEMMA, more=gemma),
    'gemma2': Architecture(GEMMA | {'post_norm': True}, more=gemma2, keys=WINDOW_KEYS | {
        'attention.sliding_window': 4096, 'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0}),
    'gemma3': Architecture(GEMMA | {'post_norm': True}, more=gemma3, keys=WINDOW_KEYS | {'final_logit_softcapping': 0.0}),
    'phi2': Architecture(OF_2019 | {'parallel_block': True}),
    'phi3': Architecture(gate_up=True, more=phi3, keys={'attention.sliding_window': 0}),
    'gpt2': Architecture(OF_2019 | {'rope_theta': None}, more=gpt2),
    'gptneox': Architecture(OF_2019, more=gptneox, keys={'use_parallel_residual': REQUIRED}),
    'command-r': Architecture(COHERE, neighbours=True, more=scaled_logits, keys={'logit_scale': 0.0}),
    'cohere2': Architecture(COHERE, neighbours=True, more=cohere2, keys=WINDOW_KEYS | {
        'attention.sliding_window': REQUIRED, 'logit_scale': REQUIRED}),
    'olmo2': Architecture({'pre_norm': False, 'post_norm': True, 'qk_norm': 'all'}, more=olmo2, keys=WINDOW_KEYS),
    'olmoe': Architecture({'qk_norm': 'all'}, experts=True),
    'granite': GRANITE,
    'granitemoe': GRANITE,
    'stablelm': Architecture({'norm': 'layer'}, more=stablelm, neutral=frozenset({'use_parallel_residual'})),
}
