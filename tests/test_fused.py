"""All layers at once: the bits of all_layers, which the tests of models compare with float64 and with transformers."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import tiny
from ranks import ROOT, run_program, run_ranks

pytest.importorskip('numba', reason='Numba is not installed: pip install numba')

from tpmpi.kernels import jit  # noqa: E402
from tpmpi.kernels.layers import call  # noqa: E402


@jit.kernel('void(i8)')
def too_large(x):
    if x > 2:
        raise MemoryError


@jit.kernel('i8(i8, i8)')
def caller(address, x):
    call(address, (x,))
    return x


def test_an_error_of_a_kernel_called_at_its_address_is_one_of_its_caller(monkeypatch, tmp_path):
    monkeypatch.setattr(jit, 'FOLDER', tmp_path)
    jit.build([too_large, caller])
    assert caller(jit.address_of(too_large), 2) == 2
    with pytest.raises(MemoryError):
        caller(jit.address_of(too_large), 3)


USUAL = {
    'nine_heads': tiny.NINE_HEADS, 'groups': tiny.GROUPS,
    'biases': dataclasses.replace(tiny.NINE_HEADS, qkv_bias=True, attn_out_bias=True, mlp_bias=True, activation='gelu_tanh'),
    'norms': dataclasses.replace(tiny.GROUPS, qk_norm='head', attention_softcap=2.0, attention_scale=0.3, rotary_dim=16),
    'window': dataclasses.replace(tiny.NINE_HEADS, window=11, rope_theta=None, tie_embeddings=True),
    'two windows': dataclasses.replace(tiny.NINE_HEADS, window=7, window_layers=(1,)),
    'two ropes': dataclasses.replace(tiny.GROUPS, num_layers=3, nope_layers=(1,), query_growth=0.8, query_growth_positions=5),
    'capped': tiny.CAPPED,  # with three layers, two windows, two ropes, a multiplier of sums
    'layer_norm': dataclasses.replace(tiny.BIASED, parallel_block=False, parallel_mlp_norm=False, num_layers=3),
    'parallel': dataclasses.replace(tiny.PARALLEL, num_layers=3, norm='layer', residual_multiplier=0.6),  # an odd number of sums
    'two norms': tiny.BIASED,
    # columns for each of four ranks, since with a mixture all go one way
    'experts': dataclasses.replace(tiny.EXPERTS, ffn_size=260, expert_ffn_size=258, shared_ffn_size=300, shared_gate=False),
    'experts alone': dataclasses.replace(tiny.EXPERTS, hidden_size=64, head_dim=32, qk_norm='head', dense_layers=(),
                                         expert_ffn_size=256, normalize_experts=False, shared_ffn_size=0, shared_gate=False)}
OTHERS = {'norms behind': tiny.POST_NORM, 'gated experts': tiny.EXPERTS, 'literal': tiny.LITERAL}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('fused')
    for name, config in (*USUAL.items(), *OTHERS.items()):
        tiny.write_model(folder / f'{name}.h5', dataclasses.replace(config, max_positions=64))
    return folder


def cases(files, *names, **options):
    return [{'model': str(files / f'{name}.h5'), 'context': 20, **options} for name in names]


@pytest.mark.parametrize(('size', 'requests', 'threads', 'all_parts'), [
    (1, 1, 1, 65536), (2, 1, 1, 65536), (4, 4, 1, 65536), (3, 17, 1, 1024), (1, 3, 2, 65536)])  # small sums, and large ones
def test_bits_and_sums_are_those_of_layers_one_by_one(files, size, requests, threads, all_parts):
    asked = cases(files, *USUAL, threads=threads)
    for kind in ('int8', 'int4', 'bfloat16'):
        asked += cases(files, 'groups', 'experts alone', weights=kind, threads=threads)
    asked += cases(files, 'norms', 'window', 'capped', kv='bfloat16', threads=threads)
    found = run_program('fused.py', size, json.dumps({'requests': requests, 'all_parts': all_parts, 'cases': asked}), timeout=600)
    for case, (at_once, steps) in zip(asked, found, strict=True):
        if requests <= 4:  # more may go to matrix units
            assert max(at_once) >= steps - 1, case  # a rank without columns of the MLP goes one by one


@pytest.mark.parametrize(('requests', 'options'), [(2, {'collective': 'mpi'}), (17, {'nodes': 2})])
def test_sums_that_need_messages(files, requests, options):
    asked = cases(files, 'nine_heads', 'biases', 'groups', 'capped', 'parallel', 'two norms', 'experts', threads=1, **options)
    found = run_program('fused.py', 4, json.dumps({'requests': requests, 'all_parts': 65536, 'cases': asked}), timeout=600)
    assert requests > 4 or all(max(at_once) == steps for at_once, steps in found)


def test_where_ranks_choose_other_experts_a_step_is_computed_once_more(files):
    """As all_layers does it, where rank 0's choice counts, which tests of the model compare with float64."""
    asked = {'requests': 2, 'all_parts': 65536, 'cases': cases(files, 'experts', 'experts alone', threads=1, shaken=True)}
    for at_once, steps in run_program('fused.py', 2, json.dumps(asked), timeout=600):
        assert at_once == [steps] * 2


def test_other_layers_go_one_by_one(files):
    asked = {'requests': 1, 'all_parts': 65536, 'cases': cases(files, *OTHERS, threads=1)}
    found = run_program('fused.py', 2, json.dumps(asked), timeout=600)
    assert [at_once for at_once, _ in found] == [[0, 0]] * len(OTHERS)


@pytest.mark.parametrize('activations', ['bfloat16', 'int8'])
def test_rounded_activations(files, activations):
    asked = [case for kind in ('int8', 'bfloat16') for case in cases(files, 'groups', weights=kind, activations=activations,
                                                                     threads=1)]
    found = run_program('fused.py', 2, json.dumps({'requests': 2, 'all_parts': 65536, 'cases': asked}), timeout=600)
    for case, (at_once, steps) in zip(asked, found, strict=True):
        apart = case['weights'] == activations == 'bfloat16' and not jit.HAS_PAIRS  # x is rounded by a kernel of its own
        assert at_once == [0, 0] if apart else min(at_once) >= steps - 1, case


def test_what_it_gives_is_measured_with_one_command(files):
    done = run_ranks(2, ROOT / 'data' / 'compare_layers.py', '--model', files / 'groups.h5', '--weights', 'int8', '--rounds', 2,
                     '--prompt-tokens', 9, '--new-tokens', 6, text=True)
    assert re.fullmatch(r'one by one [\d,]+ us, in one call [\d,]+ us; ratios \d+\.\d\d, \d+\.\d\d\n', done.stdout), done.stderr
