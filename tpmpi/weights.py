"""How the numbers of a matrix are stored: encode to and decode from each kind.

A kind is data, never a class: `linear(x, weight)` chooses its kernel by `weight.kind`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

STORAGE = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(np.uint16)}  # bfloat16 as its 16 bits
WEIGHT_KINDS = tuple(STORAGE)


@dataclass(frozen=True)
class Weight:
    """A rank's part of a matrix.

    data: in the layout of the kernel set that made it (its `new_weight` says which).
    """

    data: Any
    kind: str
    letter: str = ''  # its place in the diagram

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the matrix reads."""
        return self.data.nbytes


def encode_bfloat16(x: np.ndarray) -> np.ndarray:
    """The upper 16 bits of float32 values, rounded to nearest, ties to even; a NaN stays a NaN.  float32 -> uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(x), quiet_nan, rounded).astype(np.uint16)


def decode_bfloat16(bits: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """bfloat16 bits as the float32 values that they are.  uint16 -> float32, exact."""
    if out is None:
        out = np.empty(bits.shape, np.float32)
    words = out.view(np.uint32)
    np.copyto(words, bits, casting='same_kind')
    np.left_shift(words, 16, out=words)
    return out


def encode(x: np.ndarray, kind: str) -> np.ndarray:
    """float32 values in the storage of a kind: float32 as they are, bfloat16 rounded to nearest even."""
    if kind == 'float32':
        return np.ascontiguousarray(x, np.float32)
    if kind == 'bfloat16':
        return encode_bfloat16(x)
    raise ValueError(f'weight kind {kind!r}; known are {", ".join(WEIGHT_KINDS)}')


def decode(data: np.ndarray, kind: str) -> np.ndarray:
    """The float32 values of stored data; float32 without a copy."""
    return data if kind == 'float32' else decode_bfloat16(data)
