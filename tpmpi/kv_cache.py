"""The KV cache of a rank: one pool of blocks, and for each request a ring of block numbers.

Position p of a request lies in block `ring[(p // block) mod len(ring)]`, slot `p mod block`.  Nothing is moved: an entry
that no longer fits gives way to a new one, oldest first.  Where the first tokens stay visible, their blocks are pinned and
the others go round.

Layers that look back equally far form groups of equal size, and a request has one ring for each group: a layer with a
window keeps its window only, whatever its neighbours keep.  All groups take their blocks from the same pool, because a block
of one group is as large as a block of another: the i-th layer of each group lives in the i-th array.

An array is [kv_heads/n, blocks, block, head_dim], heads first, so that the keys of a head in consecutive blocks are one
matrix and need no copy.  A rank holds its own KV heads only.  How the numbers of a head lie within the array is the kernel
set's business (its `new_cache`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tpmpi.config import ModelConfig
from tpmpi.sharding import Shard

ROWS_PER_TILE = 128  # queries that attend together: short enough that causality saves nearly half of a prefill's work
MOST_PADDING = 0.1  # of the pool: what groups of unequal size may waste


class LayerCache(NamedTuple):
    """One layer's K and V.  Each [kv_heads/n, slots, head_dim] in the kernels' layout, float32 or the bits of bfloat16."""

    k: Any
    v: Any


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share the numbers of their blocks: they look back equally far."""

    layers: tuple[int, ...]
    window: int | None  # positions that they see, at most
    sinks: int = 0  # first positions that they see besides


def layer_groups(views: Sequence[tuple[int | None, int]]) -> tuple[LayerGroup, ...]:
    """Groups of equal size of layers with equal (window, sinks); the last of each kind may be smaller.

    The size is the largest that leaves at most a tenth of the pool unused: few groups, few rings for each request.
    """
    kinds: dict[tuple[int | None, int], list[int]] = {}
    for layer, view in enumerate(views):
        kinds.setdefault(view, []).append(layer)

    def padded(size):  # layers that the pool would have room for
        return sum(-(-len(layers) // size) * size for layers in kinds.values())

    size = next(size for size in range(len(views), 0, -1) if padded(size) <= (1 + MOST_PADDING) * len(views))
    return tuple(LayerGroup(tuple(layers[at:at + size]), *view)
                 for view, layers in kinds.items() for at in range(0, len(layers), size))


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one request in a step: where they stand in it, where they go, and what they can see."""

    rows: slice  # of the step's tokens
    start: int  # position of the first of them
    ring: Ring
    slots: np.ndarray  # [rows] where the cache keeps each one's K and V
    length: int = 0  # of the text at least, for a RoPE that depends on it

    @property
    def stop(self) -> int:
        """The position after the last one."""
        return self.start + len(self.slots)

    @property
    def oldest(self) -> int:
        """The first position that the ring still holds when these tokens are in it; of the pinned ones none counts."""
        capacity = self.ring.capacity
        return 0 if self.stop <= capacity else self.stop - capacity + self.ring.pinned * self.ring.block

    def tiles(self, window: int | None, sinks: int, max_scores: int
              ) -> Iterator[tuple[slice, slice | np.ndarray, int, np.ndarray | None]]:
        """Runs of rows with the keys that they can see: rows of the step, slots, number of keys, hidden [rows, keys] or None.

        A run is so short that rows * keys stays under max_scores, where one row allows.
        """
        count, oldest = len(self.slots), self.oldest
        each = max(1, min(ROWS_PER_TILE, max_scores // max(1, self.stop - oldest)))
        for first in range(0, count, each):
            last = min(first + each, count)
            rows = slice(self.rows.start + first, self.rows.start + last)
            low = oldest if window is None else max(oldest, self.start + first - window + 1)
            positions = np.concatenate((np.arange(min(sinks, low)), np.arange(low, self.start + last)))
            hidden = None
            if last - first > 1:
                queries = np.arange(self.start + first, self.start + last)[:, None]
                hidden = positions > queries
                if window is not None:
                    hidden |= (positions <= queries - window) & (positions >= sinks)
            slots = self.ring.slots(positions)
            if (np.diff(slots) == 1).all():  # no copy is needed then
                slots = slice(int(slots[0]), int(slots[-1]) + 1)
            yield rows, slots, len(positions), hidden


class Ring:
    """The blocks of one request in one group of layers, and how positions map to them.

    pinned: the first blocks, which stay; the others go round.
    """

    def __init__(self, blocks: np.ndarray, block: int, pinned: int = 0):
        self.blocks, self.block, self.pinned = blocks, block, pinned
        self.capacity, self.reached = len(blocks) * block, len(blocks)

    @staticmethod
    def empty(size: int, block: int, pinned: int = 0) -> Ring:
        """A ring of `size` blocks that are still to come."""
        ring = Ring(np.full(size, -1), block, pinned)
        ring.reached = 0
        return ring

    def extend(self, numbers: Sequence[int]) -> None:
        """The text's next blocks; each takes the place of the one that is a whole turn older.  -1: nobody will read it."""
        for number in numbers:
            self.blocks[self._place(self.reached)] = number
            self.reached += 1

    def _place(self, number: int) -> int:
        """Where the text's block of this number is in the ring."""
        return number if number < len(self.blocks) else self.pinned + (number - self.pinned) % (len(self.blocks) - self.pinned)

    def slots(self, positions: np.ndarray) -> np.ndarray:
        """The pool's slot of each position."""
        number, turning = positions // self.block, len(self.blocks) - self.pinned
        if not self.pinned:
            number %= turning
        elif turning:
            number = np.where(number < self.pinned, number, self.pinned + (number - self.pinned) % turning)
        return self.blocks[number] * self.block + positions % self.block

    def segment(self, first_row: int, start: int, count: int, length: int = 0) -> Segment:
        """Positions start … start + count - 1, in the step's rows from first_row on; their keys are written first.

        No key that an earlier query of the segment needs is overwritten as long as the ring holds
        window + count - 1 positions besides the pinned blocks.  length: of the text, as RoPE takes it, where that is more
        than the positions so far.
        """
        assert 1 <= count <= self.capacity
        if count == 1:  # the usual case: each request that decodes, in each step
            slots = np.array([int(self.blocks[self._place(start // self.block)]) * self.block + start % self.block])
        else:
            slots = self.slots(np.arange(start, start + count))
        return Segment(slice(first_row, first_row + count), start, self, slots, length)


class KVCache:
    """The pool of a rank for all layers, allocated once.  Whose a block is, the scheduler knows."""

    def __init__(self, config: ModelConfig, shard: Shard, groups: tuple[LayerGroup, ...], num_blocks: int, block: int, ops,
                 kv_dtype: str = 'float32', xp=np):
        size = (len(shard.kv_heads), num_blocks * block, config.head_dim)
        self.arrays = [LayerCache(*ops.new_cache(*size, kv_dtype, xp)) for _ in range(arrays_of(groups))]
        where = {layer: self.arrays[i] for group in groups for i, layer in enumerate(group.layers)}
        self.layers = [where[layer] for layer in range(config.num_layers)]
        self.num_blocks, self.block = num_blocks, block

    @property
    def nbytes(self) -> int:
        """Bytes of the pool on this rank."""
        return sum(array.nbytes for both in self.arrays for array in both)

    def copy_block(self, source: int, target: int) -> None:
        """Make one block hold what another one does; the kernels' layout keeps a block of whole panels together."""
        from_, to = (slice(number * self.block, (number + 1) * self.block) for number in (source, target))
        for both in self.arrays:
            for array in both:
                array[:, to] = array[:, from_]


def arrays_of(groups: tuple[LayerGroup, ...]) -> int:
    """Layers that the pool has room for: those of the largest group."""
    return max(len(group.layers) for group in groups)


def block_bytes(config: ModelConfig, shard: Shard, groups: tuple[LayerGroup, ...], block: int, ops, kv_dtype: str) -> int:
    """Bytes of one block of the pool on this rank, over the layers of a group."""
    return arrays_of(groups) * sum(a.nbytes for a in ops.new_cache(len(shard.kv_heads), block, config.head_dim, kv_dtype))


def ring_positions(total: int, window: int | None, chunk: int) -> int:
    """Positions that a ring must hold for a request of `total` tokens, prefilled in chunks, seen through a window."""
    return total if window is None else min(total, window + min(chunk, total) - 1)


def pinned_blocks(sinks: int, block: int) -> int:
    """Blocks that hold the first tokens, which stay visible."""
    return -(-sinks // block)


def ring_blocks(total: int, window: int | None, chunk: int, block: int, sinks: int = 0) -> tuple[int, bool]:
    """Blocks that a request of `total` tokens needs in one group of layers, and whether its ring goes round.

    A ring that goes round holds all blocks that the positions it must hold can touch, wherever the first of them begins:
    a block gives way as a whole.
    """
    whole = -(-total // block)
    ring = -(-(ring_positions(total, window, chunk) - 1) // block) + 1 + pinned_blocks(sinks, block)
    return (ring, True) if window is not None and ring < whole else (whole, False)


def rolling_tokens(context: int, sinks: int, chunk: int, block: int) -> int:
    """Tokens of a text so long that its rings turn: a longer one takes no more of the cache."""
    return 4 * (context + sinks + chunk + block)


def rings_blocks(groups: tuple[LayerGroup, ...], total: int, chunk: int, block: int) -> int:
    """Blocks that a request of `total` tokens needs in all groups together."""
    return sum(ring_blocks(total, group.window, chunk, block, group.sinks)[0] for group in groups)
