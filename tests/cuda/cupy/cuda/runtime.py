"""CUDA's runtime.  FAKE_CUDA_DEVICES: how many GPUs the node has; CUDA_VISIBLE_DEVICES: which of them are seen."""

from __future__ import annotations

import os
import threading

from cupy import _streams, fake
from cupy._memory import free_and_total
from cupy._streams import CUDARuntimeError

CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF = 0, 2, 14
_thread = threading.local()


def _visible() -> list[int]:
    """The node's numbers of the GPUs that are seen."""
    there = range(int(os.environ.get('FAKE_CUDA_DEVICES', '1')))
    asked = os.environ.get('CUDA_VISIBLE_DEVICES')
    if asked is None:
        return list(there)
    found = []
    for word in asked.split(','):
        if not word.strip().isdigit() or int(word) not in there:  # what follows is not seen, either
            break
        found.append(int(word))
    return found


def _physical(device: int) -> int:
    if not 0 <= device < getDeviceCount():
        raise CUDARuntimeError(101, 'cudaErrorInvalidDevice: invalid device ordinal')
    return _visible()[device]


def getDeviceCount() -> int:
    """How many are seen; an error where none is."""
    if not _visible():
        raise CUDARuntimeError(100, 'cudaErrorNoDevice: no CUDA-capable device is detected')
    return len(_visible())


def getDevice() -> int:
    """This thread's device."""
    return getattr(_thread, 'device', 0)


def setDevice(device: int) -> None:
    """Choose this thread's device."""
    _physical(device)
    _thread.device = device


def getDeviceProperties(device: int) -> dict:
    """Some of them, with CUDA's names."""
    number = _physical(device)
    return {'name': f'Fake GPU {number}'.encode(), 'major': 8, 'minor': 0, 'totalGlobalMem': free_and_total()[1],
            'multiProcessorCount': 4, 'sharedMemPerBlock': 48 << 10, 'sharedMemPerBlockOptin': 99 << 10, 'warpSize': 32,
            'pciBusID': number + 1, 'pciDomainID': 0, 'pciDeviceID': 0, 'uuid': bytes(15) + bytes([number + 1])}


def deviceGetPCIBusId(device: int) -> str:
    """Where the card is in its node, the same under every numbering."""
    return f'0000:{_physical(device) + 1:02X}:00.0'


def driverGetVersion() -> int:
    """CUDA 12.4."""
    return 12040


def runtimeGetVersion() -> int:
    """CUDA 12.4."""
    return 12040


def memGetInfo() -> tuple[int, int]:
    """Free and total bytes."""
    return free_and_total()


def deviceSynchronize() -> None:
    """Wait for all streams."""
    fake.count_synchronization()
    _streams.run_all()
