"""Sampling over shards is exact: against the whole distribution on one list, with the filters written out by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_threads

from tpmpi.candidates import LEAST, MOST, gumbel_noise
from tpmpi.config import ConfigError
from tpmpi.kernels import reference as ops
from tpmpi.sampling import Draw, Sampler, SamplingParams, token_logprobs
from tpmpi.sharding import split


def vocab_of(size, ranks, rank):
    """Shards in blocks of 4 ids, so that small vocabularies spread."""
    blocks = split(-(-size // 4), ranks, rank)
    return range(min(4 * blocks.start, size), min(4 * blocks.stop, size))


def choose(logits, params, ranks, history=(), request=0):
    """One choice by `ranks` ranks; rank 0's answer."""
    logits = np.asarray(logits, np.float32)

    def work(comm):
        vocab = vocab_of(len(logits), ranks, comm.rank)
        sampler = Sampler(vocab, len(logits), ops, comm)
        return sampler.choose(logits[None, vocab.start:vocab.stop], [Draw(params, request, list(history))])

    return on_threads(ranks, work)[0][0]


def allowed_by_hand(logits, params, history):
    """Ids that remain after penalty, temperature, top-k, top-p, min-p, with probabilities: transformers' rules in a loop."""
    scores = [float(x) for x in logits]
    for i in set(history):
        scores[i] = scores[i] / params.repetition_penalty if scores[i] > 0 else scores[i] * params.repetition_penalty
    scores = [x / params.temperature for x in scores]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if params.top_k:
        order = order[:params.top_k]
    p = {i: math.exp(scores[i] - scores[order[0]]) for i in order}
    total = sum(p.values())
    kept, mass = [], 0.0
    for i in order:
        if mass / total >= params.top_p:
            break
        kept.append(i)
        mass += p[i]
    kept = [i for i in kept if p[i] >= params.min_p * p[order[0]]]
    total = sum(p[i] for i in kept)
    return {i: p[i] / total for i in kept}


logit_lists = st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=60)


@settings(max_examples=100)
@given(logits=logit_lists, ranks=st.integers(1, 5), seed=st.integers(0, 5), temperature=st.sampled_from([0.5, 1.0, 2.0]),
       top_k=st.sampled_from([0, 1, 3, 50]), top_p=st.sampled_from([1.0, 0.9, 0.3]), min_p=st.sampled_from([0.0, 0.05, 0.5]),
       penalty=st.sampled_from([1.0, 1.3]), data=st.data())
def test_the_choice_is_the_gumbel_argmax_of_what_the_filters_leave(logits, ranks, seed, temperature, top_k, top_p, min_p,
                                                                   penalty, data):
    history = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=5))
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty, seed=seed)
    kept = allowed_by_hand(logits, params, history)
    noise = gumbel_noise(seed, 3, len(history), range(len(logits)))
    best = max(kept, key=lambda i: math.log(kept[i]) + noise[i])
    choice = choose(logits, params, ranks, history, request=3)
    gap = math.log(kept[best]) + noise[best] - (math.log(kept.get(choice.token, 1e-300)) + noise[choice.token])
    borderline = choice.token not in kept and any(abs(mass - top_p) < 1e-5 for mass in np.cumsum(list(kept.values())))
    assert gap < 1e-4 or borderline
    exact = logits[choice.token] - math.log(sum(math.exp(x) for x in logits))
    assert choice.logprob == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize('params', [
    {'temperature': 1.0}, {'temperature': 0.7, 'top_k': 5}, {'temperature': 1.3, 'top_p': 0.8},
    {'temperature': 1.0, 'min_p': 0.1}])
def test_frequencies_are_the_distribution(params):
    """2,000 draws on 3 ranks; the chi-squared statistic stays under its 1e-6 quantile."""
    logits = np.random.default_rng(2).normal(0, 1.5, 24).astype(np.float32)
    kept = allowed_by_hand(logits, SamplingParams(**params), ())
    draws = 2000

    def work(comm):
        vocab = vocab_of(24, 3, comm.rank)
        sampler = Sampler(vocab, 24, ops, comm)
        wanted = [Draw(SamplingParams(seed=9, **params), request, []) for request in range(draws)]
        choices = sampler.choose(np.tile(logits[vocab.start:vocab.stop], (draws, 1)), wanted)
        return [choice.token for choice in choices or ()]

    counts = np.bincount(on_threads(3, work)[0], minlength=24)
    assert {i for i in range(24) if counts[i]} <= set(kept)
    chi2 = sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in kept.items())
    freedom = len(kept) - 1
    assert chi2 < freedom + 7 * math.sqrt(2 * freedom) + 20


@pytest.mark.parametrize('params', [
    {}, {'temperature': 1.0}, {'temperature': 1.0, 'top_k': 40}, {'temperature': 2.0, 'top_p': 0.99},
    {'temperature': 3.0, 'min_p': 0.001}, {'repetition_penalty': 1.5}])
def test_any_number_of_ranks_chooses_the_same(params):
    """A flat distribution over 5,000 ids, so that the nucleus needs several rounds of candidates."""
    logits = np.random.default_rng(0).normal(0, 1, 5000).astype(np.float32)
    chosen = {choose(logits, SamplingParams(seed=4, **params), ranks, [7, 8]).token for ranks in (1, 2, 3, 7)}
    assert len(chosen) == 1


def test_a_nucleus_larger_than_the_first_candidates_is_whole():
    """With equal logits and top-p 0.995 all but 0.5 % of 4,000 ids must be reachable."""
    params = [SamplingParams(temperature=1.0, top_p=0.995, seed=s) for s in range(300)]
    tokens = {choose(np.zeros(4000), p, 2).token for p in params}
    assert len(tokens) > 250 and max(tokens) > 3500


def test_equal_logits_go_to_the_lower_id():
    assert choose([1, 3, 3, 0, 3, 3, 3, 3, 3], SamplingParams(), 2).token == 1


@pytest.mark.parametrize('ranks', [1, 3])
def test_alternatives_are_the_model_s_own_log_probabilities(ranks):
    logits = np.random.default_rng(1).normal(0, 3, 50).astype(np.float32)
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    choice = choose(logits, SamplingParams(temperature=0.5, top_k=3, repetition_penalty=2.0, logprobs=6), ranks, [1, 2, 3])
    order = sorted(range(50), key=lambda i: -logits[i])[:6]
    assert [i for i, _ in choice.top] == order
    np.testing.assert_allclose([p for _, p in choice.top], exact[order], atol=1e-5)
    assert choice.logprob == pytest.approx(exact[choice.token], abs=1e-5)


def test_the_prompt_s_log_probabilities():
    logits = np.random.default_rng(1).normal(0, 3, (6, 30)).astype(np.float32)
    targets = np.array([0, 29, 7, 7, 15, 3])
    exact = logits[range(6), targets] - np.log(np.exp(logits.astype(np.float64)).sum(1))

    def work(comm):
        vocab = vocab_of(30, comm.size, comm.rank)
        return token_logprobs(logits[:, vocab.start:vocab.stop], vocab, targets, ops, comm)

    for ranks in (1, 2, 9):
        np.testing.assert_allclose(on_threads(ranks, work)[0], exact, atol=1e-5)


@given(start=st.integers(0, 300), count=st.integers(0, 50), seed=st.integers(0, 2 ** 64 - 1))
def test_noise_depends_on_the_id_alone(start, count, seed):
    whole = gumbel_noise(seed, 5, 11, range(400))
    np.testing.assert_array_equal(gumbel_noise(seed, 5, 11, range(start, start + count)), whole[start:start + count])


def test_noise_is_gumbel():
    noise = np.sort(gumbel_noise(1, 2, 3, range(100000)))
    uniform = np.exp(-np.exp(-noise))
    assert np.abs(uniform - (np.arange(100000) + 0.5) / 100000).max() < 0.006  # Kolmogorov-Smirnov, 1e-3 of its tail


@pytest.mark.parametrize(('change', 'message'), [
    ({'temperature': -1}, 'temperature is -1'), ({'temperature': math.nan}, 'temperature'), ({'top_p': 0}, 'top_p is 0'),
    ({'top_p': 1.5}, 'top_p'), ({'min_p': 2}, 'min_p'), ({'top_k': -1}, 'top_k'), ({'max_new_tokens': -1}, 'max_new_tokens'),
    ({'repetition_penalty': 0}, 'repetition_penalty'), ({'seed': -1}, 'seed'), ({'stop': ('',)}, 'stop is empty'),
    ({'logprobs': -2}, 'logprobs'), ({'stop': ''}, 'stop is empty'),
    *(({name: value}, f'{name} is .*0.000001.*1,000,000') for name in ('temperature', 'repetition_penalty')
      for value in (5e-324, 1e-300, 9e-7, 1.1e6, 1e300, math.inf)),
    ({'stop': ['x'] * 1001}, 'stop holds 1,001 texts; expected at most 1,000')])
def test_values_out_of_range_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**change)


@pytest.mark.parametrize(('change', 'message'), [
    *(({name: value}, f'{name} is {value}') for name in ('max_new_tokens', 'top_k', 'seed', 'logprobs') for value in (2.5, True)),
    *(({name: True}, f'{name} is True') for name in ('temperature', 'top_p', 'min_p', 'repetition_penalty')),
    ({'top_k': '5'}, "top_k is '5'"), ({'temperature': '1'}, "temperature is '1'"),
    *(({name: value}, f'{name} is {value!r}; expected True or False')
      for name in ('prompt_logprobs', 'ignore_eos', 'embedding') for value in (1, 'no', None)),
    ({'stop': 5}, 'stop is 5'), ({'stop': ['a', 5]}, "stop is .'a', 5."), ({'stop': b'ab'}, "stop is b'ab'")])
def test_values_of_a_wrong_kind_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**change)


@pytest.mark.parametrize(('name', 'given', 'kept'), [
    ('max_new_tokens', np.int32(7), 7), ('top_k', np.uint8(3), 3), ('seed', np.uint64(2**64 - 1), 2**64 - 1),
    ('logprobs', np.int64(2), 2), ('temperature', np.float32(0.5), 0.5), ('temperature', 0, 0.0),
    ('repetition_penalty', int(MOST), MOST), ('top_p', Fraction(1, 2), 0.5), ('min_p', np.float16(0.25), 0.25),
    ('stop', 'said', ('said',)), ('stop', None, ()), ('stop', ['a', 'bc'], ('a', 'bc')), ('stop', iter('ab'), ('a', 'b'))])
def test_values_of_a_like_kind_are_those_of_python(name, given, kept):
    found = getattr(SamplingParams(**{name: given}), name)
    assert found == kept and type(found) is type(kept)


@pytest.mark.parametrize('temperature', [0.0, LEAST, 1.0, MOST])
@pytest.mark.parametrize('penalty', [LEAST, 1.0, MOST])
@pytest.mark.parametrize('filters', [{}, {'top_k': 5}, {'top_p': 0.9}, {'min_p': 0.1}])
def test_at_the_ends_of_the_ranges_large_logits_stay_numbers(temperature, penalty, filters):
    """float32 neither overflows nor warns, and where the best stands out it is chosen."""
    logits, history = np.linspace(-1e4, 1e4, 40, dtype=np.float32), range(0, 40, 3)
    params = SamplingParams(temperature=temperature, repetition_penalty=penalty, logprobs=3, **filters)
    choice = choose(logits, params, 2, history)
    scores = [float(x) * (1 if i not in history else 1 / penalty if x > 0 else penalty) for i, x in enumerate(logits)]
    if temperature < 1 or (penalty < 1 and temperature == 1):
        assert choice.token == np.argmax(scores)
    assert math.isfinite(choice.logprob) and [token for token, _ in choice.top] == [39, 38, 37]


@settings(max_examples=40)
@given(data=st.data(), ranks=st.integers(1, 3))
def test_many_rows_at_once_are_each_row_alone(data, ranks):
    logits = np.random.default_rng(data.draw(st.integers(0, 9))).normal(0, 2, (6, 700)).astype(np.float32)
    kinds = [{}, {'temperature': 1.0}, {'temperature': 4.0, 'top_p': 0.97}, {'temperature': 0.7, 'top_k': 5, 'logprobs': 3},
             {'temperature': 3.0, 'min_p': 0.01}, {'repetition_penalty': 1.4, 'logprobs': 2}]
    draws = [Draw(SamplingParams(seed=i, **kind), 10 + i, [i] * i) for i, kind in enumerate(data.draw(st.permutations(kinds)))]

    def work(comm):
        vocab = vocab_of(700, ranks, comm.rank)
        return Sampler(vocab, 700, ops, comm).choose(logits[:, vocab.start:vocab.stop], draws)

    together = on_threads(ranks, work)[0]
    assert together == [choose(row, draw.params, ranks, draw.history, draw.request)
                        for row, draw in zip(logits, draws, strict=True)]


@settings(max_examples=60)
@given(rows=st.integers(1, 5), size=st.integers(1, 60), ranks=st.integers(1, 4), data=st.data())
def test_the_short_way_for_the_most_probable_tokens_is_the_long_one(rows, size, ranks, data):
    """Few different values, so that there are ties; one request that asks for more sends all the long way."""
    logits = np.array(data.draw(st.lists(st.integers(-2, 2), min_size=rows * size, max_size=rows * size)), np.float32)
    logits = logits.reshape(rows, size)

    def work(comm, logprobs):
        vocab = vocab_of(size, ranks, comm.rank)
        draws = [Draw(SamplingParams(logprobs=logprobs), 0, [])] * rows
        return Sampler(vocab, size, ops, comm).choose(logits[:, vocab.start:vocab.stop], draws)

    short, long = (on_threads(ranks, lambda comm: work(comm, logprobs))[0] for logprobs in (0, 1))  # noqa: B023
    assert [c.token for c in short] == [c.token for c in long] == logits.argmax(axis=1).tolist()
    assert [c.logprob for c in short] == pytest.approx([c.logprob for c in long])


def test_logits_that_are_not_numbers_are_an_error():
    with pytest.raises(ArithmeticError, match='not finite'):
        choose([1.0, math.nan], SamplingParams(), 1)
