"""Products by the matrix units of CPUs, which multiply pairs of bfloat16 and add them in float32.

    amx         tiles of 16 rows by 16 outputs by 32 along k (Intel, since Sapphire Rapids): every kind but float32
    avx512bf16  pairs in vectors (Intel since Cooper Lake, AMD since Zen 4): rounded activations and bfloat16 weights or
                cache, any number of rows; see products.py and attention.py
    emulated    both by ordinary instructions, on any CPU: the tests

A float32 is nearly the sum of two bfloat16, a high and a low part: 16 bits of its 24.  So x, unless it was rounded to
bfloat16 before, is multiplied as two parts, and an int8 or int4 weight, scale * q + offset, as two parts as well; the
product of the low parts is left out.  Integer weights are widened panel by panel into a buffer that stays in the cache.

The layout of bfloat16 panels (tiles.py) is what the tiles want, so one packed copy serves one token and many.
Source: Intel, Architecture Instruction Set Extensions Programming Reference, chapter 3.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from tpmpi.kernels import products
from tpmpi.kernels.elementwise import bfloat16, narrow
from tpmpi.kernels.jit import MATRIX_UNITS, helper, inlined, shared_kernel
from tpmpi.kernels.products import PRODUCT, float_product
from tpmpi.kernels.tiles import (
    GROUP,
    GROUP_BYTES,
    I8,
    I32,
    I64,
    LANES,
    PARTS,
    VF,
    VI,
    WIDTH,
    Emit,
    float_of,
    group_scales,
    group_values,
    keep,
)

FEWEST_ROWS = 8  # below, the ordinary kernels read the weights as fast as memory gives them
ROWS, STEP, TILE = 32, 32, 1024  # rows of x in a pass, weights along k in a tile, bytes of a tile
PAIR_BYTES = LANES * 4  # of a panel's step along k: 16 pairs of bfloat16
f32 = np.float32


# ---- the instructions


def _tile_instruction(name: str, *tiles: int, arguments: int = 0):
    """op(tiles, …): LLVM's intrinsic on tile registers; the first argument is for the emulation, the others int64."""
    def emit(context, builder, signature, args):
        values = [I8(t) for t in tiles]
        if arguments:
            values += [builder.inttoptr(args[1], I8.as_pointer()), *args[2:]]
        kind = ir.FunctionType(ir.VoidType(), [v.type for v in values])
        builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), values)
        return context.get_dummy_value()

    if arguments == 0:
        @intrinsic
        def op(typing_context, registers):
            return types.void(registers), emit
    elif arguments == 1:
        @intrinsic
        def op(typing_context, registers, address):
            return types.void(registers, types.int64), emit
    else:
        @intrinsic
        def op(typing_context, registers, address, stride):
            return types.void(registers, types.int64, types.int64), emit
    return op


@intrinsic
def _read(typing_context, address):
    return types.int32(types.int64), lambda c, b, s, args: Emit(b).load(args[0], I32, 1)


@intrinsic
def _write(typing_context, address, value):
    def emit(context, builder, signature, args):
        Emit(builder).store(args[1], args[0])
        return context.get_dummy_value()
    return types.void(types.int64, types.int32), emit


def _emulated(name: str, *t: int):
    """The same instruction on registers in memory, [8 tiles, 16 rows, 16 words] int32."""
    a, b, c = (*t, 0, 0, 0)[:3]

    @helper
    def zero(tiles):
        tiles[a] = 0

    @helper
    def load(tiles, address, stride):
        for row in range(16):
            for i in range(16):
                tiles[a, row, i] = _read(address + row * stride + 4 * i)

    @helper
    def store(tiles, address, stride):
        for row in range(16):
            for i in range(16):
                _write(address + row * stride + 4 * i, tiles[a, row, i])

    @helper
    def dot(tiles):
        values = tiles[a].view(np.float32)
        for k in range(16):
            for row in range(16):
                for i in range(16):
                    u, v = tiles[b, row, k], tiles[c, k, i]
                    values[row, i] += (float_of(u << np.int32(16)) * float_of(v << np.int32(16))
                                       + float_of(u & np.int32(-65536)) * float_of(v & np.int32(-65536)))

    @helper
    def nothing(tiles):
        pass

    @helper
    def nothing_at(tiles, address):
        pass

    return {'tilezero': zero, 'tileloadd64': load, 'tilestored64': store, 'tdpbf16ps': dot, 'ldtilecfg': nothing_at,
            'tilerelease': nothing}[name]


def _instruction(name: str, *tiles: int, arguments: int = 0):
    if MATRIX_UNITS == 'emulated':
        return _emulated(name, *tiles)
    return _tile_instruction('llvm.x86.' + name, *tiles, arguments=arguments)


configure, release = _instruction('ldtilecfg', arguments=1), _instruction('tilerelease')
zero0, zero1, zero2, zero3 = (_instruction('tilezero', t) for t in range(4))
load4, load5, load6, load7 = (_instruction('tileloadd64', t, arguments=2) for t in range(4, 8))
store0, store1, store2, store3 = (_instruction('tilestored64', t, arguments=2) for t in range(4))
dot0, dot1, dot2, dot3 = (_instruction('tdpbf16ps', *t) for t in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)))


# ---- numbers as high and low parts


@helper
def split(x):
    """x [tokens, k] as bfloat16 in two parts, [2, tokens filled up to 32, k]; and how many of the two are not all zero."""
    tokens, k = x.shape
    parts, low = np.zeros((2, -(-tokens // ROWS) * ROWS, k), np.uint16), False
    for m in range(tokens):
        for i in range(k):
            high = bfloat16(x[m, i])
            rest = x[m, i] - float_of(np.int32(np.uint32(high) << np.uint32(16)))
            parts[0, m, i] = high
            parts[1, m, i] = bfloat16(rest)
            low |= rest != 0
    return parts, 2 if low else 1


def widen_to_bfloat16(kind: str):
    """widen(w, groups, high, low): a panel of int8 or int4 as two panels of bfloat16; addresses."""
    def emit(context, builder, signature, args):
        e, b, (w, groups, high, low) = Emit(builder), builder, args
        steps = 4 if kind == 'int4' else 2  # pairs along k in one load of weights

        def rounded(value):
            """The bits of a float32, rounded to bfloat16 in their upper half; scales are finite, so there is no NaN."""
            bits = b.bitcast(value, VI)
            odd = b.and_(b.lshr(bits, e.splat(I32(16))), e.splat(I32(1)))
            return b.and_(b.add(bits, b.add(odd, e.splat(I32(0x7FFF)))), e.splat(I32(0xFFFF0000)))

        def pair(even, odd):
            return b.or_(b.lshr(even, e.splat(I32(16))), odd)

        with cgutils.for_range(b, groups) as loop:
            source = e.at(w, (loop.index, GROUP_BYTES[kind]))
            with cgutils.for_range(b, I64(GROUP // 2 // steps)) as inner:
                for part in range(PARTS):
                    scale, offset = group_scales(e, kind, source, part)
                    values = group_values(e, kind, source, inner.index, part)
                    for j in range(steps):
                        highs, lows = [], []
                        for q in values[2 * j:2 * j + 2]:
                            q = b.sitofp(q, VF)
                            value = b.fmul(q, scale) if offset is None else e.fma(q, scale, offset)
                            highs.append(rounded(value))
                            lows.append(rounded(b.fsub(value, b.bitcast(highs[-1], VF))))
                        for target, halves in ((high, highs), (low, lows)):
                            at = e.at(target, (loop.index, TILE), (inner.index, steps * PAIR_BYTES), j * PAIR_BYTES)
                            e.store(pair(*halves), e.at(at, part * WIDTH * 4))
        return context.get_dummy_value()

    @intrinsic
    def widen(typing_context, w, groups, high, low):
        return types.void(*[types.int64] * 4), emit
    return widen


# ---- products in tiles


@inlined
def tile_block(tiles, x, x_part, x_row, x_parts, w, w_part, w_panel, w_parts, steps, out):
    """out [32, 32] = 32 rows of x times two panels.  Addresses, strides in bytes; parts: 1 or 2, steps of 32 along k."""
    zero0(tiles)
    zero1(tiles)
    zero2(tiles)
    zero3(tiles)
    for step in range(steps):
        for p in range(w_parts):
            load6(tiles, w + p * w_part + step * TILE, PAIR_BYTES)
            load7(tiles, w + p * w_part + w_panel + step * TILE, PAIR_BYTES)
            for q in range(max(1, x_parts - p)):  # low times low is left out
                at = x + q * x_part + step * 2 * STEP
                load4(tiles, at, x_row)
                load5(tiles, at + ROWS // 2 * x_row, x_row)
                dot0(tiles)
                dot1(tiles)
                dot2(tiles)
                dot3(tiles)
    row = 2 * LANES * 4
    store0(tiles, out, row)
    store1(tiles, out + LANES * 4, row)
    store2(tiles, out + ROWS // 2 * row, row)
    store3(tiles, out + ROWS // 2 * row + LANES * 4, row)


def tile_product(kind: str):
    """share(parts, x_parts, w, y, t, threads): the outputs of thread t."""
    widen = None if kind == 'bfloat16' else widen_to_bfloat16(kind)
    w_parts = 1 if kind == 'bfloat16' else 2

    @inlined
    def bfloat16_panel(w, groups, buffer, half):
        return w

    @inlined
    def widened_panel(w, groups, buffer, half):
        widen(w, groups, buffer, buffer + half)
        return buffer

    panel_of = bfloat16_panel if widen is None else widened_panel

    @helper
    def share(parts, x_parts, w, y, t, threads):
        tokens, outputs, k = y.shape[0], y.shape[1], parts.shape[2]
        panels, steps = len(w), k // STEP
        half = 2 * steps * TILE  # of the buffer: the high parts of two panels
        buffer = np.empty(2 * half if w_parts == 2 else 0, np.uint8)
        out, tiles = np.empty((ROWS, 2 * LANES), np.float32), np.zeros((8, 16, 16), np.int32)
        config = np.zeros(64, np.uint8)  # palette 1: eight tiles of 16 rows of 64 bytes
        config[0] = 1
        config[16:32:2] = 64
        config[48:56] = 16
        configure(tiles, config.ctypes.data)
        pairs = (panels + 1) // 2
        for pair in range(pairs * t // threads, pairs * (t + 1) // threads):
            count = min(2, panels - 2 * pair)
            first = panel_of(w.ctypes.data + 2 * pair * w.shape[1], steps, buffer.ctypes.data, half)
            w_panel = w.shape[1]
            if w_parts == 2:
                w_panel = steps * TILE
                if count == 2:
                    panel_of(w.ctypes.data + (2 * pair + 1) * w.shape[1], steps, buffer.ctypes.data + w_panel, half)
            for m in range(0, tokens, ROWS):
                tile_block(tiles, parts.ctypes.data + 2 * m * k, 2 * parts.shape[1] * k, 2 * k, x_parts,
                           first, half, w_panel if count == 2 else 0, w_parts, steps, out.ctypes.data)
                width = min(count * LANES, outputs - 2 * pair * LANES)
                for row in range(min(ROWS, tokens - m)):
                    for i in range(width):
                        y[m + row, 2 * pair * LANES + i] = out[row, i]
        release(tiles)
        keep(parts)
        keep(w)
        keep(buffer)
        keep(out)
        keep(config)

    return share


# ---- entry points; x [tokens, k], k a multiple of 32


_bfloat16, _int8, _int4 = map(tile_product, ('bfloat16', 'int8', 'int4'))
_pairs = float_product('pairs')


@shared_kernel(PRODUCT)
def tiles_bfloat16(x, w, y, threads):
    """y = x · W in tiles."""
    parts, used = split(x)
    for t in prange(threads):
        _bfloat16(parts, used, w, y, np.int64(t), threads)


@shared_kernel(PRODUCT)
def tiles_int8(x, w, y, threads):
    """y = x · W in tiles."""
    parts, used = split(x)
    for t in prange(threads):
        _int8(parts, used, w, y, np.int64(t), threads)


@shared_kernel(PRODUCT)
def tiles_int4(x, w, y, threads):
    """y = x · W in tiles."""
    parts, used = split(x)
    for t in prange(threads):
        _int4(parts, used, w, y, np.int64(t), threads)


@shared_kernel(PRODUCT)
def pairs_bfloat16(x, w, y, threads):
    """y = x · W in pairs; x is rounded to bfloat16."""
    parts = np.empty(x.shape, np.uint16)
    for t in prange(threads):
        narrow(x, parts, np.int64(t), threads)
    for t in prange(threads):
        _pairs(parts, w, y, np.int64(t), threads)


TILES = {'bfloat16': tiles_bfloat16, 'int8': tiles_int8, 'int4': tiles_int4} if MATRIX_UNITS in ('amx', 'emulated') else {}
PAIRS = {'bfloat16': pairs_bfloat16} if MATRIX_UNITS == 'avx512bf16' else {}  # for rounded activations


def self_check() -> bool:
    """Whether the unit gives what the ordinary kernels give, on this very CPU; the caller risks its life."""
    from tpmpi.kernels.cpu import Kernels
    from tpmpi.weights import decode, encode
    rng, right = np.random.default_rng(0), True
    for kind in {**TILES, **PAIRS}:
        ops, plain = Kernels(activations='bfloat16' if PAIRS else 'float32'), products.MULTIPLY[kind]
        ops.build([*ops.needed_for([kind]), plain])
        stored = encode(rng.standard_normal((70, 96)).astype(np.float32), kind)
        weight = ops.new_weight(70, 96, False, kind, 'W')
        ops.fill(weight, 0, stored)
        x = rng.standard_normal((37, 96)).astype(np.float32)
        if PAIRS:
            x = decode(encode(x, 'bfloat16'))
        found, expected = ops.linear(x, weight), np.empty((37, 70), np.float32)
        plain(x, weight.data, expected, 1)
        right &= bool(np.abs(found - expected).max() < 1e-3 * np.abs(expected).max())
    return right
