"""The inner loop of every product: a tile of outputs, accumulated in vector registers.

y[rows, panels * 16] += x[rows, k] · W[k, panels * 16].  Sixteen outputs of a matrix lie side by side, a panel, and the
loop over k runs outside: no sum is ever taken across lanes, and each output is accumulated in ascending k, whatever the
number of rows, panels, ranks or vector lanes.  Layouts of a panel, [steps along k, 16 outputs]:

    float32    [k, 16]
    bfloat16   [k/2, 16, 2]      pairs along k, as the matrix units of CPUs want them
    int8       [k/32] groups of [8, 16, 4] q + 128 as bytes, then 16 scales
    int4       [k/32] groups of [4, 16, 4] bytes, then 16 scales, then 16 offsets

Byte i of four in int4 holds the weight at k = i in its low bits, the one at k = 4 + i in its high ones.

The integer kinds take x as integers with a scale per 32 (see `rows.row_quantize`): products of a group are summed exactly
in 32 bits (255 * 32767 * 32 < 2^31), then scaled once.  Where x has 16 bits, its error, 2^-16 of the largest of 32
neighbours, is far below that of the weights, and the multiplier of 16-bit pairs does twice as many products as that of
float32.  With 8 bits, on request, the one of bytes does four times as many; where that adds in 16 bits only, it serves int4,
whose sums of a group fit there (15 * 127 * 2 * 8 < 2^15).  Quads of bytes serve all: the even ones of a vector are pairs of
16 bits by a mask, the odd ones by a shift, if x has the elements of four in the order 0, 2, 1, 3.

The functions here emit LLVM's vector instructions, because Numba alone would keep the sums in memory.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tpmpi.kernels.jit import CPU, HALVES, HAS_PAIRS, VNNI, WIDTH, X86

LANES, GROUP = 16, 32
# Bytes that a stream from memory is asked for beforehand, since a CPU's own prefetchers stop where a page ends, and into which
# level, as Emit.prefetch numbers them.  Requests for the first one fill the few places that a Zen has for lines under way: on
# the fourth int8 went at half the speed, on the fifth a tenth faster.
AHEAD, STREAM = (768, 2) if CPU in ('znver1', 'znver2', 'znver3', 'znver4') else (1536, 3)
LATER = 2  # level for what is needed after much else
PARTS = LANES // WIDTH  # vectors in a panel's row
HALF_BYTES = 2 if HALVES else 4  # of a scale or an offset
PER_STEP = {'float32': 1, 'bfloat16': 2}  # weights along k that lie together for one output
X_STEP = {'float32': 4, 'bfloat16': 8, 'pairs': 4}  # bytes of a row of x in a step; pairs: x is bfloat16, too
ORDER = (0, 2, 1, 3)  # of four elements of x in 16 bits
GROUP_VALUES = {'int8': GROUP * LANES, 'int4': GROUP * LANES // 2}  # bytes, without the scales
GROUP_BYTES = {'int8': GROUP_VALUES['int8'] + LANES * HALF_BYTES, 'int4': GROUP_VALUES['int4'] + 2 * LANES * HALF_BYTES}

I8, I16, I32, I64, F16, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()
VF, VI, VH = (ir.VectorType(t, n) for t, n in ((F32, WIDTH), (I32, WIDTH), (I16, 2 * WIDTH)))
HALF = ir.VectorType(F16, WIDTH) if HALVES else VF
PMADDUBSW = {8: 'llvm.x86.avx2.pmadd.ub.sw', 16: 'llvm.x86.avx512.pmaddubs.w.512'}.get(WIDTH)
# bytes of x rounded to 8 bits; where no instruction multiplies bytes without loss, the same integers take 16 bits
COARSE_BYTES = {'int8': 1 if VNNI else 2, 'int4': 1 if VNNI or X86 and PMADDUBSW else 2}
PMADDWD = {4: 'llvm.x86.sse2.pmadd.wd', 8: 'llvm.x86.avx2.pmadd.wd', 16: 'llvm.x86.avx512.pmaddw.d.512'}[WIDTH]


class Emit:
    """LLVM instructions on vectors of WIDTH lanes; an address is an i64."""

    def __init__(self, builder):
        self.b = builder

    def at(self, base, *terms):
        """base plus terms; a term is a value, a constant, or a pair to be multiplied."""
        for term in terms:
            if isinstance(term, tuple):
                term = self.b.mul(term[0], I64(term[1]) if isinstance(term[1], int) else term[1])
            elif isinstance(term, int):
                term = I64(term)
            base = self.b.add(base, term)
        return base

    def load(self, address, kind, align):
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=align, typ=kind)

    def store(self, value, address, align=4):
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=align)

    def prefetch(self, address, write: int = 0, near: int = 3):
        """Asks for the line at an address, which may lie anywhere, to be in the cache soon; write: to be written.

        near: 3 is the first level, 2 the second one.
        """
        arguments = [I8.as_pointer(), I32, I32, I32]
        function = self.b.module.globals.get('llvm.prefetch.p0i8') or ir.Function(
            self.b.module, ir.FunctionType(ir.VoidType(), arguments), 'llvm.prefetch.p0i8')
        self.b.call(function, [self.b.inttoptr(address, arguments[0]), I32(write), I32(near), I32(1)])  # data

    def splat(self, scalar):
        """One scalar in all lanes."""
        kind = ir.VectorType(scalar.type, WIDTH)
        nothing = ir.Constant(kind, ir.Undefined)
        first = self.b.insert_element(nothing, scalar, I32(0))
        return self.b.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(I32, WIDTH), [0] * WIDTH))

    def call(self, name, *args, result=None):
        result = args[0].type if result is None else result
        function = self.b.module.globals.get(name) or ir.Function(
            self.b.module, ir.FunctionType(result, [a.type for a in args]), name)
        return self.b.call(function, args)

    def fma(self, a, b, c):
        """a * b + c, in one rounding where the CPU has that."""
        return self.call(f'llvm.fmuladd.v{WIDTH}f32', a, b, c)

    def in_order(self, value):
        """value, as an assembler instruction of no length gives it: LLVM leaves a chain of sums of integers as it stands.

        It would add the products of several steps up first, and keep on the stack what has no register meanwhile.
        """
        return self.b.asm(ir.FunctionType(VI, [VI]), '', '=v,0' if WIDTH == 16 else '=x,0', [value], False)

    def add_pairs(self, total, a, b):
        """total plus two neighbouring products of 16-bit integers, in 32 bits."""
        if VNNI:
            return self.call(f'llvm.x86.avx512.vpdpwssd.{32 * WIDTH}', total, a, b)
        a, b = self.b.bitcast(a, VH), self.b.bitcast(b, VH)
        if X86:
            return self.in_order(self.b.add(total, self.call(PMADDWD, a, b, result=VI)))
        wide = ir.VectorType(I32, 2 * WIDTH)
        product = self.b.mul(self.b.sext(a, wide), self.b.sext(b, wide))
        nothing = ir.Constant(wide, ir.Undefined)
        even, odd = (self.b.shuffle_vector(product, nothing, ir.Constant(VI, list(range(i, 2 * WIDTH, 2)))) for i in (0, 1))
        return self.b.add(total, self.b.add(even, odd))

    def add_quads(self, total, a, b):
        """total plus four neighbouring products of a's unsigned and b's signed bytes, in 32 bits, or two by two in 16."""
        if VNNI:
            return self.call(f'llvm.x86.avx512.vpdpbusd.{32 * WIDTH}', total, a, b)
        a, b = (self.b.bitcast(v, ir.VectorType(I8, 4 * WIDTH)) for v in (a, b))
        total = self.b.add(self.b.bitcast(total, VH), self.call(PMADDUBSW, a, b, result=VH))
        return self.in_order(self.b.bitcast(total, VI))

    def whole_quads(self, total):
        """What `add_quads` gives, in 32 bits."""
        if VNNI:
            return total
        return self.call(PMADDWD, self.b.bitcast(total, VH), ir.Constant(VH, [1] * 2 * WIDTH), result=VI)

    def add_bfloat16(self, total, a, b):
        """total plus two neighbouring products of bfloat16."""
        if HAS_PAIRS:
            return self.call(f'llvm.x86.avx512bf16.dpbf16ps.{32 * WIDTH}', total, a, b)
        (a0, a1), (b0, b1) = self.halves(a), self.halves(b)
        return self.fma(a0, b0, self.fma(a1, b1, total))

    def halves(self, bits):
        """Pairs of bfloat16 as two vectors of float32."""
        low, high = self.b.shl(bits, self.splat(I32(16))), self.b.and_(bits, self.splat(I32(0xFFFF0000)))
        return self.b.bitcast(low, VF), self.b.bitcast(high, VF)

    def widen(self, address):
        """WIDTH scales, as stored in a panel, as float32."""
        value = self.load(address, HALF, 2)
        return self.b.fpext(value, VF) if HALVES else value

    def variables(self, kind, rows, columns):
        """rows * columns accumulators; LLVM keeps them in registers."""
        return [[cgutils.alloca_once(self.b, kind) for _ in range(columns)] for _ in range(rows)]


def out_of_line(builder, name: str, arguments, body) -> None:
    """Call body(builder, arguments) as a function of its own, of int64 arguments and no result.

    In the middle of a large kernel LLVM runs out of registers and keeps sums of the inner loop on the stack, where they also
    may lie across two lines of the cache, from run to run.
    """
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [I64] * len(arguments)), name)
        function.linkage = 'internal'
        function.attributes.add('noinline')
        inner = ir.IRBuilder(function.append_basic_block())
        body(inner, function.args)
        inner.ret_void()
    builder.call(function, arguments)


def outer_product(rows, columns, depth, x_at, w_at, add):
    """One step of a tile, so ordered that few values are alive beside the sums: the shorter side is held."""
    if rows < columns:
        held = [[x_at(r, j) for j in range(depth)] for r in range(rows)]
        for v in range(columns):
            for j, value in enumerate(w_at(v)):
                for r in range(rows):
                    add(r, v, j, held[r][j], value)
    else:
        held = [w_at(v) for v in range(columns)]
        for j in range(depth):
            for r in range(rows):
                xk = x_at(r, j)
                for v in range(columns):
                    add(r, v, j, xk, held[v][j])


def float_tile(kind: str, rows: int, panels: int, level: int = 0):
    """tile(x, x_row, w, w_panel, w_step, steps, y, y_row, y_panel, fresh, ahead): addresses, and strides in bytes.

    kind: of the weights, and pairs: weights and x are bfloat16.  level: of the cache that is asked meanwhile for what lies
    `ahead` bytes behind each weight; 0: none.  fresh: y is not added to, but written, whatever it holds.
    """
    columns = panels * PARTS

    def body(builder, args):
        e, (x, x_row, w, w_panel, w_step, steps, y, y_row, y_panel, fresh, ahead) = Emit(builder), args
        b = builder
        xs = [e.at(x, (x_row, r)) for r in range(rows)]
        ws = [e.at(w, (w_panel, p)) for p in range(panels)]
        ys = [[e.at(y, (y_row, r), (y_panel, v // PARTS), v % PARTS * WIDTH * 4) for v in range(columns)] for r in range(rows)]
        sums = e.variables(VF, rows, columns)
        each = [(r, v) for r in range(rows) for v in range(columns)]
        with b.if_else(b.icmp_signed('!=', fresh, I64(0))) as (written, added):
            with written:
                for r, v in each:
                    b.store(ir.Constant(VF, [0.0] * WIDTH), sums[r][v])
            with added:
                for r, v in each:
                    b.store(e.load(ys[r][v], VF, 4), sums[r][v])
        with cgutils.for_range(b, steps) as loop:
            def x_at(r, j):
                return e.splat(e.load(e.at(xs[r], (loop.index, X_STEP[kind]), 4 * j), I32 if kind == 'pairs' else F32, 4))

            def w_at(v):
                if level and v % PARTS == 0:
                    e.prefetch(e.at(b.add(ws[v // PARTS], ahead), (loop.index, w_step)), near=level)
                bits = e.load(e.at(ws[v // PARTS], (loop.index, w_step), v % PARTS * WIDTH * 4), VI, 4)
                return [bits] if kind == 'pairs' else e.halves(bits) if kind == 'bfloat16' else [b.bitcast(bits, VF)]

            def add(r, v, j, xk, value):
                total = b.load(sums[r][v])
                b.store(e.add_bfloat16(total, xk, value) if kind == 'pairs' else e.fma(xk, value, total), sums[r][v])

            outer_product(rows, columns, PER_STEP.get(kind, 1), x_at, w_at, add)
        for r, v in each:
            e.store(b.load(sums[r][v]), ys[r][v])

    def emit(context, builder, signature, args):
        out_of_line(builder, f'tile_{kind}_{rows}_{panels}' + f'_{level}', args, body)
        return context.get_dummy_value()

    @intrinsic
    def tile(typing_context, x, x_row, w, w_panel, w_step, steps, y, y_row, y_panel, fresh, ahead):
        return types.void(*[types.int64] * 11), emit
    return tile


def integer_tile(kind: str, rows: int, panels: int, x_bytes: int, level: int = 0, unrolled: bool = False):
    """tile(x, x_row, scale, total, scale_row, w, w_panel, groups, y, y_row, y_panel, ahead): addresses, and strides in bytes.

    x: int16 or, x_bytes 1, int8; scale: float32 of each group of x; total: what its sum adds (see `rows.row_quantize`);
    level, ahead: as in `float_tile`.  unrolled: all steps of a group without a loop.  The sums of all groups stay in registers
    where there are enough of them.
    """
    columns, held = panels * PARTS, WIDTH == 16

    def body(builder, args):
        e, (x, x_row, scale, total, scale_row, w, w_panel, groups, y, y_row, y_panel, ahead) = Emit(builder), args
        b = builder
        ys = [[e.at(y, (y_row, r), (y_panel, v // PARTS), v % PARTS * WIDTH * 4) for v in range(columns)] for r in range(rows)]
        sums, floats = e.variables(VI, rows, columns), e.variables(VF, rows, columns)
        each = [(r, v) for r in range(rows) for v in range(columns)]
        for r, v in each if held else ():
            b.store(e.load(ys[r][v], VF, 4), floats[r][v])
        with cgutils.for_range(b, groups) as loop:
            xg = [e.at(x, (x_row, r), (loop.index, x_bytes * GROUP)) for r in range(rows)]
            wg = [e.at(w, (w_panel, p), (loop.index, GROUP_BYTES[kind])) for p in range(panels)]

            def of_group(array, r, scalar):
                return e.splat(e.load(e.at(array, (scale_row, r), (loop.index, 4)), scalar, 4))

            for r in range(rows):
                first = of_group(total, r, I32) if kind == 'int8' else ir.Constant(VI, [0] * WIDTH)
                for v in range(columns):
                    b.store(first, sums[r][v])
            values = 8 if kind == 'int4' else 4  # of an output in one load of weights
            words = values * x_bytes // 4  # of 32 bits of x that meet them
            at_once = GROUP // values if unrolled else 1
            with cgutils.for_range(b, I64(GROUP // values // at_once)) as inner:
                for i in range(at_once):
                    index = e.at(I64(i), (inner.index, at_once))

                    def x_at(r, j, index=index):
                        return e.splat(e.load(e.at(xg[r], (index, 4 * words), 4 * j), I32, 4))

                    def w_at(v, index=index):
                        if level and v % PARTS == 0:
                            e.prefetch(e.at(b.add(wg[v // PARTS], ahead), (index, LANES * 4)), near=level)
                        return group_quads(e, kind, wg[v // PARTS], index, v % PARTS, x_bytes)

                    def add(r, v, j, xk, value):
                        more = e.add_quads if x_bytes == 1 else e.add_pairs
                        b.store(more(b.load(sums[r][v]), value, xk), sums[r][v])

                    outer_product(rows, columns, words, x_at, w_at, add)
            for v in range(columns):
                w_scale, w_offset = group_scales(e, kind, wg[v // PARTS], v % PARTS)
                for r in range(rows):
                    value = b.load(floats[r][v]) if held else e.load(ys[r][v], VF, 4)
                    if w_offset is not None:
                        value = e.fma(w_offset, of_group(total, r, F32), value)
                    whole = e.whole_quads(b.load(sums[r][v])) if x_bytes == 1 else b.load(sums[r][v])
                    value = e.fma(b.sitofp(whole, VF), b.fmul(w_scale, of_group(scale, r, F32)), value)
                    if held:
                        b.store(value, floats[r][v])
                    else:
                        e.store(value, ys[r][v])
        for r, v in each if held else ():
            e.store(b.load(floats[r][v]), ys[r][v])

    def emit(context, builder, signature, args):
        out_of_line(builder, f'tile_{kind}_{x_bytes}_{rows}_{panels}_{level}' + '_unrolled' * unrolled, args, body)
        return context.get_dummy_value()

    @intrinsic
    def tile(typing_context, x, x_row, scale, total, scale_row, w, w_panel, groups, y, y_row, y_panel, ahead):
        return types.void(*[types.int64] * 12), emit
    return tile


def group_quads(e: Emit, kind: str, group, index, part: int, x_bytes: int) -> list:
    """One load of weights for WIDTH outputs, unsigned: as vectors of four bytes, or as pairs of 16 bits in the ORDER of x."""
    b, words = e.b, e.load(e.at(group, (index, LANES * 4), part * WIDTH * 4), VI, 4)
    if x_bytes == 1:
        low = e.splat(I32(0x0F0F0F0F))
        return [words] if kind == 'int8' else [b.and_(words, low), b.and_(b.lshr(words, e.splat(I32(4))), low)]
    shifts, bits = ((0, 8), 0x00FF00FF) if kind == 'int8' else ((0, 8, 4, 12), 0x000F000F)
    pairs = []
    for shift in shifts:
        if shift == 16 - bits.bit_count() // 2:  # the upper bits of each 16: a shift alone leaves zeros above them
            moved = b.lshr(b.bitcast(words, VH), ir.Constant(VH, [shift] * 2 * WIDTH))
            pairs.append(b.bitcast(moved, VI))
        else:
            pairs.append(b.and_(b.lshr(words, e.splat(I32(shift))) if shift else words, e.splat(I32(bits))))
    return pairs


def injected_values(e: Emit, kind: str, group, index, part: int) -> list:
    """The q of one load of weights for WIDTH outputs, k ascending, as bits of the mantissa of float32: 2^n + q of n bits.

    (Two instructions each; to widen and convert an integer takes twice as many.)
    """
    b, words = e.b, e.load(e.at(group, (index, LANES * 4), part * WIDTH * 4), VI, 4)
    bits, starts = (8, range(0, 32, 8)) if kind == 'int8' else (4, (*range(0, 32, 8), *range(4, 32, 8)))
    values = []
    for start in starts:
        up = 23 - bits - start  # to the highest bits of the mantissa
        moved = b.shl(words, e.splat(I32(up))) if up >= 0 else b.lshr(words, e.splat(I32(-up)))
        moved = b.and_(moved, e.splat(I32((1 << bits) - 1 << 23 - bits)))
        values.append(b.bitcast(b.or_(moved, e.splat(I32(127 + bits << 23))), VF))
    return values


def injected_scales(e: Emit, kind: str, group, part: int):
    """Factor and summand that make a group's `injected_values` its weights."""
    scale, offset = group_scales(e, kind, group, part)
    if offset is None:  # stored as q + 128
        return scale, e.b.fmul(scale, ir.Constant(VF, [-384.0] * WIDTH))
    return scale, e.fma(scale, ir.Constant(VF, [-16.0] * WIDTH), offset)


def group_scales(e: Emit, kind: str, group, part: int):
    """Scales and offsets of WIDTH outputs for a group; None where the kind has no offsets."""
    at = e.at(group, GROUP_VALUES[kind] + part * WIDTH * HALF_BYTES)
    return e.widen(at), e.widen(e.at(at, LANES * HALF_BYTES)) if kind == 'int4' else None


@intrinsic
def prefetch(typing_context, address):
    """Asks for the line at an address to be in the cache soon."""
    def emit(context, builder, signature, args):
        Emit(builder).prefetch(args[0])
        return context.get_dummy_value()
    return types.void(types.int64), emit


@intrinsic
def prefetch_to_write(typing_context, address):
    """Asks for the line at an address, which will be written."""
    def emit(context, builder, signature, args):
        Emit(builder).prefetch(args[0], 1)
        return context.get_dummy_value()
    return types.void(types.int64), emit


@intrinsic
def float_of(typing_context, bits):
    """The float32 that these 32 bits are."""
    return types.float32(types.int32), lambda context, builder, signature, args: builder.bitcast(args[0], F32)


@intrinsic
def bits_of(typing_context, value):
    """The bits of a float32."""
    return types.int32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], I32)


@intrinsic
def widened(typing_context, address):
    """One scale or offset, as stored in a panel, as float32."""
    def emit(context, builder, signature, args):
        value = Emit(builder).load(args[0], F16 if HALVES else F32, 2)
        return builder.fpext(value, F32) if HALVES else value
    return types.float32(types.int64), emit


@intrinsic
def keep(typing_context, array):
    """Numba frees an array after its last use, and does not see the use of its address: name it here, after that."""
    return types.void(array), lambda context, builder, signature, args: context.get_dummy_value()
