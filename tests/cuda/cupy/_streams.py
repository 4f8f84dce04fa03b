"""Streams: what is queued runs when somebody waits, and not before."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable
from time import perf_counter

import numpy as np

from cupy import fake
from cupy._memory import Allocation

_numbers = itertools.count(2)


class CUDARuntimeError(RuntimeError):
    """What a call of the runtime returned."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class Stream:
    """A queue of work, run by synchronize.  All streams are non-blocking: none waits for another."""

    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False):
        self.ptr = 0 if null else next(_numbers)
        self.pending: list[Callable[[], object]] = []
        self.sources: dict[object, np.ndarray] = {}  # host memory that queued copies still read
        self.captured: list[Callable[[], object]] | None = None  # of a capture under way
        self._previous: list[Stream] = []
        if not null:
            _local.streams.append(self)

    def push(self, work: Callable[[], object]) -> None:
        """Queue work, or note it for a graph."""
        (self.pending if self.captured is None else self.captured).append(work)

    def begin_capture(self, mode: int | None = None) -> None:
        """From now on work is noted, not done.  The null stream, and one that is being captured, cannot begin."""
        if self.ptr == 0 or self.captured is not None:
            refuse_in_capture()
        self.captured = []

    def end_capture(self) -> Graph:
        """What was noted."""
        if self.captured is None:
            raise CUDARuntimeError(1, 'cudaErrorIllegalState: the stream is not being captured')
        graph, self.captured = Graph(self.captured), None
        return graph

    def is_capturing(self) -> bool:
        """Work is noted, not done."""
        return self.captured is not None

    def push_copy_from(self, host: np.ndarray, target: np.ndarray) -> None:
        """Queue a copy from pinned memory, which is read when the stream runs."""
        self.refuse_if_captured()
        key = object()
        self.sources[key] = host

        def work():
            np.copyto(target, self.sources.pop(key))

        self.push(work)

    def run(self, until: Callable[[], object] | None = None) -> None:
        """Do what is queued, up to and with `until`."""
        self.refuse_if_captured()
        count = self.pending.index(until) + 1 if until is not None else len(self.pending)
        work, self.pending = self.pending[:count], self.pending[count:]
        with np.errstate(all='ignore'):  # a GPU warns of nothing
            for do in work:
                do()

    def refuse_if_captured(self) -> None:
        """Raises where the stream is being captured: the host cannot wait then, and what it gives is not read again."""
        if self.captured is not None:
            refuse_in_capture()

    @property
    def done(self) -> bool:
        """Nothing is queued."""
        return not self.pending

    def synchronize(self) -> None:
        """Wait for all that is queued."""
        fake.count_synchronization()
        self.run()

    def use(self) -> Stream:
        """Make it this thread's current stream."""
        _local.current = self
        return self

    def __enter__(self) -> Stream:
        self._previous.append(_local.current)
        return self.use()

    def __exit__(self, *error) -> None:
        _local.current = self._previous.pop()

    def record(self, event: Event | None = None) -> Event:
        """An event behind what is queued."""
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """What is queued from now on comes after the event."""
        self.push(event.reach)


class Graph:
    """Work that was captured, to be done again and again: with the same arguments, on what memory holds then."""

    def __init__(self, work: list[Callable[[], object]]):
        self.work = tuple(work)

    def launch(self, stream: Stream | None = None) -> None:
        """Queue all of it."""
        fake.launches['graph'] += 1
        for work in self.work:
            (stream or current()).push(work)


def refuse_in_capture() -> None:
    """Raises what CUDA says."""
    raise CUDARuntimeError(900, 'cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing')


class Event:
    """A place in a stream."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False):
        self._stream, self._mark, self.timed, self.time = None, None, not disable_timing, None

    def record(self, stream: Stream | None = None) -> None:
        """Put it behind what is queued."""
        def mark():
            self.time = perf_counter()

        (stream or current()).refuse_if_captured()
        self._stream, self._mark, self.time = stream or current(), mark, None
        self._stream.push(mark)

    def reach(self) -> None:
        """Run the stream as far as here."""
        if self._stream is not None and self._mark in self._stream.pending:
            self._stream.run(self._mark)

    def synchronize(self) -> None:
        """Wait for what is before it."""
        fake.count_synchronization()
        self.reach()


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Milliseconds between two events that the stream has reached."""
    for event in (start_event, end_event):
        if not event.timed:
            raise CUDARuntimeError(400, 'cudaErrorInvalidResourceHandle: invalid resource handle')
        if event.time is None:
            raise CUDARuntimeError(600, 'cudaErrorNotReady: device not ready')
    return 1e3 * (end_event.time - start_event.time)


class _Local(threading.local):
    """A thread's streams: a thread stands for a rank in some tests, each with a device of its own."""

    def __init__(self):
        self.current = Stream(null=True)
        self.streams = [self.current]
        self.allocator: Callable | None = None  # of using_allocator


_local = _Local()


def current() -> Stream:
    """This thread's current stream."""
    return _local.current


@contextlib.contextmanager
def using_allocator(allocator: Callable | None = None):
    """New arrays of this thread take their memory from there."""
    before, _local.allocator = _local.allocator, allocator
    try:
        yield
    finally:
        _local.allocator = before


def allocate(nbytes: int):
    """Memory for a new array.  Raises RuntimeError where a graph would keep memory that others can get."""
    if _local.allocator is not None:
        return _local.allocator(nbytes)
    if current().captured is not None:
        raise RuntimeError('memory of the common pool in a capture: others get it while the graph still writes there')
    return Allocation(nbytes)


def all_done() -> bool:
    """No stream of this thread has work pending."""
    return all(stream.done for stream in _local.streams)


def still_read(host: np.ndarray) -> bool:
    """A queued copy reads this host memory."""
    return any(np.may_share_memory(host, source) for stream in _local.streams for source in stream.sources.values())


def run_all() -> None:
    """Run every stream of this thread."""
    for stream in _local.streams:
        stream.run()


def hidden_synchronization(what: str) -> None:
    """Count and do what waits although its name does not say so."""
    fake.hidden_synchronizations[what] += 1
    current().run()
