"""A mixture of experts: which of them each token goes to, and the products of all of them in one pass.

The rows of all tokens lie side by side in the order of their experts, so that each expert's are one small matrix.  All
threads share every product, and meet when the last one is done: a token that goes to eight experts reads their weights
as fast as it reads one matrix.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from tpmpi.kernels.jit import kernel, shared_kernel
from tpmpi.kernels.products import (
    BYTES_INT4,
    BYTES_INT8,
    SHARES,
    new_integers,
    quantize_coarse_int4,
    quantize_coarse_int8,
    quantize_int4,
    quantize_int8,
    share_coarse_int4,
    share_coarse_int8,
)
from tpmpi.kernels.rows import exp

f32 = np.float32


@kernel('void(f4[:, ::1], b1, i8[:, ::1], f4[:, ::1])')
def route(scores, normalize, choice, shares):
    """The experts of each token, ascending, and the softmax of their scores.  choice, shares: [tokens, count], the results."""
    experts, count = scores.shape[1], choice.shape[1]
    p, chosen = np.empty(experts, np.float32), np.empty(experts, np.bool_)
    for t in range(len(scores)):
        top, total, kept, n = scores[t, 0], f32(0), f32(0), 0
        for i in range(experts):
            top = max(top, scores[t, i])
        for i in range(experts):
            p[i] = exp(scores[t, i] - top)
            total += p[i]
        for i in range(experts):
            p[i] /= total
            chosen[i] = False
        for _ in range(count):
            best = -1
            for i in range(experts):
                if not chosen[i] and (best < 0 or p[i] > p[best]):  # of equal ones the first; a NaN leaves valid ids
                    best = i
            chosen[best] = True
        for i in range(experts):
            if chosen[i]:
                choice[t, n], shares[t, n] = i, p[i]
                kept += p[i]
                n += 1
        if normalize:
            for i in range(count):
                shares[t, i] /= kept


@kernel('void(i8[:, ::1], f4[:, ::1], i8[::1], i8[::1], f4[::1])')
def sort_by_expert(choice, shares, starts, tokens, weights):
    """Rows in the order of their experts, then of their tokens: the token of each row, and its share.

    starts: [experts + 1] the first row of each expert; zeros before.
    """
    experts = len(starts) - 1
    for t in range(len(choice)):
        for i in range(choice.shape[1]):
            starts[choice[t, i] + 1] += 1
    for i in range(experts):
        starts[i + 1] += starts[i]
    at = starts[:experts].copy()
    for t in range(len(choice)):
        for i in range(choice.shape[1]):
            row = at[choice[t, i]]
            at[choice[t, i]] += 1
            tokens[row], weights[row] = t, shares[t, i]


@shared_kernel('void(f4[:, ::1], i8[::1], f4[::1], f4[:, ::1], i8)')
def combine(y, tokens, weights, e, threads):
    """e[token] += weight * y of each row, ascending: so each token adds its experts in their order."""
    hidden = e.shape[1]
    for thread in prange(threads):
        t = np.int64(thread)
        for row in range(len(y)):
            for k in range(hidden * t // threads, hidden * (t + 1) // threads):
                e[tokens[row], k] += weights[row] * y[row, k]


# ---- the products; x [rows, in], starts [experts + 1] each expert's first row, w [experts, panels, bytes], y [rows, out]


_float32, _bfloat16, _int8, _int4 = (SHARES[kind] for kind in ('float32', 'bfloat16', 'int8', 'int4'))
PRODUCTS = 'void(f4[:, ::1], i8[::1], u1[:, :, ::1], f4[:, ::1], i8)'


@shared_kernel(PRODUCTS)
def multiply_float32(x, starts, w, y, threads):
    """y = each row of x times its expert's W."""
    for thread in prange(threads):
        for i in range(len(w)):
            first, last = starts[i], starts[i + 1]
            if first < last:
                _float32(x[first:last], w[i], y[first:last], np.int64(thread), threads)


@shared_kernel(PRODUCTS)
def multiply_bfloat16(x, starts, w, y, threads):
    """y = each row of x times its expert's W."""
    for thread in prange(threads):
        for i in range(len(w)):
            first, last = starts[i], starts[i + 1]
            if first < last:
                _bfloat16(x[first:last], w[i], y[first:last], np.int64(thread), threads)


@shared_kernel(PRODUCTS)
def multiply_int8(x, starts, w, y, threads):
    """y = each row of x, in 16 bits, times its expert's W."""
    q, scale, total = new_integers(x, 2)
    for thread in prange(threads):
        quantize_int8(x, q, scale, total, np.int64(thread), threads)
    for thread in prange(threads):
        for i in range(len(w)):
            first, last = starts[i], starts[i + 1]
            if first < last:
                _int8(q[first:last], scale[first:last], total[first:last], w[i], y[first:last], np.int64(thread), threads)


@shared_kernel(PRODUCTS)
def multiply_int4(x, starts, w, y, threads):
    """y = each row of x, in 16 bits, times its expert's W."""
    q, scale, total = new_integers(x, 2)
    for thread in prange(threads):
        quantize_int4(x, q, scale, total, np.int64(thread), threads)
    for thread in prange(threads):
        for i in range(len(w)):
            first, last = starts[i], starts[i + 1]
            if first < last:
                _int4(q[first:last], scale[first:last], total[first:last], w[i], y[first:last], np.int64(thread), threads)


@shared_kernel(PRODUCTS)
def coarse_int8(x, starts, w, y, threads):
    """y = each row of x, in 8 bits, times its expert's W."""
    q, scale, total = new_integers(x, BYTES_INT8)
    for thread in prange(threads):
        quantize_coarse_int8(x, q, scale, total, np.int64(thread), threads)
    for thread in prange(threads):
        for i in range(len(w)):
            first, last = starts[i], starts[i + 1]
            if first < last:
                share_coarse_int8(q[first:last], scale[first:last], total[first:last], w[i], y[first:last],
                                  np.int64(thread), threads)


@shared_kernel(PRODUCTS)
def coarse_int4(x, starts, w, y, threads):
    """y = each row of x, in 8 bits, times its expert's W."""
    q, scale, total = new_integers(x, BYTES_INT4)
    for thread in prange(threads):
        quantize_coarse_int4(x, q, scale, total, np.int64(thread), threads)
    for thread in prange(threads):
        for i in range(len(w)):
            first, last = starts[i], starts[i + 1]
            if first < last:
                share_coarse_int4(q[first:last], scale[first:last], total[first:last], w[i], y[first:last],
                                  np.int64(thread), threads)


MULTIPLY = {'float32': multiply_float32, 'bfloat16': multiply_bfloat16, 'int8': multiply_int8, 'int4': multiply_int4}
COARSE = {'int8': coarse_int8, 'int4': coarse_int4}  # for activations rounded to int8
