"""Which requests run in a step, and in which blocks of the KV cache: decided on rank 0, without arrays and without MPI.

A request gets blocks as it grows.  Where none is left the request that came last gives its own back and waits, with its
tokens, to be computed again; so a full cache means waiting, never failing.  Full blocks of tokens are kept in a tree by
what they hold, as long as nobody needs the room: a prompt that begins like an earlier one starts where they differ.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from tpmpi.config import ConfigError, Rope
from tpmpi.kv_cache import ring_blocks
from tpmpi.sampling import SamplingParams

PARTIAL_CHOICES = 8  # blocks that are looked at for a beginning in common, where no whole block fits


class Block:
    """A block of the pool whose tokens are known, in the tree of all such blocks."""

    __slots__ = ('number', 'tokens', 'parent', 'children', 'users', 'filled')

    def __init__(self, number: int, tokens: tuple[int, ...], parent: Block | None):
        self.number, self.tokens, self.parent = number, tokens, parent
        self.children: dict[tuple[int, ...], Block] = {}
        self.users = 0  # running requests that hold it; a block's users hold all blocks above it, too
        self.filled = False  # its keys and values are computed


class BlockPool:
    """The numbers of the cache's blocks: free, held by requests, or kept for those that begin alike."""

    def __init__(self, num_blocks: int, block: int):
        self.num_blocks, self.block = num_blocks, block
        self.free = list(range(num_blocks - 1, -1, -1))
        self.root = Block(-1, (), None)
        self.long_root = Block(-1, (), None)  # of keys that were turned as those of long texts are
        self.idle: OrderedDict[Block, None] = OrderedDict()  # leaves without users, the one longest unused first
        self.unused = 0  # blocks of the tree without users

    @property
    def available(self) -> int:
        """Blocks that can be taken now."""
        return len(self.free) + self.unused

    def take(self) -> int:
        """A block's number; the longest unused block of the tree goes where none is free."""
        if not self.free:
            self._forget(next(iter(self.idle)))
        return self.free.pop()

    def hold(self, block: Block) -> None:
        """One user more."""
        block.users += 1
        if block.users == 1:
            self.unused -= 1
            self.idle.pop(block, None)

    def let_go(self, block: Block) -> None:
        """One user less.  To be called for a request's last block first."""
        block.users -= 1
        if block.users == 0:
            self.unused += 1
            if not block.filled:
                self._forget(block)  # its user leaves before it was computed
            elif not block.children:
                self.idle[block] = None

    def add(self, parent: Block, tokens: tuple[int, ...], number: int, filled: bool) -> Block:
        """A request's own block goes into the tree, below its block before; the request is its user."""
        block = parent.children[tokens] = Block(number, tokens, parent)
        block.filled, block.users = filled, 1
        return block

    def _forget(self, block: Block) -> None:
        assert not block.children and not block.users
        self.idle.pop(block, None)
        del block.parent.children[block.tokens]
        self.unused -= 1
        self.free.append(block.number)
        parent = block.parent
        if parent.parent is not None and not parent.users and not parent.children:
            self.idle[parent] = None
            self.idle.move_to_end(parent, last=False)  # unused at least as long

    def match(self, tokens: list[int], most: int, root: Block | None = None) -> tuple[list[Block], Block | None, int, bool]:
        """What the tree holds of a beginning of at most `most` tokens.

        Returns the whole blocks; the computed block that agrees for some tokens more, and how many these are; and
        whether there would be clearly more if another request had been computed.
        """
        found, node, at = [], root or self.root, 0
        while at + self.block <= most:
            child = node.children.get(tuple(tokens[at:at + self.block]))
            if child is None:
                break
            if not child.filled:
                return found, None, 0, True
            found.append(child)
            node, at = child, at + self.block
        rest, best, common, coming, looked = tuple(tokens[at:min(most, at + self.block)]), None, 0, 0, 0
        for child in reversed(node.children.values()):
            same = next((i for i, (a, b) in enumerate(zip(child.tokens, rest, strict=False)) if a != b), len(rest))
            if not child.filled:
                coming = max(coming, same)
            elif same > common:
                best, common = child, same
            looked += child.filled
            if looked == PARTIAL_CHOICES:
                break
        return found, best, common, coming > common + self.block // 4


@dataclass(eq=False)
class Sequence:
    """One request while it waits or runs."""

    number: int  # names it in plans
    tokens: list[int]  # prompt, then what was generated
    params: SamplingParams
    noise: int  # keys the random choices, together with the seed
    prompt_tokens: int
    ring_blocks: int | None  # blocks of its ring, where old positions will be overwritten; None: it keeps all
    computed: int = 0  # tokens whose keys and values are in the cache
    blocks: list[int] = field(default_factory=list)
    shared: list[Block] = field(default_factory=list)  # the first of them, as far as they are in the tree
    sent: int = 0  # tokens that all ranks know
    root: Block | None = None  # of the tree that its blocks belong to; None: nobody can share them


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
    blocks: tuple[int, ...]  # that its ring grows by
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
                 window: int | None = None, copying: bool = True, sinks: int = 0, rope: Rope | None = None):
        self.pool, self.block, self.chunk, self.max_sequences = BlockPool(num_blocks, block), block, chunk, max_sequences
        self.sharing, self.window, self.copying, self.sinks = sharing, window, copying, sinks
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
        needed, rolls = ring_blocks(total, self.window, self.chunk, self.block, self.sinks)
        if needed > self.pool.num_blocks:
            raise ConfigError(f'{total} tokens need {needed} blocks of {self.block} positions in the KV cache, which has '
                              f'{self.pool.num_blocks}: give it more memory (--kv-memory), or ask for fewer tokens')
        sequence = Sequence(self.numbers, tokens, params, noise, prompt_tokens or len(tokens),
                            needed if rolls else None)
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
                count = min(len(sequence.tokens) - sequence.computed, budget)
                blocks = self._grow(sequence, sequence.computed + count, dropped)
                if sequence in self.running:
                    work.append(self._work(sequence, blocks, count))
                    budget -= count
        work = [w for w in work if w.number not in dropped]
        admitted, copies = [], []
        while self.waiting and budget and len(self.running) < self.max_sequences and not dropped:
            sequence = self.waiting[0]
            copy = self._place(sequence)
            if copy is None:
                break
            self.waiting.popleft()
            self.running.append(sequence)
            copies += copy
            admitted.append(Admission(sequence.number, tuple(sequence.tokens), sequence.params, sequence.noise,
                                      sequence.prompt_tokens, sequence.computed))
            sequence.sent = len(sequence.tokens)
            count = min(len(sequence.tokens) - sequence.computed, budget)
            work.append(self._work(sequence, tuple(sequence.blocks), count))
            budget -= count
        return Plan(ended, tuple(restarted + dropped), tuple(admitted), tuple(copies), tuple(work), rest=not work)

    def _work(self, sequence: Sequence, blocks: tuple[int, ...], count: int) -> Work:
        new, sequence.sent = tuple(sequence.tokens[sequence.sent:]), len(sequence.tokens)
        return Work(sequence.number, new, blocks, count)

    def computed(self, sequence: Sequence, count: int) -> None:
        """So many tokens more are in the cache: blocks that they fill can be shared from now on."""
        sequence.computed += count
        if not self.sharing or sequence.ring_blocks is not None or sequence.root is None:
            return
        for i in range(len(sequence.shared)):
            if not sequence.shared[i].filled and (i + 1) * self.block <= sequence.computed:
                sequence.shared[i].filled = True
        while (len(sequence.shared) + 1) * self.block <= sequence.computed:
            at = len(sequence.shared)
            tokens = tuple(sequence.tokens[at * self.block:(at + 1) * self.block])
            parent = sequence.shared[-1] if at else self.pool.root
            if tokens in parent.children:  # another request has computed the same at the same time
                break
            sequence.shared.append(self.pool.add(parent, tokens, sequence.blocks[at], filled=True))

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

    def _place(self, sequence: Sequence, copying: bool | None = None) -> list[tuple[int, int]] | None:
        """Give a waiting request its first blocks.  Returns the blocks to copy; None: not now.

        It waits as well while another request computes a beginning that both have.
        """
        copying, most = self.copying if copying is None else copying, 0
        sequence.root = self._root_of(sequence)
        if self.sharing and sequence.root is not None and not sequence.params.prompt_logprobs:
            most = len(sequence.tokens) - 1  # one token at least is computed, for its logits
        if sequence.ring_blocks is not None:
            most = min(most, self.chunk, (sequence.ring_blocks - 1) * self.block)
        found, partial, common, wait = self.pool.match(sequence.tokens, most, sequence.root)
        if wait:
            return None
        if not copying:
            partial, common = None, 0
        if sequence.ring_blocks is None:
            kept, sources = found, []
        else:  # a ring overwrites its blocks some day, so they must be its own
            kept, sources = [], found if copying else []
        sources = sources + ([partial] if partial is not None else [])
        own = (sequence.ring_blocks or -(-len(sequence.tokens) // self.block)) - len(kept)
        for block in kept + sources:
            self.pool.hold(block)
        spare = len(self.running)  # each request that runs can grow by a block
        fits = own + spare <= self.pool.available
        numbers = [self.pool.take() for _ in range(own)] if fits else []
        for block in reversed(sources if fits else kept + sources):
            self.pool.let_go(block)
        if not fits:  # a cache that the request needs whole has no room for what it would copy from
            return self._place(sequence, copying=False) if sources and not self.running else None
        sequence.blocks, sequence.shared = [block.number for block in kept] + numbers, list(kept)
        sequence.computed = (len(kept) + len(sources) - (partial is not None)) * self.block + common
        self.shared_tokens += sequence.computed
        if self.sharing and sequence.ring_blocks is None and sequence.root is not None:
            for at in range(len(kept), len(sequence.tokens) // self.block):
                parent = sequence.shared[-1] if at else sequence.root
                tokens = tuple(sequence.tokens[at * self.block:(at + 1) * self.block])
                if tokens in parent.children:  # all of the prompt is there, but its last token is to be computed
                    break
                sequence.shared.append(self.pool.add(parent, tokens, numbers[at - len(kept)], filled=False))
        return list(zip([block.number for block in sources], numbers, strict=False))

    def _is_long(self, sequence: Sequence) -> bool:
        """Whether a text is beyond the length where LongRoPE's other divisors begin."""
        return self.rope is not None and bool(self.rope.long_divisors) and len(sequence.tokens) > self.rope.original_positions

    def _root_of(self, sequence: Sequence) -> Block | None:
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

    def _grow(self, sequence: Sequence, length: int, dropped: list[int]) -> tuple[int, ...]:
        """Blocks more for so many tokens; whoever came last goes back to the queue where there are none."""
        before = len(sequence.blocks)
        needed = sequence.ring_blocks or -(-length // self.block)
        while len(sequence.blocks) < needed:
            if self.pool.available:
                sequence.blocks.append(self.pool.take())
                continue
            last = self.running[-1]
            self._send_back(last, dropped)
            self.preemptions += 1
            if last is sequence:
                break
        return tuple(sequence.blocks[before:])

    def _give_back(self, sequence: Sequence) -> None:
        for block in reversed(sequence.shared):
            self.pool.let_go(block)
        self.pool.free += reversed(sequence.blocks[len(sequence.shared):])
        sequence.blocks, sequence.shared, sequence.computed = [], [], 0
