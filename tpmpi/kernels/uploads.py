"""What the host decides for a step, on its way to a GPU: where keys lie, who attends to what, and all in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tpmpi.kernels.cuda_source import ITEMS

ALIGNMENT = 16  # bytes, of each array in the buffer
SMALLEST = 1 << 16  # bytes of a buffer
KEYS, TASK_SIZE = 128, 8  # attention.cu
TILED_FROM = 16  # queries of a request from which on tensor cores compute its attention, where they can
TILE_ITEMS = 64  # attention_tiles.cu
MOST_SPLITS = 1024  # of a text's keys
SPLITS = ((8, KEYS), (64, 4 * KEYS))  # keys of one block where a step has at most so many queries; more fill the device


def power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length()


class Uploads:
    """Host arrays in one device buffer, by one asynchronous copy out of pinned memory.

    The stream orders that copy behind all that still reads the buffer.  The host does not wait for it: it writes two pinned
    buffers in turn, each again only when the copy out of it has ended.
    """

    def __init__(self, xp):
        self.xp, self.size, self.turn = xp, 0, 0
        self.device, self.pinned, self.copied = None, [], [xp.cuda.Event(disable_timing=True) for _ in range(2)]
        self.layout, self.views = None, []

    def send(self, arrays: Sequence[np.ndarray]) -> list:
        """The arrays on the device: views of the buffer, valid until the next call."""
        arrays = [np.ascontiguousarray(x) for x in arrays]
        starts = np.cumsum([0] + [-(-x.nbytes // ALIGNMENT) * ALIGNMENT for x in arrays]).tolist()
        total, stream = starts[-1], self.xp.cuda.get_current_stream()
        self.turn = 1 - self.turn
        if total > self.size:
            self._grow(total)
        self.copied[self.turn].synchronize()
        host = self.pinned[self.turn]
        for x, start in zip(arrays, starts, strict=False):
            host[start:start + x.nbytes] = x.reshape(-1).view(np.uint8)
        self.device[:total].set(host[:total], stream=stream)
        self.copied[self.turn].record(stream)
        layout = [(x.shape, x.dtype) for x in arrays]
        if layout != self.layout:  # steps of decode have the same, one after another
            self.views = [self.device[start:start + x.nbytes].view(x.dtype).reshape(x.shape)
                          for x, start in zip(arrays, starts, strict=False)]
            self.layout = layout
        return self.views

    def _grow(self, nbytes: int) -> None:
        """New buffers of at least so many bytes, when all copies out of the old ones have ended."""
        for event in self.copied:
            event.synchronize()
        self.size = max(SMALLEST, power_of_two(nbytes))
        self.device = self.xp.empty(self.size, self.xp.uint8)
        self.pinned = [np.frombuffer(self.xp.cuda.alloc_pinned_memory(self.size), np.uint8, self.size) for _ in range(2)]
        self.layout = None


def attention_tasks(segments, query_groups: Sequence[range], window: int | None, sinks: int, tiled: bool) -> tuple:
    """What the blocks of an attention do (see attention.cu): tasks, tasks for tiles, the blocks of all rings, runs of heads.

    Behind these arrays: queries times heads of a block, among how many blocks the keys are split, and the keys of each.  What
    grows with the texts grows in powers of two, so that most steps of decode are of one kind.  tiled: whether requests of many
    queries are left to attention_tiles.cu.
    """
    runs = [(kv_head, first, min(ITEMS[-1], group.stop - first)) for kv_head, group in enumerate(query_groups)
            for first in range(group.start, group.stop, ITEMS[-1])]
    heads = max(count for _, _, count in runs)
    tasks, tiles, ring_at = [], [], 0
    for s in segments:
        many = tiled and len(s.slots) >= TILED_FROM
        rows_at_once = (TILE_ITEMS if many else ITEMS[-1]) // heads
        for row in range(0, len(s.slots), rows_at_once):
            position = s.start + row
            low = s.oldest if window is None else max(s.oldest, position - window + 1)
            (tiles if many else tasks).append((s.rows.start + row, min(rows_at_once, len(s.slots) - row), position, low,
                                               min(sinks, low), ring_at, len(s.ring.blocks), s.ring.pinned))
        ring_at += len(s.ring.blocks)
    blocks = np.zeros(power_of_two(ring_at), np.int64)
    np.concatenate([s.ring.blocks for s in segments], out=blocks[:ring_at])
    columns = max((task[4] + task[2] + task[1] - task[3] for task in tasks), default=1)
    items = next(n for n in ITEMS if n >= heads * max((task[1] for task in tasks), default=1))
    split = next((keys for most, keys in SPLITS if segments[-1].rows.stop <= most), -(-columns // KEYS) * KEYS)
    split = max(split, power_of_two(columns) // MOST_SPLITS)
    splits = power_of_two(-(-columns // split))
    tasks, tiles = (np.array(x, np.int64).reshape(-1, TASK_SIZE) for x in (tasks, tiles[::-1]))  # those with most keys first
    return tasks, tiles, blocks, np.array(runs, np.int64), items, splits, split
