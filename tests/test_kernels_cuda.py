"""The CUDA kernels against the reference kernels: the same .cu sources, run on the CPU block by block, or on a GPU (-m gpu)."""

from __future__ import annotations

import cuda_device
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import pack, ring_steps

from tpmpi.config import Rope
from tpmpi.kernels import reference
from tpmpi.kernels.cuda import Kernels
from tpmpi.kernels.cuda_source import ITEMS
from tpmpi.kernels.uploads import KEYS, SPLITS, TILED_FROM
from tpmpi.kv_cache import LayerCache, Ring, pinned_blocks
from tpmpi.weights import STORED_KINDS, decode, encode

SMALL = settings(max_examples=40)
FLOAT32 = 2e-6  # of a sum of float32, beside the sum of its terms' magnitudes


@pytest.fixture(scope='module', params=cuda_device.STAND_IN_OR_GPU)
def xp(request):
    with cuda_device.device(request.param) as cupy:
        yield cupy


@pytest.fixture(scope='module')
def ops(xp):
    return Kernels(xp)


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- products


@SMALL
@given(kind=st.sampled_from(STORED_KINDS), transposed=st.booleans(), inputs=st.integers(1, 150), outputs=st.integers(1, 60),
       tokens=st.one_of(st.integers(1, 9), st.sampled_from([32, 33, 40])), pieces=st.integers(1, 3), rounded=st.booleans(),
       seed=st.integers(0, 9))
def test_linear_is_the_product(xp, kind, transposed, inputs, outputs, tokens, pieces, rounded, seed):
    ops, rng = Kernels(xp, 'bfloat16' if rounded else 'float32'), np.random.default_rng(seed)
    if kind in ('int8', 'int4'):
        inputs = 32 * (1 + inputs // 32)
        outputs += outputs % 2 if transposed else 0
    stored = encode(random(seed, *((inputs, outputs) if transposed else (outputs, inputs))), kind, 0 if transposed else 1)
    w = decode(stored).astype(np.float64)
    w = w if transposed else w.T
    x = (random(seed + 1, tokens, inputs) * 10 ** rng.uniform(-3, 3)).astype(np.float32)
    y = ops.linear(xp.asarray(x), pack(ops, stored, pieces)).get()
    assert y.shape == (tokens, outputs) and y.dtype == np.float32
    size = np.abs(x.astype(np.float64)) @ np.abs(w)
    halves = tokens > 32 and kind != 'float32'
    error = (2e-2 if rounded else 3e-5) if halves else FLOAT32
    assert (np.abs(y - x.astype(np.float64) @ w) <= error * size).all()


@pytest.mark.parametrize('kind', STORED_KINDS)
@pytest.mark.parametrize('tokens', [1, 3, 8, 11, 40])
def test_gated_products(ops, xp, kind, tokens):
    stored, x = encode(random(1, 2 * 37, 96), kind), random(2, tokens, 96)
    found = ops.gated_linear(xp.asarray(x), pack(ops, stored, 1), 'silu').get()
    expected = reference.gated_activation(x.astype(np.float64) @ decode(stored).T.astype(np.float64), 'silu')
    assert found.shape == (tokens, 37) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-3)
    assert ops.gated_linear(xp.asarray(x), ops.new_weight(0, 96, False, kind, 'W^C'), 'silu').shape == (tokens, 0)
    parts = [pack(ops, encode(random(seed, 37, 96), k), 1) for seed, k in ((3, kind), (4, 'bfloat16'))]
    mixed = ops.gated_linear(xp.asarray(x), ops.join(parts), 'silu').get()
    alone = ops.gated_activation(xp.concatenate([ops.linear(xp.asarray(x), part) for part in parts], axis=1), 'silu').get()
    np.testing.assert_array_equal(mixed, alone)


@pytest.mark.parametrize('kind', STORED_KINDS)
def test_a_row_and_an_output_have_the_same_bits_among_any_others(ops, xp, kind):
    values, x = random(1, 21, 96), random(2, 32, 96)
    whole = ops.linear(xp.asarray(x), pack(ops, encode(values, kind), 1)).get()
    for rows in (1, 2, 3, 5, 9):
        np.testing.assert_array_equal(ops.linear(xp.asarray(x[:rows]), pack(ops, encode(values, kind), 2)).get(), whole[:rows])
    for first, last in ((0, 1), (4, 17)):
        part = ops.linear(xp.asarray(x), pack(ops, encode(values[first:last], kind), 1)).get()
        np.testing.assert_array_equal(part, whole[:, first:last])


@pytest.mark.parametrize('kind', STORED_KINDS)
@pytest.mark.parametrize(('rows', 'inputs', 'outputs'), [
    (1, 8192 + 32, 10), (2, 32 * 65, 4), (7, 2048 - 32, 6), (1, 64, 100), (3, 32 * 45, 38), (20, 96, 34)])
def test_long_and_odd_products_of_few_rows(ops, xp, kind, rows, inputs, outputs):
    stored, x = encode(random(1, outputs, inputs), kind), random(2, rows, inputs)
    packed, w = pack(ops, stored, 1), decode(stored).T.astype(np.float64)
    y, bound = x @ w, 2e-6 * (np.abs(x) @ np.abs(w))
    assert (np.abs(ops.linear(xp.asarray(x), packed).get() - y) <= bound).all()
    gated, half = ops.gated_linear(xp.asarray(x), packed, 'identity').get(), outputs // 2
    size = np.abs(y) + bound
    either = bound[:, :half] * size[:, half:] + bound[:, half:] * size[:, :half]
    assert (np.abs(gated - y[:, :half] * y[:, half:]) <= either).all()


@pytest.mark.parametrize('kind', STORED_KINDS)
@pytest.mark.parametrize('tokens', [9, 40])
def test_what_is_not_a_number_stays_visible(ops, xp, kind, tokens):
    weight = pack(ops, encode(np.ones((7, 64), np.float32), kind), 1)
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones((tokens, 64), np.float32)
        x[4, 5] = bad
        y = ops.linear(xp.asarray(x), weight).get()
        assert not np.isfinite(y[4]).any()
        np.testing.assert_allclose(np.delete(y, 4, axis=0), 64, rtol=2e-3)


@pytest.mark.parametrize('kind', STORED_KINDS)
def test_weights_without_rows_or_columns_and_of_two_kinds(ops, xp, kind):
    none = ops.linear(xp.empty((3, 0), xp.float32), ops.new_weight(0, 64, True, kind, 'W^B'))
    np.testing.assert_array_equal(none.get(), np.zeros((3, 64)))
    assert ops.linear(xp.ones((3, 64), xp.float32), ops.new_weight(0, 64, False, kind, 'W^C')).shape == (3, 0)
    parts, x = [encode(random(3, 9, 64), kind), encode(random(4, 5, 64), 'float32')], random(5, 3, 64)
    y = ops.linear(xp.asarray(x), ops.join([pack(ops, part, 1) for part in parts])).get()
    np.testing.assert_allclose(y, np.concatenate([x @ decode(part).T for part in parts], axis=1), atol=1e-4)


@pytest.mark.parametrize('kind', STORED_KINDS)
def test_embedding_rows(ops, xp, kind):
    stored, tokens = encode(random(6, 40, 96), kind), np.array([3, 60, 7, 20, 59, 46, 19])
    found = ops.embed(tokens, pack(ops, stored, 2), range(20, 60)).get()
    for row, token in zip(found, tokens, strict=True):
        np.testing.assert_array_equal(row, decode(stored)[token - 20] if 20 <= token < 60 else 0)
    assert (ops.embed(tokens, ops.new_weight(0, 96, False, kind, ''), range(0)).get() == 0).all()


@pytest.mark.parametrize('kind', STORED_KINDS)
def test_experts(ops, xp, kind):
    rng, experts, hidden, ffn = np.random.default_rng(7), 5, 64, 32
    (up, down), ours = ((kernels.new_experts(experts, 2 * ffn, hidden, False, kind, 'W^C'),
                         kernels.new_experts(experts, ffn, hidden, True, kind, 'W^D')) for kernels in (ops, reference))
    for i in range(experts):
        for weight, other, shape, axis in ((up, ours[0], (2 * ffn, hidden), 1), (down, ours[1], (ffn, hidden), 0)):
            stored = encode(rng.standard_normal(shape).astype(np.float32), kind, axis)
            ops.fill(ops.expert(weight, i), 0, stored)
            reference.fill(reference.expert(other, i), 0, stored)
    a, scores = random(8, 6, hidden), random(9, 6, experts)
    choice, shares = reference.route(scores, 2, True)
    expected = reference.experts(a, choice, shares, *ours, 'silu')
    found = ops.experts(xp.asarray(a), xp.asarray(choice), xp.asarray(shares), up, down, 'silu').get()
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    on_device = ops.route(xp.asarray(scores), 2, True)
    np.testing.assert_array_equal(on_device[0].get(), choice)
    np.testing.assert_allclose(on_device[1].get(), shares, atol=1e-6)


# ---- rows


@SMALL
@given(tokens=st.integers(1, 4), hidden=st.integers(1, 600), bias=st.booleans(), seed=st.integers(0, 9))
def test_norms(ops, xp, tokens, hidden, bias, seed):
    x, gain, shift = random(seed, tokens, hidden) + 1, random(seed + 1, hidden), random(seed + 2, hidden) if bias else None
    on_device = [None if a is None else xp.asarray(a) for a in (x, gain, shift)]
    np.testing.assert_allclose(ops.rms_norm(*on_device[:2], 1e-5).get(), reference.rms_norm(x, gain, 1e-5), atol=2e-5)
    np.testing.assert_allclose(ops.layer_norm(*on_device, 1e-5).get(), reference.layer_norm(x, gain, shift, 1e-5), atol=2e-4)


@SMALL
@given(tokens=st.integers(1, 4), hidden=st.integers(1, 600), kind=st.sampled_from(['rms', 'layer']), bias=st.booleans(),
       seed=st.integers(0, 9))
def test_sum_and_norm(ops, xp, tokens, hidden, kind, bias, seed):
    x, part, gain = random(seed, tokens, hidden), random(seed + 1, tokens, hidden) + 1, random(seed + 2, hidden)
    shift = random(seed + 3, hidden) if bias and kind == 'layer' else None
    total = xp.asarray(part)
    found = ops.added_norm(xp.asarray(x), total, kind, *(None if a is None else xp.asarray(a) for a in (gain, shift)), 1e-5)
    expected = reference.added_norm(x, part, kind, gain, shift, 1e-5)
    np.testing.assert_array_equal(total.get(), part)
    np.testing.assert_allclose(found.get(), expected, atol=2e-4)


@SMALL
@given(tokens=st.integers(1, 3), heads=st.integers(0, 3), dim=st.integers(1, 70), kind=st.sampled_from(['rms', 'layer']),
       bias=st.booleans(), seed=st.integers(0, 9))
def test_norms_of_heads_and_over_all_heads(ops, xp, tokens, heads, dim, kind, bias, seed):
    columns = heads * dim
    qkv, gain = random(seed, tokens, columns + 5), random(seed + 1, columns)
    shift = random(seed + 2, columns) if bias and kind == 'layer' else None
    expected, found = qkv.copy(), xp.asarray(qkv)
    reference.norm_heads(expected[:, 2:2 + columns], heads, dim, kind, gain, shift, 1e-5)
    on_device = [None if a is None else xp.asarray(a) for a in (gain, shift)]
    ops.norm_heads(found[:, 2:2 + columns], heads, dim, kind, *on_device, 1e-5)
    np.testing.assert_allclose(found.get(), expected, atol=1e-4)
    runs = range(columns), range(1, columns + 5)
    np.testing.assert_allclose(ops.head_squares(xp.asarray(qkv), runs).get(), reference.head_squares(qkv, runs), rtol=1e-5)
    factor, expected, found = random(seed + 3, tokens), qkv.copy(), xp.asarray(qkv)
    reference.scale_columns(expected, range(3, 3 + columns), factor, gain)
    ops.scale_columns(found, range(3, 3 + columns), xp.asarray(factor), xp.asarray(gain))
    np.testing.assert_allclose(found.get(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('kind', ['silu', 'relu', 'gelu', 'gelu_tanh', 'identity'])
def test_activations(ops, xp, kind):
    extreme = np.array([[-200, -90, -10, 0, 10, 90, 200, 1e-30, -1e-30, 1e12]] * 3, np.float32)
    x = np.concatenate((random(1, 3, 290) * 5, extreme), axis=1)
    np.testing.assert_allclose(ops.activate(xp.asarray(x), kind).get(), reference.activate(x, kind), rtol=2e-5, atol=1e-6)
    x[:, 150:] = random(2, 3, 150)
    expected = reference.gated_activation(x, kind)
    np.testing.assert_allclose(ops.gated_activation(xp.asarray(x), kind).get(), expected, rtol=2e-5, atol=1e-5)


def test_softcap(ops, xp):
    x = random(1, 2, 300) * 50
    np.testing.assert_allclose(ops.softcap(xp.asarray(x), 30.0).get(), reference.softcap(x, 30.0), rtol=1e-5)


# ---- attention


@settings(max_examples=60)
@given(kv_heads=st.integers(1, 3), group=st.sampled_from([1, 2, 3, 9]), dim=st.sampled_from([6, 8, 24, 64, 136, 264]),
       block=st.sampled_from([3, 16, 64]), blocks=st.permutations(range(6)), count=st.integers(1, 5),
       kv=st.sampled_from(['float32', 'bfloat16']), window=st.one_of(st.none(), st.integers(1, 100)),
       steps=st.lists(st.integers(1, 40), min_size=1, max_size=4), turned=st.integers(0, 3),
       cap=st.sampled_from([None, 1.0, 30.0]), sinks=st.one_of(st.just(0), st.integers(1, 70)), seed=st.integers(0, 9))
def test_attention_is_that_of_the_reference_kernels_in_every_ring(
        ops, xp, kv_heads, group, dim, block, blocks, count, kv, window, steps, turned, cap, sinks, seed):
    """Rings grown and wrapped, with pinned blocks; the reference kernels have a brute-force test."""
    sinks = min(sinks, (count - 1) * block)  # some blocks go round
    pinned = pinned_blocks(sinks, block)
    ring = Ring(np.array(blocks[:count], np.int64), block, pinned)
    caches = [LayerCache(*kernels.new_cache(kv_heads, 6 * block, dim, kv)) for kernels in (reference, ops)]
    groups, heads = tuple(range(i * group, (i + 1) * group) for i in range(kv_heads)), kv_heads * group
    for segment, seen in ring_steps(ring, steps, window, sinks):
        position, step = segment.start, len(segment.slots)
        qkv = random(seed + position, step, (heads + 2 * kv_heads) * dim)
        rope = Rope(1e4, dim // turned // 2 * 2) if turned else None
        positions = np.arange(position, position + step)
        found = []
        for kernels, cache, x in zip((reference, ops), caches, (qkv, xp.asarray(qkv)), strict=True):
            table = kernels.rope_table(positions, positions + 1, rope) if turned else None
            q = kernels.rope_append(x, heads, dim, table, cache, segment.slots)
            b = kernels.attend(q, cache, groups, (segment,), seen, dim ** -0.5, cap, sinks)
            found.append(b if kernels is reference else b.get())
        exact = 6e-6 if step < TILED_FROM else 4e-5  # in tiles Q, K, softmax and V are sums of two numbers of bfloat16
        np.testing.assert_allclose(found[1], found[0], atol=exact if kv == 'float32' else 2e-2)


@pytest.mark.parametrize('kv', ['float32', 'bfloat16'])
@pytest.mark.parametrize(('window', 'sinks'), [(None, 0), (700, 0), (600, 9)])
@pytest.mark.parametrize('most', [most for most, _ in SPLITS])
def test_attention_of_long_texts_is_split_among_blocks(ops, xp, kv, window, sinks, most):
    """Texts of different lengths in one step: some end before the last split begins."""
    split = dict(SPLITS)[most]
    dim, lengths = 16, (2 * split + KEYS + 3, 5, split, *(7,) * (most // 2 - 3))
    caches = [LayerCache(*kernels.new_cache(2, 64 * 60, dim, kv)) for kernels in (reference, ops)]
    for cache, kernels in zip(caches, (reference, ops), strict=True):
        for array, seed in zip(cache, (1, 2), strict=True):
            values = random(seed, *array.shape)
            array[:] = kernels.asarray(encode(values.reshape(-1, dim), kv).data.reshape(array.shape))
    rings, at = [], 0
    for length in lengths:
        rings.append(Ring(np.arange(at, at + -(-length // 64)), 64))
        at += len(rings[-1].blocks)
    segments = tuple(ring.segment(row, length - 1, 1) for row, (ring, length) in enumerate(zip(rings, lengths, strict=True)))
    q = random(3, len(lengths), 6, dim)
    arguments = (range(0, 3), range(3, 6)), segments, window, 0.25, None, sinks
    expected = reference.attend(q, caches[0], *arguments)
    found = ops.attend(xp.asarray(q), caches[1], *arguments).get()
    np.testing.assert_allclose(found, expected, atol=5e-6)
    assert max(ITEMS) == 8


@pytest.mark.parametrize('rope', [Rope(1e4, 8), Rope(5e5, 6, (1.0, 2.0, 8.0)), Rope(1e4, 8, (), (), 16, 1.5, 4.0),
                                  Rope(1e4, 4, (1.0, 1.1), (2.0, 7.0), 10, 1.2)])
def test_rope_tables(ops, rope):
    positions = np.array([0, 1, 9, 10, 31, 100000])
    cos, sin = (table.get() for table in ops.rope_table(positions, np.maximum(positions + 1, 7), rope))
    expected = reference.rope_table(positions, np.maximum(positions + 1, 7), rope)
    np.testing.assert_allclose(cos, expected[0][:, 0, rope.dim // 2:], atol=2e-7)
    np.testing.assert_allclose(sin, expected[1][:, 0, rope.dim // 2:], atol=2e-7)
