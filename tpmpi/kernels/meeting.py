"""A small sum over the ranks of a node, in memory that they share: no message, and one meeting instead of two.

Each rank has a part, and a flag with the number of the sum that its part belongs to.  A rank writes its part, raises its
flag, waits for the flags of the others, and adds all parts up in the order of ranks: so all have the same bits.  There are
two parts in turn.  Who finds all flags at a number knows that all have read the parts of the number before.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tpmpi.kernels.jit import TRIPLE, kernel
from tpmpi.kernels.rows import floats
from tpmpi.kernels.tiles import I64, keep


@intrinsic
def raised(typing_context, flag):
    """The number at an address; what was written before it was put there can be read now."""
    def emit(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], I64.as_pointer()), 'acquire', 8)
    return types.int64(types.int64), emit


@intrinsic
def put(typing_context, flag, number):
    """A number at an address, after all that was written before."""
    def emit(context, builder, signature, args):
        builder.store_atomic(args[1], builder.inttoptr(args[0], I64.as_pointer()), 'release', 8)
        return context.get_dummy_value()
    return types.void(types.int64, types.int64), emit


@intrinsic
def breathe(typing_context):
    """Tells the CPU that this is a loop which waits."""
    def emit(context, builder, signature, args):
        if TRIPLE.startswith('x86_64'):
            name = 'llvm.x86.sse2.pause'
            function = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(ir.VoidType(), []), name)
            builder.call(function, [])
        return context.get_dummy_value()
    return types.void(), emit


@kernel('i8(i8[::1], i8[::1], i8, i8, f4[::1], i8, i8)')
def sum_parts(parts, flags, rank, number, x, come, patience):
    """x summed over all ranks, in place; 0 if not all of them had come after so many looks, then call again with come 0.

    parts, flags: addresses, of each rank; number: of the sum, which counts from 1; come: 1 to bring x, once.
    """
    n = x.size
    if come:
        mine = floats(parts[rank], n)
        for i in range(n):
            mine[i] = x[i]
        put(flags[rank], number)
    for r in range(len(flags)):
        looks = 0
        while raised(flags[r]) < number:
            if looks >= patience:
                return 0
            looks += 1
            breathe()
    first = floats(parts[0], n)
    for i in range(n):
        x[i] = first[i]
    for r in range(1, len(parts)):
        part = floats(parts[r], n)
        for i in range(n):
            x[i] += part[i]
    keep(parts)
    keep(flags)
    return 1
