"""The ring: each position where the definition puts it, every query sees exactly its window, nothing is lost too early."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from tpmpi.kernels import reference as ops
from tpmpi.kv_cache import KVCache, Ring, ring_positions
from tpmpi.sharding import shard


@st.composite
def runs(draw):
    """A table of blocks, a window that it can serve, and the lengths of the chunks that a request comes in."""
    block, count = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    first = draw(st.integers(0, 3))
    scattered = st.permutations(range(count + 2)).map(lambda p: p[:count])
    table = draw(st.one_of(st.just(list(range(first, first + count))), scattered))
    capacity = block * count
    chunk = draw(st.integers(1, capacity))
    window = draw(st.integers(1, capacity - chunk + 1))
    lengths = draw(st.lists(st.integers(1, chunk), min_size=1, max_size=12))
    return np.array(table), block, window, lengths


@settings(max_examples=400)
@given(run=runs(), max_scores=st.integers(1, 50))
def test_each_query_sees_exactly_its_window(run, max_scores):
    """A pool that stores positions as its keys, written and read through segments, against the definition."""
    table, block, window, lengths = run
    ring, pool, start = Ring(table, block), np.full((int(table.max()) + 1) * block, -1), 0
    for count in lengths:
        segment = ring.segment(7, start, count)
        assert (segment.rows, segment.start) == (slice(7, 7 + count), start)
        for i, slot in enumerate(segment.slots):
            position = start + i
            assert slot == table[position // block % len(table)] * block + position % block
            pool[slot] = position
        keys, seen = pool[segment.keys], {}
        for rows, run_of_keys, hidden in segment.tiles(window, max_scores):
            visible = keys[run_of_keys]
            for row in range(rows.start, rows.stop):
                mask = np.zeros(len(visible), bool) if hidden is None else hidden[row - rows.start]
                seen[row] = sorted(visible[~mask].tolist())
        for row in range(7, 7 + count):
            position = start + row - 7
            assert seen[row] == list(range(max(0, position - window + 1), position + 1))
        start += count


def test_a_tile_bounds_the_scores():
    ring = Ring(np.arange(10), 64)
    tiles = list(ring.segment(0, 0, 640).tiles(None, 6400))
    assert all((rows.stop - rows.start) * (keys.stop - keys.start) <= 6400 for rows, keys, _ in tiles)
    assert sum(rows.stop - rows.start for rows, _, _ in tiles) == 640


def test_one_new_token_needs_no_mask_and_no_copy():
    segment = Ring(np.arange(4), 8).segment(0, 20, 1)
    assert [hidden for _, _, hidden in segment.tiles(None, 1 << 20)] == [None] and segment.keys == slice(0, 21)


@given(total=st.integers(1, 500), window=st.one_of(st.none(), st.integers(1, 500)), chunk=st.integers(1, 500))
def test_a_ring_has_room_for_what_a_chunk_still_needs(total, window, chunk):
    room = ring_positions(total, window, chunk)
    if window is None:
        assert room == total
        return
    for start in range(0, total, chunk):  # the oldest key that the chunk's first query needs, until its last is written
        last = min(start + chunk, total) - 1
        oldest = max(0, start - window + 1)
        assert last - oldest < room or room == total


@pytest.mark.parametrize('size', [1, 2, 5, 12])
def test_a_rank_caches_its_own_kv_heads_only(size):
    config = tiny.NINE_HEADS
    for rank in range(size):
        part = shard(config, rank, size)
        cache = KVCache(config, part, 4, 16, ops, 'bfloat16')
        assert cache.nbytes == 2 * config.num_layers * len(part.kv_heads) * 4 * 16 * config.head_dim * 2
        assert all(layer.k.shape == (len(part.kv_heads), 64, config.head_dim) for layer in cache.layers)
