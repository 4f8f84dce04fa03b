"""Runs that are asked to stop, and runs that make no progress."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from ranks import PROGRAMS, alive, command, environment, is_open_mpi

from tpmpi import watchman

HOST = socket.gethostname()
STOPPED = 75


class Run:
    """tests/programs/steps.py on three ranks, up to the step at which something happens."""

    def __init__(self, folder: Path, *options):
        self.folder = folder
        self.launcher = subprocess.Popen(command(3, PROGRAMS / 'steps.py', folder, *options), env=environment(), text=True,
                                         stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def __enter__(self) -> Run:
        self.wait_for('ready')
        self.pids = [int((self.folder / f'{rank}.pid').read_text()) for rank in range(3)]
        return self

    def __exit__(self, *_):
        for pid in filter(alive, (*self.pids, self.launcher.pid)):
            os.kill(pid, signal.SIGKILL)
        self.launcher.communicate()

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 120
        while not (self.folder / name).exists():
            assert self.launcher.poll() is None and time.monotonic() < deadline, self.launcher.communicate(timeout=1)
            time.sleep(0.01)

    def end(self, seconds: float) -> tuple[int, list[str]]:
        """Exit code and messages, once all processes are gone, which takes no longer than some seconds."""
        start = time.monotonic()
        _, errors = self.launcher.communicate(timeout=seconds)
        while any(map(alive, self.pids)) and time.monotonic() < start + seconds:
            time.sleep(0.01)
        assert not [pid for pid in self.pids if alive(pid)]
        assert 'Traceback' not in errors
        return self.launcher.returncode, re.findall('^tpmpi: (.*)$', errors.replace('\0', ''), re.MULTILINE)

    def stopped_at(self) -> set[int]:
        """The steps after which the ranks have ended gently."""
        assert len(steps := list(self.folder.glob('*.stopped'))) == 3
        return {int(path.read_text()) for path in steps}


@pytest.mark.parametrize('ranks', [[2], [0], [0, 1, 2]], ids=str)
def test_stopped_processes_are_named_and_all_end(tmp_path, ranks):
    with Run(tmp_path, '--limit', '1') as run:
        for rank in ranks:
            os.kill(run.pids[rank], signal.SIGSTOP)
        code, messages = run.end(20)
    assert code != 0 and len(messages) == 1, messages
    assert [int(rank) for rank in re.findall(rf'rank (\d) on {HOST} \(last step \d+\)', messages[0])] == ranks
    assert re.fullmatch('no progress for 1 s: .* did not arrive; all ranks end, and the same command goes on', messages[0])
    last = [int(step) for step in re.findall(r'last step (\d+)', messages[0])]
    assert all(20 - 0.5 / 0.01 < step < 20 + 2 / 0.01 for step in last)  # it is at most some tenths of a second old


def test_a_rank_that_does_not_arrive_is_named(tmp_path):
    with Run(tmp_path, '--limit', '1', '--stuck', '1') as run:
        code, messages = run.end(12)
    assert code != 0
    assert messages == [f'no progress for 1 s: rank 1 on {HOST} (last step 20) did not arrive; '
                        f'all ranks end, and the same command goes on']


def test_slow_steps_are_no_stall(tmp_path):
    with Run(tmp_path, '--limit', '2', '--nap', '1.6', '--steps', '3', '--ready', '0') as run:
        assert run.end(20) == (0, [])


def test_a_signal_on_any_rank_is_a_wish_to_stop(tmp_path):
    """It reaches rank 0, which waits in MPI, from a rank in a kernel, before that kernel ends."""
    with Run(tmp_path, '--kernel') as run:
        os.kill(run.pids[2], signal.SIGTERM)
        run.wait_for('asked')
        assert not (tmp_path / 'computed').exists()
        assert run.end(30) == (STOPPED, [])
    assert run.stopped_at() <= {20, 21}  # rank 0 may have told the others of step 20 before


def test_signals_on_all_ranks(tmp_path):
    with Run(tmp_path, '--limit', '5') as run:
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            for pid in run.pids:
                os.kill(pid, number)
        assert run.end(10) == (STOPPED, [])
    assert len(run.stopped_at()) == 1


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_the_launcher_passes_it_on(tmp_path, number):
    if number != signal.SIGUSR1 and is_open_mpi():
        pytest.skip("Open MPI's mpirun kills its ranks then")
    with Run(tmp_path) as run:
        run.launcher.send_signal(number)
        assert run.end(10) == (STOPPED, [])
    assert len(run.stopped_at()) == 1


def test_the_second_interrupt_ends_all_at_once(tmp_path):
    with Run(tmp_path, '--kernel') as run:  # which has no time to stop gently
        os.kill(run.pids[1], signal.SIGINT)
        run.wait_for('asked')
        os.kill(run.pids[1], signal.SIGINT)
        code, messages = run.end(10)
    assert code != 0 and messages == ['interrupted during decode; all ranks end']
    assert not list(tmp_path.glob('*.stopped')) and not (tmp_path / 'computed').exists()


class Watched:
    """A watchman of ranks that are the ends of sockets; its clock is turned by hand."""

    def __init__(self, size: int, limit: float):
        self.watchman = watchman.Watchman(socket.socket(), size, 0, '', '')
        self.watchman.limit, self.watchman.looked = limit, 0.0
        self.messages, self.aborting, self.ends = [], [], []
        for rank in range(size):
            near, far = socket.socketpair(socket.AF_UNIX)
            self.ends.append(far)
            line = object.__new__(watchman.Line)  # a line sets options that only TCP has
            vars(line).update(connection=near, rank=rank, host=f'n{rank // 2}', pid=0, phase='decode', watched=True,
                              step='7', since=0.0, here=None, unread=b'')
            self.watchman.lines.append(line)

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_):
        for connection in (*self.ends, *(line.connection for line in self.watchman.lines), self.watchman.listener):
            connection.close()
        self.watchman.selector.close()

    def look(self, now: float) -> str:
        """What the watchman says to each rank when it looks around."""
        self.watchman.look_for_a_stall(now)
        self.watchman.looked = now
        said = []
        for end in self.ends:
            end.setblocking(False)
            try:
                said.append(end.recv(100).decode().partition(' ')[0])
            except BlockingIOError:
                said.append('')
        return said

    def answer(self, *answers: tuple[str, int] | None) -> None:
        for line, here in zip(self.watchman.lines, answers, strict=True):
            line.here = here


def ticks(watched: Watched, start: int, end: int) -> list:
    """All that it says while it looks once a second."""
    return [said for now in range(start, end) if any(said := watched.look(float(now)))]


@pytest.mark.parametrize(('answers', 'blamed', 'aborts'), [
    ((('0', 9), ('0', 9), ('1', 5), ('1', 4)), 'rank 3 on n1 (last step 7) did not arrive', 0),
    ((('0', 9), ('0', 8), ('1', 5), ('1', 4)), 'rank 1 on n0 (last step 7), rank 3 on n1 (last step 7) did not arrive', 0),
    ((('0', 9), ('0', 9), ('1', 5), ('1', 5)), 'every rank waits (last step 7)', 0),
    ((None, ('0', 9), ('1', 5), ('1', 4)), 'rank 0 on n0 (last step 7) did not arrive', 1),
])
def test_who_is_blamed(capfd, answers, blamed, aborts):
    with Watched(4, 10) as watched:
        assert ticks(watched, 1, 11) == []
        assert watched.look(11.0) == ['where'] * 4
        watched.answer(*answers)
        assert ticks(watched, 12, 16) == [['abort' if rank == aborts else 'end' for rank in range(4)]]
    assert capfd.readouterr().err == f'tpmpi: no progress for 9.8 s: {blamed}; all ranks end, and the same command goes on\n'


def test_who_moves_on_or_has_left_is_not_late(capfd):
    with Watched(2, 10) as watched:
        watched.watchman.lines[1].watched = False
        assert watched.look(3.0) == ['', ''] and ticks(watched, 4, 12) == [['where', '']]
        watched.watchman.lines[0].since = 11.5  # a step, while it is asked
        assert ticks(watched, 12, 21) == []
        assert watched.watchman.over == math.inf


def test_who_waits_for_a_rank_that_has_left(capfd):
    """It has entered a collective more than that one ever will; of another group that says nothing."""
    with Watched(3, math.inf) as watched:
        watched.watchman.lines[1].watched = False
        watched.watchman.left.append(('rank 1 on n0', '0', 5))
        for here, deserted in (((('0', 5), None, ('1', 9)), False), ((('0', 5), None, ('0', 6)), True)):
            watched.answer(*here)
            watched.watchman.look_for_the_deserted()
            assert (watched.watchman.over < math.inf) == deserted
        words = [end.recv(1000).decode().split() for end in (watched.ends[0], watched.ends[2])]
        assert words == [['where', 'where', 'abort'], ['where', 'end', 'where']]  # asked again, the end comes before that
    assert capfd.readouterr().err.startswith('tpmpi: rank 1 on n0 has ended, and rank 2 on n1 waits for it: every rank must ')


def test_the_time_of_a_suspended_job_does_not_count():
    with Watched(2, 10) as watched:
        assert ticks(watched, 1, 9) == []
        assert watched.look(1000.0) == ['', '']
        assert ticks(watched, 1001, 1002) == []
        assert watched.look(1003.0) == ['where'] * 2


def test_many_ranks_make_a_short_message():
    lines = [watchman.Line.__new__(watchman.Line) for _ in range(100)]
    for rank, line in enumerate(lines):
        vars(line).update(rank=rank, host='n', step='3')
    assert watchman._blame(lines, lines).endswith('rank 7 on n (last step 3), 92 more did not arrive')
