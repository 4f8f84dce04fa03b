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

from tpmpi.checkpoint import CheckpointReader
from tpmpi.config import ModelConfig
from tpmpi.kernels import reference as ops
from tpmpi.kv_cache import KVCache, Ring
from tpmpi.model import Step, forward, load_model, logits
from tpmpi.sharding import shard


@pytest.fixture(scope='module')
def expected(models):
    return {name: tiny.oracle_logits(tensors, config, TOKENS) for name, (_, config, tensors) in models.items()}


@pytest.mark.parametrize('size', [1, 2, 3, 4, 5, 7, 9, 12])
def test_shards_give_the_whole_model_s_logits_with_one_all_reduce_after_c_and_one_after_e(models, expected, tmp_path, size):
    out = tmp_path / 'out.npz'
    report = run_program('shards.py', size, out, *(path for path, _, _ in models.values()))
    found = np.load(out)
    for name, (_, config, tensors) in models.items():
        np.testing.assert_allclose(found[name], expected[name], atol=3e-5 * np.abs(expected[name]).max())
        per_layer = 1 if config.parallel_block else 2
        # one decode step: the embedding's, then the layers' all-reduces, each of one row of the hidden states
        assert report[name]['calls'] == [['Allreduce', 4 * config.hidden_size]] * (1 + per_layer * config.num_layers)
        whole = sum(4 * t.size for t in tensors.values() if t.ndim == 2)
        straddling = sum(report[name]['weights']) - whole
        kv_bytes = 2 * config.num_layers * config.head_dim * config.hidden_size * 4
        held = sum(len(shard(config, rank, size).kv_heads) for rank in range(size))
        assert straddling == (held - config.num_kv_heads) * kv_bytes


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
    run_program('shards.py', size, out, *(path for path, _ in of_kinds.values()))
    found = np.load(out)
    for name, (_, expected) in of_kinds.items():
        np.testing.assert_allclose(found[name], expected, atol=3e-5 * np.abs(expected).max())


def test_what_is_computed_side_by_side_may_differ_in_kind(of_kinds):
    with CheckpointReader(of_kinds['unlike'][0]) as reader:
        layer = load_model(reader, shard(tiny.GROUPS, 0, 2), ops).layers[0]
    assert layer.qkv.kind == 'mixed' and [w.letter for w in layer.qkv.data] == ['W^Q', 'W^K', 'W^V']
    assert layer.qkv.letter == 'W^Q W^K W^V' and layer.up.letter == 'W^C' and layer.up.kind != 'mixed'
    assert layer.qkv.nbytes == 4 * 64 * 32 * (3 + 1 + 1)


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
        for name in ('qkv', 'attn_out', 'up', 'down'):
            np.testing.assert_array_equal(getattr(a, name).data, getattr(b, name).data)
    np.testing.assert_array_equal(chosen.embedding.data, stored.embedding.data)


def test_weights_that_the_chosen_kind_cannot_hold_are_named(tmp_path):
    tiny.write_model(tmp_path / 'model.h5', tiny.GROUPS)
    with h5py.File(tmp_path / 'model.h5', 'r+') as f:
        f['layers/1/up'][3, 3] = np.nan
    with CheckpointReader(tmp_path / 'model.h5') as reader, \
            pytest.raises(ValueError, match='tensor layers/1/up as int8: a weight is not a finite number'):
        load_model(reader, shard(tiny.GROUPS, 0, 1), ops, weights='int8')


@st.composite
def configs(draw):
    kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return ModelConfig(
        vocab_size=draw(st.integers(65, 300)), hidden_size=2 * draw(st.integers(2, 12)), num_layers=draw(st.integers(1, 2)),
        num_heads=kv_heads * group, num_kv_heads=kv_heads, head_dim=2 * draw(st.integers(1, 4)),
        ffn_size=draw(st.integers(1, 200)), max_positions=64, norm=draw(st.sampled_from(['rms', 'none'])),
        residual=draw(st.booleans()), gated=True, parallel_block=draw(st.booleans()), tie_embeddings=draw(st.booleans()),
        rope_theta=draw(st.sampled_from([None, 100.0, 1e4])), window=draw(st.sampled_from([None, 1, 5])))


@settings(max_examples=25, deadline=None)
@given(config=configs(), size=st.integers(1, 17), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
       seed=st.integers(0, 9))
def test_any_configuration_on_any_number_of_ranks(tmp_path_factory, config, size, lengths, seed):
    """Ranks are threads here; two requests share each step and the pool, in blocks of 3."""
    path = tmp_path_factory.mktemp('any') / 'model.h5'
    tensors = tiny.write_model(path, config, seed=seed)
    rng = np.random.default_rng(seed)
    requests = [rng.integers(0, config.vocab_size, sum(lengths)) for _ in range(2)]
    expected = [tiny.oracle_logits(tensors, config, tokens) for tokens in requests]

    def work(comm):
        with CheckpointReader(path) as reader:
            model = load_model(reader, shard(config, comm.rank, comm.size), ops)
        each = -(-sum(lengths) // 3)
        cache = KVCache(config, model.shard, 2 * each, 3, ops)
        rings, start, parts = [Ring(np.arange(i, 2 * each, 2), 3) for i in range(2)], 0, []  # every other block
        for count in lengths:
            tokens = np.concatenate([r[start:start + count] for r in requests])
            segments = tuple(ring.segment(i * count, start, count) for i, ring in enumerate(rings))
            hidden = forward(Step.of(tokens, segments), model, cache, ops, comm)
            parts.append(logits(hidden, model, ops).reshape(2, count, -1))
            start += count
        return np.concatenate(parts, axis=1)

    found = np.concatenate(on_threads(size, work), axis=2)
    scale = max(np.abs(e).max() for e in expected)
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-4 * scale + 1e-5)


def test_the_literal_diagram_has_no_norm_no_residual_and_one_matrix_before_the_activation(models):
    path, config, tensors = models['literal']
    assert not any('norm' in name or 'gate' in name for name in tensors)
    assert (config.norm, config.residual, config.gated, config.rope_theta) == ('none', False, False, None)


def test_a_shorter_context_is_a_window(models):
    path, config, _ = models['nine_heads']
    with CheckpointReader(path) as reader:
        part = shard(config, 0, 1)
        assert load_model(reader, part, ops, context=7).window == 7
        assert load_model(reader, part, ops).window is None
        windowed = dataclasses.replace(config, window=5)
        reader.config = windowed
        assert load_model(reader, part, ops, context=7).window == 5
