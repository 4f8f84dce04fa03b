"""The whole model on the CUDA kernels, under real MPI: a strict stand-in for CuPy runs the sources on the CPU; -m gpu: a GPU."""

from __future__ import annotations

import json
import os
import shutil

import cuda_device
import numpy as np
import pytest
import tiny
from programs.shards import TOKENS
from ranks import environment, run_program, run_ranks


@pytest.mark.skipif(shutil.which('g++') is None, reason='no g++: the kernels cannot be run on the CPU')
@pytest.mark.parametrize(('size', 'collective'), [(1, 'mpi'), (2, 'mpi'), (3, 'staged')])
def test_shards_give_the_whole_model_s_logits_and_nothing_waits_but_the_all_reduce(models, tmp_path, size, collective):
    """An all-reduce before its sum is computed, a buffer used too early or a hidden copy fails in the stand-in."""
    path, config = tmp_path / 'float16.h5', models['nine_heads'][1]
    models = models | {'float16': (path, config, tiny.write_model(path, config, 'float16'))}
    reports = run_program('cuda_model.py', size, tmp_path / 'out.npz', collective, *(path for path, _, _ in models.values()),
                          timeout=300)
    found = np.load(tmp_path / 'out.npz')
    assert (reports['experts_shaken']['broadcasts'] > 0) == (size > 1) and reports['experts']['broadcasts'] == 0
    np.testing.assert_allclose(found['experts_shaken'], found['experts'], atol=1e-5)  # ranks that differ take rank 0's choice
    for name, (_, config, tensors) in models.items():
        expected = tiny.oracle_logits(tensors, config, TOKENS)
        np.testing.assert_allclose(found[name], expected, atol=5e-5 * np.abs(expected).max(), err_msg=name)
        sums = reports[name]['to_host']
        assert sums == 0 if collective == 'mpi' or size == 1 else sums >= 1 + config.num_layers
        assert reports[name]['to_device'] == 1 + sums or config.num_experts  # the step's numbers, and what is staged
        looks = {'item': 1} if config.num_experts and size > 1 else {}  # whether all ranks chose the same experts, once a step
        assert reports[name]['hidden'] == looks or 'shaken' in name
    assert any('float16' in kernel for kernel in reports['float16']['launches'])
    assert sum(reports['nine_heads']['launches'].values()) == 8 * config.num_layers + 3  # embedding, RoPE's table, first norm


@pytest.mark.skipif(shutil.which('g++') is None, reason='no g++: the kernels cannot be run on the CPU')
@pytest.mark.parametrize('options', [
    ['--collective', 'staged'],
    ['--collective', 'mpi', '--weights', 'int8', '--kv', 'float32', '--temperature', '0.7', '--top-k', '9', '--logprobs', '2']])
def test_the_command_on_two_gpus_gives_the_tokens_of_the_cpu(options):
    tokens, env = [], environment(FAKE_CUDA_DEVICES='2', TPMPI_TRUST_GPU_MPI='1')
    env['PYTHONPATH'] = os.pathsep.join([str(cuda_device.STAND_IN), env['PYTHONPATH']])
    for device in (['--device', 'cuda', *options], ['--device', 'cpu', *options[2:]]):
        done = run_ranks(2, '-m', 'tpmpi.run', '--max-new-tokens', 12, '--json', *device, env=env)
        assert done.returncode == 0, done.stderr
        tokens.append(json.loads(done.stdout)['tokens'])
        if device[1] == 'cuda':
            assert f'all-reduce of GPU memory: {options[1]} ' in done.stderr and 'rank 1: ' in done.stderr
    assert tokens[0] == tokens[1] and len(tokens[0]) == 12


@pytest.mark.gpu
def test_shards_on_real_gpus_give_the_whole_model_s_logits(models, tmp_path):
    """As many ranks as there are GPUs, up to 4, their sums over the host."""
    with cuda_device.device('gpu') as cupy:
        size = min(4, cupy.cuda.runtime.getDeviceCount())
    run_program('cuda_model.py', size, tmp_path / 'out.npz', 'staged', *(path for path, _, _ in models.values()),
                timeout=600, env=environment(TPMPI_TEST_GPU='1'))
    found = np.load(tmp_path / 'out.npz')
    for name, (_, config, tensors) in models.items():
        expected = tiny.oracle_logits(tensors, config, TOKENS)
        np.testing.assert_allclose(found[name], expected, atol=5e-5 * np.abs(expected).max(), err_msg=name)
