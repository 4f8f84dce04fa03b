"""Arrays that begin on a cache line: a vector register of AVX-512, and each row of a tile register, is one line long.

NumPy begins large ones 16 bytes behind a line.  Then each load takes two lines, and those of tiles five times as long.
"""

from __future__ import annotations

import math

import numpy as np

from tpmpi.kernels.jit import helper

LINE = 64


def empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """numpy.empty on whole lines."""
    return _aligned(np.empty, shape, dtype)


def zeros(shape: tuple[int, ...], dtype) -> np.ndarray:
    """numpy.zeros on whole lines; what nobody has written takes no memory yet."""
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
