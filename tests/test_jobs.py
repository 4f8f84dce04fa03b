"""What jobs/batch.sbatch makes of a run's end, with a stub for tpmpi.batch: a real Slurm is in test_slurm_batch.py."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / 'jobs' / 'batch.sbatch'
FACTS = '{"tpmpi_journal": 1, "facts": {"options": {"stop": []}}}\n'


def program(path: Path, text: str) -> None:
    path.write_text('#!/bin/bash\n' + text)
    path.chmod(0o755)


@pytest.fixture
def job(tmp_path):
    """job(what the run does, *arguments): the script's exit code, and whether it queued itself again."""
    (tmp_path / 'bin').mkdir()
    program(tmp_path / 'bin' / 'mpirun', 'shift 2; exec "$@"\n')
    program(tmp_path / 'bin' / 'scontrol', 'if [ "$1" = requeue ]; then touch requeued; else echo JobState=RUNNING; fi\n')

    def run(does: str, *arguments, err: str = 'job-7.err'):
        program(tmp_path / 'bin' / 'batch', f'echo tpmpi: at work >&2\n{does}\n')
        env = os.environ | {'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}', 'TPMPI_LAUNCHER': 'mpirun', 'SLURM_NTASKS': '1',
                            'SLURM_JOB_ID': '7', 'SLURM_JOB_NAME': 'job', 'PYTHON': 'batch'}
        env.pop('SLURM_ARRAY_TASK_ID', None)
        arguments = arguments or ('--output', 'out.jsonl')
        (tmp_path / 'requeued').unlink(missing_ok=True)
        with open(tmp_path / err, 'a') as err:
            done = subprocess.run(['bash', SCRIPT, '--input', 'in.jsonl', *arguments], cwd=tmp_path, env=env, timeout=120,
                                  stdin=subprocess.DEVNULL, stderr=err)
        return done.returncode, (tmp_path / 'requeued').exists()

    run.folder = tmp_path
    return run


def report(complete: bool, name: str = 'out.jsonl.report.json') -> str:
    return f"echo '{json.dumps({'complete': complete})}' > new && mv new {name}"


def test_the_report_of_this_run_is_the_mark_of_success(job):
    assert job(report(True) + '; exit 1') == (0, False)  # srun has been seen to give any code
    assert job('exit 1') == (1, False)  # the one that lies there is an earlier run's
    assert job('exit 0') == (1, False)
    assert job(report(True)) == (0, False)


@pytest.mark.parametrize('arguments', [('--report', 'r.json'), ('--report=r.json',)])
def test_a_report_of_another_name(job, arguments):
    assert job(report(True, 'r.json'), '--output=o.jsonl', *arguments) == (0, False)
    assert job('exit 9', '--output=o.jsonl', *arguments) == (9, False)


def test_a_run_that_was_stopped_in_time_is_queued_again(job):
    assert job(report(False) + '; exit 75') == (75, True)


def test_a_job_that_never_gains_a_token_does_not_come_back_for_ever(job):
    assert [job('exit 75') for _ in range(6)] == [(75, True)] * 4 + [(75, False)] * 2
    assert 'give the job more --time' in (job.folder / 'job-7.err').read_text()
    assert job('echo "{}" >> out.jsonl; exit 75') == (75, True)
    assert [job('exit 75') for _ in range(5)] == [(75, True)] * 4 + [(75, False)]


def test_a_job_whose_messages_lie_elsewhere_comes_back(job):
    assert [job('exit 75', err='elsewhere') for _ in range(6)] == [(75, True)] * 6


@pytest.mark.parametrize(('tokens', 'again'), [([1, 2, 3, 4], False), ([1, 2, 3, 4, 5], True)])
def test_a_lost_run_is_queued_again_where_it_has_gained_a_token(job, tokens, again):
    """A start rewrites the journal: with more tokens it may have fewer bytes."""
    pieces = [f'{{"line": 1, "from": {i}, "tokens": [{token}]}}\n' for i, token in enumerate([1, 2, 3, 4])]
    (job.folder / 'out.jsonl.journal').write_text(FACTS + ''.join(pieces))
    (job.folder / 'next').write_text(FACTS + f'{{"line": 1, "from": 0, "tokens": {tokens}}}\n')
    assert (job.folder / 'next').stat().st_size < (job.folder / 'out.jsonl.journal').stat().st_size
    assert job('mv next out.jsonl.journal; exit 137') == (137, again)


def test_a_lost_run_is_queued_again_where_it_has_a_result(job):
    assert job('echo "{}" >> out.jsonl; exit 137') == (137, True)
