"""Opens the device that a rank computes on: which GPU is whose, what is free on it, and what its errors mean.

NumPy and CuPy are imported where they are needed, so that an entry point can use this before the BLAS threads are set.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# of NVIDIA's drivers: for servers, for Windows' subsystem for Linux, for Jetson
DRIVER_FILES = ('/dev/nvidiactl', '/dev/dxg', '/dev/nvhost-ctrl-gpu', '/dev/nvhost-gpu')
NULL_STREAMS = (0, 1)  # there from the start, and not to be captured in a graph
MOST_LINES = 16  # of the table of ranks; more ranks than that are told by their hosts
PACKAGES = '"tpmpi[cuda12]" or "tpmpi[cuda13]"'
ERRORS = {  # of a GPU at work, by the name that CUDA gives without its prefix: what it means, what to do
    'memoryallocation': ('is out of memory', 'use more ranks, --weights int8, or a smaller --kv-memory, --context or --chunk'),
    'eccuncorrectable': ('has an error of its memory that cannot be corrected', 'leave out this node, and tell its operators'),
    'devicesunavailable': ('is busy or in exclusive mode', 'start one rank for each GPU, and see nvidia-smi for others on it'),
    'illegaladdress': ('was asked for memory that is not there', 'this is an error of tpmpi or of the GPU: please report it'),
    'launchfailure': ('failed in a kernel', 'this is an error of tpmpi or of the GPU: please report it'),
    'launchtimeout': ('was too slow for the limit of its display', 'use a smaller --chunk, or a GPU without a display'),
    'nokernelimagefordevice': ('is of a kind that this CuPy was not built for', f'pip install {PACKAGES}, whichever is newer'),
}
OTHER_NAMES = {'outofmemory': 'memoryallocation', 'deviceunavailable': 'devicesunavailable', 'launchfailed': 'launchfailure',
               'misalignedaddress': 'illegaladdress', 'nobinaryforgpu': 'nokernelimagefordevice'}
ERROR_CLASSES = {'CUDARuntimeError', 'CUDADriverError', 'NcclError', 'CUBLASError', 'NVRTCError'}  # of CuPy


class DeviceError(ValueError):
    """The asked-for device cannot be had, or was lost; with what to install or change."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver shows it to a rank.  Of one card the instances of MIG differ by their uuid."""

    name: str
    pci: str
    uuid: str = ''

    @property
    def identity(self) -> tuple[str, str]:
        """The same for two ranks of a node that see one GPU under different numbers."""
        return self.pci, self.uuid


@dataclass(frozen=True)
class Device:
    """Where a rank's arrays live.  stream: on which a GPU does everything, in order; None: the host computes."""

    name: str
    xp: Any
    gpu: Gpu | None = None
    stream: Any = None

    @property
    def synchronize(self) -> Callable[[], None] | None:
        """Waits for all work in flight; None where there is nothing to wait for."""
        return None if self.stream is None else self.stream.synchronize

    def to_host(self, x):
        """x as a NumPy array, complete."""
        return x if self.gpu is None else x.get()

    def free_bytes(self) -> int | None:
        """Bytes of the GPU's memory that can still be allocated, by anyone; None on the CPU.  Raises DeviceError."""
        if self.gpu is None:
            return None
        with _explained():
            self.xp.get_default_memory_pool().free_all_blocks()
            return int(self.xp.cuda.runtime.memGetInfo()[0])


# ---- opening


def host() -> Device:
    """The CPU."""
    import numpy as np
    return Device('cpu', np)


def driver_present(exists: Callable[[str], bool] = os.path.exists) -> bool:
    """A GPU's driver is on this node, as far as its files tell; nothing is loaded."""
    return any(map(exists, DRIVER_FILES))


def visible_gpus(environ: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """The GPUs that this rank may use, at least one, in the driver's order.  Raises DeviceError."""
    hidden = environ.get('CUDA_VISIBLE_DEVICES')
    if hidden is not None and (hidden.strip() in ('', 'NoDevFiles') or hidden.strip().startswith('-1')):
        raise DeviceError(f'CUDA_VISIBLE_DEVICES is {hidden!r}, which hides every GPU; unset it, or ask the batch system for '
                          'a GPU for each rank (Slurm: --gpus-per-task=1)')
    cupy = _import_cupy()
    with _explained(cupy):
        gpus = tuple(_describe(cupy, number) for number in range(cupy.cuda.runtime.getDeviceCount()))
    if not gpus:
        raise DeviceError(NO_GPU)
    return gpus


NO_GPU = 'the driver shows no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu'


def _import_cupy():
    try:
        import cupy
    except Exception as e:  # it raises ImportError, and RuntimeError from what it loads
        if isinstance(e, ModuleNotFoundError) and e.name == 'cupy':
            raise DeviceError(f'CuPy is not installed; pip install {PACKAGES}') from e
        raise DeviceError(_missing_library(e) or f'CuPy cannot be imported ({_words(e)}); pip install {PACKAGES}') from e
    return cupy


def _describe(cupy, number: int) -> Gpu:
    facts = cupy.cuda.runtime.getDeviceProperties(number)
    uuid = facts.get('uuid', b'')
    return Gpu(facts['name'].decode(), cupy.cuda.runtime.deviceGetPCIBusId(number),
               uuid.hex() if isinstance(uuid, bytes) else str(uuid))


def choose_gpu(on_node: Sequence[Sequence[Gpu]], local_rank: int, share: bool = False) -> int:
    """Which of its visible GPUs a rank takes: the first that no earlier rank of the node has.

    on_node: what each rank of the node sees.  So rank i takes GPU i where all see all, and its own where it sees one.
    share: where none is left the ranks go round.  Raises DeviceError.
    """
    taken = set()
    for rank, gpus in enumerate(on_node):
        left = [number for number, gpu in enumerate(gpus) if gpu.identity not in taken]
        if not left and not share:
            count = len({gpu.identity for seen in on_node for gpu in seen})
            raise DeviceError(f'{len(on_node)} ranks on this node see {count} GPU{"s" * (count > 1)} together, and none is left '
                              f'for rank {rank} of the node; start one rank for each GPU, or give --share-gpu')
        number = left[0] if left else rank % len(gpus)
        if rank == local_rank:
            break
        taken.add(gpus[number].identity)
    return number


def open_gpu(gpus: Sequence[Gpu], number: int) -> Device:
    """The GPU of this number, after a first work on it: what the driver or CuPy lack is said now.  Raises DeviceError."""
    cupy = _import_cupy()
    with _explained(cupy):
        cupy.cuda.Device(number).use()
        x = cupy.ones((2, 2), cupy.float32)
        (x @ x).get()  # compiled by NVRTC, multiplied by cuBLAS
        stream = cupy.cuda.get_current_stream()
        if stream.ptr in NULL_STREAMS:  # else of a model that was loaded before, and both go on with it
            stream = cupy.cuda.Stream()
            stream.use()
        return Device(f'cuda:{number} {gpus[number].name}', cupy, gpus[number], stream)


def ranks_on(placed: Sequence[tuple[str, Gpu]], rank: int, share: bool = False) -> int:
    """How many ranks compute on the GPU of this one.  placed: host and GPU of each rank.

    Raises DeviceError where any GPU has several and `share` does not allow it: ranks in containers of their own count as
    nodes of their own for MPI, and each of them may have taken the same GPU.
    """
    keys = [(host, gpu.identity) for host, gpu in placed]
    for other, key in enumerate(keys):
        if keys.count(key) > 1 and not share:
            both = [r for r, k in enumerate(keys) if k == key]
            raise DeviceError(f'ranks {both[0]} and {both[1]} on {key[0]} both have GPU {placed[other][1].pci}; start one rank '
                              'for each GPU, or give --share-gpu')
    return keys.count(keys[rank])


def table(placed: Sequence[tuple[str, Gpu]]) -> list[str]:
    """Which rank computes where, as lines: one for each rank, or for each host where there are many."""
    if len(placed) <= MOST_LINES:
        return [f'rank {rank}: {host}, {gpu.name}, PCI {gpu.pci}' for rank, (host, gpu) in enumerate(placed)]
    lines = []
    for host in dict.fromkeys(host for host, _ in placed):
        ranks = [rank for rank, (where, _) in enumerate(placed) if where == host]
        names = sorted({placed[rank][1].name for rank in ranks})
        lines.append(f'{_runs(ranks)}: {host}, {", ".join(names)}, PCI {" ".join(placed[rank][1].pci for rank in ranks)}')
    return lines if len(lines) <= MOST_LINES else [*lines[:MOST_LINES - 1], f'and {len(lines) - MOST_LINES + 1} more hosts']


def _runs(ranks: Sequence[int]) -> str:
    """'ranks 0-3', or all of them where they are not consecutive."""
    if ranks[-1] - ranks[0] == len(ranks) - 1 > 0:
        return f'ranks {ranks[0]}-{ranks[-1]}'
    return f'rank{"s" * (len(ranks) > 1)} {" ".join(map(str, ranks))}'


# ---- memory


def check_memory(needed: int, free: int, name: str, parts: Mapping[str, int]) -> None:
    """Raises DeviceError where a device has less memory than a rank will need.

    needed, free: bytes; name: the device; parts: what the bytes are for, such as {'weights': 3 << 30, 'cache': 1 << 30}.
    """
    if needed > free:
        what = ', '.join(f'{part} {count / 1e9:.2f}' for part, count in parts.items())
        raise DeviceError(f'{name}: {needed / 1e9:.2f} GB are needed ({what}) and {free / 1e9:.2f} GB are free; use more ranks, '
                          '--weights int8, or a smaller --kv-memory, --context or --chunk')


# ---- errors


@contextlib.contextmanager
def _explained(cupy=None):
    """What CuPy raises inside, in one line."""
    try:
        yield
    except DeviceError:
        raise
    except Exception as e:  # CUDARuntimeError is a RuntimeError, what a library lacks an ImportError or a RuntimeError
        raise DeviceError(_why_not(e, cupy)) from e


def _why_not(error: Exception, cupy) -> str:
    """Why a GPU cannot be used, and what to do."""
    name = _cuda_name(error)
    if name == 'nodevice':
        return NO_GPU
    if name in ('insufficientdriver', 'systemdrivermismatch') and cupy is not None:
        driver, built = _version(cupy, 'driverGetVersion'), _version(cupy, 'runtimeGetVersion')
        if driver is None:  # CuPy says the same of no driver and of an old one
            return 'no NVIDIA driver is loaded on this node; run where nvidia-smi works, or use --device cpu'
        return (f'the driver is for CUDA {driver} and older, CuPy {cupy.__version__} for CUDA {built}; update the driver, or '
                f'pip install {PACKAGES}, whichever the driver can')
    told = _missing_library(error) or device_lost(error)
    return told or f'no usable GPU ({_words(error)}); check nvidia-smi, or use --device cpu'


def _version(cupy, function: str) -> str | None:
    """'12.9' of 12090; None of 0, or where there is no answer."""
    with contextlib.suppress(Exception):
        number = int(getattr(cupy.cuda.runtime, function)())
        return f'{number // 1000}.{number % 1000 // 10}' if number else None
    return None


def _missing_library(error: BaseException) -> str | None:
    """What to do about a library that was not found, as a line."""
    found = list(dict.fromkeys(re.findall(r'\blib[\w+-]+\.so[.\d]*', str(error))))  # CuPy 14 looks for either of two versions
    if not found or _cuda_name(error) is not None:
        return None
    if found[0].startswith('libcuda.so'):
        return f'no NVIDIA driver is installed on this node ({found[0]} is not there); use --device cpu'
    return (f"CuPy does not find {' or '.join(found[:2])}: it is not installed, or CuPy was built for another CUDA than this "
            'node\'s; load the CUDA module that fits, or pip install "cupy-cuda12x[ctk]" or "cupy-cuda13x[ctk]"')


def device_lost(error: BaseException) -> str | None:
    """An error that CuPy raised at work, as one line that says what happened and what to do; None for any other."""
    name = _cuda_name(error)
    if name is None:
        return None
    what, to_do = ERRORS.get(OTHER_NAMES.get(name, name), ('failed', 'check nvidia-smi and the log of the kernel'))
    return f'the GPU {what} ({_words(error)}); {to_do}'


def in_words(error: BaseException) -> BaseException:
    """The same error, or a DeviceError with one line where it is the GPU's."""
    lost = None if isinstance(error, DeviceError) else device_lost(error)
    if lost is None:
        return error
    told = DeviceError(lost)
    told.__cause__ = error
    return told


def _cuda_name(error: BaseException) -> str | None:
    """'illegaladdress' of cudaErrorIllegalAddress and CUDA_ERROR_ILLEGAL_ADDRESS; None of an error that is not CuPy's."""
    kinds = [kind for kind in type(error).__mro__ if kind.__module__.partition('.')[0] in ('cupy', 'cupy_backends')]
    if any(kind.__name__ == 'OutOfMemoryError' for kind in kinds):
        return 'memoryallocation'
    if not any(kind.__name__ in ERROR_CLASSES for kind in kinds):
        return None
    name = str(error).partition(':')[0].strip()
    return re.sub(r'^cudaError|^CUDA_ERROR_|_', '', name).lower()


def _words(error: BaseException) -> str:
    """The text of an error in one line, of a long one the end, where CuPy has the reason."""
    text = ' '.join(str(error).replace('=' * 8, '').split()) or type(error).__name__
    return text if len(text) <= 300 else '… ' + text[-300:]
