"""Generation: many requests at once, which join and leave between steps, on all ranks in step.

Rank 0 decides what a step is (scheduler.py) and announces it; every rank computes it on its own shard.  Rank 0 alone has
the tokenizer: it chooses each token and knows the text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from tpmpi.config import ConfigError, RunConfig
from tpmpi.footprint import LOGIT_ROWS
from tpmpi.kv_cache import KVCache, Ring, pinned_blocks, ring_blocks, rings_blocks
from tpmpi.model import ModelShard, Step, all_layers, forward, logits
from tpmpi.sampling import Choice, Draw, Sampler, SamplingParams, token_logprobs
from tpmpi.scheduler import Admission, Plan, Scheduler, Sequence
from tpmpi.text_stream import TextStream

log = logging.getLogger(__name__)


@dataclass
class Timing:
    """Where the time of one request went, on this rank."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0  # until the first new token is chosen
    decode_tokens: int = 0  # tokens after the first one
    decode_seconds: float = 0.0
    all_reduce_seconds: float = 0.0  # in decode
    all_reduce_bytes: int = 0  # in decode
    before_decode: tuple[float, int] = (0.0, 0)  # the communicator's all-reduce seconds and bytes until then


@dataclass(eq=False)
class Request:
    """One prompt and what has become of it.  Text and log-probabilities are known on rank 0 only."""

    prompt_tokens: list[int]
    params: SamplingParams
    id: int = 0  # keys the random choices, together with the seed
    tokens: list[int] = field(default_factory=list)
    text: str = ''
    choices: list[Choice] = field(default_factory=list)
    prompt_logprobs: list[float] | None = None  # of each prompt token from the second on
    embedding: np.ndarray | None = None  # [hidden]
    finish_reason: str | None = None  # stop, length or cancelled
    timing: Timing = field(default_factory=Timing)
    cancelled: Callable[[], bool] = lambda: False  # asked on rank 0 with each token
    text_stream: TextStream | None = None


@dataclass
class Running:
    """A request that runs, as every rank sees it."""

    params: SamplingParams
    noise: int
    tokens: list[int]  # prompt, and what was generated
    prompt_tokens: int
    computed: int  # of them are in the cache
    rings: tuple[Ring, ...]  # for each group of layers
    length: int  # of the text, as RoPE takes it until more tokens are computed


class Engine:
    """Runs requests on a model shard.  All ranks call `step` together; only rank 0 has a tokenizer, others None."""

    def __init__(self, model: ModelShard, tokenizer, device, ops, comm, run: RunConfig,
                 on_phase: Callable[[str], None] = lambda phase: None):
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.ops, self.comm, self.run, self.on_phase = ops, comm, run, on_phase
        self.sampler = Sampler(model.shard.vocab, model.config.vocab_size, ops, comm)
        self.leads = comm.rank == 0
        self.cache: KVCache | None = None
        self.layers: Callable | None = None  # what computes those of a step on this cache
        self.scheduler: Scheduler | None = None  # on rank 0
        self.running: dict[int, Running] = {}
        self.requests: dict[int, tuple[Request, Sequence]] = {}  # on rank 0: those that wait or run
        self.scored: set[int] = set()  # those whose prompts have all their log-probabilities
        self.steps, self.resting, self.rolling_noted, self.streaming, self.failed = 0, False, False, False, False
        # sampling and gathering are parts of steps; gathering: rank 0's wait for candidates of ranks whose logits come later
        self.seconds = dict.fromkeys(('prefill', 'decode', 'sampling', 'gathering', 'scheduling', 'waiting'), 0.0)

    def allocate(self, num_blocks: int, max_sequences: int) -> None:
        """The cache, for all requests to come; a collective call, while none runs."""
        assert not self.running
        self.resting = True  # the first request may come late, and be long to tokenize
        model, run = self.model, self.run
        self.cache = self.layers = None
        self.cache = KVCache(model.config, model.shard, model.groups, num_blocks, run.block, self.ops, run.kv_dtype,
                             self.device.xp)
        self.layers = self.layers_of(self.cache)
        if self.leads:
            copying = run.block % getattr(self.ops, 'SLOTS_TOGETHER', 1) == 0
            self.scheduler = Scheduler(num_blocks, run.block, run.chunk, max_sequences, run.share_prefixes, model.groups,
                                       copying, self._stretched)

    def layers_of(self, cache: KVCache) -> Callable:
        """What computes all layers of steps on one cache: on a GPU by graphs, unless these are off, on a CPU in one call."""
        if self.device.gpu is None and hasattr(self.ops, 'kernels_of_layers'):
            from tpmpi.fused import FusedLayers  # late: there may be no Numba
            return FusedLayers(self.ops, self.model, cache)
        if self.device.gpu is None or self.run.cuda_graphs == 'off':
            return all_layers
        from tpmpi.graphs import Graphs
        return Graphs(self.device)

    # ---- requests, on rank 0

    def request(self, prompt_tokens: Iterable[int], params: SamplingParams, id: int = 0) -> Request:
        """A checked request.  Raises ConfigError when it is empty, names tokens out of range, or cannot fit."""
        self.check()
        config, tokens = self.model.config, [int(t) for t in prompt_tokens]
        if not tokens:
            raise ConfigError('the prompt is empty; expected at least one token')
        bad = next((t for t in tokens if not 0 <= t < config.vocab_size), None)
        if bad is not None:
            raise ConfigError(f'the prompt holds token {bad}; the model has tokens 0 to {config.vocab_size - 1}')
        total = len(tokens) + params.max_new_tokens
        if self.run.context is None and total > config.max_positions:
            raise ConfigError(
                f'{len(tokens)} prompt tokens and {params.max_new_tokens} new ones are {total}; the model was trained for '
                f'{config.max_positions}: shorten them, or let old ones roll off with --context {config.max_positions}')
        if config.learned_positions and total > config.learned_positions:
            raise ConfigError(f'{total} tokens; the model has learned {config.learned_positions} positions: ask for fewer')
        return Request(tokens, params, id)

    def room(self, prompt_tokens: Sequence) -> int:
        """New tokens that a prompt leaves of the model's length; any number where old ones roll off."""
        config, most = self.model.config, 1 << 31
        if self.run.context is None:
            most = config.max_positions
        return max(0, min(most, config.learned_positions or most) - len(prompt_tokens))

    def close(self) -> None:
        """Let go of weights and cache.  Raises ConfigError while a stream is open, and where the ranks are out of step."""
        if self.streaming:
            raise ConfigError('a stream is open: read it to its end, or close it, before the model')
        if self.failed:
            self.check()
        self.model = self.cache = self.layers = self.scheduler = self.sampler = self.ops = None

    def check(self) -> None:
        """Raises ConfigError after `close`, or where an error has left the ranks in the middle of a step, each somewhere else."""
        if self.model is None:
            raise ConfigError('the model is closed; load it again')
        if self.failed:
            raise ConfigError('an earlier request has failed, and the ranks are out of step: end the program')

    def add(self, request: Request, tokens: Iterable[int] = ()) -> None:
        """Put a request in the queue; tokens: what an earlier run has generated of it, as if it had not been interrupted.

        Raises ConfigError when it could never fit in the cache.
        """
        request.text_stream = TextStream(self.tokenizer, request.params.stop)
        for token in tokens:
            if request.finish_reason is None:
                self._accept(request, token)
        if request.finish_reason is None:
            sequence = self.scheduler.add(request.prompt_tokens + request.tokens, request.params, request.id,
                                          len(request.prompt_tokens))
            self.requests[sequence.number] = request, sequence

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self.requests)

    # ---- a step, on all ranks

    def step(self, stop: bool = False) -> Plan:
        """One step: what rank 0 plans, all compute.  Returns its plan.

        On rank 0 the requests have their new token and text then, and those that are over their finish_reason; the other
        ranks hear of both with the next plan.  stop: this is the last one, and nothing is computed.
        """
        if self.resting:
            self.comm.rest()
        start, plan = perf_counter(), None
        if self.leads:
            plan = Plan(stop=True) if stop else self.scheduler.plan()
        plan = self.comm.announce(plan)
        announced = perf_counter()
        self.seconds['scheduling' if self.leads else 'waiting'] += announced - start
        self._prepare(plan)
        self.resting = plan.rest
        if plan.work:
            self.steps += 1
            phase = self._run(plan)
            self.seconds[phase] += perf_counter() - announced
        return plan

    def _prepare(self, plan: Plan) -> None:
        """Who leaves, who joins, which blocks are copied."""
        for number, _, _ in plan.ended:
            self.running.pop(number, None)
            self.scored.discard(number)
        for number in plan.dropped:
            self.running.pop(number, None)
        for source, target in plan.copies:
            self.cache.copy_block(source, target)
        for a in plan.admitted:
            self.running[a.number] = self._running(a)
        for work in plan.work:
            sequence = self.running[work.number]
            sequence.tokens.extend(work.new_tokens)
            for ring, blocks in zip(sequence.rings, work.blocks, strict=False):  # none, most of the time
                ring.extend(blocks)

    def _running(self, a: Admission) -> Running:
        """A request that begins.  Its prompt is as long as it is from the first token on, and a long text stays one."""
        rope, run, total = self._stretched, self.run, a.prompt_tokens + a.params.max_new_tokens
        long = rope is not None and rope.long_divisors and len(a.tokens) > rope.original_positions
        rings = [Ring.empty(ring_blocks(total, group.window, run.chunk, run.block, group.sinks)[0], run.block,
                            pinned_blocks(group.sinks, run.block)) for group in self.model.groups]
        return Running(a.params, a.noise, list(a.tokens), a.prompt_tokens, a.computed, tuple(rings),
                       len(a.tokens) if long else a.prompt_tokens)

    @property
    def _stretched(self):
        """The RoPE that depends on a text's length, if there is one."""
        return next((rope for rope in self.model.ropes if rope.by_length), None)

    def _run(self, plan: Plan) -> str:
        """Compute a plan's tokens and choose the next ones.  Returns the phase that most of its tokens were in."""
        tokens, segments, last_rows, scored, at = [], [], [], [], 0
        for work in plan.work:
            sequence = self.running[work.number]
            tokens += sequence.tokens[sequence.computed:sequence.computed + work.count]
            segments.append([ring.segment(at, sequence.computed, work.count, sequence.length) for ring in sequence.rings])
            at += work.count
            if sequence.computed + work.count == len(sequence.tokens):
                last_rows.append((at - 1, work.number))
            if sequence.params.prompt_logprobs and work.number not in self.scored:
                scored.append((at - work.count, work))
        of_prompts = sum(w.count for w in plan.work if w.count > 1 or self.running[w.number].computed == 0)
        phase = 'prefill' if 2 * of_prompts > at else 'decode'
        self.on_phase(phase)
        step = Step.of(np.array(tokens, np.int64), *zip(*segments, strict=True))
        hidden = forward(step, self.model, self.cache, self.ops, self.comm, self.layers)
        for row, work in scored:
            self._score(hidden, row, work)
            sequence = self.running[work.number]
            if sequence.computed + work.count >= sequence.prompt_tokens:  # once: it may be computed again, or in another way
                self.scored.add(work.number)
        for work in plan.work:
            self.running[work.number].computed += work.count
            if self.leads:
                self.scheduler.computed(self.requests[work.number][1], work.count)
        self._keep_embeddings(hidden, last_rows)
        drawn = [(row, number) for row, number in last_rows if self.running[number].params.max_new_tokens]
        if drawn:
            rows = [row for row, _ in drawn]
            last = hidden if rows == list(range(len(hidden))) else hidden[rows]  # in decode no copy
            local = logits(last, self.model, self.ops)  # [rows, vocab/n]
            start, gathered = perf_counter(), self.comm.traffic['gather'].seconds
            draws = [Draw(s.params, s.noise, s.tokens) for s in (self.running[number] for _, number in drawn)]
            choices = self.sampler.choose(local, draws)
            for (_, number), choice in zip(drawn, choices or (), strict=False):  # rank 0
                self._choose(number, choice)
            gathered = self.comm.traffic['gather'].seconds - gathered
            self.seconds['gathering'] += gathered
            self.seconds['sampling'] += perf_counter() - start - gathered - self.sampler.waited
        if self.leads:
            for _, number in last_rows:
                request = self.requests[number][0]
                if request.finish_reason is None and request.params.max_new_tokens == 0:
                    request.finish_reason = 'length'
                self._close(number)
        return phase

    def _choose(self, number: int, choice: Choice) -> None:
        """Rank 0: a request's next token."""
        request, sequence = self.requests[number]
        request.choices.append(choice)
        self._accept(request, choice.token)
        sequence.tokens.append(choice.token)

    def _accept(self, request: Request, token: int) -> None:
        """Rank 0: one token more of a request, its text, and whether it is the last."""
        params, cancelled = request.params, request.cancelled()
        piece = request.text_stream.push(token)
        request.tokens.append(token)
        if cancelled:
            request.finish_reason = 'cancelled'
        elif request.text_stream.stopped or (token in self.tokenizer.eos_token_ids and not params.ignore_eos):
            request.finish_reason = 'stop'
        elif len(request.tokens) >= params.max_new_tokens:
            request.finish_reason = 'length'
        request.text += piece + (request.text_stream.flush() if request.finish_reason else '')

    def _close(self, number: int) -> None:
        request, sequence = self.requests[number]
        if request.finish_reason is not None:
            del self.requests[number]
            self.scheduler.end(sequence, request.finish_reason)

    def _score(self, hidden, row: int, work) -> None:
        """Log-probabilities of the prompt's tokens that follow those of a segment.  Collective."""
        sequence, scores = self.running[work.number], []
        start = sequence.computed + 1
        targets = np.array(sequence.tokens[start:min(start + work.count, sequence.prompt_tokens)], np.int64)
        for at in range(0, len(targets), LOGIT_ROWS):
            part = targets[at:at + LOGIT_ROWS]
            local = logits(hidden[row + at:row + at + len(part)], self.model, self.ops)
            scores.append(token_logprobs(local, self.model.shard.vocab, part, self.ops, self.comm))
        if self.leads:
            request = self.requests[work.number][0]
            if sequence.computed == 0:
                request.prompt_logprobs = []
            request.prompt_logprobs += [float(x) for part in scores for x in part]

    def _keep_embeddings(self, hidden, last_rows) -> None:
        for row, number in last_rows if self.leads else ():
            request = self.requests[number][0]
            if request.params.embedding and request.embedding is None:
                request.embedding = np.array(self.device.to_host(hidden[row:row + 1])[0])  # not a view of all of them
                if not np.isfinite(request.embedding).all():
                    raise ArithmeticError('the hidden state is not finite: the weights are damaged, or overflow float32')

    # ---- one request alone

    def stream(self, request: Request, cancelled: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Run a request, yielding text as it is made, whole characters only, on rank 0; on the others nothing.

        `cancelled` is asked on rank 0 with each token; when it says yes, all ranks stop, as they do when rank 0 leaves its
        stream.  The others must consume theirs to the end: they meet in every step.  Raises ConfigError while another is open.
        """
        self.check()
        if self.streaming:
            raise ConfigError('another stream is open: read it to its end, or close it, before the next request')
        if request.finish_reason is not None:
            raise ConfigError('this request has run; make another one')
        self.streaming = True
        try:
            yield from self._stream(request, cancelled)
        except GeneratorExit:  # there was a token: the request ends with the next one, if it has not
            request.cancelled = lambda: True
            while not self.step().ended:
                pass
        except BaseException:  # nobody knows what was computed
            self.running.clear()
            self.requests.clear()
            self.scored.clear()
            self.cache = self.layers = None
            self.resting, self.failed = False, self.comm.size > 1
            raise
        finally:
            self.streaming = False

    def _stream(self, request: Request, cancelled: Callable[[], bool]) -> Iterator[str]:
        self._make_room(request)
        request.cancelled, timing, start, shown = cancelled, request.timing, perf_counter(), 0
        timing.prefill_tokens = len(request.prompt_tokens)
        if self.leads:
            self.add(request)
        while True:
            if self.leads and len(request.text) > shown:
                piece, shown = request.text[shown:], len(request.text)
                yield piece
            plan = self.step()
            if plan.ended:  # on rank 0 it is over since the step before
                break
            self._clock(timing, start, plan)
            if not self.leads:
                tokens = self.running[plan.work[0].number].tokens
                request.tokens += tokens[len(request.prompt_tokens) + len(request.tokens):]
        if not self.leads:
            _, last, request.finish_reason = plan.ended[0]
            request.tokens += last

    def generate(self, request: Request) -> Request:
        """Run a request to its end."""
        for _ in self.stream(request):
            pass
        return request

    def _make_room(self, request: Request) -> None:
        """A cache for one request, if what is there is too small."""
        total = len(request.prompt_tokens) + request.params.max_new_tokens
        run = self.run
        if run.context is not None and total > run.context and not self.rolling_noted and self.leads:
            self.rolling_noted = True
            log.warning('up to %d tokens on a context of %d: the oldest roll off, attention sees the last %d%s', total,
                        run.context, run.context, f' and the first {run.sinks}' if run.sinks else '')
        blocks = rings_blocks(self.model.groups, total, run.chunk, run.block)
        if self.cache is None:
            self.allocate(blocks, 1)
        elif self.cache.num_blocks < blocks:  # twice as large, so that a conversation that grows keeps its beginnings
            longest = max(self.model.config.max_positions, total)
            most = rings_blocks(self.model.groups, longest, run.chunk, run.block)
            self.allocate(max(blocks, min(2 * self.cache.num_blocks, most)), 1)

    def _clock(self, timing: Timing, start: float, plan: Plan):
        """Note the time after a step: the first token ends the prefill, each later one belongs to decode."""
        now, traffic = perf_counter() - start, self.comm.traffic['all_reduce']
        sequence = self.running[plan.work[0].number]
        if len(sequence.tokens) == timing.prefill_tokens:
            timing.prefill_seconds = now
            timing.before_decode = (traffic.seconds, traffic.bytes)
        else:
            timing.decode_tokens = len(sequence.tokens) - timing.prefill_tokens
            timing.decode_seconds = now - timing.prefill_seconds
            timing.all_reduce_seconds = traffic.seconds - timing.before_decode[0]
            timing.all_reduce_bytes = traffic.bytes - timing.before_decode[1]
