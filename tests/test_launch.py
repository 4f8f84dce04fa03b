"""What the launcher gave, from environments and files that were seen."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpmpi import launch

ROOT = Path(__file__).resolve().parents[1]
HOST = socket.gethostname()
PHASES = ('load', 'prefill', 'decode', 'finish')


# ---------------------------------------------------------------------------------------------------------- the world

HYDRA = {'PMI_RANK': '0', 'MPI_LOCALRANKID': '0', 'PMI_FD': '9'}
STEP = {'SLURM_JOB_ID': '7', 'SLURM_STEP_ID': '0', 'SLURM_PROCID': '0'}
PRTE = {'OMPI_COMM_WORLD_RANK': '0', 'PMIX_RANK': '0', 'PRTE_LAUNCHED': '1'}


@pytest.mark.parametrize('environ', [
    {},
    {'SLURM_JOB_ID': '5', 'SLURM_NPROCS': '4', 'SLURM_NTASKS': '4'},  # a plain program in salloc or in a batch script
    HYDRA | {'PMI_SIZE': '1', 'MPI_LOCALNRANKS': '1'},
    PRTE | {'OMPI_COMM_WORLD_SIZE': '1', 'OMPI_UNIVERSE_SIZE': '4'},
    STEP | {'SLURM_STEP_NUM_TASKS': '1'},
    STEP | {'SLURM_STEP_NUM_TASKS': '1', 'PMI_SIZE': '1', 'PMI_JOBID': '7.0'},
    STEP | HYDRA | {'PMI_SIZE': '1', 'SLURM_STEP_NUM_TASKS': '2', 'SLURM_NTASKS': '2'},  # mpirun -n 1, 2 nodes
    PRTE | {'OMPI_COMM_WORLD_SIZE': '1', 'PMI_SIZE': '2'},  # mpirun -n 1 inside each task of srun --mpi=pmi2 -n2
    {'PMI_SIZE': 'two'},
])
def test_one_rank_is_what_was_asked_for(environ):
    launch.check_world(1, environ)


@pytest.mark.parametrize(('environ', 'name', 'started'), [
    (STEP | {'SLURM_STEP_NUM_TASKS': '2'}, 'SLURM_STEP_NUM_TASKS', 2),  # srun without --mpi
    (STEP | {'SLURM_STEP_NUM_TASKS': '3', 'PMIX_RANK': '0'}, 'SLURM_STEP_NUM_TASKS', 3),  # srun --mpi=pmix, MPICH
    (STEP | {'SLURM_STEP_NUM_TASKS': '2', 'PMI_SIZE': '2'}, 'PMI_SIZE', 2),  # srun --mpi=pmi2, Open MPI
    (HYDRA | {'PMI_SIZE': '2', 'MPI_LOCALNRANKS': '2'}, 'PMI_SIZE', 2),  # MPICH's mpirun, Open MPI
    (PRTE | {'OMPI_COMM_WORLD_SIZE': '4'}, 'OMPI_COMM_WORLD_SIZE', 4),  # Open MPI's mpirun, MPICH
    (STEP | HYDRA | {'SLURM_STEP_NUM_TASKS': '1', 'PMI_SIZE': '2'}, 'PMI_SIZE', 2),  # MPICH's mpirun on one node
])
def test_alone_where_more_were_started(environ, name, started):
    with pytest.raises(launch.LaunchError, match=f'started {started} .*{name}.*--mpi=pmi2.*--mpi=pmix') as caught:
        launch.check_world(1, environ)
    assert '\n' not in str(caught.value)
    launch.check_world(2, environ)


# -------------------------------------------------------------------------------------------------- cores and threads


def test_cores():
    assert launch.cores() == frozenset(os.sched_getaffinity(0))


@pytest.mark.parametrize(('membership', 'files', 'quota'), [
    ('0::/\n', {}, None),
    ('0::/job/step\n', {'job/step/cpu.max': 'max 100000', 'job/cpu.max': '150000 100000', 'cpu.max': 'max'}, 1.5),
    ('0::/job/step\n', {'job/step/cpu.max': '50000 100000', 'job/cpu.max': '150000 100000'}, 0.5),
    ('0::/seen/from/outside\n', {'cpu.max': '400000 100000'}, 4.0),  # a container's own root
    ('0::/../other\n', {'cpu.max': '200000 100000'}, 2.0),
    ('0::/job\n', {'job/cpu.max': 'nonsense'}, None),
    ('5:cpu,cpuacct:/box\n3:cpuset:/elsewhere\n',
     {'cpu,cpuacct/box/cpu.cfs_quota_us': '300000', 'cpu,cpuacct/box/cpu.cfs_period_us': '100000',
      'cpuset/elsewhere/cpu.max': '1 1'}, 3.0),
    ('5:cpu,cpuacct:/box\n', {'cpu/cpu.cfs_quota_us': '25000', 'cpu/cpu.cfs_period_us': '50000'}, 0.5),
    ('5:cpu:/\n', {'cpu/cpu.cfs_quota_us': '-1', 'cpu/cpu.cfs_period_us': '100000'}, None),
    ('1:cpu:/\n0::/job\n', {'unified/job/cpu.max': '100000 100000', 'cpu/cpu.cfs_quota_us': '-1'}, 1.0),
])
def test_cpu_quota(tmp_path, membership, files, quota):
    (tmp_path / 'cgroup').write_text(membership)
    for name, content in files.items():
        path = tmp_path / 'fs' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + '\n')
    assert launch.cpu_quota(str(tmp_path / 'cgroup'), str(tmp_path / 'fs')) == quota


def test_cpu_quota_without_cgroups(tmp_path):
    assert launch.cpu_quota(str(tmp_path / 'none'), str(tmp_path)) is None


def fair(*masks, quota=None, environ=None):
    masks = [frozenset(mask) for mask in masks]
    return [launch.fair_threads(masks, rank, quota, environ or {}) for rank in range(len(masks))]


def test_fair_threads():
    assert fair(range(8)) == [8]
    assert fair(range(8), range(8), range(8)) == [2, 2, 2]
    assert fair(range(4), range(4, 8)) == [4, 4]  # pinned
    assert fair(range(2), range(2), range(2), range(2)) == [1, 1, 1, 1]
    assert fair(range(4), range(8)) == [2, 6]
    assert fair({0}, {1}, range(6)) == [1, 1, 4]
    assert fair(range(0, 64, 2), range(1, 64, 2)) == [32, 32]


def test_fair_threads_within_the_limits():
    assert fair(range(8), range(8), quota=4.0) == [2, 2]
    assert fair(range(8), range(8), quota=3.9) == [1, 1]
    assert fair(range(8), range(8), quota=0.5) == [1, 1]
    assert fair(range(8), environ={'SLURM_CPUS_PER_TASK': '2'}) == [8]  # in salloc's shell
    assert fair(range(8), environ={'SLURM_STEP_ID': '0', 'SLURM_CPUS_PER_TASK': '2'}) == [2]
    assert fair(range(8), environ={'SLURM_STEP_ID': '0', 'SRUN_CPUS_PER_TASK': '3'}) == [3]
    assert fair(range(8), environ={'SLURM_STEP_ID': '0', 'SLURM_CPUS_PER_TASK': '1', 'SRUN_CPUS_PER_TASK': '4'}) == [1]
    assert fair(range(8), environ={'SLURM_STEP_ID': '0', 'SLURM_CPUS_PER_TASK': '16'}) == [8]
    assert fair(range(8), environ={'OMP_NUM_THREADS': '1'}) == [8]


@given(st.lists(st.frozensets(st.integers(0, 11), min_size=1), min_size=1, max_size=8),
       st.none() | st.floats(0.1, 16))
def test_threads_never_exceed_the_cores(masks, quota):
    threads = fair(*masks, quota=quota)
    assert min(threads) >= 1
    assert all(count <= len(mask) for count, mask in zip(threads, masks, strict=True))
    assert sum(threads) <= max(len(masks), len(frozenset().union(*masks)))
    if quota is not None:
        assert sum(threads) <= max(len(masks), quota)


def run_python(program: str) -> str:
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, timeout=180,
                          env=os.environ | {'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_blas_threads_before_numpy():
    assert run_python("""
import os, sys
from tpmpi.launch import THREAD_VARIABLES, set_blas_threads
assert not {'numpy', 'mpi4py'} & set(sys.modules)
print(set_blas_threads(1), {os.environ[name] for name in THREAD_VARIABLES})
import numpy
a = numpy.ones((512, 512)) @ numpy.ones((512, 512))
print(len(os.listdir('/proc/self/task')))
""") == "True {'1'}\n1"


def test_blas_threads_after_numpy():
    name, held, threads = run_python("""
import os, sys
os.environ['OPENBLAS_NUM_THREADS'] = '2'
import numpy
from tpmpi.launch import set_blas_threads
print(numpy.show_config(mode='dicts')['Build Dependencies']['blas']['name'], set_blas_threads(1))
a = numpy.ones((2000, 2000), dtype='f4')
before = os.times()
for _ in range(3):
    a @ a
after = os.times()
print((after.user - before.user) / (after.elapsed - before.elapsed))
""").split()
    if 'openblas' not in name:
        pytest.skip(f'NumPy was built with {name}')
    assert held == 'True'
    assert float(threads) < 1.3
