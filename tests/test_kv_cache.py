"""The ring: each position where the definition puts it, every query sees exactly its window, nothing is lost too early."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from tpmpi.kernels import reference as ops
from tpmpi.kv_cache import KVCache, Ring, pinned_blocks, ring_positions
from tpmpi.sharding import shard


@st.composite
def runs(draw):
    """A table of blocks, a window that it can serve, first tokens that stay, and the lengths of chunks."""
    block, count = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    first, sinks = draw(st.integers(0, 3)), draw(st.sampled_from([0, 0, 1, 2, 5, 7]))
    pinned = pinned_blocks(sinks, block)
    scattered = st.permutations(range(count + pinned + 2)).map(lambda p: p[:count + pinned])
    table = draw(st.one_of(st.just(list(range(first, first + count + pinned))), scattered))
    capacity = block * count
    chunk = draw(st.integers(1, capacity))
    window = draw(st.integers(1, capacity - chunk + 1))
    lengths = draw(st.lists(st.integers(1, chunk), min_size=1, max_size=12))
    return np.array(table), block, window, lengths, sinks


@settings(max_examples=400)
@given(run=runs(), max_scores=st.integers(1, 50))
def test_each_query_sees_exactly_its_window_and_the_first_tokens(run, max_scores):
    """A pool that stores positions as its keys, written and read through segments, against the definition."""
    table, block, window, lengths, sinks = run
    pinned = pinned_blocks(sinks, block)
    ring, pool, start = Ring(table, block, pinned), np.full((int(table.max()) + 1) * block, -1), 0
    for count in lengths:
        segment = ring.segment(7, start, count)
        assert (segment.rows, segment.start) == (slice(7, 7 + count), start)
        for i, slot in enumerate(segment.slots):
            position = start + i
            at = position // block
            while at >= len(table):
                at -= len(table) - pinned
            assert slot == table[at] * block + position % block
            pool[slot] = position
        seen = {}
        for rows, keys, number, hidden in segment.tiles(window, sinks, max_scores):
            visible = pool[keys]
            assert len(visible) == number
            for row in range(rows.start, rows.stop):
                mask = np.zeros(len(visible), bool) if hidden is None else hidden[row - rows.start]
                seen[row] = sorted(visible[~mask].tolist())
        for row in range(7, 7 + count):
            position = start + row - 7
            assert seen[row] == [p for p in range(position + 1) if p > position - window or p < sinks]
        start += count


def test_a_tile_bounds_the_scores():
    ring = Ring(np.arange(10), 64)
    tiles = list(ring.segment(0, 0, 640).tiles(None, 0, 6400))
    assert all((rows.stop - rows.start) * count <= 6400 for rows, _, count, _ in tiles)
    assert sum(rows.stop - rows.start for rows, _, _, _ in tiles) == 640


def test_one_new_token_needs_no_mask_and_no_copy():
    segment = Ring(np.arange(4), 8).segment(0, 20, 1)
    assert list(segment.tiles(None, 0, 1 << 20)) == [(slice(0, 1), slice(0, 21), 21, None)]


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
