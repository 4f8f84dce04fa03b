"""One rank dies: all ranks end in seconds, with one message that names rank, host and phase."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from ranks import PROGRAMS, command, environment, run_ranks

LIMIT = 10  # seconds from the failure to the last process


def running(folder: Path) -> list[int]:
    """Processes of the run that are still there and are no zombies."""
    alive = []
    for pid in (int(p.name) for p in folder.iterdir()):
        try:
            state = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
        except OSError:
            continue
        if state != 'Z':
            alive.append(pid)
    return alive


@pytest.fixture(scope='module', autouse=True)
def compiled(models, tmp_path_factory):
    """The first run of an installation compiles kernels for some seconds, which are no part of the time to an end."""
    env = environment(TPMPI_TEST_PIDS=str(tmp_path_factory.mktemp('pids')))
    done = run_ranks(2, PROGRAMS / 'fail.py', 9, 'never', 'raise', '--model', models['nine_heads'][0], '--prompt', 'abc',
                     '--max-new-tokens', 1, env=env)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('how', ['kill', 'exit0', 'exit3', 'raise'])
@pytest.mark.parametrize(('rank', 'size', 'phase'), [(1, 2, 'load'), (0, 2, 'prefill'), (1, 2, 'decode'), (2, 4, 'decode'),
                                                     (0, 3, 'decode'), (3, 4, 'prefill')])
def test_all_ranks_end_with_one_message(nine_heads, tmp_path, rank, size, phase, how):
    pids, failed = tmp_path / 'pids', tmp_path / 'failed'
    pids.mkdir()
    env = environment(TPMPI_TEST_PIDS=str(pids), TPMPI_TEST_FAILED=str(failed))
    kernels = 'cpu' if size == 2 else 'reference'  # without Numba a rank starts in a third of the time
    done = subprocess.run(
        command(size, PROGRAMS / 'fail.py', rank, phase, how, '--model', nine_heads, '--prompt', 'abc', '--max-new-tokens', '50',
                '--kernels', kernels), capture_output=True, text=True, env=env, timeout=180, stdin=subprocess.DEVNULL)
    while (left := running(pids)) and time.time() - failed.stat().st_mtime < LIMIT:
        time.sleep(0.05)
    assert not left and time.time() - failed.stat().st_mtime < LIMIT
    assert len(list(pids.iterdir())) == size
    messages = [line for line in done.stderr.splitlines() if line.startswith('tpmpi: ')]
    assert len(messages) == 1, done.stderr
    what = 'failed during' if how == 'raise' else 'was lost during'
    assert messages[0].startswith(f'tpmpi: rank {rank} on {socket.gethostname()} {what} {phase}'), messages
    assert ('the test says so' in messages[0]) == (how == 'raise')
    assert 'decode 4' not in done.stderr  # the closing line is the mark of success
    # MPICH's mpirun gives 0 where a process exited with 0, whatever the others did: no process can force its code
    assert done.returncode != 0 or how == 'exit0'


@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_quietly(nine_heads, tmp_path, sig):
    """Ctrl-C in a terminal reaches the launcher and the ranks; here the launcher's whole process group gets it."""
    env = environment(TPMPI_TEST_PIDS=str(tmp_path))
    process = subprocess.Popen(
        command(2, PROGRAMS / 'fail.py', 9, 'never', 'raise', '--model', nine_heads, '--prompt', 'abc', '--context', '64',
                '--max-new-tokens', '1000000'), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env,
        stdin=subprocess.DEVNULL, start_new_session=True)
    process.stdout.read(20)  # it generates; bytes, because a launcher passes them on in pieces that cut characters
    os.killpg(process.pid, sig)
    _, stderr = process.communicate(timeout=LIMIT)
    start = time.monotonic()
    while (left := running(tmp_path)) and time.monotonic() - start < LIMIT:
        time.sleep(0.05)
    assert not left and process.returncode != 0 and b'Traceback' not in stderr


def test_a_closed_pipe_is_a_quiet_end(nine_heads, tmp_path):
    env = environment(TPMPI_TEST_PIDS=str(tmp_path))
    process = subprocess.Popen(
        command(2, PROGRAMS / 'fail.py', 9, 'never', 'raise', '--model', nine_heads, '--prompt', 'abc', '--context', '64',
                '--max-new-tokens', '1000000'), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        stdin=subprocess.DEVNULL)
    process.stdout.read(20)
    process.stdout.close()
    with process.stderr:
        stderr = process.stderr.read()
    process.wait(LIMIT)
    start = time.monotonic()
    while (left := running(tmp_path)) and time.monotonic() - start < LIMIT:
        time.sleep(0.05)
    assert not left and 'Traceback' not in stderr and 'Error' not in stderr


@pytest.mark.parametrize('how', ['return', 'exit'])
@pytest.mark.parametrize(('rank', 'size'), [(1, 2), (0, 2), (2, 3)])
def test_a_rank_of_a_script_that_ends_while_the_others_wait_for_it(rank, size, how):
    """Nothing is wrong with it: what gives it away is that the others have come to more meetings."""
    start = time.monotonic()
    done = run_ranks(size, PROGRAMS / 'leave.py', rank, how, timeout=180)
    assert time.monotonic() - start < LIMIT + 10 and done.returncode != 0
    messages = [line for line in done.stderr.splitlines() if line.startswith('tpmpi: ')]
    assert len(messages) == 1, done.stderr
    assert messages[0].startswith(f'tpmpi: rank {rank} on {socket.gethostname()} has ended, and rank '), messages
