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
from functools import cached_property
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

    @property
    def stop(self) -> int:
        """The position after the last one."""
        return self.start + len(self.slots)

    @property
    def oldest(self) -> int:
        """The first position that the ring still holds when these tokens are in it; all from there to stop - 1 are keys."""
        return max(0, self.stop - self.ring.capacity)

    @cached_property
    def keys(self) -> slice | np.ndarray:
        """Slots of the keys, in the order of their positions."""
        if self.ring.contiguous and self.stop <= self.ring.capacity:
            base = int(self.ring.blocks[0]) * self.ring.block
            return slice(base, base + self.stop)
        return self.ring.slots(np.arange(self.oldest, self.stop))

    def tiles(self, window: int | None, max_scores: int) -> Iterator[tuple[slice, slice, np.ndarray | None]]:
        """Runs of rows with the keys that they can see: (rows of the step, run of `keys`, hidden [rows, keys] or None).

        A run is so short that rows * keys stays under max_scores, where one row allows.
        """
        count, oldest = len(self.slots), self.oldest
        each = max(1, min(ROWS_PER_TILE, max_scores // max(1, self.stop - oldest)))
        for first in range(0, count, each):
            last = min(first + each, count)
            rows = slice(self.rows.start + first, self.rows.start + last)
            low = oldest if window is None else max(oldest, self.start + first - window + 1)
            keys, hidden = slice(low - oldest, self.start + last - oldest), None
            if last - first > 1:
                queries = np.arange(self.start + first, self.start + last)[:, None]
                positions = np.arange(low, self.start + last)
                hidden = positions > queries
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
        return Segment(slice(first_row, first_row + count), start, self, self.slots(np.arange(start, start + count)))


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
