"""Attention of many queries on tensor cores, and products of few rows there, against float64; on a GPU, or run on the CPU."""

from __future__ import annotations

import cuda_device
import numpy as np
import pytest

from tpmpi.kernels.cuda import Kernels
from tpmpi.kernels.uploads import TILED_FROM
from tpmpi.kv_cache import LayerCache, Ring, pinned_blocks
from tpmpi.weights import decode, encode


@pytest.fixture(scope='module', params=cuda_device.STAND_IN_OR_GPU)
def xp(request):
    with cuda_device.device(request.param) as cupy:
        yield cupy


def exact_attention(q, k, v, start: int, window, sinks: int, scale: float, cap):
    """float64, query by query.  q: [queries, heads, dim]; k, v: [kv_heads, positions, dim] of all positions from 0 on."""
    out, each = np.empty(q.shape), q.shape[1] // len(k)
    for row in range(len(q)):
        at = start + row
        seen = [p for p in range(at + 1) if window is None or p > at - window or p < sinks]
        for head in range(q.shape[1]):
            scores = scale * k[head // each][seen] @ q[row, head]
            scores = scores if cap is None else cap * np.tanh(scores / cap)
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ v[head // each][seen] / weights.sum()
    return out.reshape(len(q), -1)


@pytest.mark.parametrize('kv', ['float32', 'bfloat16'])
@pytest.mark.parametrize('activations', ['float32', 'bfloat16'])
@pytest.mark.parametrize(('dim', 'kv_heads', 'group', 'window', 'sinks', 'cap'), [
    (64, 2, 1, None, 0, None), (128, 1, 4, None, 0, 20.0), (80, 1, 12, 40, 0, None), (96, 2, 3, 50, 9, None),
    (8, 1, 2, 1, 0, None), (136, 1, 2, None, 0, None)])
def test_requests_of_many_and_of_few_queries_in_one_step(xp, kv, activations, dim, kv_heads, group, window, sinks, cap):
    """A request that begins, one that goes on behind 70 positions, and one of decode; 136 is too large for tiles."""
    ops, rng, block = Kernels(xp, activations), np.random.default_rng(dim), 16
    cache, groups = LayerCache(*ops.new_cache(kv_heads, 16 * block, dim, kv)), tuple(
        range(i * group, (i + 1) * group) for i in range(kv_heads))
    blocks, segments, expected, queries = rng.permutation(16), [], [], []
    for first, count in ((0, TILED_FROM + 20), (70, TILED_FROM), (33, 1)):
        ring = Ring(blocks[:-(-(first + count) // block)], block, pinned_blocks(sinks, block))
        blocks = blocks[len(ring.blocks):]
        k, v = (encode(rng.standard_normal((kv_heads * (first + count), dim)).astype(np.float32), kv) for _ in 'kv')
        slots = ring.segment(0, 0, first + count).slots
        for array, stored in zip(cache, (k, v), strict=True):
            array[:, xp.asarray(slots)] = xp.asarray(stored.data.reshape(kv_heads, first + count, dim))
        q = rng.standard_normal((count, kv_heads * group, dim)).astype(np.float32)
        rows = sum(len(one) for one in queries)
        segments.append(ring.segment(rows, first, count))
        queries.append(q)
        k, v = (decode(x).reshape(kv_heads, -1, dim).astype(np.float64) for x in (k, v))
        expected.append(exact_attention(q.astype(np.float64), k, v, first, window, sinks, dim ** -0.5, cap))
    found = ops.attend(xp.asarray(np.concatenate(queries)), cache, groups, tuple(segments), window, dim ** -0.5, cap, sinks).get()
    error = np.abs(found - np.concatenate(expected)).max(axis=1)
    assert (error <= (2e-2 if activations == 'bfloat16' and dim <= 128 else 4e-5)).all() and error[-1] <= 5e-6
    if activations == 'bfloat16' and dim == 64:
        assert error[:-1].max() > 1e-4  # rounded were those in tiles


@pytest.mark.parametrize('kind', ['bfloat16', 'float16', 'int8', 'int4'])
def test_every_weight_and_every_bit_of_x_counts(xp, kind):
    """Weights of all values that a kind has, one in each output, with numbers of 24 bits: the products are exact."""
    values = {'bfloat16': np.arange(-300, 300, 4) / 64, 'float16': np.concatenate((np.arange(-2047, 2047, 31), [6e-8, 65504])),
              'int8': np.arange(-127, 128), 'int4': np.arange(16)}[kind].astype(np.float32)
    ops, k, outputs = Kernels(xp), 512, np.arange(len(values))
    columns = outputs * 74 % k
    rows = np.zeros((len(values), k), np.float32)
    rows[outputs, columns] = values
    if kind in ('int8', 'int4'):  # beside each the largest, where x is 0: then the scale is 1
        rows[outputs, columns + 1] = values.max()
    stored = encode(rows, kind)
    values = decode(stored)[outputs, columns].astype(np.float64)
    assert len(set(values)) == len(values)
    weight = ops.new_weight(len(values), k, False, kind, 'W^C')
    ops.fill(weight, 0, stored)
    x = (np.random.default_rng(0).standard_normal((16, k)) * 10.0 ** np.arange(-8, 8)[:, None]).astype(np.float32)
    x[:, 1::2] = 0
    many = ops.linear(xp.asarray(x), weight).get()
    assert (np.abs(many - x[:, columns] * values) <= 2.0**-22 * np.abs(x[:, columns] * values)).all()
    for rows in (1, 2, 3, 8):
        np.testing.assert_array_equal(ops.linear(xp.asarray(x[:rows]), weight).get(), many[:rows])
