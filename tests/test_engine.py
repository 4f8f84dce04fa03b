"""Generation: a cached step equals recomputing all, a full ring is a sliding window, chunks do not show."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_threads

from tpmpi.batch import longest
from tpmpi.checkpoint import CheckpointReader, CheckpointWriter, TokenizerData
from tpmpi.config import ConfigError, RunConfig
from tpmpi.device import Device
from tpmpi.engine import Engine
from tpmpi.kernels import reference as ops
from tpmpi.kv_cache import rings_blocks
from tpmpi.model_shard import load_model
from tpmpi.sampling import SamplingParams
from tpmpi.sharding import shard
from tpmpi.text_stream import StopText
from tpmpi.tokenizer import Tokenizer
from tpmpi.weights import encode

PROMPT = [72, 101, 108, 108, 111, 33, 200, 7, 7, 19]


def engine_on(comm, path, run, eos=()):
    with CheckpointReader(path) as reader:
        model = load_model(reader, shard(reader.config, comm.rank, comm.size), ops, context=run.context, sinks=run.sinks)
        tokenizer = Tokenizer(reader.tokenizer.tokenizer_json, None, None, eos) if comm.rank == 0 else None
    return Engine(model, tokenizer, Device('cpu', np), ops, comm, run)


def generate(path, prompt, params, ranks=1, eos=(), **run):
    """The finished request on every rank."""
    def work(comm):
        engine = engine_on(comm, path, RunConfig(**run), eos)
        return engine.generate(engine.request(prompt, params))
    return on_threads(ranks, work)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def check_against_recomputing(request, tensors, config, window=None, atol=1e-4):
    """Every generated token's log-probability against the whole sequence computed anew in float64."""
    tokens = request.prompt_tokens + request.tokens
    exact = log_softmax(tiny.oracle_logits(tensors, config, tokens, window))
    for i, choice in enumerate(request.choices):
        row = exact[len(request.prompt_tokens) + i - 1]
        assert choice.token == request.tokens[i]
        assert choice.logprob == pytest.approx(row[choice.token], abs=atol)
        assert row[choice.token] >= row.max() - atol
        assert [p for _, p in choice.top] == pytest.approx(sorted(row, reverse=True)[:len(choice.top)], abs=atol)


@pytest.mark.parametrize('ranks', [1, 2, 5])
@pytest.mark.parametrize('name', ['nine_heads', 'literal', 'parallel', 'post_norm', 'capped', 'biased', 'experts'])
def test_a_cached_step_equals_recomputing_all(models, name, ranks):
    path, config, tensors = models[name]
    results = generate(path, PROMPT, SamplingParams(max_new_tokens=30, logprobs=5), ranks)
    check_against_recomputing(results[0], tensors, config)
    assert all(r.tokens == results[0].tokens and (r.text == '') == (r is not results[0]) for r in results)
    assert results[0].finish_reason == 'length' and len(results[0].tokens) == 30


@pytest.mark.parametrize(('context', 'chunk', 'block', 'length'), [
    (7, 4, 4, 10), (7, 512, 4, 10), (1, 3, 2, 10), (16, 5, 16, 61), (5, 5, 1, 61), (9, 64, 8, 61)])
def test_beyond_its_capacity_a_ring_is_a_sliding_window(models, context, chunk, block, length):
    """Prompts longer than a chunk and longer than the ring, and generation that wraps several times."""
    path, config, tensors = models['nine_heads']
    prompt = np.random.default_rng(length).integers(0, 256, length).tolist()
    params = SamplingParams(max_new_tokens=40, logprobs=3, prompt_logprobs=True)
    request = generate(path, prompt, params, ranks=2, context=context, chunk=chunk, block=block)[0]
    check_against_recomputing(request, tensors, config, window=context)
    exact = log_softmax(tiny.oracle_logits(tensors, config, prompt, context))
    np.testing.assert_allclose(request.prompt_logprobs, [exact[i, t] for i, t in enumerate(prompt[1:])], atol=1e-4)


@pytest.mark.parametrize(('context', 'sinks', 'chunk', 'block', 'length'), [
    (7, 1, 4, 4, 10), (7, 5, 3, 4, 10), (5, 4, 512, 4, 30), (6, 9, 5, 2, 41), (16, 4, 8, 64, 41)])
def test_the_first_tokens_stay_visible_when_a_ring_rolls(models, context, sinks, chunk, block, length):
    path, config, tensors = models['nine_heads']
    prompt = np.random.default_rng(length).integers(0, 256, length).tolist()
    params = SamplingParams(max_new_tokens=40, logprobs=3, prompt_logprobs=True)
    request = generate(path, prompt, params, ranks=2, context=context, sinks=sinks, chunk=chunk, block=block)[0]
    tokens = prompt + request.tokens
    exact = log_softmax(tiny.oracle_logits(tensors, config, tokens, context, sinks))
    found = request.prompt_logprobs + [choice.logprob for choice in request.choices]
    np.testing.assert_allclose(found, [exact[i, t] for i, t in enumerate(tokens[1:])], atol=1e-4)
    without = log_softmax(tiny.oracle_logits(tensors, config, tokens, context))
    assert np.abs(without[-2] - exact[-2]).max() > 1e-3, 'the first tokens matter'


@pytest.fixture(scope='module')
def by_length(tmp_path_factory):
    """Models whose RoPE depends on the length of the text: {name: (path, config, whole tensors)}."""
    folder = tmp_path_factory.mktemp('by_length')
    configs = {'longrope': tiny.LONG_ROPE, 'dynamic': tiny.DYNAMIC}
    paths = {name: folder / f'{name}.h5' for name in configs}
    return {name: (paths[name], config, tiny.write_model(paths[name], config)) for name, config in configs.items()}


def check_by_length(request, name, config, tensors):
    """As transformers: all anew once a text is long for LongRoPE; with dynamic scaling each key as long as its text was."""
    prompt = len(request.prompt_tokens)
    for i, choice in enumerate(request.choices):
        tokens = request.prompt_tokens + request.tokens[:i]
        lengths = [max(prompt, p + 1) for p in range(len(tokens))] if name == 'dynamic' else None
        exact = log_softmax(tiny.oracle_logits(tensors, config, tokens, lengths=lengths)[-1])
        assert choice.logprob == pytest.approx(exact[choice.token], abs=1e-4), (i, len(tokens))
        assert exact[choice.token] >= exact.max() - 1e-4


@pytest.mark.parametrize('name', ['longrope', 'dynamic'])
@pytest.mark.parametrize('length', [5, 23, 24, 25, 40])
def test_rope_that_depends_on_the_length_of_the_text(by_length, name, length):
    """24 positions are the length from which on it does."""
    path, config, tensors = by_length[name]
    prompt = np.random.default_rng(length).integers(0, 256, length).tolist()
    params = SamplingParams(max_new_tokens=26, logprobs=1)
    first, other = generate(path, prompt, params, ranks=2, chunk=16, block=4)
    check_by_length(first, name, config, tensors)
    assert other.tokens == first.tokens  # a script on another rank may go on from them
    assert (first.timing.prefill_tokens, first.timing.decode_tokens) == (length, 25)


@pytest.mark.parametrize('name', ['longrope', 'dynamic'])
def test_a_prompt_is_scored_as_it_was_computed_first(by_length, name):
    """Not once more, in another way, when the text has outgrown the original length."""
    path, prompt = by_length[name][0], np.random.default_rng(0).integers(0, 256, 20).tolist()
    short, long = (generate(path, prompt, SamplingParams(max_new_tokens=new, ignore_eos=True, prompt_logprobs=True), chunk=16,
                            block=4)[0] for new in (2, 20))
    assert len(short.prompt_logprobs) == 19 and long.prompt_logprobs == short.prompt_logprobs


@pytest.mark.parametrize('name', ['longrope', 'dynamic'])
def test_many_requests_whose_rope_depends_on_their_length(by_length, name):
    path, config, tensors = by_length[name]
    rng = np.random.default_rng(2)
    common = rng.integers(0, 256, 9).tolist()
    prompts = [(common if i % 2 else []) + rng.integers(0, 256, 2 + 2 * i).tolist() for i in range(8)]
    requests = [(p, SamplingParams(max_new_tokens=3 + i, logprobs=1)) for i, p in enumerate(prompts)]
    done, scheduler = run_many(path, requests, 2, 30, 5, {'chunk': 16, 'block': 4}, arrivals=[2 * i for i in range(8)])
    assert scheduler.shared_tokens
    for request in done:
        check_by_length(request, name, config, tensors)


@pytest.mark.parametrize('chunk', [1, 2, 3, 7, 40, 41, 100])
def test_any_chunk_size_gives_the_same(models, chunk):
    path, config, tensors = models['nine_heads']
    prompt = np.random.default_rng(3).integers(0, 256, 41).tolist()
    params = SamplingParams(max_new_tokens=5, logprobs=4, prompt_logprobs=True)
    check_against_recomputing(generate(path, prompt, params, chunk=chunk)[0], tensors, config)


def test_a_bfloat16_cache_is_near_and_half_as_large(models):
    path, config, tensors = models['nine_heads']
    request = generate(path, PROMPT, SamplingParams(max_new_tokens=20, logprobs=1), ranks=2, kv_dtype='bfloat16')[0]
    tokens = request.prompt_tokens + request.tokens
    exact = log_softmax(tiny.oracle_logits(tensors, config, tokens))
    for i, choice in enumerate(request.choices):
        assert choice.logprob == pytest.approx(exact[len(PROMPT) + i - 1][choice.token], abs=0.05)


def test_scoring_generates_nothing(models):
    path, config, tensors = models['nine_heads']
    for ranks in (1, 3):
        results = generate(path, PROMPT, SamplingParams(max_new_tokens=0, prompt_logprobs=True), ranks, chunk=4)
        exact = log_softmax(tiny.oracle_logits(tensors, config, PROMPT))
        np.testing.assert_allclose(results[0].prompt_logprobs, [exact[i, t] for i, t in enumerate(PROMPT[1:])], atol=1e-5)
        assert (results[0].tokens, results[0].text, results[0].finish_reason) == ([], '', 'length')
    assert generate(path, [5], SamplingParams(max_new_tokens=0, prompt_logprobs=True))[0].prompt_logprobs == []


def test_generation_ends_at_an_end_token_unless_told_to_go_on(models):
    path = models['nine_heads'][0]
    free = generate(path, PROMPT, SamplingParams(max_new_tokens=12))[0].tokens
    end = free[4]
    first = free.index(end)
    request = generate(path, PROMPT, SamplingParams(max_new_tokens=12), ranks=2, eos=(end,))[0]
    assert request.tokens == free[:first + 1] and request.finish_reason == 'stop'
    assert generate(path, PROMPT, SamplingParams(max_new_tokens=12, ignore_eos=True), eos=(end,))[0].tokens == free


def test_all_ranks_stop_when_rank_0_is_told_to(models):
    path = models['nine_heads'][0]

    def work(comm):
        engine, pieces = engine_on(comm, path, RunConfig()), []
        request = engine.request(PROMPT, SamplingParams(max_new_tokens=50))
        pieces.extend(engine.stream(request, lambda: comm.rank == 0 and len(request.tokens) >= 3))
        return request

    for request in on_threads(3, work):
        assert len(request.tokens) == 4 and request.finish_reason == 'cancelled'


@pytest.mark.parametrize('ranks', [1, 3])
@pytest.mark.parametrize('pieces', [1, 4, 6])
def test_a_stream_that_is_left_early_leaves_the_engine_as_it_was(models, ranks, pieces):
    """Rank 0 breaks out of its loop; those of the others have nothing to break out of.  The next one needs a larger cache."""
    path = models['nine_heads'][0]
    params = SamplingParams(max_new_tokens=6, ignore_eos=True), SamplingParams(max_new_tokens=90, ignore_eos=True)

    def work(comm):
        engine, seen = engine_on(comm, path, RunConfig(block=16)), 0
        for _ in engine.stream(engine.request(PROMPT, params[0])):
            seen += 1
            if seen == pieces:
                break
        return [engine.generate(engine.request(PROMPT[3:], p)).tokens for p in params]

    alone = [generate(path, PROMPT[3:], p)[0].tokens for p in params]
    assert on_threads(ranks, work) == [alone] * ranks


def test_a_second_stream_is_refused_while_one_is_open(models):
    def work(comm):
        engine = engine_on(comm, models['nine_heads'][0], RunConfig())
        first = engine.stream(engine.request(PROMPT, SamplingParams(max_new_tokens=9)))
        next(first)
        with pytest.raises(ConfigError, match='another stream is open'):
            engine.generate(engine.request(PROMPT, SamplingParams(max_new_tokens=2)))
        first.close()
        with pytest.raises(ConfigError, match='this request has run'):
            engine.generate(engine.generate(engine.request(PROMPT, SamplingParams(max_new_tokens=2))))
        return engine.generate(engine.request(PROMPT, SamplingParams(max_new_tokens=2))).finish_reason

    assert on_threads(1, work) == ['length']


@pytest.mark.parametrize('asked', [{'prompt_logprobs': True}, {'embedding': True}, {'max_new_tokens': 1}])
def test_numbers_that_are_not_finite_are_an_error(tmp_path, asked):
    """Weights that overflow float32; after that the ranks are out of step, and no further request is tried."""
    config = tiny.CONFIGS['nine_heads']
    tensors = tiny.random_tensors(config)
    tensors['final_norm'][:] = np.float32(3e38)
    with CheckpointWriter(tmp_path / 'm.h5', config, dict.fromkeys(tensors, 'float32'),
                          TokenizerData(tiny.byte_tokenizer(), None, None, ()), {}) as writer:
        for name, x in tensors.items():
            writer.write(name, encode(x * np.float32(10) if name == 'head' else x, 'float32', writer.specs[name].group_axis))

    def work(comm):
        engine = engine_on(comm, tmp_path / 'm.h5', RunConfig())
        with pytest.raises(ArithmeticError, match='not finite'), np.errstate(all='ignore'):
            engine.generate(engine.request(PROMPT, SamplingParams(**{'max_new_tokens': 0} | asked)))
        engine.failed = True  # as where there are several ranks
        with pytest.raises(ConfigError, match='an earlier request has failed'):
            engine.request(PROMPT, SamplingParams())

    on_threads(1, work)


def test_an_embedding_is_all_that_is_kept(models):
    engine_of = lambda comm: engine_on(comm, models['nine_heads'][0], RunConfig())  # noqa: E731
    request, = on_threads(1, lambda comm: (e := engine_of(comm)).generate(
        e.request(PROMPT, SamplingParams(max_new_tokens=0, embedding=True))))
    assert request.embedding.base is None


def test_a_conversation_that_grows_keeps_its_beginnings(models):
    def work(comm):
        engine, text = engine_on(comm, models['nine_heads'][0], RunConfig(chunk=16, block=4)), PROMPT
        shared = []
        for _ in range(6):
            text = text + engine.generate(engine.request(text, SamplingParams(max_new_tokens=8, ignore_eos=True))).tokens
            shared.append(engine.scheduler.shared_tokens)
        return shared

    shared, = on_threads(1, work)
    assert sum(after > before for before, after in zip(shared, shared[1:], strict=False)) >= 2, shared


@pytest.mark.parametrize(('context', 'chunk', 'sinks', 'block'), [(256, 16, 0, 16), (250, 16, 0, 16), (100, 20, 4, 8)])
def test_a_batch_of_one_has_a_cache_for_any_text_that_rolls(models, context, chunk, sinks, block):
    """As batch.cache_blocks counts it: a text that is longer than all lengths it knows rolls within it."""
    def work(comm):
        engine = engine_on(comm, models['nine_heads'][0], RunConfig(context=context, chunk=chunk, sinks=sinks, block=block))
        blocks = rings_blocks(engine.model.groups, longest(engine.model.config, engine.run), chunk, block)
        return [rings_blocks(engine.model.groups, total, chunk, block) <= blocks for total in range(1, 9 * context)]

    assert all(on_threads(1, work)[0])


def test_after_an_error_within_a_step_requests_are_computed_anew(models):
    path, params = models['nine_heads'][0], SamplingParams(max_new_tokens=4)

    def work(comm):
        engine = engine_on(comm, path, RunConfig())
        choose, engine.sampler.choose = engine.sampler.choose, lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            engine.generate(engine.request(PROMPT, params))
        engine.sampler.choose = choose
        return engine.generate(engine.request(PROMPT[2:], params)).tokens

    assert on_threads(1, work) == [generate(path, PROMPT[2:], params)[0].tokens]


def run_many(path, requests, ranks, num_blocks, most, run, arrivals=None):
    """Requests (prompt, params) that come in over time, all in one engine; rank 0's finished ones, and its scheduler."""
    def work(comm):
        engine = engine_on(comm, path, RunConfig(**run))
        engine.allocate(num_blocks, most)
        if comm.rank:
            while not engine.step().stop:
                pass
            return None
        coming = [(arrivals[i] if arrivals else 0, engine.request(*request, id=i)) for i, request in enumerate(requests)]
        done = [request for _, request in coming]
        while coming or engine.unfinished:
            while coming and (coming[0][0] <= engine.steps or not engine.unfinished):
                engine.add(coming.pop(0)[1])
            engine.step()
        engine.step(stop=True)
        return done, engine.scheduler
    return on_threads(ranks, work)[0]


@pytest.mark.parametrize('ranks', [1, 2, 4])
@pytest.mark.parametrize('name', ['nine_heads', 'parallel'])
def test_many_requests_at_once_are_each_computed_as_if_alone(models, name, ranks):
    """Prompts that begin alike, join late, and are sent back to the queue by a cache that is too small for all."""
    path, config, tensors = models[name]
    rng = np.random.default_rng(ranks)
    common = rng.integers(0, 256, 13).tolist()
    prompts = [(common if i % 2 else []) + rng.integers(0, 256, 1 + i % 7).tolist() for i in range(12)]
    requests = [(p, SamplingParams(max_new_tokens=3 + i % 11, logprobs=2, prompt_logprobs=i == 5)) for i, p in enumerate(prompts)]
    done, scheduler = run_many(path, requests, ranks, 14, 6, {'chunk': 16, 'block': 4}, arrivals=[i // 2 for i in range(12)])
    assert scheduler.preemptions and scheduler.shared_tokens
    for request, (_, params) in zip(done, requests, strict=True):
        assert len(request.tokens) == params.max_new_tokens
        check_against_recomputing(request, tensors, config)
    exact = log_softmax(tiny.oracle_logits(tensors, config, prompts[5]))
    np.testing.assert_allclose(done[5].prompt_logprobs, [exact[i, t] for i, t in enumerate(prompts[5][1:])], atol=1e-4)


def test_many_requests_beyond_their_rings_copy_what_they_share(models):
    path, config, tensors = models['nine_heads']
    common = np.random.default_rng(1).integers(0, 256, 9).tolist()
    requests = [(common + [i], SamplingParams(max_new_tokens=4 if i == 0 else 25, logprobs=1)) for i in range(5)]
    run = {'chunk': 8, 'block': 4, 'context': 10}
    done, scheduler = run_many(path, requests, 2, 60, 5, run, arrivals=[0, 9, 9, 10, 10])
    for request in done:
        check_against_recomputing(request, tensors, config, window=10)


@pytest.mark.parametrize('ranks', [1, 3])
@pytest.mark.parametrize(('run', 'room'), [({}, 40), ({'context': 10}, 26), ({'context': 10, 'sinks': 3}, 26),
                                           ({'context': 6}, 11)])
def test_layers_with_and_without_windows_share_beginnings_and_a_cache_that_is_too_small(models, run, room, ranks):
    """Layers 0 and 2 see 7 tokens, layer 1 all or the context: rings of two kinds on one pool."""
    path, config, tensors = models['post_norm']
    assert (config.window, config.window_layers) == (7, (0, 2))
    rng = np.random.default_rng(ranks)
    common = rng.integers(0, 256, 18).tolist()
    prompts = [(common if i % 3 else []) + rng.integers(0, 256, 1 + i % 7).tolist() for i in range(12)]
    requests = [(p, SamplingParams(max_new_tokens=3 + 2 * i % 17, logprobs=2)) for i, p in enumerate(prompts)]
    sizes, arrivals = {'chunk': 8, 'block': 4}, [i // 2 for i in range(12)]
    done, scheduler = run_many(path, requests, ranks, room, 6, sizes | run, arrivals)
    assert scheduler.preemptions and scheduler.shared_tokens
    for request, (prompt, params) in zip(done, requests, strict=True):
        tokens = prompt + request.tokens
        assert len(request.tokens) == params.max_new_tokens
        exact = log_softmax(tiny.oracle_logits(tensors, config, tokens, run.get('context'), run.get('sinks', 0)))
        for row, token, choice in zip(exact[len(prompt) - 1:], request.tokens, request.choices, strict=False):
            assert choice.logprob == pytest.approx(row[token], abs=1e-4) and row[token] >= row.max() - 1e-4


@pytest.mark.parametrize('params', [{}, {'temperature': 1.0}, {'temperature': 0.8, 'top_p': 0.9}, {'repetition_penalty': 1.3}])
def test_tokens_of_an_earlier_run_are_gone_on_from(models, params):
    path = models['nine_heads'][0]
    whole = generate(path, PROMPT, SamplingParams(max_new_tokens=20, seed=3, **params))[0].tokens

    def work(comm):
        engine, found = engine_on(comm, path, RunConfig()), []
        for have in (1, 7, 19, 20):
            engine.allocate(4, 2)
            request = engine.request(PROMPT, SamplingParams(max_new_tokens=20, seed=3, **params))
            engine.add(request, whole[:have])
            while engine.unfinished:
                engine.step()
            engine.step()
            found.append(request)
        return found

    for request in on_threads(1, work)[0]:
        assert request.tokens == whole and request.finish_reason == 'length'
        assert request.text == Tokenizer(tiny.byte_tokenizer()).decode(whole)


def test_the_hidden_state_of_a_prompt_s_last_token(models):
    path, config, tensors = models['nine_heads']
    done, _ = run_many(path, [(PROMPT[:n], SamplingParams(max_new_tokens=0, embedding=True)) for n in (1, 4, 10)], 3, 9, 4, {})
    for request, n in zip(done, (1, 4, 10), strict=True):
        logits = tiny.oracle_logits(tensors, config, PROMPT[:n])[-1]
        np.testing.assert_allclose(tensors['head'] @ request.embedding, logits, atol=1e-4)


@pytest.mark.parametrize(('prompt', 'params', 'message'), [
    ([], {}, 'the prompt is empty'), ([300], {}, 'the prompt holds token 300; the model has tokens 0 to 299'),
    ([-1], {}, 'token -1'), ([1] * 200, {'max_new_tokens': 57}, 'are 257; the model was trained for 256')])
def test_a_request_that_cannot_run_is_refused(models, prompt, params, message):
    with pytest.raises(ConfigError, match=message):
        generate(models['nine_heads'][0], prompt, SamplingParams(**params))


def test_rolling_off_is_said_once(models, caplog):
    def work(comm):
        engine = engine_on(comm, models['nine_heads'][0], RunConfig(context=8))
        for _ in range(2):
            engine.generate(engine.request(PROMPT, SamplingParams(max_new_tokens=3)))

    with caplog.at_level(logging.WARNING):
        on_threads(1, work)
    assert [r.getMessage() for r in caplog.records] == [
        'up to 13 tokens on a context of 8: the oldest roll off, attention sees the last 8']


@settings(max_examples=300)
@given(text=st.text('abc', max_size=30), stops=st.lists(st.text('abc', min_size=1, max_size=4), max_size=3), data=st.data())
def test_stop_texts_cut_exactly_and_nothing_of_them_is_shown_early(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found = [text.find(s) for s in stops if s in text]
    # the first stop text to be complete counts, as the stream cannot know what follows
    ends = [text.find(s) + len(s) for s in stops if s in text]
    stop_text, shown = StopText(stops), ''
    for piece in pieces:
        shown += stop_text.push(piece)
        assert text.startswith(shown)
        if stop_text.found:
            break
    else:
        shown += stop_text.flush()
    if not found:
        assert shown == text and not stop_text.found
    else:
        assert stop_text.found and not any(s in shown for s in stops)
        assert min(found) <= len(shown) <= min(ends)


def test_the_length_of_a_stop_text_costs_nothing():
    """Of a text of a million characters no more is looked at than what is held back."""
    stop_text = StopText(['x' * 1_000_000, 'y' * 999_999 + 'z'])
    looked = 0

    class Counted(str):
        def startswith(self, *arguments):
            nonlocal looked
            looked += 1
            return str.startswith(self, *arguments)

    stop_text.stops = tuple(map(Counted, stop_text.stops))
    assert [stop_text.push(piece) for piece in ('a', 'bx', 'x', 'c', 'y')] == ['a', 'b', '', 'xxc', '']
    assert looked < 20 and stop_text.flush() == 'y'
