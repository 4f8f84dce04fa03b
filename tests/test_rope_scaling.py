"""Stretched RoPE against its definitions, pair by pair in plain Python.  (tests/test_families.py compares with transformers.)"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpmpi.formats import rope_scaling

THETAS, DIMS, FACTORS = st.sampled_from([300.0, 1e4, 5e5]), st.sampled_from([2, 6, 16, 128]), st.floats(1, 64)


def turns(theta: float, dim: int, i: int, length: int) -> float:
    """How often pair i goes round in so many positions."""
    return length / (2 * math.pi * theta ** (2 * i / dim))


@given(theta=THETAS, dim=DIMS, factor=FACTORS, original=st.sampled_from([32, 8192]))
def test_llama3_slows_the_pairs_that_turn_seldom(theta, dim, factor, original):
    divisors = rope_scaling.llama3(theta, dim, factor, 1.0, 4.0, original)['rope_divisors']
    for i, divisor in enumerate(divisors):
        count = turns(theta, dim, i, original)
        if count < 1:
            assert divisor == pytest.approx(factor)
        elif count > 4:
            assert divisor == pytest.approx(1)
        else:
            smooth = (count - 1) / 3
            assert 1 / divisor == pytest.approx((1 - smooth) / factor + smooth)


@given(theta=THETAS, dim=DIMS, factor=FACTORS, original=st.sampled_from([32, 4096]))
def test_yarn_keeps_fast_pairs_and_slows_slow_ones(theta, dim, factor, original):
    facts = rope_scaling.yarn(theta, dim, original, factor, original, truncate=False)
    for i, divisor in enumerate(facts['rope_divisors']):
        count = turns(theta, dim, i, original)
        if count > 32.01:
            assert divisor == pytest.approx(1)
        elif count < 0.99:
            assert divisor == pytest.approx(factor)
        assert 1 - 1e-9 <= divisor <= factor + 1e-9
    assert list(facts['rope_divisors']) == sorted(facts['rope_divisors'])
    assert facts['rope_magnitude'] == pytest.approx(1 + 0.1 * math.log(factor))
    assert facts['max_positions'] == max(original, int(original * factor))


def test_yarn_of_qwen():
    """Factor 4 from 32768 positions, theta 1e6, heads of 128: the ramp goes from pair 23 to pair 40."""
    divisors = rope_scaling.yarn(1e6, 128, 32768, 4.0, 32768)['rope_divisors']
    assert divisors[:24] == (1.0,) * 24 and divisors[40:] == (4.0,) * 24
    assert 1 / divisors[30] == pytest.approx(1 - 7 / 17 * 0.75)


@pytest.mark.parametrize(('far', 'farther'), [
    ({'beta_slow': 1e-30}, {'beta_slow': 1e-320}), ({'beta_fast': 1e30}, {'beta_fast': 1e308})])
@pytest.mark.parametrize('truncate', [True, False])
def test_yarn_with_a_ramp_that_ends_beyond_all_pairs(far, farther, truncate):
    """How far beyond makes no difference, though a quotient of such numbers is no float64."""
    assert rope_scaling.yarn(1e4, 16, 4096, 4.0, 4096, truncate=truncate, **farther) == rope_scaling.yarn(
        1e4, 16, 4096, 4.0, 4096, truncate=truncate, **far)


def test_linear_and_dynamic():
    assert rope_scaling.linear(6, 128, 4.0) == {'rope_divisors': (4.0,) * 3, 'max_positions': 512}
    assert rope_scaling.dynamic(128, 4.0) == {
        'rope_dynamic_factor': 4.0, 'rope_original_positions': 128, 'max_positions': 512}


def test_longrope():
    facts = rope_scaling.longrope(131072, 4096, [1.0, 1.5], [2, 60])
    assert facts['rope_divisors'] == (1.0, 1.5) and facts['rope_long_divisors'] == (2.0, 60.0)
    assert facts['rope_magnitude'] == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))  # Phi-3's 1.1902
    assert rope_scaling.longrope(4096, 4096, [1.0], [2.0])['rope_magnitude'] == 1.0
    assert rope_scaling.longrope(8192, 4096, [1.0], [2.0], magnitude=1.3)['rope_magnitude'] == 1.3


def test_frequencies():
    np.testing.assert_allclose(rope_scaling.frequencies(1e4, 4), [1, 0.01])
