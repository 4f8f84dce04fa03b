"""The watch, over ranks that really die."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import alive

from tpmpi import watch as watches

ROOT = Path(__file__).resolve().parents[1]
HOST = socket.gethostname()
PHASES = ('load', 'prefill', 'decode', 'finish')


def test_watch_of_one_rank(capfd):
    watch = watches.Watch(0, 1, None, None)
    assert watch.phase == 'start'
    watch.phase = 'load'
    with pytest.raises(SystemExit) as caught:
        watch.failed(ValueError('no such\n  file'))
    watch.close()
    assert caught.value.code == 1
    assert capfd.readouterr().err == f'tpmpi: rank 0 on {HOST} failed during load: ValueError: no such file\n'


def test_addresses():
    *addresses, name = watches._addresses()
    assert name == socket.gethostname()
    assert not {'127.0.0.1', '::1'} & set(addresses)


def mpirun() -> str:
    beside = Path(sys.executable).parent / 'mpirun'
    found = str(beside) if beside.exists() else shutil.which('mpirun')
    if not found:
        pytest.skip('no mpirun beside this Python or in PATH')
    return found


class Run:
    """tests/programs/watched.py on some ranks: its exit code, the lines of its stderr, when all processes were gone."""

    def __init__(self, folder: Path, ranks: int, *options: str):
        environ = {name: value for name, value in os.environ.items()  # these tests may themselves run under mpirun
                   if not name.startswith(('PMI', 'MPI_', 'OMPI_', 'PRTE_', 'HYDI_'))}
        environ |= {'PYTHONPATH': str(ROOT), 'OMPI_ALLOW_RUN_AS_ROOT': '1', 'OMPI_ALLOW_RUN_AS_ROOT_CONFIRM': '1',
                    'PRTE_MCA_rmaps_default_mapping_policy': ':oversubscribe'}
        program = [sys.executable, str(ROOT / 'tests' / 'programs' / 'watched.py'), str(folder), *options]
        process = subprocess.Popen([mpirun(), '-n', str(ranks), *program], env=environ, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            _, errors = process.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            pytest.fail('mpirun hangs')
        finally:
            end = folder / 'end'
            pids = [int(path.read_text()) for path in folder.glob('*.pid')]
            while any(map(alive, pids)) and end.exists() and time.time() < float(end.read_text()) + 10:
                time.sleep(0.01)
            self.left = [pid for pid in pids if alive(pid)]
            for pid in self.left:
                os.kill(pid, 9)
        self.seconds = time.time() - float(end.read_text()) if end.exists() else None
        self.exit_code = process.returncode
        self.lines = errors.decode().replace('\0', '').splitlines()  # Open MPI's mpirun sends zeros along
        self.messages = [line for line in self.lines if line.startswith('tpmpi: ')]
        assert len(pids) == ranks


@pytest.mark.parametrize('end', ['kill', 'exit0', 'exit3', 'raise'])
@pytest.mark.parametrize(('ranks', 'rank'), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_all_ranks_end_with_one_message(tmp_path, ranks, rank, end):
    phase = PHASES[(ranks + rank) % len(PHASES)]
    run = Run(tmp_path, ranks, '--rank', str(rank), '--phase', phase, '--end', end)
    assert not run.left
    assert run.seconds < 10
    assert len(run.messages) == 1, run.lines
    what, why = ('failed', ': ValueError: the weights are wrong') if end == 'raise' else ('was lost', ' (')
    assert run.messages[0].startswith(f'tpmpi: rank {rank} on {HOST} {what} during {phase}{why}')
    if end != 'exit0':  # MPICH's mpirun may return the 0 when it is faster than the watch
        assert run.exit_code != 0


@pytest.mark.parametrize('options', [['--busy'], ['--busy', '--stuck'], ['--stuck'], ['--hosts']])
@pytest.mark.parametrize('end', ['kill', 'raise'])
def test_all_ranks_end_where(tmp_path, end, options):
    run = Run(tmp_path, 3, '--rank', '1', '--end', end, *options)
    assert not run.left
    assert run.seconds < 10
    assert run.exit_code != 0
    assert len(run.messages) == 1, run.lines
    assert 'rank 1 on' in run.messages[0]


@pytest.mark.parametrize('options', [[], ['--hosts']])
def test_a_lost_watchman_is_a_lost_host(tmp_path, options):
    run = Run(tmp_path, 3, '--rank', '0', '--end', 'watchman', *options)
    assert not run.left
    assert run.seconds < 10
    assert run.exit_code != 0
    host = 'host0' if options else HOST
    assert len(run.messages) == 1, run.lines
    assert run.messages[0].startswith(f'tpmpi: rank 0 on {host} was lost during ')


@pytest.mark.parametrize(('ranks', 'options'), [
    (1, []), (2, []), (3, []), (2, ['--hosts']), (3, ['--strangers']), (2, ['--misled', '1', '--strangers']),
    (3, ['--rank', '0', '--end', 'leave', '--alone']), (3, ['--rank', '2', '--end', 'leave', '--alone'])])
def test_normal_end(tmp_path, ranks, options):
    run = Run(tmp_path, ranks, *options)
    assert not run.left
    assert not run.messages
    assert run.exit_code == 0, run.lines
    warnings = [line for line in run.lines if line.startswith('no watch over rank 1, which cannot connect')]
    assert len(warnings) == ('--misled' in options)
