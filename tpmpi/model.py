"""The model: embedding, layers, logits, on one rank's shard.  This file is the diagram.

Everything here is the same on every rank except the shapes with a divisor (`heads/n`, `ffn/n`), which are that rank's
part.  The kernels (`ops`) and the communicator (`comm`) arrive as arguments; the only places that communicate are the
lines that say `comm.all_reduce`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from tpmpi.config import ModelConfig
from tpmpi.kv_cache import KVCache, LayerCache, Segment
from tpmpi.model_shard import MLP, Experts, LayerShard, ModelShard, Norm


@dataclass(frozen=True)
class Step:
    """The tokens that are computed at once, of one request or of several."""

    tokens: np.ndarray  # [tokens] ids, on the host as all that decides what a step is
    positions: np.ndarray  # [tokens] each one's place in its request
    segments: tuple[tuple[Segment, ...], ...]  # which rows belong together, for each group of layers
    slots: tuple[np.ndarray, ...]  # [tokens] where K and V go, for each group of layers
    growth: np.ndarray | None = None  # [tokens] how much larger the scores of queries are, where the model lets them grow
    counts: list | None = None  # of each mixture, the ranks that chose each expert, where the host would wait for a look at it

    @staticmethod
    def of(tokens: np.ndarray, *segments: tuple[Segment, ...]) -> Step:
        """A step from token ids and, for each group of layers, their segments, in the order of the rows."""
        positions = np.concatenate([np.arange(s.start, s.start + len(s.slots)) for s in segments[0]])
        return Step(tokens, positions, segments, tuple(np.concatenate([s.slots for s in group]) for group in segments))

    @property
    def lengths(self) -> np.ndarray:
        """[tokens] of the text that each one stands in, as far as it goes or is known to go."""
        known = np.repeat([s.length for s in self.segments[0]], [len(s.slots) for s in self.segments[0]])
        return np.maximum(known, self.positions + 1)


def forward(step: Step, model: ModelShard, cache: KVCache, ops, comm, layers: Callable | None = None):
    """One step through all layers.  Returns the hidden states before the head, [tokens, hidden], on every rank.

    layers: what computes them; `all_layers` by default.
    """
    if model.config.query_growth:
        step = replace(step, growth=grown(step.positions, model.config))
    layers = layers or all_layers
    if not hasattr(ops, 'upload'):
        return layers(step, model, cache, ops, comm)
    ops.upload(step, model)  # to a device goes what the host has decided, in one copy
    quick = replace(step, counts=[])
    hidden = layers(quick, model, cache, ops, comm)
    if quick.counts and differ(ops.namespace(hidden).concatenate(quick.counts), comm.size).any().item():
        return all_layers(step, model, cache, ops, comm)  # once more, to the same slots; a look in each layer would cost more
    return hidden


def all_layers(step: Step, model: ModelShard, cache: KVCache, ops, comm):
    """The embedding and every layer.  Returns the hidden states before the head, [tokens, hidden], on every rank."""
    config = model.config
    x, ropes = embedded(step, model, ops, comm)
    block = parallel_layer if config.parallel_block else decoder_layer
    a = norm(x, model.first_norm, config, ops)  # A  [tokens, hidden]
    for layer, layer_cache in zip(model.layers, cache.layers, strict=True):
        rope = None if layer.rope is None else ropes[layer.rope]
        x, a = block(x, a, layer, layer_cache, step, rope, model, ops, comm)
    return a


def embedded(step: Step, model: ModelShard, ops, comm):
    """What the first layer takes, [tokens, hidden], on every rank, and the tables of the model's ropes."""
    config = model.config
    x = ops.embed(step.tokens, model.embedding, model.shard.vocab)  # [tokens, hidden], zeros where others own the token
    if model.position_embedding is not None:
        x += ops.embed(step.positions, model.position_embedding, model.positions)
    comm.all_reduce(x)  # the vocabulary-parallel embedding, whole
    if config.embedding_multiplier != 1:
        x *= np.float32(config.embedding_multiplier)
    return x, [ops.rope_table(step.positions, step.lengths if rope.by_length else None, rope) for rope in model.ropes]


def decoder_layer(x, a, layer: LayerShard, cache: LayerCache, step: Step, rope, model: ModelShard, ops, comm):
    """One transformer layer on this rank's shard.  x, and A, its norm: [tokens, hidden], the same on every rank.

    Returns x behind the layer, and its norm: the next layer's A.
    """
    config = model.config
    c = attention(a, layer, cache, step, rope, model, ops, comm)  # C, this rank's part
    comm.all_reduce(c)  # C, whole
    c = biased(c, layer.attn_out.bias)
    x, a = added(x, norm(c, layer.attn_post_norm, config, ops), layer.mlp_norm, config, ops)
    if isinstance(layer.mlp, Experts):
        e = mixture(a, layer.mlp, step, config, ops, comm)  # E, whole
    else:
        e = mlp(a, layer.mlp, config, ops, comm.room(a.shape))  # E, this rank's part
        comm.all_reduce(e)  # E, whole
        e = biased(e, layer.mlp.down.bias)
    return added(x, norm(e, layer.mlp_post_norm, config, ops), layer.next_norm, config, ops)


def parallel_layer(x, a, layer: LayerShard, cache: LayerCache, step: Step, rope, model: ModelShard, ops, comm):
    """A layer whose attention and MLP read the same x: C and E are summed first, and one all-reduce serves both."""
    config = model.config
    c = attention(a, layer, cache, step, rope, model, ops, comm)  # C, this rank's part
    e = mlp(norm(x, layer.mlp_norm, config, ops) if layer.mlp_norm else a, layer.mlp, config, ops)  # E, this rank's part
    c += e
    comm.all_reduce(c)  # C + E, whole
    return added(x, biased(biased(c, layer.attn_out.bias), layer.mlp.down.bias), layer.next_norm, config, ops)


def attention(a, layer: LayerShard, cache: LayerCache, step: Step, rope, model: ModelShard, ops, comm):
    """This rank's heads.  [tokens, hidden] -> [tokens, hidden], a part of the sum C."""
    config, heads, group = model.config, len(model.shard.heads), model.groups[layer.group]
    qkv = biased(ops.linear(a, layer.qkv.weight), layer.qkv.bias)  # Q, K, V  [tokens, (heads + 2 kv_heads)/n * head_dim]
    if config.qk_norm != 'none':
        qk_norm(qkv, layer, model, ops, comm)
    q = ops.rope_append(qkv, heads, config.head_dim, rope, cache, step.slots[layer.group])  # Q turned; K, V into the ring
    if step.growth is not None:
        q *= ops.asarray(step.growth)[:, None, None]
    b = ops.attend(q, cache, model.query_groups, step.segments[layer.group], group.window, config.scores_scale,
                   config.attention_softcap, group.sinks)  # B  [tokens, heads/n * head_dim]
    return ops.linear(b, layer.attn_out.weight, comm.room(a.shape))  # C, partial


def grown(positions, config: ModelConfig) -> np.ndarray:
    """How much larger the scores of queries are at positions beyond the first query_growth_positions.  [tokens]"""
    return (1 + config.query_growth * np.log(1 + positions // config.query_growth_positions)).astype(np.float32)


def qk_norm(qkv, layer: LayerShard, model: ModelShard, ops, comm) -> None:
    """Q and K through their norms, in place: each head by itself, or over all heads of all ranks."""
    config, shard, dim = model.config, model.shard, model.config.head_dim
    queries, keys = len(shard.heads) * dim, len(shard.kv_heads) * dim
    runs = range(queries), range(queries, queries + keys)
    if config.qk_norm == 'head':
        for run, heads, part in zip(runs, (shard.heads, shard.kv_heads), (layer.q_norm, layer.k_norm), strict=True):
            ops.norm_heads(qkv[:, run.start:run.stop], len(heads), dim, config.norm, part.gain, part.bias, config.norm_eps)
        return
    skipped = (len(shard.kv_heads) - len(shard.owned_kv_heads)) * dim  # of K, columns that the rank before counts
    squares = ops.head_squares(qkv, (runs[0], runs[1][skipped:]))  # [tokens, 2], this rank's part
    comm.all_reduce(squares)  # over all heads
    for run, heads, i, part in ((runs[0], config.num_heads, 0, layer.q_norm), (runs[1], config.num_kv_heads, 1, layer.k_norm)):
        factor = 1 / (squares[:, i] / np.float32(heads * dim) + np.float32(config.norm_eps)) ** np.float32(0.5)
        ops.scale_columns(qkv, run, factor, part.gain)


def mlp(a, weights: MLP, config: ModelConfig, ops, room=None):
    """This rank's ffn columns.  [tokens, hidden] -> [tokens, hidden], a part of the sum E, in the room for it."""
    if config.gated and weights.up.bias is None:
        d = ops.gated_linear(a, weights.up.weight, config.activation)  # D  [tokens, ffn/n], through W^C
    else:
        d = biased(ops.linear(a, weights.up.weight), weights.up.bias)  # through W^C
        d = (ops.gated_activation if config.gated else ops.activate)(d, config.activation)  # D  [tokens, ffn/n]
    return ops.linear(d, weights.down.weight, room)  # E, partial


def mixture(a, weights: Experts, step: Step, config: ModelConfig, ops, comm):
    """The experts that each token is sent to, and the shared one.  [tokens, hidden] -> [tokens, hidden], E, whole.

    Every rank chooses by itself, and computes its columns of each chosen expert.  CPUs or GPUs of different kinds can differ
    in the last bit and so in a choice; the all-reduce of E counts the choices, too, and where not all agree rank 0's counts.
    step.counts: where they are noted, for a look at the end of the step, and not acted upon.
    """
    xp, hidden = ops.namespace(a), a.shape[1]
    scores = ops.linear(a, weights.router)  # [tokens, experts]
    choice, shares = ops.route(scores, config.experts_per_token, config.normalize_experts)  # [tokens, k] both
    parts = expert_parts(a, choice, shares, weights, config, ops)  # E, this rank's part, and choices
    comm.all_reduce(parts)  # E, whole, and how many ranks chose each expert
    whole, counts = xp.ascontiguousarray(parts[:, :hidden]), parts[:, hidden:]
    if comm.size == 1:
        return whole
    if step.counts is not None:
        step.counts.append(counts.copy())  # and not a view, which would keep E
        return whole
    rows = xp.flatnonzero(differ(counts, comm.size).any(axis=1))  # the same on every rank, as the sums are
    if len(rows):
        agreed = choice[rows], shares[rows]
        for array in agreed:
            comm.broadcast(array)
        again = expert_parts(a[rows], *agreed, weights, config, ops)
        comm.all_reduce(again)  # E of the tokens in dispute
        whole[rows] = again[:, :hidden]
    return whole


def differ(counts, ranks: int):
    """Where some ranks chose an expert and others did not.  [tokens, experts], how many did -> the same shape"""
    return (counts != 0) & (counts != ranks)


def expert_parts(a, choice, shares, weights: Experts, config: ModelConfig, ops):
    """A part of the sum E, and beside it a one for each expert that a token is sent to.  [tokens, hidden + experts]"""
    xp = ops.namespace(a)
    e = ops.experts(a, choice, shares, weights.up, weights.down, config.activation)
    if weights.shared is not None:
        shared = mlp(a, weights.shared, config, ops)
        e += shared if weights.shared_gate is None else shared * ops.sigmoid(ops.linear(a, weights.shared_gate))
    chosen = xp.zeros((len(a), config.num_experts), xp.float32)
    chosen[xp.arange(len(a))[:, None], choice] = 1
    return xp.concatenate((e, chosen), axis=1)


def biased(y, bias):
    """y + bias, in place, where there is one."""
    if bias is not None:
        y += bias
    return y


def added(x, part, weights: Norm | None, config: ModelConfig, ops):
    """The residual sum, in place of `part`, and its norm: a new array for the sum would take longer than the sum."""
    if config.residual_multiplier != 1:
        part *= np.float32(config.residual_multiplier)
    if config.residual and weights is not None:
        return part, ops.added_norm(x, part, config.norm, weights.gain, weights.bias, config.norm_eps)
    if config.residual:
        part += x
    return part, norm(part, weights, config, ops)


def norm(x, weights: Norm | None, config: ModelConfig, ops):
    """The model's norm, or x itself where the model has none."""
    if weights is None:
        return x
    if config.norm == 'layer':
        return ops.layer_norm(x, weights.gain, weights.bias, config.norm_eps)
    return ops.rms_norm(x, weights.gain, config.norm_eps)


def logits(hidden, model: ModelShard, ops):
    """This rank's columns of the logits.  [tokens, hidden] -> [tokens, vocab/n]"""
    config = model.config
    y = biased(ops.linear(hidden, model.head.weight), model.head.bias)
    if config.logit_multiplier != 1:
        y *= np.float32(config.logit_multiplier)
    if config.logit_softcap is not None:
        y = ops.softcap(y, config.logit_softcap)
    return y
