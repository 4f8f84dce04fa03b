"""The best logits of each row, found on the device, and the choice among them, against the reference kernels on the host."""

from __future__ import annotations

import cuda_device
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_threads

from tpmpi.kernels import reference
from tpmpi.kernels.cuda import CHUNK, Kernels
from tpmpi.sampling import Draw, Sampler, SamplingParams, token_logprobs
from tpmpi.sharding import split


@pytest.fixture(scope='module', params=cuda_device.STAND_IN_OR_GPU)
def xp(request):
    with cuda_device.device(request.param) as cupy:
        yield cupy


def logits_with_equal_ones(rows, columns, seed):
    """Multiples of 1/4 from -8 to 8, zeros of both signs among them."""
    x = np.random.default_rng(seed).integers(-32, 33, (rows, columns)) / np.float32(4)
    x[:, ::7] *= -1
    return x.astype(np.float32)


@settings(max_examples=25)
@given(rows=st.integers(1, 3), columns=st.one_of(st.integers(1, 70), st.sampled_from([CHUNK, CHUNK + 1, 2 * CHUNK + 77])),
       count=st.sampled_from([1, 2, 5, 64, CHUNK // 2]), divided=st.booleans(), seed=st.integers(0, 9))
def test_the_best_are_those_of_the_reference_kernels(xp, rows, columns, count, divided, seed):
    ops, x = Kernels(xp), logits_with_equal_ones(rows, columns, seed)
    divisors = np.random.default_rng(seed + 1).uniform(0.1, 3, rows).astype(np.float32) if divided else None
    totals, values, found = ops.best(xp.asarray(x), count, divisors)
    scaled = x if divisors is None else x / divisors[:, None]
    for row in range(rows):
        expected = reference.top_k(scaled[row], count)[1]
        np.testing.assert_array_equal(found[row], expected)
        np.testing.assert_array_equal(values[row], x[row, expected])
    exact = scaled.astype(np.float64)
    np.testing.assert_allclose(totals, np.log(np.exp(exact).sum(axis=1)), rtol=1e-6, atol=1e-5)


def test_more_passes_than_two_and_numbers_that_are_none(xp):
    ops, x = Kernels(xp), logits_with_equal_ones(1, 9 * CHUNK, 3)
    np.testing.assert_array_equal(ops.best(xp.asarray(x), CHUNK // 2)[2][0], reference.top_k(x[0], CHUNK // 2)[1])
    for bad in (np.nan, -np.nan, np.inf):
        x[0, 5000] = bad
        assert not ops.best(xp.asarray(x), 3)[0][0] < np.inf  # which the sampler refuses
    x[0, :] = -np.inf
    x[0, 77] = 2
    totals, values, columns = ops.best(xp.asarray(x), 1)
    assert (totals[0], values[0, 0], columns[0, 0]) == (2, 2, 77)


SOME = [SamplingParams(), SamplingParams(logprobs=3), SamplingParams(temperature=0.7), SamplingParams(repetition_penalty=1.3),
        SamplingParams(temperature=0.8, top_k=5, logprobs=2), SamplingParams(temperature=1.5, top_k=2000),
        SamplingParams(temperature=1.0, top_p=0.9), SamplingParams(temperature=2.0, min_p=0.01, top_p=0.99),
        SamplingParams(temperature=0.5, top_k=3, repetition_penalty=0.8, logprobs=70)]


@pytest.mark.parametrize('chosen', [range(9), range(1), range(4, 7), [3], [0, 1, 0]])
@pytest.mark.parametrize('ranks', [1, 3])
def test_a_choice_is_that_among_logits_on_the_host(xp, chosen, ranks):
    params, columns = [SOME[i] for i in chosen], 2600
    x = logits_with_equal_ones(len(params), columns, 4)

    def choose(ops, place):
        def work(comm):
            vocab = range(*(100 * at for at in (lambda part: (part.start, part.stop))(split(columns // 100, ranks, comm.rank))))
            draws = [Draw(p, 10 + i, [1, 2, 2500]) for i, p in enumerate(params)]
            return Sampler(vocab, columns, ops, comm).choose(place(np.ascontiguousarray(x[:, vocab.start:vocab.stop])), draws)

        return on_threads(ranks, work)[0]

    for found, expected in zip(choose(Kernels(xp), xp.asarray), choose(reference, np.asarray), strict=True):
        assert found.token == expected.token and [t for t, _ in found.top] == [t for t, _ in expected.top]
        np.testing.assert_allclose(found.logprob, expected.logprob, atol=1e-5)
        np.testing.assert_allclose([p for _, p in found.top], [p for _, p in expected.top], atol=1e-5)


@settings(max_examples=30)
@given(columns=st.sampled_from([1, 64, 65, 3000]), spread=st.sampled_from([0.0, 0.5, 4.0]), ranks=st.integers(1, 3),
       temperature=st.sampled_from([0.2, 1, 3]), penalty=st.sampled_from([1.0, 0.6, 1.7]), top_p=st.sampled_from([1.0, 0.8]),
       seed=st.integers(0, 99))
def test_noise_and_penalties_choose_what_they_choose_on_the_host(xp, columns, spread, ranks, temperature, penalty, top_p, seed):
    """Of any logits, equal ones too: the noise then decides among all."""
    rng = np.random.default_rng(seed)
    x = (spread * rng.standard_normal((3, columns))).astype(np.float32)
    params = [SamplingParams(temperature=temperature, repetition_penalty=penalty, top_p=top_p, seed=seed, logprobs=1),
              SamplingParams(temperature=temperature, seed=seed), SamplingParams(repetition_penalty=penalty)]
    draws = [Draw(p, i, rng.integers(0, columns, 40).tolist()) for i, p in enumerate(params)]

    def choose(ops, place):
        def work(comm):
            part = split(columns, ranks, comm.rank)
            return Sampler(part, columns, ops, comm).choose(place(np.ascontiguousarray(x[:, part.start:part.stop])), draws)

        return on_threads(ranks, work)[0]

    for found, expected in zip(choose(Kernels(xp), xp.asarray), choose(reference, np.asarray), strict=True):
        assert found.token == expected.token and [t for t, _ in found.top] == [t for t, _ in expected.top]
        np.testing.assert_allclose(found.logprob, expected.logprob, atol=1e-5)


@pytest.mark.parametrize(('params', 'calls', 'nbytes'), [
    (SamplingParams(), 1, 4 * 4 * 3),  # log-sum-exp, the largest and its column, of 4 rows
    (SamplingParams(temperature=0.5, top_k=7), 2, 2 * 4 * 4 * 15),
    (SamplingParams(temperature=0.5), 2, None),
    (SamplingParams(temperature=2.0), 2, None),
    (SamplingParams(repetition_penalty=1.5), 3, 2 * 4 * 4 * 3 + 4 * 4),
    (SamplingParams(temperature=0.5, repetition_penalty=1.5), 3, None)])
def test_only_candidates_come_to_the_host(xp, params, calls, nbytes):
    if not hasattr(xp, 'fake'):
        pytest.skip('CuPy does not count copies')
    columns, copies = 30_000, xp.fake.device_to_host
    x = xp.asarray(logits_with_equal_ones(4, columns, 5))
    xp.fake.reset()
    on_threads(1, lambda comm: Sampler(range(columns), columns, Kernels(xp), comm).choose(x, [Draw(params, 0, [1])] * 4))
    assert copies.calls == calls
    assert copies.bytes == nbytes if nbytes else copies.bytes < x.nbytes / 20  # those that noise can choose vary in number


@pytest.mark.parametrize('ranks', [1, 2, 3])
def test_log_probabilities_of_given_tokens(xp, ranks):
    x, targets = logits_with_equal_ones(5, 12, 6), np.array([0, 11, 4, 4, 7])
    parts = [range(0, 12), range(12, 12), range(12, 12)] if ranks == 3 else [split(12, ranks, rank) for rank in range(ranks)]

    def work(comm):
        vocab = parts[comm.rank]
        return token_logprobs(xp.asarray(np.ascontiguousarray(x[:, vocab.start:vocab.stop])), vocab, targets, Kernels(xp), comm)

    exact = x.astype(np.float64)
    expected = exact[np.arange(5), targets] - np.log(np.exp(exact).sum(axis=1))
    np.testing.assert_allclose(on_threads(ranks, work)[0], expected, atol=1e-5)
