"""Who owns what: query heads, KV heads, ffn columns, vocabulary rows, at any number of ranks.

This is the only place that divides.  Computing asks `shard(config, rank, size)`; reading the model file asks
`rank_rows(spec, shard)`.  Both follow from the same three units, none of which is ever cut:

* the query head.  9 heads on 2 ranks are 5 + 4, and a rank holds the KV heads that its query heads read, so a KV head
  may be held on both sides of a boundary (one of them, the lower rank, counts it where a sum runs over all KV heads);
* the ffn block, `config.ffn_block` columns.  Ranks with fewer heads get more blocks, so that all have equal work.  Every
  expert of a mixture is split like that, too: each rank has some columns of all experts, and none waits for another's;
* the vocabulary block, VOCAB_BLOCK rows of the embedding and of the head.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from tpmpi.config import VOCAB_BLOCK, ModelConfig, default_ffn_block
from tpmpi.weights import GROUP, fits


@dataclass(frozen=True)
class Shard:
    """One rank's part of the model.  Every range counts in global indices."""

    rank: int
    size: int
    heads: range  # query heads
    kv_heads: range  # the KV heads that those query heads read
    owned_kv_heads: range  # the part of kv_heads that this rank counts; over all ranks each KV head once
    ffn_blocks: range
    ffn: range  # columns of W^C
    expert_ffn: range  # columns of each expert's W^C
    shared_ffn: range  # columns of the shared expert's W^C
    vocab: range  # rows of the embedding and of the head

    def query_groups(self, config: ModelConfig) -> tuple[range, ...]:
        """For each KV head held here, the query heads of this rank that read it, counted from this rank's first one."""
        first, group = self.heads.start, config.heads_per_kv_head
        return tuple(
            range(max(kv * group, self.heads.start) - first, min((kv + 1) * group, self.heads.stop) - first)
            for kv in self.kv_heads)


def split(units: int, size: int, rank: int) -> range:
    """Units as even, contiguous runs: the first `units % size` ranks hold one more than the others."""
    each, more = divmod(units, size)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))


def shard(config: ModelConfig, rank: int, size: int) -> Shard:
    """The part of the model that `rank` of `size` ranks owns.  Ranks beyond the last unit own empty ranges."""
    if not 0 <= rank < size:
        raise ValueError(f'rank {rank} of {size} ranks; expected 0 to {size - 1}')
    group = config.heads_per_kv_head
    heads = split(config.num_heads, size, rank)
    kv_heads = range(heads.start // group, -(-heads.stop // group)) if heads else range(0)
    owned = range(-(-heads.start // group), kv_heads.stop) if heads else range(0)
    blocks, ffn = ffn_part(config, config.ffn_size, config.ffn_block, rank, size)
    _, expert_ffn = ffn_part(config, config.expert_ffn_size, default_ffn_block(config.expert_ffn_size), rank, size)
    _, shared_ffn = ffn_part(config, config.shared_ffn_size, default_ffn_block(config.shared_ffn_size), rank, size)
    vocab = split(-(-config.vocab_size // VOCAB_BLOCK), size, rank)
    return Shard(
        rank, size, heads, kv_heads, owned, blocks, ffn, expert_ffn, shared_ffn,
        range(min(vocab.start * VOCAB_BLOCK, config.vocab_size), min(vocab.stop * VOCAB_BLOCK, config.vocab_size)))


def ffn_part(config: ModelConfig, columns: int, block: int, rank: int, size: int) -> tuple[range, range]:
    """The blocks and the columns of a rank, of an MLP with so many."""
    blocks = split_ffn(config, -(-columns // block), block, size)[rank]
    return blocks, range(min(blocks.start * block, columns), min(blocks.stop * block, columns))


def split_ffn(config: ModelConfig, num_blocks: int, block: int, size: int) -> list[range]:
    """Runs of ffn blocks such that attention and MLP weights together are as even over the ranks as whole blocks allow.

    Each block goes to the rank with the fewest weights so far; the runs are then laid out in the order of ranks.  Of
    experts those that a token reads count.
    """
    block_weights = (3 if config.gated else 2) * block * max(1, config.experts_per_token)
    loads = []
    for rank in range(size):
        heads = split(config.num_heads, size, rank)
        kv_heads = -(-heads.stop // config.heads_per_kv_head) - heads.start // config.heads_per_kv_head if heads else 0
        loads.append((2 * (len(heads) + kv_heads) * config.head_dim, rank))
    heapq.heapify(loads)
    counts = [0] * size
    for _ in range(num_blocks):
        load, rank = loads[0]
        counts[rank] += 1
        heapq.heapreplace(loads, (load + block_weights, rank))
    runs, start = [], 0
    for count in counts:
        runs.append(range(start, start + count))
        start += count
    return runs


# ---- the tensors of the model, and which rows of each a rank reads

REPLICATED = 'replicated'  # on every rank
QUERY_HEADS, KV_HEADS, FFN, VOCAB = 'query heads', 'KV heads', 'ffn columns', 'vocabulary'
EXPERT_FFN, SHARED_FFN = 'ffn columns of each expert', 'ffn columns of the shared expert'
POSITIONS = 'positions'


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the model file: its whole shape as stored, sharded axis first."""

    name: str  # path in the file
    letter: str  # its place in the diagram
    shape: tuple[int, ...]  # as stored
    rows: str  # what axis 0 counts, in words
    sharded: str  # what axis 0 is split by, or REPLICATED
    unit: int  # rows of axis 0 that stay together
    transposed: bool = False  # stored [in, out], because the contraction axis is the sharded one
    exact: bool = False  # never rounded: small, and much hangs on it

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2

    @property
    def group_axis(self) -> int:
        """The contraction axis, along which the groups of the integer kinds run."""
        return 0 if self.transposed else 1

    def fits(self, kind: str) -> bool:
        """Whether the tensor can be of a kind such that no rank's boundary cuts a group."""
        return fits((math.gcd(*self.shape[:1], self.unit), *self.shape[1:]), kind, self.group_axis)

    def why_not(self, kind: str) -> str:
        """The reason where it does not fit."""
        if not self.is_matrix:
            return 'a vector'
        if not self.transposed:
            return f'{self.shape[1]} columns, no multiple of {GROUP}'
        if math.gcd(self.shape[0], self.unit) % GROUP:
            return f'its {self.shape[0]} rows are split in units of {self.unit}, not in multiples of {GROUP}'
        return f'{self.shape[1]} columns, an odd number'

    @property
    def meaning(self) -> str:
        """What a stranger must know to use the stored numbers."""
        split = 'on every rank' if self.sharded == REPLICATED else f'ranks split the rows by {self.sharded}'
        if not self.is_matrix:
            return f'{self.rows}; {split}'
        name = self.letter + ' transposed, ' * self.transposed + ', ' * (not self.transposed) if self.letter else ''
        return f'{name}rows: {self.rows}; columns: hidden; {split}'


def tensor_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor that a model of this configuration has, by its path in the file, in the order of the data."""
    hidden, positions = config.hidden_size, config.learned_positions
    specs = [TensorSpec('embedding', 'A', (config.vocab_size, hidden), 'token id', VOCAB, VOCAB_BLOCK)]
    if positions:
        specs.append(TensorSpec('position_embedding', 'A', (positions, hidden), 'position', POSITIONS, VOCAB_BLOCK, exact=True))
    for i in range(config.num_layers):
        specs += layer_specs(config, i)
    specs += _norm_specs(config, 'final_norm')
    if not config.tie_embeddings:
        specs.append(TensorSpec('head', '', (config.vocab_size, hidden), 'token id', VOCAB, VOCAB_BLOCK))
    if config.head_bias:
        specs.append(TensorSpec('head_bias', '', (config.vocab_size,), 'added to the logit of each token id', VOCAB, VOCAB_BLOCK))
    return {s.name: s for s in specs}


def layer_specs(config: ModelConfig, layer: int) -> list[TensorSpec]:
    """The tensors of one layer."""
    at, hidden, dim = f'layers/{layer}/', config.hidden_size, config.head_dim
    query = config.num_heads * dim, 'query head * head_dim', QUERY_HEADS
    kv = config.num_kv_heads * dim, 'KV head * head_dim', KV_HEADS
    specs = _norm_specs(config, at + 'attn_norm') if config.pre_norm else []
    for name, letter, (rows, words, sharded) in (('q', 'W^Q', query), ('k', 'W^K', kv), ('v', 'W^V', kv)):
        specs.append(TensorSpec(at + name, letter, (rows, hidden), words, sharded, dim))
        if config.qkv_bias:
            specs.append(TensorSpec(f'{at}{name}_bias', letter, (rows,), f'added to each {words}', sharded, dim))
    for name, (rows, words, sharded) in (('q_norm', query), ('k_norm', kv)):
        if config.qk_norm != 'none':
            specs.append(TensorSpec(at + name, '', (rows,), f'gain of the norm per {words}', sharded, dim))
        if config.qk_norm != 'none' and config.qk_norm_bias:
            specs.append(TensorSpec(f'{at}{name}_bias', '', (rows,), f'bias of the norm per {words}', sharded, dim))
    specs.append(TensorSpec(at + 'attn_out', 'W^B', (query[0], hidden), query[1], QUERY_HEADS, dim, True))
    if config.attn_out_bias:
        specs.append(_hidden_bias(at + 'attn_out_bias', 'C', hidden))
    specs += _norm_specs(config, at + 'attn_post_norm') if config.post_norm else []
    if config.pre_norm and (not config.parallel_block or config.parallel_mlp_norm):
        specs += _norm_specs(config, at + 'mlp_norm')
    if config.has_experts(layer):
        specs.append(TensorSpec(at + 'router', '', (config.num_experts, hidden), 'expert', REPLICATED, 1, exact=True))
        for expert in range(config.num_experts):
            specs += _mlp_specs(config, f'{at}experts/{expert}/', config.expert_ffn_size, EXPERT_FFN)
        if config.shared_ffn_size:
            specs += _mlp_specs(config, at + 'shared/', config.shared_ffn_size, SHARED_FFN)
        if config.shared_gate:
            specs.append(TensorSpec(at + 'shared/gate_by_token', '', (1, hidden), 'one', REPLICATED, 1, exact=True))
    else:
        specs += _mlp_specs(config, at, config.ffn_size, FFN)
    return specs + (_norm_specs(config, at + 'mlp_post_norm') if config.post_norm else [])


def _norm_specs(config: ModelConfig, name: str) -> list[TensorSpec]:
    """Gain and bias of a norm, where the model has them."""
    hidden, specs = config.hidden_size, []
    if config.norm != 'none':
        words = 'gain of the RMS norm per hidden column' if config.norm == 'rms' else 'gain of the layer norm per hidden column'
        specs.append(TensorSpec(name, '', (hidden,), words, REPLICATED, hidden))
    if config.norm == 'layer' and config.norm_bias:
        specs.append(TensorSpec(name + '_bias', '', (hidden,), 'bias of the layer norm per hidden column', REPLICATED, hidden))
    return specs


def _hidden_bias(name: str, letter: str, hidden: int) -> TensorSpec:
    """A bias of what an all-reduce completes: added once, after it."""
    return TensorSpec(name, letter, (hidden,), f'added to each hidden column of {letter}, once', REPLICATED, hidden)


def _mlp_specs(config: ModelConfig, at: str, ffn: int, sharded: str) -> list[TensorSpec]:
    """W^C and W^D of an MLP with so many columns."""
    hidden, specs = config.hidden_size, []
    unit = config.ffn_block if sharded == FFN else default_ffn_block(ffn)
    for name in ('gate', 'up') if config.gated else ('up',):
        specs.append(TensorSpec(at + name, 'W^C', (ffn, hidden), 'ffn column', sharded, unit))
        if config.mlp_bias:
            specs.append(TensorSpec(f'{at}{name}_bias', 'W^C', (ffn,), 'added to each ffn column', sharded, unit))
    specs.append(TensorSpec(at + 'down', 'W^D', (ffn, hidden), 'ffn column', sharded, unit, True))
    if config.mlp_bias:
        specs.append(_hidden_bias(at + 'down_bias', 'E', hidden))
    return specs


def target_kind(spec: TensorSpec, kind: str, asked: str | None, float16: bool = False) -> str:
    """How a tensor of some kind is kept where `asked` is wanted of all matrices; None: as it is, as far as it fits.

    What does not fit becomes bfloat16 where that is asked for, and float32, without loss, where nothing is.  Vectors and
    routers are float32: they are small, and every rank holds them.  float16: whether that can be kept, as in a file and by
    the kernels of a GPU; float32 takes its place, without loss, where it cannot.
    """
    if not spec.is_matrix or spec.exact:
        return 'float32'
    if (asked or kind) == 'float16' and not float16:
        return 'float32'
    if spec.fits(asked or kind):
        return asked or kind
    return 'bfloat16' if asked else 'float32'


def rank_rows(spec: TensorSpec, shard: Shard) -> range:
    """The rows (axis 0) of a stored tensor that a rank reads."""
    if spec.sharded == REPLICATED:
        return range(spec.shape[0])
    if spec.sharded in (QUERY_HEADS, KV_HEADS):
        heads = shard.heads if spec.sharded == QUERY_HEADS else shard.kv_heads
        return range(heads.start * spec.unit, heads.stop * spec.unit)
    if spec.sharded == POSITIONS:
        part = split(-(-spec.shape[0] // spec.unit), shard.size, shard.rank)
        return range(min(part.start * spec.unit, spec.shape[0]), min(part.stop * spec.unit, spec.shape[0]))
    return {FFN: shard.ffn, EXPERT_FFN: shard.expert_ffn, SHARED_FFN: shard.shared_ffn, VOCAB: shard.vocab}[spec.sharded]
