"""Memory pools that keep nothing."""

from __future__ import annotations

from cupy._memory import Allocation, OutOfMemoryError, used

__all__ = ['MemoryPool', 'OutOfMemoryError']


class MemoryPool:
    """A pool that gives back at once what is freed."""

    def malloc(self, nbytes: int) -> Allocation:
        """Memory of this pool."""
        return Allocation(nbytes)

    def free_all_blocks(self, stream=None) -> None:
        """Nothing is kept."""

    def used_bytes(self) -> int:
        """Bytes that arrays hold."""
        return used()

    def total_bytes(self) -> int:
        """Bytes in use, as nothing is kept."""
        return self.used_bytes()

    def free_bytes(self) -> int:
        """Bytes kept for later."""
        return 0
