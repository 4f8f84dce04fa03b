"""Which requests run in a step, and in which blocks of the KV cache: decided on rank 0, without arrays and without MPI.

A request gets blocks as it grows, in each group of layers (see kv_cache.py), and gives back those that its window has left
behind.  Where none is left the request that came last gives its own back and waits, with its tokens, to be computed again;
so a full cache means waiting, never failing.  A prompt that begins like an earlier one starts where they differ (see
block_pool.py).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from tpmpi.block_pool import BlockPool, Node
from tpmpi.config import ConfigError, Rope
from tpmpi.kv_cache import LayerGroup, ring_blocks, rings_blocks
from tpmpi.sampling import SamplingParams

NOBODY = -1  # the number of a block that no query will read: a window has left it behind


class Table:
    """The blocks that one request holds in one group of layers, by their place in its text."""

    def __init__(self, ring: int, rolls: bool, pinned: int):
        self.ring, self.rolls, self.pinned = ring, rolls, pinned  # the blocks that its ring has room for, see kv_cache.Ring
        self.clear()

    def clear(self) -> None:
        """No blocks."""
        self.own: dict[int, int] = {}  # place: number
        self.shared: dict[int, Node] = {}  # place: whose block it is
        self.reached = 0  # the place behind the last block

    def oldest_after(self, place: int) -> int | None:
        """The place whose block gives way to a block at `place`."""
        turned = place - (self.ring - self.pinned)
        return turned if self.rolls and turned >= self.pinned else None


@dataclass(eq=False)
class Sequence:
    """One request while it waits or runs."""

    number: int  # names it in plans
    tokens: list[int]  # prompt, then what was generated
    params: SamplingParams
    noise: int  # keys the random choices, together with the seed
    prompt_tokens: int
    tables: list[Table]  # for each group of layers
    computed: int = 0  # tokens whose keys and values are in the cache
    path: list[Node] = field(default_factory=list)  # its beginning in the tree
    known: int = 0  # of these, the nodes that it has seen computed
    sent: int = 0  # tokens that all ranks know
    root: Node | None = None  # of the tree that its blocks belong to; None: nobody can share them


@dataclass(frozen=True)
class Admission:
    """What all ranks must know of a request that begins to run."""

    number: int
    tokens: tuple[int, ...]
    params: SamplingParams
    noise: int
    prompt_tokens: int
    computed: int  # tokens that shared blocks already hold


@dataclass(frozen=True)
class Work:
    """What one request does in a step."""

    number: int
    new_tokens: tuple[int, ...]  # chosen since the plan before
    blocks: tuple[tuple[int, ...], ...]  # for each group of layers, those that its ring goes on with; (): nothing new
    count: int  # tokens to compute


@dataclass(frozen=True)
class Plan:
    """One step, as rank 0 tells it to all ranks."""

    ended: tuple[tuple[int, tuple[int, ...], str], ...] = ()  # requests that are over: number, last tokens, reason
    dropped: tuple[int, ...] = ()  # that gave their blocks back and wait again
    admitted: tuple[Admission, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()  # blocks to copy before the step: source, target
    work: tuple[Work, ...] = ()
    rest: bool = False  # nothing to do: wait asleep for the next plan
    stop: bool = False  # the last plan


class Scheduler:
    """The queue and the running requests of one replica."""

    def __init__(self, num_blocks: int, block: int, chunk: int, max_sequences: int, sharing: bool = True,
                 groups: tuple[LayerGroup, ...] = (LayerGroup((0,), None),), copying: bool = True, rope: Rope | None = None):
        self.pool = BlockPool(num_blocks, block, groups)
        self.block, self.chunk, self.max_sequences, self.groups = block, chunk, max_sequences, groups
        self.sharing, self.copying = sharing, copying
        self.rope = rope if rope is not None and rope.by_length else None  # what turns keys in other ways in longer texts
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # by age
        self.ended: list[tuple[int, tuple[int, ...], str]] = []
        self.numbers = 0
        self.shared_tokens = 0  # prompt tokens that need not be computed
        self.preemptions = 0

    def add(self, tokens: list[int], params: SamplingParams, noise: int, prompt_tokens: int = 0) -> Sequence:
        """Put a request in the queue.  Raises ConfigError when it could not run alone in the whole cache.

        tokens: of the prompt, and what an earlier run has generated; prompt_tokens: how many are the prompt's, 0 for all.
        """
        total = (prompt_tokens or len(tokens)) + params.max_new_tokens
        needed = rings_blocks(self.groups, total, self.chunk, self.block)
        if needed > self.pool.num_blocks:
            raise ConfigError(f'{total} tokens need {needed} blocks of {self.block} positions in the KV cache, which has '
                              f'{self.pool.num_blocks}: give it more memory (--kv-memory), or ask for fewer tokens')
        tables = [Table(*ring_blocks(total, group.window, self.chunk, self.block, group.sinks), self.pool.pinned(number))
                  for number, group in enumerate(self.groups)]
        sequence = Sequence(self.numbers, tokens, params, noise, prompt_tokens or len(tokens), tables)
        self.numbers += 1
        self.waiting.append(sequence)
        return sequence

    def plan(self) -> Plan:
        """The next step: a token of each request that decodes, and prompts in what is left of the step's tokens."""
        ended, self.ended = tuple(self.ended), []
        dropped: list[int] = []
        restarted: list[int] = []
        work: list[Work] = []
        budget = max(self.chunk, len(self.running))
        for sequence in [s for s in self.running if s.root is self.pool.root and self._is_long(s)]:
            self._send_back(sequence, restarted)  # all its keys are turned in another way from now on
        for sequence in sorted(self.running, key=lambda s: len(s.tokens) - s.computed > 1):  # those that decode come first
            if budget and sequence in self.running:
                count = self._count(sequence, budget)
                blocks = self._grow(sequence, sequence.computed + count, dropped)
                if sequence in self.running:
                    work.append(self._work(sequence, blocks, count))
                    budget -= count
        work = [w for w in work if w.number not in dropped]
        admitted, copies = [], []
        while self.waiting and budget and len(self.running) < self.max_sequences and not dropped:
            sequence = self.waiting[0]
            placed = self._place(sequence)
            if placed is None:
                break
            blocks, copy = placed
            self.waiting.popleft()
            self.running.append(sequence)
            copies += copy
            admitted.append(Admission(sequence.number, tuple(sequence.tokens), sequence.params, sequence.noise,
                                      sequence.prompt_tokens, sequence.computed))
            sequence.sent = len(sequence.tokens)
            count = self._count(sequence, budget)
            work.append(self._work(sequence, blocks, count))
            budget -= count
        return Plan(ended, tuple(restarted + dropped), tuple(admitted), tuple(copies), tuple(work), rest=not work)

    def _count(self, sequence: Sequence, budget: int) -> int:
        """Tokens that a request computes in a step; a ring has room for a chunk at once and no more."""
        return min(len(sequence.tokens) - sequence.computed, budget, self.chunk)

    def _work(self, sequence: Sequence, blocks: tuple[tuple[int, ...], ...], count: int) -> Work:
        new, sequence.sent = tuple(sequence.tokens[sequence.sent:]), len(sequence.tokens)
        return Work(sequence.number, new, blocks, count)

    def computed(self, sequence: Sequence, count: int) -> None:
        """So many tokens more are in the cache: blocks that they fill can be shared from now on."""
        sequence.computed += count
        if not self.sharing or sequence.root is None:
            return
        while (sequence.known + 1) * self.block <= sequence.computed:
            at, sequence.known = sequence.known, sequence.known + 1
            if at == len(sequence.path):
                self._enter(sequence, at)
            node = sequence.path[at]
            node.computed = True
            for group, table in enumerate(sequence.tables):
                if node.blocks[group] is None and at in table.own:
                    self.pool.give(node, group, table.own.pop(at))
                    table.shared[at] = node

    def _enter(self, sequence: Sequence, at: int) -> None:
        """A request's path goes on by one block of its tokens."""
        parent, tokens = sequence.path[-1] if at else sequence.root, tuple(sequence.tokens[at * self.block:(at + 1) * self.block])
        sequence.path.append(parent.children.get(tokens) or self.pool.add(parent, tokens))
        self.pool.enter(sequence.path[-1])

    def end(self, sequence: Sequence, reason: str) -> None:
        """A request is over, wherever it was: its blocks are free, or kept for others that begin like it."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._give_back(sequence)
            self.ended.append((sequence.number, tuple(sequence.tokens[sequence.sent:]), reason))
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            self.ended.append((sequence.number, (), reason))

    # ---- blocks

    def _place(self, sequence: Sequence, copying: bool | None = None
               ) -> tuple[tuple[tuple[int, ...], ...], list[tuple[int, int]]] | None:
        """Give a waiting request its first blocks.  Returns them for each group, and the blocks to copy; None: not now.

        It waits as well while another request computes a beginning that both have.
        """
        pool, copying, most = self.pool, self.copying if copying is None else copying, 0
        sequence.root = self._root_of(sequence)
        if self.sharing and sequence.root is not None and not sequence.params.prompt_logprobs:
            most = len(sequence.tokens) - 1  # one token at least is computed, for its logits
        path, partial, common, wait = pool.match(sequence.tokens, most, sequence.root, copying)
        if wait:
            return None
        computed, everything = len(path) * self.block + common, len(sequence.tokens)
        upto = [-(-(min(everything, computed + self.chunk) if table.rolls else everything) // self.block)
                for table in sequence.tables]  # the whole prompt has room from the beginning, as far as it is kept at all
        read = [[at for at in range(len(path)) if at < table.pinned or at >= pool.first_seen(group, computed)]
                for group, table in enumerate(sequence.tables)]
        held = [(path[at], group) for group, places in enumerate(read) for at in places]
        sources = [] if partial is None else [(partial, group) for group in range(len(self.groups))]
        for node, group in held + sources:
            pool.hold(node, group)
        own = sum(upto) - len(path) * len(self.groups)
        spare = len(self.running) * len(self.groups)  # each request that runs can grow by a block
        if own + spare > pool.available:
            for node, group in reversed(held + sources):
                pool.let_go(node, group)
            # a cache that the request needs whole has no room for what it would copy from
            return self._place(sequence, copying=False) if sources and not self.running else None
        for node in path:
            pool.enter(node)
        sequence.path, sequence.known, sequence.computed = list(path), len(path), computed
        self.shared_tokens += computed
        blocks, copies = [], []
        for group, (table, places) in enumerate(zip(sequence.tables, read, strict=True)):
            table.shared = {at: path[at] for at in places}
            table.own = {at: pool.take() for at in range(len(path), upto[group])}
            table.reached = upto[group]
            numbers = [NOBODY] * len(path) + list(table.own.values())
            for at in places:
                numbers[at] = path[at].blocks[group]
            blocks.append(tuple(numbers))
            if partial is not None:
                copies.append((partial.blocks[group], table.own[len(path)]))
        for node, group in sources:
            pool.let_go(node, group)
        if self.sharing and sequence.root is not None:
            for at in range(len(path), everything // self.block):  # others that begin like this wait for it
                self._enter(sequence, at)
        return tuple(blocks), copies

    def _is_long(self, sequence: Sequence) -> bool:
        """Whether a text is beyond the length where LongRoPE's other divisors begin."""
        return self.rope is not None and bool(self.rope.long_divisors) and len(sequence.tokens) > self.rope.original_positions

    def _root_of(self, sequence: Sequence) -> Node | None:
        """The tree of those whose keys are turned alike; where theta grows with the text nobody's are."""
        if self.rope is not None and self.rope.dynamic_factor > 1:
            total = sequence.prompt_tokens + sequence.params.max_new_tokens
            return self.pool.root if total <= self.rope.original_positions else None
        return self.pool.long_root if self._is_long(sequence) else self.pool.root

    def _send_back(self, sequence: Sequence, dropped: list[int]) -> None:
        """A running request goes to the head of the queue, to be computed again."""
        self.running.remove(sequence)
        self._give_back(sequence)
        self.waiting.appendleft(sequence)
        dropped.append(sequence.number)

    def _grow(self, sequence: Sequence, length: int, dropped: list[int]) -> tuple[tuple[int, ...], ...]:
        """Blocks more for so many tokens; whoever came last goes back to the queue where there are none."""
        needed = -(-length // self.block)
        if all(table.reached >= needed for table in sequence.tables):
            return ()
        blocks = []
        for group, table in enumerate(sequence.tables):
            before = table.reached
            while table.reached < needed:
                self._roll(table, group)
                while not self.pool.available:
                    last = self.running[-1]
                    self._send_back(last, dropped)
                    self.preemptions += 1
                    if last is sequence:
                        return ()
                table.own[table.reached] = self.pool.take()
                table.reached += 1
            blocks.append(tuple(table.own[at] for at in range(before, table.reached)))
        return tuple(blocks)

    def _roll(self, table: Table, group: int) -> None:
        """Give back the block that the next one leaves behind."""
        oldest = table.oldest_after(table.reached)
        if oldest in table.own:
            self.pool.free.append(table.own.pop(oldest))
        elif oldest in table.shared:
            self.pool.let_go(table.shared.pop(oldest), group)

    def _give_back(self, sequence: Sequence) -> None:
        for group, table in enumerate(sequence.tables):
            for at in sorted(table.shared, reverse=True):
                self.pool.let_go(table.shared[at], group)
            self.pool.free += reversed(table.own.values())
            table.clear()
        for node in reversed(sequence.path):
            self.pool.leave(node)
        sequence.path, sequence.known, sequence.computed = [], 0, 0
