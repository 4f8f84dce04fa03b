"""The measurement of a GPU: its random model, its runs and its table; on the stand-in for CuPy, whose speed means nothing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys

import cuda_device
import pytest
from ranks import ROOT, environment, mpirun

from tpmpi import bench

spec = importlib.util.spec_from_file_location('measure_gpu', ROOT / 'data' / 'measure_gpu.py')
measure = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measure)


def test_every_kind_meets_every_collective_and_a_run_that_fails_is_a_line(capsys):
    asked, found = [], dict.fromkeys(measure.COLUMNS, 1234.5678) | {'collective': 'none', 'device': 'cuda:0 A GPU'}

    def run(command):
        asked.append(command)
        assert bench.parse(command[command.index('tpmpi.bench') + 1:]).device == 'cuda'
        return found if 'int4' not in command else {'failed': 'a | b'}

    options = ['--shape', 'tiny', '--ranks', '4', '--collectives', 'mpi', 'nccl']
    assert measure.main(options, run) == 1
    assert [(c[c.index('--weights') + 1], c[c.index('--collective') + 1], c[2], c[c.index('--random') + 1]) for c in asked] == [
        (kind, collective, '4', 'tiny') for kind in ('bfloat16', 'int8', 'int4') for collective in ('mpi', 'nccl')]
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert title == 'cuda:0 A GPU, 4 ranks, tiny, batch 1: 512 + 64 tokens'
    assert rows[2] == '| bfloat16 | none' + ' | 1235' * 7 + ' |' and rows[-1] == '| int4 | nccl | a \\| b |'
    assert measure.main([*options, '--kinds', 'int8', '--model', 'm.h5'], run) == 0
    assert asked[-1][asked[-1].index('--model') + 1] == 'm.h5' and '--random' not in asked[-1]


@pytest.mark.skipif(shutil.which('g++') is None, reason='no g++: the kernels cannot be run on the CPU')
def test_as_a_command():
    env = environment(FAKE_CUDA_DEVICES='2', PATH=os.pathsep.join([os.path.dirname(mpirun()), os.environ['PATH']]))
    env['PYTHONPATH'] = os.pathsep.join([str(cuda_device.STAND_IN), env['PYTHONPATH']])
    command = [sys.executable, ROOT / 'data' / 'measure_gpu.py', '--shape', 'tiny', '--ranks', '2',
               '--kinds', 'int8', '--collectives', 'staged', 'mpi', '--prompt-tokens', '9', '--new-tokens', '3']
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    rows = done.stdout.splitlines()
    assert done.returncode == 1 and 'Fake GPU 0, 2 ranks' in rows[0], done.stderr
    assert rows[-2].startswith('| int8 | staged | ') and rows[-2].count('|') == 10
    assert rows[-1].startswith('| int8 | mpi | tpmpi: collective mpi: ')
    assert rows[-2].split(' | ')[6] == '9'  # launches: graphs around 5 sums, and 3 kernels of the head
