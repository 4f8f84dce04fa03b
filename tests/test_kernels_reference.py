"""Each kernel against its formula in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpmpi.kernels import reference as ops
from tpmpi.kv_cache import LayerCache, Ring
from tpmpi.weights import Stored, decode, decode_bfloat16, encode

rng = np.random.default_rng(5)


def random(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def packed(stored, transposed, pieces=1):
    weight = ops.new_weight(len(stored), stored.shape[1], transposed, 'float32', 'W')
    for part in np.array_split(np.arange(len(stored)), pieces):
        ops.fill(weight, int(part[0]), encode(stored[part], 'float32', 0 if transposed else 1))
    return weight


@pytest.mark.parametrize('tokens', [1, 2, 17])
@pytest.mark.parametrize('transposed', [False, True])
def test_linear(tokens, transposed):
    stored = random(40, 24)
    x = random(tokens, 40 if transposed else 24)
    w = stored.astype(np.float64) if transposed else stored.astype(np.float64).T
    y = ops.linear(x, packed(stored, transposed, pieces=3))
    assert y.flags.c_contiguous and y.dtype == np.float32
    np.testing.assert_allclose(y, x.astype(np.float64) @ w, rtol=1e-5, atol=1e-5)


def test_linear_without_rows_is_zero_so_that_a_rank_without_heads_adds_nothing():
    weight = ops.new_weight(0, 24, True, 'float32', 'W^B')
    np.testing.assert_array_equal(ops.linear(np.empty((3, 0), np.float32), weight), np.zeros((3, 24)))


def test_bfloat16_is_widened_when_it_is_packed():
    stored = encode(random(8, 6), 'bfloat16')
    weight = ops.new_weight(8, 6, False, 'bfloat16', 'W')
    ops.fill(weight, 0, stored)
    np.testing.assert_array_equal(weight.data, decode_bfloat16(stored.data).T)


@pytest.mark.parametrize('kind', ['int8', 'int4'])
@pytest.mark.parametrize('transposed', [False, True])
def test_integers_are_widened_when_they_are_packed(kind, transposed):
    whole = encode(random(96, 64), kind, 0 if transposed else 1)
    weight = ops.new_weight(96, 64, transposed, kind, 'W')
    for rows in (slice(0, 32), slice(32, 96)):
        groups = slice(rows.start // 32, rows.stop // 32) if transposed else rows
        parts = {name: part[rows if name == 'data' else groups] for name, part in whole.parts.items()}
        ops.fill(weight, rows.start, Stored(kind, **parts, group_axis=whole.group_axis))
    np.testing.assert_array_equal(weight.data, decode(whole) if transposed else decode(whole).T)


def test_joined_weights_lie_side_by_side():
    parts = [packed(random(8, 24), False), ops.new_weight(0, 24, False, 'int8', 'W'), packed(random(5, 24), False)]
    x, weight = random(3, 24), ops.join(parts)
    assert ops.join(parts[:1]) is parts[0] and (weight.kind, weight.letter, weight.nbytes) == ('mixed', 'W', 4 * 24 * 13)
    y = ops.linear(x, weight)
    assert y.flags.c_contiguous
    np.testing.assert_array_equal(y, np.concatenate([ops.linear(x, part) for part in parts], axis=1))


def test_rms_norm():
    x, gain = 30 * random(5, 96), random(96)
    x64 = x.astype(np.float64)
    expected = x64 / np.sqrt((x64 ** 2).mean(-1, keepdims=True) + 1e-5) * gain
    np.testing.assert_allclose(ops.rms_norm(x, gain, 1e-5), expected, rtol=3e-6, atol=1e-6)


def test_embedding_gives_each_rank_its_rows_and_zeros():
    table, tokens = random(10, 4), np.array([3, 9, 12, 0])
    x = ops.embed(tokens, packed(table, False), range(3, 13))
    np.testing.assert_array_equal(x, [table[0], table[6], table[9], np.zeros(4)])


def test_rope_turns_pairs_as_complex_numbers():
    x, positions, half = random(4, 3, 16), np.array([0, 1, 77, 5000]), 8
    z = (x[..., :half] + 1j * x[..., half:]).astype(complex)
    z *= np.exp(1j * positions[:, None, None] * 10000.0 ** (-np.arange(half) / half))
    turned = ops.rotate(x, *ops.rope_table(positions, 16, 10000.0))
    np.testing.assert_allclose(turned, np.concatenate((z.real, z.imag), -1), atol=2e-6)


@pytest.mark.parametrize('kind', ['silu', 'gelu', 'gelu_tanh', 'relu', 'identity'])
def test_activations(kind):
    x = np.concatenate((np.linspace(-12, 12, 4801), [-1e4, 1e4, -100, 100, 0])).astype(np.float32)
    exact = {
        'silu': lambda v: v / (1 + math.exp(-v)) if v > -700 else 0.0,
        'gelu': lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))),
        'gelu_tanh': lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v ** 3))),
        'relu': lambda v: max(v, 0.0), 'identity': lambda v: v}[kind]
    np.testing.assert_allclose(ops.activate(x, kind), [exact(float(v)) for v in x], rtol=2e-6, atol=2e-6)


def test_the_gate_comes_first():
    gate, up = random(3, 8), random(3, 8)
    g = gate.astype(np.float64)
    np.testing.assert_allclose(ops.gated_activation(np.concatenate((gate, up), 1), 'silu'), g / (1 + np.exp(-g)) * up,
                               rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(groups=st.lists(st.integers(1, 4), min_size=0, max_size=3), counts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
       window=st.one_of(st.none(), st.integers(1, 9)), bfloat16=st.booleans(), block=st.integers(1, 8), seed=st.integers(0, 99))
def test_append_and_attend_over_rings(groups, counts, window, bfloat16, block, seed):
    """Two requests, interleaved in each step, against softmax(QK^T)V of their whole histories in float64."""
    random = np.random.default_rng(seed).standard_normal
    head_dim, heads, kv_heads, blocks = 8, sum(groups), len(groups), -(-20 // block)
    dtype = np.uint16 if bfloat16 else np.float32
    shape = (kv_heads, 2 * blocks * block, head_dim)
    cache = LayerCache(np.zeros(shape, dtype), np.zeros(shape, dtype))
    table = np.random.default_rng(seed).permutation(2 * blocks)
    rings = [Ring(table[:blocks], block), Ring(np.sort(table[blocks:]), block)]
    starts, runs, histories = [0, 0], np.cumsum([0, *groups]), ([], [])
    query_groups = [range(a, b) for a, b in zip(runs[:-1], runs[1:], strict=True)]
    for count in counts:
        lengths = [count, 10 - count]
        if max(s + n for s, n in zip(starts, lengths, strict=True)) > 20:
            break
        qkv = random((10, (heads + 2 * kv_heads) * head_dim)).astype(np.float32)
        segments = (rings[0].segment(0, starts[0], count), rings[1].segment(count, starts[1], 10 - count))
        slots = np.concatenate([s.slots for s in segments])
        q = ops.rope_append(qkv, heads, head_dim, None, cache, slots)
        b = ops.attend(q, cache, query_groups, segments, window)
        for which, segment in enumerate(segments):
            histories[which].extend(qkv[segment.rows].reshape(len(segment.slots), heads + 2 * kv_heads, head_dim))
            for row in range(segment.rows.start, segment.rows.stop):
                position = starts[which] + row - segment.rows.start
                seen = np.array(histories[which][max(0, position + 1 - (window or 99)):position + 1], np.float64)
                k, v = seen[:, heads:heads + kv_heads], seen[:, heads + kv_heads:]
                for kv, group in enumerate(query_groups):
                    for head in group:
                        s = k[:, kv] @ q[row, head].astype(np.float64) / math.sqrt(head_dim)
                        p = np.exp(s - s.max())
                        expected = p / p.sum() @ v[:, kv]
                        found = b[row, head * head_dim:(head + 1) * head_dim]
                        np.testing.assert_allclose(found, expected, atol=0.05 if bfloat16 else 3e-6)
            starts[which] += lengths[which]


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=40), st.integers(1, 45))
def test_top_k_is_the_sorted_list_s_beginning(values, k):
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    top, index = ops.top_k(np.array(values, np.float32), k)
    assert index.tolist() == expected and top.tolist() == [values[i] for i in expected]


def test_log_sum_exp():
    x = 50 * random(3, 40)
    exact = [math.log(sum(math.exp(v) for v in row.astype(float))) for row in x]
    np.testing.assert_allclose(ops.log_sum_exp(x), exact, rtol=1e-6)
    assert ops.log_sum_exp(np.empty((2, 0), np.float32)).tolist() == [-math.inf, -math.inf]
