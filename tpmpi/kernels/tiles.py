"""The inner loop of every product: a tile of outputs, accumulated in vector registers.

y[rows, panels * 16] += x[rows, k] · W[k, panels * 16].  Sixteen outputs of a matrix lie side by side, a panel, and the
loop over k runs outside: no sum is ever taken across lanes, and each output is accumulated in ascending k, whatever the
number of rows, panels, ranks or vector lanes.  Layouts of a panel, [steps along k, 16 outputs]:

    float32    [k, 16]
    bfloat16   [k/2, 16, 2]      pairs along k, as the matrix units of CPUs want them
    int8       [k/32] groups of [16, 16, 2] int8, then 16 scales
    int4       [k/32] groups of [4, 16] 32-bit words, then 16 scales, then 16 offsets

Bits 4j to 4j + 3 of a word of int4 are the weight at k = 2j, bits 16 + 4j to 19 + 4j the one at k = 2j + 1.

The integer kinds take x as int16 with a scale per 32 (see `rows.row_quantize`): products of a group are summed exactly
in 32 bits (127 * 32767 * 32 < 2^31), then scaled once.  The error, 2^-16 of the largest of 32 neighbours, is far below
that of the weights, and the multiplier of 16-bit pairs does twice as many products as that of float32.

The functions here emit LLVM's vector instructions, because Numba alone would keep the sums in memory.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tpmpi.kernels.jit import HALVES, VNNI, WIDTH, X86

LANES, GROUP = 16, 32
PARTS = LANES // WIDTH  # vectors in a panel's row
HALF_BYTES = 2 if HALVES else 4  # of a scale or an offset
PER_STEP = {'float32': 1, 'bfloat16': 2}  # weights along k that lie together for one output
GROUP_VALUES = {'int8': GROUP * LANES, 'int4': GROUP * LANES // 2}  # bytes, without the scales
GROUP_BYTES = {'int8': GROUP_VALUES['int8'] + LANES * HALF_BYTES, 'int4': GROUP_VALUES['int4'] + 2 * LANES * HALF_BYTES}

I8, I16, I32, I64, F16, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()
VF, VI, VH, VB = (ir.VectorType(t, n) for t, n in ((F32, WIDTH), (I32, WIDTH), (I16, 2 * WIDTH), (I8, 2 * WIDTH)))
HALF = ir.VectorType(F16, WIDTH) if HALVES else VF
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

    def store(self, value, address):
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=4)

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

    def add_pairs(self, total, a, b):
        """total plus two neighbouring products of 16-bit integers, in 32 bits."""
        if VNNI:
            return self.call(f'llvm.x86.avx512.vpdpwssd.{32 * WIDTH}', total, self.b.bitcast(a, VI), self.b.bitcast(b, VI))
        if X86:
            return self.b.add(total, self.call(PMADDWD, a, b, result=VI))
        wide = ir.VectorType(I32, 2 * WIDTH)
        product = self.b.mul(self.b.sext(a, wide), self.b.sext(b, wide))
        nothing = ir.Constant(wide, ir.Undefined)
        even, odd = (self.b.shuffle_vector(product, nothing, ir.Constant(VI, list(range(i, 2 * WIDTH, 2)))) for i in (0, 1))
        return self.b.add(total, self.b.add(even, odd))

    def widen(self, address):
        """WIDTH scales, as stored in a panel, as float32."""
        value = self.load(address, HALF, 2)
        return self.b.fpext(value, VF) if HALVES else value

    def variables(self, kind, rows, columns):
        """rows * columns accumulators; LLVM keeps them in registers."""
        return [[cgutils.alloca_once(self.b, kind) for _ in range(columns)] for _ in range(rows)]


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
        for r in range(rows):
            for j in range(depth):
                xk = x_at(r, j)
                for v in range(columns):
                    add(r, v, j, xk, held[v][j])


def float_tile(kind: str, rows: int, panels: int):
    """tile(x, x_row, w, w_panel, w_step, steps, y, y_row, y_panel): addresses, and strides in bytes."""
    columns = panels * PARTS

    def emit(context, builder, signature, args):
        e, (x, x_row, w, w_panel, w_step, steps, y, y_row, y_panel) = Emit(builder), args
        b = builder
        xs = [e.at(x, (x_row, r)) for r in range(rows)]
        ws = [e.at(w, (w_panel, p)) for p in range(panels)]
        ys = [[e.at(y, (y_row, r), (y_panel, v // PARTS), v % PARTS * WIDTH * 4) for v in range(columns)] for r in range(rows)]
        sums = e.variables(VF, rows, columns)
        for r in range(rows):
            for v in range(columns):
                b.store(e.load(ys[r][v], VF, 4), sums[r][v])
        with cgutils.for_range(b, steps) as loop:
            each = PER_STEP[kind]

            def x_at(r, j):
                return e.splat(e.load(e.at(xs[r], (loop.index, 4 * each), 4 * j), F32, 4))

            def w_at(v):
                bits = e.load(e.at(ws[v // PARTS], (loop.index, w_step), v % PARTS * WIDTH * 4), VI, 4)
                values = [bits] if each == 1 else [b.shl(bits, e.splat(I32(16))), b.and_(bits, e.splat(I32(0xFFFF0000)))]
                return [b.bitcast(value, VF) for value in values]

            def add(r, v, j, xk, value):
                b.store(e.fma(xk, value, b.load(sums[r][v])), sums[r][v])

            outer_product(rows, columns, each, x_at, w_at, add)
        for r in range(rows):
            for v in range(columns):
                e.store(b.load(sums[r][v]), ys[r][v])
        return context.get_dummy_value()

    @intrinsic
    def tile(typing_context, x, x_row, w, w_panel, w_step, steps, y, y_row, y_panel):
        return types.void(*[types.int64] * 9), emit
    return tile


def integer_tile(kind: str, rows: int, panels: int):
    """tile(x, x_row, scale, total, scale_row, w, w_panel, groups, y, y_row, y_panel): addresses, and strides in bytes.

    x: int16; scale, total: float32 per group of x, the scale and the sum of the group (for the offsets of the weights).
    """
    columns = panels * PARTS

    def emit(context, builder, signature, args):
        e, (x, x_row, scale, total, scale_row, w, w_panel, groups, y, y_row, y_panel) = Emit(builder), args
        b = builder
        ys = [[e.at(y, (y_row, r), (y_panel, v // PARTS), v % PARTS * WIDTH * 4) for v in range(columns)] for r in range(rows)]
        sums = e.variables(VI, rows, columns)
        with cgutils.for_range(b, groups) as loop:
            xg = [e.at(x, (x_row, r), (loop.index, 2 * GROUP)) for r in range(rows)]
            wg = [e.at(w, (w_panel, p), (loop.index, GROUP_BYTES[kind])) for p in range(panels)]
            for r in range(rows):
                for v in range(columns):
                    b.store(ir.Constant(VI, [0] * WIDTH), sums[r][v])
            pairs = 4 if kind == 'int4' else 1  # in one load of weights
            with cgutils.for_range(b, I64(GROUP // 2 // pairs)) as inner:
                def x_at(r, j):
                    return b.bitcast(e.splat(e.load(e.at(xg[r], (inner.index, 4 * pairs), 4 * j), I32, 4)), VH)

                def w_at(v):
                    return group_pairs(e, kind, wg[v // PARTS], inner.index, v % PARTS)

                def add(r, v, j, xk, value):
                    b.store(e.add_pairs(b.load(sums[r][v]), value, xk), sums[r][v])

                outer_product(rows, columns, pairs, x_at, w_at, add)
            for r in range(rows):
                x_scale, x_total = (e.splat(e.load(e.at(a, (scale_row, r), (loop.index, 4)), F32, 4)) for a in (scale, total))
                for v in range(columns):
                    w_scale, w_offset = group_scales(e, kind, wg[v // PARTS], v % PARTS)
                    value = e.load(ys[r][v], VF, 4)
                    if w_offset is not None:
                        value = e.fma(w_offset, x_total, value)
                    e.store(e.fma(b.sitofp(b.load(sums[r][v]), VF), b.fmul(w_scale, x_scale), value), ys[r][v])
        return context.get_dummy_value()

    @intrinsic
    def tile(typing_context, x, x_row, scale, total, scale_row, w, w_panel, groups, y, y_row, y_panel):
        return types.void(*[types.int64] * 11), emit
    return tile


def group_pairs(e: Emit, kind: str, group, index, part: int) -> list:
    """The pairs of 16-bit weights of one step along k for WIDTH outputs."""
    b = e.b
    if kind == 'int8':
        return [b.sext(e.load(e.at(group, (index, LANES * 2), part * WIDTH * 2), VB, 1), VH)]
    words = e.load(e.at(group, (index, LANES * 4), part * WIDTH * 4), VI, 4)
    nibbles = e.splat(I32(0x000F000F))
    low = [b.and_(b.lshr(words, e.splat(I32(4 * j))) if j else words, nibbles) for j in range(3)]
    return [b.bitcast(value, VH) for value in low] + [b.lshr(b.bitcast(words, VH), ir.Constant(VH, [12] * 2 * WIDTH))]


def group_scales(e: Emit, kind: str, group, part: int):
    """Scales and offsets of WIDTH outputs for a group; None where the kind has no offsets."""
    at = e.at(group, GROUP_VALUES[kind] + part * WIDTH * HALF_BYTES)
    return e.widen(at), e.widen(e.at(at, LANES * HALF_BYTES)) if kind == 'int4' else None


@intrinsic
def float_of(typing_context, bits):
    """The float32 that these 32 bits are."""
    return types.float32(types.int32), lambda context, builder, signature, args: builder.bitcast(args[0], F32)


@intrinsic
def bits_of(typing_context, value):
    """The bits of a float32."""
    return types.int32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], I32)


@intrinsic
def keep(typing_context, array):
    """Numba frees an array after its last use, and does not see the use of its address: name it here, after that."""
    return types.void(array), lambda context, builder, signature, args: context.get_dummy_value()
