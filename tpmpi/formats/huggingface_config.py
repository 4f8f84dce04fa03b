"""From the keys of a config.json to ModelConfig: what many architectures have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tpmpi.config import ModelConfig
from tpmpi.formats.families import Family, number, short, truth, whole
from tpmpi.formats.huggingface_rope import FULL, SLIDING, WHERE, read_rope
from tpmpi.formats.source import FormatError

# Names, versions, training and generation settings, which the computation never reads.
NEUTRAL_KEYS = frozenset((
    'architectures', 'model_type', 'transformers_version', '_name_or_path', 'name_or_path', 'torch_dtype', 'dtype',
    '_attn_implementation', '_attn_implementation_autoset', '_flash_attn_2_enabled', 'attn_implementation', 'use_cache',
    'initializer_range', 'attention_dropout', 'attention_probs_dropout_prob', 'hidden_dropout', 'hidden_dropout_prob',
    'resid_pdrop', 'embd_pdrop', 'attn_pdrop', 'classifier_dropout', 'cache_implementation', 'gradient_checkpointing',
    'bos_token_id', 'eos_token_id', 'pad_token_id', 'unk_token_id',
    'sep_token_id', 'decoder_start_token_id', 'tokenizer_class', 'prefix', 'return_dict', 'return_dict_in_generate',
    'output_hidden_states', 'output_attentions', 'output_scores', 'torchscript', 'use_bfloat16', 'id2label', 'label2id',
    'problem_type', 'task_specific_params', 'finetuning_task', 'chunk_size_feed_forward', 'transformers.js_config',
    'is_llama_config', 'unsloth_fixed', 'unsloth_version', 'do_sample', 'temperature', 'top_k', 'top_p', 'typical_p',
    'min_length', 'max_length', 'max_new_tokens', 'repetition_penalty', 'length_penalty', 'no_repeat_ngram_size',
    'num_beams', 'num_beam_groups', 'diversity_penalty', 'early_stopping', 'num_return_sequences', 'bad_words_ids',
    'begin_suppress_tokens', 'suppress_tokens', 'encoder_no_repeat_ngram_size', 'exponential_decay_length_penalty',
    'forced_bos_token_id', 'forced_eos_token_id', 'remove_invalid_values', 'tf_legacy_loss', 'num_labels', '_num_labels',
    'output_past', 'predict_special_tokens', 'custom_pipelines', 'internal_version', 'max_sequence_length',
    'pretraining_tp',  # how a sum was split while training
))

# Keys of every architecture that mean what this code computes.
FIXED = {
    'is_decoder': (False, True), 'is_encoder_decoder': (False,), 'add_cross_attention': (False,),
    'cross_attention_hidden_size': (None,), 'tie_encoder_decoder': (False,), 'pruned_heads': ({}, None),
    'quantization_config': (None,)}

ACTIVATIONS = {
    'silu': 'silu', 'swish': 'silu', 'gelu': 'gelu', 'gelu_python': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_fast': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_python_tanh': 'gelu_tanh', 'gelu_accurate': 'gelu_tanh', 'relu': 'relu',
    'linear': 'identity'}


def telling(values: Mapping, family: Family) -> dict:
    """The keys of a config.json without those that say, of a family that does not read them, what holds in any case."""
    kinds, heads, hidden = (values.get(key) for key in ('layer_types', 'num_attention_heads', 'hidden_size'))
    unused = values.get('use_sliding_window') in (False, None)
    windowless = 'sliding_window' not in family.facts or values.get('sliding_window', 0) is None or (
        unused and 'use_sliding_window' in family.facts)
    plain = all(not values.get(key) or isinstance(values[key], dict) and values[key].get('rope_type') == 'default'
                for key in ('rope_scaling', 'rope_parameters'))
    shared = hidden // heads if type(hidden) is int and type(heads) is int and heads and hidden % heads == 0 else None
    silent = {
        'layer_types': windowless and isinstance(kinds, list) and all(kind == FULL for kind in kinds),
        'use_sliding_window': windowless and unused, 'max_window_layers': windowless and unused,
        'head_dim': values.get('head_dim') in (None, shared), 'original_max_position_embeddings': plain}
    unread = {key for key, holds in silent.items() if holds and key not in family.facts and key not in family.fixed}
    return {key: value for key, value in values.items() if key not in unread}


def standard(facts: Mapping, rope: Callable[[Mapping, int], dict] = read_rope, **more) -> ModelConfig:
    """Of the keys that nearly all have.  rope: keyword arguments from the facts and head_dim; more: those that differ."""
    heads, hidden = whole(facts, 'num_attention_heads', WHERE), whole(facts, 'hidden_size', WHERE)
    head_dim = facts.get('head_dim')
    if head_dim is None:
        if heads < 1 or hidden % heads:
            raise FormatError(f'{WHERE}: hidden_size {hidden} is no multiple of num_attention_heads {heads}, '
                              'and head_dim is not given')
        head_dim = hidden // heads
    head_dim = whole({'head_dim': head_dim}, 'head_dim', WHERE)
    kv_heads = heads if facts.get('num_key_value_heads') is None else whole(facts, 'num_key_value_heads', WHERE)
    eps = next(key for key in ('rms_norm_eps', 'layer_norm_eps', 'layer_norm_epsilon') if key in facts)
    values = {
        'vocab_size': whole(facts, 'vocab_size', WHERE), 'hidden_size': hidden,
        'num_layers': whole(facts, 'num_hidden_layers', WHERE), 'num_heads': heads, 'num_kv_heads': kv_heads,
        'head_dim': head_dim, 'ffn_size': whole(facts, 'intermediate_size', WHERE), 'norm_eps': number(facts, eps, WHERE),
        'tie_embeddings': truth(facts, 'tie_word_embeddings', WHERE)}
    if 'hidden_act' in facts:
        values['activation'] = activation(facts['hidden_act'])
    if 'attention_bias' in facts:
        values['qkv_bias'] = values['attn_out_bias'] = flag(facts, 'attention_bias')
    if 'mlp_bias' in facts:
        values['mlp_bias'] = flag(facts, 'mlp_bias')
    length = whole(facts, 'max_position_embeddings', WHERE) if 'max_position_embeddings' in facts else 1
    ModelConfig(**values, max_positions=length, rope_theta=None)  # sizes first: RoPE makes lists of them
    return ModelConfig(**values | rope(facts, head_dim) | unchunked(facts) | more)


def flag(facts: Mapping, key: str) -> bool:
    """True or false; null counts as false."""
    return facts[key] is not None and truth(facts, key, WHERE)


def optional(facts: Mapping, key: str) -> float | None:
    """A number or null."""
    return None if facts[key] is None else number(facts, key, WHERE)


def activation(name) -> str:
    """Our name of an activation."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise FormatError(f'{WHERE}: hidden_act is {short(name)}; supported are {", ".join(ACTIVATIONS)}')
    return ACTIVATIONS[name]


def either(facts: Mapping, keys: tuple[str, str], default: int) -> int:
    """A whole number that has two names.  Raises FormatError where both are given and differ."""
    given = {whole(facts, key, WHERE) for key in keys if facts[key] is not None}
    if len(given) > 1:
        raise FormatError(f'{WHERE}: {keys[0]} is {short(facts[keys[0]])} and {keys[1]} is {short(facts[keys[1]])}; '
                          'expected the same')
    return next(iter(given), default)


def agree(facts: Mapping, key: str, value) -> None:
    """Raises FormatError where a second key for a value is given and differs."""
    if facts[key] is not None and number(facts, key, WHERE) != value:
        raise FormatError(f'{WHERE}: {key} is {short(facts[key])}; expected {short(value)}, as the other keys say')


def layer_numbers(facts: Mapping, key: str) -> tuple[int, ...]:
    """A list of numbers of layers, or null for none."""
    value = facts[key] or []
    if not isinstance(value, list) or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
        raise FormatError(f'{WHERE}: {key} is {short(value)}; expected numbers of layers')
    return tuple(i for i in value if i < whole(facts, 'num_hidden_layers', WHERE))


# ---- sliding windows


def sliding_layers(facts: Mapping, default: Callable[[int], bool]) -> tuple[int, ...]:
    """The layers that look through a window: as `layer_types` says, else those for which `default` is true."""
    count, kinds = whole(facts, 'num_hidden_layers', WHERE), facts.get('layer_types')
    if kinds is None:
        return tuple(i for i in range(min(count, 1 << 14)) if default(i))
    if not isinstance(kinds, list) or len(kinds) != count or not all(kind in (FULL, SLIDING) for kind in kinds):
        raise FormatError(f'{WHERE}: layer_types is {short(kinds)}; expected {FULL!r} or {SLIDING!r} for each of {count} layers')
    return tuple(i for i, kind in enumerate(kinds) if kind == SLIDING)


def windows(facts: Mapping, default: Callable[[int], bool] = lambda layer: True, use: bool = True) -> dict:
    """window and window_layers of ModelConfig.  use: whether the architecture takes the window that is given."""
    window = facts['sliding_window'] if use else None
    layers = sliding_layers(facts, lambda layer: window is not None and default(layer))
    if not layers:
        return {}
    if window is None:
        raise FormatError(f'{WHERE}: layer_types has {SLIDING!r}, but there is no sliding_window')
    every = len(layers) == facts['num_hidden_layers']
    return {'window': whole(facts, 'sliding_window', WHERE), 'window_layers': None if every else layers}


def pattern_windows(facts: Mapping, default: int) -> dict:
    """The same where one layer in `sliding_window_pattern` sees everything, the last of each run."""
    pattern = default if facts['sliding_window_pattern'] is None else whole(facts, 'sliding_window_pattern', WHERE)
    if pattern < 1:
        raise FormatError(f'{WHERE}: sliding_window_pattern is {pattern}; expected 1 or more')
    return windows(facts, lambda layer: (layer + 1) % pattern != 0)


def unchunked(facts: Mapping) -> dict:
    """max_positions of a model with dual chunk attention: within its first chunk that is the usual attention."""
    chunks = facts.get('dual_chunk_attention_config')
    if chunks is None:
        return {}
    if not isinstance(chunks, dict):
        raise FormatError(f'{WHERE}: dual_chunk_attention_config is {short(chunks)}; expected null or an object')
    size, local = (whole({key: chunks.get(key)}, key, WHERE) for key in ('chunk_size', 'local_size'))
    if not 0 <= local < size:
        raise FormatError(f'{WHERE}: chunk_size is {size} and local_size {local}; expected 0 or more, and less than the chunk')
    return {'max_positions': min(size - local, whole(facts, 'max_position_embeddings', WHERE))}


# ---- experts


def experts(facts: Mapping, count: int, ffn: str, dense: tuple[int, ...] = (), normalize: bool | None = None, **more) -> dict:
    """The facts of a mixture of experts, or none where every layer is dense."""
    if len(dense) == facts['num_hidden_layers'] or count == 0:
        return {}
    return {'num_experts': count, 'experts_per_token': whole(facts, 'num_experts_per_tok', WHERE),
            'expert_ffn_size': whole(facts, ffn, WHERE), 'dense_layers': dense,
            'normalize_experts': truth(facts, 'norm_topk_prob', WHERE) if normalize is None else normalize} | more


def dense_layers(facts: Mapping) -> tuple[int, ...]:
    """Layers without experts: those of `mlp_only_layers`, and all but every `decoder_sparse_step`-th."""
    step, only = whole(facts, 'decoder_sparse_step', WHERE), layer_numbers(facts, 'mlp_only_layers')
    if step < 1:
        raise FormatError(f'{WHERE}: decoder_sparse_step is {step}; expected 1 or more')
    count = min(whole(facts, 'num_hidden_layers', WHERE), 1 << 14)
    return tuple(i for i in range(count) if i in only or (i + 1) % step)
