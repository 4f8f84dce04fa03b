"""A context of 32,768 tokens: right to the last one, and in memory that grows with the context and not with its square."""

from __future__ import annotations

import numpy as np
import tiny
from ranks import run_program

from tpmpi.config import ModelConfig

CONFIG = ModelConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=64,
                     max_positions=32768, rope_theta=1e6)


def last_logprobs(tensors, tokens, count):
    """Log-probabilities after each of the last `count` tokens, in float64, with attention in blocks of queries."""
    w = {name: t.astype(np.float64) for name, t in tensors.items()}

    def norm(x, name):
        return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + CONFIG.norm_eps) * w[name]

    def turned(x):
        half = CONFIG.head_dim // 2
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(
            1j * np.arange(len(x))[:, None, None] * CONFIG.rope_theta ** (-np.arange(half) / half))
        return np.concatenate((z.real, z.imag), axis=-1)

    n, dim, x = len(tokens), CONFIG.head_dim, w['embedding'][tokens]
    for layer in range(CONFIG.num_layers):
        at = f'layers/{layer}/'
        a = norm(x, at + 'attn_norm')
        q, k, v = ((a @ w[at + name].T).reshape(n, -1, dim) for name in 'qkv')
        q, k, b = turned(q), turned(k), np.empty((n, CONFIG.num_heads, dim))
        first = 0 if layer + 1 < CONFIG.num_layers else n - count  # of the last layer only the last rows are needed
        for start in range(first, n, 512):
            stop = min(start + 512, n)
            future = np.arange(stop) > np.arange(start, stop)[:, None]
            for head in range(CONFIG.num_heads):
                scores = q[start:stop, head] @ k[:stop, head // 2].T / np.sqrt(dim)
                scores = np.exp(np.where(future, -np.inf, scores - scores.max(-1, keepdims=True)))
                b[start:stop, head] = scores / scores.sum(-1, keepdims=True) @ v[:stop, head // 2]
        x = x[first:] + b[first:].reshape(n - first, -1) @ w[at + 'attn_out']
        a, n = norm(x, at + 'mlp_norm'), n if first == 0 else len(x)
        gate = a @ w[at + 'gate'].T
        x = x + (gate / (1 + np.exp(-gate)) * (a @ w[at + 'up'].T)) @ w[at + 'down']
    logits = norm(x, 'final_norm') @ w['head'].T
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_a_context_of_32768_tokens(tmp_path):
    tensors = tiny.write_model(tmp_path / 'model.h5', CONFIG)
    tokens, found = np.random.default_rng(0).integers(0, 256, 32764), {}
    for length in (4096, 32764):
        np.save(tmp_path / 'tokens.npy', tokens[:length])
        found[length] = run_program('long_context.py', 2, tmp_path / 'model.h5', tmp_path / 'tokens.npy', timeout=300)
    long, short = found[32764], found[4096]
    exact = last_logprobs(tensors, np.concatenate((tokens, long['tokens'][:3])), 4)
    np.testing.assert_allclose(long['logprobs'], [row[t] for row, t in zip(exact, long['tokens'], strict=True)], atol=1e-4)
    assert all(row[t] > row.max() - 1e-4 for row, t in zip(exact, long['tokens'], strict=True))
    for before, after in zip(short['peak'], long['peak'], strict=True):
        assert after - before < long['cache'] + (64 << 20), 'the scores of all pairs would be 4 GB'
