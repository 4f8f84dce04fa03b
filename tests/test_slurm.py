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
    if (why := missing()) is not None:
        pytest.skip(why)
    with Cluster(tmp_path_factory.mktemp('slurm')) as running:
        running.env['PYTHON'] = sys.executable
        running.env['PATH'] = f'{Path(mpirun()).parent}:{running.env["PATH"]}'
        # MPICH 5.0's UCX addresses are padded with what lies behind them in memory, and are often too long for Slurm's PMI
        running.env['MPIR_CVAR_CH4_NETMOD'] = 'ofi'
        for name in ('OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS', 'OMP_NUM_THREADS'):
            running.env.pop(name, None)
        yield running


@pytest.fixture(scope='module')
def reciter(tmp_path_factory):
    path = tmp_path_factory.mktemp('reciter') / 'reciter.h5'
    tiny.write_reciter(path, 'xé日🎉!')
    return path


def until(ready, seconds: float):
    """Wait, at most so long, until it is true."""
    deadline = time.monotonic() + seconds
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.1)


def endless(model) -> str:
    """A command that generates without an end; srun passes each piece of text on at once."""
    return (f'srun --mpi=pmi2 --unbuffered --kill-on-bad-exit=1 {sys.executable} -m tpmpi.run --model {model} --prompt x '
            f'--context 64 --max-new-tokens 10000000')


@pytest.mark.parametrize(('script', 'options', 'ranks'), [
    ('cpu_one_node.sbatch', [], 2), ('cpu_nodes.sbatch', [], 2),
    ('cpu_nodes.sbatch', ['--ntasks-per-node=2', '--cpus-per-task=1'], 4), ('gpu_nodes.sbatch', [], 4)])
def test_a_script_runs_as_it_stands(cluster, reciter, tmp_path, script, options, ranks):
    """The GPU script too, on the CPU: its GPUs are null devices here, enough for Slurm."""
    number = cluster.submit(*options, JOBS / script, '--model', reciter, '--prompt', 'x', cwd=tmp_path,
                            env={'TPMPI_DEVICE': 'cpu'})
    job = cluster.finish(number)
    out, err = cluster.output(tmp_path, number)
    assert job['JobState'] == 'COMPLETED', err
    assert out == 'é日🎉!\n' and f'tpmpi [0/{ranks}] done: ' in err and f'{ranks} ranks x' in err


def test_threads_are_the_cores_of_the_task(cluster, reciter, tmp_path):
    number = cluster.submit('--cpus-per-task=2', '--ntasks-per-node=1', '--nodes=1', JOBS / 'cpu_nodes.sbatch',
                            '--model', reciter, '--prompt', 'x', cwd=tmp_path)
    assert cluster.finish(number)['JobState'] == 'COMPLETED'
    assert f'1 rank x {min(2, len(os.sched_getaffinity(0)))} thread' in cluster.output(tmp_path, number)[1]


def test_a_checkpoint_is_converted_in_a_job(cluster, tmp_path):
    pytest.importorskip('safetensors')
    source = ROOT / 'tests/references/tiny_llama'
    number = cluster.submit(JOBS / 'convert.sbatch', source, tmp_path / 'model.h5', cwd=tmp_path)
    assert cluster.finish(number)['JobState'] == 'COMPLETED' and (tmp_path / 'model.h5').exists()


@pytest.mark.parametrize(('nodes', 'on_each'), [(1, 2), (2, 1), (2, 2)])
def test_mpirun_in_an_allocation(cluster, reciter, tmp_path, nodes, on_each):
    """MPICH starts its helpers through srun, whose count of tasks is that of nodes."""
    ranks = nodes * on_each
    number = cluster.submit(f'--nodes={nodes}', f'--ntasks-per-node={on_each}', '--error=x-%j.err', '--output=x-%j.out',
                            '--wrap', f'{mpirun()} -n {ranks} {sys.executable} -m tpmpi.run --model {reciter} --prompt x',
                            cwd=tmp_path)
    job = cluster.finish(number)
    out, err = cluster.output(tmp_path, number)
    assert job['JobState'] == 'COMPLETED', err
    assert out == 'é日🎉!\n' and f'{ranks} ranks x' in err and f'{on_each} on this node' in err


def test_srun_without_the_library_s_pmi_is_refused(cluster, reciter, tmp_path):
    number = cluster.submit(JOBS / 'cpu_nodes.sbatch', '--model', reciter, '--prompt', 'x', cwd=tmp_path,
                            env={'TPMPI_MPI': 'none'})
    assert cluster.finish(number)['JobState'] == 'FAILED'
    out, err = cluster.output(tmp_path, number)
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
    err = cluster.output(tmp_path, number)[1]
    messages = [line for line in err.splitlines() if line.startswith('tpmpi: ')]
    assert job['JobState'] == 'FAILED' and len(messages) == 1, err
    assert messages[0].startswith('tpmpi: rank 1 on node2 ' + ('failed' if how == 'raise' else 'was lost') + ' during decode')
    assert time.monotonic() - start < 30


def test_a_full_heap_does_not_break_the_start(cluster, tmp_path):
    """What MPICH sends of its memory to the other nodes at the start is no longer than Slurm's PMI can take."""
    script = tmp_path / 'heap.py'
    script.write_text("""
import ctypes, os
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [(libc.malloc(size), size) for size in range(16, 5000, 16) for _ in range(30)]
for at, size in blocks:
    ctypes.memmove(at, os.urandom(size), size)
for at, _ in blocks[::2]:
    libc.free(at)
from mpi4py import MPI
print(MPI.COMM_WORLD.allreduce(1), flush=True)
""")
    number = cluster.submit('--nodes=2', '--ntasks-per-node=1', '--error=x-%j.err', '--output=x-%j.out', '--wrap',
                            f'srun --mpi=pmi2 --kill-on-bad-exit=1 {sys.executable} {script}', cwd=tmp_path)
    try:
        assert cluster.finish(number, 30)['JobState'] == 'COMPLETED'
        assert cluster.output(tmp_path, number) == ('2\n2\n', '')
    finally:
        cluster.cancel(number)


def test_a_cancelled_job_leaves_no_process(cluster, models, tmp_path):
    number = cluster.submit('--nodes=2', '--ntasks-per-node=2', '--error=x-%j.err', '--output=x-%j.out', '--wrap',
                            endless(models['nine_heads'][0]), cwd=tmp_path)
    until(lambda: cluster.output(tmp_path, number)[0], 60)

    def ranks():
        return [sum('tpmpi.run' in line for line in cluster.commands(name) if line.startswith(sys.executable))
                for name in cluster.names]

    def left():
        return [line for name in cluster.names for line in cluster.commands(name) if sys.executable in line or 'srun' in line]

    assert ranks() == [2, 2], cluster.output(tmp_path, number)
    cluster.cancel(number)
    until(lambda: not left(), 15)
    assert left() == []
    assert cluster.finish(number)['JobState'] == 'CANCELLED'


def test_the_warning_before_the_time_limit_reaches_the_script(cluster, tmp_path):
    """`Cluster.signal` stands for it elsewhere; Slurm itself looks for time limits every 30 s."""
    number = cluster.submit('--time=1', '--signal=B:USR1@60', '--error=x-%j.err', '--output=x-%j.out', '--wrap',
                            "trap 'echo warned; exit 3' USR1; while :; do sleep 0.2; done", cwd=tmp_path)
    job = cluster.finish(number, 75)
    assert (job['JobState'], job['ExitCode']) == ('FAILED', '3:0') and cluster.output(tmp_path, number)[0] == 'warned\n'


def test_signals_arrays_and_requeue(cluster, tmp_path):
    """What the tests of batches stand on."""
    script = """--wrap=echo $SLURM_ARRAY_TASK_ID,$SLURM_RESTART_COUNT
        trap 'exit 7' USR1; [ "$SLURM_ARRAY_TASK_ID" = 2 ] || while :; do sleep 0.2; done"""
    array = cluster.submit('--array=1-2', '--error=x-%A_%a.err', '--output=x-%A_%a.out', '--open-mode=append', script,
                           cwd=tmp_path)
    assert cluster.finish(f'{array}_2')['JobState'] == 'COMPLETED'
    assert cluster.wait_state(f'{array}_1', 'RUNNING')['Restarts'] == '0'
    until(lambda: cluster.output(tmp_path, f'{array}_1')[0], 10)
    start = time.monotonic()
    assert cluster.requeue(f'{array}_1')['Restarts'] == '1'
    assert time.monotonic() - start < 20
    until(lambda: cluster.output(tmp_path, f'{array}_1')[0].count('\n') == 2, 10)
    cluster.signal(f'{array}_1', 'USR1', batch=True)
    assert cluster.finish(array, 20)['JobState'] in ('FAILED', 'COMPLETED')  # the first of the two that Slurm names
    assert cluster.job(f'{array}_1')['ExitCode'] == '7:0'
    assert cluster.output(tmp_path, f'{array}_1')[0] == '1,\n1,1\n' and cluster.output(tmp_path, f'{array}_2')[0] == '2,\n'


def test_a_node_without_power_is_noticed(cluster, models, tmp_path):
    """No connection is closed: the kernel's probes find out."""
    number = cluster.submit('--nodes=2', '--ntasks-per-node=1', '--error=x-%j.err', '--output=x-%j.out', '--no-requeue',
                            '--wrap', endless(models['nine_heads'][0]), cwd=tmp_path)
    until(lambda: cluster.output(tmp_path, number)[0], 60)
    assert cluster.output(tmp_path, number)[0], cluster.output(tmp_path, number)[1]
    cluster.power_off('node2')
    start = time.monotonic()
    try:
        until(lambda: 'tpmpi: ' in cluster.output(tmp_path, number)[1], 30)
        assert 'tpmpi: rank 1 on node2 was lost during decode' in cluster.output(tmp_path, number)[1]
        assert time.monotonic() - start < 15
    finally:
        cluster.cancel(number)
        cluster.power_on('node2')
