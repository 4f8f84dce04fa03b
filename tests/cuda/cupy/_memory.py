"""Device memory that is host memory: poisoned when new, with guard zones around it, and no more than the device has."""

from __future__ import annotations

import os
import weakref

import numpy as np

ALIGNMENT, GUARD = 512, 1024
GUARD_BYTES = np.full(GUARD // 4, 0x7FF5A5C5, '<u4').view(np.uint8)  # a NaN, too, for who reads there
OF_THE_DRIVER = 1 << 30
_used = 0


_live: weakref.WeakValueDictionary[int, Allocation] = weakref.WeakValueDictionary()


class OutOfMemoryError(MemoryError):
    """The device has less free memory than was asked for."""


def free_and_total() -> tuple[int, int]:
    """Bytes, as memGetInfo has them."""
    size = int(os.environ.get('FAKE_CUDA_FREE_BYTES', str(16 << 30)))
    return size - _used, size + OF_THE_DRIVER


def used() -> int:
    """Bytes that arrays hold."""
    return _used


def _give_back(nbytes: int) -> None:
    global _used
    _used -= nbytes


class Allocation:
    """One allocation.  bytes: its memory, as uint8."""

    def __init__(self, nbytes: int):
        global _used
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        if size > free_and_total()[0]:
            raise OutOfMemoryError(f'Out of memory allocating {size:,} bytes (allocated so far: {_used:,} bytes).')
        raw = np.empty(nbytes + 2 * GUARD + ALIGNMENT, np.uint8)
        start = GUARD + -(raw.ctypes.data + GUARD) % ALIGNMENT
        self.bytes = raw[start:start + nbytes]
        self._guards = raw[start - GUARD:start], raw[start + nbytes:start + nbytes + GUARD]
        for guard in self._guards:
            guard[:] = GUARD_BYTES
        _used += size
        weakref.finalize(self, _give_back, size)
        _live[self.bytes.ctypes.data] = self

    def check(self, who: str) -> None:
        """Raises RuntimeError where a guard zone was written."""
        for guard, side in zip(self._guards, ('before', 'behind'), strict=True):
            if not np.array_equal(guard, GUARD_BYTES):
                raise RuntimeError(f'{who} wrote {side} an array of {self.bytes.nbytes} bytes')


def at(address: int) -> Allocation:
    """The allocation that an address lies in.  Raises RuntimeError where there is none."""
    for start, allocation in list(_live.items()):
        if start <= address < start + allocation.bytes.nbytes:
            return allocation
    raise RuntimeError(f'address {address:#x} is not of device memory')


def poison(host: np.ndarray) -> None:
    """Values that nobody takes for results: NaN, for integers a large one, also as bits of bfloat16."""
    if host.dtype.kind in 'fc':
        host.fill(np.nan)
    elif host.dtype.kind in 'iu':
        host.fill(np.frombuffer((b'\x7b' if host.dtype.kind == 'i' else b'\xff') * host.itemsize, host.dtype)[0])
    else:
        host.fill(True)


class PinnedMemoryPointer(bytearray):
    """Pinned host memory: copies from and to it are asynchronous."""

    __hash__ = object.__hash__

    @property
    def ptr(self) -> int:
        """The address."""
        return np.frombuffer(self, np.uint8).ctypes.data

    def size(self) -> int:
        """Bytes that there are: more than were asked for."""
        return len(self)


_pinned: weakref.WeakValueDictionary[int, PinnedMemoryPointer] = weakref.WeakValueDictionary()


def alloc_pinned_memory(nbytes: int) -> PinnedMemoryPointer:
    """Pinned memory of at least nbytes, in units of 512 bytes as CuPy's pool has them."""
    memory = PinnedMemoryPointer(b'\xff' * (-(-max(nbytes, 1) // 512) * 512))
    _pinned[memory.ptr] = memory
    return memory


def is_pinned(host: np.ndarray) -> bool:
    """The array lies in pinned memory."""
    at = host.ctypes.data
    return any(start <= at < start + len(memory) for start, memory in list(_pinned.items()))
