"""What kernels make of a step's host data once, for all layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

MOST = 64  # results that are kept: a step has a few for each group of layers


class Recent:
    """Results of functions, found again by the identity of their first argument."""

    def __init__(self, most: int = MOST):
        self._results, self._most = {}, most

    def of(self, owner, make: Callable, *arguments):
        """make(owner, *arguments), or what it gave before."""
        key = id(owner), *arguments
        if key not in self._results:
            if len(self._results) >= self._most:
                self._results.clear()
            self._results[key] = owner, make(owner, *arguments)  # which keeps the owner alive, and so the id its own
        return self._results[key][1]


@lru_cache
def bounds_of(groups: tuple[range, ...]) -> np.ndarray:
    """[kv_heads/n, 2] first query head of each, and the one after its last."""
    return np.array([(g.start, g.stop) for g in groups], np.int64).reshape(-1, 2)


def rows_of(rope) -> tuple[np.ndarray, np.ndarray]:
    """Both RoPE tables as kernels take them.  [tokens, 1, rotary_dim] -> [tokens, rotary_dim]"""
    cos, sin = rope
    return cos[:, 0], sin[:, 0]


def tables_of(segments) -> tuple[np.ndarray, np.ndarray]:
    """A step's segments as the kernel takes them: [segments, 7], and the blocks of all rings one after another."""
    (table,), blocks = tables_of_groups([segments])
    return table, blocks


def tables_of_groups(groups) -> tuple[np.ndarray, np.ndarray]:
    """The same of each group of layers, [groups, segments, 7], on one array of blocks."""
    numbers, blocks, end = [], [], 0
    for segments in groups:
        for s in segments:
            ring, begin = s.ring.blocks, end
            end += len(ring)
            numbers += s.rows.start, len(s.slots), s.start, s.oldest, begin, end, s.ring.pinned
            blocks.append(ring)
    whole = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    return np.array(numbers, np.int64).reshape(len(groups), -1, 7), whole.astype(np.int64)
