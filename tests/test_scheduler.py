"""The scheduler against a model of the cache that knows the contents of each slot: what a step reads is what was written."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpmpi.config import ConfigError, Rope
from tpmpi.kv_cache import pinned_blocks, ring_blocks
from tpmpi.sampling import SamplingParams
from tpmpi.scheduler import BlockPool, Scheduler


class Cache:
    """A pool whose slots hold the whole beginning of the request that they were computed for."""

    def __init__(self, num_blocks, block):
        self.slots, self.block = [None] * (num_blocks * block), block
        self.tokens, self.computed, self.rings, self.computed_tokens, self.turned = {}, {}, {}, 0, {}

    def run(self, plan, window, sinks=0, long_beyond=None):
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
            self.tokens[a.number], self.computed[a.number], self.rings[a.number] = list(a.tokens), a.computed, []
            self.turned[a.number] = long_beyond is not None and len(a.tokens) > long_beyond
        for w in plan.work:
            tokens, ring, start = self.tokens[w.number], self.rings[w.number], self.computed[w.number]
            tokens.extend(w.new_tokens)
            ring.extend(w.blocks)
            turned, pinned = self.turned[w.number], pinned_blocks(sinks, self.block)
            assert long_beyond is None or turned == (len(tokens) > long_beyond), 'keys of a text that is long by now'
            numbers = [p // self.block for p in range(start + w.count)]
            numbers = [n if n < len(ring) else pinned + (n - pinned) % (len(ring) - pinned) for n in numbers]
            where = [ring[n] * self.block + p % self.block for p, n in enumerate(numbers)]
            for p in range(start, start + w.count):
                assert self.slots[where[p]] != ('taken', w.number)
                self.slots[where[p]] = turned, *tokens[:p + 1]
            for p in range(start, start + w.count):
                for seen in range(p + 1):
                    if window is None or seen > p - window or seen < sinks:
                        assert self.slots[where[seen]] == (turned, *tokens[:seen + 1]), (w, p, seen)
            self.computed[w.number] += w.count
            self.computed_tokens += w.count


def prompts():
    """Prompts that often begin alike."""
    heads = st.sampled_from([[], [1] * 5, [1] * 5 + [2] * 7, [3] * 16, [3] * 16 + [4]])
    return st.builds(lambda head, rest: head + rest, heads, st.lists(st.integers(0, 3), min_size=1, max_size=12))


def next_token(tokens):
    """What the model of this test generates: a function of all tokens before."""
    return sum((i + 1) * t for i, t in enumerate(tokens)) % 5


@settings(max_examples=300, deadline=None)
@given(data=st.data(), num_blocks=st.integers(8, 24), block=st.sampled_from([1, 2, 4, 8]), chunk=st.integers(1, 20),
       most=st.integers(1, 6), sharing=st.booleans(), copying=st.booleans(), window=st.sampled_from([None, None, 6]),
       sinks=st.sampled_from([0, 3]), long_beyond=st.sampled_from([None, None, 9]))
def test_every_query_reads_its_own_beginning_and_all_finish(data, num_blocks, block, chunk, most, sharing, copying, window, sinks,
                                                            long_beyond):
    sinks = sinks if window else 0
    rope = None if long_beyond is None else Rope(1e4, 2, (), (2.0,), long_beyond)
    scheduler = Scheduler(num_blocks, block, chunk, most, sharing, window, copying, sinks, rope)
    cache = Cache(num_blocks, block)
    wanted = data.draw(st.lists(st.tuples(st.integers(0, 6), prompts(), st.integers(1, 9)), min_size=1, max_size=10))
    alive, outcome, steps = {}, {}, 0
    while wanted or alive:
        while wanted and (wanted[0][0] <= steps or not alive):  # a step to come in, at the latest when nothing runs
            _, prompt, new = wanted.pop(0)
            try:
                sequence = scheduler.add(list(prompt), SamplingParams(max_new_tokens=new), 0)
                alive[sequence.number] = (sequence, prompt, new)
            except ConfigError:
                assert ring_blocks(len(prompt) + new, window, chunk, block, sinks)[0] > num_blocks
        plan = scheduler.plan()
        assert sum(w.count for w in plan.work) <= max(chunk, most) and len(scheduler.running) <= most
        assert bool(plan.work) or not alive, 'a request waits although nothing runs'
        cache.run(plan, window, sinks, long_beyond)
        for w in plan.work:
            sequence, prompt, new = alive[w.number]
            scheduler.computed(sequence, w.count)
            if sequence.computed == len(sequence.tokens):
                sequence.tokens.append(next_token(sequence.tokens))
                if len(sequence.tokens) == len(prompt) + new:
                    scheduler.end(sequence, 'length')
                    outcome[w.number] = sequence.tokens
                    del alive[w.number]
        used = sum(len(s.blocks) - len(s.shared) for s in scheduler.running)
        in_tree = [b for root in (scheduler.pool.root, scheduler.pool.long_root) for b in tree(root) if b is not root]
        assert len(scheduler.pool.free) + len(in_tree) + used == num_blocks
        assert scheduler.pool.unused == sum(not b.users for b in in_tree)
        steps += 1
        assert steps < 500
    cache.run(scheduler.plan(), window, sinks, long_beyond)
    for number, tokens in outcome.items():
        assert cache.tokens[number] == tokens  # all ranks know them
        expected = list(tokens)
        del expected[-1]
        assert tokens[-1] == next_token(expected)


def tree(block):
    yield block
    for child in block.children.values():
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
    pool = BlockPool(3, 1)
    numbers = [pool.take() for _ in range(3)]
    blocks = [pool.add(pool.root, (i,), number, filled=True) for i, number in enumerate(numbers)]
    for block in (blocks[1], blocks[0], blocks[2]):
        pool.let_go(block)
    assert pool.available == 3 and pool.take() == blocks[1].number and pool.take() == blocks[0].number
    assert pool.match([2, 5], 2)[0] == [blocks[2]]
