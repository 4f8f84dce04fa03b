"""bfloat16 against its definition: the nearest number with 8 significant bits, ties to the even one."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpmpi.weights import decode, decode_bfloat16, encode, encode_bfloat16

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
    assert encode(x, 'float32') is x and decode(x, 'float32') is x
    with pytest.raises(ValueError, match='float8'):
        encode(x, 'float8')
