"""The tile registers of Intel's CPUs since Sapphire Rapids, or the same in ordinary instructions, for tests on any CPU.

Eight registers of 16 rows of 64 bytes.  A product adds to a tile of float32, [16, 16], that of one of bfloat16, [16, 32],
and one of pairs along k, [16, 16, 2]: the work of 256 vector instructions of pairs.  A load that crosses cache
lines takes several times as long: all that is loaded here lies on whole lines (`aligned`, alignment.py).

Registers: 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 weights.  Every function takes the emulation's registers first.
Source: Intel, Architecture Instruction Set Extensions Programming Reference, chapter 3.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tpmpi.kernels.alignment import LINE
from tpmpi.kernels.jit import MATRIX_UNITS, helper, inlined
from tpmpi.kernels.rows import LOG2_E, NARROW, exponential, fold, power_of_two, rounded
from tpmpi.kernels.tiles import (
    F32,
    GROUP,
    I8,
    I32,
    I64,
    PARTS,
    VF,
    VI,
    WIDTH,
    Emit,
    float_of,
    keep,
    prefetch,
    prefetch_to_write,
)

TILE_ROWS, TILE_K, TILE, ROW = 16, 32, 1024, 64  # rows of a tile, bfloat16 in one of them, bytes of a tile and of its rows


def emit_tile(e: Emit, name: str, *tiles: int, address=()) -> None:
    """An instruction on tile registers; address: none, or one, and a stride where it takes that."""
    address = [e.b.inttoptr(a, I8.as_pointer()) for a in address[:1]] + [*address[1:]]
    e.call(name, *(I8(t) for t in tiles), *address, result=ir.VoidType())


def _tile_instruction(name: str, *tiles: int, arguments: int = 0):
    """op(registers, …): LLVM's intrinsic on tile registers; the other arguments are int64, the first of them an address."""
    def emit(context, builder, signature, args):
        emit_tile(Emit(builder), name, *tiles, address=args[1:])
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
    def zero(registers):
        registers[a] = 0

    @helper
    def load(registers, address, stride):
        for row in range(16):
            for i in range(16):
                registers[a, row, i] = _read(address + row * stride + 4 * i)

    @helper
    def store(registers, address, stride):
        for row in range(16):
            for i in range(16):
                _write(address + row * stride + 4 * i, registers[a, row, i])

    @helper
    def dot(registers):
        values = registers[a].view(np.float32)
        for k in range(16):
            for row in range(16):
                for i in range(16):
                    u, v = registers[b, row, k], registers[c, k, i]
                    values[row, i] += (float_of(u << np.int32(16)) * float_of(v << np.int32(16))
                                       + float_of(u & np.int32(-65536)) * float_of(v & np.int32(-65536)))

    @helper
    def nothing(registers):
        pass

    @helper
    def nothing_at(registers, address):
        pass

    return {'tilezero': zero, 'tileloadd64': load, 'tileloaddt164': load, 'tilestored64': store,
            'tdpbf16ps': dot, 'ldtilecfg': nothing_at, 'tilerelease': nothing}[name]


def _instruction(name: str, *tiles: int, arguments: int = 0):
    if MATRIX_UNITS == 'emulated':
        return _emulated(name, *tiles)
    return _tile_instruction('llvm.x86.' + name, *tiles, arguments=arguments)


_configure, release = _instruction('ldtilecfg', arguments=1), _instruction('tilerelease')
zero0, zero1, zero2, zero3 = (_instruction('tilezero', t) for t in range(4))
load0, load1, load2, load3, load4, load5, load6, load7 = (_instruction('tileloadd64', t, arguments=2) for t in range(8))
pass4, pass5 = (_instruction('tileloaddt164', t, arguments=2) for t in (4, 5))  # which leave the nearest cache as it is
store0, store1, store2, store3 = (_instruction('tilestored64', t, arguments=2) for t in range(4))
dot0, dot1, dot2, dot3 = (_instruction('tdpbf16ps', *t) for t in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)))


@helper
def registers():
    """What every instruction takes first; the CPU's own registers, too, are ready then, until `release`."""
    found = np.zeros((8, 16, 16) if MATRIX_UNITS == 'emulated' else (1, 1, 1), np.int32)
    config = np.zeros(64, np.uint8)  # palette 1: eight tiles of 16 rows of 64 bytes
    config[0] = 1
    config[16:32:2] = 64
    config[48:56] = 16
    _configure(found, config.ctypes.data)
    keep(config)
    return found


# ---- products of bytes


@helper
def byte_registers():
    """The CPU's registers as `multiply_bytes` needs them, until `release`: 0, 1 sums, 2 x, 6 weights; of 8 rows 3, 4, 5."""
    config = np.zeros(64, np.uint8)
    config[0] = 1
    for tile, row_bytes, rows in ((0, 64, 16), (1, 64, 16), (2, 32, 16), (3, 64, 8), (4, 64, 8), (5, 32, 8), (6, 64, 8)):
        config[16 + 2 * tile] = row_bytes
        config[48 + tile] = rows
    found = np.zeros((1, 1, 1), np.int32)
    _configure(found, config.ctypes.data)
    keep(config)
    return found


def multiply_bytes(e: Emit, rows: int, x, w, sums, planes: int) -> None:
    """sums [planes, rows, 16] int32 = x [planes, 16, 32] · w [8, 16, 4], 16 or 8 rows of bytes; addresses.

    w is unsigned; so are the planes of x but the first, which is signed.
    """
    if MATRIX_UNITS == 'emulated':
        for plane in range(planes):
            _emulated_bytes(e, rows, e.at(x, plane * TILE_ROWS * GROUP), w, e.at(sums, plane * TILE), plane == 0)
        return
    first = 0 if rows == TILE_ROWS else 3
    emit_tile(e, 'llvm.x86.tileloadd64', 6, address=(w, I64(ROW)))
    for plane in range(planes):
        emit_tile(e, 'llvm.x86.tilezero', first + plane)
        emit_tile(e, 'llvm.x86.tileloadd64', first + 2, address=(e.at(x, plane * TILE_ROWS * GROUP), I64(GROUP)))
        emit_tile(e, 'llvm.x86.tdpbuud' if plane else 'llvm.x86.tdpbsud', first + plane, first + 2, 6)
        emit_tile(e, 'llvm.x86.tilestored64', first + plane, address=(e.at(sums, plane * TILE), I64(ROW)))


def _emulated_bytes(e: Emit, rows: int, x, w, sums, signed: bool) -> None:
    b = e.b
    with cgutils.for_range(b, I64(rows)) as row:
        for part in range(PARTS):
            to = e.at(sums, (row.index, ROW), part * WIDTH * 4)
            e.store(ir.Constant(VI, [0] * WIDTH), to)
            with cgutils.for_range(b, I64(GROUP // 4)) as quad:
                words, total = e.load(e.at(w, (quad.index, ROW), part * WIDTH * 4), VI, 4), e.load(to, VI, 4)
                for i in range(4):
                    value = e.load(e.at(x, (row.index, GROUP), (quad.index, 4), i), I8, 1)
                    value = e.splat(b.sext(value, I32) if signed else b.zext(value, I32))
                    byte = b.and_(b.lshr(words, e.splat(I32(8 * i))), e.splat(I32(255)))
                    total = b.add(total, b.mul(byte, value))
                e.store(total, to)


# ---- numbers as sums of bfloat16


def store_parts(e: Emit, value, count: int, place, part_bytes) -> None:
    """A vector of float32 as `count` bfloat16 each, the parts so far apart in memory."""
    b = e.b
    for part in range(count):
        bits = rounded(e, value)
        e.store(b.trunc(b.lshr(bits, e.splat(I32(16))), NARROW), e.at(place, (part_bytes, part)), 2)
        value = b.fsub(value, b.bitcast(bits, VF))


def row_parts(count: int):
    """split(x, target, part_bytes, steps, factor): factor times 32 * steps float32, as so many bfloat16 each, in tiles."""
    def emit(context, builder, signature, args):
        e, (x, target, part_bytes, steps, factor) = Emit(builder), args
        factor = e.splat(factor)
        with cgutils.for_range(builder, steps) as loop:
            for i in range(0, TILE_K, WIDTH):
                value = builder.fmul(e.load(e.at(x, (loop.index, 4 * TILE_K), 4 * i), VF, 4), factor)
                store_parts(e, value, count, e.at(target, (loop.index, TILE), 2 * i), part_bytes)
        return context.get_dummy_value()

    @intrinsic
    def split(typing_context, x, target, part_bytes, steps, factor):
        return types.void(*[types.int64] * 4, types.float32), emit
    return split


def row_exp_parts(count: int):
    """exponentials(scores, steps, top, target, part_bytes): e^(s - top) of 32 * steps float32, likewise; returns their sum.

    What is below 2^-126 is zero.  The sum, that of the exponentials before they are rounded, has sixteen lanes as in rows.py.
    """
    def emit(context, builder, signature, args):
        e, b, (scores, steps, top, target, part_bytes) = Emit(builder), builder, args
        lanes, zero = e.variables(VF, 1, PARTS)[0], ir.Constant(VF, [0.0] * WIDTH)
        scale, most = ir.Constant(VF, [LOG2_E] * WIDTH), e.splat(b.fmul(top, F32(-LOG2_E)))
        for lane in lanes:
            b.store(zero, lane)
        with cgutils.for_range(b, steps) as loop:
            for i in range(0, TILE_K, WIDTH):
                x = e.fma(e.load(e.at(scores, (loop.index, 4 * TILE_K), 4 * i), VF, 4), scale, most)
                p = b.select(b.fcmp_ordered('<', x, ir.Constant(VF, [-126.0] * WIDTH)), zero, power_of_two(e, x))
                lane = lanes[i // WIDTH % PARTS]
                b.store(b.fadd(b.load(lane), p), lane)
                store_parts(e, p, count, e.at(target, (loop.index, TILE), 2 * i), part_bytes)
        return fold(b, [b.load(lane) for lane in lanes], b.fadd)

    @intrinsic
    def exponentials(typing_context, scores, steps, top, target, part_bytes):
        return types.float32(types.int64, types.int64, types.float32, types.int64, types.int64), emit
    return exponentials


def row_silu_parts(count: int):
    """gate(x, target, part_bytes): silu of 16 float32 times the 16 behind them, as so many bfloat16 each."""
    def emit(context, builder, signature, args):
        e, b, (x, target, part_bytes) = Emit(builder), builder, args
        for i in range(0, ROW // 4, WIDTH):
            gate, up = e.load(e.at(x, 4 * i), VF, 4), e.load(e.at(x, ROW + 4 * i), VF, 4)
            one = ir.Constant(VF, [1.0] * WIDTH)
            value = b.fmul(b.fdiv(gate, b.fadd(one, exponential(b, b.fneg(gate)))), up)
            store_parts(e, value, count, e.at(target, 2 * i), part_bytes)
        return context.get_dummy_value()

    @intrinsic
    def gate(typing_context, x, target, part_bytes):
        return types.void(*[types.int64] * 3), emit
    return gate


def rows_in_tiles(count: int):
    """fill(x, tiles, t, threads): thread t's rows of x [tokens, k] as [parts, row tiles, steps, 1024 bytes]."""
    split = row_parts(count)

    @helper
    def fill(x, tiles, t, threads):
        steps, part = tiles.shape[2], tiles.shape[1] * tiles.shape[2] * TILE
        for m in range(len(x) * t // threads, len(x) * (t + 1) // threads):
            place = tiles.ctypes.data + m // TILE_ROWS * steps * TILE + m % TILE_ROWS * ROW
            split(x.ctypes.data + 4 * m * x.shape[1], place, part, steps, np.float32(1))
        keep(x)
        keep(tiles)

    return fill


# ---- products


def tile_blocks(x_parts: int, w_parts: int, x_passes: bool = False):
    """(two, one): out = two tiles' rows, or one's, of x times two panels; added to out where not `first`.

    All are addresses, and strides in bytes: of x between parts and between rows of tiles; of w between parts, panels, steps
    of 32 along k, and the tile's own rows; of out between rows.  Meanwhile they ask for what comes next: for so many
    lines of weights in each step, so many bytes apart, from two places, and for the rows of `next_out`, if that is not 0.
    x_passes: the nearest cache is left to two panels of one part, and x comes from the second each time.
    """
    most = max(x_parts, w_parts)
    load_x, load_below = (pass4, pass5) if x_passes else (load4, load5)

    @inlined
    def two(registers, x, x_part, x_row, w, w_part, w_panel, w_step, w_row, steps, out, out_row, first, next_w, other_w, lines,
            line, next_out):
        if first:
            zero0(registers)
            zero1(registers)
            zero2(registers)
            zero3(registers)
        else:
            load0(registers, out, out_row)
            load1(registers, out + ROW, out_row)
            load2(registers, out + TILE_ROWS * out_row, out_row)
            load3(registers, out + TILE_ROWS * out_row + ROW, out_row)
        rows = -(-2 * TILE_ROWS // max(1, steps)) if next_out else 0  # of out to be asked for in a step
        for step in range(steps):
            for i in range(step * lines, (step + 1) * lines):
                prefetch(next_w + i * line)
                prefetch(other_w + i * line)
            for i in range(step * rows, (step + 1) * rows):
                prefetch_to_write(next_out + i * out_row)
                prefetch_to_write(next_out + i * out_row + LINE)
            for p in range(w_parts):
                at = x + step * TILE
                load_x(registers, at, ROW)
                load_below(registers, at + x_row, ROW)
                at = w + p * w_part + step * w_step
                load6(registers, at, w_row)
                load7(registers, at + w_panel, w_row)
                for q in range(min(x_parts, most - p)):  # products of two low parts are left out
                    if q > 0:
                        at = x + q * x_part + step * TILE
                        load_x(registers, at, ROW)
                        load_below(registers, at + x_row, ROW)
                    dot0(registers)
                    dot1(registers)
                    dot2(registers)
                    dot3(registers)
        store0(registers, out, out_row)
        store1(registers, out + ROW, out_row)
        store2(registers, out + TILE_ROWS * out_row, out_row)
        store3(registers, out + TILE_ROWS * out_row + ROW, out_row)

    @inlined
    def one(registers, x, x_part, w, w_part, w_panel, w_step, w_row, steps, out, out_row, first, next_w, other_w, lines,
            line):
        if first:
            zero0(registers)
            zero1(registers)
        else:
            load0(registers, out, out_row)
            load1(registers, out + ROW, out_row)
        for step in range(steps):
            for i in range(step * lines, (step + 1) * lines):
                prefetch(next_w + i * line)
                prefetch(other_w + i * line)
            for p in range(w_parts):
                at = w + p * w_part + step * w_step
                load6(registers, at, w_row)
                load7(registers, at + w_panel, w_row)
                for q in range(min(x_parts, most - p)):
                    load4(registers, x + q * x_part + step * TILE, ROW)
                    dot0(registers)
                    dot1(registers)
        store0(registers, out, out_row)
        store1(registers, out + ROW, out_row)

    return two, one
