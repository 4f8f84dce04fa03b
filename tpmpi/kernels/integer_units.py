"""Products of bytes in tiles: a dozen rows, or some dozens, beside int8 and int4 weights, with the bits of the ordinary kernels.

A group of 32 along k is one product of tiles: rows of x as signed bytes, [16, 32], and a panel's group as it lies in memory,
unsigned, [8, 16, 4].  Its sums, exact in 32 bits, are scaled in vector registers as tiles.integer_tile does it.  x in 16 bits
is two planes of bytes, the upper ones signed and the lower ones not.  Weights of int4 are spread to bytes, a panel at a
time, in a buffer that stays in the cache.

16 sequences of a model of 0.69 billion weights in int8, x in 8 bits, on two cores with AMX: 363 tokens/s, in vectors of bytes
273 (`tpmpi.bench --weights int8 --activations int8 --batch 16 --new-tokens 32`, medians of 3 pairs).
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from tpmpi.kernels import amx
from tpmpi.kernels.alignment import LINE, aligned
from tpmpi.kernels.jit import FEATURES, MATRIX_UNITS, helper, shared_kernel
from tpmpi.kernels.products import PRODUCT
from tpmpi.kernels.rows import row_quantize
from tpmpi.kernels.tiles import (
    F32,
    GROUP,
    GROUP_BYTES,
    I32,
    I64,
    LANES,
    PARTS,
    VF,
    VI,
    WIDTH,
    Emit,
    group_scales,
    keep,
)

ROWS, FEW = 16, 8  # of x in a product of tiles
PLANE = ROWS * GROUP  # bytes of a tile of x
SUMS = ROWS * LANES * 4  # bytes of a tile of sums
FURTHER = 16384  # as tiles.AHEAD, of the one stream that a panel is, into the second-level cache
SPREAD = GROUP * LANES  # bytes of a panel's group, a byte for each weight


def integer_block(kind: str, rows: int, planes: int):
    """block(x, factors, w, values, step, groups, y, y_row, room, ahead): rows of y of a panel.

    All are addresses, and strides in bytes.  x, factors: one tile of rows, as `quantize` leaves them.  values: where the
    panel's bytes lie, `step` from group to group; w: the panel, of which scales are read.  room: tiles of sums, 2 * planes,
    of two groups: while one's are scaled, the other's arrive.  ahead: how many bytes before they are wanted w is asked for.
    """
    def emit(context, builder, signature, args):
        e, b = Emit(builder), builder
        x, factors, w, values, step, groups, y, y_row, room, ahead = args
        floats = e.variables(VF, rows, PARTS)
        for row in floats:
            for value in row:
                b.store(ir.Constant(VF, [0.0] * WIDTH), value)

        def sums_of(group):
            return e.at(room, (b.and_(group, I64(1)), planes * SUMS))

        def multiply(group):
            amx.multiply_bytes(e, rows, e.at(x, (group, planes * PLANE)), e.at(values, (group, step)), sums_of(group), planes)

        def scale(group):
            at = e.at(w, (group, GROUP_BYTES[kind]))
            scales = [group_scales(e, kind, at, v) for v in range(PARTS)]
            for i in range(0, GROUP_BYTES[kind], LINE):
                e.prefetch(e.at(at, ahead, i), near=2)
            for r in range(rows):
                def of_row(place, scalar, r=r):
                    return e.splat(e.load(e.at(factors, (group, 2 * ROWS * 4), place * ROWS * 4 + 4 * r), scalar, 4))

                for v, (w_scale, w_offset) in enumerate(scales):
                    place = e.at(sums_of(group), r * LANES * 4 + v * WIDTH * 4)
                    whole = e.load(place, VI, 64)
                    if planes == 2:
                        whole = b.add(b.shl(whole, e.splat(I32(8))), e.load(e.at(place, SUMS), VI, 64))
                    value = b.load(floats[r][v])
                    if kind == 'int8':
                        whole = b.add(whole, of_row(1, I32))
                    else:
                        value = e.fma(w_offset, of_row(1, F32), value)
                    value = e.fma(b.sitofp(whole, VF), b.fmul(w_scale, of_row(0, F32)), value)
                    b.store(value, floats[r][v])

        multiply(I64(0))
        last = b.sub(groups, I64(1))
        with cgutils.for_range(b, last) as loop:
            multiply(b.add(loop.index, I64(1)))
            scale(loop.index)
        scale(last)
        for r in range(rows):
            for v in range(PARTS):
                e.store(b.load(floats[r][v]), e.at(y, (y_row, r), v * WIDTH * 4))
        return context.get_dummy_value()

    @intrinsic
    def block(typing_context, x, factors, w, values, step, groups, y, y_row, room, ahead):
        return types.void(*[types.int64] * 10), emit
    return block


@intrinsic
def spread(typing_context, w, groups, target):
    """A panel of int4 as bytes, 512 for each group."""
    def emit(context, builder, signature, args):
        e, b, (w, groups, target) = Emit(builder), builder, args
        low = e.splat(I32(0x0F0F0F0F))
        with cgutils.for_range(b, groups) as loop:
            for i in range(GROUP // 8):
                for v in range(PARTS):
                    words = e.load(e.at(w, (loop.index, GROUP_BYTES['int4']), i * LANES * 4 + v * WIDTH * 4), VI, 4)
                    to = e.at(target, (loop.index, SPREAD), 2 * i * LANES * 4 + v * WIDTH * 4)
                    e.store(b.and_(words, low), to, 4)
                    e.store(b.and_(b.lshr(words, e.splat(I32(4))), low), e.at(to, LANES * 4), 4)
        return context.get_dummy_value()
    return types.void(types.int64, types.int64, types.int64), emit


def byte_product(kind: str, planes: int):
    """(quantize, share): rows of x as planes of bytes, and their products with weights of a kind."""
    row_of = row_quantize(kind, planes, 127 if planes == 1 else 32767, PLANE)
    many, few = (integer_block(kind, rows, planes) for rows in (ROWS, FEW))
    step = GROUP_BYTES[kind] if kind == 'int8' else SPREAD

    @helper
    def quantize(x, q, factors, t, threads):
        """Thread t's rows.  q [row tiles, groups, planes * 512], factors [row tiles, groups, 2, 16]"""
        groups = x.shape[1] // GROUP
        for m in range(len(x) * t // threads, len(x) * (t + 1) // threads):
            first, row = m // ROWS * groups, m % ROWS
            place = q.ctypes.data + first * planes * PLANE + row * GROUP
            scale = factors.ctypes.data + (first * 2 * ROWS + row) * 4
            row_of(x.ctypes.data + 4 * m * x.shape[1], place, planes * PLANE, scale, scale + 4 * ROWS, 8 * ROWS, groups)
        keep(x)
        keep(q)
        keep(factors)

    @helper
    def share(q, factors, tokens, w, y, t, threads):
        """The outputs of thread t."""
        panels, groups, outputs = len(w), q.shape[1], y.shape[1]
        y_row, q_tile, factors_tile = 4 * outputs, q.shape[1] * q.shape[2], 4 * factors.shape[1] * factors.shape[2]
        room, spare = aligned(2 * planes * SUMS), np.empty((ROWS, LANES), np.float32)
        wide = aligned(groups * SPREAD if kind == 'int4' else 0)
        registers = amx.byte_registers()
        for panel in range(panels * t // threads, panels * (t + 1) // threads):
            at = w.ctypes.data + panel * w.shape[1]
            values, column, width, ahead = at, panel * LANES, min(LANES, outputs - panel * LANES), FURTHER
            if kind == 'int4':
                spread(at, groups, wide.ctypes.data)
                values = wide.ctypes.data
            m = 0
            while m < tokens:
                rows = ROWS if tokens - m > FEW else FEW
                whole = width == LANES and m + rows <= tokens
                a, f = q.ctypes.data + m // ROWS * q_tile, factors.ctypes.data + m // ROWS * factors_tile
                to, to_row = spare.ctypes.data, 4 * LANES
                if whole:
                    to, to_row = y.ctypes.data + m * y_row + 4 * column, y_row
                if rows == ROWS:
                    many(a, f, at, values, step, groups, to, to_row, room.ctypes.data, ahead)
                else:
                    few(a, f, at, values, step, groups, to, to_row, room.ctypes.data, ahead)
                if not whole:
                    for i in range(min(rows, tokens - m)):
                        for j in range(width):
                            y[m + i, column + j] = spare[i, j]
                m += rows
                ahead = 0
        amx.release(registers)
        keep(q)
        keep(factors)
        keep(w)
        keep(y)
        keep(room)
        keep(spare)
        keep(wide)

    return quantize, share


@helper
def new_planes(x, planes):
    """Room for x [tokens, k] as `quantize` writes it."""
    tiles, groups = -(-len(x) // ROWS), x.shape[1] // GROUP
    return (aligned(tiles * groups * planes * PLANE).reshape(tiles, groups, planes * PLANE),
            aligned(tiles * groups * 2 * ROWS * 4).view(np.float32).reshape(tiles, groups, 2 * ROWS))


_quantize_int8, _int8 = byte_product('int8', 2)
_quantize_int4, _int4 = byte_product('int4', 2)
_quantize_coarse_int8, _coarse_int8 = byte_product('int8', 1)
_quantize_coarse_int4, _coarse_int4 = byte_product('int4', 1)


@shared_kernel(PRODUCT)
def bytes_int8(x, w, y, threads):
    """y = x · W, x in 16 bits."""
    q, factors = new_planes(x, 2)
    for thread in prange(threads):
        _quantize_int8(x, q, factors, np.int64(thread), threads)
    for thread in prange(threads):
        _int8(q, factors, len(x), w, y, np.int64(thread), threads)


@shared_kernel(PRODUCT)
def bytes_int4(x, w, y, threads):
    """y = x · W, x in 16 bits."""
    q, factors = new_planes(x, 2)
    for thread in prange(threads):
        _quantize_int4(x, q, factors, np.int64(thread), threads)
    for thread in prange(threads):
        _int4(q, factors, len(x), w, y, np.int64(thread), threads)


@shared_kernel(PRODUCT)
def coarse_bytes_int8(x, w, y, threads):
    """y = x · W, x in 8 bits."""
    q, factors = new_planes(x, 1)
    for thread in prange(threads):
        _quantize_coarse_int8(x, q, factors, np.int64(thread), threads)
    for thread in prange(threads):
        _coarse_int8(q, factors, len(x), w, y, np.int64(thread), threads)


@shared_kernel(PRODUCT)
def coarse_bytes_int4(x, w, y, threads):
    """y = x · W, x in 8 bits."""
    q, factors = new_planes(x, 1)
    for thread in prange(threads):
        _quantize_coarse_int4(x, q, factors, np.int64(thread), threads)
    for thread in prange(threads):
        _coarse_int4(q, factors, len(x), w, y, np.int64(thread), threads)


HAS_BYTES = MATRIX_UNITS == 'emulated' or MATRIX_UNITS == 'amx' and 'amx-int8' in FEATURES
BYTES = {'int8': bytes_int8, 'int4': bytes_int4} if HAS_BYTES else {}
COARSE = {'int8': coarse_bytes_int8, 'int4': coarse_bytes_int4} if HAS_BYTES else {}
