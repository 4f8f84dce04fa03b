"""What runs along one row in vector registers: maximum, sums, exponentials, a cap, rounding to integers.

A sum has sixteen lanes, element i in lane i modulo 16, elements ascending; then the lanes are added in order.  Addresses
and counts are int64; counts are of whole panels of 16.
"""

from __future__ import annotations

from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from tpmpi.kernels.jit import helper
from tpmpi.kernels.tiles import F32, GROUP, I8, I16, I32, I64, LANES, ORDER, PARTS, VF, VI, WIDTH, Emit

NOTHING = float('-inf')  # the score of a key that is not seen
NAN, NARROW = 0x7FC00000, ir.VectorType(I16, WIDTH)
LOG2_E = 1.4426950216293335
# of 2^r for |r| <= 1/2, least relative error, r ascending
POWER = (1.0000000716546014, 0.6931469670622141, 0.24022119724106966, 0.05550713277655165, 0.00967554132373162,
         0.0013276470648653786)


def exponential(b, x):
    """e^x of a float32 or a vector of them, error below 2 units in the last place.

    x = n ln 2 + r with n whole; e^r by a polynomial of degree 7 on |r| <= ln 2 / 2 (Cephes' expf), 2^n by its exponent
    bits.  Every product and sum is spelled out, so that an element has the same bits in a vector and alone.
    """
    kind = x.type
    whole = I32 if kind == F32 else ir.VectorType(I32, kind.count)
    name = 'f32' if kind == F32 else f'v{kind.count}f32'

    def number(value, of=kind):
        return ir.Constant(of, value if of in (F32, I32) else [value] * kind.count)

    def call(function, *args):
        function = f'llvm.{function}.{name}'
        known = b.module.globals.get(function) or ir.Function(b.module, ir.FunctionType(kind, [kind] * len(args)), function)
        return b.call(known, args)

    for limit, beyond in ((number(-87.0), '<'), (number(88.3699951171875), '>')):  # a NaN passes both
        x = b.select(b.fcmp_ordered(beyond, x, limit), limit, x)
    n = call('floor', call('fmuladd', x, number(1.44269502162933349609375), number(0.5)))
    r = call('fmuladd', n, number(-0.693359375), x)
    r = call('fmuladd', n, number(2.1219444170128554e-4), r)
    p = number(1.9875690760090947e-4)
    for c in (1.398199936375022e-3, 8.33345204591751e-3, 4.166579619050026e-2, 1.666666567325592e-1, 5.000000149011612e-1):
        p = call('fmuladd', p, r, number(c))
    p = b.fadd(call('fmuladd', b.fmul(p, r), r, r), number(1.0))
    bits = b.shl(b.add(b.fptosi(n, whole), number(127, whole)), number(23, whole))
    return b.fmul(p, b.bitcast(bits, kind))


@intrinsic
def exp(typing_context, x):
    """e^x of one float32; a loop over it becomes one of vectors."""
    return types.float32(types.float32), lambda context, builder, signature, args: exponential(builder, args[0])


def hyperbolic_tangent(b, x):
    """tanh of a float32 or a vector of them: a polynomial where |x| < 0.625 (Cephes' tanhf), 1 - 2 / (e^2|x| + 1) beyond."""
    kind = x.type

    def number(value):
        return ir.Constant(kind, value if kind == F32 else [value] * kind.count)

    z = b.fmul(x, x)
    p = number(-5.70498872745e-3)
    for c in (2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
        p = b.fadd(b.fmul(p, z), number(c))
    near = b.fadd(b.fmul(b.fmul(p, z), x), x)
    negative = b.fcmp_ordered('<', x, number(0.0))
    size = b.select(negative, b.fneg(x), x)
    far = b.fsub(number(1.0), b.fdiv(number(2.0), b.fadd(exponential(b, b.fadd(size, size)), number(1.0))))
    return b.select(b.fcmp_ordered('<', size, number(0.625)), near, b.select(negative, b.fneg(far), far))


@intrinsic
def tanh(typing_context, x):
    """The hyperbolic tangent of one float32; a loop over it becomes one of vectors."""
    return types.float32(types.float32), lambda context, builder, signature, args: hyperbolic_tangent(builder, args[0])


def _array_at(kind):
    """view(address, count): the array that lies at an address; its owner must outlive it.  Nobody counts references to it."""
    @intrinsic
    def pointer(typing_context, address):
        def emit(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))
        return types.CPointer(kind)(types.int64), emit

    @helper
    def view(address, count):
        return carray(pointer(address), (count,))

    return view


floats, words, halves, octets = (_array_at(kind) for kind in (types.float32, types.uint32, types.uint16, types.uint8))


def _walk(e: Emit, address, panels, start: float, step):
    """Sixteen lanes after step(lane values, address of the next) over all panels; one vector for each part."""
    lanes = e.variables(VF, 1, PARTS)[0]
    for lane in lanes:
        e.b.store(ir.Constant(VF, [start] * WIDTH), lane)
    with cgutils.for_range(e.b, panels) as loop:
        for part, lane in enumerate(lanes):
            at = e.at(address, (loop.index, LANES * 4), part * WIDTH * 4)
            e.b.store(step(e.b.load(lane), at), lane)
    return [e.b.load(lane) for lane in lanes]


def fold(b, vectors, combine):
    """The lanes of all vectors, combined in order."""
    values = [b.extract_element(v, I32(i)) for v in vectors for i in range(WIDTH)]
    result = values[0]
    for value in values[1:]:
        result = combine(result, value)
    return result


@intrinsic
def row_max(typing_context, address, panels):
    """The largest of 16 * panels float32; a NaN is never the largest."""
    def emit(context, builder, signature, args):
        e, (address, panels) = Emit(builder), args
        at_once = 4  # a maximum depends on no order: it need not wait for the one before

        def larger(a, b):
            return builder.select(builder.fcmp_ordered('>', b, a), b, a)

        lanes = [lane for group in e.variables(VF, at_once, PARTS) for lane in group]
        for lane in lanes:
            builder.store(ir.Constant(VF, [NOTHING] * WIDTH), lane)
        whole = builder.sdiv(panels, I64(at_once))
        with cgutils.for_range(builder, whole) as loop:
            for i, lane in enumerate(lanes):
                at = e.at(address, (loop.index, at_once * LANES * 4), i * WIDTH * 4)
                builder.store(larger(builder.load(lane), e.load(at, VF, 4)), lane)
        rest = e.at(address, (whole, at_once * LANES * 4))
        last = _walk(e, rest, builder.sub(panels, builder.mul(whole, I64(at_once))), NOTHING,
                     lambda lane, at: larger(lane, e.load(at, VF, 4)))
        most = last[0]
        for other in [*last[1:], *(builder.load(lane) for lane in lanes)]:
            most = larger(most, other)
        return fold(builder, [most], larger)
    return types.float32(types.int64, types.int64), emit


def _row_exp(kept: bool):
    """A function of scores s, address, panels, top: the sum of e^(s - top), which is kept in their place or not."""
    @intrinsic
    def row(typing_context, address, panels, top):
        def emit(context, builder, signature, args):
            e, (address, panels, top) = Emit(builder), args
            most, nothing, zero = e.splat(top), ir.Constant(VF, [NOTHING] * WIDTH), ir.Constant(VF, [0.0] * WIDTH)

            def add(lane, at):
                s = e.load(at, VF, 4)
                p = builder.select(builder.fcmp_ordered('==', s, nothing), zero, exponential(builder, builder.fsub(s, most)))
                if kept:
                    e.store(p, at)
                return builder.fadd(lane, p)

            return fold(builder, _walk(e, address, panels, 0.0, add), builder.fadd)
        return types.float32(types.int64, types.int64, types.float32), emit

    return row


row_exp = _row_exp(True)  # e^(s - top) in place of each score s, 0 where s is -inf; returns their sum
row_exp_sum = _row_exp(False)  # the sum alone


def power_of_two(e: Emit, x):
    """2^x of float32 from -126 to 0, relative error below 2^-22: 2^n by exponent bits, 2^(x - n) by a polynomial."""
    b = e.b
    n = e.call(f'llvm.rint.v{WIDTH}f32', x)
    r = b.fsub(x, n)
    p = ir.Constant(VF, [POWER[-1]] * WIDTH)
    for c in POWER[-2::-1]:
        p = e.fma(p, r, ir.Constant(VF, [c] * WIDTH))
    return b.bitcast(b.add(b.bitcast(p, VI), b.shl(b.fptosi(n, VI), e.splat(I32(23)))), VF)


def rounded(e: Emit, value):
    """The bits of float32 numbers, rounded to the nearest bfloat16, ties to even, in their upper half; a NaN stays one."""
    b, bits = e.b, e.b.bitcast(value, VI)
    odd = b.and_(b.lshr(bits, e.splat(I32(16))), e.splat(I32(1)))
    bits = b.and_(b.add(bits, b.add(odd, e.splat(I32(0x7FFF)))), e.splat(I32(0xFFFF0000)))
    return b.select(b.fcmp_unordered('uno', value, value), e.splat(I32(NAN)), bits)


@intrinsic
def row_exp_halves(typing_context, scores, panels, top, target):
    """e^(s - top) of each score s, rounded to bfloat16, at the address `target`; returns their sum before that.

    What is below 2^-126 is zero, and so is that of a score of -inf.
    """
    def emit(context, builder, signature, args):
        e, b, (scores, panels, top, target) = Emit(builder), builder, args
        scale, most = ir.Constant(VF, [LOG2_E] * WIDTH), e.splat(b.fmul(top, F32(-LOG2_E)))
        lanes, zero = e.variables(VF, 1, PARTS)[0], ir.Constant(VF, [0.0] * WIDTH)
        for lane in lanes:
            b.store(zero, lane)
        with cgutils.for_range(b, panels) as loop:
            for part, lane in enumerate(lanes):
                x = e.fma(e.load(e.at(scores, (loop.index, LANES * 4), part * WIDTH * 4), VF, 4), scale, most)
                p = b.select(b.fcmp_ordered('<', x, ir.Constant(VF, [-126.0] * WIDTH)), zero, power_of_two(e, x))
                b.store(b.fadd(b.load(lane), p), lane)
                bits = b.trunc(b.lshr(rounded(e, p), e.splat(I32(16))), NARROW)
                e.store(bits, e.at(target, (loop.index, LANES * 2), part * WIDTH * 2), 2)
        return fold(b, [b.load(lane) for lane in lanes], b.fadd)
    return types.float32(types.int64, types.int64, types.float32, types.int64), emit


@intrinsic
def row_cap(typing_context, address, panels, cap):
    """cap * tanh(s / cap) in place of each of 16 * panels float32."""
    def emit(context, builder, signature, args):
        e, (address, panels, cap) = Emit(builder), args
        most, least = e.splat(cap), e.splat(builder.fdiv(F32(1.0), cap))
        with cgutils.for_range(builder, panels) as loop:
            for part in range(PARTS):
                at = e.at(address, (loop.index, LANES * 4), part * WIDTH * 4)
                e.store(builder.fmul(most, hyperbolic_tangent(builder, builder.fmul(e.load(at, VF, 4), least))), at)
        return context.get_dummy_value()
    return types.void(types.int64, types.int64, types.float32), emit


@intrinsic
def row_sum(typing_context, address, panels):
    """The sum of 16 * panels float32."""
    def emit(context, builder, signature, args):
        e = Emit(builder)
        return fold(builder, _walk(e, *args, 0.0, lambda lane, at: builder.fadd(lane, e.load(at, VF, 4))), builder.fadd)
    return types.float32(types.int64, types.int64), emit


@intrinsic
def row_squares(typing_context, address, panels):
    """The sum of the squares of 16 * panels float32."""
    def emit(context, builder, signature, args):
        e = Emit(builder)

        def add(lane, at):
            x = e.load(at, VF, 4)
            return e.fma(x, x, lane)

        return fold(builder, _walk(e, *args, 0.0, add), builder.fadd)
    return types.float32(types.int64, types.int64), emit


@intrinsic
def row_add_squares(typing_context, x, part, panels):
    """part += x for 16 * panels float32; the sum of the squares of what becomes of it."""
    def emit(context, builder, signature, args):
        e, (x, part, panels) = Emit(builder), args

        def add(lane, at):
            value = builder.fadd(e.load(at, VF, 4), e.load(e.at(at, builder.sub(x, part)), VF, 4))
            e.store(value, at)
            return e.fma(value, value, lane)

        return fold(builder, _walk(e, part, panels, 0.0, add), builder.fadd)
    return types.float32(types.int64, types.int64, types.int64), emit


def row_quantize(kind: str, x_bytes: int, levels: int, plane: int = 0):
    """quantize(x, q, q_step, scale, total, step, groups): groups of 32 float32 as integers with a scale each.

    They are int16 (in tiles.ORDER) or int8; with `plane`, int16 are their upper bytes and, so many bytes behind these, the
    lower ones.  Steps are bytes from group to group, of q, and of scale and total.
    The largest of a group becomes `levels`.  total: for weights of int4 the sum of what the group became, float32, which
    their offset multiplies; for those of int8, which are stored as q + 128, -128 times the sum of the integers, int32.
    A NaN or an infinity makes the scale of its group one (a NaN counts as the largest), and so every sum with it.
    """
    def emit(context, builder, signature, args):
        e, b, (x, q, q_step, scale, total, step_bytes, groups) = Emit(builder), builder, args
        whole, words, bytes_ = (ir.VectorType(t, WIDTH) for t in (I32, I16, I8))
        order = [i // 4 * 4 + ORDER[i % 4] for i in range(WIDTH)]
        with cgutils.for_range(b, groups) as loop:
            values = [e.load(e.at(x, (loop.index, 4 * GROUP), 4 * i), VF, 4) for i in range(0, GROUP, WIDTH)]
            largest = ir.Constant(whole, [0] * WIDTH)
            for value in values:
                size = b.and_(b.bitcast(value, whole), e.splat(I32(0x7FFFFFFF)))
                largest = b.select(b.icmp_signed('>', size, largest), size, largest)
            step = b.bitcast(e.call(f'llvm.vector.reduce.smax.v{WIDTH}i32', largest, result=I32), F32)
            step = b.fmul(step, F32(1 / levels))
            usable = b.and_(b.fcmp_ordered('>', step, F32(1e-37)), b.fcmp_ordered('<', step, F32(float('inf'))))
            factor = e.splat(b.fdiv(F32(1.0), b.select(usable, step, F32(1.0))))
            usable = e.splat(usable)
            whole_sum = ir.Constant(whole, [0] * WIDTH)
            for i, value in enumerate(values):
                value = b.select(usable, b.fmul(value, factor), ir.Constant(VF, [0.0] * WIDTH))
                value = b.fptosi(e.call(f'llvm.rint.v{WIDTH}f32', value), whole)
                whole_sum = b.add(whole_sum, value)
                at = e.at(q, (loop.index, q_step), i * WIDTH * (1 if plane else x_bytes))
                if plane and x_bytes == 2:
                    e.store(b.trunc(b.lshr(value, e.splat(I32(8))), bytes_), at, 1)
                    at = e.at(at, plane)
                elif x_bytes == 2:
                    value = b.shuffle_vector(value, ir.Constant(whole, ir.Undefined), ir.Constant(whole, order))
                    value = b.trunc(value, words)
                e.store(value if value.type == words else b.trunc(value, bytes_), at, 1)
            whole_sum = e.call(f'llvm.vector.reduce.add.v{WIDTH}i32', whole_sum, result=I32)
            at = b.mul(loop.index, step_bytes)
            e.store(step, b.add(scale, at))
            more = b.mul(whole_sum, I32(-128)) if kind == 'int8' else b.fmul(step, b.sitofp(whole_sum, F32))
            e.store(more, b.add(total, at))
        return context.get_dummy_value()

    @intrinsic
    def quantize(typing_context, x, q, q_step, scale, total, step, groups):
        return types.void(*[types.int64] * 7), emit
    return quantize


@intrinsic
def row_turn(typing_context, x, cos, sin, y, half):
    """y = x cos + x' sin, where x' is x with its halves exchanged; 2 * half numbers each.  y may not be x."""
    def emit(context, builder, signature, args):
        e, b, (x, cos, sin, y, half) = Emit(builder), builder, args
        far = b.mul(half, I64(4))

        def step(at, kind):
            fma = f'llvm.fmuladd.v{WIDTH}f32' if kind == VF else 'llvm.fmuladd.f32'
            low, high = (e.load(e.at(x, at, part), kind, 4) for part in (I64(0), far))
            for part, first, second in ((I64(0), low, high), (far, high, low)):
                c, s = (e.load(e.at(table, at, part), kind, 4) for table in (cos, sin))
                e.store(e.call(fma, first, c, b.fmul(second, s)), e.at(y, at, part))

        whole = b.sdiv(half, I64(WIDTH))
        with cgutils.for_range(b, whole) as loop:
            step(b.mul(loop.index, I64(4 * WIDTH)), VF)
        with cgutils.for_range(b, b.srem(half, I64(WIDTH))) as loop:
            step(e.at(b.mul(whole, I64(4 * WIDTH)), (loop.index, 4)), F32)
        return context.get_dummy_value()
    return types.void(*[types.int64] * 5), emit
