"""Sums over the ranks of a node, in memory that they share: no message.

Each rank has a flag, which it raises to a number, and all count alike.  Who finds all flags at a number knows that all have
come so far.

A small sum is one meeting: a rank writes its part, raises its flag, waits for the flags of the others, and adds all parts up in
the order of ranks: so all have the same bits.  There are two parts in turn: all have read those of the number before.

A large one is two: a rank's part lies in its room; when all have come each adds up a share of the elements, in the order of
ranks, and puts it into all rooms; and when all have done so each room holds the sum.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tpmpi.kernels.jit import TRIPLE, helper, kernel
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


@intrinsic
def give_way(typing_context):
    """Offers the core to others that wait for it: sched_yield(2)."""
    def emit(context, builder, signature, args):
        name = 'sched_yield'
        function = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(ir.IntType(32), []), name)
        builder.call(function, [])
        return context.get_dummy_value()
    return types.void(), emit


@helper
def meet(flags, rank, number, patience):
    """All ranks have come here.  patience: looks at a flag until the core is offered to others."""
    put(flags[rank], number)
    for r in range(len(flags)):
        looks = 0
        while raised(flags[r]) < number:
            looks += 1
            if looks > patience:
                give_way()
            else:
                breathe()
    keep(flags)


@helper
def add_parts(parts, flags, rank, number, x, patience):
    """See sum_parts."""
    n = x.size
    mine = floats(parts[rank], n)
    for i in range(n):
        mine[i] = x[i]
    meet(flags, rank, number, patience)
    first = floats(parts[0], n)
    for i in range(n):
        x[i] = first[i]
    for r in range(1, len(parts)):
        part = floats(parts[r], n)
        for i in range(n):
            x[i] += part[i]
    keep(parts)


@helper
def add_rooms(rooms, flags, rank, number, count, patience):
    """See sum_rooms."""
    ranks = len(rooms)
    first, last = count * rank // ranks, count * (rank + 1) // ranks
    meet(flags, rank, number, patience)
    total = floats(rooms[0] + 4 * first, last - first)
    for r in range(1, ranks):
        part = floats(rooms[r] + 4 * first, last - first)
        for i in range(last - first):
            total[i] += part[i]
    for r in range(1, ranks):
        part = floats(rooms[r] + 4 * first, last - first)
        for i in range(last - first):
            part[i] = total[i]
    meet(flags, rank, number + 1, patience)
    keep(rooms)


@kernel('void(i8[::1], i8[::1], i8, i8, f4[::1], i8)')
def sum_parts(parts, flags, rank, number, x, patience):
    """x summed over all ranks, in place.  parts, flags: addresses, of each rank; number: of this meeting, counting from 1."""
    add_parts(parts, flags, rank, number, x, patience)


@kernel('void(i8[::1], i8[::1], i8, i8, i8, i8)')
def sum_rooms(rooms, flags, rank, number, count, patience):
    """The first `count` float32 of all ranks' rooms, addresses, summed in place.  number: of the first of its two meetings."""
    add_rooms(rooms, flags, rank, number, count, patience)


SUMS = sum_parts, sum_rooms
