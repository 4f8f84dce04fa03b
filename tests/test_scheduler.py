"""The scheduler against a model of the cache that knows the contents of each slot: what a step reads is what was written."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpmpi.block_pool import BlockPool
from tpmpi.config import ConfigError, Rope
from tpmpi.kv_cache import layer_groups, pinned_blocks, ring_blocks, rings_blocks
from tpmpi.sampling import SamplingParams
from tpmpi.scheduler import Scheduler


class Cache:
    """A pool whose slots hold the whole beginning of the request that they were computed for, and in which group of layers."""

    def __init__(self, num_blocks, block, groups):
        self.slots, self.block, self.groups = [None] * (num_blocks * block), block, groups
        self.tokens, self.computed, self.rings, self.computed_tokens, self.turned = {}, {}, {}, 0, {}

    def run(self, plan, chunk, long_beyond=None):
        """Carry a plan out as an engine would; every query finds the keys of its own beginning."""
        for number, last, _ in plan.ended:
            self.tokens.setdefault(number, []).extend(last)
            self.rings.pop(number, None)
        for number in plan.dropped:
            self.rings.pop(number)
        for source, target in plan.copies:
            for i in range(self.block):
                self.slots[target * self.block + i] = self.slots[source * self.block + i]
        for a in plan.admitted:
            self.tokens[a.number], self.computed[a.number] = list(a.tokens), a.computed
            self.rings[a.number] = [[] for _ in self.groups]  # of all blocks, however old
            self.turned[a.number] = long_beyond is not None and len(a.tokens) > long_beyond
        for w in plan.work:
            tokens, start, turned = self.tokens[w.number], self.computed[w.number], self.turned[w.number]
            tokens.extend(w.new_tokens)
            assert long_beyond is None or turned == (len(tokens) > long_beyond), 'keys of a text that is long by now'
            assert w.count <= chunk
            for ring, blocks in zip(self.rings[w.number], w.blocks, strict=False):
                ring.extend(blocks)
            for group, ring in zip(self.groups, self.rings[w.number], strict=True):
                where = [ring[p // self.block] * self.block + p % self.block for p in range(start + w.count)]
                for p in range(start, start + w.count):
                    assert where[p] >= 0
                    self.slots[where[p]] = group.layers, turned, *tokens[:p + 1]
        for w in plan.work:  # when all have written: nobody wrote where another one reads
            tokens, start, turned = self.tokens[w.number], self.computed[w.number], self.turned[w.number]
            for group, ring in zip(self.groups, self.rings[w.number], strict=True):
                for p in range(start, start + w.count):
                    for seen in range(p + 1):
                        if group.window is None or seen > p - group.window or seen < group.sinks:
                            slot = ring[seen // self.block] * self.block + seen % self.block
                            assert slot >= 0 and self.slots[slot] == (group.layers, turned, *tokens[:seen + 1]), (w, p, seen)
                size, rolls = ring_blocks(self.totals(w.number), group.window, chunk, self.block, group.sinks)
                held = {number for number in ring[-(size - pinned_blocks(group.sinks, self.block)):]} if rolls else set(ring)
                held |= set(ring[:pinned_blocks(group.sinks, self.block)])
                assert len(held - {-1}) <= size, 'more than a ring holds'
                for seen in range(p + 1):  # what the rings of all ranks find there: the last turn, and the pinned ones
                    if group.window is None or seen > start - group.window or seen < group.sinks:
                        assert ring[seen // self.block] in held
            self.computed[w.number] += w.count
            self.computed_tokens += w.count


def prompts():
    """Prompts that often begin alike."""
    heads = st.sampled_from([[], [1] * 5, [1] * 5 + [2] * 7, [3] * 16, [3] * 16 + [4]])
    return st.builds(lambda head, rest: head + rest, heads, st.lists(st.integers(0, 3), min_size=1, max_size=12))


def next_token(tokens):
    """What the model of this test generates: a function of all tokens before."""
    return sum((i + 1) * t for i, t in enumerate(tokens)) % 5


VIEWS = {'full': [(None, 0)], 'window': [(6, 0)], 'sinks': [(6, 3)], 'alternating': [(6, 0), (None, 0), (6, 0)],
         'two windows': [(9, 2), (4, 0)]}


@settings(max_examples=500)
@given(data=st.data(), num_blocks=st.integers(8, 40), block=st.sampled_from([1, 2, 4, 8]), chunk=st.integers(1, 20),
       most=st.integers(1, 6), sharing=st.booleans(), copying=st.booleans(), views=st.sampled_from(sorted(VIEWS)),
       long_beyond=st.sampled_from([None, None, 9]))
def test_every_query_reads_its_own_beginning_and_all_finish(data, num_blocks, block, chunk, most, sharing, copying, views,
                                                            long_beyond):
    groups = layer_groups(VIEWS[views])
    rope = None if long_beyond is None else Rope(1e4, 2, (), (2.0,), long_beyond)
    scheduler = Scheduler(num_blocks, block, chunk, most, sharing, groups, copying, rope)
    cache, pool = Cache(num_blocks, block, groups), scheduler.pool
    wanted = data.draw(st.lists(st.tuples(st.integers(0, 6), prompts(), st.integers(1, 9)), min_size=1, max_size=10))
    alive, outcome, steps = {}, {}, 0
    cache.totals = lambda number: len(alive[number][1]) + alive[number][2]
    while wanted or alive:
        while wanted and (wanted[0][0] <= steps or not alive):  # a step to come in, at the latest when nothing runs
            _, prompt, new = wanted.pop(0)
            try:
                sequence = scheduler.add(list(prompt), SamplingParams(max_new_tokens=new), 0)
                alive[sequence.number] = (sequence, prompt, new)
            except ConfigError:
                assert rings_blocks(groups, len(prompt) + new, chunk, block) > num_blocks
        plan = scheduler.plan()
        assert sum(w.count for w in plan.work) <= max(chunk, most) and len(scheduler.running) <= most
        assert bool(plan.work) or not alive, 'a request waits although nothing runs'
        cache.run(plan, chunk, long_beyond)
        for w in plan.work:
            sequence, prompt, new = alive[w.number]
            scheduler.computed(sequence, w.count)
            if sequence.computed == len(sequence.tokens):
                sequence.tokens.append(next_token(sequence.tokens))
                if len(sequence.tokens) == len(prompt) + new:
                    scheduler.end(sequence, 'length')
                    outcome[w.number] = sequence.tokens
                    del alive[w.number]
        own = [number for s in scheduler.running for table in s.tables for number in table.own.values()]
        nodes = [node for root in (pool.root, pool.long_root) for node in tree(root) if node is not root]
        kept = [number for node in nodes for number in node.blocks if number is not None]
        assert sorted(pool.free + kept + own) == list(range(num_blocks))  # each in one place
        readers = [(node, group) for s in scheduler.running for group, t in enumerate(s.tables) for node in t.shared.values()]
        for node in nodes:
            assert node.users == sum(node in s.path for s in scheduler.running)
            assert node.users or node.children or any(number is not None for number in node.blocks)
            for group, number in enumerate(node.blocks):
                assert node.readers[group] == readers.count((node, group))
                assert ((node, group) in pool.idle) == (number is not None and not node.readers[group])
        steps += 1
        assert steps < 500
    cache.run(scheduler.plan(), chunk, long_beyond)
    for number, tokens in outcome.items():
        assert cache.tokens[number] == tokens  # all ranks know them
        expected = list(tokens)
        del expected[-1]
        assert tokens[-1] == next_token(expected)


def tree(node):
    yield node
    for child in node.children.values():
        yield from tree(child)


def run_all(scheduler, requests):
    """Run (prompt, new tokens) to their ends; returns the tokens computed in each step."""
    alive = [scheduler.add(list(prompt), SamplingParams(max_new_tokens=new), 0) for prompt, new in requests]
    alive, counts = {s.number: (s, len(s.tokens) + s.params.max_new_tokens) for s in alive}, []
    while alive:
        plan = scheduler.plan()
        counts.append(sum(w.count for w in plan.work))
        for w in plan.work:
            sequence, total = alive[w.number]
            scheduler.computed(sequence, w.count)
            if sequence.computed == len(sequence.tokens):
                sequence.tokens.append(0)
                if len(sequence.tokens) == total:
                    scheduler.end(sequence, 'length')
                    del alive[w.number]
    return counts


def test_a_common_beginning_is_computed_once():
    """64 prompts of 500 tokens, 400 of them in common: 400 + 64 * 100 are computed, not 32,000."""
    common = [i % 250 for i in range(400)]
    requests = [(common + [1000 + i] * 100, 1) for i in range(64)]
    assert sum(run_all(Scheduler(2000, 64, 512, 64), requests)) == 400 + 64 * 100
    assert sum(run_all(Scheduler(2000, 64, 512, 64, sharing=False), requests)) == 64 * 500
    assert sum(run_all(Scheduler(2000, 64, 512, 64, copying=False), requests)) == 384 + 64 * 116  # whole blocks only


@pytest.mark.parametrize('window', [30, 128, 600])
def test_a_common_beginning_is_computed_once_where_some_layers_have_a_window(window):
    """What a window has left behind stays as long as there is room, and those who begin alike need only its end."""
    common = [i % 250 for i in range(400)]
    requests = [(common + [1000 + i] * 100, 1) for i in range(64)]
    groups = layer_groups([(window, 0), (window, 0), (None, 0)])
    assert sum(run_all(Scheduler(6000, 64, 512, 64, groups=groups), requests)) == 400 + 64 * 100


def test_a_layer_with_a_window_keeps_its_window_only():
    """A text of 1,000 tokens: all 125 blocks of 8 in the layer that sees all, 4 + 1 in each of the others."""
    groups = layer_groups([(17, 0), (None, 0), (17, 0)])
    scheduler, most = Scheduler(200, 8, 16, 4, sharing=False, groups=groups), 0
    sequence = scheduler.add([1] * 500, SamplingParams(max_new_tokens=500), 0)
    while not scheduler.ended:
        for work in scheduler.plan().work:
            scheduler.computed(sequence, work.count)
        held = [len(table.own) for table in sequence.tables]
        most = max(most, sum(held))
        if sequence.computed == len(sequence.tokens):
            sequence.tokens.append(0)
            if len(sequence.tokens) == 1000:
                scheduler.end(sequence, 'length')
    assert sorted(held) == [5, 5, 125] and most == 135 == rings_blocks(groups, 1000, 16, 8)


def test_decode_goes_on_while_a_long_prompt_is_computed():
    scheduler = Scheduler(100, 8, 16, 4)
    counts = run_all(scheduler, [([1], 20), ([2] * 100, 1)])
    assert max(counts) == 16 and len(counts) <= 20


def test_who_came_last_waits_when_the_cache_is_full_and_nothing_is_lost():
    scheduler = Scheduler(8, 4, 32, 4, sharing=False)
    run_all(scheduler, [([i] * 4, 20) for i in range(4)])  # 6 blocks each
    assert scheduler.preemptions > 0 and sorted(scheduler.pool.free) == list(range(8))


def test_a_request_larger_than_the_cache_is_refused():
    with pytest.raises(ConfigError, match='33 tokens need 9 blocks of 4 positions in the KV cache, which has 8'):
        Scheduler(8, 4, 32, 4).add([1] * 13, SamplingParams(max_new_tokens=20), 0)


def test_the_longest_unused_block_goes_first():
    pool = BlockPool(3, 1, layer_groups([(None, 0)]))
    nodes = [pool.add(pool.root, (i,)) for i in range(3)]
    numbers = [pool.take() for _ in nodes]
    for node, number in zip(nodes, numbers, strict=True):
        pool.give(node, 0, number)
        node.computed = True
    for i in (1, 0, 2):
        pool.let_go(nodes[i], 0)
    assert pool.available == 3 and pool.take() == numbers[1] and pool.take() == numbers[0]
    assert pool.match([2, 5], 2)[0] == [nodes[2]]
