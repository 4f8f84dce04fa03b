"""All layers of a step of few tokens in one call: what model.decoder_layer does, without Python between its kernels.

In a small model a token of decode takes some milliseconds, of which a fourth (SmolLM2 in int8 on a Zen 3) went by between the
kernels: in 125 calls of Python functions for each layer, as cProfile counts them.  Here the same kernels follow each other,
called at their addresses, so that a result has the same bits either way, and little is compiled twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tpmpi.config import ModelConfig
from tpmpi.kernels.alignment import LINE, aligned
from tpmpi.kernels.jit import address_of, helper, kernel
from tpmpi.kernels.meeting import add_parts, add_rooms
from tpmpi.kernels.rows import floats, halves, octets
from tpmpi.kernels.tiles import I64, LANES, keep

QKV, OUT, UP, DOWN = range(4)  # matrices of a layer: W^Q W^K W^V, W^B, W^C, W^D
DATA, PANELS, PANEL_BYTES, OUTPUTS, PRODUCT, BIAS = range(6)  # of each: addresses, but for the middle ones; a bias of 0 is none
MLP_NORM, NEXT_NORM, Q_NORM, K_NORM = range(4)  # gains of a layer, addresses; 0: there is none
ROPE_APPEND, ATTEND, ADD_NORM, GATED, NORM_HEADS = range(5)  # kernels, addresses
# numbers of a step; THREADS of products and attention, FEW of all else
BLOCK, WINDOW, SINKS, HEADS, HEAD_DIM, ACTIVATION, THREADS, FEW = range(8)
CLOCK_MONOTONIC = 1


@dataclass(frozen=True)
class Tables:
    """Where the weights and the cache of a rank lie, and the kernels for a number of rows."""

    matrices: np.ndarray  # [layers, 4, 6]
    gains: np.ndarray  # [layers, 4]
    cache: np.ndarray  # [layers, 2] addresses of K and V
    shape: np.ndarray  # [2, 3] of both
    kernels: np.ndarray  # [5] addresses
    run: Callable  # layers_float32 or layers_bfloat16


def usual(config: ModelConfig) -> bool:
    """Whether the layers of such a model are what is computed here."""
    return (config.norm == 'rms' and not config.norm_bias and config.pre_norm and not config.post_norm and config.residual
            and config.residual_multiplier == 1 and config.gated and not config.num_experts and not config.parallel_block
            and config.qk_norm in ('none', 'head') and not config.qk_norm_bias and not config.query_growth)


def matrices_of(layer) -> tuple:
    """The matrices of a usual layer, a model_shard.LayerShard, with their biases, in the order of the tables."""
    return layer.qkv, layer.attn_out, layer.mlp.up, layer.mlp.down


def tables_of(model, cache, products, kernels) -> Tables:
    """The tables of a model_shard.ModelShard and a kv_cache.KVCache, which must outlive them.

    products: [layers][4] kernels; kernels: the others, as far as there are any; all are ready.
    """
    matrices, gains = np.zeros((len(model.layers), 4, 6), np.int64), np.zeros((len(model.layers), 4), np.int64)
    for i, layer in enumerate(model.layers):
        for j, dense in enumerate(matrices_of(layer)):
            w, bias = dense.weight, 0 if dense.bias is None else _address(dense.bias)
            matrices[i, j] = _address(w.data), *w.data.shape, w.out_features, address_of(products[i][j]), bias
        norms = [layer.mlp_norm, layer.next_norm, layer.q_norm, layer.k_norm]
        gains[i] = [0 if norm is None else _address(norm.gain) for norm in norms]
    arrays = cache.layers[0].k, cache.layers[0].v
    return Tables(matrices, gains, np.array([[_address(layer.k), _address(layer.v)] for layer in cache.layers], np.int64),
                  np.array([array.shape for array in arrays], np.int64), np.array(list(map(address_of, kernels)), np.int64),
                  COMPILED[kv_dtype_of(cache)])


def kv_dtype_of(cache) -> str:
    """The element type of a cache."""
    return 'float32' if cache.layers[0].k.dtype == np.float32 else 'bfloat16'


def _address(array: np.ndarray) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data


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
def norm_heads(kernel, qkv, first, heads, dim, gain, nothing, eps):
    """Some heads of the fused projection through an RMS norm each."""
    call(kernel, (qkv.ctypes.data + 4 * first * dim, 4 * qkv.shape[1], qkv.shape[0], heads, dim, False, floats(gain, heads * dim),
                  nothing, eps))
    keep(qkv)


@helper
def after(address, count):
    """The next whole line behind so many float32."""
    return address + -(-4 * count // LINE) * LINE


@helper
def all_reduce(x, parts, rooms, turn, flags, rank, number, patience):
    """x, small, or a rank's room of this turn, summed over the ranks, in place; returns the number of the last meeting."""
    if len(flags) == 1:
        return number
    if rooms.size:
        add_rooms(rooms[turn], flags, rank, number + 1, x.size, patience)
        return number + 2
    add_parts(parts[(number + 1) % 2], flags, rank, number + 1, x.reshape(x.size), patience)
    return number + 1


@helper
def add_bias(y, address):
    """y += bias, where there is one."""
    if address:
        bias = floats(address, y.shape[1])
        for t in range(y.shape[0]):
            for k in range(y.shape[1]):
                y[t, k] += bias[k]


def _layers(cached):
    """layers(…) over a cache whose numbers the view `cached` sees."""
    @helper
    def layers(first, last, x, a, c, e, matrices, gains, cache, kernels, shape, cos, sin, turned, slots, groups, table, blocks,
               numbers, scale, cap, eps, parts, rooms, flags, rank, number, patience):
        tokens, hidden, heads, dim = x.shape[0], x.shape[1], numbers[HEADS], numbers[HEAD_DIM]
        threads, few = numbers[THREADS], numbers[FEW]
        wide, ffn, spent = matrices[0, QKV, OUTPUTS], matrices[0, UP, OUTPUTS] // 2, 0
        room = aligned(4 * tokens * (wide + 2 * heads * dim + 3 * ffn + 5 * LANES))
        at = room.ctypes.data
        qkv, at = floats(at, tokens * wide).reshape(tokens, wide), after(at, tokens * wide)
        q, at = floats(at, tokens * heads * dim).reshape(tokens, heads, dim), after(at, tokens * heads * dim)
        b, at = floats(at, tokens * heads * dim).reshape(tokens, heads, dim), after(at, tokens * heads * dim)
        gate_up, at = floats(at, tokens * 2 * ffn).reshape(tokens, 2 * ffn), after(at, tokens * 2 * ffn)
        d = floats(at, tokens * ffn).reshape(tokens, ffn)
        joined, nothing = b.reshape(tokens, heads * dim), room[:0].view(np.float32)
        for stage in range(first, last):
            i = stage // 2
            if stage % 2 == 0:
                if i > 0:
                    add_bias(e, matrices[i - 1, DOWN, BIAS])
                    call(kernels[ADD_NORM], (c, e, floats(gains[i - 1, NEXT_NORM], hidden), eps, a, few))  # e += c, and A
                if i == len(matrices):
                    break
                w = matrices[i]
                product(a, w[QKV], qkv, threads)  # Q, K, V  [tokens, (heads + 2 kv_heads)/n * head_dim]
                add_bias(qkv, w[QKV, BIAS])
                if gains[i, Q_NORM]:
                    norm_heads(kernels[NORM_HEADS], qkv, 0, heads, dim, gains[i, Q_NORM], nothing, eps)
                    norm_heads(kernels[NORM_HEADS], qkv, heads, shape[0, 0], dim, gains[i, K_NORM], nothing, eps)
                k = cached(cache[i, 0], shape[0, 0] * shape[0, 1] * shape[0, 2]).reshape(shape[0, 0], shape[0, 1], shape[0, 2])
                v = cached(cache[i, 1], shape[1, 0] * shape[1, 1] * shape[1, 2]).reshape(shape[1, 0], shape[1, 1], shape[1, 2])
                call(kernels[ROPE_APPEND], (qkv, cos, sin, turned, slots, q, k, v, few))  # Q turned; K, V into the ring
                call(kernels[ATTEND], (q, k, v, groups, table, blocks, numbers[BLOCK], numbers[WINDOW], scale, cap,
                                       numbers[SINKS], b, threads))  # B  [tokens, heads/n, head_dim]
                product(joined, w[OUT], c, threads)  # C, this rank's part
                begin = nanoseconds()
                number = all_reduce(c, parts, rooms, 0, flags, rank, number, patience)  # C, whole
            else:
                w, before = matrices[i], x if i == 0 else e
                add_bias(c, w[OUT, BIAS])
                call(kernels[ADD_NORM], (before, c, floats(gains[i, MLP_NORM], hidden), eps, a, few))  # c += x, and A of the MLP
                product(a, w[UP], gate_up, threads)
                add_bias(gate_up, w[UP, BIAS])
                call(kernels[GATED], (gate_up, numbers[ACTIVATION], d, few))  # D  [tokens, ffn/n]
                product(d, w[DOWN], e, threads)  # E, this rank's part
                begin = nanoseconds()
                number = all_reduce(e, parts, rooms, 1, flags, rank, number, patience)  # E, whole
            spent += nanoseconds() - begin
        keep(room)
        return spent

    return layers


_float32, _bfloat16 = _layers(floats), _layers(halves)
LAYERS = ('i8(i8, i8, f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], i8[:, :, ::1], i8[:, ::1], i8[:, ::1], i8[::1], '
          'i8[:, ::1], f4[:, ::1], f4[:, ::1], b1, i8[::1], i8[:, ::1], i8[:, ::1], i8[::1], i8[::1], f4, f4, f4, i8[:, ::1], '
          'i8[:, ::1], i8[::1], i8, i8, i8)')


@kernel(LAYERS)
def layers_float32(first, last, x, a, c, e, matrices, gains, cache, kernels, shape, cos, sin, turned, slots, groups, table,
                   blocks, numbers, scale, cap, eps, parts, rooms, flags, rank, number, patience):
    """The stages first … last - 1: of layer i, 2 i gives C and 2 i + 1 gives E; the one behind the last layer gives the head's A.

    x, a, c, e: [tokens, hidden] what A is the norm of, A, C and E; the first two are those of the first layer at the beginning.
    matrices, gains, cache, kernels: see Tables.  shape: [2, 3] of a layer's K and V.  cos, sin, turned, slots: see rope_append.
    groups, table, blocks, scale, cap: see attend.  parts, rooms: [2, ranks], or no rooms where sums are small, flags, rank,
    patience: see meeting.py; one flag where sums are the caller's, after a stage.  number: of the last meeting.  Returns the
    nanoseconds that sums took.
    """
    return _float32(first, last, x, a, c, e, matrices, gains, cache, kernels, shape, cos, sin, turned, slots, groups, table,
                    blocks, numbers, scale, cap, eps, parts, rooms, flags, rank, number, patience)


@kernel(LAYERS)
def layers_bfloat16(first, last, x, a, c, e, matrices, gains, cache, kernels, shape, cos, sin, turned, slots, groups, table,
                    blocks, numbers, scale, cap, eps, parts, rooms, flags, rank, number, patience):
    """The same with a cache of bfloat16."""
    return _bfloat16(first, last, x, a, c, e, matrices, gains, cache, kernels, shape, cos, sin, turned, slots, groups, table,
                     blocks, numbers, scale, cap, eps, parts, rooms, flags, rank, number, patience)


COMPILED = {'float32': layers_float32, 'bfloat16': layers_bfloat16}
