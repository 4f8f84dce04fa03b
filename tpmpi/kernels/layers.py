"""All layers of a step of few tokens in one call: model.decoder_layer and parallel_layer without Python between their kernels.

In a small model a token of decode takes some milliseconds, of which a fourth (SmolLM2 in int8 on a Zen 3) went by between the
kernels: in 125 calls of Python functions for each layer, as cProfile counts them.  Here the same kernels follow each other,
called at their addresses, so that a result has the same bits either way, and little is compiled twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tpmpi.config import ModelConfig
from tpmpi.kernels.alignment import LINE, aligned
from tpmpi.kernels.jit import address_of, helper, inlined, kernel
from tpmpi.kernels.meeting import add_parts, add_rooms
from tpmpi.kernels.rows import floats, halves
from tpmpi.kernels.stages import (
    ACTIVATION,
    ATTEND,
    ATTN_POST_NORM,
    BIAS,
    BLOCK,
    CAP,
    COS,
    DATA,
    DOWN,
    EPS,
    EXPERTS,
    FACTOR,
    FEW,
    GAIN,
    GATED,
    GROUP,
    HEAD_DIM,
    HEADS,
    K_NORM,
    LAYER_NORM,
    MLP_NORM,
    MLP_POST_NORM,
    NEXT_NORM,
    NORM_HEADS,
    OUT,
    OUTPUTS,
    PARALLEL,
    Q_NORM,
    QKV,
    RANKS,
    ROPE,
    ROPE_APPEND,
    ROTARY_DIM,
    ROUTER,
    SCALE,
    SHARED_DOWN,
    SIN,
    SINKS,
    THREADS,
    UP,
    WINDOW,
    add,
    add_bias,
    add_norm,
    call,
    mlp,
    nanoseconds,
    norm,
    norm_heads,
    product,
    take_whole,
)
from tpmpi.kernels.tiles import keep


@dataclass(frozen=True)
class Tables:
    """Where the weights and the cache of a rank lie, and the kernels for a number of rows."""

    # matrices [layers, 7, 6], norms [layers, 6, 2], addresses of K and V [layers, 2], places [layers, 2], kernels [10], and the
    # shape of K and of V [2, 3]; see stages.py
    weights: tuple[np.ndarray, ...]
    run: Callable  # layers_float32 or layers_bfloat16


def usual(config: ModelConfig) -> bool:
    """Whether the layers of such a model are what is computed here."""
    of_layers = config.norm != 'none' and config.pre_norm and config.residual and config.qk_norm in ('none', 'head')
    parallel = config.parallel_block and (config.post_norm or config.num_experts)
    experts = config.num_experts and (not config.gated or config.shared_gate)
    return bool(of_layers and not parallel and not experts)


def stages_of(config: ModelConfig) -> int:
    """Sums of all layers, C and E of each, or both together; each is the end of a stage."""
    return config.num_layers * (1 if config.parallel_block else 2)


def mixtures_of(model_layers) -> frozenset[int]:
    """The stages that are mixtures of experts, whose sums hold choices besides."""
    return frozenset(2 * i + 1 for i, layer in enumerate(model_layers) if hasattr(layer.mlp, 'router'))


def matrices_of(layer) -> list[tuple]:
    """(Weight, bias or None) of each matrix of a usual layer, a model_shard.LayerShard, in the order of the tables."""
    def with_biases(*dense):
        return [(each.weight, each.bias) for each in dense]

    attention, of_mlp = with_biases(layer.qkv, layer.attn_out), layer.mlp
    if not hasattr(of_mlp, 'router'):
        return attention + with_biases(of_mlp.up, of_mlp.down)
    shared = with_biases(of_mlp.shared.up, of_mlp.shared.down) if of_mlp.shared else []
    return [*attention, (of_mlp.up, None), (of_mlp.down, None), (of_mlp.router, None), *shared]


def tables_of(model, cache, products, kernels) -> Tables:
    """The tables of a model_shard.ModelShard and a kv_cache.KVCache, which must outlive them.

    products: the kernel of each of `matrices_of` each layer; kernels: the others, None for what there is not.  All are ready.
    """
    matrices = np.zeros((len(model.layers), SHARED_DOWN + 1, 6), np.int64)
    norms = np.zeros((len(model.layers), 6, 2), np.int64)
    for i, layer in enumerate(model.layers):
        for j, (w, bias) in enumerate(matrices_of(layer)):
            matrices[i, j] = _address(w.data), *w.data.shape[-2:], w.out_features, address_of(products[i][j]), _address(bias)
        of_layer = layer.attn_post_norm, layer.mlp_norm, layer.mlp_post_norm, layer.next_norm, layer.q_norm, layer.k_norm
        for j, weights in enumerate(of_layer):
            norms[i, j] = (0, 0) if weights is None else (_address(weights.gain), _address(weights.bias))
    cached = np.array([[_address(layer.k), _address(layer.v)] for layer in cache.layers], np.int64)
    places = np.array([(-1 if layer.rope is None else layer.rope, layer.group) for layer in model.layers], np.int64)
    addresses = np.array([0 if kernel is None else address_of(kernel) for kernel in kernels], np.int64)
    shape = np.array([array.shape for array in cache.layers[0]], np.int64)
    return Tables((matrices, norms, cached, places, addresses, shape), COMPILED[kv_dtype_of(cache)])


def ropes_of(tables) -> np.ndarray:
    """(cos, sin) of each rope, both [tokens, rotary_dim], as the kernel takes them.  [ropes, 3]; they must outlive it."""
    return np.array([(_address(cos), _address(sin), cos.shape[1]) for cos, sin in tables], np.int64).reshape(-1, 3)


def kv_dtype_of(cache) -> str:
    """The element type of a cache."""
    return 'float32' if cache.layers[0].k.dtype == np.float32 else 'bfloat16'


def _address(array: np.ndarray | None) -> int:
    """0: there is none."""
    assert array is None or array.flags.c_contiguous
    return 0 if array is None else array.ctypes.data


@helper
def after(address, count):
    """The next whole line behind so many float32."""
    return address + -(-4 * count // LINE) * LINE


@helper
def all_reduce(x, sums, turn, number):
    """x, small, or a rank's room of this turn, summed over the ranks, in place; returns the number of the last meeting."""
    parts, rooms, flags, rank, patience = sums
    if len(flags) == 1:
        return number
    if rooms.size:
        add_rooms(rooms[turn], flags, rank, number + 1, x.size, patience)
        return number + 2
    add_parts(parts[(number + 1) % 2], flags, rank, number + 1, x.reshape(x.size), patience)
    return number + 1


def _layers(cached):
    """layers(…) over a cache whose numbers the view `cached` sees."""
    @helper
    def attention(a, i, weights, step, numbers, reals, qkv, q, b, c):
        """C, this rank's part, of the heads that it has; of layer i."""
        matrices, norms, cache, places, kernels, shape = weights
        ropes, slots, groups, tables, blocks, views, growth = step
        tokens, heads, dim, layer = q.shape[0], q.shape[1], q.shape[2], numbers[LAYER_NORM] != 0
        w, threads, few = matrices[i], numbers[THREADS], numbers[FEW]
        product(a, w[QKV], qkv, threads)  # Q, K, V  [tokens, (heads + 2 kv_heads)/n * head_dim]
        add_bias(qkv, w[QKV, BIAS])
        if norms[i, Q_NORM, GAIN]:
            norm_heads(kernels[NORM_HEADS], qkv, 0, heads, dim, layer, norms[i, Q_NORM], reals[EPS])
            norm_heads(kernels[NORM_HEADS], qkv, heads, shape[0, 0], dim, layer, norms[i, K_NORM], reals[EPS])
        k = cached(cache[i, 0], shape[0, 0] * shape[0, 1] * shape[0, 2]).reshape(shape[0, 0], shape[0, 1], shape[0, 2])
        v = cached(cache[i, 1], shape[1, 0] * shape[1, 1] * shape[1, 2]).reshape(shape[1, 0], shape[1, 1], shape[1, 2])
        turned, group, cos, sin = places[i, ROPE] >= 0, places[i, GROUP], qkv, qkv
        if turned:
            rope = ropes[places[i, ROPE]]
            cos = floats(rope[COS], tokens * rope[ROTARY_DIM]).reshape(tokens, rope[ROTARY_DIM])
            sin = floats(rope[SIN], tokens * rope[ROTARY_DIM]).reshape(tokens, rope[ROTARY_DIM])
        call(kernels[ROPE_APPEND], (qkv, cos, sin, turned, slots[group], q, k, v, few))  # Q turned; K, V into the ring
        if growth.size:
            for t in range(tokens):
                for head in range(heads):
                    for j in range(dim):
                        q[t, head, j] *= growth[t]
        call(kernels[ATTEND], (q, k, v, groups, tables[group], blocks, numbers[BLOCK], views[group, WINDOW], reals[SCALE],
                               reals[CAP], views[group, SINKS], b, threads))  # B  [tokens, heads/n, head_dim]
        product(b.reshape(tokens, heads * dim), w[OUT], c, threads)

    @inlined
    def layers(first, last, x, a, c, e, wide, streams, weights, step, numbers, reals, disputed, sums, number):
        matrices, norms, _, _, kernels, _ = weights
        tokens, hidden, heads, dim = x.shape[0], x.shape[1], numbers[HEADS], numbers[HEAD_DIM]
        threads, few, eps = numbers[THREADS], numbers[FEW], reals[EPS]
        activation, layer, parallel = numbers[ACTIVATION], numbers[LAYER_NORM] != 0, numbers[PARALLEL] != 0
        of_qkv, of_up, spent = matrices[0, QKV, OUTPUTS], 0, 0
        for i in range(len(matrices)):
            if not matrices[i, ROUTER, DATA]:
                of_up = matrices[i, UP, OUTPUTS]  # the same of all layers that are no mixtures
        ffn = of_up // 2 if numbers[GATED] else of_up
        room = aligned(4 * tokens * (of_qkv + 2 * heads * dim + of_up + ffn + 2 * hidden) + 7 * LINE)
        at = room.ctypes.data
        qkv, at = floats(at, tokens * of_qkv).reshape(tokens, of_qkv), after(at, tokens * of_qkv)
        q, at = floats(at, tokens * heads * dim).reshape(tokens, heads, dim), after(at, tokens * heads * dim)
        b, at = floats(at, tokens * heads * dim).reshape(tokens, heads, dim), after(at, tokens * heads * dim)
        up, at = floats(at, tokens * of_up).reshape(tokens, of_up), after(at, tokens * of_up)
        d, at = floats(at, tokens * ffn).reshape(tokens, ffn), after(at, tokens * ffn)
        own, at = floats(at, tokens * hidden).reshape(tokens, hidden), after(at, tokens * hidden)
        beside = floats(at, tokens * hidden).reshape(tokens, hidden)
        for stage in range(first, last):
            turn, stream = stage % 2, x
            here, there = (c, e) if turn == 0 else (e, c)  # the sum of this stage, and that of the one before
            if stage > 0:
                i = stage - 1 if parallel else (stage - 1) // 2
                of_mlp, before = parallel or turn == 0, x
                if of_mlp and matrices[i, ROUTER, DATA] and take_whole(wide, numbers[RANKS], there):
                    disputed[0] = 1
                if parallel or not of_mlp:
                    add_bias(there, matrices[i, OUT, BIAS])
                if of_mlp:
                    add_bias(there, matrices[i, DOWN, BIAS])
                stream = there
                if len(streams):
                    stream = streams[1 - turn]
                    norm(kernels, there, layer, norms[i, MLP_POST_NORM if of_mlp else ATTN_POST_NORM], eps, stream, few)
                if stage > 1:
                    before = streams[turn] if len(streams) else here
                then = norms[i, NEXT_NORM if of_mlp else MLP_NORM]
                add_norm(kernels, before, stream, reals[FACTOR], layer, then, eps, a, few)  # A
            i = stage if parallel else stage // 2
            if i == len(matrices):
                break
            if parallel or turn == 0:
                attention(a, i, weights, step, numbers, reals, qkv, q, b, here)  # C, this rank's part
            if turn == 1 and matrices[i, ROUTER, DATA]:
                call(kernels[EXPERTS], (a, matrices[i], kernels, numbers, wide))  # E, this rank's part, and choices
                here = wide
            elif parallel or turn == 1:
                given, part = a, beside if parallel else here
                if parallel and norms[i, MLP_NORM, GAIN]:
                    given = own
                    norm(kernels, stream, layer, norms[i, MLP_NORM], eps, own, few)
                mlp(given, matrices[i, UP], matrices[i, DOWN], up, d, part, kernels, activation, threads, few)  # E, likewise
            if parallel:
                add(here, beside)  # C + E, this rank's part
            begin = nanoseconds()
            number = all_reduce(here, sums, turn, number)  # C, E or both, whole
            spent += nanoseconds() - begin
        keep(room)
        return spent

    return layers


_float32, _bfloat16 = _layers(floats), _layers(halves)
WEIGHTS = 'Tuple((i8[:, :, ::1], i8[:, :, ::1], i8[:, ::1], i8[:, ::1], i8[::1], i8[:, ::1]))'
STEP = 'Tuple((i8[:, ::1], i8[:, ::1], i8[:, ::1], i8[:, :, ::1], i8[::1], i8[:, ::1], f4[::1]))'
MEETING = 'Tuple((i8[:, ::1], i8[:, ::1], i8[::1], i8, i8))'
LAYERS = (f'i8(i8, i8, f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[:, :, ::1], {WEIGHTS}, {STEP}, i8[::1], '
          f'f4[::1], i8[::1], {MEETING}, i8)')


@kernel(LAYERS)
def layers_float32(first, last, x, a, c, e, wide, streams, weights, step, numbers, reals, disputed, sums, number):
    """The stages first … last - 1: of layer i, 2 i gives C and 2 i + 1 gives E, or i both; behind the last comes the head's A.

    x, a: [tokens, hidden] what A is the norm of, and A, both of the first layer at the beginning.  c, e: [tokens, hidden] the
    sums, in turn.  wide: [tokens, hidden + experts] the sums of mixtures.  streams: [2, tokens, hidden] where sums have norms
    of their own, else none.  weights: of Tables.  step: ropes (see ropes_of), slots [groups of layers, tokens] (see
    rope_append), groups, tables [groups of layers, segments, 7], blocks (see attend), views [groups of layers, 2], growth
    [tokens] or empty (see model.grown).  numbers, reals: see stages.py.  disputed: [1], set to 1 where ranks choose other
    experts.  sums: parts and rooms, [2, ranks], or no rooms where sums are small, flags, rank, patience (see meeting.py); one
    flag where sums are the caller's, after a stage.  number: of the last meeting.  Returns the nanoseconds that sums took.
    """
    return _float32(first, last, x, a, c, e, wide, streams, weights, step, numbers, reals, disputed, sums, number)


@kernel(LAYERS)
def layers_bfloat16(first, last, x, a, c, e, wide, streams, weights, step, numbers, reals, disputed, sums, number):
    """The same with a cache of bfloat16."""
    return _bfloat16(first, last, x, a, c, e, wide, streams, weights, step, numbers, reals, disputed, sums, number)


COMPILED = {'float32': layers_float32, 'bfloat16': layers_bfloat16}
