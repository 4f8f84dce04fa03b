"""The KV cache of a rank: one pool of blocks, and for each request a ring of block numbers.

Position p of a request lies in block `ring[(p // block) mod len(ring)]`, slot `p mod block`.  Nothing grows and nothing
is moved: what no longer fits is overwritten in place, oldest first.  Where the first tokens stay visible, their blocks are
pinned and the others go round.  A single request has the identity table; a batch
is many rings on one pool.

The pool is [kv_heads/n, blocks, block, head_dim] per layer, heads first, so that the keys of a head in consecutive
blocks are one matrix and need no copy.  A rank holds its own KV heads only.  How the numbers of a head lie within the
pool is the kernel set's business (its `new_cache`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tpmpi.config import ModelConfig
from tpmpi.sharding import Shard

ROWS_PER_TILE = 128  # queries that attend together: short enough that causality saves nearly half of a prefill's work


class LayerCache(NamedTuple):
    """One layer's K and V.  Each [kv_heads/n, slots, head_dim] in the kernels' layout, float32 or the bits of bfloat16."""

    k: Any
    v: Any


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
    """The blocks of one request, and how positions map to them.

    pinned: the first blocks, which are never overwritten; the others go round.
    """

    def __init__(self, blocks: np.ndarray, block: int, pinned: int = 0):
        self.blocks, self.block, self.pinned = blocks, block, pinned
        self.capacity = len(blocks) * block

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
        return Segment(slice(first_row, first_row + count), start, self, self.slots(np.arange(start, start + count)), length)


class KVCache:
    """The pool of a rank for all layers, allocated once.  Whose a block is, the scheduler knows."""

    def __init__(self, config: ModelConfig, shard: Shard, num_blocks: int, block: int, ops, kv_dtype: str = 'float32', xp=np):
        size = (len(shard.kv_heads), num_blocks * block, config.head_dim)
        self.layers = [LayerCache(*ops.new_cache(*size, kv_dtype, xp)) for _ in range(config.num_layers)]
        self.num_blocks, self.block = num_blocks, block

    @property
    def nbytes(self) -> int:
        """Bytes of the pool on this rank."""
        return sum(array.nbytes for layer in self.layers for array in layer)

    def copy_block(self, source: int, target: int) -> None:
        """Make one block hold what another one does; the kernels' layout keeps a block of whole panels together."""
        from_, to = (slice(number * self.block, (number + 1) * self.block) for number in (source, target))
        for layer in self.layers:
            for array in layer:
                array[:, to] = array[:, from_]


def block_bytes(config: ModelConfig, shard: Shard, block: int, ops, kv_dtype: str) -> int:
    """Bytes of one block of the pool on this rank, over all layers."""
    return config.num_layers * sum(a.nbytes for a in ops.new_cache(len(shard.kv_heads), block, config.head_dim, kv_dtype))


def ring_positions(total: int, window: int | None, chunk: int) -> int:
    """Positions that a ring must hold for a request of `total` tokens, prefilled in chunks, seen through a window."""
    return total if window is None else min(total, window + min(chunk, total) - 1)


def pinned_blocks(sinks: int, block: int) -> int:
    """Blocks that hold the first tokens, which stay visible."""
    return -(-sinks // block)


def ring_blocks(total: int, window: int | None, chunk: int, block: int, sinks: int = 0) -> tuple[int, bool]:
    """Blocks that a request of `total` tokens needs, and whether its ring goes round: old positions are overwritten then."""
    whole = -(-total // block)
    ring = -(-ring_positions(total, window, chunk) // block) + pinned_blocks(sinks, block)
    return (ring, True) if window is not None and ring < whole else (whole, False)
