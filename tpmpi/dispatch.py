"""The work of a batch: one queue on global rank 0, and replicas of the model that each take from it.

A replica's first rank sends a report: what has finished, what unfinished requests have gained, how many requests it
could take.  Rank 0 looks for reports between its own steps, since MPI moves messages only then, and answers each with
lines of the input.  It alone writes.  Lines are parsed and tokenized where they are run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from tpmpi.batch_format import (
    BatchRequest,
    Defaults,
    LineError,
    Outcome,
    encode_record,
    error_record,
    line_identity,
    parse_line,
    result_record,
)
from tpmpi.config import ConfigError
from tpmpi.engine import Engine, Request
from tpmpi.tokenizer import StreamDecoder

DEFAULT_NEW_TOKENS, COMPLETION_TOKENS = 128, 16  # of a line that does not say; the latter is OpenAI's for completions
REPORT_SECONDS = 0.3  # between two reports with nothing but tokens for the journal
IDLE_SECONDS = 2e-3
BEGIN_SECONDS = 0.5  # of parsing and tokenizing between two steps: the other ranks of a replica wait meanwhile
TEXT_SAMPLE = 16  # characters for each token of the model's length: what is looked at of a text that is longer
AHEAD = 4  # requests that a replica takes before it has room, so that none of its steps is empty
ANSWER_BYTES = 1 << 27  # of lines in one answer, but for the last: a message of MPI has 2 GiB at most
START = 16  # that one takes which runs none: an answer comes after a step of rank 0, and its first steps should be full


@dataclass(frozen=True)
class Line:
    """A line of the input on its way to a replica."""

    number: int
    data: bytes
    tokens: list[int]  # that an earlier run has generated
    repeats: int | None  # the earlier line that has its id


@dataclass
class Report:
    """What a replica tells the queue."""

    finished: list[tuple[int, str, bool]] = field(default_factory=list)  # line, its record, whether it is an error
    progress: list[tuple[int, list[int]]] = field(default_factory=list)  # line, tokens since the last report
    tokens: int = 0  # generated since the last report
    prompt_tokens: int = 0  # of requests that have finished since
    held: int = 0  # requests that the replica has
    room: int = 0  # requests that it could take
    leaving: bool = False  # this is the last one


@dataclass
class Answer:
    """What the queue tells a replica."""

    lines: list[Line] = field(default_factory=list)
    empty: bool = False  # no line will come any more
    stop: bool = False  # leave now


class Queue:
    """Which lines are to do, which replica has how many, and what has become of them.  On global rank 0."""

    def __init__(self, lines, results, replicas: int, should_stop):
        self.lines, self.results, self.should_stop = lines, results, should_stop
        self.pending = self._pending()
        self.next_line: int | None = None
        self.held = [0] * replicas  # requests that each replica has
        self.total = lines.count()
        self.left = lines.remaining  # lines that nobody has yet
        self.before = self.total - self.left  # lines that earlier runs have done
        self.here = set(range(replicas))  # replicas that will report again
        self.finished = self.failed = self.tokens = self.prompt_tokens = 0
        self.error: Exception | None = None
        self._advance()

    def _pending(self) -> Iterator[int]:
        """Lines to do, those that an earlier run has begun first."""
        begun = sorted(line for line in self.results.unfinished if not self.lines.is_done(line))
        yield from begun
        seen = set(begun)
        yield from (line for line in self.lines.pending() if line not in seen)

    def _advance(self) -> None:
        self.next_line = next(self.pending, None)

    @property
    def stopping(self) -> bool:
        """No more work is given out."""
        return self.error is not None or self.should_stop()

    def answer(self, replica: int, report: Report) -> Answer:
        """Take a report and give work: to each replica its even share of what is left, as far as it has room."""
        try:
            for line, tokens in report.progress:
                self.results.progress(line, tokens)
            for line, record, is_error in report.finished:
                self.results.finish(line, record)
                self.lines.mark_done(line)
                self.failed += is_error
                self.finished += not is_error
            self.results.check()
        except (ValueError, OSError) as e:
            self.error = self.error or e
        self.tokens += report.tokens
        self.prompt_tokens += report.prompt_tokens
        self.held[replica] = report.held
        if report.leaving:
            self.here.discard(replica)
        answer = Answer(stop=self.stopping)
        if not answer.stop:
            share = -(-(sum(self.held) + self.left) // len(self.held))
            for _ in range(min(report.room, max(0, share - report.held))):
                if self.next_line is None or sum(len(line.data) for line in answer.lines) > ANSWER_BYTES:
                    break
                try:
                    answer.lines.append(self._take())
                except (ValueError, OSError) as e:
                    self.error, answer.stop = self.error or e, True
                    break
            self.held[replica] += len(answer.lines)
            answer.empty = self.next_line is None
        return answer

    def _take(self) -> Line:
        number = self.next_line
        line = Line(number, self.lines.read(number), self.results.unfinished.pop(number, []), self.lines.repeated(number))
        self.left -= 1
        self._advance()
        return line


class Replica:
    """One copy of the model at work, seen from its first rank."""

    def __init__(self, engine: Engine, defaults: Defaults, model: str, max_sequences: int):
        self.engine, self.defaults, self.model, self.max_sequences = engine, defaults, model, max_sequences
        self.requests: dict[int, tuple[BatchRequest, Request]] = {}  # by line
        self.told: dict[int, int] = {}  # tokens of each that the queue knows
        self.given: deque[Line] = deque()  # lines that have not begun yet
        self.unsent = Report()
        self.empty = self.stopped = False
        self.reported = 0.0
        self.created = int(time.time())

    @property
    def busy(self) -> bool:
        """There is something to compute."""
        return bool(self.requests)

    @property
    def over(self) -> bool:
        """Nothing is left to do, or to tell before it leaves."""
        return self.stopped or (self.empty and not self.held and not self.unsent.finished)

    @property
    def held(self) -> int:
        """Requests that it has."""
        return len(self.given) + len(self.requests)

    def idle(self) -> None:
        """Wait a little for mail."""
        time.sleep(IDLE_SECONDS)
        self.engine.seconds['waiting'] += IDLE_SECONDS

    def take(self, answer: Answer) -> None:
        """Take what the queue has given; `begin` begins it."""
        self.empty, self.stopped = self.empty or answer.empty, self.stopped or answer.stop
        self.given.extend(answer.lines)

    def begin(self) -> None:
        """Begin the next lines, at least one if there are any."""
        until = time.monotonic() + BEGIN_SECONDS
        while self.given and not self.stopped:
            self._begin(self.given.popleft())
            if time.monotonic() > until:
                break

    def _begin(self, line: Line) -> None:
        if line.repeats is not None:
            style, id = line_identity(line.data)
            self._fail(line.number, None, style, LineError(f'id {id!r} is that of line {line.repeats} already'))
            return
        try:
            asked = parse_line(line.data, line.number, self.defaults)
        except LineError as e:
            self._fail(line.number, e.id, e.style, e)
            return
        try:
            request = self._request(asked, line.number)
            try:
                self.engine.add(request, line.tokens)
            except ConfigError as e:
                raise ConfigError(f'{e}; then remove this line from the output and start again') from None
        except ValueError as e:
            self._fail(line.number, asked.id, asked.style, e)
            return
        self.requests[line.number] = asked, request
        self.told[line.number] = len(request.tokens)
        if request.finish_reason is not None:
            self._finish(line.number)

    def _request(self, asked: BatchRequest, line: int) -> Request:
        from tpmpi.sampling import SamplingParams
        tokenizer = self.engine.tokenizer
        if asked.messages is not None:
            self._refuse_too_long('\n'.join(str(value) for message in asked.messages for value in message.values()))
        elif isinstance(asked.prompt, str):
            self._refuse_too_long(asked.prompt)
        if asked.messages is not None:
            tokens = tokenizer.apply_chat_template(asked.messages)
        else:
            tokens = tokenizer.encode(asked.prompt) if isinstance(asked.prompt, str) else asked.prompt
        params = dict(asked.params)
        if params.get('max_new_tokens') is None:
            usual = COMPLETION_TOKENS if asked.url == '/v1/completions' else DEFAULT_NEW_TOKENS
            params['max_new_tokens'] = min(usual, self.engine.room(tokens))
            if asked.url == '/v1/embeddings':
                params['max_new_tokens'] = 0
        params['embedding'] = asked.embedding
        return self.engine.request(tokens, SamplingParams(**params), 0 if asked.own_seed else line)

    def _refuse_too_long(self, text: str) -> None:
        """Raises ConfigError for a text that surely cannot fit, by its beginning: to tokenize 10 MB takes 10 s and 2 GB."""
        most = self.engine.model.config.max_positions
        sample = text[:TEXT_SAMPLE * most]
        if len(sample) < len(text) and self.engine.run.context is None:
            if (count := len(self.engine.tokenizer.encode(sample))) > 2 * most:
                raise ConfigError(f'the first {len(sample)} of {len(text)} characters are {count} tokens; the model was '
                                  f'trained for {most}: shorten them, or let old ones roll off with --context {most}')

    def step(self) -> None:
        """One step of the engine, and what it has finished."""
        self.engine.step()
        for line, (_, request) in list(self.requests.items()):
            if request.finish_reason is not None:
                self._finish(line)

    def report(self, leaving: bool = False) -> Report | None:
        """What the queue should hear now, or None."""
        now, held, running = time.monotonic(), self.held, len(self.engine.scheduler.running)
        waiting = held - running  # here, where nobody else can take them: no more than run, or a few
        room = min(self.max_sequences + AHEAD - held, max(AHEAD, running or START) - waiting)
        room = 0 if self.empty or self.stopped else max(0, room)
        due = now - self.reported > REPORT_SECONDS
        if not (leaving or due or self.unsent.finished or (room and not waiting)):
            return None
        report, self.unsent = self.unsent, Report()
        for line, (asked, request) in self.requests.items():
            whole = asked.logprobs or asked.embedding or request.params.prompt_logprobs  # must be computed again from the start
            if len(request.tokens) > self.told[line] and not whole:
                report.progress.append((line, request.tokens[self.told[line]:]))
            report.tokens += len(request.tokens) - self.told[line]
            self.told[line] = len(request.tokens)
        report.held, report.room, report.leaving, self.reported = held, room, leaving, now
        return report

    def _finish(self, line: int) -> None:
        asked, request = self.requests.pop(line)
        self.unsent.tokens += len(request.tokens) - self.told.pop(line)
        self.unsent.prompt_tokens += len(request.prompt_tokens)
        record = result_record(asked, self._outcome(asked, request), self.model, self.created)
        self.unsent.finished.append((line, encode_record(record).decode().rstrip('\n'), False))

    def _fail(self, line: int, id, style: str, error: Exception) -> None:
        message = ' '.join(str(error).split())
        record = error_record(line, id, style, message)
        self.unsent.finished.append((line, encode_record(record).decode().rstrip('\n'), True))

    def _outcome(self, asked: BatchRequest, request: Request) -> Outcome:
        tokenizer, logprobs, offsets, embedding = self.engine.tokenizer, None, None, None
        if asked.logprobs:
            logprobs = [{'token': c.token, 'text': tokenizer.piece(c.token), 'logprob': c.logprob,
                         'top': [[token, tokenizer.piece(token), logprob] for token, logprob in c.top]} for c in request.choices]
            offsets = offsets_of(tokenizer, [c.token for c in request.choices])
        if asked.embedding:
            embedding = [float(x) for x in request.embedding]
        scores = request.prompt_logprobs if request.params.prompt_logprobs else None
        return Outcome(len(request.prompt_tokens), request.tokens, request.text, request.finish_reason, logprobs, scores,
                       embedding, offsets)


def offsets_of(tokenizer, tokens: list[int]) -> list[int]:
    """Where what each token adds to a text begins in it, in characters."""
    decoder = StreamDecoder(tokenizer)
    return list(accumulate((len(decoder.push(token)) for token in tokens[:-1]), initial=0))[:len(tokens)]


# ---- the loops


def lead_all(queue: Queue, replica: Replica, mail, beat) -> None:
    """Global rank 0: its own replica's work, the other replicas' mail, until all have left.

    mail: comm.Mail between the first ranks of replicas, number r on rank r there.  beat: called before each step.
    """
    alone = len(queue.held) == 1
    while True:
        beat()
        while not alone and (message := mail.receive()) is not None:
            number, report = message
            mail.send(number, queue.answer(number, report))
        if 0 in queue.here:
            if (report := replica.report()) is not None or queue.stopping:
                replica.take(queue.answer(0, report or Report(held=replica.held)))
            replica.begin()
            if replica.over:
                queue.answer(0, replica.report(leaving=True))
                replica.engine.step(stop=True)
            elif replica.busy:
                replica.step()
            continue
        if not queue.here:
            return
        replica.idle()


def lead_replica(replica: Replica, mail, beat) -> None:
    """The first rank of another replica: one report under way at a time, until it leaves."""
    waiting = leaving = False
    while True:
        beat()
        if waiting and (message := mail.receive()) is not None:
            waiting = False
            replica.take(message[1])
            if leaving:
                return
        if not waiting and not leaving:
            leaving = replica.over
            if (report := replica.report(leaving)) is not None:
                mail.send(0, report)
                waiting = True
            if leaving:
                replica.engine.step(stop=True)
        if not leaving:
            replica.begin()
        if replica.busy and not leaving and not replica.stopped:
            replica.step()
        elif waiting:
            replica.idle()


def follow(engine: Engine, beat) -> None:
    """All other ranks: compute what their replica's first rank plans."""
    while not engine.step().stop:
        beat()
