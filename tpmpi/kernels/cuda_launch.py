"""Launching the kernels of the .cu files, which are compiled for the device when they are first needed."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from tpmpi.kernels.cuda_source import FILES, source

USUAL_SHARED = 48 << 10  # bytes of dynamic shared memory that a kernel may have without asking
RESERVED = 2 << 10  # bytes of shared memory that a block takes besides, at most


class Launcher:
    """The compiled kernels, and how often any was launched.  xp: CuPy"""

    def __init__(self, xp):
        self.xp, self.functions = xp, {}
        self.allowed = {}  # bytes of dynamic shared memory of those that need more than usual
        self.launches = 0  # of these kernels, of products by cuBLAS and of graphs

    @cached_property
    def modules(self) -> dict:
        """The compiled files."""
        return {name: self.xp.RawModule(code=source(name), options=('-std=c++17',)) for name in FILES}

    @cached_property
    def multiprocessors(self) -> int:
        """Of the device."""
        return self.xp.cuda.Device().attributes['MultiProcessorCount']

    @cached_property
    def shared(self) -> int:
        """Bytes of shared memory of a multiprocessor."""
        return self.xp.cuda.Device().attributes['MaxSharedMemoryPerMultiprocessor']

    def shared_of(self, blocks: int) -> int:
        """Bytes of dynamic shared memory that so many blocks can have on one multiprocessor, each."""
        return self.shared // blocks - RESERVED

    def launch(self, file: str, name: str, grid: tuple[int, ...], threads: int, *arguments, shared: int = 0) -> None:
        """Run a kernel; None is a null pointer."""
        if name not in self.functions:
            self.functions[name] = self.modules[file].get_function(name)
        if shared > self.allowed.get(name, USUAL_SHARED):
            self.functions[name].max_dynamic_shared_size_bytes = self.allowed[name] = shared
        self.launches += 1
        arguments = tuple(np.uint64(0) if a is None else a for a in arguments)
        self.functions[name](grid, (threads,), arguments, shared_mem=shared)
