"""The weights of a rank: which part of each tensor it holds, and how that is read.

Everything here is the same on every rank except the shapes with a divisor (`heads/n`, `ffn/n`), which are that rank's
part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from tpmpi.config import ModelConfig, Rope
from tpmpi.kv_cache import LayerGroup, layer_groups
from tpmpi.sharding import Shard, TensorSpec, rank_rows, target_kind, tensor_specs
from tpmpi.weights import Weight, decode, recode

READ_BYTES = 2 << 20  # a matrix is read and packed in pieces of this size, so that no second copy of it ever exists


@dataclass(frozen=True)
class Norm:
    """Gain and bias of a norm, or None where the model has none; on every rank."""

    gain: Any
    bias: Any = None


@dataclass(frozen=True)
class Dense:
    """A matrix with the bias that is added to what it gives, or None."""

    weight: Weight
    bias: Any = None


@dataclass(frozen=True)
class MLP:
    """W^C and W^D."""

    up: Dense  # W^C, gate and up side by side where gated  [hidden] -> [ffn/n or 2 ffn/n]
    down: Dense  # W^D  [ffn/n] -> [hidden]


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: some columns of each.  up, down: one Weight of all, see the kernels' `new_experts`."""

    router: Weight  # [hidden] -> [experts], on every rank
    up: Weight  # each one's W^C
    down: Weight  # each one's W^D
    shared: MLP | None  # serves every token
    shared_gate: Weight | None  # [hidden] -> [1]


@dataclass(frozen=True)
class LayerShard:
    """One layer's weights on this rank, and where it belongs."""

    qkv: Dense  # W^Q, W^K, W^V side by side  [hidden] -> [(heads + 2 kv_heads)/n * head_dim]
    q_norm: Norm | None  # [heads/n * head_dim]
    k_norm: Norm | None  # [kv_heads/n * head_dim]
    attn_out: Dense  # W^B  [heads/n * head_dim] -> [hidden]
    attn_post_norm: Norm | None
    mlp_norm: Norm | None
    mlp: MLP | Experts
    mlp_post_norm: Norm | None
    next_norm: Norm | None  # of the layer that follows, before its attention, or of the head
    rope: int | None  # which of the model's
    group: int  # which of the model's: how far it looks back, and where its part of the cache is

    @property
    def matrices(self) -> list[Weight]:
        """Those that every token needs, of experts all."""
        if isinstance(self.mlp, MLP):
            return [self.qkv.weight, self.attn_out.weight, self.mlp.up.weight, self.mlp.down.weight]
        shared = [self.mlp.shared.up.weight, self.mlp.shared.down.weight] if self.mlp.shared else []
        shared += [self.mlp.shared_gate] if self.mlp.shared_gate else []
        return [self.qkv.weight, self.attn_out.weight, self.mlp.router, self.mlp.up, self.mlp.down, *shared]


@dataclass(frozen=True)
class ModelShard:
    """All weights of this rank."""

    config: ModelConfig
    shard: Shard
    embedding: Weight  # this rank's rows of the vocabulary
    position_embedding: Weight | None  # this rank's rows of it
    positions: range  # which these are
    first_norm: Norm | None  # before the first layer's attention
    layers: tuple[LayerShard, ...]
    head: Dense  # the embedding itself where they are tied
    ropes: tuple[Rope, ...]
    query_groups: tuple[range, ...]  # for each KV head held here, the query heads of this rank that read it
    groups: tuple[LayerGroup, ...]  # of layers that look back equally far

    @property
    def bytes_per_token(self) -> int:
        """Weight bytes that this rank reads to decode one token; of experts those that one token goes to."""
        total = self.head.weight.nbytes + sum(w.nbytes for layer in self.layers for w in layer.matrices)
        experts = [layer.mlp for layer in self.layers if isinstance(layer.mlp, Experts)]
        unread = 1 - self.config.experts_per_token / max(1, self.config.num_experts)
        return total - round(unread * sum(w.nbytes for mlp in experts for w in (mlp.up, mlp.down)))

    @property
    def nbytes(self) -> int:
        """Weight bytes that this rank holds."""
        tables = [self.head.weight] + [w for w in (self.embedding, self.position_embedding) if w is not None]
        matrices = {id(w): w for w in tables} | {id(w): w for layer in self.layers for w in layer.matrices}
        return sum(w.nbytes for w in matrices.values())


def matrix_kinds(reader, weights: str | None = None) -> set[str]:
    """The kinds that a model's matrices have in a CPU's memory; the arguments are load_model's."""
    specs = tensor_specs(reader.config).values()
    return {target_kind(spec, reader.kind(spec.name), weights) for spec in specs if spec.is_matrix}


def view(window: int | None, context: int | None, sinks: int) -> tuple[int | None, int]:
    """How far a layer looks back in this run, and how many first tokens it sees besides: where the context limits it."""
    return (window, 0) if context is None or window is not None and window <= context else (context, sinks)


def load_model(reader, shard: Shard, ops, context: int | None = None, verify: bool = False, xp=np,
               weights: str | None = None, sinks: int = 0, meanwhile: Callable[[], object] = lambda: None) -> ModelShard:
    """Read this rank's rows of every tensor straight into the kernels' layout.

    reader: a model file that is open (its `config`, `kind(name)` and `read_rows(name, rows, verify)`).
    ops: the kernels; where they have no FLOAT16, matrices of float16 become float32, without loss.
    context: positions that attention sees, at most; None sees all that the model sees.
    sinks: first tokens that it sees besides, where the context is what limits it.
    weights: the kind of all matrices that can have it (see sharding.target_kind); None: as in the file.
    meanwhile: called after each piece of a matrix, a sign of life where the whole takes long.
    """
    config, float16 = reader.config, getattr(ops, 'FLOAT16', False)
    specs = tensor_specs(config)

    def kind_of(spec: TensorSpec) -> str:
        return target_kind(spec, reader.kind(spec.name), weights, float16)

    def matrix(*names: str) -> Weight:
        """The rows of one stored matrix, or of several side by side; one packed matrix for each run of equal kinds."""
        parts = [(specs[name], kind_of(specs[name])) for name in names]
        return ops.join([packed([spec for spec, _ in run], kind) for kind, run in groupby(parts, lambda part: part[1])])

    def packed(parts: list[TensorSpec], kind: str) -> Weight:
        rows = [rank_rows(spec, shard) for spec in parts]
        letter = ' '.join(dict.fromkeys(spec.letter for spec in parts))
        weight = ops.new_weight(sum(map(len, rows)), config.hidden_size, parts[0].transposed, kind, letter, xp)
        fill(weight, parts, kind)
        return weight

    def fill(weight: Weight, parts: list[TensorSpec], kind: str) -> None:
        rows, at = [rank_rows(spec, shard) for spec in parts], 0
        for spec, run in zip(parts, rows, strict=True):
            for piece in pieces(run, spec.unit):
                stored = reader.read_rows(spec.name, piece, verify)
                try:
                    ops.fill(weight, at, recode(stored, kind))
                except ValueError as e:  # what the kind cannot hold
                    raise ValueError(f'tensor {spec.name} as {kind}: {e}') from e
                at += len(piece)
                meanwhile()

    def experts(names: list[list[str]]) -> Weight:
        """The matrices of all experts, of one kind: float32, without loss, where theirs differ."""
        each = [[specs[name] for name in one] for one in names]
        kinds = {kind_of(spec) for one in each for spec in one}
        kind, rows = kinds.pop() if len(kinds) == 1 else 'float32', sum(len(rank_rows(spec, shard)) for spec in each[0])
        whole = ops.new_experts(len(each), rows, config.hidden_size, each[0][0].transposed, kind, each[0][0].letter, xp)
        for i, parts in enumerate(each):
            fill(ops.expert(whole, i), parts, kind)
        return whole

    def pieces(rows: range, unit: int) -> Iterator[range]:
        step = unit * max(1, READ_BYTES // (4 * config.hidden_size * unit))  # whole units: no checksum and no group is cut
        return (rows[i:i + step] for i in range(0, len(rows), step))

    def vector(*names: str):
        parts = [decode(reader.read_rows(name, rank_rows(specs[name], shard), verify)) for name in names if name in specs]
        return xp.asarray(np.concatenate(parts)) if parts else None

    def norm_of(name: str) -> Norm | None:
        return Norm(vector(name), vector(name + '_bias')) if name in specs else None

    def dense(*names: str) -> Dense:
        return Dense(matrix(*names), vector(*(name + '_bias' for name in names)))

    def mlp_of(at: str) -> MLP:
        return MLP(dense(*((at + 'gate', at + 'up') if config.gated else (at + 'up',))), dense(at + 'down'))

    def experts_of(at: str) -> Experts:
        each = [f'{at}experts/{i}/' for i in range(config.num_experts)]
        shared = mlp_of(at + 'shared/') if config.shared_ffn_size else None
        return Experts(chooser(at + 'router'), experts([[one + 'gate', one + 'up'] for one in each]),
                       experts([[one + 'down'] for one in each]), shared,
                       chooser(at + 'shared/gate_by_token') if config.shared_gate else None)

    def chooser(name: str) -> Weight:
        return replace(matrix(name), letter='E')  # its time counts there

    embedding = matrix('embedding')
    ropes = tuple(dict.fromkeys(rope for rope in map(config.layer_rope, range(config.num_layers)) if rope is not None))
    groups = layer_groups([view(config.layer_window(i), context, sinks) for i in range(config.num_layers)])
    group_of = {layer: number for number, group in enumerate(groups) for layer in group.layers}
    layers = []
    for i in range(config.num_layers):
        at = f'layers/{i}/'
        layers.append(LayerShard(
            dense(at + 'q', at + 'k', at + 'v'), norm_of(at + 'q_norm'), norm_of(at + 'k_norm'),
            dense(at + 'attn_out'), norm_of(at + 'attn_post_norm'), norm_of(at + 'mlp_norm'),
            experts_of(at) if config.has_experts(i) else mlp_of(at), norm_of(at + 'mlp_post_norm'),
            norm_of('final_norm' if i + 1 == config.num_layers else f'layers/{i + 1}/attn_norm'),
            None if config.layer_rope(i) is None else ropes.index(config.layer_rope(i)), group_of[i]))
    positions = rank_rows(specs['position_embedding'], shard) if config.learned_positions else range(0)
    return ModelShard(config, shard, embedding, matrix('position_embedding') if config.learned_positions else None, positions,
                      norm_of('layers/0/attn_norm'), tuple(layers),
                      Dense(embedding if config.tie_embeddings else matrix('head'), vector('head_bias')), ropes,
                      shard.query_groups(config), groups)
