"""jobs/batch.sbatch on a real two-node Slurm: whatever happens to the job, the output is complete, each id once."""

from __future__ import annotations

import json
import sys
import time

import pytest
from test_slurm import JOBS, cluster, until  # noqa: F401  the fixture

pytestmark = pytest.mark.slurm
COUNT = 150
SLOWLY = ['--max-sequences', '3']
OPENINGS = ('And the LORD said unto', 'In those days', 'Blessed is', 'Then Peter', 'My son,', 'Woe unto')


@pytest.fixture
def work(tmp_path):
    """A folder with an input of some seconds' work for the bundled model."""
    for name in ('in', 'in-1', 'in-2'):
        lines = [{'id': f'{name}:{i}', 'prompt': f'{OPENINGS[i % 6]} {i}', 'max_new_tokens': 40 + i % 60} for i in range(COUNT)]
        (tmp_path / f'{name}.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return tmp_path


def submit(cluster, work, *options, env=None, arguments=()):  # noqa: F811
    return cluster.submit('--ntasks-per-node=1', '--cpus-per-task=1', *options, JOBS / 'batch.sbatch', '--input', 'in.jsonl',
                          '--output', 'out.jsonl', *arguments, cwd=work, env=env)


def finished(work, name='out.jsonl') -> int:
    """Results that are in the output now."""
    path = work / name
    return path.read_bytes().count(b'\n') if path.exists() else 0


def check_complete(work, output='out.jsonl', prefix='in'):
    records = [json.loads(line) for line in (work / output).read_text().splitlines()]
    assert sorted(r['id'] for r in records) == sorted(f'{prefix}:{i}' for i in range(COUNT))
    assert all(len(r['tokens']) == 40 + int(r['id'].partition(':')[2]) % 60 or r['finish_reason'] == 'stop' for r in records)
    report = json.loads((work / f'{output}.report.json').read_text())
    assert report['complete'] and report['done'] + report['skipped'] == COUNT


def run_again(cluster, number, restarts=1, seconds=60):  # noqa: F811
    """Wait until a job that is queued again runs, without the pause that Slurm makes before it."""
    deadline, queued = time.monotonic() + seconds, None
    while int((job := cluster.job(number))['Restarts']) < restarts or job['JobState'] == 'PENDING':
        if job['JobState'] == 'PENDING' and queued is None:
            queued = time.monotonic()
        # a node refuses a start in the second of the requeue: 'Job credential revoked'
        if job['JobState'] == 'PENDING' and job['Reason'] == 'BeginTime' and time.monotonic() > queued + 2:
            cluster.run('scontrol', 'update', f'JobId={number}', 'StartTime=now', check=False)
        assert time.monotonic() < deadline, job
        time.sleep(0.2)


@pytest.mark.parametrize('launcher', ['srun', 'mpirun'])
def test_a_batch_on_two_nodes(cluster, work, launcher):  # noqa: F811
    number = submit(cluster, work, env={'TPMPI_LAUNCHER': launcher}, arguments=['--replicas', '2'] if launcher == 'srun' else [])
    job = cluster.finish(number)
    assert job['JobState'] == 'COMPLETED', cluster.output(work, number)[1]
    check_complete(work)
    nodes = json.loads((work / 'out.jsonl.report.json').read_text())['nodes']
    assert nodes == [{'host': 'node1', 'ranks': [0]}, {'host': 'node2', 'ranks': [1]}]


@pytest.mark.parametrize('launcher', ['srun', 'mpirun'])
def test_the_warning_before_the_limit_stops_the_job_and_queues_it_again(cluster, work, launcher):  # noqa: F811
    number = submit(cluster, work, env={'TPMPI_LAUNCHER': launcher})
    until(lambda: finished(work), 60)
    cluster.signal(number, 'USR1', batch=True)
    run_again(cluster, number)
    err = cluster.output(work, number)[1]
    assert 'stopped: ' in err and 'the same command goes on' in err and 0 < finished(work) < COUNT, err
    assert cluster.finish(number)['JobState'] == 'COMPLETED', cluster.output(work, number)[1]
    check_complete(work)


def test_a_launch_that_fails_before_any_rank_speaks_is_tried_once_more(cluster, work):  # noqa: F811
    """As Slurm's PMI has been seen to fail soon after a requeue."""
    python = work / 'python'
    python.write_text(f'#!/bin/sh\n[ -e "$0.ran" ] || {{ sleep 1; touch "$0.ran"; exit 1; }}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    number = submit(cluster, work, env={'PYTHON': str(python)})
    job, err = cluster.finish(number), cluster.output(work, number)[1]
    assert job['JobState'] == 'COMPLETED' and err.count('trying once more') == 1, err
    check_complete(work)


def test_a_requeue_and_another_number_of_ranks(cluster, work):  # noqa: F811
    number = submit(cluster, work, arguments=SLOWLY)
    until(lambda: finished(work), 60)
    cluster.requeue(number)
    had = finished(work)
    until(lambda: finished(work) > had, 60)
    cluster.cancel(number)
    assert cluster.finish(number)['JobState'] == 'CANCELLED'
    assert finished(work) < COUNT
    number = submit(cluster, work, '--nodes=1', '--ntasks-per-node=2', arguments=['--replicas', '2'])
    assert cluster.finish(number)['JobState'] == 'COMPLETED', cluster.output(work, number)[1]
    check_complete(work)


def test_a_node_that_loses_its_power(cluster, work):  # noqa: F811
    """Slurm puts the job back in the queue, or the script does, whoever notices first."""
    number = submit(cluster, work, arguments=SLOWLY)
    until(lambda: finished(work), 60)
    cluster.power_off('node2')
    time.sleep(10)
    cluster.power_on('node2')
    run_again(cluster, number, seconds=90)
    assert cluster.finish(number)['JobState'] == 'COMPLETED', cluster.output(work, number)[1]
    check_complete(work)


def test_an_array(cluster, work):  # noqa: F811
    number = cluster.submit('--array=1-2', '--nodes=1', '--ntasks-per-node=1', '--cpus-per-task=1', JOBS / 'batch.sbatch',
                            '--input', 'in-%a.jsonl', '--output=out-%a.jsonl', cwd=work)
    cluster.finish(number)
    for task in '12':
        assert cluster.job(f'{number}_{task}')['JobState'] == 'COMPLETED'
        check_complete(work, f'out-{task}.jsonl', f'in-{task}')
