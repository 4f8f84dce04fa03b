"""How the numbers of a matrix are stored: encode to and decode from each kind.

A kind is data, never a class: `linear(x, weight)` chooses its kernel by `weight.kind`.

    float32    the value
    bfloat16   its upper 16 bits
    float16    IEEE half
    int8       value = scale * q            q from -127 to 127, a float16 scale for each group of 32 weights
    int4       value = scale * q + offset   q from 0 to 15, a float16 scale and offset for each group

A group runs along the contraction axis, so that a product needs its scale once for 32 terms.  The blocks of GGUF's
types Q8_0, Q4_0 and Q4_1 are such groups, and carry over without loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

GROUP = 32  # weights that share a scale
STORAGE = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(np.uint16),  # bfloat16 as its 16 bits
           'float16': np.dtype(np.float16), 'int8': np.dtype(np.int8), 'int4': np.dtype(np.uint8)}  # int4 two to a byte
GROUP_PARTS = {'int8': ('scale',), 'int4': ('scale', 'offset')}  # what each group has, as float16
FORMULAS = {'int8': 'value = scale * q', 'int4': 'value = scale * q + offset'}
STORED_KINDS = tuple(STORAGE)
WEIGHT_KINDS = tuple(kind for kind in STORAGE if kind != 'float16')  # that all kernels compute with; float16 those of a GPU
MAX_FLOAT16 = 65504.0
LARGEST = tuple(range(127, 119, -1))  # integers that the largest of 32 weights may become in int8
AT_ONCE = 1 << 18  # weights that are encoded or decoded at a time: what is in between stays in the cache


@dataclass(frozen=True)
class Stored:
    """Rows of a matrix (or a vector) as the file keeps them."""

    kind: str
    data: np.ndarray  # [rows, columns], bfloat16 as its bits; int4: [rows, columns/2], column 2j in the low 4 bits
    scale: np.ndarray | None = None  # float16: [rows, columns/32] if group_axis is 1, [rows/32, columns] if it is 0
    offset: np.ndarray | None = None  # float16, int4 only, of the same shape
    group_axis: int = 1  # the contraction axis

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return (len(self.data), 2 * self.data.shape[1]) if self.kind == 'int4' else self.data.shape

    @property
    def parts(self) -> dict[str, np.ndarray]:
        """What belongs to a tensor of this kind: 'data', and 'scale' and 'offset' of its groups."""
        return {name: getattr(self, name) for name in ('data', *GROUP_PARTS.get(self.kind, ()))}


@dataclass(frozen=True)
class Weight:
    """A rank's part of a matrix.

    data: in the layout of the kernel set that made it (its `new_weight` says which); for the kind 'mixed' a tuple of
    Weights whose outputs lie side by side.
    """

    data: Any
    kind: str
    letter: str = ''  # its place in the diagram
    in_features: int = 0  # on this rank, where the data's shape does not tell
    out_features: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the matrix reads."""
        return sum(part.nbytes for part in self.data) if self.kind == 'mixed' else self.data.nbytes


def fits(shape: tuple[int, ...], kind: str, group_axis: int) -> bool:
    """Whether values of this shape can be of a kind: groups need whole runs of 32 along a matrix's contraction axis."""
    if kind not in GROUP_PARTS:
        return True
    return len(shape) == 2 and shape[group_axis] % GROUP == 0 and (kind != 'int4' or shape[1] % 2 == 0)


def part_shapes(shape: tuple[int, ...], kind: str, group_axis: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The shape and type of each of Stored.parts, for values of this shape."""
    assert fits(shape, kind, group_axis)
    shapes = {'data': ((shape[0], shape[1] // 2) if kind == 'int4' else tuple(shape), STORAGE[kind])}
    for name in GROUP_PARTS.get(kind, ()):
        shapes[name] = tuple(n // GROUP if axis == group_axis else n for axis, n in enumerate(shape)), np.dtype(np.float16)
    return shapes


# ---- there and back


def encode(x: np.ndarray, kind: str, group_axis: int = 1, search: bool = False) -> Stored:
    """float32 values in the storage of a kind, each as near as the kind allows; float32 as they are.

    search: of each group of int8, try eight scales, in nine times the time, and take that with the least squared error.
    float16 needs finite values in its reach; the integer kinds those that float16 scales reach, and a shape that `fits`.
    Raises ValueError.
    """
    if kind not in STORAGE:
        raise ValueError(f'weight kind {kind!r}; known are {", ".join(STORED_KINDS)}')
    if not fits(x.shape, kind, group_axis):
        raise ValueError(f'values of the shape {list(x.shape)} cannot be {kind}; expected a matrix whose axis {group_axis} '
                         f'is a multiple of {GROUP}' + ', and an even number of columns' * (kind == 'int4'))
    x = np.ascontiguousarray(x, np.float32)
    if kind == 'float32':
        return Stored(kind, x, group_axis=group_axis)
    parts = {name: np.empty(*part) for name, part in part_shapes(x.shape, kind, group_axis).items()}
    if kind in HALVES:
        flat, halves = x.reshape(-1), parts['data'].reshape(-1)
        for i in range(0, x.size, AT_ONCE):
            halves[i:i + AT_ONCE] = HALVES[kind](flat[i:i + AT_ONCE])
        return Stored(kind, **parts, group_axis=group_axis)
    stored = Stored(kind, **parts, group_axis=group_axis)
    for here, groups in _pieces(x.shape, group_axis):
        if kind == 'int8':
            _encode_int8(x[here], stored.data[here], groups, stored, search)
        else:
            _encode_int4(x[here], stored.data[here], groups, stored)
    return stored


def decode(stored: Stored) -> np.ndarray:
    """The float32 values, exactly what the formulas give in float32; those of the kind float32 without a copy."""
    if stored.kind == 'float32':
        return stored.data
    if stored.kind == 'bfloat16':
        return decode_bfloat16(stored.data)
    if stored.kind == 'float16':
        return stored.data.astype(np.float32)
    out = np.empty(stored.shape, np.float32)
    for here, groups in _pieces(out.shape, stored.group_axis):
        data = stored.data[here]
        np.copyto(out[here], data if stored.kind == 'int8' else unpack_int4(data))
        values, axis = _grouped(out[here], stored.group_axis)
        values *= _per_value(stored.scale[groups], axis)
        if stored.kind == 'int4':
            values += _per_value(stored.offset[groups], axis)
    return out


def recode(stored: Stored, kind: str) -> Stored:
    """The same values in another kind, as near as it allows; itself where it is of that kind already."""
    return stored if stored.kind == kind else encode(decode(stored), kind, stored.group_axis)


def transpose(stored: Stored) -> Stored:
    """The transposed matrix, every number as it was."""
    data, group_axis = stored.data, 1 - stored.group_axis
    data = pack_int4(unpack_int4(data).T) if stored.kind == 'int4' else np.ascontiguousarray(data.T)
    groups = {name: np.ascontiguousarray(part.T) for name, part in stored.parts.items() if name != 'data'}
    return Stored(stored.kind, data, **groups, group_axis=group_axis)


# ---- 16 bits


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


def encode_float16(x: np.ndarray) -> np.ndarray:
    """float32 values rounded to IEEE half, to nearest, ties to even.  Raises ValueError for what that cannot reach."""
    _check_range(np.abs(x), 1, 'float16')
    return x.astype(np.float16)


HALVES = {'bfloat16': encode_bfloat16, 'float16': encode_float16}


# ---- groups of integers


def pack_int4(q: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 15, two to a byte: column 2j in the low four bits, 2j + 1 in the high.  uint8 -> uint8"""
    pairs = np.ascontiguousarray(q).view('<u2')  # five times as fast as every other column
    return (pairs | pairs >> 4).astype(np.uint8)


def unpack_int4(data: np.ndarray) -> np.ndarray:
    """The numbers from 0 to 15 in packed bytes.  uint8 [rows, columns/2] -> uint8 [rows, columns]"""
    pairs = data.astype('<u2')
    pairs |= pairs << 4
    pairs &= 0x0F0F
    return pairs.view(np.uint8)


def _encode_int8(x: np.ndarray, data: np.ndarray, groups: slice, stored: Stored, search: bool):
    """scale = max|x| / 127, the next larger float16 where q would pass 127.5 otherwise; so |error| <= scale / 2.

    search: also coarser scales, which may fit the values better: those that were rounded before lie on a grid.
    """
    values, axis = _grouped(x, stored.group_axis)
    peak = _reduce(np.maximum, np.abs(values), axis)
    _check_range(peak, 127, 'int8')
    scale, q = _rounded_int8(values, peak, LARGEST[0], axis)
    if search:
        least = _squared_error(values, scale, q, axis)
        for largest in LARGEST[1:]:
            coarser, other = _rounded_int8(values, peak, largest, axis)
            error = _squared_error(values, coarser, other, axis)
            np.copyto(scale, coarser, where=error < least)
            np.copyto(q, other, where=np.expand_dims(error < least, axis))
            np.minimum(least, error, out=least)
    stored.scale[groups] = scale
    np.copyto(data, q.reshape(x.shape), casting='unsafe')


def _rounded_int8(values: np.ndarray, peak: np.ndarray, largest: int, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales that make the peak of a group `largest`, and the integers; none passes 127.5."""
    scale = np.minimum(peak / largest, MAX_FLOAT16).astype(np.float16)
    np.nextafter(scale, np.float16(np.inf), out=scale, where=127.5 * scale.astype(np.float32) < peak)
    q = values / _divisor(scale, axis)
    return scale, np.clip(np.rint(q, out=q), -127, 127, out=q)


def _squared_error(values: np.ndarray, scale: np.ndarray, q: np.ndarray, axis: int) -> np.ndarray:
    """Of each group."""
    return _reduce(np.add, np.square(q * _per_value(scale, axis) - values), axis)


def _encode_int4(x: np.ndarray, data: np.ndarray, groups: slice, stored: Stored):
    """offset = min, rounded down, and scale = (max - offset) / 15, rounded up: nothing is clipped, |error| <= scale / 2."""
    values, axis = _grouped(x, stored.group_axis)
    low, high = _reduce(np.minimum, values, axis), _reduce(np.maximum, values, axis)
    _check_range(np.maximum(high, -low), 1, 'int4')
    offset = low.astype(np.float16)
    np.nextafter(offset, np.float16(-np.inf), out=offset, where=offset > low)
    width = high - offset
    scale = (width / 15).astype(np.float16)
    np.nextafter(scale, np.float16(np.inf), out=scale, where=15 * scale.astype(np.float32) < width)
    stored.scale[groups], stored.offset[groups] = scale, offset
    q = values - _per_value(offset, axis)
    q /= _divisor(scale, axis)
    data[...] = pack_int4(np.rint(q, out=q).reshape(x.shape).astype(np.uint8))


def _check_range(peak: np.ndarray, times: int, kind: str):
    """Raises ValueError where a magnitude, or the largest of a group, is out of the reach of float16."""
    if not (peak <= times * MAX_FLOAT16).all():
        worst = peak.max()
        raise ValueError(f'a weight has the magnitude {worst:.3g}; {kind} reaches {times * MAX_FLOAT16:.6g}'
                         if np.isfinite(worst) else f'a weight is not a finite number, which {kind} cannot hold')


def _pieces(shape: tuple[int, int], group_axis: int) -> Iterator[tuple[slice, slice]]:
    """Runs of rows with about AT_ONCE values and whole groups: where they lie in the data, and in the scales."""
    rows, step = shape[0], GROUP * max(1, AT_ONCE // max(1, GROUP * shape[1]))
    each = 1 if group_axis == 1 else GROUP
    return ((slice(i, min(i + step, rows)), slice(i // each, min(i + step, rows) // each)) for i in range(0, rows, step))


def _grouped(x: np.ndarray, group_axis: int) -> tuple[np.ndarray, int]:
    """Contiguous values with the 32 of a group on an axis of their own, and which one that is."""
    rows, columns = x.shape
    if group_axis == 1:
        return x.reshape(rows, columns // GROUP, GROUP), 2
    return x.reshape(rows // GROUP, GROUP, columns), 1


def _reduce(function: np.ufunc, values: np.ndarray, axis: int) -> np.ndarray:
    """function.reduce over each group; reduceat is twice as fast on runs of 32 in memory."""
    if axis == 1:
        return function.reduce(values, axis)
    return function.reduceat(values.reshape(-1), np.arange(0, values.size, GROUP)).reshape(values.shape[:2])


def _per_value(part: np.ndarray, axis: int) -> np.ndarray:
    """A scale or offset of each group, to be broadcast over its values.  float16 -> float32"""
    return np.expand_dims(part.astype(np.float32), axis)


def _divisor(scale: np.ndarray, axis: int) -> np.ndarray:
    """The scales to divide by, with 1 for 0: all that such a group holds is zeros."""
    return _per_value(np.where(scale == 0, np.float16(1), scale), axis)
