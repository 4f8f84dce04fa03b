"""Devices and streams."""

from __future__ import annotations

from types import SimpleNamespace

from cupy._memory import PinnedMemoryPointer, alloc_pinned_memory
from cupy._streams import Event, Graph, Stream, get_elapsed_time, using_allocator
from cupy._streams import current as get_current_stream
from cupy.cuda import cublas, device, driver, memory, runtime
from cupy.cuda.memory import MemoryPool

__all__ = ['Device', 'Event', 'Graph', 'MemoryPool', 'PinnedMemoryPointer', 'Stream', 'alloc_pinned_memory', 'cublas', 'device',
           'driver', 'get_current_stream', 'get_elapsed_time', 'memory', 'nccl', 'runtime', 'using_allocator']
nccl = SimpleNamespace(available=False)


class Device:
    """One GPU, by the number under which it is seen."""

    def __init__(self, device: int | None = None):
        self.id = runtime.getDevice() if device is None else device
        self._previous: list[int] = []

    def use(self) -> None:
        """Make it this thread's device."""
        runtime.setDevice(self.id)

    def synchronize(self) -> None:
        """Wait for all streams."""
        runtime.deviceSynchronize()

    @property
    def mem_info(self) -> tuple[int, int]:
        """Free and total bytes."""
        return runtime.memGetInfo()

    @property
    def compute_capability(self) -> str:
        """That of an A100."""
        return '80'

    @property
    def attributes(self) -> dict[str, int]:
        """Some of them; few multiprocessors, so that small products have more work than blocks."""
        return {'MultiProcessorCount': 2, 'MaxSharedMemoryPerMultiprocessor': 100 << 10}

    @property
    def pci_bus_id(self) -> str:
        """Where the card is in its node."""
        return runtime.deviceGetPCIBusId(self.id)

    def __enter__(self) -> Device:
        self._previous.append(runtime.getDevice())
        self.use()
        return self

    def __exit__(self, *error) -> None:
        runtime.setDevice(self._previous.pop())
