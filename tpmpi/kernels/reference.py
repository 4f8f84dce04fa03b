"""Every operation of the model, readable, on any array module: the documentation and the oracle of all other kernels.

Shapes: `tokens` counts the rows of this step, which may belong to several requests; `heads/n`, `kv_heads/n`, `ffn/n`
are this rank's parts.  All arithmetic is float32.

This set packs every matrix as float32 [in, out]: one row of x times a matrix in that order streams it from memory with
no sum across vector lanes (measured: 22 GB/s on a core, against 16 GB/s for [out, in]).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tpmpi.config import Rope
from tpmpi.weights import Stored, Weight, decode, decode_bfloat16, encode_bfloat16

node_sums = None  # kernels that sum in memory that ranks share: MPI does, see shared_sums.py
SCORES_PER_TILE = 1 << 20  # attention scores that exist at once: 4 MiB, which bounds memory and stays near the cache


def namespace(x):
    """The array module that x belongs to: numpy, or whatever module defines its type."""
    return np if isinstance(x, np.ndarray) else sys.modules[type(x).__module__.partition('.')[0]]


def asarray(x: np.ndarray):
    """A host array where these kernels compute."""
    return x


# ---- weights: each kernel set keeps its own layout


def new_weight(rows: int, hidden_size: int, transposed: bool, kind: str, letter: str, xp=np) -> Weight:
    """An empty packed matrix for `rows` stored rows; `fill` puts them in, piece by piece."""
    shape = (rows, hidden_size) if transposed else (hidden_size, rows)  # [in, out] in both cases
    return Weight(xp.empty(shape, xp.float32), 'float32', letter=letter)


def new_experts(count: int, rows: int, hidden_size: int, transposed: bool, kind: str, letter: str, xp=np) -> Weight:
    """Empty matrices of one shape, one for each expert, as one Weight; `fill` fills each `expert` of it."""
    shape = (rows, hidden_size) if transposed else (hidden_size, rows)
    return Weight(xp.empty((count, *shape), xp.float32), 'float32', letter=letter)


def expert(weights: Weight, number: int) -> Weight:
    """One matrix of those that new_experts made, no copy."""
    return replace(weights, data=weights.data[number])


def fill(weight: Weight, at: int, stored: Stored) -> None:
    """Put stored rows into a packed matrix, from its row `at` on.  A group_axis of 0 says that they are [in, out]."""
    values = namespace(weight.data).asarray(decode(stored))
    if stored.group_axis == 0:
        weight.data[at:at + len(values)] = values
    else:
        weight.data[:, at:at + len(values)] = values.T


def join(weights: Sequence[Weight]) -> Weight:
    """One weight of several, of kinds that may differ, whose outputs lie side by side."""
    if len(weights) == 1:
        return weights[0]
    return Weight(tuple(weights), 'mixed', ' '.join(dict.fromkeys(w.letter for w in weights)))


def new_cache(kv_heads: int, slots: int, head_dim: int, kv_dtype: str, xp=np):
    """One layer's K and V, each [kv_heads/n, slots, head_dim], float32 or the bits of bfloat16."""
    return tuple(xp.zeros((kv_heads, slots, head_dim), xp.float32 if kv_dtype == 'float32' else xp.uint16) for _ in 'kv')


# ---- the operations of a step


def embed(tokens, table: Weight, vocab: range):
    """Rows of the embedding that this rank holds, zeros for the others' tokens.  [tokens] -> [tokens, hidden]"""
    xp = namespace(table.data)
    mine = (tokens >= vocab.start) & (tokens < vocab.stop)
    x = xp.zeros((len(tokens), table.data.shape[0]), xp.float32)
    x[mine] = table.data[:, tokens[mine] - vocab.start].T
    return x


def rms_norm(x, gain, eps: float):
    """x / sqrt(mean(x^2) + eps) * gain.  [tokens, hidden] -> [tokens, hidden]   (Zhang and Sennrich 2019)"""
    xp = namespace(x)
    mean_square = xp.einsum('ij,ij->i', x, x)[:, None] / xp.float32(x.shape[-1])
    return x * (1 / xp.sqrt(mean_square + xp.float32(eps))) * gain


def linear(x, weight: Weight, out=None):
    """x · W for a packed W, in `out` where that is given.  [tokens, in] -> [tokens, out]"""
    if weight.kind == 'mixed':
        return namespace(x).concatenate([linear(x, part) for part in weight.data], axis=-1, out=out)
    return namespace(x).matmul(x, weight.data, out=out)


def layer_norm(x, gain, bias, eps: float):
    """(x - mean) / sqrt(variance + eps) * gain + bias; bias may be None.  [tokens, hidden] -> the same   (Ba et al. 2016)"""
    xp = namespace(x)
    x = x - x.mean(axis=-1, keepdims=True)
    y = x * (1 / xp.sqrt((x * x).mean(axis=-1, keepdims=True) + xp.float32(eps))) * gain
    return y if bias is None else y + bias


def added_norm(x, part, kind: str, gain, bias, eps: float):
    """part += x, and its norm.  kind: 'rms' or 'layer'.  [tokens, hidden] both, and the result"""
    part += x
    return layer_norm(part, gain, bias, eps) if kind == 'layer' else rms_norm(part, gain, eps)


def norm_heads(qkv, heads: int, head_dim: int, kind: str, gain, bias, eps: float) -> None:
    """Each of the first `heads` heads of the fused projection through a norm of its own, in place.

    qkv: [tokens, heads * head_dim and more]; kind: 'rms' or 'layer'; gain and bias (or None): [heads * head_dim]
    """
    xp = namespace(qkv)
    x = qkv[:, :heads * head_dim].reshape(-1, head_dim)
    ones = xp.ones(head_dim, xp.float32)
    y = (rms_norm(x, ones, eps) if kind == 'rms' else layer_norm(x, ones, None, eps)).reshape(len(qkv), -1) * gain
    qkv[:, :heads * head_dim] = y if bias is None else y + bias


def head_squares(qkv, runs: Sequence[range]):
    """The sum of squares of each of some runs of columns.  [tokens, columns] -> [tokens, runs]"""
    xp = namespace(qkv)
    parts = [qkv[:, run.start:run.stop] for run in runs]
    return xp.stack([xp.einsum('ij,ij->i', part, part) for part in parts], axis=-1)


def scale_columns(qkv, run: range, factor, gain) -> None:
    """A run of columns times a factor for each token and a gain for each column, in place.  factor: [tokens]"""
    part = qkv[:, run.start:run.stop]
    part *= factor[:, None]
    part *= gain


def rope_table(positions, lengths, rope: Rope):
    """What turns the pairs of a head at each position: cos and signed sin.  [tokens] -> [tokens, 1, rope.dim] twice

    Pair i, (x[i], x[i + dim/2]), turns by position * theta^(-2i/dim) / divisor[i].   (Su et al. 2021)
    lengths: [tokens], of the text that each token stands in, where rope.by_length: texts beyond rope.original_positions
    turn in another way then.
    """
    xp = namespace(positions)
    if rope.by_length:
        theta, divisors = _stretched(lengths, rope, xp)  # [tokens, 1], [tokens, dim/2]
        frequencies = theta ** -(xp.arange(0, rope.dim, 2, dtype=xp.float64) / rope.dim) / divisors
    else:
        frequencies = _frequencies(rope, xp)
    angles = (positions.astype(xp.float64)[:, None] * frequencies)[:, None]  # [tokens, 1, dim/2]
    cos, sin = xp.cos(angles), xp.sin(angles)
    if rope.magnitude != 1:
        cos, sin = cos * rope.magnitude, sin * rope.magnitude
    return (xp.concatenate((cos, cos), axis=-1).astype(xp.float32),
            xp.concatenate((-sin, sin), axis=-1).astype(xp.float32))


@functools.lru_cache
def _frequencies(rope: Rope, xp):
    """Of each pair, in radians a position, where they do not depend on the text.  [1, dim/2]"""
    frequencies = rope.theta ** -(xp.arange(0, rope.dim, 2, dtype=xp.float64) / rope.dim)
    return (frequencies / xp.asarray(rope.divisors) if rope.divisors else frequencies)[None]


def _stretched(lengths, rope: Rope, xp):
    """theta and the divisors for texts of these lengths: dynamic NTK scaling, or other divisors for long ones."""
    lengths = lengths[:, None].astype(xp.float64)
    original, factor = rope.original_positions, rope.dynamic_factor
    growth = xp.maximum(factor * lengths / original - (factor - 1), 1) if factor > 1 else xp.ones_like(lengths)
    short = xp.asarray(rope.divisors or (1.0,) * (rope.dim // 2))[None]
    long = xp.asarray(rope.long_divisors)[None] if rope.long_divisors else short
    power = rope.dim / (rope.dim - 2) if factor > 1 else 1.0
    return rope.theta * growth ** power, xp.where(lengths > original, long, short)


def rotate(x, cos, sin):
    """Turn each pair (a, b) to (a cos - b sin, b cos + a sin), of the first numbers of a head as far as cos and sin go.

    [tokens, heads, head_dim], the same shape
    """
    xp, dim = namespace(x), cos.shape[-1]
    if dim < x.shape[-1]:
        return xp.concatenate((rotate(x[..., :dim], cos, sin), x[..., dim:]), axis=-1)
    half = dim // 2
    return x * cos + xp.concatenate((x[..., half:], x[..., :half]), axis=-1) * sin


def rope_append(qkv, num_heads: int, head_dim: int, rope, cache, slots):
    """Split the fused projection, turn Q and K, put K and V into the cache.

    qkv: [tokens, (heads + 2 kv_heads)/n * head_dim]; rope: a rope_table or None; slots: [tokens], where each token's
    K and V go.  Returns Q [tokens, heads/n, head_dim].
    """
    kv_heads = len(cache.k)
    qkv = qkv.reshape(len(qkv), num_heads + 2 * kv_heads, head_dim)
    qk, v = qkv[:, :num_heads + kv_heads], qkv[:, num_heads + kv_heads:]
    if rope is not None:
        qk = rotate(qk, *rope)
    k = qk[:, num_heads:]
    if cache.k.dtype == np.uint16:
        k, v = encode_bfloat16(k), encode_bfloat16(v)
    cache.k[:, slots] = k.swapaxes(0, 1)
    cache.v[:, slots] = v.swapaxes(0, 1)
    return qk[:, :num_heads]


def attend(q, cache, query_groups, segments, window: int | None, scale: float, cap: float | None = None, sinks: int = 0):
    """B = softmax(scale Q K^T) V over each request's ring.

    q: [tokens, heads/n, head_dim]; query_groups: for each KV head of the cache the run of query heads that reads it;
    segments: which rows belong to which request and where its keys lie (see kv_cache.Segment).  A query at position p
    sees the keys at positions p - window + 1 to p, and those before position `sinks`.  cap: of the scores, see
    softcap.  Returns B [tokens, heads/n * head_dim].
    """
    xp = namespace(q)
    tokens, heads, head_dim = q.shape
    b = xp.empty((tokens, heads, head_dim), xp.float32)
    if heads == 0:
        return b.reshape(tokens, 0)
    q = q * xp.float32(scale)
    for segment in segments:
        for rows, keys, count, hidden in segment.tiles(window, sinks, SCORES_PER_TILE // heads):
            tile = xp.ascontiguousarray(q[rows].swapaxes(0, 1))  # [heads/n, rows, head_dim]
            scores = xp.empty((heads, tile.shape[1], count), xp.float32)
            for kv_head, group in enumerate(query_groups):
                k = _values(cache.k[kv_head, keys])  # [keys, head_dim]
                run = slice(group.start, group.stop)
                xp.matmul(tile[run].reshape(-1, head_dim), k.T, out=scores[run].reshape(-1, count))
            if cap is not None:
                scores = softcap(scores, cap)
            if hidden is not None:  # [rows, keys]: what a query must not see
                xp.copyto(scores, xp.float32(-xp.inf), where=xp.asarray(hidden))
            scores -= scores.max(axis=-1, keepdims=True)
            xp.exp(scores, out=scores)
            total = scores.sum(axis=-1, keepdims=True)  # [heads/n, rows, 1]
            for kv_head, group in enumerate(query_groups):
                v = _values(cache.v[kv_head, keys])
                run = slice(group.start, group.stop)
                xp.matmul(scores[run].reshape(-1, count), v, out=tile[run].reshape(-1, head_dim))
            b[rows] = (tile / total).swapaxes(0, 1)
    return b.reshape(tokens, heads * head_dim)


def _values(x):
    """Cached values as float32: themselves, or decoded from the bits of bfloat16."""
    return decode_bfloat16(x) if x.dtype == np.uint16 else x


def activate(x, kind: str):
    """The MLP's activation, element by element."""
    xp = namespace(x)
    if kind == 'silu':
        with np.errstate(over='ignore'):  # exp(-x) may reach infinity, and x / infinity is the right 0
            y = xp.exp(-x)
        y += 1
        return xp.divide(x, y, out=y)
    if kind == 'relu':
        return xp.maximum(x, 0)
    if kind == 'gelu_tanh':
        return 0.5 * x * (1 + xp.tanh(xp.float32(0.7978845608028654) * (x + xp.float32(0.044715) * x * x * x)))
    if kind == 'gelu':
        return 0.5 * x * (1 + erf(x * xp.float32(0.7071067811865476)))
    assert kind == 'identity'
    return x


def erf(x):
    """The error function: Numerical Recipes' Chebyshev fit of erfc, error below 1.2e-7 everywhere."""
    xp = namespace(x)
    z = xp.abs(x.astype(xp.float64))
    t = 1 / (1 + 0.5 * z)
    series = (-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587,
              -0.82215223, 0.17087277)
    exponent = xp.zeros_like(z)
    for c in reversed(series):
        exponent = exponent * t + c
    erfc = t * xp.exp(-z * z + exponent)
    return (xp.sign(x) * (1 - erfc)).astype(xp.float32)


def gated_activation(gate_up, kind: str):
    """activation(gate) * up.  [tokens, 2 ffn/n] -> [tokens, ffn/n]   (Shazeer 2020)"""
    ffn = gate_up.shape[-1] // 2
    return activate(gate_up[:, :ffn], kind) * gate_up[:, ffn:]


def gated_linear(x, weight: Weight, kind: str):
    """gated_activation of x · W.  [tokens, in] -> [tokens, out / 2]"""
    return gated_activation(linear(x, weight), kind)


def sigmoid(x):
    """1 / (1 + exp(-x))."""
    with np.errstate(over='ignore'):  # exp(-x) may reach infinity, and 1 / infinity is the right 0
        return 1 / (1 + namespace(x).exp(-x))


def softcap(x, cap: float):
    """cap * tanh(x / cap): as x where that is small, and never beyond the cap."""
    xp = namespace(x)
    return xp.float32(cap) * xp.tanh(x / xp.float32(cap))


# ---- a mixture of experts


def route(scores, count: int, normalize: bool):
    """Which experts each token goes to, and with what weight.  [tokens, experts] -> [tokens, count] ids, [tokens, count]

    The softmax over all experts; of that the `count` largest, equal ones by lower id; ids ascending.  normalize: these
    are divided by their sum.   (Shazeer et al. 2017; Jiang et al. 2024)
    """
    xp = namespace(scores)
    scores = xp.exp(scores - scores.max(axis=-1, keepdims=True))
    scores /= scores.sum(axis=-1, keepdims=True)
    choice = xp.sort(xp.argsort(-scores, axis=-1, kind='stable')[:, :count], axis=-1)
    weights = xp.take_along_axis(scores, choice, axis=-1)
    return choice, weights / weights.sum(axis=-1, keepdims=True) if normalize else weights


def experts(a, choice, shares, up: Weight, down: Weight, kind: str):
    """The sum over a token's experts of share * (D · W^D): E, this rank's part.  [tokens, hidden] -> [tokens, hidden]

    choice, shares: of `route`; up, down: all experts' W^C (gate and up side by side) and W^D, this rank's columns of each.
    """
    xp = namespace(a)
    e = xp.zeros(a.shape, xp.float32)
    for number in xp.unique(choice).tolist():
        rows, place = xp.nonzero(choice == number)
        d = gated_activation(linear(a[rows], expert(up, number)), kind)  # D  [rows, expert_ffn/n]
        e[rows] += linear(d, expert(down, number)) * shares[rows, place][:, None]
    return e


# ---- the head


def log_sum_exp(logits):
    """log(sum(exp(logits))) of each row, -inf where a rank holds no vocabulary.  [tokens, vocab/n] -> [tokens]"""
    xp = namespace(logits)
    if logits.shape[-1] == 0:
        return xp.full(len(logits), -xp.inf, xp.float32)
    top = logits.max(axis=-1, keepdims=True)
    return (top + xp.log(xp.exp(logits - top).sum(axis=-1, keepdims=True)))[:, 0]


def top_k(values, k: int):
    """The k largest of a row and their indices, largest first, equal ones by lower index.  [vocab/n] -> [k], [k]"""
    xp = namespace(values)
    k = min(k, len(values))
    if k <= 1:
        index = xp.argmax(values, keepdims=True) if k else xp.arange(0)
        return values[index], index
    if k < len(values):
        threshold = xp.partition(values, len(values) - k)[len(values) - k]
        above = xp.flatnonzero(values > threshold)
        equal = xp.flatnonzero(values == threshold)[:k - len(above)]
        index = xp.concatenate((above, equal))
    else:
        index = xp.arange(len(values))
    order = xp.lexsort(xp.stack((index, -values[index])))
    return values[index[order]], index[order]
