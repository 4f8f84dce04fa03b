"""Small models of many families: settings, weights from a seed, and the folder that such a model is on the Hugging Face Hub.

The settings are keyword arguments of the configuration classes of transformers.  What it computes with them lies in
references/families, made by references/make_families.py; nothing here needs PyTorch.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / 'references' / 'families'
POSITIONS = (0, 7, 29, 30, 31, 45, 60, 69)  # where a reference holds logits
FULL, SLIDING = 'full_attention', 'sliding_attention'


@dataclass(frozen=True)
class Case:
    """One model: `settings` for `config_class`, and what its reference is checked for."""

    name: str
    family: str
    config_class: str
    architecture: str
    settings: Mapping[str, Any]
    without: tuple[Mapping[str, Any], ...] = ()  # settings that each switch something off, which must change the logits
    zero_centred: bool = False  # gains of norms are stored minus one
    by_length: bool = False  # RoPE depends on the text's length, so on how it is cut into steps
    old: bool = False  # config.json is written as transformers 4 did
    edit: Mapping[str, Any] = field(default_factory=dict)  # keys set in config.json by hand, which must not change the logits
    prompt_length: int = 30
    new_tokens: int = 40

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode()) % 10_000


def _sizes(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int = 320, **more) -> dict[str, Any]:
    sizes = {'vocab_size': vocab, 'hidden_size': hidden, 'num_hidden_layers': layers, 'num_attention_heads': heads,
             'num_key_value_heads': kv_heads, 'intermediate_size': ffn, 'max_position_embeddings': 128,
             'bos_token_id': None, 'eos_token_id': 256, 'pad_token_id': None}
    return sizes | more


def _rope(kind: str = 'default', theta: float = 10000.0, **more) -> dict[str, Any]:
    return {'rope_type': kind, 'rope_theta': theta} | more


def _cases():
    plain = {'rope_parameters': _rope()}
    llama = ('Llama', 'LlamaConfig', 'LlamaForCausalLM')
    yield 'llama', *llama, _sizes(60, 2, 6, 3, 100, head_dim=12, attention_bias=True, mlp_bias=True), {
        'without': ({'attention_bias': False}, {'mlp_bias': False})}
    yield 'llama_tied', *llama, _sizes(72, 2, 9, 3, 136, 333, tie_word_embeddings=True, rms_norm_eps=0.05), {
        'without': ({'rms_norm_eps': 1e-6}, {'rope_parameters': _rope(theta=500.0)})}
    ropes = {
        'llama3': _rope('llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
        'linear': _rope('linear', 500.0, factor=4.0),
        'yarn': _rope('yarn', factor=4.0, original_max_position_embeddings=32),
        'yarn_mscale': _rope('yarn', factor=8.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.3,
                             beta_fast=0.5, beta_slow=0.1),
        'yarn_given': _rope('yarn', 300.0, factor=8.0, original_max_position_embeddings=16, attention_factor=1.3, beta_fast=2.5,
                            beta_slow=0.4, truncate=False)}
    weaker = {'yarn_mscale': ('mscale', 'beta_fast', 'beta_slow'),
              'yarn_given': ('attention_factor', 'beta_fast', 'beta_slow', 'truncate')}
    for kind, rope in ropes.items():
        less = [{'rope_parameters': {k: v for k, v in rope.items() if k != key}} for key in weaker.get(kind, ())]
        yield f'llama_rope_{kind}', *llama, _sizes(64, 2, 4, 2, 88, rope_parameters=rope), {'without': (plain, *less)}
    yield 'llama_rope_dynamic', *llama, _sizes(
        64, 2, 4, 2, 88, max_position_embeddings=32, rope_parameters=_rope('dynamic', factor=4.0)), {
            'without': (plain,), 'by_length': True}
    yield 'llama_rope_old_linear', *llama, _sizes(60, 2, 6, 3, 100, rope_parameters=_rope('linear', 700.0, factor=3.0)), {
        'without': ({'rope_parameters': _rope(theta=700.0)},), 'old': True,
        'edit': {'rope_scaling': {'type': 'linear', 'factor': 3.0}, 'pretraining_tp': 1}}

    smol = ('SmolLM3', 'SmolLM3Config', 'SmolLM3ForCausalLM')
    yield 'smollm3', *smol, _sizes(60, 4, 6, 3, 100, no_rope_layers=[1, 0, 1, 0], rope_parameters=_rope(theta=2000000.0)), {
        'without': ({'no_rope_layers': [1, 1, 1, 1]},)}
    yield 'smollm3_windows', *smol, _sizes(
        64, 3, 4, 2, 88, 333, use_sliding_window=True, sliding_window=16, no_rope_layer_interval=2), {
            'without': ({'use_sliding_window': False}, {'no_rope_layers': [1, 1, 1]})}

    mistral = ('Mistral', 'MistralConfig', 'MistralForCausalLM')
    yield 'mistral', *mistral, _sizes(60, 2, 6, 3, 100, head_dim=16, sliding_window=16), {'without': ({'sliding_window': None},)}
    yield 'mistral_full', *mistral, _sizes(72, 2, 9, 3, 136, sliding_window=None), {'without': ({'sliding_window': 16},)}
    yield 'ministral', 'Ministral', 'MinistralConfig', 'MinistralForCausalLM', _sizes(
        64, 3, 4, 2, 88, head_dim=24, sliding_window=16, layer_types=[SLIDING, FULL, SLIDING]), {
            'without': ({'layer_types': [FULL] * 3}, {'layer_types': [SLIDING] * 3})}
    scaled = _rope('yarn', factor=8.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0, beta_fast=4.0,
                   beta_slow=1.0, llama_4_scaling_beta=0.5)
    yield 'ministral3', 'Ministral 3', 'Ministral3Config', 'Ministral3ForCausalLM', _sizes(
        60, 2, 6, 3, 100, head_dim=16, rope_parameters=scaled), {
            'without': ({'rope_parameters': scaled | {'llama_4_scaling_beta': 0.0}},)}

    qwen2, qwen3 = ('Qwen2', 'Qwen2Config', 'Qwen2ForCausalLM'), ('Qwen3', 'Qwen3Config', 'Qwen3ForCausalLM')
    yield 'qwen2', *qwen2, _sizes(64, 2, 4, 2, 88, 333), {
        'without': ({'use_sliding_window': True, 'sliding_window': 16, 'max_window_layers': 1},),
        'edit': {'sliding_window': 16, 'max_window_layers': 1}}
    yield 'qwen2_windows', *qwen2, _sizes(
        60, 3, 6, 3, 100, use_sliding_window=True, sliding_window=16, max_window_layers=1, tie_word_embeddings=True), {
            'without': ({'use_sliding_window': False}, {'max_window_layers': 0}, {'max_window_layers': 2})}
    yield 'qwen2_layer_types', *qwen2, _sizes(
        72, 3, 9, 3, 136, use_sliding_window=True, sliding_window=16, layer_types=[SLIDING, FULL, FULL]), {
            'without': ({'layer_types': [FULL] * 3},)}
    yield 'qwen3', *qwen3, _sizes(60, 2, 6, 3, 100, head_dim=16, rope_parameters=_rope(theta=1000000.0)), {
        'without': ({'rope_parameters': _rope(theta=100.0)},)}
    yield 'qwen3_bias', *qwen3, _sizes(64, 2, 4, 2, 88, head_dim=24, attention_bias=True, tie_word_embeddings=True), {
        'without': ({'attention_bias': False},)}

    gemma = ('Gemma', 'GemmaConfig', 'GemmaForCausalLM')
    yield 'gemma', *gemma, _sizes(60, 2, 4, 1, 100, 333, head_dim=16), {'zero_centred': True}
    yield 'gemma_old', *gemma, _sizes(64, 2, 4, 4, 136, head_dim=24), {
        'zero_centred': True, 'old': True, 'edit': {'hidden_act': 'gelu'}}
    yield 'gemma2', 'Gemma 2', 'Gemma2Config', 'Gemma2ForCausalLM', _sizes(
        60, 3, 6, 3, 100, 333, head_dim=16, query_pre_attn_scalar=24, sliding_window=16, attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0), {'zero_centred': True, 'without': (
            {'query_pre_attn_scalar': 16}, {'sliding_window': 128}, {'attn_logit_softcapping': None},
            {'final_logit_softcapping': None}, {'layer_types': [FULL, SLIDING, FULL]})}
    gemma3 = ('Gemma 3', 'Gemma3TextConfig', 'Gemma3ForCausalLM')
    local = {SLIDING: _rope(theta=100.0)}
    yield 'gemma3', *gemma3, _sizes(
        60, 4, 6, 3, 100, head_dim=20, query_pre_attn_scalar=30, sliding_window=16, sliding_window_pattern=3,
        rope_parameters={FULL: _rope('linear', factor=8.0)} | local), {'zero_centred': True, 'without': (
            {'query_pre_attn_scalar': 20}, {'sliding_window': 128}, {'sliding_window_pattern': 2},
            {'rope_parameters': {FULL: _rope()} | local},
            {'rope_parameters': {FULL: _rope('linear', factor=8.0), SLIDING: _rope()}})}
    yield 'gemma3_softcap', *gemma3, _sizes(
        64, 2, 4, 1, 88, 333, head_dim=16, query_pre_attn_scalar=16, sliding_window=16, layer_types=[SLIDING, FULL],
        final_logit_softcapping=3.0), {'zero_centred': True, 'without': ({'final_logit_softcapping': None},)}

    phi3 = ('Phi-3', 'Phi3Config', 'Phi3ForCausalLM')
    yield 'phi3', *phi3, _sizes(60, 2, 6, 3, 100, sliding_window=16), {'without': ({'sliding_window': None},)}
    short, long = [1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0], [1.2, 1.5, 2.0, 3.0, 4.5, 6.0, 7.0, 8.0]
    factors = _rope('longrope', short_factor=short, long_factor=long)
    swapped = {'rope_parameters': factors | {'short_factor': long, 'long_factor': short}}
    yield 'phi3_longrope_short', *phi3, _sizes(
        64, 2, 4, 2, 88, max_position_embeddings=384, original_max_position_embeddings=96, rope_parameters=factors), {
            'without': (plain, swapped, {'max_position_embeddings': 96})}
    yield 'phi3_longrope_long', *phi3, _sizes(
        64, 2, 4, 2, 88, original_max_position_embeddings=16, rope_parameters=factors), {'without': (plain, swapped)}
    factors = _rope('longrope', short_factor=short[:6], long_factor=long[:6], partial_rotary_factor=0.75)
    yield 'phi3_partial', *phi3, _sizes(
        64, 2, 4, 2, 88, 333, max_position_embeddings=384, original_max_position_embeddings=96, rope_parameters=factors,
        tie_word_embeddings=True), {'without': ({'rope_parameters': _rope(partial_rotary_factor=0.75)},)}

    gpt2 = ('GPT-2', 'GPT2Config', 'GPT2LMHeadModel')
    small = {'n_positions': 128, 'bos_token_id': None, 'eos_token_id': 256}
    yield 'gpt2', *gpt2, small | {'vocab_size': 333, 'n_embd': 48, 'n_layer': 2, 'n_head': 6}, {
        'without': ({'scale_attn_weights': False},)}
    yield 'gpt2_scaled', *gpt2, small | {
        'vocab_size': 320, 'n_embd': 60, 'n_layer': 3, 'n_head': 3, 'n_inner': 100, 'activation_function': 'relu',
        'scale_attn_by_inverse_layer_idx': True, 'tie_word_embeddings': False, 'layer_norm_epsilon': 0.05}, {'without': (
            {'scale_attn_by_inverse_layer_idx': False}, {'activation_function': 'gelu'}, {'layer_norm_epsilon': 1e-5})}

    neox = ('GPT-NeoX', 'GPTNeoXConfig', 'GPTNeoXForCausalLM')
    yield 'gpt_neox', *neox, _sizes(64, 2, 4, 4, 136, rotary_pct=0.25), {
        'without': ({'rotary_pct': 1.0}, {'use_parallel_residual': False})}
    yield 'gpt_neox_sequential', *neox, _sizes(
        72, 2, 9, 9, 100, 333, rotary_pct=0.5, rotary_emb_base=300, use_parallel_residual=False, attention_bias=False,
        hidden_act='gelu_new'), {'without': ({'use_parallel_residual': True}, {'rotary_emb_base': 10000})}

    phi = ('Phi', 'PhiConfig', 'PhiForCausalLM')
    yield 'phi', *phi, _sizes(60, 2, 3, 3, 100, partial_rotary_factor=0.4), {'without': ({'partial_rotary_factor': 1.0},)}
    yield 'phi_qk_norm', *phi, _sizes(64, 2, 4, 2, 136, 333, qk_layernorm=True), {'without': ({'qk_layernorm': False},)}

    cohere = ('Cohere', 'CohereConfig', 'CohereForCausalLM')
    yield 'cohere', *cohere, _sizes(60, 2, 6, 3, 100, logit_scale=0.6), {'without': ({'logit_scale': 1.0},)}
    yield 'cohere_qk_norm', *cohere, _sizes(
        64, 2, 4, 2, 88, 333, logit_scale=0.5, use_qk_norm=True, attention_bias=True, rope_parameters=_rope()), {
            'without': ({'use_qk_norm': False}, {'attention_bias': False})}
    yield 'cohere2', 'Cohere 2', 'Cohere2Config', 'Cohere2ForCausalLM', _sizes(
        64, 4, 4, 2, 88, logit_scale=0.5, sliding_window=16, sliding_window_pattern=3, rope_parameters=_rope(theta=50000.0)), {
            'without': ({'sliding_window': 128}, {'sliding_window_pattern': 2})}

    olmo3 = ('OLMo 3', 'Olmo3Config', 'Olmo3ForCausalLM')
    yield 'olmo2', 'OLMo 2', 'Olmo2Config', 'Olmo2ForCausalLM', _sizes(60, 2, 6, 3, 100, rope_parameters=_rope(theta=500.0)), {
        'without': ({'rope_parameters': _rope(theta=500000.0)},)}
    yield 'olmo3', *olmo3, _sizes(64, 4, 4, 2, 88, 333, sliding_window=16), {
        'without': ({'sliding_window': 128}, {'layer_types': [SLIDING, FULL] * 2})}
    local, yarn = {SLIDING: _rope(theta=500000.0)}, _rope('yarn', 500000.0, factor=8.0, original_max_position_embeddings=16)
    yield 'olmo3_yarn', *olmo3, _sizes(
        72, 3, 9, 3, 100, sliding_window=16, layer_types=[SLIDING, FULL, FULL], rope_parameters={FULL: yarn} | local), {
            'without': ({'rope_parameters': {FULL: local[SLIDING]} | local}, {'rope_parameters': {FULL: yarn, SLIDING: yarn}})}

    granite = {'embedding_multiplier': 5.0, 'attention_multiplier': 0.15, 'residual_multiplier': 0.6, 'logits_scaling': 1.7}
    off = tuple({name: 1.0} for name in granite)
    yield 'granite', 'Granite', 'GraniteConfig', 'GraniteForCausalLM', _sizes(
        60, 2, 6, 3, 100, **granite, tie_word_embeddings=True), {'without': off}
    yield 'granite_bias', 'Granite', 'GraniteConfig', 'GraniteForCausalLM', _sizes(
        64, 2, 4, 2, 88, 333, **granite, attention_bias=True, mlp_bias=True), {'without': ({'mlp_bias': False},)}

    stablelm = ('StableLM', 'StableLmConfig', 'StableLmForCausalLM')
    yield 'stablelm', *stablelm, _sizes(64, 2, 4, 2, 88, 333, use_qkv_bias=True), {
        'without': ({'use_qkv_bias': False}, {'partial_rotary_factor': 1.0})}
    yield 'stablelm_parallel', *stablelm, _sizes(
        72, 2, 6, 3, 100, partial_rotary_factor=0.5, qk_layernorm=True, use_parallel_residual=True), {
            'without': ({'qk_layernorm': False}, {'use_parallel_residual': False})}

    mixtral = ('Mixtral', 'MixtralConfig', 'MixtralForCausalLM')
    yield 'mixtral', *mixtral, _sizes(60, 2, 6, 3, 100, num_local_experts=4, num_experts_per_tok=2), {
        'without': ({'num_experts_per_tok': 3},)}
    yield 'mixtral_windows', *mixtral, _sizes(
        64, 2, 4, 2, 88, 333, num_local_experts=5, num_experts_per_tok=3, sliding_window=16, head_dim=24), {
            'without': ({'sliding_window': None},)}
    moe = {'num_experts': 6, 'num_experts_per_tok': 3, 'moe_intermediate_size': 40}
    qwen = ('Qwen2-MoE', 'Qwen2MoeConfig', 'Qwen2MoeForCausalLM')
    yield 'qwen2_moe', *qwen, _sizes(60, 4, 6, 3, 100, **moe, shared_expert_intermediate_size=56, decoder_sparse_step=2), {
        'without': ({'norm_topk_prob': True},)}
    yield 'qwen2_moe_windows', *qwen, _sizes(
        64, 3, 4, 2, 88, 333, **moe, shared_expert_intermediate_size=80, mlp_only_layers=[1], norm_topk_prob=True,
        qkv_bias=False, use_sliding_window=True, sliding_window=16, max_window_layers=2), {
            'without': ({'norm_topk_prob': False}, {'use_sliding_window': False}, {'max_window_layers': 3})}
    qwen = ('Qwen3-MoE', 'Qwen3MoeConfig', 'Qwen3MoeForCausalLM')
    yield 'qwen3_moe', *qwen, _sizes(60, 2, 6, 3, 100, **moe, head_dim=16, norm_topk_prob=True), {
        'without': ({'norm_topk_prob': False},)}
    yield 'qwen3_moe_mlp_only', *qwen, _sizes(
        64, 3, 4, 2, 88, 333, **moe, head_dim=24, mlp_only_layers=[0], attention_bias=True, use_sliding_window=True,
        sliding_window=16), {'without': ({'norm_topk_prob': True}, {'use_sliding_window': False}, {'attention_bias': False})}
    olmoe = ('OLMoE', 'OlmoeConfig', 'OlmoeForCausalLM')
    yield 'olmoe', *olmoe, _sizes(60, 2, 6, 3, 72, num_experts=6, num_experts_per_tok=2), {'without': ({'norm_topk_prob': True},)}
    yield 'olmoe_clip', *olmoe, _sizes(
        64, 2, 4, 4, 56, 333, num_experts=8, num_experts_per_tok=3, clip_qkv=1.2, norm_topk_prob=True), {
            'without': ({'clip_qkv': None},)}
    yield 'granitemoe', 'GraniteMoE', 'GraniteMoeConfig', 'GraniteMoeForCausalLM', _sizes(
        60, 2, 6, 3, 72, **granite, num_local_experts=5, num_experts_per_tok=2), {'without': (*off, {'num_experts_per_tok': 3})}


CASES: dict[str, Case] = {name: Case(name, *facts, **checks) for name, *facts, checks in _cases()}


# ---- weights


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int, zero_centred: bool) -> dict[str, np.ndarray]:
    """float32 tensors by their names on the Hub, each from its own generator; activations and logits are of size one.

    zero_centred: gains of norms are stored minus one.
    """
    return {name: _random_tensor(name, tuple(shape), seed, zero_centred) for name, shape in shapes.items()}


def _random_tensor(name: str, shape: tuple[int, ...], seed: int, zero_centred: bool) -> np.ndarray:
    draw = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    if name.endswith('.bias'):
        tensor = 0.2 * draw
    elif re.search(r'norm|\.ln_', name):
        gain = 1.6 if re.search(r'\.[qk]_(layer)?norm\.', name) else 1.0  # so that attention is far from uniform
        tensor = gain - zero_centred + 0.2 * draw
    elif re.search(r'embed_tokens|embed_in|\.wte|\.wpe', name):
        tensor = 0.3 * draw  # also the LM head's rows where they are tied
    else:
        fan_in = shape[0] if re.search(r'\.c_(attn|proj|fc)\.', name) else shape[-1]
        tensor = _scale(name) * fan_in ** -0.5 * draw
    return tensor.astype(np.float32)


def _scale(name: str) -> float:
    if re.search(r'mlp\.gate\.|block_sparse_moe\.gate\.|router', name):
        return 3.0  # the choice of experts is clear
    return 2.0 if re.search(r'[qk]_proj|qkv|query_key_value|c_attn|lm_head|embed_out', name) else 1.5


# ---- files


def load_reference(name: str) -> dict[str, Any]:
    """The reference of a case: config, shapes, seed, zero_centred, tokens, prompt_length, positions, logits, spread."""
    return json.loads((FOLDER / f'{name}.json').read_text(encoding='utf-8'))


def logits_of(reference: Mapping[str, Any]) -> np.ndarray:
    """What transformers computed at the reference's positions.  [positions, vocab] float32"""
    flat = np.frombuffer(base64.b64decode(reference['logits']), '<f4')
    return flat.reshape(len(reference['positions']), -1)


def write_model(folder: Path, reference: Mapping[str, Any], old: bool = False) -> None:
    """config.json and model.safetensors.  old: config.json as transformers 4 wrote it."""
    from safetensors.numpy import save_file
    config = old_style(reference['config']) if old else reference['config']
    (folder / 'config.json').write_text(json.dumps(config, indent=2), encoding='utf-8')
    weights = random_weights(reference['shapes'], reference['seed'], reference['zero_centred'])
    save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})


def write_folder(folder: Path, reference: Mapping[str, Any], old: bool = False) -> None:
    """The folder of a model as it is on the Hub, with a tokenizer of bytes."""
    from tiny import byte_tokenizer
    write_model(folder, reference, old)
    (folder / 'tokenizer.json').write_text(byte_tokenizer(), encoding='utf-8')


def old_style(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as transformers 4 wrote it: rope_theta and rope_scaling, patterns in place of layer_types, torch_dtype."""
    old, kind = dict(config), config['model_type']
    old['torch_dtype'] = old.pop('dtype', 'float32')
    old['transformers_version'] = '4.45.0'
    if rope := old.pop('rope_parameters', None):
        local = rope.get(SLIDING)
        rope = dict(rope.get(FULL, rope))
        names = ('rotary_emb_base', 'rotary_pct') if kind == 'gpt_neox' else ('rope_theta', 'partial_rotary_factor')
        old[names[0]] = rope.pop('rope_theta')
        if 'partial_rotary_factor' in rope:
            old[names[1]] = rope.pop('partial_rotary_factor')
        if kind == 'gemma3_text':
            old['rope_local_base_freq'] = local['rope_theta']
        old['rope_scaling'] = None if rope['rope_type'] == 'default' else rope
    if kind in ('gemma3_text', 'cohere2'):
        old.pop('_sliding_window_pattern', None)
        old['sliding_window_pattern'] = old.pop('layer_types').index(FULL) + 1
    if kind == 'qwen3_moe' and 'num_local_experts' in old:
        old['num_experts'] = old.pop('num_local_experts')
    return old
