"""The errors of CUDA's driver."""

from __future__ import annotations


class CUDADriverError(RuntimeError):
    """What a call of the driver returned."""

    def __init__(self, name: str, text: str):
        super().__init__(f'{name}: {text}')
