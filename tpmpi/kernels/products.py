"""x · W for every kind of weights and every number of tokens, on panels (see tiles.py for their layout).

Few tokens: four far streams through the matrix, at once the fastest way to read memory (a single stream got 20 GB/s on
a core that gives 24 to four).  Many tokens: panels stay in the cache while all rows pass, strip by strip.  Each output is
accumulated in the same order in all cases.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from tpmpi.kernels.jit import WIDTH, helper, inlined, shared_kernel
from tpmpi.kernels.rows import row_quantize
from tpmpi.kernels.tiles import AHEAD, COARSE_BYTES, GROUP, LANES, LATER, PER_STEP, STREAM, X_STEP, float_tile, integer_tile, keep

K_STEPS = 1024  # along k in one pass over many rows: four panels of them, 256 KiB, stay in the second-level cache
PANELS = 4  # of one pass
LATE = 4  # last strips of rows, which ask memory for the next panels: of many requests at once most are dropped
ROW_BYTES = LANES * 4  # of a panel's outputs
# panels of a tile, by its rows: as many as the sums have vector registers for
NEAR = {6: 4, 4: 4, 3: 4, 2: 4, 1: 4} if WIDTH == 16 else {6: 1, 4: 1, 3: 1, 2: 1, 1: 1}
NEAR_PAIRS = {4: 4, 3: 4, 2: 4, 1: 4} if WIDTH == 16 else NEAR  # bfloat16 beside float32: a pair takes two registers
# beside the sums of four rows there is just room for the weights of a step
NEAR_INTEGERS = {6: 2, 4: 2, 3: 2, 2: 2, 1: 2} if WIDTH == 16 else {4: 1, 3: 1, 2: 1, 1: 1}
FAR = NEAR if WIDTH == 16 else {3: 2, 2: 2, 1: 4}
FAR_PAIRS = NEAR_PAIRS if WIDTH == 16 else {2: 2, 1: 4}
FAR_INTEGERS = {4: 2, 3: 4, 2: 4, 1: 4} if WIDTH == 16 else {2: 2, 1: 4}


@inlined
def strip_rows(left, most):
    """Rows of the next strip when so many are left: 6, 4, 3, 2 or 1; most: of a strip."""
    return most if left >= most else 3 if left == 5 else left


def strips(make, panels: dict[int, int]):
    """strip(rows, …): the tile of so many rows, and of as many panels as `panels` says of these rows."""
    tiles = {rows: make(rows, count) for rows, count in panels.items()}
    six, four, three, two, one = (tiles.get(rows, tiles[1]) for rows in (6, 4, 3, 2, 1))

    @inlined
    def strip(rows, place):
        if rows == 6:
            six(*place)
        elif rows == 4:
            four(*place)
        elif rows == 3:
            three(*place)
        elif rows == 2:
            two(*place)
        else:
            one(*place)

    return strip


def panels_of_far(far: dict[int, int]):
    """count(tokens): panels that so many tokens read at once from far places; 0 where they are too many."""
    six, four, three, two, one = (far.get(rows, 0) for rows in (6, 4, 3, 2, 1))

    @inlined
    def count(tokens):
        return one if tokens == 1 else two if tokens == 2 else three if tokens == 3 else four if tokens == 4 else (
            six if tokens == 6 else 0)

    return count


def float_panels(kind: str, level: int = STREAM):
    """add(x, x_row, tokens, w, w_panel, w_step, panels, steps, y, y_row, fresh, ahead): adds x · W to whole panels of y.

    x, w, y: addresses; the others: strides in bytes and counts.  fresh: y is written instead, if there is a step.  ahead: how
    far behind each weight that lies what is asked for meanwhile; 0: the weights to come.
    kind: float32, bfloat16, or pairs (see float_tile); level: of the cache that is asked for what few tokens multiply.
    """
    def tile(rows, panels):
        return float_tile(kind, rows, panels)

    def far_tile(rows, panels):
        return float_tile(kind, rows, panels, level)

    def asking_tile(rows, panels):
        return float_tile(kind, rows, panels, LATER)

    near_panels, far_panels = (NEAR_PAIRS, FAR_PAIRS) if kind == 'bfloat16' else (NEAR, FAR)
    near, last = strips(tile, near_panels), strips(asking_tile, dict.fromkeys(near_panels, 1))
    wide, most, asking = near_panels[1], max(near_panels), strips(asking_tile, near_panels)
    far, together = strips(far_tile, far_panels), panels_of_far(far_panels)
    x_step = X_STEP[kind]

    @inlined
    def add(x, x_row, tokens, w, w_panel, w_step, panels, steps, y, y_row, fresh, ahead):
        at_once, first = together(tokens), 0
        if at_once > 0:
            streams = panels // at_once
            for p in range(streams):
                far(tokens, (x, x_row, w + p * w_panel, streams * w_panel, w_step, steps, y + p * ROW_BYTES, y_row,
                             streams * ROW_BYTES, fresh, ahead if ahead != 0 else AHEAD))
            first = streams * at_once
        for step in range(0, steps, K_STEPS):
            count, begun = min(K_STEPS, steps - step), fresh if step == 0 else 0
            for p0 in range(first, panels, PANELS):
                m, end = 0, min(p0 + PANELS, panels)
                following = PANELS * w_panel if end < panels else (first - p0) * w_panel + K_STEPS * w_step
                while m < tokens:
                    rows = strip_rows(tokens - m, most)
                    at, p = x + m * x_row + step * x_step, p0
                    soon = (ahead if m == 0 else 0) if ahead != 0 else following if m + LATE * most >= tokens else 0
                    while p < end:
                        part, to = w + p * w_panel + step * w_step, y + m * y_row + p * ROW_BYTES
                        if end - p >= wide and soon != 0:
                            asking(rows, (at, x_row, part, w_panel, w_step, count, to, y_row, ROW_BYTES, begun, soon))
                            p += wide
                        elif wide > 1 and end - p >= wide:
                            near(rows, (at, x_row, part, w_panel, w_step, count, to, y_row, ROW_BYTES, begun, 0))
                            p += wide
                        else:
                            last(rows, (at, x_row, part, w_panel, w_step, count, to, y_row, ROW_BYTES, begun, soon))
                            p += 1
                    m += rows

    return add


@helper
def clear(y, first, end):
    """y[:, first:end] = 0: a loop, because Numba compiles an assignment to a slice for seconds, for the text of its error."""
    for m in range(y.shape[0]):
        for column in range(first, end):
            y[m, column] = 0


@helper
def put_last(tail, y, first):
    """y[:, first:] = the beginnings of the rows of tail."""
    for m in range(y.shape[0]):
        for column in range(first, y.shape[1]):
            y[m, column] = tail[m, column - first]


def float_product(kind: str):
    """share(x, w, y, t, threads) for float32, bfloat16, and pairs, which take x as bfloat16."""
    add, each = float_panels(kind), PER_STEP.get(kind, 2)
    x_bytes = X_STEP[kind] // each

    @helper
    def share(x, w, y, t, threads):
        """The outputs of thread t."""
        tokens, steps, whole = x.shape[0], x.shape[1] // each, y.shape[1] // LANES
        first, last = whole * t // threads, whole * (t + 1) // threads
        tail = np.zeros((tokens, LANES), np.float32)  # a last panel that is not full, with the last thread's
        if steps == 0:
            clear(y, first * LANES, last * LANES)
        for part in range(2 if t == threads - 1 and y.shape[1] > whole * LANES else 1):
            panel, panels, to, y_row = first, last - first, y.ctypes.data + first * ROW_BYTES, 4 * y.shape[1]
            if part == 1:
                panel, panels, to, y_row = whole, 1, tail.ctypes.data, ROW_BYTES
            add(x.ctypes.data, x_bytes * x.shape[1], tokens, w.ctypes.data + panel * w.shape[1], w.shape[1], ROW_BYTES, panels,
                steps, to, y_row, 1, 0)
            if part == 1:
                put_last(tail, y, whole * LANES)
        keep(x)
        keep(w)

    return share


def quantizer(kind: str, x_bytes: int, levels: int):
    """quantize(x, q, scale, total, t, threads): thread t's rows of x as integers; see row_quantize."""
    row_of = row_quantize(kind, x_bytes, levels)

    @helper
    def quantize(x, q, scale, total, t, threads):
        groups = x.shape[1] // GROUP
        for m in range(len(x) * t // threads, len(x) * (t + 1) // threads):
            row, at = m * x.shape[1], 4 * m * groups
            row_of(x.ctypes.data + 4 * row, q.ctypes.data + x_bytes * row, x_bytes * GROUP, scale.ctypes.data + at,
                   total.ctypes.data + at, 4, groups)
        keep(x)
        keep(q)
        keep(scale)
        keep(total)

    return quantize


@helper
def new_integers(x, x_bytes):
    """Room for x [tokens, k] as `quantize` writes it."""
    tokens, groups = len(x), x.shape[1] // GROUP
    return (np.empty((tokens, x_bytes * x.shape[1]), np.uint8), np.empty((tokens, groups), np.float32),
            np.empty((tokens, groups), np.float32))


def integer_product(kind: str, x_bytes: int):
    """share(q, scale, total, w, y, t, threads) for int8 and int4, and x in integers of so many bytes."""
    unrolled = WIDTH == 8 and (kind == 'int8' or x_bytes == 1)  # many rows: a twentieth faster there; few read memory slower

    def tile(rows, panels):
        return integer_tile(kind, rows, panels, x_bytes, 0, unrolled)

    def far_tile(rows, panels):
        return integer_tile(kind, rows, panels, x_bytes, STREAM)

    def asking_tile(rows, panels):
        return integer_tile(kind, rows, panels, x_bytes, LATER, unrolled)

    near, last, wide = strips(tile, NEAR_INTEGERS), strips(tile, dict.fromkeys(NEAR_INTEGERS, 1)), NEAR_INTEGERS[1]
    asking = strips(asking_tile, NEAR_INTEGERS)
    far, together, most = strips(far_tile, FAR_INTEGERS), panels_of_far(FAR_INTEGERS), max(NEAR_INTEGERS)

    @inlined
    def add(x, x_row, scale, total, scale_row, tokens, w, w_panel, groups, panels, y, y_row):
        at_once, first = together(tokens), 0
        if at_once > 0:
            streams = panels // at_once
            for p in range(streams):
                far(tokens, (x, x_row, scale, total, scale_row, w + p * w_panel, streams * w_panel, groups, y + p * ROW_BYTES,
                             y_row, streams * ROW_BYTES, AHEAD))
            first = streams * at_once
        for p0 in range(first, panels, PANELS):
            m, end = 0, min(p0 + PANELS, panels)
            while m < tokens:
                rows = strip_rows(tokens - m, most)
                a, s, t, p = x + m * x_row, scale + m * scale_row, total + m * scale_row, p0
                while p < end:
                    at, to = w + p * w_panel, y + m * y_row + p * ROW_BYTES
                    if end - p >= wide and m + LATE * most >= tokens:
                        asking(rows, (a, x_row, s, t, scale_row, at, w_panel, groups, to, y_row, ROW_BYTES, PANELS * w_panel))
                        p += wide
                    elif wide > 1 and end - p >= wide:
                        near(rows, (a, x_row, s, t, scale_row, at, w_panel, groups, to, y_row, ROW_BYTES, 0))
                        p += wide
                    else:
                        last(rows, (a, x_row, s, t, scale_row, at, w_panel, groups, to, y_row, ROW_BYTES, 0))
                        p += 1
                m += rows

    @helper
    def share(q, scale, total, w, y, t, threads):
        """The outputs of thread t."""
        tokens, groups, whole = q.shape[0], scale.shape[1], y.shape[1] // LANES
        first, last = whole * t // threads, whole * (t + 1) // threads
        tail = np.zeros((tokens, LANES), np.float32)  # a last panel that is not full, with the last thread's
        clear(y, first * LANES, last * LANES)
        for part in range(2 if t == threads - 1 and y.shape[1] > whole * LANES else 1):
            panel, panels, to, y_row = first, last - first, y.ctypes.data + first * ROW_BYTES, 4 * y.shape[1]
            if part == 1:
                panel, panels, to, y_row = whole, 1, tail.ctypes.data, ROW_BYTES
            add(q.ctypes.data, q.shape[1], scale.ctypes.data, total.ctypes.data, 4 * groups, tokens,
                w.ctypes.data + panel * w.shape[1], w.shape[1], groups, panels, to, y_row)
            if part == 1:
                put_last(tail, y, whole * LANES)
        keep(q)
        keep(scale)
        keep(total)
        keep(w)

    return share


# ---- entry points: functions of the module, because Numba cannot cache those that a function makes


_float32, _bfloat16 = float_product('float32'), float_product('bfloat16')
_int8, _int4 = integer_product('int8', 2), integer_product('int4', 2)
share_coarse_int8, share_coarse_int4 = (integer_product(kind, COARSE_BYTES[kind]) for kind in ('int8', 'int4'))
quantize_int8, quantize_int4 = quantizer('int8', 2, 32767), quantizer('int4', 2, 32767)
quantize_coarse_int8, quantize_coarse_int4 = (quantizer(kind, COARSE_BYTES[kind], 127) for kind in ('int8', 'int4'))
BYTES_INT8, BYTES_INT4 = COARSE_BYTES['int8'], COARSE_BYTES['int4']  # kernels look nothing up by its name
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
    """y = x · W, x in 16 bits."""
    q, scale, total = new_integers(x, 2)
    for thread in prange(threads):
        quantize_int8(x, q, scale, total, np.int64(thread), threads)
    for thread in prange(threads):
        _int8(q, scale, total, w, y, np.int64(thread), threads)


@shared_kernel(PRODUCT)
def multiply_int4(x, w, y, threads):
    """y = x · W, x in 16 bits."""
    q, scale, total = new_integers(x, 2)
    for thread in prange(threads):
        quantize_int4(x, q, scale, total, np.int64(thread), threads)
    for thread in prange(threads):
        _int4(q, scale, total, w, y, np.int64(thread), threads)


@shared_kernel(PRODUCT)
def coarse_int8(x, w, y, threads):
    """y = x · W, x in 8 bits."""
    q, scale, total = new_integers(x, BYTES_INT8)
    for thread in prange(threads):
        quantize_coarse_int8(x, q, scale, total, np.int64(thread), threads)
    for thread in prange(threads):
        share_coarse_int8(q, scale, total, w, y, np.int64(thread), threads)


@shared_kernel(PRODUCT)
def coarse_int4(x, w, y, threads):
    """y = x · W, x in 8 bits."""
    q, scale, total = new_integers(x, BYTES_INT4)
    for thread in prange(threads):
        quantize_coarse_int4(x, q, scale, total, np.int64(thread), threads)
    for thread in prange(threads):
        share_coarse_int4(q, scale, total, w, y, np.int64(thread), threads)


MULTIPLY = {'float32': multiply_float32, 'bfloat16': multiply_bfloat16, 'int8': multiply_int8, 'int4': multiply_int4}
COARSE = {'int8': coarse_int8, 'int4': coarse_int4}  # for activations rounded to int8
