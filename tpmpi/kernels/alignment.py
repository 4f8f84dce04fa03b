"""Where arrays lie in memory: what is read again and again on huge pages, and everything on whole cache lines.

NumPy begins large arrays 16 bytes behind a line.  Then each load of a vector of AVX-512 takes two lines, and those of
tiles five times as long.  On pages of 4 KiB a stream through small matrices waits at each of them for its address: on a
virtual machine with AMX one core read 12.8 GB/s of bfloat16 so, on pages of 2 MiB 15.0 (240 matrices of SmolLM2's shapes).
"""

from __future__ import annotations

import math
import mmap

import numpy as np

from tpmpi.kernels.jit import helper

LINE = 64
PAGE, BLOCK = 2 << 20, 64 << 20  # bytes of a huge page; of what is asked of the system at once


class Arena:
    """Memory for weights and cache, on huge pages where the system has them.  It goes when the last of its arrays does."""

    def __init__(self):
        self._block, self._used = np.empty(0, np.uint8), 0

    def zeros(self, shape: tuple[int, ...], dtype, spare: int = 0) -> np.ndarray:
        """An array of zeros, and `spare` bytes behind it that may be read; what nobody has written takes no memory yet."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self._used + size + spare > len(self._block):
            self._block, self._used = _huge_pages(max(BLOCK, size + spare)), 0
        start = self._used
        self._used += -(-(size + spare) // LINE) * LINE
        return self._block[start:start + size].view(dtype).reshape(shape)


def _huge_pages(size: int) -> np.ndarray:
    """So many bytes of zeros, or more."""
    if not hasattr(mmap, 'MADV_HUGEPAGE'):
        return zeros((size,), np.uint8)
    memory = mmap.mmap(-1, size + 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        pass
    found = np.frombuffer(memory, np.uint8)
    return found[-found.ctypes.data % PAGE:]


def empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """numpy.empty on whole lines."""
    return _aligned(np.empty, shape, dtype)


def zeros(shape: tuple[int, ...], dtype) -> np.ndarray:
    """numpy.zeros on whole lines."""
    return _aligned(np.zeros, shape, dtype)


def _aligned(new, shape, dtype) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = new(size + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return raw[start:start + size].view(dtype).reshape(shape)


@helper
def aligned(count):
    """So many bytes on whole lines, for a kernel."""
    raw = np.empty(count + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return raw[start:start + count]
