"""Each kind against its definition: bfloat16 by the book, the integers by loops over single weights in exact fractions."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpmpi.weights import (
    GROUP,
    STORED_KINDS,
    Stored,
    Weight,
    decode,
    decode_bfloat16,
    encode,
    encode_bfloat16,
    fits,
    pack_int4,
    part_shapes,
    recode,
    transpose,
    unpack_int4,
)

floats = st.floats(width=32, allow_nan=False)


def value(bits: int) -> float:
    """A bfloat16 by the book: the upper half of an IEEE single."""
    return struct.unpack('<f', struct.pack('<I', bits << 16))[0]


@given(floats)
def test_rounding_is_to_the_nearest_and_ties_to_even(x):
    bits = int(encode_bfloat16(np.array([x], np.float32))[0])
    rounded = value(bits)
    if math.isinf(rounded):  # at or above the midpoint to the next power of two
        assert abs(x) >= (2 - 2 ** -8) * 2.0 ** 127
        return
    for neighbour in {max(bits - 1, 0), bits + 1} - {0x8000, 0x7FFF}:
        other = value(neighbour)
        if math.isinf(other) or (other < 0) != (rounded < 0) and other and rounded:
            continue
        assert abs(x - rounded) <= abs(x - other)
        if abs(x - rounded) == abs(x - other) and other != rounded:
            assert bits % 2 == 0


@given(st.integers(0, 0xFFFF))
def test_every_bfloat16_survives_the_way_there_and_back(bits):
    array = np.array([bits], np.uint16)
    x = decode_bfloat16(array)
    if np.isnan(x[0]):
        assert np.isnan(decode_bfloat16(encode_bfloat16(x)))[0]
    else:
        assert x[0] == value(bits) and encode_bfloat16(x)[0] == bits


def test_float32_is_not_copied_and_unknown_kinds_are_refused():
    x = np.ones((2, 3), np.float32)
    assert encode(x, 'float32').data is x and decode(encode(x, 'float32')) is x
    with pytest.raises(ValueError, match='float8'):
        encode(x, 'float8')


@given(floats)
def test_float16_is_ieee_half_and_what_it_cannot_reach_is_refused(x):
    if abs(x) > 65504:
        with pytest.raises(ValueError, match='which float16 cannot hold' if math.isinf(x) else 'float16 reaches 65504'):
            encode(np.array([x], np.float32), 'float16')
        return
    stored = encode(np.array([x], np.float32), 'float16')
    assert stored.data.tobytes() == struct.pack('<e', x)  # to nearest, ties to even
    assert decode(stored)[0] == struct.unpack('<e', struct.pack('<e', x))[0] and decode(stored).dtype == np.float32


# ---- groups of integers

SMALL, LARGE = 2.0 ** -24, 65504.0  # the smallest and the largest float16


def exact_values(stored: Stored) -> np.ndarray:
    """scale * q + offset of each weight, in fractions, rounded once to float32."""
    rows, columns = stored.shape
    out = np.empty((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            at = (i, j // GROUP) if stored.group_axis == 1 else (i // GROUP, j)
            if stored.kind == 'int8':
                q, offset = int(stored.data[i, j]), 0.0
            else:
                byte = int(stored.data[i, j // 2])
                q, offset = byte >> 4 if j % 2 else byte & 15, float(stored.offset[at])
            value = Fraction(float(stored.scale[at])) * q + Fraction(offset)
            out[i, j] = nearest_float32(value)
    return out


def nearest_float32(value: Fraction) -> np.float32:
    """Through float64, which holds scale * q + offset of float16 numbers and small integers unless they are far apart."""
    assert Fraction(float(value)) == value or abs(value) > 1e-3  # then a double rounding could be off by one bit, never seen
    return np.float32(float(value))


def halves(rng, shape, low=-14, high=10):
    """float16 numbers of many magnitudes and both signs."""
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(low, high, shape)).astype(np.float16)


def random_stored(kind, rows, columns, group_axis, seed=0) -> Stored:
    rng, parts = np.random.default_rng(seed), {}
    for name, (shape, dtype) in part_shapes((rows, columns), kind, group_axis).items():
        if name == 'data':
            parts[name] = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype, endpoint=True)  # -128 as well
        else:
            parts[name] = halves(rng, shape)
    return Stored(kind, **parts, group_axis=group_axis)


shapes = st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from([0, 1])).map(
    lambda s: (s[0] * 32, 2 * s[1], 0) if s[2] == 0 else (s[0], s[1] * 32, 1))


@given(st.sampled_from(['int8', 'int4']), shapes, st.integers(0, 99))
def test_integers_decode_to_their_formula(kind, shape, seed):
    stored = random_stored(kind, *shape, seed)
    assert stored.shape == shape[:2]
    values = decode(stored)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, exact_values(stored))
    turned = transpose(stored) if fits(shape[1::-1], kind, 1 - shape[2]) else None
    if turned is not None:
        assert turned.group_axis == 1 - stored.group_axis
        np.testing.assert_array_equal(decode(turned), values.T)


magnitudes = st.sampled_from([1.0, 1e-3, 1e-5, 1e-7, 1e-9, 1e-40, 30.0, 1000.0])
elements = st.one_of(st.floats(-1, 1, width=32), st.sampled_from([0.0, 1.0, -1.0, 0.5]))


@given(st.sampled_from(['int8', 'int4']), st.sampled_from([0, 1]), magnitudes, st.sampled_from([0.0, 3.0, -50.0]),
       st.lists(elements, min_size=64, max_size=64))
def test_no_weight_is_off_by_more_than_half_a_scale(kind, group_axis, magnitude, centre, values):
    """And by the rounding of float32 where an offset outweighs its scale.  Scales are as small as float16 allows."""
    x = (magnitude * (np.array(values, np.float64) + centre)).astype(np.float32).reshape(2, 32)
    x = x if group_axis == 1 else np.ascontiguousarray(x.T)
    stored = encode(x, kind, group_axis)
    for i in range(2):
        group, at = (x[i], (i, 0)) if group_axis == 1 else (x[:, i], (0, i))
        found = decode(stored)[i] if group_axis == 1 else decode(stored)[:, i]
        scale, peak = float(stored.scale[at]), float(np.abs(group).max())
        error = np.abs(group.astype(np.float64) - found).max()
        assert error <= scale * (0.5 + 1e-5) + 2.0 ** -23 * peak * (kind == 'int4')
        needed = peak / 127 if kind == 'int8' else (float(group.max()) - float(group.min())) / 15
        spare = 0 if kind == 'int8' else 2.0 ** -10 * peak / 15  # what rounding the offset down may add
        assert scale <= (needed + spare) * (1 + 2.0 ** -9) + SMALL
    if kind == 'int8':
        assert stored.data.min() >= -127
    np.testing.assert_array_equal(decode(stored), exact_values(stored))


@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_what_the_kind_can_say_survives(kind):
    """Zeros, a constant, and values on the grid of a scale that float16 holds."""
    x = np.zeros((3, 64), np.float32)
    x[1] = 0.375
    x[2] = np.arange(64) % 16 * 0.25 - 1.5 if kind == 'int4' else (np.arange(64) % 32 * 8 - 121) * 0.125
    x[2, ::32] = -127 * 0.125 if kind == 'int8' else -1.5
    found = decode(encode(x, kind))
    np.testing.assert_array_equal(found[[0, 2]], x[[0, 2]])
    np.testing.assert_allclose(found[1], 0.375, rtol=2 ** -11)


@pytest.mark.parametrize(('kind', 'value', 'message'), [
    ('int8', math.nan, 'not a finite number, which int8'), ('int4', -math.inf, 'not a finite number, which int4'),
    ('int8', 9e6, 'magnitude 9e\\+06; int8 reaches 8.319'), ('int4', -7e4, 'magnitude 7e\\+04; int4 reaches 65504')])
def test_what_float16_scales_cannot_reach_is_refused(kind, value, message):
    x = np.ones((4, 32), np.float32)
    x[3, 7] = value
    with pytest.raises(ValueError, match=message):
        encode(x, kind)


@pytest.mark.parametrize(('kind', 'value'), [('int8', 127 * LARGE), ('int4', LARGE), ('int4', -LARGE)])
@pytest.mark.parametrize('search', [False, True])
def test_the_largest_values_are_reached(kind, value, search):
    x = np.zeros((1, 32), np.float32)
    x[0, 5] = value
    np.testing.assert_allclose(decode(encode(x, kind, search=search)), x, atol=abs(value) / 2000)


@given(st.sampled_from([0, 1]), magnitudes, st.lists(elements, min_size=64, max_size=64))
def test_a_scale_that_is_searched_for_is_never_worse(group_axis, magnitude, values):
    """In no group, by the sum of squares; and it stays one of the eight, so that no weight is off by more than half of it."""
    x = (magnitude * np.array(values, np.float64)).astype(np.float32).reshape(2, 32)
    stored = [encode(x if group_axis == 1 else np.ascontiguousarray(x.T), 'int8', group_axis, search) for search in (False, True)]
    found = [decode(s).astype(np.float64) if group_axis == 1 else decode(s).T.astype(np.float64) for s in stored]
    errors = [np.square(f - x).sum(axis=1) for f in found]
    assert (errors[1] <= errors[0] * (1 + 1e-4) + 1e-90).all()  # each is found in float32
    peak, scale = np.abs(x).max(axis=1), stored[1].scale.astype(np.float64).ravel()
    assert (np.abs(found[1] - x).max(axis=1) <= scale * (0.5 + 1e-5)).all()
    assert (scale <= peak / 120 * (1 + 2.0 ** -9) + SMALL).all()


@pytest.mark.parametrize('group_axis', [0, 1])
def test_weights_on_a_grid_are_found_again(group_axis):
    """The largest is 123 steps: rounded plainly nothing fits, with the scale that is searched for all of it."""
    x = (np.random.default_rng(0).integers(-122, 123, (32, 32)) * 0.25).astype(np.float32)
    np.fill_diagonal(x, 123 * 0.25)
    assert np.abs(decode(encode(x, 'int8', group_axis)) - x).max() > 0.05
    np.testing.assert_array_equal(decode(encode(x, 'int8', group_axis, search=True)), x)


def test_shapes_that_do_not_fit_are_refused():
    assert not fits((32,), 'int8', 1) and fits((5,), 'float32', 1) and fits((5, 7), 'bfloat16', 0)
    assert fits((7, 64), 'int8', 1) and not fits((7, 63), 'int8', 1) and not fits((7, 64), 'int8', 0)
    assert fits((64, 7), 'int8', 0) and not fits((64, 7), 'int4', 0) and fits((64, 6), 'int4', 0)
    with pytest.raises(ValueError, match=r'shape \[3, 40\] cannot be int8; expected a matrix whose axis 1 is a multiple of 32'):
        encode(np.zeros((3, 40), np.float32), 'int8')
    with pytest.raises(ValueError, match='and an even number of columns'):
        encode(np.zeros((32, 3), np.float32), 'int4', 0)


@pytest.mark.parametrize('kind', STORED_KINDS)
def test_every_other_kind_can_become_a_kind(kind):
    x = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    for group_axis in (0, 1):
        for other in STORED_KINDS:
            stored = encode(x, other, group_axis)
            again = recode(stored, kind)
            assert (again is stored) == (kind == other) and (again.kind, again.group_axis) == (kind, group_axis)
            assert {n: (p.shape, p.dtype) for n, p in again.parts.items()} == part_shapes((64, 96), kind, group_axis)
            np.testing.assert_array_equal(decode(again), decode(encode(decode(stored), kind, group_axis)))


def test_large_matrices_are_encoded_in_pieces_to_the_same_numbers(monkeypatch):
    x = np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32)
    whole = [encode(x, kind, axis) for kind in ('int8', 'int4') for axis in (0, 1)]
    bits = encode_bfloat16(x)
    monkeypatch.setattr('tpmpi.weights.AT_ONCE', 5)
    np.testing.assert_array_equal(encode(x, 'bfloat16').data, bits)
    for stored in whole:
        again = encode(x, stored.kind, stored.group_axis)
        assert all(np.array_equal(again.parts[name], part) for name, part in stored.parts.items())
        np.testing.assert_array_equal(decode(stored), exact_values(stored))


def test_packing_puts_even_columns_low():
    q = np.array([[1, 2, 3, 15]], np.uint8)
    assert pack_int4(q).tolist() == [[0x21, 0xF3]]
    np.testing.assert_array_equal(unpack_int4(pack_int4(q)), q)


def test_a_mixed_weight_counts_its_parts():
    parts = (Weight(np.zeros(3, np.float32), 'float32'), Weight(np.zeros(5, np.uint16), 'bfloat16'))
    assert Weight(parts, 'mixed').nbytes == 22
