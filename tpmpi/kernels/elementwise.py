"""Norm, activations, softmax's exponential, and the step from the fused projection to Q and the cache."""

from __future__ import annotations

import math

import numpy as np

from tpmpi.kernels.jit import helper, kernel
from tpmpi.kernels.tiles import LANES, bits_of, float_of

f32 = np.float32
ACTIVATIONS = {'silu': 0, 'gelu': 1, 'gelu_tanh': 2, 'relu': 3, 'identity': 4}


@helper
def exp(x):
    """e^x in float32, error below 2 units in the last place; loops over it vectorize.

    x = n ln 2 + r with n whole; e^r by a polynomial of degree 7 on |r| <= ln 2 / 2 (Cephes' expf), 2^n by its exponent bits.
    """
    x = f32(-87) if x < f32(-87) else x
    x = f32(88.37) if x > f32(88.37) else x  # a NaN passes both
    n = np.floor(x * f32(1.44269504088896341) + f32(0.5))
    r = (x - n * f32(0.693359375)) + n * f32(2.12194440e-4)
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    p = p * r * r + r + f32(1)
    return p * float_of((np.int32(n) + np.int32(127)) << np.int32(23))


@kernel('void(f4[:, ::1], f4[::1], f4, f4[:, ::1])')
def rms_norm(x, gain, eps, y):
    """y = x / sqrt(mean(x^2) + eps) * gain; the sum in 16 lanes, then the lanes in order."""
    size = x.shape[1]
    lanes = np.empty(LANES, np.float32)
    for t in range(x.shape[0]):
        lanes[:] = 0
        whole = size // LANES * LANES
        for k in range(0, whole, LANES):
            for i in range(LANES):
                lanes[i] += x[t, k + i] * x[t, k + i]
        for k in range(whole, size):
            lanes[k - whole] += x[t, k] * x[t, k]
        total = f32(0)
        for i in range(LANES):
            total += lanes[i]
        factor = f32(1) / np.sqrt(total / f32(size) + eps)
        for k in range(size):
            y[t, k] = x[t, k] * factor * gain[k]


@helper
def activation(x, kind):
    """One element."""
    if kind == 0:
        return x / (f32(1) + exp(-x))
    if kind == 1:
        return f32(0.5) * x * (f32(1) + f32(math.erf(x * f32(0.7071067811865476))))
    if kind == 2:
        u = f32(0.7978845608028654) * (x + f32(0.044715) * x * x * x)
        return f32(0.5) * x * (f32(2) - f32(2) / (exp(f32(2) * u) + f32(1)))
    if kind == 3:
        return f32(0) if x < f32(0) else x  # a NaN stays one
    return x


@kernel('void(f4[:, ::1], i8, f4[:, ::1])')
def activate(x, kind, y):
    """y = activation(x)."""
    for t in range(x.shape[0]):
        if kind == 0:  # in a loop of its own, without a choice inside, it vectorizes
            for k in range(x.shape[1]):
                y[t, k] = x[t, k] / (f32(1) + exp(-x[t, k]))
        else:
            for k in range(x.shape[1]):
                y[t, k] = activation(x[t, k], kind)


@kernel('void(f4[:, ::1], i8, f4[:, ::1])')
def gated_activation(gate_up, kind, y):
    """y = activation(gate) * up.  gate_up [tokens, 2 ffn/n]"""
    ffn = y.shape[1]
    for t in range(y.shape[0]):
        if kind == 0:
            for k in range(ffn):
                gate = gate_up[t, k]
                y[t, k] = gate / (f32(1) + exp(-gate)) * gate_up[t, ffn + k]
        else:
            for k in range(ffn):
                y[t, k] = activation(gate_up[t, k], kind) * gate_up[t, ffn + k]


@helper
def bfloat16(x):
    """The upper half of a float32, rounded to nearest even; a NaN stays one."""
    bits = np.uint32(bits_of(x))
    if x != x:
        return np.uint16(bits >> np.uint32(16)) | np.uint16(0x40)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@kernel('void(f4[:, ::1], f4[:, ::1])')
def round_bfloat16(x, y):
    """y = x, rounded to bfloat16."""
    for t in range(len(x)):
        for k in range(x.shape[1]):
            y[t, k] = float_of(np.int32(np.uint32(bfloat16(x[t, k])) << np.uint32(16)))


@helper
def turned(row, first, i, dim, cos, sin, t, rope):
    """Element i of the head that begins at `first`, turned by RoPE if there is one."""
    if not rope:
        return row[first + i]
    half = dim // 2
    other = row[first + i + half] if i < half else row[first + i - half]
    return row[first + i] * cos[t, i] + other * sin[t, i]


@helper
def turn_queries(qkv, cos, sin, rope, q):
    """The first heads of the fused projection, turned."""
    heads, dim = q.shape[1], q.shape[2]
    for t in range(len(qkv)):
        for head in range(heads):
            for i in range(dim):
                q[t, head, i] = turned(qkv[t], head * dim, i, dim, cos, sin, t, rope)


@kernel('void(f4[:, ::1], f4[:, ::1], f4[:, ::1], b1, i8[::1], f4[:, :, ::1], f4[:, :, ::1], f4[:, :, ::1])')
def rope_append_float32(qkv, cos, sin, rope, slots, q, keys, values):
    """Q turned; K, turned, and V into the cache (see attention.py for its layout)."""
    heads, dim, kv_heads = q.shape[1], q.shape[2], len(keys)
    k, v = keys.reshape(kv_heads, -1), values.reshape(kv_heads, -1)
    wide = -(-dim // LANES) * LANES
    turn_queries(qkv, cos, sin, rope, q)
    for t in range(len(qkv)):
        row, slot = qkv[t], slots[t]
        for head in range(kv_heads):
            at_k, at_v = (heads + head) * dim, (heads + kv_heads + head) * dim
            for i in range(dim):
                k[head, slot // LANES * (dim * LANES) + i * LANES + slot % LANES] = turned(row, at_k, i, dim, cos, sin, t, rope)
                v[head, slot * wide + i] = row[at_v + i]


@kernel('void(f4[:, ::1], f4[:, ::1], f4[:, ::1], b1, i8[::1], f4[:, :, ::1], u2[:, :, ::1], u2[:, :, ::1])')
def rope_append_bfloat16(qkv, cos, sin, rope, slots, q, keys, values):
    """The same into a cache of bfloat16."""
    heads, dim, kv_heads = q.shape[1], q.shape[2], len(keys)
    k, v = keys.reshape(kv_heads, -1), values.reshape(kv_heads, -1)
    wide, even = -(-dim // LANES) * LANES, dim + dim % 2
    turn_queries(qkv, cos, sin, rope, q)
    for t in range(len(qkv)):
        row, slot = qkv[t], slots[t]
        for head in range(kv_heads):
            at_k, at_v = (heads + head) * dim, (heads + kv_heads + head) * dim
            for i in range(dim):
                panel = slot // LANES * (even * LANES)
                k[head, panel + i // 2 * (2 * LANES) + slot % LANES * 2 + i % 2] = bfloat16(
                    turned(row, at_k, i, dim, cos, sin, t, rope))
                v[head, slot // 2 * (2 * wide) + 2 * i + slot % 2] = bfloat16(row[at_v + i])


@kernel('void(f4[:, ::1], f4[::1])')
def log_sum_exp(logits, y):
    """log(sum(exp(logits))) of each row; the sum in 16 lanes, then the lanes in order."""
    lanes = np.empty(LANES, np.float32)
    for t in range(len(logits)):
        top = f32(-np.inf)
        for k in range(logits.shape[1]):
            top = max(top, logits[t, k])
        lanes[:] = 0
        whole = logits.shape[1] // LANES * LANES
        for k in range(0, whole, LANES):
            for i in range(LANES):
                lanes[i] += exp(logits[t, k + i] - top)
        for k in range(whole, logits.shape[1]):
            lanes[k - whole] += exp(logits[t, k] - top)
        total = 0.0
        for i in range(LANES):
            total += lanes[i]
        y[t] = top + f32(math.log(total))
