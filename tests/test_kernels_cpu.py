"""The compiled kernels against float64 formulas and against the reference kernels, on every odd size."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import pack, ready, ring_steps
from ranks import environment, run_ranks

pytest.importorskip('numba', reason='Numba is not installed: pip install numba')

from tpmpi.config import ModelConfig, Rope
from tpmpi.kernels import jit, reference
from tpmpi.kernels.alignment import BLOCK, LINE, Arena
from tpmpi.kernels.cpu import Kernels
from tpmpi.kernels.elementwise import ACTIVATIONS
from tpmpi.kv_cache import LayerCache, Ring, pinned_blocks
from tpmpi.weights import WEIGHT_KINDS, decode, encode

SMALL = settings(max_examples=60)
ops = Kernels(units=False)  # which test_matrix_units.py is about
# largest error of a product beside the sum of its terms' magnitudes: float32 sums, or activations in 16 bits
TOLERANCE = {'float32': 2e-6, 'bfloat16': 2e-6, 'int8': 5e-5, 'int4': 5e-5}


FACTS = dict(vocab_size=64, hidden_size=64, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=64, ffn_size=64, max_positions=9)
CONFIGS = {'float32': ModelConfig(**FACTS, norm='layer', qk_norm='head', logit_softcap=1.0),
           'bfloat16': ModelConfig(**FACTS, qk_norm='all', gated=False)}


@pytest.fixture(scope='module', autouse=True)
def built():
    for kv, config in CONFIGS.items():
        ready(ops, ops.needed(config, WEIGHT_KINDS, kv))


def test_a_model_compiles_what_it_needs_and_nothing_else():
    names = [{kernel.py_func.__name__ for kernel in ops.needed(config, ['int8'], kv)} for kv, config in CONFIGS.items()]
    assert names[0] - names[1] == {
        'layer_norm', 'norm_heads', 'gated_activation', 'softcap', 'rope_append_float32', 'attend_float32', 'layers_float32'}
    assert names[1] - names[0] == {
        'rms_norm', 'add_rms_norm', 'head_squares', 'scale_columns', 'activate', 'rope_append_bfloat16', 'attend_bfloat16'}
    mixture = dataclasses.replace(CONFIGS['float32'], num_experts=4, experts_per_token=2, expert_ffn_size=64)
    assert len(ops.needed(mixture, ['int8'], 'float32')) == len(names[0]) + 5


@SMALL
@given(kind=st.sampled_from(WEIGHT_KINDS), transposed=st.booleans(), inputs=st.integers(1, 70), outputs=st.integers(1, 150),
       tokens=st.integers(1, 20), pieces=st.integers(1, 3), seed=st.integers(0, 9))
def test_linear_is_the_product(kind, transposed, inputs, outputs, tokens, pieces, seed):
    rng = np.random.default_rng(seed)
    if kind in ('int8', 'int4'):
        inputs = 32 * (1 + inputs // 16)
        outputs += outputs % 2 if transposed else 0
    values = rng.standard_normal((inputs, outputs) if transposed else (outputs, inputs)).astype(np.float32)
    stored = encode(values, kind, 0 if transposed else 1)
    w = decode(stored).astype(np.float64)
    w = w if transposed else w.T
    x = (rng.standard_normal((tokens, inputs)) * 10 ** rng.uniform(-3, 3)).astype(np.float32)
    y = ops.linear(x, pack(ops, stored, pieces))
    assert y.shape == (tokens, outputs) and y.dtype == np.float32 and y.flags.c_contiguous
    size = np.abs(x.astype(np.float64)) @ np.abs(w)
    assert (np.abs(y - x.astype(np.float64) @ w) <= TOLERANCE[kind] * size).all()


@pytest.mark.parametrize('kind', WEIGHT_KINDS)
@pytest.mark.parametrize(('inputs', 'outputs'), [(32, 5), (96, 100), (2080, 210), (1056, 64)])
def test_a_row_has_the_same_bits_with_any_number_of_others(kind, inputs, outputs):
    rng = np.random.default_rng(1)
    weight = pack(ops, encode(rng.standard_normal((outputs, inputs)).astype(np.float32), kind), 1)
    x = rng.standard_normal((43, inputs)).astype(np.float32)
    whole = ops.linear(x, weight)
    for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 18):
        np.testing.assert_array_equal(ops.linear(x[:tokens].copy(), weight), whole[:tokens])


@pytest.mark.parametrize('kind', WEIGHT_KINDS)
def test_an_output_has_the_same_bits_beside_any_others(kind):
    """So a rank's columns are what one rank alone computes."""
    rng = np.random.default_rng(2)
    values, x = rng.standard_normal((230, 64)).astype(np.float32), rng.standard_normal((3, 64)).astype(np.float32)
    whole = ops.linear(x, pack(ops, encode(values, kind), 1))
    for first, last in ((0, 1), (7, 90), (100, 230)):
        np.testing.assert_array_equal(ops.linear(x, pack(ops, encode(values[first:last], kind), 1)), whole[:, first:last])


@pytest.mark.parametrize('kind', WEIGHT_KINDS)
def test_what_is_not_a_number_stays_visible(kind):
    weight = pack(ops, encode(np.ones((40, 64), np.float32), kind), 1)
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones((9, 64), np.float32)
        x[4, 5] = bad
        y = ops.linear(x, weight)
        assert not np.isfinite(y[4]).any()
        np.testing.assert_allclose(np.delete(y, 4, axis=0), 64, rtol=2e-3)


@pytest.mark.parametrize('kind', ['rms', 'layer'])
def test_sum_and_norm(kind):
    rng = np.random.default_rng(4)
    x, part, gain, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 70), (3, 70), (70,), (70,)))
    bias, mine = bias if kind == 'layer' else None, part.copy()
    found, expected = ops.added_norm(x, mine, kind, gain, bias, 1e-5), reference.added_norm(x, part, kind, gain, bias, 1e-5)
    np.testing.assert_array_equal(mine, part)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_weights_without_rows_or_columns():
    for kind in WEIGHT_KINDS:
        np.testing.assert_array_equal(ops.linear(np.empty((3, 0), np.float32), ops.new_weight(0, 64, True, kind, 'W^B')), 0)
        assert ops.linear(np.ones((3, 64), np.float32), ops.new_weight(0, 64, False, kind, 'W^C')).shape == (3, 0)


def test_weights_of_different_kinds_side_by_side():
    rng = np.random.default_rng(3)
    parts = [encode(rng.standard_normal((rows, 64)).astype(np.float32), kind) for rows, kind in ((20, 'int4'), (9, 'float32'))]
    x = rng.standard_normal((2, 64)).astype(np.float32)
    joined = ops.join([pack(ops, part, 1) for part in parts])
    expected = x @ np.concatenate([decode(part) for part in parts]).T
    np.testing.assert_allclose(ops.linear(x, joined), expected, atol=1e-3)
    assert joined.nbytes == sum(pack(ops, part, 1).nbytes for part in parts)


def test_rounded_activations_are_bfloat16_values():
    """x is rounded to nearest even, for bfloat16 weights only."""
    rounding, x = Kernels(activations='bfloat16', units=False), np.full((1, 32), 1 + 2 ** -8, np.float32)
    x[0, 1] = 1 + 3 * 2 ** -8
    for kind, expected in (('bfloat16', [1, 1 + 2 ** -6]), ('float32', x[0, :2])):
        weight = pack(ops, encode(np.eye(32, dtype=np.float32), kind), 1)
        np.testing.assert_array_equal(rounding.linear(x, weight)[0, :2], np.float32(expected))


@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_activations_of_8_bits(kind):
    """Each group of 32 is rounded to 127 steps of its largest; beyond that the products are as exact as ever, for any rows."""
    coarse, rng = Kernels(activations='int8', units=False), np.random.default_rng(5)
    ready(coarse, coarse.needed_for([kind]))
    values, x = rng.standard_normal((150, 96)).astype(np.float32), rng.standard_normal((23, 96)).astype(np.float32)
    values[:40], values[:40, ::32], x[0], x[1] = 1, -1, 3, -3  # the largest sums that there can be
    stored = encode(values, kind)
    weight, w = pack(coarse, stored, 2), decode(stored).astype(np.float64).T
    groups = x.astype(np.float64).reshape(23, 3, 32)
    step = np.abs(groups).max(2, keepdims=True) / 127
    rounded = (np.rint(groups / step) * step).reshape(23, 96)
    y = coarse.linear(x, weight)
    assert (np.abs(y - rounded @ w) <= 2e-6 * (np.abs(rounded) @ np.abs(w))).all()
    assert np.abs(y - x @ w).max() > 1e-3  # they are rounded indeed
    for tokens in (1, 2, 3, 4, 5, 6, 11):
        np.testing.assert_array_equal(coarse.linear(x[:tokens].copy(), weight), y[:tokens])


@SMALL
@given(kind=st.sampled_from(WEIGHT_KINDS), first=st.integers(0, 40), rows=st.integers(1, 60), seed=st.integers(0, 5))
def test_embedding_gives_each_rank_its_rows_and_zeros(kind, first, rows, seed):
    rng = np.random.default_rng(seed)
    table = encode(rng.standard_normal((rows, 96)).astype(np.float32), kind)
    tokens = rng.integers(0, first + rows + 9, 12)
    expected = np.zeros((12, 96), np.float32)
    for i, token in enumerate(tokens):
        if first <= token < first + rows:
            expected[i] = decode(table)[token - first]
    np.testing.assert_array_equal(ops.embed(tokens, pack(ops, table, 1), range(first, first + rows)), expected)


@pytest.mark.parametrize('size', [1, 15, 16, 100, 576])
def test_rms_norm(size):
    rng = np.random.default_rng(size)
    x, gain = (30 * rng.standard_normal((5, size))).astype(np.float32), rng.standard_normal(size).astype(np.float32)
    x64 = x.astype(np.float64)
    expected = x64 / np.sqrt((x64 ** 2).mean(-1, keepdims=True) + 1e-5) * gain
    np.testing.assert_allclose(ops.rms_norm(x, gain, 1e-5), expected, rtol=3e-6, atol=1e-7)


def vector(rng, *shape):
    return (10 ** rng.uniform(-2, 2) * rng.standard_normal(shape)).astype(np.float32)


@SMALL
@given(kind=st.sampled_from(['rms', 'layer']), tokens=st.integers(1, 4), heads=st.integers(0, 3), dim=st.integers(1, 70),
       before=st.integers(0, 9), after=st.integers(0, 9), bias=st.booleans(), seed=st.integers(0, 99))
def test_norms_of_heads_are_those_of_the_reference_kernels(kind, tokens, heads, dim, before, after, bias, seed):
    """In place, in a run of the columns and nowhere else; one head of full width is the layer's own norm."""
    rng, size = np.random.default_rng(seed), heads * dim
    whole, gain = vector(rng, tokens, before + size + after), vector(rng, size)
    expected, bias = whole.copy(), vector(rng, size) if bias else None
    for kernels, qkv in ((ops, whole), (reference, expected)):
        kernels.norm_heads(qkv[:, before:before + size], heads, dim, kind, gain, bias, 1e-5)
    near = 3e-5 * (np.abs(gain).max(initial=0) + (0 if bias is None else np.abs(bias).max(initial=0)))
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=near)
    if size and kind == 'layer':
        x = vector(rng, tokens, size)
        np.testing.assert_allclose(ops.layer_norm(x, gain, bias, 1e-5), reference.layer_norm(x, gain, bias, 1e-5), rtol=1e-5,
                                   atol=near)


@SMALL
@given(tokens=st.integers(1, 4), first=st.integers(0, 70), size=st.integers(0, 90), seed=st.integers(0, 99))
def test_squares_and_scales_of_columns_are_those_of_the_reference_kernels(tokens, first, size, seed):
    rng, run = np.random.default_rng(seed), range(first, first + size)
    qkv, factor, gain = vector(rng, tokens, first + size + 5), vector(rng, tokens), vector(rng, size)
    np.testing.assert_allclose(ops.head_squares(qkv, (range(first), run)), reference.head_squares(qkv, (range(first), run)),
                               rtol=1e-5)
    expected = qkv.copy()
    ops.scale_columns(qkv, run, factor, gain)
    reference.scale_columns(expected, run, factor, gain)
    np.testing.assert_allclose(qkv, expected, rtol=1e-6)


@pytest.mark.parametrize('cap', [1.0, 30.0, 50.0])
def test_softcap(cap):
    x = np.concatenate((np.linspace(-300, 300, 9001), [1e-30, 1e-6, 0, 1e9, -1e9, np.inf, -np.inf])).astype(np.float32)
    expected = cap * np.tanh(x.astype(np.float64) / cap)
    np.testing.assert_allclose(ops.softcap(x[None], cap)[0], expected, rtol=4e-7)
    assert np.isnan(ops.softcap(np.float32([[np.nan] * 20]), cap)).all()


@pytest.mark.parametrize('kind', ACTIVATIONS)
def test_activations(kind):
    x = np.concatenate((np.linspace(-12, 12, 4801), [-1e4, 1e4, -100, 100, 0])).astype(np.float32)
    exact = {
        'silu': lambda v: v / (1 + math.exp(-v)) if v > -700 else 0.0,
        'gelu': lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))),
        'gelu_tanh': lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v ** 3))),
        'relu': lambda v: max(v, 0.0), 'identity': lambda v: v}[kind]
    expected = np.array([exact(float(v)) for v in x])
    np.testing.assert_allclose(ops.activate(x[None], kind)[0], expected, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(ops.gated_activation(np.concatenate((x, x))[None], kind)[0], expected * x, rtol=2e-6, atol=1e-5)
    assert np.isnan(ops.activate(np.full((1, 3), np.nan, np.float32), kind)).all()


def test_relu_of_minus_infinity_is_zero():
    np.testing.assert_array_equal(ops.activate(np.float32([[-np.inf, -1, np.inf]]), 'relu'), [[0, 0, np.inf]])


def test_log_sum_exp():
    rng = np.random.default_rng(4)
    for width in (1, 15, 33, 1000):
        logits = (30 * rng.standard_normal((4, width))).astype(np.float32)
        expected = np.log(np.exp(logits.astype(np.float64)).sum(-1))
        np.testing.assert_allclose(ops.log_sum_exp(logits), expected, rtol=1e-6)
    assert (ops.log_sum_exp(np.empty((2, 0), np.float32)) == -np.inf).all()


@settings(max_examples=200)
@given(kv_heads=st.integers(1, 3), group=st.integers(1, 5), dim=st.sampled_from([6, 8, 16, 24, 64]),
       block=st.sampled_from([3, 8, 16, 64]), blocks=st.permutations(range(6)),
       count=st.integers(1, 5), kv=st.sampled_from(['float32', 'bfloat16']),
       window=st.one_of(st.none(), st.integers(1, 100)), steps=st.lists(st.integers(1, 70), min_size=1, max_size=5),
       contiguous=st.booleans(), turned=st.integers(0, 3), scale=st.sampled_from([0.05, 0.2]),
       cap=st.sampled_from([None, 1.0, 30.0]), sinks=st.one_of(st.just(0), st.integers(1, 70)), seed=st.integers(0, 9))
def test_attention_is_that_of_the_reference_kernels_in_every_ring(
        kv_heads, group, dim, block, blocks, count, kv, window, steps, contiguous, turned, scale, cap, sinks, seed):
    """Rings whole or scattered, grown and wrapped, with pinned blocks; the reference kernels have a brute-force test."""
    rng = np.random.default_rng(seed)
    sinks = min(sinks, (count - 1) * block)  # some blocks go round
    pinned = pinned_blocks(sinks, block)
    ring = Ring(np.arange(count) if contiguous else np.array(blocks[:count], np.int64), block, pinned)
    caches = [LayerCache(*kernels.new_cache(kv_heads, 6 * block, dim, kv)) for kernels in (reference, ops)]
    groups, heads = tuple(range(i * group, (i + 1) * group) for i in range(kv_heads)), kv_heads * group
    for segment, seen in ring_steps(ring, steps, window, sinks):
        position, step = segment.start, len(segment.slots)
        qkv = rng.standard_normal((step, (heads + 2 * kv_heads) * dim)).astype(np.float32)
        rope = Rope(1e4, dim // turned // 2 * 2) if turned else None
        positions = np.arange(position, position + step)
        table = reference.rope_table(positions, positions + 1, rope) if turned else None
        found = []
        for kernels, cache in zip((reference, ops), caches, strict=True):
            q = np.ascontiguousarray(kernels.rope_append(qkv, heads, dim, table, cache, segment.slots))
            found.append(kernels.attend(q, cache, groups, (segment,), seen, scale, cap, sinks))
        np.testing.assert_allclose(found[1], found[0], atol=4e-6 if kv == 'float32' else 2e-2)


def test_attention_of_a_row_has_the_same_bits_alone_and_in_a_chunk():
    rng, dim, length = np.random.default_rng(6), 64, 150
    qkv = rng.standard_normal((length, 5 * dim)).astype(np.float32)
    for kv in ('float32', 'bfloat16'):
        for window, cap, sinks in ((None, None, 0), (37, None, 0), (37, 5.0, 7), (20, None, 64)):
            results = []
            for chunk in (length, 41, 1):
                cache, ring, rows = LayerCache(*ops.new_cache(1, 192, dim, kv)), Ring(np.arange(3), 64), []
                for at in range(0, length, chunk):
                    segment = ring.segment(0, at, min(chunk, length - at))
                    q = ops.rope_append(qkv[at:at + chunk], 3, dim, None, cache, segment.slots)
                    rows.append(ops.attend(q, cache, (range(3),), (segment,), window, 0.125, cap, sinks))
                results.append(np.concatenate(rows))
            np.testing.assert_array_equal(results[1], results[0])
            np.testing.assert_array_equal(results[2], results[0])


# ---- compiled where, and for what


def test_the_cache_folder_follows_sources_and_cpu_and_is_private_where_it_must_be(tmp_path, monkeypatch):
    chosen = jit.cache_folder({'TPMPI_CACHE_DIR': str(tmp_path / 'a')})
    assert chosen.parent == tmp_path / 'a' and chosen.is_dir()
    assert jit.cache_folder({'XDG_CACHE_HOME': str(tmp_path)}).parent == tmp_path / 'tpmpi'
    monkeypatch.setattr(jit, 'CPU', 'another')
    assert jit.cache_folder({'TPMPI_CACHE_DIR': str(tmp_path / 'a')}) not in (chosen, None)
    monkeypatch.setattr(jit.tempfile, 'gettempdir', lambda: str(tmp_path))
    (tmp_path / 'file').write_text('')  # a folder below a file cannot be made, not even by root
    monkeypatch.setenv('HOME', str(tmp_path / 'file'))
    private = jit.cache_folder({'TPMPI_CACHE_DIR': str(tmp_path / 'file')})
    assert private.parent == tmp_path / f'tpmpi-{os.getuid()}'
    assert stat.S_IMODE(private.parent.stat().st_mode) == 0o700
    private.parent.chmod(0o777)  # someone else could write machine code there
    assert jit.cache_folder({'TPMPI_CACHE_DIR': str(tmp_path / 'file')}).parent != private.parent


PROGRAM = '''
import json, sys
from tpmpi import api
llm = api.load(sys.argv[1], weights=sys.argv[2], threads=int(sys.argv[3]))
result = llm.generate(list(range(40)), max_new_tokens=6, ignore_eos=True, logprobs=3)
if llm.rank == 0:
    from tpmpi.kernels import jit
    print(json.dumps([[c.top for c in result.choices], jit.WIDTH, jit.PARALLEL, type(llm.engine.ops).__name__]))
'''


def answer(model, weights='bfloat16', size=1, threads=1, **variables):
    done = run_ranks(size, '-c', PROGRAM, model, weights, threads, env=environment(**variables), timeout=400)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def logprobs(found):
    return np.array([[logprob for _, logprob in top] for top in found])


@pytest.mark.parametrize(('model', 'weights'), [('literal', 'float32'), ('literal', 'bfloat16'), ('literal', 'int8'),
                                                ('experts', 'bfloat16'), ('experts', 'int8')])
def test_two_threads_give_the_bits_of_one(models, model, weights):
    path = models[model][0]
    (one, _, parallel, _), _ = answer(path, weights)
    (two, _, shared, _), _ = answer(path, weights, threads=2)
    assert (parallel, shared) == (False, True) and one == two


def test_a_cpu_without_vector_extensions_is_slower_and_never_wrong(models, tmp_path):
    path = models['literal'][0]
    (here, _, _, _), _ = answer(path, 'int8')
    (generic, width, _, _), _ = answer(path, 'int8', NUMBA_CPU_NAME='generic', TPMPI_CACHE_DIR=str(tmp_path))
    assert width == 4
    np.testing.assert_allclose(logprobs(generic), logprobs(here), atol=1e-4)


COMPILED_HERE = '''
import logging, sys
from tpmpi import api
from tpmpi.kernels import jit
logging.basicConfig(level=logging.INFO)
if sys.argv[2] == 'children die':
    jit.CHILD = 'import os; os.abort()'
llm = api.load(sys.argv[1])
ops = llm.engine.ops
misses = sum(sum(k.stats.cache_misses.values()) for k in (ops.products['float32'], *ops.units['float32'].kernels))
can_compile = 'numba.np.linalg' in sys.modules
everywhere = llm.session.comm.exchange(misses)
if llm.rank == 0:
    print(*everywhere)
    print('rank 0 can compile:', can_compile, file=sys.stderr)
'''


def test_children_compile_each_kernel_once_and_the_next_run_compiles_nothing(models, tmp_path):
    path, env = models['nine_heads'][0], environment(TPMPI_CACHE_DIR=str(tmp_path), TPMPI_MATRIX_UNITS='emulated')
    first = run_ranks(3, '-c', COMPILED_HERE, path, '', env=env)
    files = sorted(tmp_path.rglob('*.nbc'))
    assert first.stderr.count('compiling') == 1 and files
    assert first.stdout.split() == ['0'] * 3
    assert {f.suffix for f in tmp_path.rglob('*') if f.is_file()} <= {'.nbc', '.nbi', '.built'}
    stamps = [f.stat().st_mtime_ns for f in files]
    second = run_ranks(2, '-c', COMPILED_HERE, path, '', env=env)
    assert second.stdout.split() == ['0'] * 2 and 'compiling' not in second.stderr
    assert 'rank 0 can compile: False' in second.stderr  # what Numba takes longest to get ready is left out
    assert sorted(tmp_path.rglob('*.nbc')) == files and [f.stat().st_mtime_ns for f in files] == stamps


def test_a_kernel_for_experts_is_not_taken_for_the_one_of_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(jit, 'FOLDER', tmp_path)
    config = dataclasses.replace(CONFIGS['float32'], num_experts=4, experts_per_token=2, expert_ffn_size=64)
    needed = ops.needed(config, WEIGHT_KINDS, 'float32')
    for built, kernel in enumerate(needed):
        assert jit.missing(needed) == len(needed) - built
        jit._mark(kernel).touch()


def test_a_rank_whose_children_die_compiles_by_itself(models, tmp_path):
    env = environment(TPMPI_CACHE_DIR=str(tmp_path), TPMPI_MATRIX_UNITS='emulated')
    done = run_ranks(2, '-c', COMPILED_HERE, models['nine_heads'][0], 'children die', env=env)
    assert 3 <= sum(map(int, done.stdout.split())) <= 6, done.stderr  # a kernel of both may come from the other
    assert 'rank 0 can compile: True' in done.stderr


TWINS = '''
import math
from tpmpi.kernels import jit


def make(c):
    @jit.helper
    def long(x):
        y = x
        for _ in range(3):
            LINES
        return 0 * y + c
    return long


one, ten = make(1.0), make(10.0)


@jit.kernel('f8(f8)')
def first(x):
    return one(x)


@jit.kernel('f8(f8)')
def second(x):
    return ten(x)
'''.replace('LINES', '; '.join(['y = math.sin(y + c) * math.cos(y - c) + math.atan2(y, c)'] * 12))  # too long to be inlined


def test_kernels_that_several_processes_compiled_do_not_call_each_other_s_helpers(tmp_path):
    """Two helpers of one name, in kernels that two processes compile and a third one loads."""
    (tmp_path / 'twins.py').write_text(TWINS)
    program = 'import sys, twins; k = [getattr(twins, n) for n in sys.argv[1:]]; twins.jit.build(k); print(*(f(0.5) for f in k))'
    env = environment(TPMPI_CACHE_DIR=str(tmp_path / 'cache'), TPMPI_MATRIX_UNITS='none')
    env['PYTHONPATH'] = f'{tmp_path}{os.pathsep}{env["PYTHONPATH"]}'
    for names, expected in ((['first'], '1.0'), (['second'], '10.0'), (['first', 'second'], '1.0 10.0')):
        done = subprocess.run([sys.executable, '-c', program, *names], capture_output=True, text=True, env=env)
        assert done.stdout.strip() == expected, done.stderr


ANOTHER = '''
from tpmpi.kernels import elementwise, jit
jit.build([elementwise.log_sum_exp])
print(jit.__file__, jit.FOLDER.name, sum(elementwise.log_sum_exp.stats.cache_misses.values()))
'''


def test_a_copy_of_the_package_finds_the_machine_code_until_a_helper_is_edited(tmp_path):
    env = environment(TPMPI_CACHE_DIR=str(tmp_path / 'cache'))

    def compiled(**variables):
        done = subprocess.run([sys.executable, '-c', ANOTHER], capture_output=True, text=True, env=env | variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    source, folder, misses = compiled()
    copy = shutil.copytree(Path(source).parents[1], tmp_path / 'copy' / 'tpmpi', copy_function=shutil.copyfile)
    elsewhere = {'PYTHONPATH': f'{copy.parent}{os.pathsep}{env["PYTHONPATH"]}'}
    assert misses == '1' and compiled(**elsewhere) == [str(copy / 'kernels' / 'jit.py'), folder, '0']
    rows = copy / 'kernels' / 'rows.py'  # of which log_sum_exp calls a helper
    rows.write_text(rows.read_text() + '# edited\n')
    _, another, misses = compiled(**elsewhere)
    assert another != folder and misses == '1'


def test_without_numba_the_reference_kernels_run_with_one_warning(models, tmp_path):
    (tmp_path / 'numba.py').write_text('raise ImportError("not here")')
    env = environment()
    env['PYTHONPATH'] = f'{tmp_path}{os.pathsep}{env["PYTHONPATH"]}'
    run = ('-m', 'tpmpi.run', '--model', models['literal'][0], '--prompt', 'abc', '--max-new-tokens', 5)
    done = run_ranks(2, *run, env=env)
    assert done.returncode == 0 and done.stderr.count('Numba') == 1 and 'pip install numba' in done.stderr
    asked = run_ranks(2, *run, '--kernels', 'cpu', env=env)
    assert asked.returncode == 1 and len(asked.stderr.splitlines()) == 1 and 'pip install numba' in asked.stderr
    assert run_ranks(2, *run, '--kernels', 'reference').stdout == done.stdout


def test_nothing_of_numba_is_loaded_for_the_reference_kernels(models):
    program = 'import sys; from tpmpi import api; api.load(sys.argv[1], kernels="reference"); print("numba" in sys.modules)'
    command = [sys.executable, '-c', program, models['literal'][0]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.stdout.strip() == 'False', done.stderr


# ---- where arrays lie


def test_an_arena_gives_zeros_on_lines_that_nobody_else_has():
    arena, rng = Arena(), np.random.default_rng(0)
    arrays = [arena.zeros((int(rng.integers(1, 300)), 7), kind, 64) for kind in (np.float32, np.uint16, np.uint8) * 20]
    arrays.append(arena.zeros((BLOCK + 5,), np.uint8))  # more than is asked for at once
    arrays.append(arena.zeros((3,), np.float32))
    for number, array in enumerate(arrays):
        assert array.ctypes.data % LINE == 0 and array.flags.c_contiguous and not array.any()
        array[:] = number % 100 + 1
    for number, array in enumerate(arrays):
        assert (array == number % 100 + 1).all()


@pytest.mark.parametrize('threads', [2, 3])
def test_rows_are_the_same_on_any_number_of_threads(threads):
    """Norms, activations, RoPE and the cache; 37 rows, of which neighbours write into the same pairs of V."""
    shared, rng, dim = Kernels(threads, units=False), np.random.default_rng(8), 24
    x, part, gain = (rng.standard_normal(shape).astype(np.float32) for shape in ((37, 70), (37, 70), (70,)))
    qkv, table = rng.standard_normal((37, 5 * dim)).astype(np.float32), rng.standard_normal((37, 1, dim)).astype(np.float32)
    results = []
    for kernels in (ops, shared):
        cache, mine = LayerCache(*kernels.new_cache(1, 64, dim, 'bfloat16')), part.copy()
        ring = Ring(np.array([1, 0]), 32)
        q = kernels.rope_append(qkv, 3, dim, (table, table), cache, ring.segment(0, 5, 37).slots)
        results.append([kernels.rms_norm(x, gain, 1e-5), kernels.layer_norm(x, gain, None, 1e-5), q, cache.k, cache.v,
                        kernels.added_norm(x, mine, 'rms', gain, None, 1e-5), mine, kernels.gated_activation(x, 'silu'),
                        kernels.activate(x, 'gelu')])
    for one, many in zip(*results, strict=True):
        np.testing.assert_array_equal(many, one)
