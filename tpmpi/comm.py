"""The communicator of a tensor-parallel group: the only module that calls MPI.

NumPy is not imported here, so that an entry point can learn from MPI how many ranks share its node, and limit the
BLAS threads, before NumPy starts them.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter, sleep

# The windows of shared_sums.py lie in one node's memory, which Open MPI serves without UCX.  Its component for UCX is asked
# all the same, and that of 5.0.11 prints an error wherever UCX has no network.
os.environ.setdefault('OMPI_MCA_osc', '^ucx')

import mpi4py  # noqa: E402  behind what MPI reads when it starts
from mpi4py import MPI  # noqa: E402

HEAD_BYTES = 4096  # of an announcement: what a step of some dozen requests takes


@dataclass
class Traffic:
    """What one collective operation cost so far on this rank."""

    calls: int = 0
    bytes: int = 0  # of the buffer, on this rank
    seconds: float = 0.0  # of the host: of a sum that only joins a GPU's stream (nccl), not what the GPU took for it


class GroupError(ValueError):
    """An error of some rank, known to all ranks of the group, so that every one ends the same way."""

    def __init__(self, rank: int, message: str):
        super().__init__(message)
        self.rank = rank


class Communicator:
    """The ranks that hold the shards of one model.

    `carrier` is how sums of device memory go: its `sum(x, reduce)` sums x over all ranks, `reduce` being the sum of what MPI
    can read, and `close()` ends it (see collectives.py).  Without one only host memory is taken: MPI would follow the
    device's address on the host.  `shared` is how sums of host memory go within a node (see shared_sums.py), or None.
    """

    def __init__(self, mpi_comm: MPI.Comm | None = None, carrier=None):
        self.mpi_comm = MPI.COMM_WORLD if mpi_comm is None else mpi_comm
        self.rank, self.size = self.mpi_comm.rank, self.mpi_comm.size
        self.carrier, self.shared = carrier, None
        self.traffic = {name: Traffic() for name in ('all_reduce', 'gather', 'broadcast')}
        self.entered = 0  # collectives that this rank has begun: a rank with fewer is one that the others wait for
        self.parts: list[Communicator] = []  # that were split from this one
        self.while_waiting: Callable[[], object] = lambda: None  # called now and then while it waits asleep, or loads

    def all_reduce(self, x) -> None:
        """Sum x over all ranks, in place.  x: C-contiguous float32, the same shape on every rank.

        Returns None, so that nobody goes on with a stale copy.  Other element types and orders are refused: MPI
        libraries have been seen to sum bfloat16 as integers, and to mix Fortran with C order silently.
        """
        if x.dtype != 'float32' or not x.flags.c_contiguous:
            raise TypeError(f'all_reduce of {x.dtype}, C-contiguous: {x.flags.c_contiguous}; expected C-contiguous float32')
        start = self._begin()
        if self.shared is not None and self.shared.takes(x):
            self.shared.sum(x)
        elif not hasattr(type(x), '__cuda_array_interface__'):  # asked of the type: a device array may have work in flight
            self._sum(x)
        elif self.size > 1:
            if self.carrier is None:
                raise TypeError('all_reduce of device memory without a carrier; see collectives.py')
            self.carrier.sum(x, self._sum)
        self._count('all_reduce', x.nbytes, start)

    def _sum(self, x) -> None:
        if self.size > 1:  # to MPI the sum of one rank is 5 us of work
            self.mpi_comm.Allreduce(MPI.IN_PLACE, x)

    def room(self, shape: tuple[int, int]):
        """Where a kernel puts this rank's part of the next sum, if that is so large that it is faster there; else None.

        Every rank asks for it, or none, and sums what it got.  What it holds lasts until the sum after the next.
        """
        return None if self.shared is None else self.shared.room(shape)

    def meeting(self, nbytes: int):
        """How a kernel sums so many bytes by itself, a shared_sums.Meeting; None where only `all_reduce` does."""
        return None if self.shared is None else self.shared.meeting(nbytes)

    @contextlib.contextmanager
    def sums_within(self, sizes: Sequence[int]) -> Iterator[tuple[Traffic, int]]:
        """Around a kernel that makes sums of so many bytes: what they cost, without the seconds, which the caller puts in, and
        the number of the last one before."""
        sums, traffic, shared = Traffic(len(sizes), sum(sizes)), self.traffic['all_reduce'], self.shared
        self.entered += sums.calls
        yield sums, 0 if shared is None else shared.number
        if shared is not None:
            shared.met(sums.calls, max(sizes))
        traffic.calls, traffic.bytes, traffic.seconds = (
            traffic.calls + sums.calls, traffic.bytes + sums.bytes, traffic.seconds + sums.seconds)

    def gather(self, x, out) -> None:
        """Collect one small host array of each rank on rank 0.  x: [...], out: [size, ...] there and None elsewhere."""
        start = self._begin()
        self.mpi_comm.Gather(x, out)
        self._count('gather', x.nbytes, start)

    def broadcast(self, x) -> None:
        """Overwrite a small array on every rank with rank 0's; device memory goes over the host."""
        start = self._begin()
        if hasattr(type(x), '__cuda_array_interface__'):
            host = x.get()
            self.mpi_comm.Bcast(host)
            x.set(host)
        else:
            self.mpi_comm.Bcast(x)
        self._count('broadcast', x.nbytes, start)

    def _begin(self) -> float:
        self.entered += 1
        return perf_counter()

    def _count(self, name: str, nbytes: int, start: float):
        traffic = self.traffic[name]
        traffic.calls += 1
        traffic.bytes += nbytes
        traffic.seconds += perf_counter() - start

    def announce(self, value=None):
        """Rank 0's small object, on all ranks: what a step is.  One broadcast; a second one where it is large."""
        if self.size == 1:
            return value
        start = self._begin()
        data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL) if self.rank == 0 else b''
        head = bytearray(HEAD_BYTES)
        first = HEAD_BYTES - 8
        head[:8 + min(len(data), first)] = len(data).to_bytes(8, 'little') + data[:first]
        self.mpi_comm.Bcast(head)
        size = int.from_bytes(head[:8], 'little')
        if size > first:
            rest = bytearray(data[first:] or size - first)
            self.mpi_comm.Bcast(rest)
            head += rest
        self._count('broadcast', size, start)
        return value if self.rank == 0 else pickle.loads(memoryview(head)[8:8 + size])

    def rest(self) -> None:
        """Wait for all ranks, asleep, where nothing is to be computed for a while."""
        self._arrive()

    # ---- set-up only: these pickle, which is several times slower

    def exchange(self, value) -> list:
        """The values of all ranks, on all ranks."""
        self._arrive()
        return self.mpi_comm.allgather(value)

    def share(self, value):
        """Rank 0's value, on all ranks."""
        self._arrive()
        return self.mpi_comm.bcast(value)

    def _arrive(self) -> None:
        """Wait for all ranks, asleep: MPI waits by polling, and would take cores from ranks that are still loading."""
        self.entered += 1
        everyone = self.mpi_comm.Ibarrier()
        while not everyone.Test():
            self.while_waiting()
            sleep(5e-4)

    def agree(self, error: BaseException | None) -> None:
        """Return if no rank has an error; otherwise raise the lowest such rank's as GroupError, on all ranks alike."""
        errors = self.exchange(None if error is None else _one_line(error))
        for rank, message in enumerate(errors):
            if message is not None:
                raise GroupError(rank, message) from error

    def split(self, group: int) -> Communicator:
        """The communicator of the ranks that gave the same group, in the order of their ranks here.  Collective.

        It has no carrier yet: NCCL's is of one group of ranks.
        """
        self.parts.append(Communicator(self.mpi_comm.Split(group)))
        return self.parts[-1]

    @property
    def entered_in_all(self) -> int:
        """Collectives that this rank has begun, in this communicator and those split from it."""
        return self.entered + sum(part.entered_in_all for part in self.parts)

    def close_carrier(self) -> None:
        """Device memory is not summed any more."""
        carrier, self.carrier = self.carrier, None
        if carrier is not None:
            with contextlib.suppress(RuntimeError):  # the GPU is lost, and that was said
                carrier.close()

    def close_sums(self) -> None:
        """Give back what sums take; collective.  They go by MPI then."""
        self.close_carrier()
        if self.shared is not None:
            self.shared.close()
            self.shared = None

    def close(self) -> None:
        """Give back what sums take, and the communicator itself; collective, and the last call."""
        self.close_sums()
        self.mpi_comm.Free()

    def memory_kinds(self) -> str | None:
        """The kinds of memory that MPI 4.1 says it can take, such as 'mpi,system,cuda:device'; None where it says nothing."""
        info = self.mpi_comm.Get_info()
        try:
            return info.get('mpi_memory_alloc_kinds')
        finally:
            info.Free()

    def exchange_on_node(self, value) -> tuple[int, list]:
        """This rank's number among the ranks of its node, and the values of all of them."""
        local = self.mpi_comm.Split_type(MPI.COMM_TYPE_SHARED)
        try:
            return local.rank, local.allgather(value)
        finally:
            local.Free()


class Mail:
    """Messages between ranks that are not in step: neither sending nor looking for one waits.

    MPI moves a message only while its owner calls MPI, so whoever has mail open looks for it in each step.
    """

    def __init__(self, comm: Communicator):
        self._comm, self._sending = comm.mpi_comm.Dup(), []

    def send(self, rank: int, value) -> None:
        """Send a value to a rank."""
        self._sending = [request for request in self._sending if not request.test()[0]]
        self._sending.append(self._comm.isend(value, rank))

    def receive(self):
        """(rank, value) of a message that has arrived, or None."""
        status = MPI.Status()
        message = self._comm.improbe(status=status)
        return None if message is None else (status.source, message.recv())

    def close(self) -> None:
        """Wait until all that was sent has arrived; the receivers must still look for it."""
        MPI.Request.waitall(self._sending)
        self._comm.Free()


def abort(code: int = 1) -> None:
    """End all ranks of this MPI world at once."""
    MPI.COMM_WORLD.Abort(code)


def library() -> str:
    """The MPI library in use, as it names itself, in one line."""
    return ' '.join(MPI.Get_library_version().replace('\x00', '').strip().splitlines()[0].split())


def describe() -> str:
    """The MPI library in use, for bug reports."""
    return f'{library()}, MPI {".".join(map(str, MPI.Get_version()))}, mpi4py {mpi4py.__version__}'


def host_name() -> str:
    """The name of this rank's host, as MPI knows it."""
    return MPI.Get_processor_name()


def _one_line(error: BaseException) -> str:
    text = ' '.join(str(error).split())
    return text if isinstance(error, ValueError) and text else f'{type(error).__name__}: {text}'
