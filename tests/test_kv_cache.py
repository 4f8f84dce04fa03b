"""The ring: each position where the definition puts it, every query sees exactly its window, nothing is lost too early."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from tpmpi.kernels import reference as ops
from tpmpi.kv_cache import KVCache, Ring, block_bytes, layer_groups, pinned_blocks, ring_blocks, ring_positions, rings_blocks
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
        cache = KVCache(config, part, layer_groups([(None, 0)] * 3), 4, 16, ops, 'bfloat16')
        assert cache.nbytes == 2 * config.num_layers * len(part.kv_heads) * 4 * 16 * config.head_dim * 2
        assert all(layer.k.shape == (len(part.kv_heads), 64, config.head_dim) for layer in cache.layers)


@given(views=st.lists(st.sampled_from([(None, 0), (7, 0), (9, 2)]), min_size=1, max_size=60))
def test_groups_hold_each_layer_once_and_waste_at_most_a_tenth(views):
    groups = layer_groups(views)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(views)))
    assert all(views[layer] == (group.window, group.sinks) for group in groups for layer in group.layers)
    most = max(len(group.layers) for group in groups)
    assert most * len(groups) <= 1.1 * len(views)


def test_groups_are_as_few_as_they_can_be():
    """One for equal layers; of Gemma 3 1B's 26 layers every sixth sees all, in Command-R7B every fourth."""
    assert [len(g.layers) for g in layer_groups([(None, 0)] * 30)] == [30]
    assert [len(g.layers) for g in layer_groups([(4096, 0), (None, 0)] * 13)] == [13, 13]
    assert [len(g.layers) for g in layer_groups([(None if i % 6 == 5 else 512, 0) for i in range(26)])] == [4, 4, 4, 4, 4, 2, 4]
    assert [len(g.layers) for g in layer_groups([(None if i % 4 == 3 else 4096, 0) for i in range(32)])] == [8, 8, 8, 8]


def test_windows_save_most_of_the_cache_of_a_long_text():
    """Gemma 3 1B at 32,768 tokens, 512 at once: the figure of the README."""
    groups = layer_groups([(None if i % 6 == 5 else 512, 0) for i in range(26)])
    arrays = max(len(group.layers) for group in groups)
    assert arrays * rings_blocks(groups, 32768, 512, 64) == 4 * (512 + 6 * 17) == round(0.1845 * 26 * 512)


def test_layers_of_different_groups_live_in_the_same_arrays():
    config, views = tiny.NINE_HEADS, [(7, 0), (None, 0), (7, 0)]
    groups, part = layer_groups(views), shard(config, 0, 1)
    cache = KVCache(config, part, groups, 6, 16, ops)
    assert len(groups) == 3 and cache.layers[0].k is cache.layers[1].k is cache.layers[2].k
    assert cache.nbytes == 6 * block_bytes(config, part, groups, 16, ops, 'float32') == 6 * 2 * 4 * 3 * 16 * 8


@given(block=st.integers(1, 9), window=st.integers(1, 60), chunk=st.integers(1, 40), sinks=st.sampled_from([0, 0, 1, 9, 20]),
       counts=st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_a_ring_that_gets_its_blocks_one_by_one_still_holds_what_a_chunk_needs(block, window, chunk, sinks, counts):
    """Each block is new: the position's own number, so that the ring can be read without a pool."""
    counts = [min(count, chunk) for count in counts]
    total, pinned, at = sum(counts), pinned_blocks(sinks, block), 0
    size, rolls = ring_blocks(total, window, chunk, block, sinks)
    ring, whole = Ring.empty(size, block, pinned), -(-total // block)
    assert size <= whole and rolls == (size < whole)
    for count in counts:
        ring.extend(range(ring.reached, -(-(at + count) // block)))
        segment = ring.segment(0, at, count)
        assert segment.slots.tolist() == list(range(at, at + count))
        needed = [p for p in range(at + count) if p > at - window or p < sinks]
        assert ring.slots(np.array(needed)).tolist() == needed
        at += count
