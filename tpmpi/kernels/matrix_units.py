"""Products by the matrix units of CPUs, which multiply pairs of bfloat16 and add them in float32.

    amx         tiles of 16 rows by 16 outputs by 32 along k (Intel, since Sapphire Rapids): every kind of weights
    avx512bf16  pairs in vectors (Intel since Cooper Lake, AMD since Zen 4): rounded activations and bfloat16 weights or
                cache, any number of rows; see products.py and attention.py
    emulated    both by ordinary instructions, on any CPU: the tests

A float32 is the sum of three bfloat16, and nearly that of two, which hold 16 bits of its 24.  So numbers are multiplied
in parts, of which products of two low ones are left out:

    weights                  parts of W, of x, products
    float32                  3  3  6   float32's accuracy
    bfloat16                 1  2  2
    int8, int4               2  2  3   scale * q + offset has 19 bits or more
    any but float32, rounded 1  1  1   where activations may be rounded

The layout of bfloat16 panels (tiles.py) is what the tiles want, so one packed copy serves one token and many; other kinds
are widened, two panels at a time, into a buffer that stays in the cache.  x is laid out in tiles before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from tpmpi.kernels import alignment, amx, packing
from tpmpi.kernels.alignment import LINE, aligned
from tpmpi.kernels.amx import ROW, TILE, TILE_K, TILE_ROWS, row_parts, row_silu_parts, rows_in_tiles, tile_blocks
from tpmpi.kernels.elementwise import narrow, share_add_rms_norm
from tpmpi.kernels.jit import HAS_PAIRS, MATRIX_UNITS, helper, inlined, shared_kernel
from tpmpi.kernels.products import PRODUCT, float_product
from tpmpi.kernels.rows import floats
from tpmpi.kernels.tiles import (
    GROUP_BYTES,
    I32,
    I64,
    LANES,
    PARTS,
    VF,
    VI,
    WIDTH,
    Emit,
    injected_scales,
    injected_values,
    keep,
)

X_BYTES = 1 << 19  # of x that meet two panels: a fourth of a second-level cache
WIDENED_X_BYTES = 1 << 21  # where these are widened each time


# ---- weights of other kinds as bfloat16


def widen_panel(kind: str, count: int):
    """widen(w, steps, target, part_bytes): a panel as one of bfloat16 for each part; addresses."""
    def emit(context, builder, signature, args):
        e, b, (w, steps, target, part_bytes) = Emit(builder), builder, args
        size = GROUP_BYTES.get(kind, TILE_K * ROW)
        pairs = {'float32': 1, 'int8': 2, 'int4': 4}[kind]  # along k, in one load of weights

        def near(value):
            """Rounded to the nearest; weights are finite."""
            return b.and_(b.add(b.bitcast(value, VI), e.splat(I32(0x8000))), e.splat(I32(0xFFFF0000)))

        with cgutils.for_range(b, steps) as loop:
            source = e.at(w, (loop.index, size))
            factors = [] if kind == 'float32' else [injected_scales(e, kind, source, lanes) for lanes in range(PARTS)]
            with cgutils.for_range(b, I64(TILE_K // 2 // pairs)) as inner:
                for lanes in range(PARTS):
                    if kind == 'float32':
                        at = e.at(source, (inner.index, 2 * ROW), lanes * WIDTH * 4)
                        values = [e.load(at, VF, 4), e.load(e.at(at, ROW), VF, 4)]
                    else:
                        values = [e.fma(q, *factors[lanes]) for q in injected_values(e, kind, source, inner.index, lanes)]
                    for j in range(pairs):
                        pair = values[2 * j:2 * j + 2]
                        for part in range(count):
                            bits = [near(v) for v in pair]
                            at = e.at(target, (loop.index, TILE), (inner.index, pairs * ROW), (part_bytes, part),
                                      j * ROW + lanes * WIDTH * 4)
                            e.store(b.or_(b.lshr(bits[0], e.splat(I32(16))), bits[1]), at)
                            pair = [b.fsub(v, b.bitcast(h, VF)) for v, h in zip(pair, bits, strict=True)]
        return context.get_dummy_value()

    @intrinsic
    def widen(typing_context, w, steps, target, part_bytes):
        return types.void(*[types.int64] * 4), emit
    return widen


# ---- products in tiles


def tile_product(kind: str, x_parts: int, w_parts: int, gated: bool = False):
    """share(x, w, y, t, threads): the outputs of thread t; x in tiles (amx.py), w panels of `kind`.

    gated: y are tiles, silu(gate) * up, the outputs of the first half of w being gates: what W^D takes, without a detour.
    """
    two, one = tile_blocks(x_parts, w_parts, x_passes=w_parts == 1)
    widened = kind != 'bfloat16'
    x_bytes = WIDENED_X_BYTES if widened else X_BYTES
    widen = widen_panel(kind, w_parts) if widened else None
    gate = row_silu_parts(x_parts)

    @inlined
    def panel_itself(w, steps, target, part_bytes):
        pass

    fill = widen if widened else panel_itself

    @inlined
    def keep_numbers(spare, y, row, rows, row_tiles, column, width):
        numbers = floats(spare, 2 * TILE_ROWS * 2 * LANES)
        for i in range(rows):
            for j in range(width):
                y[row + i, column + j] = numbers[i * 2 * LANES + j]

    @inlined
    def keep_gated(spare, y, row, rows, row_tiles, column, width):
        steps, part = y.shape[2], y.shape[1] * y.shape[2] * TILE
        for i in range(rows):
            m = row + i
            place = y.ctypes.data + (m // TILE_ROWS * steps + column // TILE_K) * TILE + m % TILE_ROWS * ROW
            gate(spare + 2 * ROW * i, place + 2 * (column % TILE_K), part)

    finish = keep_gated if gated else keep_numbers

    @helper
    def share(x, tokens, w, y, t, threads):
        panels, row_tiles, steps = w.shape[0], x.shape[1], x.shape[2]
        outputs, out_row, each = 0, 0, 1  # panels of one turn that lie side by side
        if not gated:
            outputs, out_row, each = y.shape[1], 4 * y.shape[1], 2
        x_row, w_panel = steps * TILE, w.shape[1]
        x_part = row_tiles * x_row
        other = w_panel if each == 2 else panels // 2 * w_panel  # from a panel to the one that is computed with it
        w_part = 2 * steps * TILE  # of the buffer: one part of two panels
        buffer = aligned(w_parts * w_part if widened else 0)
        spare = aligned(2 * TILE_ROWS * 2 * ROW)  # for a block that does not fit y
        registers = amx.registers()
        pairs = (panels + 1) // 2
        block = max(1, x_bytes // (x_parts * 2 * x_row)) * 2  # row tiles that stay in the cache while all panels pass
        for first in range(0, row_tiles, block):
            for pair in range(pairs * t // threads, pairs * (t + 1) // threads):
                column = each * pair * LANES
                width = 2 * LANES if each == 1 else min(2 * LANES, outputs - column)
                at, panel = w.ctypes.data + each * pair * w_panel, other
                if widened:
                    fill(at, steps, buffer.ctypes.data, w_part)
                    if width > LANES:
                        fill(at + other, steps, buffer.ctypes.data + w_part // 2, w_part)
                    at, panel = buffer.ctypes.data, w_part // 2
                if width <= LANES:
                    panel = 0  # the same panel twice
                last = min(first + block, row_tiles)
                lines = -(-w_panel // (LINE * steps * ((last - first + 1) // 2)))  # of the next panels to ask for, in each step
                if last - first <= 2:  # then weights are all that is read, and the CPU foresees that
                    lines = 0
                ahead = w.ctypes.data + each * (pair + 1) * w_panel
                for m in range(first, last, 2):
                    row, rows = m * TILE_ROWS, min(2 * TILE_ROWS, tokens - m * TILE_ROWS)
                    fits = each == 2 and width == 2 * LANES and rows % TILE_ROWS == 0
                    out, stride = spare.ctypes.data, 2 * ROW
                    if fits:
                        out, stride = y.ctypes.data + row * out_row + 4 * column, out_row
                    x_at, soon = x.ctypes.data + m * x_row, lines * steps * LINE * (m - first) // 2
                    if m + 1 < row_tiles:
                        below = out + 2 * TILE_ROWS * stride if fits and m + 3 < last else 0
                        two(registers, x_at, x_part, x_row, at, w_part, panel, TILE, ROW, steps, out, stride, True,
                            ahead + soon, ahead + other + soon, lines, LINE, below)
                    else:
                        one(registers, x_at, x_part, at, w_part, panel, TILE, ROW, steps, out, stride, True,
                            ahead + soon, ahead + other + soon, lines, LINE)
                    if not fits:
                        finish(spare.ctypes.data, y, row, rows, row_tiles, column, width)
        amx.release(registers)
        keep(x)
        keep(w)
        keep(y)
        keep(buffer)
        keep(spare)

    return share


# ---- entry points: functions of the module, because Numba cannot cache those that a function makes


_float32, _bfloat16 = tile_product('float32', 3, 3), tile_product('bfloat16', 2, 1)
_int8, _int4 = tile_product('int8', 2, 2), tile_product('int4', 2, 2)
_rounded_bfloat16, _rounded_int8, _rounded_int4 = (tile_product(kind, 1, 1) for kind in ('bfloat16', 'int8', 'int4'))
_gated_bfloat16, _gated_int8, _gated_int4 = (tile_product(kind, 1, 1, True) for kind in ('bfloat16', 'int8', 'int4'))
split_row = row_parts(1)
_whole, _half, _third = (rows_in_tiles(parts) for parts in (1, 2, 3))
_pairs = float_product('pairs')
IN_TILES = 'void(u1[:, :, :, ::1], i8, u1[:, ::1], f4[:, ::1], i8)'  # x [parts, row tiles, k / 32, 1024], tokens, w, y, threads
GATED = 'void(u1[:, :, :, ::1], i8, u1[:, ::1], u1[:, :, :, ::1], i8)'
FILL = 'void(f4[:, ::1], u1[:, :, :, ::1], i8)'


@shared_kernel(FILL)
def fill_tiles(x, tiles, threads):
    """x [tokens, k] in tiles, rounded."""
    for t in prange(threads):
        _whole(x, tiles, np.int64(t), threads)


@shared_kernel(FILL)
def fill_two_parts(x, tiles, threads):
    """x [tokens, k] in tiles, 16 bits of each number."""
    for t in prange(threads):
        _half(x, tiles, np.int64(t), threads)


@shared_kernel(FILL)
def fill_three_parts(x, tiles, threads):
    """x [tokens, k] in tiles, all of it."""
    for t in prange(threads):
        _third(x, tiles, np.int64(t), threads)


@shared_kernel(IN_TILES)
def tiles_float32(x, tokens, w, y, threads):
    """y = x · W."""
    for t in prange(threads):
        _float32(x, tokens, w, y, np.int64(t), threads)


@shared_kernel(IN_TILES)
def tiles_bfloat16(x, tokens, w, y, threads):
    """y = x · W."""
    for t in prange(threads):
        _bfloat16(x, tokens, w, y, np.int64(t), threads)


@shared_kernel(IN_TILES)
def tiles_int8(x, tokens, w, y, threads):
    """y = x · W."""
    for t in prange(threads):
        _int8(x, tokens, w, y, np.int64(t), threads)


@shared_kernel(IN_TILES)
def tiles_int4(x, tokens, w, y, threads):
    """y = x · W."""
    for t in prange(threads):
        _int4(x, tokens, w, y, np.int64(t), threads)


@shared_kernel(IN_TILES)
def rounded_bfloat16(x, tokens, w, y, threads):
    """y = x · W, x rounded."""
    for t in prange(threads):
        _rounded_bfloat16(x, tokens, w, y, np.int64(t), threads)


@shared_kernel(IN_TILES)
def rounded_int8(x, tokens, w, y, threads):
    """y = x · W, both rounded."""
    for t in prange(threads):
        _rounded_int8(x, tokens, w, y, np.int64(t), threads)


@shared_kernel(IN_TILES)
def rounded_int4(x, tokens, w, y, threads):
    """y = x · W, both rounded."""
    for t in prange(threads):
        _rounded_int4(x, tokens, w, y, np.int64(t), threads)


@shared_kernel(GATED)
def gated_bfloat16(x, tokens, w, y, threads):
    """y = silu(gate) * up in tiles, x rounded."""
    for t in prange(threads):
        _gated_bfloat16(x, tokens, w, y, np.int64(t), threads)


@shared_kernel(GATED)
def gated_int8(x, tokens, w, y, threads):
    """y = silu(gate) * up in tiles, x and W rounded."""
    for t in prange(threads):
        _gated_int8(x, tokens, w, y, np.int64(t), threads)


@shared_kernel(GATED)
def gated_int4(x, tokens, w, y, threads):
    """y = silu(gate) * up in tiles, x and W rounded."""
    for t in prange(threads):
        _gated_int4(x, tokens, w, y, np.int64(t), threads)


@shared_kernel('void(f4[:, ::1], f4[:, ::1], f4[::1], f4, f4[:, ::1], u1[:, :, :, ::1], i8)')
def add_rms_norm_in_tiles(x, part, gain, eps, y, tiles, threads):
    """`elementwise.add_rms_norm`, and what it gives, rounded, in tiles as well: as long as it is in the nearest cache."""
    blocks, steps = tiles.shape[1], tiles.shape[2]
    for t in prange(threads):
        thread = np.int64(t)
        for block in range(blocks * thread // threads, blocks * (thread + 1) // threads):
            first, last = block * TILE_ROWS, min(len(x), (block + 1) * TILE_ROWS)
            share_add_rms_norm(x[first:last], part[first:last], gain, eps, y[first:last], 0, 1)
            for row in range(last - first):
                place = tiles.ctypes.data + block * steps * TILE + row * ROW
                split_row(y.ctypes.data + 4 * (first + row) * y.shape[1], place, 0, steps, np.float32(1))
    keep(y)
    keep(tiles)


@shared_kernel(PRODUCT)
def pairs_bfloat16(x, w, y, threads):
    """y = x · W in pairs; x is rounded to bfloat16."""
    parts = np.empty(x.shape, np.uint16)
    for t in prange(threads):
        narrow(x, parts, np.int64(t), threads)
    for t in prange(threads):
        _pairs(parts, w, y, np.int64(t), threads)


@dataclass(frozen=True)
class Unit:
    """How rows meet weights of one kind in tiles."""

    fewest: int  # rows; of fewer others are as fast (integer_units.py): widening weights takes time, or memory is the limit
    fill: Any  # puts x into tiles
    parts: int  # of x
    multiply: Any
    gated: Any = None  # the same with silu, the result in tiles; or none

    @property
    def kernels(self) -> list:
        """What must be compiled."""
        return [k for k in (self.fill, self.multiply, self.gated) if k is not None]


@dataclass(frozen=True)
class Tiles:
    """Rows [tokens, features] in tiles, as one product leaves them for the next."""

    data: np.ndarray
    tokens: int

    @staticmethod
    def empty(parts: int, tokens: int, features: int) -> Tiles:
        """Room for them."""
        return Tiles(alignment.empty((parts, -(-tokens // TILE_ROWS), features // TILE_K, TILE), np.uint8), tokens)

    def __len__(self) -> int:
        return self.tokens

    @property
    def parts(self) -> int:
        """Of each number."""
        return len(self.data)

    def numbers(self) -> np.ndarray:
        """[tokens, features] float32."""
        parts, row_tiles, steps, _ = self.data.shape
        bits = self.data.view(np.uint16).reshape(parts, row_tiles, steps, TILE_ROWS, TILE_K).swapaxes(2, 3)
        bits = bits.reshape(parts, -1, steps * TILE_K)[:, :self.tokens].astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32).sum(axis=0)

    @property
    def shape(self) -> tuple[int, int]:
        """[tokens, features], without what fills the last tile up."""
        return self.tokens, self.data.shape[2] * TILE_K

    @property
    def nbytes(self) -> int:
        """Of memory."""
        return self.data.nbytes


HAS_TILES = MATRIX_UNITS in ('amx', 'emulated')
TILES = {'float32': Unit(48, fill_three_parts, 3, tiles_float32), 'bfloat16': Unit(8, fill_two_parts, 2, tiles_bfloat16),
         'int8': Unit(96, fill_two_parts, 2, tiles_int8), 'int4': Unit(64, fill_two_parts, 2, tiles_int4)} if HAS_TILES else {}
# for rounded activations: bfloat16 has the 8 bits that activations of int8 have
ROUNDED_TILES = {'bfloat16': Unit(8, fill_tiles, 1, rounded_bfloat16, gated_bfloat16),
                 'int8': Unit(48, fill_tiles, 1, rounded_int8, gated_int8),
                 'int4': Unit(48, fill_tiles, 1, rounded_int4, gated_int4)} if HAS_TILES else {}
PAIRS = {'bfloat16': pairs_bfloat16} if HAS_PAIRS else {}


def self_check() -> bool:
    """Whether products in tiles, of bfloat16 and of bytes, are right on this very CPU; the caller risks its life.

    The other kernels for tiles use the same instructions.
    """
    from tpmpi.kernels.cpu import Kernels
    from tpmpi.weights import decode, encode
    rng, ops, right = np.random.default_rng(0), Kernels(), True
    for kind, rows in (('bfloat16', 37), ('int8', 16)):
        if kind == 'int8' and kind not in ops.bytes:  # a CPU with tiles of bfloat16 alone
            continue
        ops.build([getattr(packing, f'pack_{kind}'), *(ops.units[kind].kernels if kind == 'bfloat16' else [ops.bytes[kind]])])
        stored = encode(rng.standard_normal((70, 96)).astype(np.float32), kind)
        weight = ops.new_weight(70, 96, False, kind, 'W')
        ops.fill(weight, 0, stored)
        x = rng.standard_normal((rows, 96)).astype(np.float32)
        expected = x.astype(np.float64) @ decode(stored).T
        right &= bool(np.abs(ops.linear(x, weight) - expected).max() < 1e-3 * np.abs(expected).max())
    return right
