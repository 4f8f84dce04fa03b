"""x · W for every kind of weights and every number of tokens, on panels (see tiles.py for their layout).

One token: four far streams through the matrix, at once the fastest way to read memory (a single stream got 20 GB/s on
a core that gives 24 to four).  Many tokens: panels stay in the cache while all rows pass.  Each output is accumulated in
the same order in all cases.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from tpmpi.kernels.jit import helper, inlined, shared_kernel
from tpmpi.kernels.rows import row_quantize
from tpmpi.kernels.tiles import GROUP, LANES, PER_STEP, float_tile, integer_tile, keep

K_BLOCK = 1024  # weights along k in one pass over many rows: four panels of them stay in the second-level cache
PANELS = 4  # of one pass
ROW_BYTES = LANES * 4  # of a panel's outputs


def float_panels(kind: str):
    """add(x, x_row, tokens, w, w_panel, w_step, panels, steps, y, y_row): adds x · W to whole panels of y.

    x, w, y: addresses; the others: strides in bytes and counts.  kind: float32 or bfloat16.
    """
    one_by_four, one_by_one = float_tile(kind, 1, 4), float_tile(kind, 1, 1)
    two_by_two, three_by_two = float_tile(kind, 2, 2), float_tile(kind, 3, 2)
    six, four, three, two = (float_tile(kind, rows, 1) for rows in (6, 4, 3, 2))
    block = K_BLOCK // PER_STEP[kind]
    far_rows = 3 if PER_STEP[kind] == 1 else 2  # three rows of pairs beside two panels would not fit into 16 registers

    @inlined
    def few(x, x_row, tokens, w, w_panel, w_step, panels, steps, y, y_row):
        """Up to `far_rows` rows; returns how many panels are left over for one stream."""
        far = panels // (4 if tokens == 1 else 2)
        for p in range(far):
            at, out = w + p * w_panel, y + p * ROW_BYTES
            if tokens == 1:
                one_by_four(x, x_row, at, far * w_panel, w_step, steps, out, y_row, far * ROW_BYTES)
            elif tokens == 2:
                two_by_two(x, x_row, at, far * w_panel, w_step, steps, out, y_row, far * ROW_BYTES)
            elif far_rows == 3:
                three_by_two(x, x_row, at, far * w_panel, w_step, steps, out, y_row, far * ROW_BYTES)
        return panels - far * (4 if tokens == 1 else 2)

    @inlined
    def add(x, x_row, tokens, w, w_panel, w_step, panels, steps, y, y_row):
        first = panels - few(x, x_row, tokens, w, w_panel, w_step, panels, steps, y, y_row) if tokens <= far_rows else 0
        for step in range(0, steps, block):
            count = min(block, steps - step)
            for p0 in range(first, panels, PANELS):
                m = 0
                while m < tokens:
                    rows = strip_rows(tokens - m)
                    for p in range(p0, min(p0 + PANELS, panels)):
                        at, to = x + m * x_row + step * (K_BLOCK // block * 4), y + m * y_row + p * ROW_BYTES
                        part = w + p * w_panel + step * w_step
                        if rows == 6:
                            six(at, x_row, part, 0, w_step, count, to, y_row, 0)
                        elif rows == 4:
                            four(at, x_row, part, 0, w_step, count, to, y_row, 0)
                        elif rows == 3:
                            three(at, x_row, part, 0, w_step, count, to, y_row, 0)
                        elif rows == 2:
                            two(at, x_row, part, 0, w_step, count, to, y_row, 0)
                        else:
                            one_by_one(at, x_row, part, 0, w_step, count, to, y_row, 0)
                    m += rows

    return add


def _float_product(kind: str):
    """share(x, w, y, t, threads) for float32 and bfloat16."""
    add, each = float_panels(kind), PER_STEP[kind]

    @helper
    def share(x, w, y, t, threads):
        """The outputs of thread t."""
        tokens, steps, whole = x.shape[0], x.shape[1] // each, y.shape[1] // LANES
        first, last = whole * t // threads, whole * (t + 1) // threads
        tail = np.zeros((tokens, LANES), np.float32)  # a last panel that is not full, with the last thread's
        y[:, first * LANES:last * LANES] = 0
        for part in range(2 if t == threads - 1 and y.shape[1] > whole * LANES else 1):
            panel, panels, to, y_row = first, last - first, y.ctypes.data + first * ROW_BYTES, 4 * y.shape[1]
            if part == 1:
                panel, panels, to, y_row = whole, 1, tail.ctypes.data, ROW_BYTES
            add(x.ctypes.data, 4 * x.shape[1], tokens, w.ctypes.data + panel * w.shape[1], w.shape[1], ROW_BYTES, panels, steps,
                to, y_row)
            if part == 1:
                y[:, whole * LANES:] = tail[:, :y.shape[1] - whole * LANES]
        keep(x)
        keep(w)

    return share


@inlined
def strip_rows(left):
    """Rows of the next strip when so many are left: 6, 4, 3, 2 or 1; five are 3 + 2."""
    return 6 if left >= 6 else 3 if left == 5 else left


@helper
def quantize(x, q, scale, total, first, last):
    """Rows first … last - 1 of x as int16 with a scale and the sum of each group of 32."""
    groups = x.shape[1] // GROUP
    for m in range(first, last):
        row, at = m * x.shape[1], 4 * m * groups
        row_quantize(x.ctypes.data + 4 * row, q.ctypes.data + 2 * row, scale.ctypes.data + at, total.ctypes.data + at, groups)
    keep(x)
    keep(q)
    keep(scale)
    keep(total)


@helper
def new_integers(x):
    """Room for x [tokens, k] as `quantize` writes it."""
    tokens, groups = len(x), x.shape[1] // GROUP
    return np.empty(x.shape, np.int16), np.empty((tokens, groups), np.float32), np.empty((tokens, groups), np.float32)


def _integer_product(kind: str):
    """share(q, scale, total, w, y, t, threads) for int8 and int4."""
    one_by_four, two_by_two = integer_tile(kind, 1, 4), integer_tile(kind, 2, 2)
    six, four, three, two, one = (integer_tile(kind, rows, 1) for rows in (6, 4, 3, 2, 1))

    @inlined
    def few(x, x_row, scale, total, scale_row, tokens, w, w_panel, groups, panels, y, y_row):
        """One or two rows; returns how many panels are left over for one stream."""
        far = panels // (4 if tokens == 1 else 2)
        for p in range(far):
            at, out = w + p * w_panel, y + p * ROW_BYTES
            if tokens == 1:
                one_by_four(x, x_row, scale, total, scale_row, at, far * w_panel, groups, out, y_row, far * ROW_BYTES)
            else:
                two_by_two(x, x_row, scale, total, scale_row, at, far * w_panel, groups, out, y_row, far * ROW_BYTES)
        return panels - far * (4 if tokens == 1 else 2)

    @inlined
    def add(x, x_row, scale, total, scale_row, tokens, w, w_panel, groups, panels, y, y_row):
        first = 0
        if tokens <= 2:
            first = panels - few(x, x_row, scale, total, scale_row, tokens, w, w_panel, groups, panels, y, y_row)
        for p0 in range(first, panels, PANELS):
            m = 0
            while m < tokens:
                rows = strip_rows(tokens - m)
                a, s, t = x + m * x_row, scale + m * scale_row, total + m * scale_row
                for p in range(p0, min(p0 + PANELS, panels)):
                    at, out = w + p * w_panel, y + m * y_row + p * ROW_BYTES
                    if rows == 6:
                        six(a, x_row, s, t, scale_row, at, 0, groups, out, y_row, 0)
                    elif rows == 4:
                        four(a, x_row, s, t, scale_row, at, 0, groups, out, y_row, 0)
                    elif rows == 3:
                        three(a, x_row, s, t, scale_row, at, 0, groups, out, y_row, 0)
                    elif rows == 2:
                        two(a, x_row, s, t, scale_row, at, 0, groups, out, y_row, 0)
                    else:
                        one(a, x_row, s, t, scale_row, at, 0, groups, out, y_row, 0)
                m += rows

    @helper
    def share(q, scale, total, w, y, t, threads):
        """The outputs of thread t."""
        tokens, groups, whole = q.shape[0], scale.shape[1], y.shape[1] // LANES
        first, last = whole * t // threads, whole * (t + 1) // threads
        tail = np.zeros((tokens, LANES), np.float32)  # a last panel that is not full, with the last thread's
        y[:, first * LANES:last * LANES] = 0
        for part in range(2 if t == threads - 1 and y.shape[1] > whole * LANES else 1):
            panel, panels, to, y_row = first, last - first, y.ctypes.data + first * ROW_BYTES, 4 * y.shape[1]
            if part == 1:
                panel, panels, to, y_row = whole, 1, tail.ctypes.data, ROW_BYTES
            add(q.ctypes.data, 2 * q.shape[1], scale.ctypes.data, total.ctypes.data, 4 * groups, tokens,
                w.ctypes.data + panel * w.shape[1], w.shape[1], groups, panels, to, y_row)
            if part == 1:
                y[:, whole * LANES:] = tail[:, :y.shape[1] - whole * LANES]
        keep(q)
        keep(scale)
        keep(total)
        keep(w)

    return share


# ---- entry points: functions of the module, because Numba cannot cache those that a function makes


_float32, _bfloat16 = _float_product('float32'), _float_product('bfloat16')
_int8, _int4 = _integer_product('int8'), _integer_product('int4')
SHARES = {'float32': _float32, 'bfloat16': _bfloat16, 'int8': _int8, 'int4': _int4}
PRODUCT = 'void(f4[:, ::1], u1[:, ::1], f4[:, ::1], i8)'  # x [tokens, in], w [panels, bytes], y [tokens, out], threads


@shared_kernel(PRODUCT)
def multiply_float32(x, w, y, threads):
    """y = x · W."""
    for thread in prange(threads):
        _float32(x, w, y, np.int64(thread), threads)  # an unsigned index would make products of it floating-point


@shared_kernel(PRODUCT)
def multiply_bfloat16(x, w, y, threads):
    """y = x · W."""
    for thread in prange(threads):
        _bfloat16(x, w, y, np.int64(thread), threads)


@shared_kernel(PRODUCT)
def multiply_int8(x, w, y, threads):
    """y = x · W."""
    q, scale, total = new_integers(x)
    for thread in prange(threads):
        quantize(x, q, scale, total, len(x) * np.int64(thread) // threads, len(x) * (np.int64(thread) + 1) // threads)
    for thread in prange(threads):
        _int8(q, scale, total, w, y, np.int64(thread), threads)


@shared_kernel(PRODUCT)
def multiply_int4(x, w, y, threads):
    """y = x · W."""
    q, scale, total = new_integers(x)
    for thread in prange(threads):
        quantize(x, q, scale, total, len(x) * np.int64(thread) // threads, len(x) * (np.int64(thread) + 1) // threads)
    for thread in prange(threads):
        _int4(q, scale, total, w, y, np.int64(thread), threads)


MULTIPLY = {'float32': multiply_float32, 'bfloat16': multiply_bfloat16, 'int8': multiply_int8, 'int4': multiply_int4}
