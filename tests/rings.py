"""A cache pool and rings on it for requests that a test computes by hand."""

from __future__ import annotations

import numpy as np

from tpmpi.kv_cache import KVCache, Ring
from tpmpi.model import Step


def cache_and_rings(model, sizes, block, ops, requests=1, kv_dtype='float32'):
    """A pool, and for each request one ring for each group of layers of `sizes` blocks each; a ring's blocks lie scattered."""
    rings, turn = [[None] * len(sizes) for _ in range(requests)], list(range(sum(sizes) * requests))[::-1]
    for group, size in enumerate(sizes):
        numbers = np.array([turn.pop() for _ in range(size * requests)])
        for request in range(requests):
            rings[request][group] = Ring(numbers[request::requests][::-1].copy(), block)
    return KVCache(model.config, model.shard, model.groups, sum(sizes) * requests, block, ops, kv_dtype), rings


def step_of(tokens, rings, start, count, length=0):
    """`count` tokens from position `start` on of each request, in the order of the requests."""
    segments = [[ring.segment(i * count, start, count, length) for ring in of_request] for i, of_request in enumerate(rings)]
    return Step.of(np.asarray(tokens), *zip(*segments, strict=True))
