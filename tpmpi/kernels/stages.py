"""What the stages of layers.py are made of: kernels called at their addresses, and the little that is between them.

Where a layer's weights lie, and which kernels it needs, is in tables of integers, by the names below.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tpmpi.kernels.jit import helper, kernel
from tpmpi.kernels.rows import floats, octets
from tpmpi.kernels.tiles import I64, keep

# matrices of a layer: W^Q W^K W^V, W^B, W^C, W^D; a mixture has the last two of each expert, what chooses, and a shared expert
QKV, OUT, UP, DOWN, ROUTER, SHARED_UP, SHARED_DOWN = range(7)
DATA, PANELS, PANEL_BYTES, OUTPUTS, PRODUCT, BIAS = range(6)  # of each: addresses, but for the middle ones; 0: there is none
ATTN_POST_NORM, MLP_NORM, MLP_POST_NORM, NEXT_NORM, Q_NORM, K_NORM = range(6)  # norms of a layer
GAIN, GAIN_BIAS = range(2)  # of each: addresses; 0: there is none
ROPE, GROUP = range(2)  # where a layer belongs; a rope of -1 is none
COS, SIN, ROTARY_DIM = range(3)  # of a rope: two addresses, and numbers of a head that it turns
WINDOW, SINKS = range(2)  # of a group
ROPE_APPEND, ATTEND, NORM, ADD_NORM, ACTIVATE, NORM_HEADS, EXPERTS, ROUTE, SORT, COMBINE = range(10)  # kernels, addresses
# numbers of a step; THREADS of products and attention, FEW of rows of all else, OF_EXPERTS of theirs
(BLOCK, RANKS, HEADS, HEAD_DIM, LAYER_NORM, GATED, PARALLEL, ACTIVATION, PER_TOKEN, NORMALIZE, THREADS, FEW,
 OF_EXPERTS) = range(13)
SCALE, CAP, EPS, FACTOR = range(4)  # reals of a step: of scores, and 0 where they have no cap; of norms; of C and E
CLOCK_MONOTONIC = 1


@intrinsic
def call(typing_context, address, arguments):
    """Calls the kernel whose machine code begins at an address, as jit.address_of gives it, with a tuple of arguments.

    An error, as of memory, is one of the caller.
    """
    def emit(context, builder, signature, args):
        kinds, calls = signature.args[1].types, context.call_conv
        values = [builder.extract_value(args[1], i) for i in range(len(kinds))]
        function = builder.inttoptr(args[0], calls.get_function_type(types.none, kinds).as_pointer())
        status, _ = calls.call_function(builder, function, types.none, kinds, values)
        with cgutils.if_unlikely(builder, status.is_error):
            calls.return_status_propagate(builder, status)
        return context.get_dummy_value()
    return types.void(types.int64, arguments), emit


@intrinsic
def nanoseconds(typing_context):
    """Of a clock that only moves on: clock_gettime(2)."""
    def emit(context, builder, signature, args):
        name, clock, pair = 'clock_gettime', ir.IntType(32), ir.ArrayType(I64, 2)
        function = builder.module.globals.get(name) or ir.Function(
            builder.module, ir.FunctionType(clock, [clock, pair.as_pointer()]), name)
        place = cgutils.alloca_once(builder, pair)
        builder.call(function, [clock(CLOCK_MONOTONIC), place])
        seconds, rest = (builder.extract_value(builder.load(place), i) for i in (0, 1))
        return builder.add(builder.mul(seconds, I64(10**9)), rest)
    return types.int64(), emit


@helper
def product(x, matrix, y, threads):
    """y = x · W."""
    w = octets(matrix[DATA], matrix[PANELS] * matrix[PANEL_BYTES]).reshape(matrix[PANELS], matrix[PANEL_BYTES])
    call(matrix[PRODUCT], (x, w, y, threads))


@helper
def norm_heads(kernel, qkv, first, heads, dim, layer, weights, eps):
    """Some heads of the fused projection through a norm each."""
    call(kernel, (qkv.ctypes.data + 4 * first * dim, 4 * qkv.shape[1], qkv.shape[0], heads, dim, layer,
                  floats(weights[GAIN], heads * dim), floats(weights[GAIN_BIAS], heads * dim if weights[GAIN_BIAS] else 0), eps))
    keep(qkv)


@helper
def norm(kernels, x, layer, weights, eps, y, threads):
    """y = the norm of x."""
    hidden = x.shape[1]
    gain = floats(weights[GAIN], hidden)
    if layer:
        call(kernels[NORM], (x, gain, floats(weights[GAIN_BIAS], hidden if weights[GAIN_BIAS] else 0), eps, y, threads))
    else:
        call(kernels[NORM], (x, gain, eps, y, threads))


@helper
def add_norm(kernels, before, part, factor, layer, weights, eps, a, threads):
    """part = before + factor * part, and a = its norm."""
    if factor != 1:
        for t in range(part.shape[0]):
            for k in range(part.shape[1]):
                part[t, k] *= factor
    if layer:
        add(part, before)
        norm(kernels, part, layer, weights, eps, a, threads)
    else:
        call(kernels[ADD_NORM], (before, part, floats(weights[GAIN], part.shape[1]), eps, a, threads))


@helper
def add(y, x):
    """y += x."""
    for t in range(y.shape[0]):
        for k in range(y.shape[1]):
            y[t, k] += x[t, k]


@helper
def mlp(a, up, down, wide, d, e, kernels, activation, threads, few):
    """E = D · W^D, this rank's part.  up, down: of the matrices; wide, d: room for what W^C gives, and D."""
    product(a, up, wide, threads)
    add_bias(wide, up[BIAS])
    call(kernels[ACTIVATE], (wide, activation, d, few))  # D  [tokens, ffn/n]
    product(d, down, e, threads)


@helper
def add_bias(y, address):
    """y += bias, where there is one."""
    if address:
        bias = floats(address, y.shape[1])
        for t in range(y.shape[0]):
            for k in range(y.shape[1]):
                y[t, k] += bias[k]


@helper
def of_experts(x, starts, matrix, y, threads):
    """y = each row of x times its expert's W."""
    experts = len(starts) - 1
    w = octets(matrix[DATA], experts * matrix[PANELS] * matrix[PANEL_BYTES])
    call(matrix[PRODUCT], (x, starts, w.reshape(experts, matrix[PANELS], matrix[PANEL_BYTES]), y, threads))


@kernel('void(f4[:, ::1], i8[:, ::1], i8[::1], i8[::1], f4[:, ::1])')
def expert_parts(a, w, kernels, numbers, parts):
    """A part of the sum E, and beside it a one for each expert that a token is sent to: model.expert_parts for few tokens.

    a: [tokens, hidden]; w: the matrices of a mixture; parts: [tokens, hidden + experts], the result.
    """
    tokens, hidden, threads, few = a.shape[0], a.shape[1], numbers[THREADS], numbers[FEW]
    experts, count = parts.shape[1] - hidden, numbers[PER_TOKEN]
    scores, choice = np.empty((tokens, experts), np.float32), np.empty((tokens, count), np.int64)
    shares, starts = np.empty((tokens, count), np.float32), np.zeros(experts + 1, np.int64)
    places, weights = np.empty(tokens * count, np.int64), np.empty(tokens * count, np.float32)
    product(a, w[ROUTER], scores, threads)
    call(kernels[ROUTE], (scores, numbers[NORMALIZE] != 0, choice, shares))
    call(kernels[SORT], (choice, shares, starts, places, weights))
    rows, upper, ffn = tokens * count, w[UP, OUTPUTS], w[UP, OUTPUTS] // 2
    x, e = np.empty((rows, hidden), np.float32), np.zeros((tokens, hidden), np.float32)
    for row in range(rows):
        for k in range(hidden):
            x[row, k] = a[places[row], k]
    wide, d, y = np.empty((rows, upper), np.float32), np.empty((rows, ffn), np.float32), np.empty((rows, hidden), np.float32)
    of_experts(x, starts, w[UP], wide, threads)
    call(kernels[ACTIVATE], (wide, numbers[ACTIVATION], d, numbers[OF_EXPERTS]))  # D  [rows, expert_ffn/n]
    of_experts(d, starts, w[DOWN], y, threads)
    call(kernels[COMBINE], (y, places, weights, e, threads))
    if w[SHARED_UP, DATA]:
        upper, ffn, shared = w[SHARED_UP, OUTPUTS], w[SHARED_UP, OUTPUTS] // 2, np.empty((tokens, hidden), np.float32)
        mlp(a, w[SHARED_UP], w[SHARED_DOWN], np.empty((tokens, upper), np.float32), np.empty((tokens, ffn), np.float32), shared,
            kernels, numbers[ACTIVATION], threads, few)
        add(e, shared)
    for t in range(tokens):
        for k in range(hidden):
            parts[t, k] = e[t, k]
        for k in range(experts):
            parts[t, hidden + k] = 0
        for i in range(count):
            parts[t, hidden + choice[t, i]] = 1


@helper
def take_whole(parts, ranks, e):
    """E from the sum of all parts; returns whether some ranks chose an expert and others did not."""
    hidden, disputed = e.shape[1], False
    for t in range(e.shape[0]):
        for k in range(hidden):
            e[t, k] = parts[t, k]
        for k in range(hidden, parts.shape[1]):
            disputed |= parts[t, k] != 0 and parts[t, k] != ranks
    return disputed
