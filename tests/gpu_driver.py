"""A stand-in for CuPy as far as opening a device asks it: what a driver shows, or which error it raises."""

from __future__ import annotations

import sys
import types

import numpy as np

PARTS = ('cupy', 'cupy.cuda', 'cupy.cuda.nccl')


class CUDARuntimeError(RuntimeError):
    """As CuPy's: the text begins with the error's name."""


class CUDADriverError(RuntimeError):
    """Likewise."""


class OutOfMemoryError(MemoryError):
    """Of CuPy's memory pool."""


CUDARuntimeError.__module__ = 'cupy_backends.cuda.api.runtime'
CUDADriverError.__module__ = 'cupy_backends.cuda.api.driver'
OutOfMemoryError.__module__ = 'cupy.cuda.memory'
OLD_DRIVER = CUDARuntimeError('cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version')


class Array(np.ndarray):
    """A device array that computes at once."""

    def get(self):
        return np.asarray(self)


class Stream:
    """Counts how often it was waited for."""

    ptr = 77

    def __init__(self):
        self.waits = 0

    def synchronize(self):
        self.waits += 1


class Nccl:
    """CuPy's module as far as it is used; `calls` of the last communicator."""

    available, NCCL_FLOAT32, NCCL_SUM = True, 7, 0
    calls: list = []

    class NcclCommunicator:
        def __init__(self, size, unique_id, rank):
            if unique_id != tuple(range(128)):
                raise RuntimeError('NCCL_ERROR_INVALID_ARGUMENT: invalid\nargument')
            Nccl.calls = [('made', size, rank)]

        def allReduce(self, *arguments):
            Nccl.calls.append(arguments)

        def destroy(self):
            Nccl.calls.append('destroyed')

    @staticmethod
    def get_unique_id():
        return tuple(range(128))


def gpu(number: int, uuid: int | None = None) -> dict:
    """A GPU of the given PCI id; uuid: of another instance of MIG on it."""
    return {'name': b'Fake GPU', 'uuid': bytes([uuid or 16 + number] * 16), 'pci': f'0000:{number:02X}:00.0'}


def make(gpus=(), error: Exception | None = None, work_error: Exception | None = None, driver: int = 12080, free: int = 8 << 30,
         nccl=None) -> dict[str, types.ModuleType]:
    """The modules, for sys.modules.  gpus: of `gpu`; error: of the first question; work_error: of the first product."""
    cupy, cuda, runtime = (types.ModuleType(name) for name in ('cupy', 'cupy.cuda', 'cupy.cuda.runtime'))

    def count():
        if error is not None:
            raise error
        return len(gpus)

    def ones(shape, dtype):
        if work_error is not None:
            raise work_error
        return np.ones(shape, dtype).view(Array)

    stream = Stream()
    runtime.getDeviceCount, runtime.getDeviceProperties = count, lambda number: gpus[number]
    runtime.deviceGetPCIBusId = lambda number: gpus[number]['pci']
    runtime.driverGetVersion, runtime.runtimeGetVersion = lambda: driver, lambda: 12090
    runtime.memGetInfo = lambda: (free, 2 * free)
    cuda.used = []
    cuda.Device = lambda number: types.SimpleNamespace(use=lambda: cuda.used.append(number))
    cuda.runtime, cuda.get_current_stream = runtime, lambda: stream
    cuda.alloc_pinned_memory = bytearray
    cupy.__version__, cupy.cuda, cupy.ones, cupy.float32 = '14.2.0', cuda, ones, np.float32
    cupy.get_default_memory_pool = lambda: types.SimpleNamespace(free_all_blocks=lambda: None)
    cuda.nccl = nccl if nccl is not None else types.SimpleNamespace(available=False)
    return dict(zip(PARTS, (cupy, cuda, cuda.nccl), strict=True))


def install(monkeypatch, modules: dict[str, types.ModuleType]):
    """Make `import cupy` find them; returns the package."""
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules['cupy']
