"""Generation: prefill a prompt in chunks, then one token a step, on all ranks in step.

Every rank runs the same loop on its own shard.  Rank 0 alone has the tokenizer: it chooses each token, knows the text,
and broadcasts (token, whether to go on); nothing else is decided anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from tpmpi.config import ConfigError, RunConfig
from tpmpi.kv_cache import KVCache, Ring, ring_positions
from tpmpi.model import ModelShard, Step, forward, logits
from tpmpi.sampling import Choice, Sampler, SamplingParams, token_logprobs
from tpmpi.tokenizer import StreamDecoder

LOGIT_ROWS = 32  # prompt positions whose logits exist at once when the prompt is scored
GO_ON, STOP, LENGTH, CANCELLED = range(4)
FINISH_REASONS = {STOP: 'stop', LENGTH: 'length', CANCELLED: 'cancelled'}

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


@dataclass
class Request:
    """One prompt and what has become of it.  Text and log-probabilities are known on rank 0 only, tokens on all."""

    prompt_tokens: list[int]
    params: SamplingParams
    id: int = 0  # keys the random choices, together with the seed
    tokens: list[int] = field(default_factory=list)
    text: str = ''
    choices: list[Choice] = field(default_factory=list)
    prompt_logprobs: list[float] | None = None  # of each prompt token from the second on
    finish_reason: str | None = None
    timing: Timing = field(default_factory=Timing)


class StopText:
    """Cuts the stream at the first stop text, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.held, self.found = tuple(stops), '', False

    def push(self, text: str) -> str:
        """The text that can be shown now."""
        self.held += text
        starts = [at for at in (self.held.find(s) for s in self.stops) if at >= 0]
        if starts:
            self.found = True
            shown, self.held = self.held[:min(starts)], ''
            return shown
        keep = max((n for s in self.stops for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        shown, self.held = self.held[:len(self.held) - keep], self.held[len(self.held) - keep:]
        return shown

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        shown, self.held = self.held, ''
        return shown


class TextStream:
    """Tokens to the text that may be shown: whole characters, and nothing of a stop text."""

    def __init__(self, tokenizer, stops: Sequence[str]):
        self.decoder, self.stop_text = StreamDecoder(tokenizer), StopText(stops)

    @property
    def stopped(self) -> bool:
        """A stop text has come."""
        return self.stop_text.found

    def push(self, token: int) -> str:
        """The text that can be shown after one more token."""
        return self.stop_text.push(self.decoder.push(token))

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        return '' if self.stopped else self.stop_text.push(self.decoder.flush()) + self.stop_text.flush()


class Engine:
    """Runs requests on a model shard.  All ranks call the same methods; only rank 0 has a tokenizer, others None."""

    def __init__(self, model: ModelShard, tokenizer, device, ops, comm, run: RunConfig,
                 on_phase: Callable[[str], None] = lambda phase: None):
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.ops, self.comm, self.run, self.on_phase = ops, comm, run, on_phase
        self.rolling_noted = False

    def request(self, prompt_tokens: Sequence[int], params: SamplingParams, id: int = 0) -> Request:
        """A checked request.  Raises ConfigError when it is empty, names tokens out of range, or cannot fit."""
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
        return Request(tokens, params, id)

    def stream(self, request: Request, cancelled: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Run a request, yielding text as it is made, whole characters only, on rank 0; on the others nothing.

        `cancelled` is asked on rank 0 before each token; when it says yes, all ranks stop.  Every rank must consume its
        stream to the end: they meet in every step.
        """
        params, timing = request.params, request.timing
        cache, ring = self._new_ring(len(request.prompt_tokens) + params.max_new_tokens)
        vocab = self.model.shard.vocab
        sampler = Sampler(params, vocab, self.model.config.vocab_size, self.ops, self.comm, request.id)
        text = None if self.tokenizer is None else TextStream(self.tokenizer, params.stop)
        start = perf_counter()
        self.on_phase('prefill')
        hidden = self._prefill(request, cache, ring)
        timing.prefill_tokens = len(request.prompt_tokens)
        history = list(request.prompt_tokens)
        reason = LENGTH if params.max_new_tokens == 0 else GO_ON
        while reason == GO_ON:
            row = self.device.to_host(logits(hidden[-1:], self.model, self.ops))[0]  # [vocab/n]
            choice = sampler.choose(row, history)
            piece = ''
            if choice is not None:  # rank 0
                piece = text.push(choice.token)
                reason = self._reason(request, choice.token, text.stopped, cancelled())
                piece += text.flush() if reason != GO_ON else ''
                request.choices.append(choice)
                request.text += piece
            token, reason = self._broadcast(choice, reason)
            request.tokens.append(token)
            history.append(token)
            self._clock(timing, start)
            if piece:
                yield piece
            if reason == GO_ON:
                self.on_phase('decode')
                hidden = self._forward(np.array([token]), ring, len(history) - 1, cache)
        request.finish_reason = FINISH_REASONS[reason]
        if not request.tokens:
            timing.prefill_seconds = perf_counter() - start

    def generate(self, request: Request) -> Request:
        """Run a request to its end."""
        for _ in self.stream(request):
            pass
        return request

    def _new_ring(self, total: int) -> tuple[KVCache, Ring]:
        positions = ring_positions(total, self.model.window, self.run.chunk)
        if self.run.context is not None and total > self.run.context and not self.rolling_noted and self.comm.rank == 0:
            self.rolling_noted = True
            log.warning('up to %d tokens on a context of %d: the oldest roll off, attention sees the last %d',
                        total, self.run.context, self.run.context)
        blocks = -(-positions // self.run.block)
        cache = KVCache(self.model.config, self.model.shard, blocks, self.run.block, self.ops, self.run.kv_dtype, self.device.xp)
        return cache, cache.allocate(positions)

    def _forward(self, tokens: np.ndarray, ring: Ring, start: int, cache: KVCache):
        step = Step.of(tokens, (ring.segment(0, start, len(tokens)),))
        return forward(step, self.model, cache, self.ops, self.comm)

    def _prefill(self, request: Request, cache: KVCache, ring: Ring):
        """Compute the prompt in chunks; returns the hidden states of the last one."""
        tokens, scores = np.array(request.prompt_tokens, np.int64), []
        for at in range(0, len(tokens), self.run.chunk):
            chunk = tokens[at:at + self.run.chunk]
            hidden = self._forward(chunk, ring, at, cache)
            if request.params.prompt_logprobs:
                targets = tokens[at + 1:at + 1 + len(chunk)]
                for row in range(0, len(targets), LOGIT_ROWS):
                    part = targets[row:row + LOGIT_ROWS]
                    local = self.device.to_host(logits(hidden[row:row + len(part)], self.model, self.ops))
                    scores.append(token_logprobs(local, self.model.shard.vocab, part, self.ops, self.comm))
        if request.params.prompt_logprobs and self.comm.rank == 0:
            request.prompt_logprobs = np.concatenate(scores).tolist() if scores else []
        return hidden

    def _reason(self, request: Request, token: int, stop_found: bool, cancelled: bool) -> int:
        if cancelled:
            return CANCELLED
        if stop_found or (token in self.tokenizer.eos_token_ids and not request.params.ignore_eos):
            return STOP
        return LENGTH if len(request.tokens) + 1 >= request.params.max_new_tokens else GO_ON

    def _broadcast(self, choice: Choice | None, reason: int) -> tuple[int, int]:
        """Rank 0's token and its reason to stop, on every rank."""
        message = np.array([0 if choice is None else choice.token, reason], np.int64)
        self.comm.broadcast(message)
        return int(message[0]), int(message[1])

    def _clock(self, timing: Timing, start: float):
        """Note the time after a token: the first one ends the prefill, each later one belongs to decode."""
        now, traffic = perf_counter() - start, self.comm.traffic['all_reduce']
        if not timing.prefill_seconds:
            timing.prefill_seconds = now
            timing.before_decode = (traffic.seconds, traffic.bytes)
        else:
            timing.decode_tokens += 1
            timing.decode_seconds = now - timing.prefill_seconds
            timing.all_reduce_seconds = traffic.seconds - timing.before_decode[0]
            timing.all_reduce_bytes = traffic.bytes - timing.before_decode[1]
