"""The measurement of a GPU: its random model, its runs and its table; on the stand-in for CuPy, whose speed means nothing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys

import cuda_device
import numpy as np
import pytest
from ranks import ROOT, environment, mpirun

from tpmpi import bench
from tpmpi.checkpoint import CheckpointReader
from tpmpi.sharding import tensor_specs

spec = importlib.util.spec_from_file_location('measure_gpu', ROOT / 'data' / 'measure_gpu.py')
measure = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measure)


def test_the_random_model_is_of_the_shape_and_its_weights_are_spread_around_zero(tmp_path):
    config = measure.SHAPES['small']
    measure.write_random(tmp_path / 'm.h5', config)
    with CheckpointReader(tmp_path / 'm.h5') as reader:
        assert reader.config == config
        for name, facts in tensor_specs(config).items():
            stored = reader.read_rows(name, range(facts.shape[0]))
            assert stored.shape == facts.shape and (reader.kind(name) == 'bfloat16' or not facts.is_matrix)
            if facts.is_matrix:
                values = (stored.data.astype(np.uint32) << 16).view(np.float32)
                assert abs(values.mean()) < 2e-3 and 0.018 < values.std() < 0.022


def test_the_large_shape_has_8_billion_weights():
    assert 7.9e9 < sum(np.prod(facts.shape, dtype=float) for facts in tensor_specs(measure.SHAPES['8b']).values()) < 8.1e9


def test_every_kind_meets_every_collective_and_a_run_that_fails_is_a_line(tmp_path, capsys):
    asked, found = [], dict.fromkeys(measure.COLUMNS, 1234.5678) | {'collective': 'none', 'device': 'cuda:0 A GPU'}

    def run(command):
        asked.append(command)
        assert bench.parse(command[command.index('tpmpi.bench') + 1:]).device == 'cuda'
        return found if 'int4' not in command else {'failed': 'a | b'}

    options = ['--folder', str(tmp_path), '--shape', 'small', '--ranks', '4', '--collectives', 'mpi', 'nccl']
    assert measure.main(options, run) == 1
    assert [(c[c.index('--weights') + 1], c[c.index('--collective') + 1], c[2]) for c in asked] == [
        (kind, collective, '4') for kind in ('bfloat16', 'int8', 'int4') for collective in ('mpi', 'nccl')]
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert title == 'cuda:0 A GPU, 4 ranks, random-small.h5, batch 1: 512 + 64 tokens'
    assert rows[2] == '| bfloat16 | none' + ' | 1235' * 6 + ' |' and rows[-1] == '| int4 | nccl | a \\| b |'
    before = (tmp_path / 'random-small.h5').stat().st_mtime_ns
    assert measure.main([*options, '--kinds', 'int8'], run) == 0 and (tmp_path / 'random-small.h5').stat().st_mtime_ns == before


@pytest.mark.skipif(shutil.which('g++') is None, reason='no g++: the kernels cannot be run on the CPU')
def test_as_a_command(tmp_path):
    env = environment(FAKE_CUDA_DEVICES='2', PATH=os.pathsep.join([os.path.dirname(mpirun()), os.environ['PATH']]))
    env['PYTHONPATH'] = os.pathsep.join([str(cuda_device.STAND_IN), env['PYTHONPATH']])
    command = [sys.executable, ROOT / 'data' / 'measure_gpu.py', '--shape', 'small', '--folder', tmp_path, '--ranks', '2',
               '--kinds', 'int8', '--collectives', 'staged', 'mpi', '--prompt-tokens', '9', '--new-tokens', '3']
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    rows = done.stdout.splitlines()
    assert done.returncode == 1 and 'Fake GPU 0, 2 ranks' in rows[0], done.stderr
    assert rows[-2].startswith('| int8 | staged | ') and rows[-2].count('|') == 9
    assert rows[-1].startswith('| int8 | mpi | tpmpi: collective mpi: ')
    assert rows[-2].split(' | ')[5] == '22'  # launches: 8 in each of 2 layers, and 6
