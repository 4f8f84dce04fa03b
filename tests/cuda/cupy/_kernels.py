"""Kernels from source: queued, and run by the emulator when the stream runs."""

from __future__ import annotations

import os

import emulate
import numpy as np

from cupy import _streams, fake
from cupy._array import ndarray
from cupy.cuda.driver import CUDADriverError


class RawModule:
    """A CUDA C++ source."""

    def __init__(self, *, code: str, options: tuple[str, ...] = (), backend: str = 'nvrtc'):
        if not isinstance(options, tuple) or backend not in ('nvrtc', 'nvcc'):
            raise TypeError(f'options {options!r}, backend {backend!r}; expected a tuple, and nvrtc or nvcc')
        self.code, self.options, self.backend = code, options, backend
        self._library = None

    def compile(self) -> None:
        """Compile now, not with the first function."""
        if self._library is None:
            self._library = emulate.compile_source(self.code, sanitize=os.environ.get('FAKE_CUDA_SANITIZE') == '1')

    def get_function(self, name: str) -> RawKernel:
        """One of its kernels."""
        self.compile()
        if name not in self._library.kernels:
            raise CUDADriverError('CUDA_ERROR_NOT_FOUND', f'named symbol not found: {name}')
        return RawKernel(self._library, name)


class RawKernel:
    """One kernel."""

    def __init__(self, library: emulate.Library, name: str):
        self.library, self.name = library, name
        self._shared_limit = emulate.DEFAULT_SHARED

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        """Bytes of dynamic shared memory that a launch may ask for."""
        return self._shared_limit

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, nbytes: int) -> None:
        if not 0 <= nbytes <= emulate.MOST_SHARED:
            raise CUDADriverError('CUDA_ERROR_INVALID_VALUE', f'{nbytes} bytes of shared memory; at most {emulate.MOST_SHARED}')
        self._shared_limit = nbytes

    def __call__(self, grid: tuple, block: tuple, args: tuple, *, shared_mem: int = 0, stream=None) -> None:
        """Queue a launch; sizes and arguments are checked now."""
        if not isinstance(grid, tuple) or not isinstance(block, tuple):
            raise TypeError(f'kernel {self.name}: grid {grid!r}, block {block!r}; expected tuples')
        values = [self._argument(x) for x in args]
        self.library.bind(self.name, values)
        try:
            self.library.check_launch(self.name, grid, block, shared_mem, self._shared_limit)
        except emulate.LaunchError as e:
            raise CUDADriverError('CUDA_ERROR_INVALID_VALUE', str(e)) from None
        fake.launches[self.name] += 1
        memories = {id(x.memory): x.memory for x in args if isinstance(x, ndarray)}  # which keeps them until it has run

        def work():
            self.library.launch(self.name, grid, block, values, shared_mem, self._shared_limit, fake.seed)
            for memory in memories.values():
                memory.check(f'kernel {self.name}')

        (stream or _streams.current()).push(work)

    def _argument(self, x):
        if isinstance(x, ndarray):
            return emulate.Pointer(x.data.ptr, x.dtype)
        if isinstance(x, np.ndarray):
            raise TypeError(f'kernel {self.name}: Unsupported type {type(x)}')
        return x
