"""Norms, activations, caps, and the step from the fused projection to Q and the cache."""

from __future__ import annotations

import math

import numpy as np
from numba import prange

from tpmpi.kernels.jit import helper, kernel, shared_kernel
from tpmpi.kernels.rows import exp, floats, row_add_squares, row_exp_sum, row_max, row_squares, row_sum, row_turn, tanh
from tpmpi.kernels.tiles import LANES, bits_of, float_of, keep

f32 = np.float32
ACTIVATIONS = {'silu': 0, 'gelu': 1, 'gelu_tanh': 2, 'relu': 3, 'identity': 4}


@helper
def share_rms_norm(x, gain, eps, y, thread, threads):
    """y = x / sqrt(mean(x^2) + eps) * gain."""
    size = x.shape[1]
    whole = size // LANES
    for t in range(len(x) * thread // threads, len(x) * (thread + 1) // threads):
        total = row_squares(x.ctypes.data + 4 * t * size, whole)
        for k in range(whole * LANES, size):
            total += x[t, k] * x[t, k]
        factor = f32(1) / np.sqrt(total / f32(size) + eps)
        row, result = floats(x.ctypes.data + 4 * t * size, size), floats(y.ctypes.data + 4 * t * size, size)
        for k in range(size):
            result[k] = row[k] * factor * gain[k]
    keep(x)
    keep(y)


@shared_kernel('void(f4[:, ::1], f4[::1], f4, f4[:, ::1], i8)')
def rms_norm(x, gain, eps, y, threads):
    """y = x / sqrt(mean(x^2) + eps) * gain."""
    if threads == 1:
        share_rms_norm(x, gain, eps, y, np.int64(0), threads)
    else:
        for thread in prange(threads):
            share_rms_norm(x, gain, eps, y, np.int64(thread), threads)


@helper
def share_add_rms_norm(x, part, gain, eps, y, thread, threads):
    """part += x, and y = its norm."""
    size = x.shape[1]
    whole = size // LANES
    for t in range(len(x) * thread // threads, len(x) * (thread + 1) // threads):
        at = 4 * t * size
        total = row_add_squares(x.ctypes.data + at, part.ctypes.data + at, whole)
        for k in range(whole * LANES, size):
            part[t, k] += x[t, k]
            total += part[t, k] * part[t, k]
        factor = f32(1) / np.sqrt(total / f32(size) + eps)
        row, result = floats(part.ctypes.data + at, size), floats(y.ctypes.data + at, size)
        for k in range(size):
            result[k] = row[k] * factor * gain[k]
    keep(x)
    keep(part)
    keep(y)


@shared_kernel('void(f4[:, ::1], f4[:, ::1], f4[::1], f4, f4[:, ::1], i8)')
def add_rms_norm(x, part, gain, eps, y, threads):
    """part += x, and y = its norm."""
    if threads == 1:
        share_add_rms_norm(x, part, gain, eps, y, np.int64(0), threads)
    else:
        for thread in prange(threads):
            share_add_rms_norm(x, part, gain, eps, y, np.int64(thread), threads)


@helper
def sum_of(x):
    """The sum of a row, in sixteen lanes as far as they are whole."""
    whole = len(x) // LANES
    total = row_sum(x.ctypes.data, whole)
    for k in range(whole * LANES, len(x)):
        total += x[k]
    keep(x)
    return total


@helper
def squares_of(x):
    """The sum of the squares of a row."""
    whole = len(x) // LANES
    total = row_squares(x.ctypes.data, whole)
    for k in range(whole * LANES, len(x)):
        total += x[k] * x[k]
    keep(x)
    return total


@helper
def normed(x, layer, gain, bias, eps, y):
    """A row through an RMS norm or, layer, a layer norm.  bias: as long as the row, or empty; y may be x."""
    mean = sum_of(x) / f32(len(x)) if layer else f32(0)
    for k in range(len(x)):
        y[k] = x[k] - mean
    factor = f32(1) / np.sqrt(squares_of(y) / f32(len(x)) + eps)
    for k in range(len(x)):
        y[k] = y[k] * factor * gain[k]
    for k in range(len(bias)):
        y[k] += bias[k]


@helper
def share_layer_norm(x, gain, bias, eps, y, thread, threads):
    """y = (x - mean) / sqrt(variance + eps) * gain + bias; an empty bias is none."""
    for t in range(len(x) * thread // threads, len(x) * (thread + 1) // threads):
        normed(x[t], True, gain, bias, eps, y[t])


@shared_kernel('void(f4[:, ::1], f4[::1], f4[::1], f4, f4[:, ::1], i8)')
def layer_norm(x, gain, bias, eps, y, threads):
    """y = (x - mean) / sqrt(variance + eps) * gain + bias; an empty bias is none."""
    if threads == 1:
        share_layer_norm(x, gain, bias, eps, y, np.int64(0), threads)
    else:
        for thread in prange(threads):
            share_layer_norm(x, gain, bias, eps, y, np.int64(thread), threads)


@kernel('void(i8, i8, i8, i8, i8, b1, f4[::1], f4[::1], f4)')
def norm_heads(address, row_bytes, tokens, heads, dim, layer, gain, bias, eps):
    """Each head through a norm of its own, in place.  address, row_bytes: of float32 [tokens, heads * dim]."""
    for t in range(tokens):
        for head in range(heads):
            at = head * dim
            x = floats(address + t * row_bytes + 4 * at, dim)
            normed(x, layer, gain[at:at + dim], bias[at:at + dim] if len(bias) else bias, eps, x)


@kernel('void(f4[:, ::1], i8, i8, f4[:, ::1], i8)')
def head_squares(qkv, first, last, y, column):
    """y[:, column] = the sums of the squares of qkv[:, first:last]."""
    for t in range(len(qkv)):
        y[t, column] = squares_of(qkv[t, first:last])


@kernel('void(f4[:, ::1], i8, f4[::1], f4[::1])')
def scale_columns(qkv, first, factor, gain):
    """The columns from the first on, as many as there are gains, times a factor for each row and a gain for each column."""
    for t in range(len(qkv)):
        for k in range(len(gain)):
            qkv[t, first + k] = qkv[t, first + k] * factor[t] * gain[k]


@kernel('void(f4[:, ::1], f4, f4[:, ::1])')
def softcap(x, cap, y):
    """y = cap * tanh(x / cap)."""
    for t in range(x.shape[0]):
        for k in range(x.shape[1]):
            y[t, k] = cap * tanh(x[t, k] / cap)


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


@helper
def share_activate(x, kind, y, thread, threads):
    """y = activation(x)."""
    for t in range(len(x) * thread // threads, len(x) * (thread + 1) // threads):
        if kind == 0:  # in a loop of its own, without a choice inside, it vectorizes
            for k in range(x.shape[1]):
                y[t, k] = x[t, k] / (f32(1) + exp(-x[t, k]))
        else:
            for k in range(x.shape[1]):
                y[t, k] = activation(x[t, k], kind)


@shared_kernel('void(f4[:, ::1], i8, f4[:, ::1], i8)')
def activate(x, kind, y, threads):
    """y = activation(x)."""
    if threads == 1:
        share_activate(x, kind, y, np.int64(0), threads)
    else:
        for thread in prange(threads):
            share_activate(x, kind, y, np.int64(thread), threads)


@helper
def share_gated_activation(gate_up, kind, y, thread, threads):
    """y = activation(gate) * up.  gate_up [tokens, 2 ffn/n]"""
    ffn = y.shape[1]
    for t in range(len(y) * thread // threads, len(y) * (thread + 1) // threads):
        if kind == 0:
            for k in range(ffn):
                gate = gate_up[t, k]
                y[t, k] = gate / (f32(1) + exp(-gate)) * gate_up[t, ffn + k]
        else:
            for k in range(ffn):
                y[t, k] = activation(gate_up[t, k], kind) * gate_up[t, ffn + k]


@shared_kernel('void(f4[:, ::1], i8, f4[:, ::1], i8)')
def gated_activation(gate_up, kind, y, threads):
    """y = activation(gate) * up.  gate_up [tokens, 2 ffn/n]"""
    if threads == 1:
        share_gated_activation(gate_up, kind, y, np.int64(0), threads)
    else:
        for thread in prange(threads):
            share_gated_activation(gate_up, kind, y, np.int64(thread), threads)


@helper
def bfloat16(x):
    """The upper half of a float32, rounded to nearest even; a NaN stays one."""
    bits = np.uint32(bits_of(x))
    if x != x:
        return np.uint16(bits >> np.uint32(16)) | np.uint16(0x40)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@helper
def narrow(x, parts, t, threads):
    """Thread t's rows of x as bfloat16."""
    for m in range(len(x) * t // threads, len(x) * (t + 1) // threads):
        for i in range(x.shape[1]):
            parts[m, i] = bfloat16(x[m, i])


@kernel('void(f4[:, ::1], f4[:, ::1])')
def round_bfloat16(x, y):
    """y = x, rounded to bfloat16."""
    for t in range(len(x)):
        for k in range(x.shape[1]):
            y[t, k] = float_of(np.int32(np.uint32(bfloat16(x[t, k])) << np.uint32(16)))


@helper
def turn(x, cos, sin, count, dim, y):
    """One head, [dim], its first `count` numbers turned by RoPE, which may be none.  Addresses."""
    row_turn(x, cos, sin, y, count // 2)
    if count < dim:
        rest, to = floats(x + 4 * count, dim - count), floats(y + 4 * count, dim - count)
        for i in range(dim - count):
            to[i] = rest[i]


@helper
def turn_queries(qkv, cos, sin, rope, q, thread, threads):
    """The first columns of the fused projection, turned, as Q; the rows of a thread."""
    heads, dim = q.shape[1], q.shape[2]
    count = cos.shape[1] if rope else 0
    for t in range(len(qkv) * thread // threads, len(qkv) * (thread + 1) // threads):
        x, y = qkv.ctypes.data + 4 * t * qkv.shape[1], q.ctypes.data + 4 * t * heads * dim
        table = 4 * t * cos.shape[1]
        for head in range(heads):
            turn(x + 4 * head * dim, cos.ctypes.data + table, sin.ctypes.data + table, count, dim, y + 4 * head * dim)
    keep(qkv)
    keep(q)


@helper
def share_rope_append_float32(qkv, cos, sin, rope, slots, q, keys, values, thread, threads):
    """Q turned; K, turned, and V into the cache (see attention.py for its layout)."""
    heads, dim, kv_heads = q.shape[1], q.shape[2], len(keys)
    turn_queries(qkv, cos, sin, rope, q, thread, threads)
    k, v = keys.reshape(kv_heads, -1), values.reshape(kv_heads, -1)
    wide, count = -(-dim // LANES) * LANES, cos.shape[1] if rope else 0
    turned = np.empty(dim, np.float32)
    for t in range(len(qkv) * thread // threads, len(qkv) * (thread + 1) // threads):
        x, table, slot = qkv.ctypes.data + 4 * t * qkv.shape[1], 4 * t * cos.shape[1], slots[t]
        panel = slot // LANES * (dim * LANES) + slot % LANES
        for head in range(kv_heads):
            at_k, at_v = (heads + head) * dim, (heads + kv_heads + head) * dim
            turn(x + 4 * at_k, cos.ctypes.data + table, sin.ctypes.data + table, count, dim, turned.ctypes.data)
            for i in range(dim):
                k[head, panel + i * LANES] = turned[i]
            row = floats(x + 4 * at_v, dim)
            for i in range(dim):
                v[head, slot * wide + i] = row[i]
    keep(qkv)
    keep(cos)
    keep(sin)
    keep(turned)


@shared_kernel('void(f4[:, ::1], f4[:, ::1], f4[:, ::1], b1, i8[::1], f4[:, :, ::1], f4[:, :, ::1], f4[:, :, ::1], i8)')
def rope_append_float32(qkv, cos, sin, rope, slots, q, keys, values, threads):
    """Q turned; K, turned, and V into the cache (see attention.py for its layout)."""
    if threads == 1:
        share_rope_append_float32(qkv, cos, sin, rope, slots, q, keys, values, np.int64(0), threads)
    else:
        for thread in prange(threads):
            share_rope_append_float32(qkv, cos, sin, rope, slots, q, keys, values, np.int64(thread), threads)


@helper
def share_rope_append_bfloat16(qkv, cos, sin, rope, slots, q, keys, values, thread, threads):
    """The same into a cache of bfloat16."""
    heads, dim, kv_heads = q.shape[1], q.shape[2], len(keys)
    turn_queries(qkv, cos, sin, rope, q, thread, threads)
    wide, even, count = -(-dim // LANES) * LANES, dim + dim % 2, cos.shape[1] if rope else 0
    k, v = keys.reshape(kv_heads, -1).view(np.uint32), values.reshape(kv_heads, -1)
    v_pairs = v.view(np.uint32)
    turned, halves = np.zeros(even, np.float32), np.empty(even, np.uint16)
    pairs = halves.view(np.uint32)
    for t in range(len(qkv) * thread // threads, len(qkv) * (thread + 1) // threads):
        x, table, slot = qkv.ctypes.data + 4 * t * qkv.shape[1], 4 * t * cos.shape[1], slots[t]
        panel = slot // LANES * (even // 2 * LANES) + slot % LANES
        before, after = t > 0 and slots[t - 1] == slot - 1, t + 1 < len(qkv) and slots[t + 1] == slot + 1
        for head in range(kv_heads):
            at_k, at_v = (heads + head) * dim, (heads + kv_heads + head) * dim
            turn(x + 4 * at_k, cos.ctypes.data + table, sin.ctypes.data + table, count, dim, turned.ctypes.data)
            for i in range(even):  # in a loop of its own it vectorizes
                halves[i] = bfloat16(turned[i])
            for i in range(even // 2):
                k[head, panel + i * LANES] = pairs[i]
            row, place = floats(x + 4 * at_v, dim), slot // 2 * wide
            if slot % 2 == 0 and after:  # this token's V and the next one's lie in pairs
                other = floats(x + 4 * (qkv.shape[1] + at_v), dim)
                for i in range(dim):
                    v_pairs[head, place + i] = np.uint32(bfloat16(row[i])) | (np.uint32(bfloat16(other[i])) << np.uint32(16))
            elif slot % 2 == 0 or not before:
                for i in range(dim):
                    v[head, 2 * (place + i) + slot % 2] = bfloat16(row[i])
    keep(qkv)
    keep(cos)
    keep(sin)
    keep(turned)


@shared_kernel('void(f4[:, ::1], f4[:, ::1], f4[:, ::1], b1, i8[::1], f4[:, :, ::1], u2[:, :, ::1], u2[:, :, ::1], i8)')
def rope_append_bfloat16(qkv, cos, sin, rope, slots, q, keys, values, threads):
    """The same into a cache of bfloat16."""
    if threads == 1:
        share_rope_append_bfloat16(qkv, cos, sin, rope, slots, q, keys, values, np.int64(0), threads)
    else:
        for thread in prange(threads):
            share_rope_append_bfloat16(qkv, cos, sin, rope, slots, q, keys, values, np.int64(thread), threads)


@kernel('void(f4[:, ::1], f4[::1])')
def log_sum_exp(logits, y):
    """log(sum(exp(logits))) of each row."""
    whole = logits.shape[1] // LANES
    for t in range(len(logits)):
        row = logits[t]
        top = row_max(row.ctypes.data, whole)
        for k in range(whole * LANES, len(row)):
            top = row[k] if row[k] > top else top
        total = row_exp_sum(row.ctypes.data, whole, top)
        for k in range(whole * LANES, len(row)):
            total += exp(row[k] - top)
        y[t] = top + f32(math.log(total))
    keep(logits)
