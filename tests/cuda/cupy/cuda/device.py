"""What belongs to a device: the handle of cuBLAS."""

from __future__ import annotations


def get_cublas_handle() -> int:
    """The handle of this thread and device."""
    return 1
