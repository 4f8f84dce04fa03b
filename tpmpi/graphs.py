"""CUDA graphs of a step: what lies between two sums over the ranks is launched at once.

A graph is what CuPy captures while the model's own code runs, so nothing is said twice.  It launches the same kernels with
the same arguments again: whatever differs between two steps of one kind lies in the buffer of uploads (kernels/uploads.py).
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from tpmpi.kernels.cuda import FEW_ROWS
from tpmpi.model import all_layers

SUMS_ALONE = 16  # sums of one rank alone from the end of a graph to the next
MOST_SEEN, MOST_KINDS = 256, 16  # of steps that are remembered, and kept: a text meets a new one when it has doubled

log = logging.getLogger(__name__)


class Capture:
    """Stands in for the communicator while a step is captured: each sum over the ranks ends a graph and begins the next."""

    def __init__(self, comm, stream):
        self.size, self.stream, self.sums = comm.size, stream, 0
        self.parts: list[tuple[Any, Any]] = []  # a graph or None, and the array that is summed behind it or None

    def room(self, shape: tuple[int, int]) -> None:
        """None: only sums of host memory have one."""

    def all_reduce(self, x) -> None:
        """Note the sum.  One rank alone has nothing to wait for: its graphs are longer, and the first one is soon under way."""
        self.sums += 1
        graph = self.stream.end_capture() if self.size > 1 or self.sums % SUMS_ALONE == 1 else None
        self.parts.append((graph, x))
        if graph is not None:
            self.stream.begin_capture()


@dataclass(frozen=True)
class Captured:
    """The graphs of one kind of step, and the memory that they write: nobody else gets it as long as they are kept."""

    parts: list[tuple[Any, Any]]
    hidden: Any  # the result  [tokens, hidden]
    pool: Any

    def run(self, stream, ops, comm):
        """The step whose numbers were uploaded last.  Returns its hidden states, valid until the next one of its kind."""
        for graph, x in self.parts:
            if graph is not None:
                graph.launch(stream)
                ops.launches += 1
            if x is not None:
                comm.all_reduce(x)
        return self.hidden


class Graphs:
    """model.all_layers for the steps on one cache, by graphs where a step is of a kind that has come before.

    Every rank decides by itself: with graphs or without, it makes the same sums over the ranks.
    """

    def __init__(self, device):
        self.xp, self.stream = device.xp, device.stream
        self.seen: set[Hashable] = set()
        self.captured: dict[Hashable, Captured] = {}
        self.usable = True

    def __call__(self, step, model, cache, ops, comm):
        """Hidden states before the head, [tokens, hidden]; see model.all_layers."""
        kind = ops.kind_of_step
        if not self.usable or len(step.tokens) > FEW_ROWS or model.config.num_experts:  # cuBLAS, and sorting, are not captured
            return all_layers(step, model, cache, ops, comm)
        if kind not in self.captured:
            if kind not in self.seen:  # at first without: kernels are compiled then, and tables uploaded
                self.seen = {kind} if len(self.seen) == MOST_SEEN else self.seen | {kind}
                return all_layers(step, model, cache, ops, comm)
            if len(self.captured) == MOST_KINDS:
                self.stream.synchronize()  # the last one may still be under way
                self.captured.clear()
            try:
                self.captured[kind] = self._capture(step, model, cache, ops, comm)
            except Exception as e:  # of CuPy or CUDA; what is wrong otherwise is so without a capture, too
                self.usable = False
                log.warning('CUDA graphs cannot be captured (%s): kernels are launched one by one', ' '.join(str(e).split()))
                return all_layers(step, model, cache, ops, comm)
        return self.captured[kind].run(self.stream, ops, comm)

    def _capture(self, step, model, cache, ops, comm) -> Captured:
        """The graphs of a step, which is not computed by that."""
        pool, capture = self.xp.cuda.MemoryPool(), Capture(comm, self.stream)
        with self.xp.cuda.using_allocator(pool.malloc):
            self.stream.begin_capture()
            try:
                hidden = all_layers(step, model, cache, ops, capture)
            finally:
                graph = self.stream.end_capture()
        return Captured([*capture.parts, (graph, None)], hidden, pool)
