"""Each kernel against its formula in float64."""

from __future__ import annotations

import cmath
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpmpi.config import Rope
from tpmpi.kernels import reference as ops
from tpmpi.kv_cache import LayerCache, Ring, pinned_blocks
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


@pytest.mark.parametrize('rope', [
    Rope(10000.0, 16), Rope(500.0, 10, (1.0, 1.5, 2.0, 8.0, 30.0), magnitude=1.25),
    Rope(10000.0, 16, long_divisors=(2.0,) * 8, original_positions=80), Rope(10000.0, 6, (3.0,) * 3, (4.0, 5.0, 6.0), 80),
    Rope(10000.0, 16, original_positions=80, dynamic_factor=4.0)])
def test_rope_turns_pairs_as_complex_numbers(rope):
    """The first rope.dim numbers of a head, by frequencies that may depend on how long the text is."""
    x, positions, lengths = random(5, 3, 16), [0, 1, 77, 5000, 77], [1, 80, 78, 5001, 300]
    turned, half = ops.rotate(x, *ops.rope_table(np.array(positions), np.array(lengths), rope)), rope.dim // 2
    expected = x.astype(np.float64)
    for t, (position, length) in enumerate(zip(positions, lengths, strict=True)):
        theta, divisors = rope.theta, rope.divisors or (1.0,) * half
        if length > rope.original_positions > 0:
            divisors = rope.long_divisors or divisors
            if rope.dynamic_factor > 1:
                factor = rope.dynamic_factor
                theta *= (factor * length / rope.original_positions - (factor - 1)) ** (rope.dim / (rope.dim - 2))
        for head in range(3):
            for i in range(half):
                z = complex(x[t, head, i], x[t, head, half + i]) * rope.magnitude
                z *= cmath.exp(1j * position * theta ** (-2 * i / rope.dim) / divisors[i])
                expected[t, head, i], expected[t, head, half + i] = z.real, z.imag
    np.testing.assert_allclose(turned, expected, atol=3e-6)
    np.testing.assert_array_equal(turned[..., rope.dim:], x[..., rope.dim:])


def norm_of(x, kind, eps):
    """A row through a norm without gain."""
    x = [float(v) for v in x]
    mean = sum(x) / len(x) if kind == 'layer' else 0.0
    return [(v - mean) / math.sqrt(sum((u - mean) ** 2 for u in x) / len(x) + eps) for v in x]


@pytest.mark.parametrize('biased', [False, True])
def test_layer_norm(biased):
    x, gain, bias = 30 * random(3, 50) + 7, random(50), random(50) if biased else None
    expected = np.array([norm_of(row, 'layer', 1e-3) for row in x]) * gain + (bias if biased else 0)
    np.testing.assert_allclose(ops.layer_norm(x, gain, bias, 1e-3), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize('kind', ['rms', 'layer'])
@pytest.mark.parametrize('biased', [False, True])
def test_each_head_has_a_norm_of_its_own(kind, biased):
    qkv, gain, bias = 5 * random(3, 40), random(24), random(24) if biased else None
    found = qkv.copy()
    ops.norm_heads(found, 3, 8, kind, gain, bias, 1e-3)
    np.testing.assert_array_equal(found[:, 24:], qkv[:, 24:])
    for t in range(3):
        for head in range(0, 24, 8):
            run = slice(head, head + 8)
            expected = np.array(norm_of(qkv[t, run], kind, 1e-3)) * gain[run] + (bias[run] if biased else 0)
            np.testing.assert_allclose(found[t, run], expected, rtol=1e-5, atol=2e-6)


def test_squares_and_scales_of_columns():
    qkv, factor, gain = random(3, 20), random(3), random(6)
    squares = [[sum(float(v) ** 2 for v in row[a:b]) for a, b in ((0, 7), (7, 20), (4, 4))] for row in qkv]
    np.testing.assert_allclose(ops.head_squares(qkv, (range(7), range(7, 20), range(4, 4))), squares, rtol=1e-6)
    found = qkv.copy()
    ops.scale_columns(found, range(5, 11), factor, gain)
    for t in range(3):
        for k in range(20):
            scale = float(factor[t]) * float(gain[k - 5]) if 5 <= k < 11 else 1.0
            assert found[t, k] == pytest.approx(float(qkv[t, k]) * scale, rel=1e-6)


def test_softcap_and_sigmoid():
    x = np.array([-1e4, -50.0, -1.0, 0.0, 1e-3, 3.0, 1e4], np.float32)
    np.testing.assert_allclose(ops.softcap(x, 20.0), [20 * math.tanh(float(v) / 20) for v in x], rtol=1e-6)
    np.testing.assert_allclose(ops.sigmoid(x[1:]), [1 / (1 + math.exp(-float(v))) for v in x[1:]], rtol=1e-6)
    assert ops.sigmoid(x[:1]) == 0


@given(scores=st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=1,
                                                           max_size=4)), count=st.integers(1, 9), normalize=st.booleans())
def test_a_token_goes_to_the_experts_of_the_largest_scores(scores, count, normalize):
    count = min(count, len(scores[0]))
    choice, shares = ops.route(np.array(scores, np.float32), count, normalize)
    for row, ids, weights in zip(scores, choice, shares, strict=True):
        best = sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:count])
        total = sum(math.exp(row[i]) for i in (best if normalize else range(len(row))))
        assert ids.tolist() == best
        np.testing.assert_allclose(weights, [math.exp(row[i]) / total for i in best], rtol=1e-5)


def test_each_token_has_the_weighted_sum_of_its_experts():
    hidden, ffn, a = 6, 4, random(5, 6)
    choice, shares = np.array([[0, 2], [1, 2], [0, 3], [0, 2], [2, 3]]), np.abs(random(5, 2))
    up = ops.new_experts(4, 2 * ffn, hidden, False, 'float32', 'W^C')
    down = ops.new_experts(4, ffn, hidden, True, 'float32', 'W^D')
    matrices = [(random(2 * ffn, hidden), random(ffn, hidden)) for _ in range(4)]
    for i, (c, d) in enumerate(matrices):
        ops.fill(ops.expert(up, i), 0, encode(c, 'float32'))
        ops.fill(ops.expert(down, i), 0, encode(d, 'float32', 0))
    expected = np.zeros((5, hidden))
    for t in range(5):
        for number, share in zip(choice[t], shares[t], strict=True):
            c, d = (m.astype(np.float64) for m in matrices[number])
            for i in range(ffn):
                gate, value = c[i] @ a[t], c[ffn + i] @ a[t]
                expected[t] += share * gate / (1 + math.exp(-gate)) * value * d[i]
    np.testing.assert_allclose(ops.experts(a, choice, shares, up, down, 'silu'), expected, rtol=1e-5, atol=1e-5)


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


@settings(max_examples=60)
@given(groups=st.lists(st.integers(1, 4), min_size=0, max_size=3), counts=st.lists(st.integers(1, 9), min_size=1, max_size=9),
       window=st.one_of(st.none(), st.integers(1, 9)), bfloat16=st.booleans(), block=st.integers(1, 8),
       scale=st.sampled_from([0.1, 0.5]), cap=st.sampled_from([None, 1.5]), sinks=st.integers(0, 4), rolls=st.booleans(),
       seed=st.integers(0, 99))
def test_append_and_attend_over_rings(groups, counts, window, bfloat16, block, scale, cap, sinks, rolls, seed):
    """Two requests, interleaved in each step, against softmax(QK^T)V of their whole histories in float64."""
    random = np.random.default_rng(seed).standard_normal
    head_dim, heads, kv_heads, blocks, limit = 8, sum(groups), len(groups), -(-20 // block), 20
    pinned = pinned_blocks(sinks, block)
    if rolls and window:  # a ring for window and step, in which the text goes round
        blocks, limit = pinned + -(-(window + 9) // block), 50
    dtype = np.uint16 if bfloat16 else np.float32
    shape = (kv_heads, 2 * blocks * block, head_dim)
    cache = LayerCache(np.zeros(shape, dtype), np.zeros(shape, dtype))
    table = np.random.default_rng(seed).permutation(2 * blocks)
    rings = [Ring(table[:blocks], block, pinned), Ring(np.sort(table[blocks:]), block, pinned)]
    starts, runs, histories = [0, 0], np.cumsum([0, *groups]), ([], [])
    query_groups = [range(a, b) for a, b in zip(runs[:-1], runs[1:], strict=True)]
    for count in counts:
        lengths = [count, 10 - count]
        if max(s + n for s, n in zip(starts, lengths, strict=True)) > limit:
            break
        qkv = random((10, (heads + 2 * kv_heads) * head_dim)).astype(np.float32)
        segments = (rings[0].segment(0, starts[0], count), rings[1].segment(count, starts[1], 10 - count))
        slots = np.concatenate([s.slots for s in segments])
        q = ops.rope_append(qkv, heads, head_dim, None, cache, slots)
        b = ops.attend(q, cache, query_groups, segments, window, scale, cap, sinks)
        for which, segment in enumerate(segments):
            histories[which].extend(qkv[segment.rows].reshape(len(segment.slots), heads + 2 * kv_heads, head_dim))
            for row in range(segment.rows.start, segment.rows.stop):
                position = starts[which] + row - segment.rows.start
                seen = [p for p in range(position + 1) if p > position - (window or 99) or p < sinks]
                seen = np.array(histories[which], np.float64)[seen]
                k, v = seen[:, heads:heads + kv_heads], seen[:, heads + kv_heads:]
                for kv, group in enumerate(query_groups):
                    for head in group:
                        s = k[:, kv] @ q[row, head].astype(np.float64) * scale
                        s = s if cap is None else cap * np.tanh(s / cap)
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
