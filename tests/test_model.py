"""The layer on shards, under real MPI: the same logits as the whole model in float64, and the promised traffic only."""

from __future__ import annotations

import dataclasses

import h5py
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from programs.shards import TOKENS
from ranks import on_threads, run_program
from rings import cache_and_rings, step_of

from tpmpi.checkpoint import CheckpointReader
from tpmpi.config import ModelConfig
from tpmpi.kernels import reference as ops
from tpmpi.model import forward, logits
from tpmpi.model_shard import load_model
from tpmpi.sharding import REPLICATED, shard, tensor_specs


@pytest.fixture(scope='module')
def expected(models):
    return {name: tiny.oracle_logits(tensors, config, TOKENS) for name, (_, config, tensors) in models.items()}


@pytest.mark.parametrize('size', [1, 2, 3, 4, 5, 7, 9, 12])
def test_shards_give_the_whole_model_s_logits_with_one_all_reduce_after_c_and_one_after_e(models, expected, tmp_path, size):
    out = tmp_path / 'out.npz'
    report = run_program('shards.py', size, out, 'messages', *(path for path, _, _ in models.values()))
    found = np.load(out)
    for name, (_, config, tensors) in models.items():
        np.testing.assert_allclose(found[name], expected[name], atol=3e-5 * np.abs(expected[name]).max())
        # one decode step: the embedding's, then the layers' all-reduces, each of one row of the hidden states
        row, calls = 4 * config.hidden_size, [['Allreduce', 4 * config.hidden_size]]
        for layer in range(config.num_layers):
            calls += [['Allreduce', 2 * 4]] * (config.qk_norm == 'all')  # sums of squares over all heads
            calls += [['Allreduce', row]] * (not config.parallel_block)
            calls += [['Allreduce', row + 4 * config.num_experts * config.has_experts(layer)]]  # with the choices
        assert report[name]['calls'] == (calls if size > 1 else [])  # one rank has nothing to send
        copies = {n: size if spec.sharded == REPLICATED else 1 for n, spec in tensor_specs(config).items()}
        whole = sum(4 * t.size * copies[n] for n, t in tensors.items() if t.ndim == 2)
        straddling = sum(report[name]['weights']) - whole
        kv_bytes = 2 * config.num_layers * config.head_dim * config.hidden_size * 4
        held = sum(len(shard(config, rank, size).kv_heads) for rank in range(size))
        assert straddling == (held - config.num_kv_heads) * kv_bytes


@pytest.mark.parametrize('size', [2, 3, 5])
def test_sums_of_c_and_e_in_shared_memory_give_the_whole_model_s_logits(models, expected, tmp_path, size):
    """Of every model, in chunks; what is left for MPI is the embedding, norms over all heads, and the experts' sums."""
    out = tmp_path / 'out.npz'
    report = run_program('shards.py', size, out, 'shared', *(path for path, _, _ in models.values()))
    found = np.load(out)
    for name, (_, config, _) in models.items():
        np.testing.assert_allclose(found[name], expected[name], atol=3e-5 * np.abs(expected[name]).max())
        sent = 1 + config.num_layers * (config.qk_norm == 'all') + sum(map(config.has_experts, range(config.num_layers)))
        assert len(report[name]['calls']) == sent and {call for call, _ in report[name]['calls']} == {'Allreduce'}


KINDS = {
    'int8': 'int8', 'int4': 'int4',
    'mixed': lambda name: {'v': 'int8', 'gate': 'bfloat16', 'down': 'int8'}.get(name.rpartition('/')[2], 'int4'),
    'unlike': lambda name: {'q': 'bfloat16', 'k': 'int4', 'v': 'float32', 'up': 'int8'}.get(name.rpartition('/')[2], 'int8')}


@pytest.fixture(scope='module')
def of_kinds(tmp_path_factory):
    """Models of integers, and of kinds that differ within what is computed side by side: {name: (path, oracle's logits)}."""
    folder = tmp_path_factory.mktemp('kinds')
    return {name: (folder / f'{name}.h5', tiny.oracle_logits(
        tiny.write_model(folder / f'{name}.h5', tiny.GROUPS, kind), tiny.GROUPS, TOKENS)) for name, kind in KINDS.items()}


@pytest.mark.parametrize('size', [1, 2, 3, 5])
def test_shards_of_any_kind_give_the_logits_of_the_decoded_model(of_kinds, tmp_path, size):
    """3 ranks cut GQA groups in two; with 5 the blocks of ffn, 64, 64 and 32 columns, do not suffice for all."""
    out = tmp_path / 'out.npz'
    run_program('shards.py', size, out, 'messages', *(path for path, _ in of_kinds.values()))
    found = np.load(out)
    for name, (_, expected) in of_kinds.items():
        np.testing.assert_allclose(found[name], expected, atol=3e-5 * np.abs(expected).max())


def test_what_is_computed_side_by_side_may_differ_in_kind(of_kinds):
    with CheckpointReader(of_kinds['unlike'][0]) as reader:
        layer = load_model(reader, shard(tiny.GROUPS, 0, 2), ops).layers[0]
    qkv, up = layer.qkv.weight, layer.mlp.up.weight
    assert qkv.kind == 'mixed' and [w.letter for w in qkv.data] == ['W^Q', 'W^K', 'W^V']
    assert qkv.letter == 'W^Q W^K W^V' and up.letter == 'W^C' and up.kind != 'mixed'
    assert qkv.nbytes == 4 * 64 * 32 * (3 + 1 + 1)


@pytest.mark.parametrize('weights', ['float32', 'bfloat16', 'int8', 'int4'])
@pytest.mark.parametrize('head_dim', [32, 16])
def test_a_kind_chosen_at_loading_is_that_of_a_converted_file(tmp_path, weights, head_dim):
    """Also where it does not fit attn_out, whose heads of 16 would cut groups."""
    config = dataclasses.replace(tiny.GROUPS, head_dim=head_dim)
    tiny.write_model(tmp_path / 'float32.h5', config)
    tiny.write_model(tmp_path / 'converted.h5', config, weights)
    part = shard(config, 1, 2)
    with CheckpointReader(tmp_path / 'float32.h5') as reader:
        chosen = load_model(reader, part, ops, weights=weights)
    with CheckpointReader(tmp_path / 'converted.h5') as reader:
        stored = load_model(reader, part, ops)
        assert reader.kind('layers/0/attn_out') == ('bfloat16' if head_dim == 16 and 'int' in weights else weights)
    for a, b in zip(chosen.layers, stored.layers, strict=True):
        for one, other in zip(a.matrices, b.matrices, strict=True):
            np.testing.assert_array_equal(one.data, other.data)
    np.testing.assert_array_equal(chosen.embedding.data, stored.embedding.data)


@pytest.mark.parametrize('size', [1, 2, 5])
def test_float16_is_float32_in_a_cpu_s_memory_without_loss(tmp_path, size):
    tensors = tiny.write_model(tmp_path / 'model.h5', tiny.NINE_HEADS, 'float16')
    tiny.write_model(tmp_path / 'same.h5', tiny.NINE_HEADS)
    with h5py.File(tmp_path / 'same.h5', 'r+') as f:
        for name, tensor in tensors.items():
            f[name][...] = tensor
    for rank in range(size):
        found, expected = [], []
        for path, models in (('model.h5', found), ('same.h5', expected)):
            with CheckpointReader(tmp_path / path) as reader:
                models.append(load_model(reader, shard(tiny.NINE_HEADS, rank, size), ops))
        assert {w.kind for layer in found[0].layers for w in layer.matrices} == {'float32'}
        for a, b in zip(found[0].layers, expected[0].layers, strict=True):
            for one, other in zip(a.matrices, b.matrices, strict=True):
                np.testing.assert_array_equal(one.data, other.data)
        np.testing.assert_array_equal(found[0].embedding.data, expected[0].embedding.data)


def test_weights_that_the_chosen_kind_cannot_hold_are_named(tmp_path):
    tiny.write_model(tmp_path / 'model.h5', tiny.GROUPS)
    with h5py.File(tmp_path / 'model.h5', 'r+') as f:
        f['layers/1/up'][3, 3] = np.nan
    with CheckpointReader(tmp_path / 'model.h5') as reader, \
            pytest.raises(ValueError, match='tensor layers/1/up as int8: a weight is not a finite number'):
        load_model(reader, shard(tiny.GROUPS, 0, 1), ops, weights='int8')


@st.composite
def configs(draw):
    """Any facts together, far beyond what families have."""
    def flag():
        return draw(st.booleans())

    kv_heads, group, half, layers = draw(st.tuples(*[st.integers(1, 4)] * 3, st.integers(1, 2)))
    norm, gated = draw(st.sampled_from(['rms', 'layer', 'none'])), flag()
    some_layers = st.lists(st.integers(0, layers - 1), unique=True).map(tuple)
    window, theta = draw(st.sampled_from([None, 1, 5])), draw(st.sampled_from([None, 100.0, 1e4]))
    facts = {}
    if gated and flag():
        facts |= {'num_experts': (n := draw(st.integers(1, 5))), 'experts_per_token': draw(st.integers(1, n)),
                  'expert_ffn_size': draw(st.integers(1, 100)), 'normalize_experts': flag(), 'dense_layers': draw(some_layers),
                  'shared_ffn_size': (shared := draw(st.sampled_from([0, 70]))), 'shared_gate': shared > 0 and flag()}
    elif flag():
        facts |= {'parallel_block': True, 'parallel_mlp_norm': flag()}
    if 'parallel_block' not in facts:
        facts |= {'post_norm': flag(), 'pre_norm': flag()}
    if norm != 'none' and flag():
        facts['qk_norm'] = draw(st.sampled_from(['head', 'all'] if norm == 'rms' else ['head']))
    if theta is not None and flag():
        turned = draw(st.integers(1, half))
        facts |= {'rotary_dim': 2 * turned, 'rope_divisors': tuple(draw(st.floats(1, 8)) for _ in range(turned)),
                  'rope_magnitude': draw(st.floats(0.5, 2)), 'nope_layers': draw(some_layers)}
    if window is not None and flag():
        facts |= {'window_layers': draw(some_layers), 'local_rope_theta': 300.0}
    if flag():
        facts |= {'embedding_multiplier': 3.0, 'residual_multiplier': 0.5, 'logit_multiplier': 2.0, 'attention_scale': 0.3,
                  'attention_softcap': 1.5, 'logit_softcap': 4.0}
    return ModelConfig(
        vocab_size=draw(st.integers(65, 300)), hidden_size=2 * draw(st.integers(2, 12)), num_layers=layers,
        num_heads=kv_heads * group, num_kv_heads=kv_heads, head_dim=2 * half,
        ffn_size=draw(st.integers(1, 200)), max_positions=64, norm=norm, norm_bias=norm == 'layer' and flag(),
        residual=flag(), gated=gated, tie_embeddings=flag(), rope_theta=theta, window=window, qkv_bias=flag(),
        attn_out_bias=flag(), mlp_bias='num_experts' not in facts and flag(), head_bias=flag(),
        learned_positions=draw(st.sampled_from([0, 64])), **facts)


@settings(max_examples=25)
@given(config=configs(), size=st.integers(1, 17), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
       seed=st.integers(0, 9), context=st.sampled_from([None, 3]), sinks=st.integers(0, 4))
def test_any_configuration_on_any_number_of_ranks(tmp_path_factory, config, size, lengths, seed, context, sinks):
    """Ranks are threads here; two requests share each step and the pool, in blocks of 3."""
    path = tmp_path_factory.mktemp('any') / 'model.h5'
    tensors = tiny.write_model(path, config, seed=seed)
    rng = np.random.default_rng(seed)
    requests = [rng.integers(0, config.vocab_size, sum(lengths)) for _ in range(2)]
    expected = [tiny.oracle_logits(tensors, config, tokens, context, sinks) for tokens in requests]

    def work(comm):
        with CheckpointReader(path) as reader:
            model = load_model(reader, shard(config, comm.rank, comm.size), ops, context, sinks=sinks)
        cache, rings = cache_and_rings(model, [-(-sum(lengths) // 3)] * len(model.groups), 3, ops, requests=2)
        start, parts = 0, []
        for count in lengths:
            tokens = np.concatenate([r[start:start + count] for r in requests])
            hidden = forward(step_of(tokens, rings, start, count), model, cache, ops, comm)
            parts.append(logits(hidden, model, ops).reshape(2, count, -1))
            start += count
        return np.concatenate(parts, axis=1)

    found = np.concatenate(on_threads(size, work), axis=2)
    scale = max(np.abs(e).max() for e in expected)
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-4 * scale + 1e-5)


@pytest.mark.parametrize('size', [2, 3])
def test_where_ranks_choose_other_experts_rank_0_s_choice_counts(models, size):
    """On every rank but 0 the router's scores are shaken, as on a CPU that rounds in another way, but for some tokens."""
    path, config, tensors = models['experts']

    def work(comm):
        class Shaken:
            def __getattr__(self, name):
                return getattr(ops, name)

            @staticmethod
            def route(scores, count, normalize):
                choice, shares = ops.route(scores, count, normalize)
                if comm.rank:
                    choice[::2] = np.sort((choice[::2] + 1 + comm.rank) % config.num_experts)
                return choice, shares

        with CheckpointReader(path) as reader:
            model = load_model(reader, shard(config, comm.rank, comm.size), ops)
        cache, rings = cache_and_rings(model, [3], 8, ops)
        hidden = forward(step_of(TOKENS, rings, 0, len(TOKENS)), model, cache, Shaken(), comm)
        return logits(hidden, model, ops), comm.traffic['all_reduce'].calls

    found, calls = zip(*on_threads(size, work), strict=True)
    expected = tiny.oracle_logits(tensors, config, TOKENS)
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, atol=3e-5 * np.abs(expected).max())
    assert set(calls) == {1 + 2 * config.num_layers + 2}, 'once more in each of the two layers with experts'


def test_the_literal_diagram_has_no_norm_no_residual_and_one_matrix_before_the_activation(models):
    path, config, tensors = models['literal']
    assert not any('norm' in name or 'gate' in name for name in tensors)
    assert (config.norm, config.residual, config.gated, config.rope_theta) == ('none', False, False, None)


def test_a_shorter_context_is_a_window(models):
    path, config, _ = models['nine_heads']
    with CheckpointReader(path) as reader:
        part = shard(config, 0, 1)
        def views(**run):
            return [(group.layers, group.window, group.sinks) for group in load_model(reader, part, ops, **run).groups]

        assert views(context=7, sinks=2) == [((0, 1, 2), 7, 2)]
        assert views(sinks=2) == [((0, 1, 2), None, 0)]
        reader.config = dataclasses.replace(config, window=5)
        assert views(context=7, sinks=2) == [((0, 1, 2), 5, 0)]
        reader.config = dataclasses.replace(config, window=5, window_layers=(0, 2))
        assert views(context=7, sinks=2) == [((0,), 5, 0), ((2,), 5, 0), ((1,), 7, 2)]
        assert views(context=4) == [((0, 1, 2), 4, 0)]
