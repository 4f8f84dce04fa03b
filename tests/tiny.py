"""Small random models for tests, and the model computed by other means: float64, one query at a time, no shards."""

from __future__ import annotations

import json

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
CONFIGS = {'nine_heads': NINE_HEADS, 'literal': LITERAL, 'parallel': PARALLEL}


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Whole tensors as stored, float32, of a size that keeps activations near one."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, spec in tensor_specs(config).items():
        if not spec.is_matrix:
            tensors[name] = (1 + 0.1 * rng.standard_normal(spec.shape)).astype(np.float32)
            continue
        fan_in = spec.shape[0] if spec.transposed else spec.shape[1]
        scale = 1.0 if name == 'embedding' else fan_in ** -0.5
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
    kinds = {name: target_kind(spec, 'float32', of(name)) for name, spec in specs.items()}
    tokenizer = TokenizerData(byte_tokenizer(), None, None, eos)
    with CheckpointWriter(path, config, kinds, tokenizer, {'source': 'random'}) as writer:
        for name, tensor in tensors.items():
            stored = encode(tensor, kinds[name], specs[name].group_axis)
            writer.write(name, stored)
            tensors[name] = decode(stored)
    return tensors


# ---- the oracle


def oracle_logits(tensors: dict[str, np.ndarray], config: ModelConfig, tokens, window: int | None = None) -> np.ndarray:
    """All logits of a sequence, computed from whole tensors in float64 with loops.  [tokens, vocab]"""
    w = {name: t.astype(np.float64) for name, t in tensors.items()}
    windows = [x for x in (config.window, window) if x is not None]
    window = min(windows, default=len(tokens))
    x = w['embedding'][np.asarray(tokens)]
    for i in range(config.num_layers):
        at = f'layers/{i}/'
        a = _norm(x, w.get(at + 'attn_norm'), config.norm_eps)
        c = _attention(a, w, at, config, window)
        if config.parallel_block:
            change = c + _mlp(a, w, at, config)
            x = x + change if config.residual else change
            continue
        x = x + c if config.residual else c
        e = _mlp(_norm(x, w.get(at + 'mlp_norm'), config.norm_eps), w, at, config)
        x = x + e if config.residual else e
    x = _norm(x, w.get('final_norm'), config.norm_eps)
    return x @ (w['embedding'] if config.tie_embeddings else w['head']).T


def _norm(x, gain, eps):
    return x if gain is None else x / np.sqrt((x ** 2).mean(-1, keepdims=True) + eps) * gain


def _attention(a, w, at, config, window):
    count, dim = len(a), config.head_dim
    q = (a @ w[at + 'q'].T).reshape(count, config.num_heads, dim)
    k = (a @ w[at + 'k'].T).reshape(count, config.num_kv_heads, dim)
    v = (a @ w[at + 'v'].T).reshape(count, config.num_kv_heads, dim)
    if config.rope_theta is not None:
        q, k = (np.stack([_turn(row, p, config.rope_theta) for p, row in enumerate(x)]) for x in (q, k))
    b = np.zeros((count, config.num_heads, dim))
    for p in range(count):
        seen = range(max(0, p - window + 1), p + 1)
        for head in range(config.num_heads):
            kv = head * config.num_kv_heads // config.num_heads
            scores = np.array([q[p, head] @ k[s, kv] for s in seen]) / np.sqrt(dim)
            weights = np.exp(scores - scores.max())
            b[p, head] = sum(x * v[s, kv] for x, s in zip(weights / weights.sum(), seen, strict=True))
    return b.reshape(count, -1) @ w[at + 'attn_out']


def _turn(heads, position, theta):
    """RoPE with complex numbers: pair i is the number x[i] + i x[i + dim/2], turned by position * theta^(-2i/dim)."""
    half = heads.shape[-1] // 2
    turned = (heads[:, :half] + 1j * heads[:, half:]) * np.exp(1j * position * theta ** (-np.arange(half) / half))
    return np.concatenate((turned.real, turned.imag), axis=-1)


def _mlp(a, w, at, config):
    up = a @ w[at + 'up'].T
    if config.gated:
        gate = a @ w[at + 'gate'].T
        return (gate / (1 + np.exp(-gate)) * up) @ w[at + 'down']
    if config.activation == 'relu':
        return np.maximum(up, 0) @ w[at + 'down']
    return (0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up ** 3)))) @ w[at + 'down']
