"""How a sum of GPU memory over all ranks is carried, and whether the MPI library can take such memory itself.

    mpi     MPI reads and writes the GPU's memory.  It knows nothing of CUDA's streams: all work is waited for before.
    staged  over a pinned buffer of the host, which any MPI can read.
    nccl    NCCL, joined to the stream: the host does not wait.

Whether MPI takes an address of the GPU is asked, never tried: the wrong library follows it on the host and dies.  An MPI
that was built for CUDA over a transport that was not (UCX, libfabric) says yes all the same; then give `staged`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpmpi.device import DeviceError, device_lost

TRUST = 'TPMPI_TRUST_GPU_MPI'
SWITCHES = {  # libraries that take GPU memory only where this is 1, by a word of their names; the first that fits counts
    'CRAY MPICH': 'MPICH_GPU_SUPPORT_ENABLED', 'MVAPICH2': 'MV2_USE_CUDA', 'MVAPICH': 'MVP_USE_CUDA'}
INTEL = 'Intel(R) MPI'
GPU_SUPPORT_CUDA = 0  # MPIX_GPU_SUPPORT_CUDA of MPICH's mpi.h, and of those made from it


@dataclass(frozen=True)
class Support:
    """Whether the MPI library of a rank takes memory of a CUDA device, and how that is known."""

    supported: bool
    reason: str


# ---- what the library says


def gpu_support(library: str, kinds: str | None, answers: Mapping[str, bool], environ: Mapping[str, str]) -> Support:
    """Yes only where the library says so and nothing speaks against it.

    library: its name and version; kinds: comm.memory_kinds(), where MPI 4.1 lists what it takes; answers: mpi_answers().
    A kind counts only where no query says no: what a launcher or a session was asked for has been seen among the kinds.
    """
    name = library.partition(',')[0]  # Open MPI's goes on with who built it
    if INTEL in library:
        return Support(False, f'{name} takes memory of Intel GPUs only')
    switch = next((switch for word, switch in SWITCHES.items() if word in library), None)
    if switch is not None and environ.get(switch) != '1':
        return Support(False, f'{name} takes GPU memory only with {switch}=1 in the environment')
    for query, answer in answers.items():
        if not answer:
            return Support(False, f'{query} of {name} says no')
    if answers:
        return Support(True, f'{next(iter(answers))} of {name} says yes')
    if kinds is not None and any(_is_cuda_device(kind) for kind in kinds.split(',')):
        return Support(True, f'{name} takes memory of the kinds {kinds}')
    return Support(False, f'{name} does not say that it can')


def _is_cuda_device(kind: str) -> bool:
    """'cuda', 'cuda:device', 'cuda:host:device', and not 'cuda:host' (MPI 4.1, 11.4.3: a kind and its restrictors)."""
    name, *restrictions = kind.strip().split(':')
    return name == 'cuda' and (not restrictions or 'device' in restrictions)


def mpi_libraries(maps: str = '/proc/self/maps') -> list[str]:
    """The MPI libraries that are loaded in this process: mpi4py may find another one than mpicc's."""
    found = {}
    with contextlib.suppress(OSError), open(maps) as f:
        for line in f:
            path = line.split(maxsplit=5)[5].strip() if line.count('/') else ''
            if re.fullmatch(r'lib(p?mpi|mpich)[^/]*\.so[^/]*', os.path.basename(path)):
                found[path] = None
    return list(found)


def mpi_answers(paths: Iterable[str]) -> dict[str, bool]:
    """What the queries of these libraries say of CUDA, by the names of those that there are.  MPI must be running."""
    answers: dict[str, bool] = {}
    for path in paths:
        try:
            library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        except OSError:
            continue
        found = _ask(library)
        if found is not None:
            name, answer = found
            answers[name] = answer and answers.get(name, True)
    return answers


def _ask(library: ctypes.CDLL) -> tuple[str, bool] | None:
    """The answer of one library: Open MPI, MVAPICH and MPICH have the first query, Cray's MPI the second only."""
    query = getattr(library, 'MPIX_Query_cuda_support', None)
    if query is not None:
        query.argtypes, query.restype = [], ctypes.c_int
        return 'MPIX_Query_cuda_support', query() == 1
    query = getattr(library, 'MPIX_GPU_query_support', None)
    if query is not None:
        query.argtypes, query.restype = [ctypes.c_int, ctypes.POINTER(ctypes.c_int)], ctypes.c_int
        supported = ctypes.c_int(0)
        return 'MPIX_GPU_query_support', query(GPU_SUPPORT_CUDA, ctypes.byref(supported)) == 0 and supported.value == 1
    return None


# ---- the choice


def choose(asked: str, supports: Sequence[Support | None], shared: bool, trusted: bool = False) -> tuple[str, str]:
    """How all ranks carry sums of GPU memory, and why.  Raises DeviceError for what cannot work.

    asked: one of config.COLLECTIVES; supports: of each rank, None where it is not asked for; shared: some GPU has several
    ranks; trusted: the user knows that MPI can.  The same on every rank.
    """
    if asked == 'nccl' and shared:
        raise DeviceError('collective nccl: NCCL takes one rank for each GPU, and some share one; use staged or mpi')
    if asked in ('staged', 'nccl'):
        return asked, 'as asked for'
    refusing = next(((rank, s) for rank, s in enumerate(supports) if s is None or not s.supported), None)
    if refusing is None:
        return 'mpi', supports[0].reason
    rank, support = refusing
    reason = f'on rank {rank} {"nothing is known" if support is None else support.reason}'
    if asked == 'auto':
        return 'staged', reason
    if trusted:
        return 'mpi', f'{TRUST}=1, although {reason}'
    raise DeviceError(f'collective mpi: {reason}; load an MPI that was built for CUDA, use staged or nccl, or set {TRUST}=1 '
                      'where you know better')


def check_host(asked: str) -> None:
    """Raises DeviceError for what only GPUs have: on the CPU MPI reads the arrays themselves."""
    if asked not in ('auto', 'mpi'):
        raise DeviceError(f'collective {asked}: the ranks compute on the CPU; use auto or mpi, or --device cuda')


# ---- the carriers of comm.Communicator


class Direct:
    """MPI takes the GPU's memory."""

    name = 'mpi'

    def __init__(self, stream):
        self.stream = stream

    def sum(self, x, reduce: Callable[[Any], None]) -> None:
        """Sum x over all ranks, in place; complete when it returns."""
        self.stream.synchronize()
        reduce(x)

    def close(self) -> None:
        """Nothing to end."""


class Staged:
    """A pinned buffer of the host, allocated once, and again only for a larger message.

    One wait for each sum is enough: it is after the copy out, which the stream begins when the copy in before it, out of the
    same buffer, has ended.
    """

    name = 'staged'

    def __init__(self, xp, stream, nbytes: int):
        self.xp, self.stream = xp, stream
        try:
            self.buffer = self._pinned(max(nbytes, 4))
        except Exception as e:
            raise DeviceError(f'collective staged: no pinned memory of {nbytes:,} bytes ({" ".join(str(e).split())}); '
                              'raise the limit of locked memory (ulimit -l), or use a smaller --chunk') from e

    def _pinned(self, nbytes: int):
        import numpy as np
        return np.frombuffer(self.xp.cuda.alloc_pinned_memory(nbytes), np.float32, nbytes // 4)

    def sum(self, x, reduce: Callable[[Any], None]) -> None:
        """Sum x over all ranks, in place; complete in the order of the stream."""
        if x.nbytes > self.buffer.nbytes:
            self.stream.synchronize()  # the last copy in may still read the old buffer
            self.buffer = self._pinned(x.nbytes)
        host = self.buffer[:x.size].reshape(x.shape)
        x.get(stream=self.stream, out=host, blocking=False)
        self.stream.synchronize()
        reduce(host)
        x.set(host, stream=self.stream)

    def close(self) -> None:
        """Wait for the last copy out of the buffer."""
        self.stream.synchronize()


class Nccl:
    """NCCL on the stream of all other work.  Made by all ranks of a group together, each with its GPU chosen before."""

    name = 'nccl'

    def __init__(self, nccl, size: int, unique_id, rank: int, stream):
        self.stream, self.kind, self.operation = stream, nccl.NCCL_FLOAT32, nccl.NCCL_SUM
        with _nccl_explained():
            self.communicator = nccl.NcclCommunicator(size, unique_id, rank)

    def sum(self, x, reduce: Callable[[Any], None]) -> None:
        """Sum x over all ranks, in place; complete in the order of the stream, and the host does not wait."""
        self.communicator.allReduce(x.data.ptr, x.data.ptr, x.size, self.kind, self.operation, self.stream.ptr)

    def close(self) -> None:
        """End the communicator when its work is done; all ranks of the group close theirs."""
        self.stream.synchronize()
        self.communicator.destroy()


def load_nccl():
    """CuPy's NCCL module.  Raises DeviceError where CuPy finds no NCCL."""
    reason = 'CuPy has none'
    with warnings.catch_warnings(record=True) as said:  # CuPy warns of what it does not find, over several lines
        warnings.simplefilter('always')
        try:
            from cupy.cuda import nccl
        except ImportError as e:
            nccl, reason = None, ' '.join(str(e).split())
    if nccl is None or not getattr(nccl, 'available', False):
        found = next((m[1] for w in said if (m := re.search(r'Reason: (.*)', str(w.message)))), reason)
        raise DeviceError(f'collective nccl: NCCL cannot be loaded ({found}); pip install nvidia-nccl-cu12 or nvidia-nccl-cu13, '
                          'whichever CUDA CuPy is for, or use staged')
    return nccl


def nccl_id(nccl, rank: int):
    """What rank 0 of a group shares with the others before they make their communicators; None on these."""
    with _nccl_explained():
        return nccl.get_unique_id() if rank == 0 else None


@contextlib.contextmanager
def _nccl_explained():
    try:
        yield
    except Exception as e:  # NcclError is a RuntimeError
        said = device_lost(e) or f'{type(e).__name__}: {" ".join(str(e).split())}'
        raise DeviceError(f'collective nccl: {said}; NCCL_DEBUG=WARN says more, staged needs no NCCL') from e
