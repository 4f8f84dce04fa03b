"""Sums in memory that the ranks of a node share (MPI-3, chapter 12.2.3): what of an all-reduce needs no message.

Large ones: each rank's kernel puts its part of the sum into a room that all ranks of the node see.  Then each sums a share of the
elements, in the order of ranks, and puts it into all rooms: with two ranks

    rank 0's room   [ a0 | a1 ]      rank 0: a0 + b0, into both rooms
    rank 1's room   [ b0 | b1 ]      rank 1: a1 + b1, into both rooms

Between the two, where there are several nodes, each share goes through MPI.Allreduce among the ranks that have the same
number on their nodes.  Rooms are used in turn, since what a room holds becomes the residual stream, which the next sum's
result is added to.  On two ranks SmolLM2's prefill of 512 tokens went 0.94, 1.07, 1.16 and 1.31 times as fast as with MPICH's
messages (`tpmpi.bench --weights int8 --activations int8`, beside it with `--collective mpi`; a noisy machine).

Small ones go so where all ranks are on one node and there are kernels for it: see kernels/meeting.py, whose flags the meetings
of large ones use then, too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

LEAST = 16384  # bytes of a sum that two meetings of all ranks are worth: of 14 KB between two ranks a message is as fast
PAGE = 4096
ALL_PARTS = 65536  # bytes of the parts of a small sum, each of which every rank reads
LOOKS = 1000  # of a rank that waits, until it offers its core to others; none where there are more ranks than cores
FOLDER = '/dev/shm'  # where MPI libraries keep such memory; a page that finds no place there would end the process


@dataclass(frozen=True)
class Meeting:
    """Where kernels sum over the ranks of a node by themselves; see kernels/meeting.py."""

    parts: np.ndarray  # [2, ranks] addresses, in turn, where sums are small
    rooms: np.ndarray  # [2, ranks] addresses, the next one's first, where they are large; else [2, 0]
    flags: np.ndarray  # [ranks] addresses
    rank: int
    patience: int


NONE = np.zeros((2, 0), np.int64)
ALONE = Meeting(NONE, NONE, np.zeros(1, np.int64), 0, 0)  # one rank, which sums nothing


class SharedSums:
    """The rooms of a group's ranks on one node, for sums of up to so many bytes.  Made by all ranks of the group together.

    kernels: kernels.meeting's SUMS, or None; on all ranks alike.
    """

    def __init__(self, node: MPI.Comm, across: MPI.Comm, nbytes: int, kernels: tuple | None = None):
        self.node, self.across, self.nbytes = node, across, -(-nbytes // PAGE) * PAGE
        self.window = MPI.Win.Allocate_shared(2 * self.nbytes + 2 * LEAST + 2 * PAGE, 1, comm=node)
        self.window.Lock_all()
        memory = [self._memory_of(rank) for rank in range(node.size)]
        memory[node.rank].fill(0)  # takes its pages, near this rank
        self.rooms = [tuple(part[:2 * self.nbytes].view(np.float32).reshape(2, -1)) for part in memory]
        self.turn, self.given = 0, None
        self.kernels = kernels if across.size == 1 else None
        self.small = min(LEAST, ALL_PARTS // node.size) if self.kernels else 0
        ends = [part.ctypes.data + 2 * self.nbytes for part in memory]
        self.flags = np.array([end + 2 * LEAST for end in ends], np.int64)  # addresses, as those of the parts of both turns
        self.parts = np.array([[end + turn * LEAST for end in ends] for turn in (0, 1)], np.int64)
        self.number = 0  # of the last meeting by flags
        cores = set().union(*node.allgather(os.sched_getaffinity(0)))
        self.looks = LOOKS if len(cores) >= node.size else 0
        rooms = np.array([[both[turn].ctypes.data for both in self.rooms] for turn in (0, 1)])
        self.places = [Meeting(NONE, rooms[[turn, 1 - turn]], self.flags, node.rank, self.looks) for turn in (0, 1)]
        self.small_place = Meeting(self.parts, NONE, self.flags, node.rank, self.looks)
        self._meet()

    def _memory_of(self, rank: int) -> np.ndarray:
        memory = np.frombuffer(self.window.Shared_query(rank)[0], np.uint8)
        start = -memory.ctypes.data % PAGE
        return memory[start:start + 2 * self.nbytes + 2 * LEAST + PAGE]

    def takes(self, x) -> bool:
        """Whether `sum` does it: x is what `room` gave last, or small."""
        return x is self.given or x.nbytes <= self.small

    def meeting(self, nbytes: int) -> Meeting | None:
        """Where a kernel makes sums of so many bytes by itself; None where it cannot."""
        if not self.kernels or not 0 < nbytes <= self.nbytes:
            return None
        return self.small_place if nbytes <= self.small else self.places[self.turn]

    def next_rooms(self, shape: tuple[int, int]) -> list[np.ndarray]:
        """This rank's rooms for the next two sums of a kernel."""
        return [self.rooms[self.node.rank][turn][:shape[0] * shape[1]].reshape(shape) for turn in (self.turn, 1 - self.turn)]

    def met(self, sums: int, nbytes: int) -> None:
        """A kernel has made so many sums."""
        if nbytes <= self.small:
            self.number += sums
        else:
            self.number, self.turn = self.number + 2 * sums, (self.turn + sums) % 2

    def room(self, shape: tuple[int, int]) -> np.ndarray | None:
        """This rank's room for the next sum, None where the sum is too small or too large for one.  float32"""
        size = shape[0] * shape[1]
        if not (self.small if self.kernels else LEAST - 1) < 4 * size <= self.nbytes:
            return None
        self.given = self.rooms[self.node.rank][self.turn][:size].reshape(shape)
        return self.given

    def sum(self, x) -> None:
        """Sum over the ranks of the group, in place."""
        if x is self.given:
            self._sum_rooms()
        else:
            self._sum_small(x.reshape(-1))

    def _sum_small(self, x: np.ndarray) -> None:
        self.number += 1
        self.kernels[0](self.parts[self.number % 2], self.flags, self.node.rank, self.number, x, self.looks)

    def _sum_rooms(self) -> None:
        if self.kernels:
            rooms = self.places[self.turn].rooms[0]
            self.kernels[1](rooms, self.flags, self.node.rank, self.number + 1, self.given.size, self.looks)
            self.number += 2
        else:
            self._sum_with_messages()
        self.turn, self.given = 1 - self.turn, None

    def _sum_with_messages(self) -> None:
        rooms = [both[self.turn][:self.given.size] for both in self.rooms]
        first, last = (len(rooms[0]) * i // self.node.size for i in (self.node.rank, self.node.rank + 1))
        self._meet()
        total, *others = (room[first:last] for room in rooms)
        for other in others:
            total += other
        if self.across.size > 1:
            self.across.Allreduce(MPI.IN_PLACE, total)
        for other in others:
            other[:] = total
        self._meet()

    def _meet(self) -> None:
        """All ranks of the node have come here, and see what the others have written."""
        self.window.Sync()
        self.node.Barrier()
        self.window.Sync()

    def close(self) -> None:
        """Give the memory back; a collective call."""
        self.rooms, self.given, self.small, self.kernels = [], None, 0, None
        self.window.Unlock_all()
        self.window.Free()
        self.across.Free()
        self.node.Free()


def share(comm: MPI.Comm, nbytes: int, kernels: tuple | None = None, on_node: int = 1) -> SharedSums | None:
    """Rooms for the ranks of comm, or None on all of them: one rank a node, unequal nodes, or no place.  A collective call.

    on_node: all ranks of this node, also of other groups, which ask for as much.
    """
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    needed = max(node.size, on_node) * (2 * nbytes + 2 * LEAST + 4 * PAGE)
    try:
        place = os.statvfs(FOLDER)
        fits = 2 * needed < place.f_bavail * place.f_frsize  # MPI's own messages lie there, too
    except OSError:
        fits = False
    sizes, fit, can = zip(*comm.allgather((node.size, fits, kernels is not None)), strict=True)
    if node.size == 1 or set(sizes) != {node.size} or not all(fit):
        node.Free()
        return None
    return SharedSums(node, comm.Split(node.rank, comm.rank), nbytes, kernels if all(can) else None)
