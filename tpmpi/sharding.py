"""Who owns what: query heads, KV heads, ffn columns, vocabulary rows, at any number of ranks.

This is the only place that divides.  Computing asks `shard(config, rank, size)`; reading the model file asks
`rank_rows(spec, shard)`.  Both follow from the same three units, none of which is ever cut:

* the query head.  9 heads on 2 ranks are 5 + 4, and a rank holds the KV heads that its query heads read, so a KV head
  may be held on both sides of a boundary (one of them, the lower rank, counts it where a sum runs over all KV heads);
* the ffn block, `config.ffn_block` columns.  Ranks with fewer heads get more blocks, so that all have equal work;
* the vocabulary block, VOCAB_BLOCK rows of the embedding and of the head.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from tpmpi.config import VOCAB_BLOCK, ModelConfig
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
    blocks = split_ffn(config, size)[rank]
    block = config.ffn_block
    vocab = split(-(-config.vocab_size // VOCAB_BLOCK), size, rank)
    return Shard(
        rank, size, heads, kv_heads, owned, blocks,
        range(min(blocks.start * block, config.ffn_size), min(blocks.stop * block, config.ffn_size)),
        range(min(vocab.start * VOCAB_BLOCK, config.vocab_size), min(vocab.stop * VOCAB_BLOCK, config.vocab_size)))


def split_ffn(config: ModelConfig, size: int) -> list[range]:
    """Runs of ffn blocks such that attention and MLP weights together are as even over the ranks as whole blocks allow.

    Each block goes to the rank with the fewest weights so far; the runs are then laid out in the order of ranks.
    """
    block_weights = (3 if config.gated else 2) * config.ffn_block
    loads = []
    for rank in range(size):
        heads = split(config.num_heads, size, rank)
        kv_heads = -(-heads.stop // config.heads_per_kv_head) - heads.start // config.heads_per_kv_head if heads else 0
        loads.append((2 * (len(heads) + kv_heads) * config.head_dim, rank))
    heapq.heapify(loads)
    counts = [0] * size
    for _ in range(config.num_ffn_blocks):
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
        if not self.is_matrix:
            return f'{self.rows}; on every rank'
        name = self.letter + ' transposed, ' * self.transposed + ', ' * (not self.transposed) if self.letter else ''
        return f'{name}rows: {self.rows}; columns: hidden; ranks split the rows by {self.sharded}'


def tensor_specs(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor that a model of this configuration has, by its path in the file, in the order of the data."""
    hidden, ffn, dim = config.hidden_size, config.ffn_size, config.head_dim
    q_rows, kv_rows = config.num_heads * dim, config.num_kv_heads * dim
    specs = [TensorSpec('embedding', 'A', (config.vocab_size, hidden), 'token id', VOCAB, VOCAB_BLOCK)]

    def norm(name):
        if config.norm == 'rms':
            specs.append(TensorSpec(name, '', (hidden,), 'gain of the RMS norm per hidden column', REPLICATED, hidden))

    for i in range(config.num_layers):
        at = f'layers/{i}/'
        norm(at + 'attn_norm')
        specs += [
            TensorSpec(at + 'q', 'W^Q', (q_rows, hidden), 'query head * head_dim', QUERY_HEADS, dim),
            TensorSpec(at + 'k', 'W^K', (kv_rows, hidden), 'KV head * head_dim', KV_HEADS, dim),
            TensorSpec(at + 'v', 'W^V', (kv_rows, hidden), 'KV head * head_dim', KV_HEADS, dim),
            TensorSpec(at + 'attn_out', 'W^B', (q_rows, hidden), 'query head * head_dim', QUERY_HEADS, dim, True)]
        if not config.parallel_block:
            norm(at + 'mlp_norm')
        if config.gated:
            specs.append(TensorSpec(at + 'gate', 'W^C', (ffn, hidden), 'ffn column', FFN, config.ffn_block))
        specs += [
            TensorSpec(at + 'up', 'W^C', (ffn, hidden), 'ffn column', FFN, config.ffn_block),
            TensorSpec(at + 'down', 'W^D', (ffn, hidden), 'ffn column', FFN, config.ffn_block, True)]
    norm('final_norm')
    if not config.tie_embeddings:
        specs.append(TensorSpec('head', '', (config.vocab_size, hidden), 'token id', VOCAB, VOCAB_BLOCK))
    return {s.name: s for s in specs}


def target_kind(spec: TensorSpec, kind: str, asked: str | None) -> str:
    """How a tensor of some kind is kept where `asked` is wanted of all matrices; None: as it is, as far as it fits.

    What does not fit becomes bfloat16 where that is asked for, and float32, without loss, where nothing is.  Vectors are
    float32: they are small, and every rank holds them.
    """
    if not spec.is_matrix:
        return 'float32'
    if spec.fits(asked or kind):
        return asked or kind
    return 'bfloat16' if asked else 'float32'


def rank_rows(spec: TensorSpec, shard: Shard) -> range:
    """The rows (axis 0) of a stored tensor that a rank reads."""
    if spec.sharded == REPLICATED:
        return range(spec.shape[0])
    if spec.sharded == FFN:
        return shard.ffn
    if spec.sharded == VOCAB:
        return shard.vocab
    heads = shard.heads if spec.sharded == QUERY_HEADS else shard.kv_heads
    return range(heads.start * spec.unit, heads.stop * spec.unit)
