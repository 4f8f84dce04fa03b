"""A GGUF file of a model that lies as on the Hugging Face Hub, by the rules of llama.cpp's conversion scripts (conversion/*.py).

What a GGUF file cannot say (windows of Mistral, an activation, query_pre_attn_scalar, …) is what llama.cpp computes
anyway in all of CASES.
"""

from __future__ import annotations

import base64
import functools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from family_cases import CASES as FAMILY_CASES
from family_cases import FULL, SLIDING, Case, _rope, _sizes, load_reference, random_weights

GGUF_FOLDER = Path(__file__).parent / 'references' / 'gguf'
LLAMA_CPP = GGUF_FOLDER / 'llama_cpp.json'
ARCHITECTURES = {
    'LlamaForCausalLM': 'llama', 'MistralForCausalLM': 'llama', 'MixtralForCausalLM': 'llama', 'SmolLM3ForCausalLM': 'smollm3',
    'Ministral3ForCausalLM': 'mistral3', 'Qwen2ForCausalLM': 'qwen2', 'Qwen3ForCausalLM': 'qwen3',
    'Qwen2MoeForCausalLM': 'qwen2moe', 'Qwen3MoeForCausalLM': 'qwen3moe', 'GemmaForCausalLM': 'gemma',
    'Gemma2ForCausalLM': 'gemma2', 'Gemma3ForCausalLM': 'gemma3', 'PhiForCausalLM': 'phi2', 'Phi3ForCausalLM': 'phi3',
    'GPT2LMHeadModel': 'gpt2', 'GPTNeoXForCausalLM': 'gptneox', 'CohereForCausalLM': 'command-r', 'Cohere2ForCausalLM': 'cohere2',
    'Olmo2ForCausalLM': 'olmo2', 'Olmo3ForCausalLM': 'olmo2', 'OlmoeForCausalLM': 'olmoe', 'GraniteForCausalLM': 'granite',
    'GraniteMoeForCausalLM': 'granitemoe', 'GraniteMoeSharedForCausalLM': 'granitemoe', 'StableLmForCausalLM': 'stablelm'}
PERMUTED = ('llama', 'smollm3', 'mistral3', 'granite', 'granitemoe')  # Cohere's own RoPE turns neighbours
OF_THEMSELVES = ('gemma', 'gemma2', 'phi2', 'phi3', 'gpt2', 'gptneox', 'stablelm')  # scripts that write no common keys
ALPHABET = [chr(b) if 0x21 <= b < 0x7f or 0xa1 <= b < 0xad or b >= 0xae else None for b in range(256)]
for _number, _byte in enumerate([b for b in range(256) if ALPHABET[b] is None]):
    ALPHABET[_byte] = chr(256 + _number)


def _cases():
    """Cases of family_cases that GGUF can say, and others like those that it cannot."""
    for name in ('llama', 'llama_tied', 'llama_rope_llama3', 'llama_rope_linear', 'llama_rope_yarn', 'mistral_full', 'ministral3',
                 'mixtral', 'qwen2', 'qwen3', 'qwen3_bias', 'qwen3_moe', 'gemma', 'gemma_old', 'gemma3_softcap', 'phi', 'phi3',
                 'phi3_longrope_short', 'phi3_longrope_long', 'phi3_partial', 'gpt2', 'gpt_neox_sequential', 'cohere',
                 'cohere_qk_norm', 'cohere2', 'olmo2', 'olmo3', 'olmo3_yarn', 'olmoe', 'granite', 'granite_bias', 'granitemoe',
                 'stablelm', 'stablelm_parallel'):
        yield FAMILY_CASES[name]
    yield Case('smollm3_fourth', 'SmolLM3', 'SmolLM3Config', 'SmolLM3ForCausalLM', _sizes(64, 5, 4, 2, 88))
    yield Case('mistral3', 'Ministral 3', 'Ministral3Config', 'Ministral3ForCausalLM', _sizes(
        60, 2, 6, 3, 100, head_dim=16, rope_parameters=_rope(
            'yarn', factor=8.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0, beta_fast=4.0, beta_slow=0.5,
            llama_4_scaling_beta=0.0)))
    yield Case('gemma2_plain', 'Gemma 2', 'Gemma2Config', 'Gemma2ForCausalLM', _sizes(
        60, 3, 6, 3, 100, 333, head_dim=16, query_pre_attn_scalar=16, sliding_window=16, attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0), zero_centred=True)
    yield Case('gemma3_sixth', 'Gemma 3', 'Gemma3TextConfig', 'Gemma3ForCausalLM', _sizes(
        60, 7, 6, 3, 72, head_dim=20, query_pre_attn_scalar=20, sliding_window=16, rope_parameters={
            FULL: _rope('linear', 300.0, factor=8.0), SLIDING: _rope(theta=100.0)}), zero_centred=True)
    yield Case('gptneox_tanh', 'GPT-NeoX', 'GPTNeoXConfig', 'GPTNeoXForCausalLM', _sizes(
        64, 2, 4, 4, 136, rotary_pct=0.25, hidden_act='gelu_new'))
    factors = _rope('longrope', short_factor=[1.0, 1.1, 1.3, 1.6, 2.0, 2.5], long_factor=[1.2, 1.5, 2.0, 3.0, 4.5, 6.0],
                    partial_rotary_factor=0.75)
    yield Case('phi3_short', 'Phi-3', 'Phi3Config', 'Phi3ForCausalLM', _sizes(  # llama.cpp asks the size of the cache, 256
        64, 2, 4, 2, 88, max_position_embeddings=1024, original_max_position_embeddings=256, rope_parameters=factors))
    yield Case('olmoe_whole', 'OLMoE', 'OlmoeConfig', 'OlmoeForCausalLM', _sizes(
        64, 2, 4, 4, 72, num_experts=4, num_experts_per_tok=2))
    moe = {'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 64}
    yield Case('qwen2_moe_all', 'Qwen2-MoE', 'Qwen2MoeConfig', 'Qwen2MoeForCausalLM', _sizes(
        64, 2, 4, 2, 88, **moe, shared_expert_intermediate_size=56))
    granite = {'embedding_multiplier': 5.0, 'attention_multiplier': 0.15, 'residual_multiplier': 0.6, 'logits_scaling': 1.7}
    yield Case('granitemoe_shared', 'GraniteMoE', 'GraniteMoeSharedConfig', 'GraniteMoeSharedForCausalLM', _sizes(
        60, 2, 6, 3, 72, **granite, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=40))


CASES: dict[str, Case] = {case.name: case for case in _cases()}


def reference_of(name: str) -> dict[str, Any]:
    """What transformers computed for a case; as family_cases.load_reference."""
    if name in FAMILY_CASES:
        return load_reference(name)
    return json.loads((GGUF_FOLDER / f'{name}.json').read_text(encoding='utf-8'))


@functools.cache
def llama_cpp() -> dict[str, Any]:
    """What llama.cpp computed: for each case logits [positions, vocab] or why there are none."""
    return json.loads(LLAMA_CPP.read_text(encoding='utf-8'))


def numbers(text: str, rows: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), '<f4').reshape(rows, -1)


# ---- keys


def keys_of(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The metadata, without the architecture's prefix."""
    c = {'n_embd': None} | config
    hidden, heads = c.get('hidden_size', c['n_embd']), c.get('num_attention_heads', c.get('n_head'))
    rope, kv_heads = rope_of(c), c.get('num_key_value_heads')
    keys = {
        'block_count': c.get('num_hidden_layers', c.get('n_layer')), 'embedding_length': hidden, 'attention.head_count': heads,
        'context_length': c.get('max_position_embeddings', c.get('n_positions')),
        'feed_forward_length': c.get('intermediate_size')}
    if kv_heads is not None and architecture not in ('gpt2', 'gptneox'):
        keys['attention.head_count_kv'] = kv_heads
    eps = c.get('rms_norm_eps')
    if eps is not None:
        keys['attention.layer_norm_rms_epsilon'] = eps
    if (eps := c.get('layer_norm_eps', c.get('layer_norm_epsilon'))) is not None:
        keys['attention.layer_norm_epsilon'] = eps
    if c.get('head_dim') is not None:
        keys |= {'attention.key_length': c['head_dim'], 'attention.value_length': c['head_dim']}
    if architecture not in OF_THEMSELVES:
        keys |= common_keys(c, rope)
    turned = int(rope.get('partial_rotary_factor', 1.0) * (c.get('head_dim') or hidden // heads))
    if architecture in (*PERMUTED, 'phi2', 'phi3', 'gptneox', 'stablelm', 'cohere2'):
        keys['rope.dimension_count'] = turned
    return keys | own_keys(c, architecture, rope)


def rope_of(c: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters of layers without a window, from either style of config.json."""
    rope = c.get('rope_parameters') or {'rope_theta': c.get('rope_theta'), **(c.get('rope_scaling') or {})}
    return rope.get(FULL, rope)


def common_keys(c: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """What TextModel.set_gguf_parameters writes about RoPE and experts."""
    keys = {'rope.freq_base': float(rope['rope_theta'])}
    local = (c.get('rope_parameters') or {}).get(SLIDING)
    if local:
        keys['rope.freq_base_swa'] = float(local['rope_theta'])
    if rope.get('rope_type') in ('linear', 'yarn'):
        keys |= {'rope.scaling.type': rope['rope_type'], 'rope.scaling.factor': float(rope['factor'])}
    if rope.get('rope_type') == 'yarn':
        keys['rope.scaling.original_context_length'] = rope['original_max_position_embeddings']
        for theirs in ('beta_fast', 'beta_slow'):
            if theirs in rope:
                keys[f'rope.scaling.yarn_{theirs}'] = float(rope[theirs])
    for theirs, key in (('num_local_experts', 'expert_count'), ('num_experts', 'expert_count'),
                        ('num_experts_per_tok', 'expert_used_count'), ('moe_intermediate_size', 'expert_feed_forward_length'),
                        ('shared_expert_intermediate_size', 'expert_shared_feed_forward_length'),
                        ('shared_intermediate_size', 'expert_shared_feed_forward_length')):
        if c.get(theirs):
            keys[key] = c[theirs]
    return keys


def own_keys(c: Mapping[str, Any], architecture: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    """What the script of one architecture adds."""
    if architecture in PERMUTED:
        keys = {'vocab_size': c['vocab_size']}
        if architecture == 'mistral3':
            keys |= {'rope.scaling.yarn_log_multiplier': float(rope['mscale_all_dim']),
                     'attention.temperature_scale': float(rope['llama_4_scaling_beta'])}
        if architecture.startswith('granite'):
            keys |= {'attention.scale': c['attention_multiplier'], 'embedding_scale': c['embedding_multiplier'],
                     'residual_scale': c['residual_multiplier'], 'logit_scale': c['logits_scaling']}
        return keys
    sliding = c.get('sliding_window')
    pattern = [kind == SLIDING for kind in c.get('layer_types') or ()]
    match architecture:
        case 'gemma2':
            return {'attn_logit_softcapping': c['attn_logit_softcapping'],
                    'final_logit_softcapping': c['final_logit_softcapping'], 'attention.sliding_window': sliding}
        case 'gemma3':  # the pattern is not written, and 6 in llama.cpp, which reads it where it is there
            every = {} if len(pattern) > 6 else {'attention.sliding_window_pattern': pattern.index(False) + 1}
            cap = c.get('final_logit_softcapping')
            return {'attention.sliding_window': sliding} | every | ({'final_logit_softcapping': cap} if cap else {})
        case 'phi3':
            return phi3_keys(c, rope)
        case 'gpt2':
            return {'feed_forward_length': 4 * c['n_embd']}
        case 'gptneox':  # the script leaves the base out, so that it is 10000 in llama.cpp
            return {'use_parallel_residual': c['use_parallel_residual'], 'rope.freq_base': float(rope['rope_theta'])}
        case 'stablelm':
            return {'use_parallel_residual': c['use_parallel_residual']}
        case 'command-r':
            return {'logit_scale': c['logit_scale'], 'rope.scaling.type': 'none'}
        case 'cohere2':
            return {'logit_scale': c['logit_scale'], 'rope.scaling.type': 'none', 'attention.sliding_window': sliding,
                    'vocab_size': c['vocab_size'], 'attention.sliding_window_pattern': pattern.index(False) + 1}
        case 'olmo2' if sliding:
            return {'attention.sliding_window': sliding, 'attention.sliding_window_pattern': pattern}
    return {}


def phi3_keys(c: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    most = c['max_position_embeddings']
    original = rope.get('original_max_position_embeddings') or c.get('original_max_position_embeddings') or most
    keys = {'rope.scaling.original_context_length': original, 'rope.freq_base': float(rope['rope_theta']),
            'attention.sliding_window': c.get('sliding_window') or 0}
    if 'long_factor' in rope:
        scale = most / original
        keys['rope.scaling.attn_factor'] = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    return keys


# ---- tensors


def tensors_of(weights: Mapping[str, np.ndarray], config: Mapping[str, Any], architecture: str) -> dict[str, np.ndarray]:
    """The tensors by GGUF's names, changed as the scripts change them."""
    layers = config.get('num_hidden_layers', config.get('n_layer'))
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, layers)
    found = {}
    for name, weight in stacked(weights).items():
        for part, value in changed(name, weight, config, architecture):
            theirs = part if part.startswith('blk.') else names.get_name(part, try_suffixes=('.weight', '.bias'))
            assert theirs is not None, part
            found[theirs] = np.ascontiguousarray(value)
    return found | rope_tensors(config, architecture)


def stacked(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Matrices of experts, and gains of heads, as one tensor."""
    stacks, result = {}, {}
    for name, weight in weights.items():
        if found := re.fullmatch(r'(.*)\.(experts|norms)\.(\d+)\.?(\w*)\.weight', name):
            before, what, number, which = found.groups()
            if 'block_sparse_moe' in before:  # Mixtral's names of the whole
                before, which = re.sub(r'model\.(layers\.\d+)\..*', r'\1.feed_forward', before), which
            whole = f'{before}.weight' if what == 'norms' else f'{before}.experts.{which}.weight'
            stacks.setdefault(whole, {})[int(number)] = weight
        else:
            result[name] = weight
    return result | {name: np.stack([parts[i] for i in range(len(parts))]) for name, parts in stacks.items()}


def changed(name: str, weight: np.ndarray, c: Mapping[str, Any], architecture: str):
    """One tensor of theirs as one or two of GGUF's: pairs of a name, ours or GGUF's, and numbers."""
    block = re.search(r'\.(\d+)\.', name)
    if architecture in PERMUTED and re.search(r'\.[qk]_proj\.', name):
        heads = c['num_attention_heads'] if '.q_proj.' in name else c['num_key_value_heads']
        yield name, interleaved(weight, heads)
    elif architecture.startswith('gemma') and name.endswith('norm.weight'):
        yield name, weight + np.float32(1)
    elif architecture == 'gpt2' and re.search(r'\.c_(attn|proj|fc)\.weight', name):
        yield name, weight.T
    elif architecture == 'gptneox' and '.query_key_value.' in name:
        parts = weight.reshape(c['num_attention_heads'], 3, -1, *weight.shape[1:])
        yield name, np.concatenate([parts[:, i].reshape(-1, *weight.shape[1:]) for i in range(3)])
    elif name.endswith('input_linear.weight'):
        kind = 'shexp' if 'shared_mlp' in name else 'exps'
        for part, half in zip(('gate', 'up'), np.split(weight, 2, axis=-2), strict=True):
            yield f'blk.{block[1]}.ffn_{part}_{kind}.weight', half
    elif name.endswith('shared_expert_gate.weight'):
        yield name, weight[0]
    else:
        yield name, weight


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows 2j and 2j + 1 of a head are Hugging Face's j and j + head_dim / 2."""
    out, dim = np.empty_like(weight), len(weight) // heads
    for head in range(heads):
        for j in range(dim // 2):
            out[head * dim + 2 * j] = weight[head * dim + j]
            out[head * dim + 2 * j + 1] = weight[head * dim + j + dim // 2]
    return out


def rope_tensors(c: Mapping[str, Any], architecture: str) -> dict[str, np.ndarray]:
    """Factors of pairs: Llama 3's and LongRoPE's."""
    rope = rope_of(c)
    if 'long_factor' in rope:
        return {f'rope_factors_{kind}.weight': np.array(rope[f'{kind}_factor'], np.float32) for kind in ('long', 'short')}
    if rope.get('rope_type') != 'llama3':
        return {}
    dim, factors = c.get('head_dim') or c['hidden_size'] // c['num_attention_heads'], []
    low, high, original = rope['low_freq_factor'], rope['high_freq_factor'], rope['original_max_position_embeddings']
    for i in range(0, dim, 2):
        wave = 2 * math.pi * rope['rope_theta'] ** (i / dim)
        smooth = (original / wave - low) / (high - low)
        factors.append(1 if wave < original / high else rope['factor'] if wave > original / low
                       else 1 / ((1 - smooth) / rope['factor'] + smooth))
    return {'rope_freqs.weight': np.array(factors, np.float32)}


# ---- the file


def write_gguf(path: Path, name: str, kind=gguf.GGMLQuantizationType.F32, change=None) -> Path:
    """The GGUF file of a case, its matrices of a type where that fits.

    change: a function that gets the keys with their prefix and the tensors, and may change both.
    """
    reference = reference_of(name)
    architecture = ARCHITECTURES[reference['architecture']]
    weights = random_weights(reference['shapes'], reference['seed'], reference['zero_centred'])
    tensors = tensors_of(weights, reference['config'], architecture)
    keys = {f'{architecture}.{key}': value for key, value in keys_of(reference['config'], architecture).items()}
    if change is not None:
        change(keys, tensors)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (keys | tokenizer_keys(reference['config']['vocab_size'])).items():
        writer.add_key_value(key, value, value_type(value))
    for theirs, weight in tensors.items():
        fits = weight.ndim > 1 and weight.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 and 'position' not in theirs
        of = kind if fits else gguf.GGMLQuantizationType.F32
        writer.add_tensor(theirs, gguf.quants.quantize(weight, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def value_type(value):
    """GGUF's type of a value; whole numbers are unsigned, as the scripts write them."""
    kinds = gguf.GGUFValueType
    if isinstance(value, list):
        return kinds.ARRAY
    return {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}[type(value)]


def tokenizer_keys(vocab_size: int) -> dict[str, Any]:
    """A byte-level tokenizer with one merge; 256 ends a text."""
    tokens = [*ALPHABET, '<|endoftext|>', 'in', *(f'<unused{i}>' for i in range(vocab_size - 258))]
    return {'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'gpt-2', 'tokenizer.ggml.tokens': tokens,
            'tokenizer.ggml.token_type': [1] * 256 + [3, 1] + [5] * (vocab_size - 258), 'tokenizer.ggml.merges': ['i n'],
            'tokenizer.ggml.eos_token_id': 256, 'tokenizer.ggml.add_bos_token': False}
