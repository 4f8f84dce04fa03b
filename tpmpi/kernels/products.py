"""x · W for every kind of weights and every number of tokens, on panels (see tiles.py for their layout).

One token: four far streams through the matrix, at once the fastest way to read memory (a single stream got 20 GB/s on
a core that gives 24 to four).  Many tokens: panels stay in the cache while all rows pass; the integer kinds are widened
into a small buffer first.  Each output is accumulated in the same order in all cases.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from tpmpi.kernels.jit import helper, inlined, shared_kernel
from tpmpi.kernels.tiles import GROUP, GROUP_BYTES, LANES, PER_STEP, float_of, float_tile, integer_tile, keep, widen_groups

K_BLOCK = 1024  # weights along k in one pass over many rows: four panels of them stay in the second-level cache
PANELS = 4  # of one pass
WIDEN_FROM = 8  # rows from which the integer kinds are widened first
ROW_BYTES = LANES * 4  # of a panel's outputs


def float_panels(kind: str):
    """add(x, x_row, tokens, w, w_panel, w_step, panels, steps, y, y_row): adds x · W to whole panels of y.

    x, w, y: addresses; the others: strides in bytes and counts.  kind: float32 or bfloat16.
    """
    one_by_four, one_by_one = float_tile(kind, 1, 4), float_tile(kind, 1, 1)
    two_by_two, three_by_two = float_tile(kind, 2, 2), float_tile(kind, 3, 2)
    six, four, three, two = (float_tile(kind, rows, 1) for rows in (6, 4, 3, 2))
    block = K_BLOCK // PER_STEP[kind]

    @inlined
    def few(x, x_row, tokens, w, w_panel, w_step, panels, steps, y, y_row):
        """Up to three rows; returns how many panels are left over for one stream."""
        far = panels // (4 if tokens == 1 else 2)
        for p in range(far):
            at, out = w + p * w_panel, y + p * ROW_BYTES
            if tokens == 1:
                one_by_four(x, x_row, at, far * w_panel, w_step, steps, out, y_row, far * ROW_BYTES)
            elif tokens == 2:
                two_by_two(x, x_row, at, far * w_panel, w_step, steps, out, y_row, far * ROW_BYTES)
            else:
                three_by_two(x, x_row, at, far * w_panel, w_step, steps, out, y_row, far * ROW_BYTES)
        return panels - far * (4 if tokens == 1 else 2)

    @inlined
    def add(x, x_row, tokens, w, w_panel, w_step, panels, steps, y, y_row):
        first = panels - few(x, x_row, tokens, w, w_panel, w_step, panels, steps, y, y_row) if tokens <= 3 else 0
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
def _quantize(x, bits, q, scale, total, first, last):
    """Rows first … last - 1."""
    for m in range(first, last):
        for g in range(x.shape[1] // GROUP):
            largest = np.int32(0)
            for i in range(g * GROUP, (g + 1) * GROUP):
                largest = max(largest, bits[m, i] & np.int32(0x7FFFFFFF))
            step = float_of(largest) * np.float32(1 / 32767)
            factor = np.float32(1) / step if np.float32(1e-37) < step < np.inf else np.float32(0)
            whole = np.int32(0)
            for i in range(g * GROUP, (g + 1) * GROUP):
                value = np.int32(np.rint(x[m, i] * factor))
                q[m, i] = value
                whole += value
            scale[m, g] = step
            total[m, g] = step * np.float32(whole)


def _integer_product(kind: str):
    """share(q, scale, total, w, y, t, threads) for int8 and int4."""
    one_by_four, one_by_one = integer_tile(kind, 1, 4), integer_tile(kind, 1, 1)
    two_by_two, three, four = integer_tile(kind, 2, 2), integer_tile(kind, 3, 1), integer_tile(kind, 4, 1)
    two = integer_tile(kind, 2, 1)
    wide_six, wide_four, wide_three, wide_two, wide_one = (integer_tile('int16', rows, 1) for rows in (6, 4, 3, 2, 1))
    widen = widen_groups(kind)
    group_bytes, wide_bytes = GROUP_BYTES[kind], GROUP_BYTES['int16']

    @inlined
    def few(x, x_row, scale, total, scale_row, tokens, w, w_panel, groups, first, last, y, y_row):
        """Whole panels first … last - 1, straight from memory."""
        if tokens == 1:
            far = (last - first) // 4
            for p in range(first, first + far):
                one_by_four(x, x_row, scale, total, scale_row, w + p * w_panel, far * w_panel, groups,
                            y + p * ROW_BYTES, y_row, far * ROW_BYTES)
            first += 4 * far
        elif tokens == 2:
            far = (last - first) // 2
            for p in range(first, first + far):
                two_by_two(x, x_row, scale, total, scale_row, w + p * w_panel, far * w_panel, groups,
                           y + p * ROW_BYTES, y_row, far * ROW_BYTES)
            first += 2 * far
        for p in range(first, last):
            m = 0
            while m < tokens:
                rows = min(tokens - m, 4) if tokens - m != 5 else 3
                a, s, t, out = x + m * x_row, scale + m * scale_row, total + m * scale_row, y + m * y_row + p * ROW_BYTES
                if rows == 4:
                    four(a, x_row, s, t, scale_row, w + p * w_panel, 0, groups, out, y_row, 0)
                elif rows == 3:
                    three(a, x_row, s, t, scale_row, w + p * w_panel, 0, groups, out, y_row, 0)
                elif rows == 2:
                    two(a, x_row, s, t, scale_row, w + p * w_panel, 0, groups, out, y_row, 0)
                else:
                    one_by_one(a, x_row, s, t, scale_row, w + p * w_panel, 0, groups, out, y_row, 0)
                m += rows

    @inlined
    def many(x, x_row, scale, total, scale_row, tokens, w, w_panel, groups, first, last, y, y_row):
        """Whole panels first … last - 1, widened to int16 in a buffer that all rows use."""
        block = min(groups, K_BLOCK // GROUP)
        buffer = np.empty(PANELS * block * wide_bytes, np.uint8)
        wide = buffer.ctypes.data
        for g0 in range(0, groups, block):
            count = min(block, groups - g0)
            for p0 in range(first, last, PANELS):
                panels = min(PANELS, last - p0)
                for p in range(panels):
                    widen(w + (p0 + p) * w_panel + g0 * group_bytes, count, wide + p * block * wide_bytes)
                m = 0
                while m < tokens:
                    rows = strip_rows(tokens - m)
                    a, s, t = x + m * x_row + 2 * GROUP * g0, scale + m * scale_row + 4 * g0, total + m * scale_row + 4 * g0
                    for p in range(panels):
                        v, out = wide + p * block * wide_bytes, y + m * y_row + (p0 + p) * ROW_BYTES
                        if rows == 6:
                            wide_six(a, x_row, s, t, scale_row, v, 0, count, out, y_row, 0)
                        elif rows == 4:
                            wide_four(a, x_row, s, t, scale_row, v, 0, count, out, y_row, 0)
                        elif rows == 3:
                            wide_three(a, x_row, s, t, scale_row, v, 0, count, out, y_row, 0)
                        elif rows == 2:
                            wide_two(a, x_row, s, t, scale_row, v, 0, count, out, y_row, 0)
                        else:
                            wide_one(a, x_row, s, t, scale_row, v, 0, count, out, y_row, 0)
                    m += rows
        keep(buffer)

    @inlined
    def add(x, x_row, scale, total, scale_row, tokens, w, w_panel, groups, panels, y, y_row):
        if tokens < WIDEN_FROM:
            few(x, x_row, scale, total, scale_row, tokens, w, w_panel, groups, 0, panels, y, y_row)
        else:
            many(x, x_row, scale, total, scale_row, tokens, w, w_panel, groups, 0, panels, y, y_row)

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
PRODUCT = 'void(f4[:, ::1], u1[:, ::1], f4[:, ::1], i8)'  # x [tokens, in], w [panels, bytes], y [tokens, out], threads
INTEGER_PRODUCT = 'void(i2[:, ::1], f4[:, ::1], f4[:, ::1], u1[:, ::1], f4[:, ::1], i8)'  # x as `quantize` leaves it


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


@shared_kernel(INTEGER_PRODUCT)
def multiply_int8(q, scale, total, w, y, threads):
    """y = x · W."""
    for thread in prange(threads):
        _int8(q, scale, total, w, y, np.int64(thread), threads)


@shared_kernel(INTEGER_PRODUCT)
def multiply_int4(q, scale, total, w, y, threads):
    """y = x · W."""
    for thread in prange(threads):
        _int4(q, scale, total, w, y, np.int64(thread), threads)


@shared_kernel('void(f4[:, ::1], i4[:, ::1], i2[:, ::1], f4[:, ::1], f4[:, ::1], i8)')
def quantize(x, bits, q, scale, total, threads):
    """x [tokens, k] as int16 with a scale per group of 32; total: the sum of each group.  A NaN or infinity stays one.

    bits: x seen as int32, where a NaN counts as largest.
    """
    for thread in prange(threads):
        t = np.int64(thread)
        _quantize(x, bits, q, scale, total, len(x) * t // threads, len(x) * (t + 1) // threads)


MULTIPLY = {'float32': multiply_float32, 'bfloat16': multiply_bfloat16, 'int8': multiply_int8, 'int4': multiply_int4}
