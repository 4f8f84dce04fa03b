"""The model: embedding, layers, logits, on one rank's shard.  This file is the diagram.

Everything here is the same on every rank except the shapes with a divisor (`heads/n`, `ffn/n`), which are that rank's
part.  The kernels (`ops`) and the communicator (`comm`) arrive as arguments; the only places that communicate are the
lines that say `comm.all_reduce`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from tpmpi.config import ModelConfig
from tpmpi.kv_cache import KVCache, LayerCache, Segment
from tpmpi.sharding import Shard, TensorSpec, rank_rows, target_kind, tensor_specs
from tpmpi.weights import Weight, decode, recode

READ_BYTES = 2 << 20  # a matrix is read and packed in pieces of this size, so that no second copy of it ever exists


@dataclass(frozen=True)
class LayerShard:
    """One layer's weights on this rank.  Norm gains are [hidden], on every rank, or None where the model has none."""

    attn_norm: Any
    qkv: Weight  # W^Q, W^K, W^V side by side  [hidden] -> [(heads + 2 kv_heads)/n * head_dim]
    attn_out: Weight  # W^B  [heads/n * head_dim] -> [hidden]
    mlp_norm: Any
    up: Weight  # W^C, gate and up side by side where gated  [hidden] -> [ffn/n or 2 ffn/n]
    down: Weight  # W^D  [ffn/n] -> [hidden]


@dataclass(frozen=True)
class ModelShard:
    """All weights of this rank."""

    config: ModelConfig
    shard: Shard
    embedding: Weight  # this rank's rows of the vocabulary
    layers: tuple[LayerShard, ...]
    final_norm: Any
    head: Weight  # the embedding itself where they are tied
    query_groups: tuple[range, ...]  # for each KV head held here, the query heads of this rank that read it
    window: int | None  # how far attention looks back: the model's window, or a shorter one that the run chose

    @property
    def bytes_per_token(self) -> int:
        """Weight bytes that this rank reads to decode one token."""
        matrices = [w for layer in self.layers for w in (layer.qkv, layer.attn_out, layer.up, layer.down)]
        return self.head.nbytes + sum(w.nbytes for w in matrices)

    @property
    def nbytes(self) -> int:
        """Weight bytes that this rank holds."""
        return self.bytes_per_token + (0 if self.head is self.embedding else self.embedding.nbytes)


@dataclass(frozen=True)
class Step:
    """The tokens that are computed at once, of one request or of several."""

    tokens: Any  # [tokens] ids
    positions: Any  # [tokens] each one's place in its request
    segments: tuple[Segment, ...]  # which rows belong together
    slots: Any  # [tokens] where K and V go

    @staticmethod
    def of(tokens: np.ndarray, segments: tuple[Segment, ...]) -> Step:
        """A step from token ids and their segments, in the order of the rows."""
        positions = [np.arange(s.start, s.start + len(s.slots)) for s in segments]
        return Step(tokens, np.concatenate(positions), segments, np.concatenate([s.slots for s in segments]))


def forward(step: Step, model: ModelShard, cache: KVCache, ops, comm):
    """One step through all layers.  Returns the hidden states before the head, [tokens, hidden], on every rank."""
    config = model.config
    x = ops.embed(step.tokens, model.embedding, model.shard.vocab)  # [tokens, hidden], zeros where others own the token
    comm.all_reduce(x)  # the vocabulary-parallel embedding, whole
    rope = ops.rope_table(step.positions, config.head_dim, config.rope_theta) if config.rope_theta else None
    block = parallel_layer if config.parallel_block else decoder_layer
    for layer, layer_cache in zip(model.layers, cache.layers, strict=True):
        x = block(x, layer, layer_cache, step, rope, model, ops, comm)
    return norm(x, model.final_norm, config, ops)


def decoder_layer(x, layer: LayerShard, cache: LayerCache, step: Step, rope, model: ModelShard, ops, comm):
    """One transformer layer on this rank's shard.  x: [tokens, hidden], the same on every rank, before and after."""
    config = model.config
    a = norm(x, layer.attn_norm, config, ops)  # A  [tokens, hidden]
    c = attention(a, layer, cache, step, rope, model, ops)  # C, this rank's part
    comm.all_reduce(c)  # C, whole
    x = added(x, c, config)
    a = norm(x, layer.mlp_norm, config, ops)  # [tokens, hidden]
    e = mlp(a, layer, config, ops)  # E, this rank's part
    comm.all_reduce(e)  # E, whole
    return added(x, e, config)


def parallel_layer(x, layer: LayerShard, cache: LayerCache, step: Step, rope, model: ModelShard, ops, comm):
    """A layer whose attention and MLP read the same A: C and E are summed first, and one all-reduce serves both."""
    config = model.config
    a = norm(x, layer.attn_norm, config, ops)  # A  [tokens, hidden]
    c = attention(a, layer, cache, step, rope, model, ops)  # C, this rank's part
    e = mlp(a, layer, config, ops)  # E, this rank's part
    c += e
    comm.all_reduce(c)  # C + E, whole
    return added(x, c, config)


def attention(a, layer: LayerShard, cache: LayerCache, step: Step, rope, model: ModelShard, ops):
    """This rank's heads.  [tokens, hidden] -> [tokens, hidden], a part of the sum C."""
    heads, head_dim = len(model.shard.heads), model.config.head_dim
    qkv = ops.linear(a, layer.qkv)  # Q, K, V  [tokens, (heads + 2 kv_heads)/n * head_dim]
    q = ops.rope_append(qkv, heads, head_dim, rope, cache, step.slots)  # Q turned; K, V into the ring
    b = ops.attend(q, cache, model.query_groups, step.segments, model.window)  # B  [tokens, heads/n * head_dim]
    return ops.linear(b, layer.attn_out)  # C, partial


def mlp(a, layer: LayerShard, config: ModelConfig, ops):
    """This rank's ffn columns.  [tokens, hidden] -> [tokens, hidden], a part of the sum E."""
    d = ops.linear(a, layer.up)  # through W^C
    if config.gated:
        d = ops.gated_activation(d, config.activation)  # D  [tokens, ffn/n]
    else:
        d = ops.activate(d, config.activation)  # D  [tokens, ffn/n]
    return ops.linear(d, layer.down)  # E, partial


def added(x, part, config: ModelConfig):
    """The residual sum, in place of `part`: a new array for it would take longer than the sum."""
    if config.residual:
        part += x
    return part


def norm(x, gain, config: ModelConfig, ops):
    """The model's norm, or x itself where the model has none."""
    return x if gain is None else ops.rms_norm(x, gain, config.norm_eps)


def logits(hidden, model: ModelShard, ops):
    """This rank's columns of the logits.  [tokens, hidden] -> [tokens, vocab/n]"""
    return ops.linear(hidden, model.head)


# ---- loading this rank's shard


def matrix_kinds(reader, weights: str | None = None) -> set[str]:
    """The kinds that a model's matrices have in memory; the arguments are load_model's."""
    specs = tensor_specs(reader.config).values()
    return {target_kind(spec, reader.kind(spec.name), weights) for spec in specs if spec.is_matrix}


def load_model(reader, shard: Shard, ops, context: int | None = None, verify: bool = False, xp=np,
               weights: str | None = None) -> ModelShard:
    """Read this rank's rows of every tensor straight into the kernels' layout.

    reader: a model file that is open (its `config`, `kind(name)` and `read_rows(name, rows, verify)`).
    context: positions that attention sees, at most; None sees all that the model sees.
    weights: the kind of all matrices that can have it (see sharding.target_kind); None: as in the file.
    """
    config = reader.config
    specs = tensor_specs(config)

    def matrix(*names: str) -> Weight:
        """The rows of one stored matrix, or of several side by side; one packed matrix for each run of equal kinds."""
        parts = [(specs[name], target_kind(specs[name], reader.kind(name), weights)) for name in names]
        return ops.join([packed([spec for spec, _ in run], kind) for kind, run in groupby(parts, lambda part: part[1])])

    def packed(parts: list[TensorSpec], kind: str) -> Weight:
        rows = [rank_rows(spec, shard) for spec in parts]
        letter = ' '.join(dict.fromkeys(spec.letter for spec in parts))
        weight = ops.new_weight(sum(map(len, rows)), config.hidden_size, parts[0].transposed, kind, letter, xp)
        at = 0
        for spec, run in zip(parts, rows, strict=True):
            for piece in pieces(run, spec.unit):
                stored = reader.read_rows(spec.name, piece, verify)
                try:
                    ops.fill(weight, at, recode(stored, kind))
                except ValueError as e:  # what the kind cannot hold
                    raise ValueError(f'tensor {spec.name} as {kind}: {e}') from e
                at += len(piece)
        return weight

    def pieces(rows: range, unit: int) -> Iterator[range]:
        step = unit * max(1, READ_BYTES // (4 * config.hidden_size * unit))  # whole units: no checksum and no group is cut
        return (rows[i:i + step] for i in range(0, len(rows), step))

    def gain(name: str):
        return xp.asarray(decode(reader.read_rows(name, range(*specs[name].shape), verify))) if name in specs else None

    embedding = matrix('embedding')
    head = embedding if config.tie_embeddings else matrix('head')
    layers = []
    for i in range(config.num_layers):
        at = f'layers/{i}/'
        up = (at + 'gate', at + 'up') if config.gated else (at + 'up',)
        layers.append(LayerShard(gain(at + 'attn_norm'), matrix(at + 'q', at + 'k', at + 'v'), matrix(at + 'attn_out'),
                                 gain(at + 'mlp_norm'), matrix(*up), matrix(at + 'down')))
    windows = [w for w in (config.window, context) if w is not None]
    return ModelShard(config, shard, embedding, tuple(layers), gain('final_norm'), head,
                      shard.query_groups(config), min(windows, default=None))
