"""Tensors of a checkpoint seen in another way: some of their rows, transposed, joined.  Nothing is read before it is asked for.

Rows of a quantized tensor stay quantized: its groups run along the columns, and no number changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from tpmpi.formats.source import BFLOAT16, FormatError, TensorSource, describe
from tpmpi.weights import Stored


def rows(source: TensorSource, start: int, stop: int) -> TensorSource:
    """Rows start … stop - 1.  Reads these only, where the source can."""
    if not 0 <= start <= stop <= source.shape[0]:
        raise FormatError(f'{source.origin} has the shape {describe(source.shape)}; the configuration asks for {stop} rows')
    if (start, stop) == (0, source.shape[0]):
        return source
    if source.rows is not None and len(source.shape) < 3:
        return dataclasses.replace(source.rows(start, stop), origin=f'{source.origin}, rows {start} to {stop - 1}')
    return selected(source, np.arange(start, stop))


def selected(source: TensorSource, index: np.ndarray) -> TensorSource:
    """Row index[i] as row i."""
    if source.shape[0] <= index.max(initial=-1):
        raise FormatError(
            f'{source.origin} has the shape {describe(source.shape)}; the configuration asks for {index.max() + 1} rows')

    def load_groups(kind: str) -> Stored:
        stored = source.load_groups(kind)
        return Stored(kind, **{name: part[index] for name, part in stored.parts.items()})

    return dataclasses.replace(
        source, shape=(len(index), *source.shape[1:]), load=lambda: source.load()[index],
        load_groups=load_groups if source.group_kinds else None, rows=lambda start, stop: selected(source, index[start:stop]))


def transposed(source: TensorSource) -> TensorSource:
    """A matrix with rows and columns exchanged; a vector as it is."""
    if len(source.shape) != 2:
        return source
    return _changed(source, lambda x: np.ascontiguousarray(x.T), source.shape[::-1])


def reshaped(source: TensorSource, shape: tuple[int, ...]) -> TensorSource:
    """The same numbers in another shape.  Raises FormatError where they are not as many."""
    if np.prod(shape, dtype=object) != np.prod(source.shape, dtype=object):
        raise FormatError(f'{source.origin} has the shape {describe(source.shape)}; expected the numbers of {describe(shape)}')
    return _changed(source, lambda x: x.reshape(shape), shape)


def tiled(source: TensorSource, count: int) -> TensorSource:
    """A vector `count` times in a row."""
    return _changed(source, lambda x: np.tile(x, count), (count * source.shape[0], *source.shape[1:]))


def element(source: TensorSource, number: int) -> TensorSource:
    """One matrix of a stack of them: [number, rows, columns] -> [rows, columns]."""
    if len(source.shape) != 3 or number >= source.shape[0]:
        raise FormatError(
            f'{source.origin} has the shape {describe(source.shape)}; the configuration asks for {number + 1} or more matrices')
    count = source.shape[1]
    if source.rows is None:
        return _changed(source, lambda x: x[number], source.shape[1:])
    return dataclasses.replace(source.rows(number * count, (number + 1) * count), origin=f'{source.origin}, matrix {number}')


def mapped(source: TensorSource, function: Callable[[np.ndarray], np.ndarray]) -> TensorSource:
    """A function of each number, computed in float32."""
    return TensorSource(source.origin, source.shape, 'float32', lambda: function(source.read()))


def joined(sources: Sequence[TensorSource]) -> TensorSource:
    """The rows of several tensors, one after the other."""
    first = sources[0]
    if any(s.shape[1:] != first.shape[1:] for s in sources):
        raise FormatError(f'{first.origin} has the shape {describe(first.shape)}; parts of the same tensor have others')
    same = first.dtype in (BFLOAT16, 'float16', 'float32') and all(s.dtype == first.dtype for s in sources)
    return TensorSource(first.origin, (sum(s.shape[0] for s in sources), *first.shape[1:]), first.dtype if same else 'float32',
                        lambda: np.concatenate([s.load() if same else s.read() for s in sources]))


def _changed(source: TensorSource, function: Callable, shape: tuple[int, ...]) -> TensorSource:
    """A view whose numbers are the source's own, but not in its rows, so that groups of integers do not survive."""
    return TensorSource(source.origin, shape, source.dtype, lambda: function(source.load()))


def half_rotation_rows(heads: int, head_dim: int, rotary_dim: int) -> np.ndarray:
    """Where each row of a q or k projection lies in a file whose RoPE turns the pairs (2i, 2i + 1).  [heads * head_dim]

    Ours turns (i, i + rotary_dim / 2), of the first rotary_dim numbers of a head.
    """
    index = np.arange(heads * head_dim).reshape(heads, head_dim)
    turned = index[:, :rotary_dim].reshape(heads, rotary_dim // 2, 2).swapaxes(1, 2).reshape(heads, rotary_dim)
    return np.concatenate((turned, index[:, rotary_dim:]), axis=1).reshape(-1)
