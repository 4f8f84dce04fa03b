"""The KV cache of a rank: one pool of blocks, and for each request a ring of block numbers.

Position p of a request lies in block `ring[(p // block) mod len(ring)]`, slot `p mod block`.  Nothing grows and nothing
is moved: what no longer fits is overwritten in place, oldest first.  A single request has the identity table; a batch
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
    slots: np.ndarray  # [rows] where the cache keeps each one's K and V
    keys: slice | np.ndarray  # slots of the request's keys, the new ones included
    key_positions: np.ndarray  # [keys] position that each of those slots holds; negative: nothing yet
    ordered: bool  # key_positions are consecutive

    def tiles(self, window: int | None, max_scores: int) -> Iterator[tuple[slice, slice, np.ndarray | None]]:
        """Runs of rows with the keys that they can see: (rows of the step, run of `keys`, hidden [rows, keys] or None).

        A run is so short that rows * keys stays under max_scores, where one row allows.
        """
        count, num_keys = self.rows.stop - self.rows.start, len(self.key_positions)
        each = max(1, min(ROWS_PER_TILE, max_scores // max(1, num_keys)))
        for first in range(0, count, each):
            last = min(first + each, count)
            rows = slice(self.rows.start + first, self.rows.start + last)
            keys, hidden = slice(0, num_keys), None
            if self.ordered:
                oldest = int(self.key_positions[0])
                low = 0 if window is None else self.start + first - window + 1 - oldest
                keys = slice(max(0, low), self.start + last - oldest)
            if last - first > 1 or not self.ordered:
                queries = np.arange(self.start + first, self.start + last)[:, None]
                positions = self.key_positions[keys]
                hidden = (positions > queries) | (positions < 0)
                if window is not None:
                    hidden |= positions <= queries - window
            yield rows, keys, hidden


class Ring:
    """The blocks of one request, and how positions map to them."""

    def __init__(self, blocks: np.ndarray, block: int):
        self.blocks, self.block = blocks, block
        self.capacity = len(blocks) * block
        self.contiguous = bool((np.diff(blocks) == 1).all())

    def slots(self, positions: np.ndarray) -> np.ndarray:
        """The pool's slot of each position."""
        return self.blocks[(positions // self.block) % len(self.blocks)] * self.block + positions % self.block

    def segment(self, first_row: int, start: int, count: int) -> Segment:
        """Positions start … start + count - 1, in the step's rows from first_row on; their keys are written first.

        No key that an earlier query of the segment needs is overwritten as long as the ring holds
        window + count - 1 positions.
        """
        assert 1 <= count <= self.capacity
        rows = slice(first_row, first_row + count)
        slots, stop = self.slots(np.arange(start, start + count)), start + count
        if stop <= self.capacity and self.contiguous:
            base = int(self.blocks[0]) * self.block
            return Segment(rows, start, slots, slice(base, base + stop), np.arange(stop), True)
        if self.contiguous:  # wrapped: every slot in use, in the ring's own order, which softmax does not mind
            base = int(self.blocks[0]) * self.block
            last = stop - 1
            positions = last - (last - np.arange(self.capacity)) % self.capacity
            return Segment(rows, start, slots, slice(base, base + self.capacity), positions, False)
        positions = np.arange(max(0, stop - self.capacity), stop)
        return Segment(rows, start, slots, self.slots(positions), positions, True)


class KVCache:
    """The pool of a rank for all layers, allocated once.

    Raises ValueError when a ring is asked for that the free blocks cannot hold.
    """

    def __init__(self, config: ModelConfig, shard: Shard, num_blocks: int, block: int, ops, kv_dtype: str = 'float32', xp=np):
        size = (len(shard.kv_heads), num_blocks * block, config.head_dim)
        self.layers = [LayerCache(*ops.new_cache(*size, kv_dtype, xp)) for _ in range(config.num_layers)]
        self.block = block
        self.free = list(range(num_blocks))

    @property
    def nbytes(self) -> int:
        """Bytes of the pool on this rank."""
        return sum(array.nbytes for layer in self.layers for array in layer)

    def allocate(self, positions: int) -> Ring:
        """A ring with room for so many positions."""
        count = -(-positions // self.block)
        if count > len(self.free):
            raise ValueError(f'the KV cache has {len(self.free)} free blocks of {self.block} positions; {count} are needed')
        taken, self.free = self.free[:count], self.free[count:]
        return Ring(np.array(taken, np.int64), self.block)

    def release(self, ring: Ring) -> None:
        """Give a ring's blocks back."""
        self.free = sorted(self.free + ring.blocks.tolist())


def ring_positions(total: int, window: int | None, chunk: int) -> int:
    """Positions that a ring must hold for a request of `total` tokens, prefilled in chunks, seen through a window."""
    return total if window is None else min(total, window + min(chunk, total) - 1)
