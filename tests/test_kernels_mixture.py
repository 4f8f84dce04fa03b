"""The compiled kernels of a mixture of experts against the reference kernels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import ready

pytest.importorskip('numba', reason='Numba is not installed: pip install numba')

from tpmpi.config import ModelConfig
from tpmpi.kernels import cpu, reference
from tpmpi.weights import WEIGHT_KINDS, decode, encode

ops = cpu.Kernels()
CONFIG = ModelConfig(64, 64, 1, 1, 1, 64, 64, 9, num_experts=4, experts_per_token=2, expert_ffn_size=64)


@pytest.fixture(scope='module', autouse=True)
def built():
    ready(ops, ops.needed(CONFIG, WEIGHT_KINDS, 'float32'))


@settings(max_examples=60)
@given(tokens=st.integers(1, 9), count=st.integers(1, 7), more=st.integers(0, 60), normalize=st.booleans(), ties=st.booleans(),
       seed=st.integers(0, 99))
def test_routes_are_those_of_the_reference_kernels(tokens, count, more, normalize, ties, seed):
    rng = np.random.default_rng(seed)
    scores = (5 * rng.standard_normal((tokens, count + more))).astype(np.float32)
    scores = np.round(scores / 4) if ties else scores
    found, expected = (kernels.route(scores, count, normalize) for kernels in (ops, reference))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=2e-6)


def test_a_token_that_is_not_a_number_goes_to_experts_that_exist():
    choice, shares = ops.route(np.full((2, 5), np.nan, np.float32), 3, True)
    assert choice.tolist() == [[0, 1, 2]] * 2 and np.isnan(shares).all()


def mixture_of(rng, kernels, count, hidden, ffn, kinds):
    """W^C and W^D of some experts, packed by each of the kernel sets."""
    found = []
    for kind, rows, axis in ((kinds[0], 2 * ffn, 1), (kinds[1], ffn, 0)):
        stored = [encode(rng.standard_normal((rows, hidden)).astype(np.float32), kind, axis) for _ in range(count)]
        packed = [k.new_experts(count, rows, hidden, axis == 0, kind, 'W') for k in kernels]
        for k, whole in zip(kernels, packed, strict=True):
            for i, matrix in enumerate(stored):
                k.fill(k.expert(whole, i), 0, matrix)
        found.append(packed)
    return tuple(zip(*found, strict=True))


@settings(max_examples=100)
@given(kinds=st.tuples(st.sampled_from(WEIGHT_KINDS), st.sampled_from(WEIGHT_KINDS)), count=st.integers(1, 6),
       each=st.integers(1, 3), hidden=st.integers(1, 3), ffn=st.integers(0, 3), odd=st.booleans(), tokens=st.integers(1, 40),
       together=st.sampled_from([1, 9, 1024]), rounded=st.booleans(), seed=st.integers(0, 9))
def test_experts_are_those_of_the_reference_kernels(kinds, count, each, hidden, ffn, odd, tokens, together, rounded, seed):
    rng, odd, kernels = np.random.default_rng(seed), odd and not {'int8', 'int4'} & set(kinds), ops
    hidden, ffn, each = 32 * hidden - 5 * odd, 32 * ffn + 3 * odd, min(each, count)
    (up, down), theirs = mixture_of(rng, (ops, reference), count, hidden, ffn, kinds)
    a, scores = (rng.standard_normal((tokens, n)).astype(np.float32) for n in (hidden, count))
    choice, shares = ops.route(scores, each, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, 'ROWS_TOGETHER', together)
        if rounded:
            kernels = cpu.Kernels(activations='bfloat16')
        e = kernels.experts(a, choice, shares, up, down, 'silu')
    if rounded and kinds[0] == 'bfloat16':  # what is left is the rounding of D
        a = decode(encode(a, 'bfloat16'))
    expected = reference.experts(a, choice, shares, *theirs, 'silu')
    assert e.shape == expected.shape and e.flags.c_contiguous
    np.testing.assert_allclose(e, expected, atol=(2e-2 if rounded else 2e-4) * np.abs(expected).max(initial=1))


@pytest.mark.parametrize('kind', WEIGHT_KINDS)
def test_experts_of_a_token_give_the_same_bits_with_any_number_of_others(kind, monkeypatch):
    rng = np.random.default_rng(7)
    [(up, down)] = mixture_of(rng, (ops,), 5, 96, 160, (kind, kind))
    a, scores = (rng.standard_normal((43, n)).astype(np.float32) for n in (96, 5))
    choice, shares = ops.route(scores, 3, False)
    whole = ops.experts(a, choice, shares, up, down, 'gelu_tanh')
    for tokens in (1, 2, 5, 7):  # below what the matrix units take
        few = ops.experts(a[:tokens].copy(), choice[:tokens].copy(), shares[:tokens].copy(), up, down, 'gelu_tanh')
        if kind not in ops.units:
            np.testing.assert_array_equal(few, whole[:tokens])
        alone = [ops.experts(*(part[i:i + 1].copy() for part in (a, choice, shares)), up, down, 'gelu_tanh')
                 for i in range(tokens)]
        np.testing.assert_array_equal(few, np.concatenate(alone))
    monkeypatch.setattr(cpu, 'ROWS_TOGETHER', 11)
    np.testing.assert_array_equal(ops.experts(a, choice, shares, up, down, 'gelu_tanh'), whole)


@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_experts_of_activations_of_8_bits(kind, monkeypatch):
    """All experts in one pass give the bits of one product after another, and nearly the numbers of the reference kernels."""
    coarse, rng = cpu.Kernels(activations='int8'), np.random.default_rng(8)
    ready(coarse, [*coarse.needed(CONFIG, [kind], 'float32')])
    (up, down), theirs = mixture_of(rng, (coarse, reference), 4, 96, 64, (kind, kind))
    a, scores = (rng.standard_normal((21, n)).astype(np.float32) for n in (96, 4))
    choice, shares = coarse.route(scores, 2, True)
    together = coarse.experts(a, choice, shares, up, down, 'silu')
    monkeypatch.setattr(cpu, 'ROWS_TOGETHER', 1)
    np.testing.assert_array_equal(coarse.experts(a, choice, shares, up, down, 'silu'), together)
    expected = reference.experts(a, choice, shares, *theirs, 'silu')
    size = np.abs(expected).max()
    assert 1e-4 * size < np.abs(together - expected).max() < 3e-2 * size
