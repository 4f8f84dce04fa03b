"""What the tests of the compiled kernels and of the CUDA kernels share."""

from __future__ import annotations

import os

import numpy as np

from tpmpi.weights import Stored


def ready(ops, kernels) -> None:
    """Kernels made ready as a run does it, in children on all cores."""
    ops.compile_missing(kernels, min(4, len(os.sched_getaffinity(0))), f'tests-{os.getpid()}')
    ops.build(kernels)


def pack(ops, stored: Stored, pieces: int):
    """A packed weight, filled piece by piece as the loader does."""
    rows, transposed = len(stored.data), stored.group_axis == 0
    weight = ops.new_weight(rows, stored.shape[1], transposed, stored.kind, 'W')
    unit = 32 if transposed else 1
    for part in np.array_split(np.arange(-(-rows // unit)), pieces):
        if len(part):
            first, last = int(part[0]) * unit, min(rows, (int(part[-1]) + 1) * unit)
            groups = slice(first // 32, last // 32) if transposed else slice(first, last)
            ops.fill(weight, first, Stored(stored.kind, stored.data[first:last], *(None if p is None else p[groups] for p in (
                stored.scale, stored.offset)), group_axis=stored.group_axis))
    return weight


def ring_steps(ring, steps, window: int | None, sinks: int):
    """Segments of so many tokens at most, one after another, and the window that the ring serves in each.

    A ring that goes round holds window + step - 1 positions besides its pinned blocks.
    """
    position, room = 0, ring.capacity - ring.pinned * ring.block
    for step in steps:
        step, seen = min(step, ring.capacity), window
        if position + step > (room if sinks else ring.capacity):
            step = min(step, -(-room // 2))
            seen = min(window or room, room - step + 1)
        yield ring.segment(0, position, step), seen
        position += step
