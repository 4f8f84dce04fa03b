"""The job scripts and the watch over ranks on a real two-node Slurm.  Run with: pytest -m slurm"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import tiny
from ranks import PROGRAMS, ROOT, mpirun
from slurm_cluster import Cluster, missing

pytestmark = pytest.mark.slurm
JOBS = ROOT / 'jobs'


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    if missing():
        pytest.skip(missing())
    with Cluster(tmp_path_factory.mktemp('slurm')) as running:
        running.env['PYTHON'] = sys.executable
        running.env['PATH'] = f'{Path(mpirun()).parent}:{running.env["PATH"]}'
        for name in ('OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS', 'OMP_NUM_THREADS'):
            running.env.pop(name, None)
        yield running


@pytest.fixture(scope='module')
def reciter(tmp_path_factory):
    path = tmp_path_factory.mktemp('reciter') / 'reciter.h5'
    tiny.write_reciter(path, 'xé日🎉!')
    return path


def outputs(folder: Path, number: str) -> tuple[str, str]:
    """A job's standard output and standard error."""
    return tuple(next(iter(folder.glob(f'*-{number}.{kind}'))).read_text() for kind in ('out', 'err'))


@pytest.mark.parametrize(('script', 'options', 'ranks'), [
    ('cpu_one_node.sbatch', [], 2), ('cpu_nodes.sbatch', [], 2),
    ('cpu_nodes.sbatch', ['--ntasks-per-node=2', '--cpus-per-task=1'], 4), ('gpu_nodes.sbatch', [], 4)])
def test_a_script_runs_as_it_stands(cluster, reciter, tmp_path, script, options, ranks):
    """The GPU script too, on the CPU: its GPUs are null devices here, enough for Slurm."""
    number = cluster.submit(*options, JOBS / script, '--model', reciter, '--prompt', 'x', cwd=tmp_path,
                            env={'TPMPI_DEVICE': 'cpu'})
    job = cluster.finish(number)
    out, err = outputs(tmp_path, number)
    assert job['JobState'] == 'COMPLETED', err
    assert out == 'é日🎉!\n' and f'tpmpi [0/{ranks}] done: ' in err and f'{ranks} ranks x' in err


def test_threads_are_the_cores_of_the_task(cluster, reciter, tmp_path):
    number = cluster.submit('--cpus-per-task=2', '--ntasks-per-node=1', '--nodes=1', JOBS / 'cpu_nodes.sbatch',
                            '--model', reciter, '--prompt', 'x', cwd=tmp_path)
    assert cluster.finish(number)['JobState'] == 'COMPLETED'
    assert f'1 rank x {min(2, len(os.sched_getaffinity(0)))} thread' in outputs(tmp_path, number)[1]


def test_a_checkpoint_is_converted_in_a_job(cluster, tmp_path):
    pytest.importorskip('safetensors')
    source = ROOT / 'tests/references/tiny_llama'
    number = cluster.submit(JOBS / 'convert.sbatch', source, tmp_path / 'model.h5', cwd=tmp_path)
    assert cluster.finish(number)['JobState'] == 'COMPLETED' and (tmp_path / 'model.h5').exists()


def test_mpirun_in_an_allocation(cluster, reciter, tmp_path):
    """Two ranks on each node; MPICH starts its helpers through srun, whose count of tasks is that of nodes."""
    number = cluster.submit('--nodes=2', '--ntasks-per-node=2', '--error=x-%j.err', '--output=x-%j.out', '--wrap',
                            f'{mpirun()} -n 4 {sys.executable} -m tpmpi.run --model {reciter} --prompt x', cwd=tmp_path)
    job = cluster.finish(number)
    out, err = outputs(tmp_path, number)
    assert job['JobState'] == 'COMPLETED', err
    assert out == 'é日🎉!\n' and '4 ranks x' in err


def test_srun_without_the_library_s_pmi_is_refused(cluster, reciter, tmp_path):
    number = cluster.submit(JOBS / 'cpu_nodes.sbatch', '--model', reciter, '--prompt', 'x', cwd=tmp_path,
                            env={'TPMPI_MPI': 'none'})
    assert cluster.finish(number)['JobState'] == 'FAILED'
    out, err = outputs(tmp_path, number)
    assert out == '' and 'launcher and MPI library do not match' in err and 'srun --mpi=pmi2' in err


@pytest.mark.parametrize('how', ['kill', 'exit3', 'raise'])
def test_a_rank_lost_on_the_other_node_ends_the_job(cluster, reciter, tmp_path, how):
    (tmp_path / 'pids').mkdir()
    start = time.monotonic()
    number = cluster.submit(
        '--nodes=2', '--ntasks-per-node=1', '--error=x-%j.err', '--output=x-%j.out', '--wrap',
        f'srun --mpi=pmi2 --kill-on-bad-exit=1 {sys.executable} {PROGRAMS}/fail.py 1 decode {how} --model {reciter} --prompt x',
        cwd=tmp_path, env={'TPMPI_TEST_PIDS': str(tmp_path / 'pids')})
    job = cluster.finish(number, 60)
    err = outputs(tmp_path, number)[1]
    messages = [line for line in err.splitlines() if line.startswith('tpmpi: ')]
    assert job['JobState'] == 'FAILED' and len(messages) == 1, err
    assert messages[0].startswith('tpmpi: rank 1 on node2 ' + ('failed' if how == 'raise' else 'was lost') + ' during decode')
    assert time.monotonic() - start < 30


def test_a_node_without_power_is_noticed(cluster, models, tmp_path):
    """No connection is closed: the kernel's probes find out.  The job is put back in the queue by Slurm, and cancelled."""
    number = cluster.submit(
        '--nodes=2', '--ntasks-per-node=1', '--error=x-%j.err', '--output=x-%j.out', '--no-requeue', '--wrap',
        f'srun --mpi=pmi2 --kill-on-bad-exit=1 {sys.executable} -m tpmpi.run --model {models["nine_heads"][0]} --prompt x '
        f'--context 64 --max-new-tokens 10000000', cwd=tmp_path)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (list(tmp_path.glob('*.out')) and outputs(tmp_path, number)[0]):
        time.sleep(0.2)
    cluster.power_off('node2')
    start = time.monotonic()
    try:
        while time.monotonic() - start < 30 and 'tpmpi: ' not in outputs(tmp_path, number)[1]:
            time.sleep(0.2)
        assert 'tpmpi: rank 1 on node2 was lost during decode' in outputs(tmp_path, number)[1]
        assert time.monotonic() - start < 15
    finally:
        cluster.run('scancel', number, check=False)
        cluster.power_on('node2')
