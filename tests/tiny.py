"""Small random models for tests, and the model computed by other means: float64, one query at a time, no shards."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np

from tpmpi.checkpoint import CheckpointWriter, TokenizerData
from tpmpi.config import ModelConfig
from tpmpi.sharding import target_kind, tensor_specs
from tpmpi.weights import decode, encode

NINE_HEADS = ModelConfig(vocab_size=300, hidden_size=36, num_layers=3, num_heads=9, num_kv_heads=3, head_dim=8,
                         ffn_size=200, ffn_block=64, max_positions=256)
LITERAL = ModelConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=3, num_kv_heads=3, head_dim=8,
                      ffn_size=128, max_positions=64, norm='none', residual=False, activation='gelu_tanh', gated=False,
                      rope_theta=None)
PARALLEL = ModelConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
                       ffn_size=320, max_positions=64, parallel_block=True, gated=False, activation='relu',
                       tie_embeddings=True)
GROUPS = ModelConfig(vocab_size=300, hidden_size=64, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=32, ffn_size=160,
                     ffn_block=64, max_positions=64)  # where integers fit everywhere, in a short last ffn block too
STRETCHED = {'rope_divisors': (1.0, 1.5, 4.0), 'rope_magnitude': 1.25, 'rotary_dim': 6}
POST_NORM = ModelConfig(vocab_size=300, hidden_size=40, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=8, ffn_size=200,
                        max_positions=64, pre_norm=False, post_norm=True, qk_norm='all', window=7, window_layers=(0, 2),
                        nope_layers=(1,), query_growth=0.8, query_growth_positions=5, **STRETCHED)
CAPPED = ModelConfig(vocab_size=300, hidden_size=36, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=10, ffn_size=130,
                     max_positions=64, post_norm=True, qk_norm='head', activation='gelu_tanh', window=5, window_layers=(0, 1),
                     local_rope_theta=500.0, attention_softcap=2.0, logit_softcap=3.0, attention_scale=0.4,
                     embedding_multiplier=6.0, residual_multiplier=0.7, logit_multiplier=0.5, tie_embeddings=True)
BIASED = ModelConfig(vocab_size=300, hidden_size=36, num_layers=2, num_heads=5, num_kv_heads=5, head_dim=8, ffn_size=200,
                     max_positions=64, norm='layer', norm_bias=True, qk_norm='head', qk_norm_bias=True, gated=False,
                     activation='gelu', qkv_bias=True, attn_out_bias=True, mlp_bias=True, head_bias=True, rope_theta=None,
                     learned_positions=70, parallel_block=True, parallel_mlp_norm=True)
EXPERTS = ModelConfig(vocab_size=300, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=100,
                      max_positions=64, num_experts=6, experts_per_token=2, expert_ffn_size=130, normalize_experts=True,
                      shared_ffn_size=70, shared_gate=True, dense_layers=(1,), qkv_bias=True)
LONG_ROPE = dataclasses.replace(NINE_HEADS, rope_divisors=(1.0, 1.1, 1.2, 1.5), rope_long_divisors=(1.0, 2.0, 4.0, 8.0),
                                rope_original_positions=24, rope_magnitude=1.1)
DYNAMIC = dataclasses.replace(NINE_HEADS, rope_dynamic_factor=4.0, rope_original_positions=24)
CONFIGS = {'nine_heads': NINE_HEADS, 'literal': LITERAL, 'parallel': PARALLEL, 'post_norm': POST_NORM, 'capped': CAPPED,
           'biased': BIASED, 'experts': EXPERTS}


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Whole tensors as stored, float32, of a size that keeps activations near one."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, spec in tensor_specs(config).items():
        if not spec.is_matrix:
            tensors[name] = (('bias' not in name) + 0.1 * rng.standard_normal(spec.shape)).astype(np.float32)
            continue
        fan_in = spec.shape[0] if spec.transposed else spec.shape[1]
        scale = 1.0 if name.endswith('embedding') else fan_in ** -0.5
        tensors[name] = (scale * rng.standard_normal(spec.shape)).astype(np.float32)
    return tensors


def byte_tokenizer(vocab_size: int = 300) -> str:
    """tokenizer.json of a byte-level tokenizer without merges: ids 0 to 255 are bytes, 256 ends a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken('<|endoftext|>', special=True)])
    text = tokenizer.to_str()
    assert json.loads(text)['added_tokens'][0]['id'] == 256 < vocab_size
    return text


def write_reciter(path, text: str) -> None:
    """A model that recites: after each byte of `text`, all different, the most probable token is the next, then the end."""
    ids = byte_ids(text)
    assert len(set(ids)) == len(ids)
    config = ModelConfig(vocab_size=300, hidden_size=64, num_layers=1, num_heads=3, num_kv_heads=1, head_dim=8, ffn_size=64,
                         max_positions=256, norm='none')
    tensors = {name: np.zeros(spec.shape, np.float32) for name, spec in tensor_specs(config).items()}
    tensors['embedding'] = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32)
    for token, following in zip(ids, [*ids[1:], 256], strict=True):
        tensors['head'][following] = tensors['embedding'][token]
    kinds = dict.fromkeys(tensors, 'float32')
    with CheckpointWriter(path, config, kinds, TokenizerData(byte_tokenizer(), None, None, (256,)), {}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, encode(tensor, 'float32', writer.specs[name].group_axis))


def byte_ids(text: str) -> list[int]:
    """The ids that byte_tokenizer gives to a text."""
    from tokenizers import Tokenizer
    return Tokenizer.from_str(byte_tokenizer()).encode(text).ids


def write_model(path, config: ModelConfig, kind: str = 'float32', seed: int = 0, eos=(256,)) -> dict[str, np.ndarray]:
    """Write a random model file; returns the whole tensors that it holds, as float32.

    kind: of all matrices that it fits; the others are bfloat16.  A function gives each tensor its own, by its name.
    """
    tensors, specs = random_tensors(config, seed), tensor_specs(config)
    of = kind if callable(kind) else lambda name: kind
    kinds = {name: target_kind(spec, 'float32', of(name), float16=True) for name, spec in specs.items()}
    tokenizer = TokenizerData(byte_tokenizer(), None, None, eos)
    with CheckpointWriter(path, config, kinds, tokenizer, {'source': 'random'}) as writer:
        for name, tensor in tensors.items():
            stored = encode(tensor, kinds[name], specs[name].group_axis)
            writer.write(name, stored)
            tensors[name] = decode(stored)
    return tensors


# ---- the oracle


def oracle_logits(tensors: dict[str, np.ndarray], config: ModelConfig, tokens, window: int | None = None, sinks: int = 0,
                  lengths=None) -> np.ndarray:
    """All logits of a sequence, computed from whole tensors in float64 with loops.  [tokens, vocab]

    window, sinks: what a run chooses: so many positions at most, and the first ones besides where that is what limits.
    lengths: of the text as RoPE takes it at each position; None: all of it.
    """
    w = {name: t.astype(np.float64) for name, t in tensors.items()}
    x = w['embedding'][np.asarray(tokens)]
    if config.learned_positions:
        x = x + w['position_embedding'][:len(tokens)]
    x, lengths = x * config.embedding_multiplier, [len(tokens)] * len(tokens) if lengths is None else lengths
    for i in range(config.num_layers):
        at, own = f'layers/{i}/', config.layer_window(i)
        seen = min(v for v in (own, window, len(tokens)) if v is not None)
        pinned = sinks if window is not None and (own is None or window < own) else 0
        a = _norm(x, w, at + 'attn_norm', config)
        c = _attention(a, w, at, config, i, seen, pinned, lengths) + w.get(at + 'attn_out_bias', 0)
        if config.parallel_block:
            a = _norm(x, w, at + 'mlp_norm', config) if config.parallel_mlp_norm else a
            change = c + _mlp(a, w, at, config) + w.get(at + 'down_bias', 0)
        else:
            change = _norm(c, w, at + 'attn_post_norm', config)
            x = x * config.residual + change * config.residual_multiplier
            a = _norm(x, w, at + 'mlp_norm', config)
            e = _experts(a, w, at, config) if config.has_experts(i) else _mlp(a, w, at, config) + w.get(at + 'down_bias', 0)
            change = _norm(e, w, at + 'mlp_post_norm', config)
        x = x * config.residual + change * config.residual_multiplier
    x = _norm(x, w, 'final_norm', config)
    y = (x @ (w['embedding'] if config.tie_embeddings else w['head']).T + w.get('head_bias', 0)) * config.logit_multiplier
    return y if config.logit_softcap is None else config.logit_softcap * np.tanh(y / config.logit_softcap)


def _norm(x, w, name, config):
    return x if name not in w else _normed(x, config) * w[name] + w.get(name + '_bias', 0)


def _normed(x, config):
    if config.norm == 'layer':
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + config.norm_eps)


def _attention(a, w, at, config, layer, window, sinks, lengths):
    count, dim = len(a), config.head_dim
    q, k, v = (a @ w[at + name].T + w.get(f'{at}{name}_bias', 0) for name in 'qkv')
    if config.qk_norm == 'all':
        q, k = _normed(q, config) * w[at + 'q_norm'], _normed(k, config) * w[at + 'k_norm']
    q, k, v = q.reshape(count, config.num_heads, dim), k.reshape(count, -1, dim), v.reshape(count, -1, dim)
    if config.qk_norm == 'head':
        q, k = (_normed(x, config) * w[at + name].reshape(x.shape[1:]) + w.get(f'{at}{name}_bias', np.zeros(x[0].size)).reshape(
            x.shape[1:]) for x, name in ((q, 'q_norm'), (k, 'k_norm')))
    rope = config.layer_rope(layer)
    if rope is not None:
        q, k = (np.stack([_turn(row, p, rope, lengths[p]) for p, row in enumerate(x)]) for x in (q, k))
    if config.query_growth:
        q = q * (1 + config.query_growth * np.log(1 + np.arange(count) // config.query_growth_positions))[:, None, None]
    b = np.zeros((count, config.num_heads, dim))
    for p in range(count):
        seen = [s for s in range(p + 1) if s > p - window or s < sinks]
        for head in range(config.num_heads):
            kv = head * config.num_kv_heads // config.num_heads
            scores = np.array([q[p, head] @ k[s, kv] for s in seen]) * config.scores_scale
            if config.attention_softcap is not None:
                scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
            weights = np.exp(scores - scores.max())
            b[p, head] = sum(x * v[s, kv] for x, s in zip(weights / weights.sum(), seen, strict=True))
    return b.reshape(count, -1) @ w[at + 'attn_out']


def _turn(heads, position, rope, length):
    """RoPE with complex numbers: pair i is x[i] + i x[i + dim/2], turned by position * theta^(-2i/dim) / divisor."""
    half, theta, divisors = rope.dim // 2, rope.theta, rope.divisors or 1
    if rope.by_length and length > rope.original_positions:
        factor, divisors = rope.dynamic_factor, rope.long_divisors or divisors
        if factor > 1:
            theta *= (factor * length / rope.original_positions - (factor - 1)) ** (rope.dim / (rope.dim - 2))
    frequencies = theta ** (-np.arange(half) / half) / divisors
    turned = (heads[:, :half] + 1j * heads[:, half:2 * half]) * np.exp(1j * position * frequencies) * rope.magnitude
    return np.concatenate((turned.real, turned.imag, heads[:, 2 * half:]), axis=-1)


def _mlp(a, w, at, config):
    """W^C, the activation, W^D, without W^D's bias."""
    up = a @ w[at + 'up'].T + w.get(at + 'up_bias', 0)
    gate = a @ w[at + 'gate'].T + w.get(at + 'gate_bias', 0) if config.gated else up
    d = {'silu': lambda x: x / (1 + np.exp(-x)), 'relu': lambda x: np.maximum(x, 0),
         'gelu': lambda x: x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2,
         'gelu_tanh': lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))}[config.activation](gate)
    return (d * up if config.gated else d) @ w[at + 'down']


def _experts(a, w, at, config):
    """One token and one expert at a time."""
    e = np.zeros_like(a)
    for t, row in enumerate(a):
        scores = np.exp(w[at + 'router'] @ row)
        scores /= scores.sum()
        chosen = sorted(range(config.num_experts), key=lambda i: -scores[i])[:config.experts_per_token]
        total = sum(scores[i] for i in chosen) if config.normalize_experts else 1
        e[t] = sum(scores[i] / total * _mlp(row, w, f'{at}experts/{i}/', config) for i in chosen)
        if config.shared_ffn_size:
            shared = _mlp(row, w, at + 'shared/', config)
            e[t] += shared / (1 + np.exp(-w[at + 'shared/gate_by_token'][0] @ row)) if config.shared_gate else shared
    return e
