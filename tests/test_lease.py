"""The lease, one holder at a time, whoever wants it and however it dies; and files of whole lines, whatever fails."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tpmpi import lease as leases
from tpmpi.lease import Lease, Lines, ResultsError
from tpmpi.results import Results

LENGTH = 12  # tokens of each request below

# Works on the requests, two tokens at a time and three requests in turn, as far as it gets; says when it begins, and why it ends
WORKER = f"""
import itertools, json, sys, time
from tpmpi.results import Results, ResultsError
try:
    results = Results(sys.argv[1], {{}}, sync_seconds=0.005)
    done = {{record['line'] for record in results.existing()}}
    for line in done:
        results.forget(line)
    print('begun', flush=True)
    todo, active = (line for line in itertools.count() if line not in done), {{}}
    while True:
        while len(active) < 3:
            line = next(todo)
            active[line] = list(results.unfinished.get(line, []))
        for line, tokens in list(active.items()):
            new = [line * 1000 + k for k in range(len(tokens), min(len(tokens) + 2, {LENGTH}))]
            tokens += new
            results.progress(line, new)
            if len(tokens) == {LENGTH}:
                results.finish(line, json.dumps({{'line': line, 'tokens': tokens, 'padding': 'x' * (line % 7 * 3000)}}))
                del active[line]
        results.check()
        time.sleep(0.001)
except ResultsError as error:
    print(error)
"""


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    """These tests may run in a Slurm job themselves."""
    for name in [name for name in os.environ if name.startswith('SLURM_')]:
        monkeypatch.delenv(name)


def content(**changes) -> bytes:
    """A lease as this process would write it, but for some facts."""
    return json.dumps({'counter': '0' * 12, **asdict(replace(leases._this_process(), **changes))}).encode() + b'\n'


def seconds_to_acquire(lease: Lease) -> float:
    start = time.monotonic()
    lease.acquire()
    return time.monotonic() - start


def test_beats_change_the_counter_and_nothing_else(tmp_path):
    lease = Lease(tmp_path / 'lease')
    lease.acquire()
    before = json.loads(lease.path.read_bytes())
    assert (before['pid'], before['host']) == (os.getpid(), os.uname().nodename)
    for _ in range(12):
        lease.beat()
    after = json.loads(lease.path.read_bytes())
    assert int(after.pop('counter')) == int(before.pop('counter')) + 12
    assert after == before
    lease.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lease_that_moves_is_refused(tmp_path):
    lease, done = Lease(tmp_path / 'lease'), threading.Event()
    lease.acquire()

    def beat():
        while not done.wait(0.1):
            lease.beat()

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ResultsError, match=rf'process {os.getpid()} on .* at work: wait for its end .* --output'):
            Lease(lease.path, stale_seconds=30).acquire()
    finally:
        done.set()
        thread.join()
    lease.beat()
    lease.release()


def test_a_dead_process_of_this_machine_is_followed_at_once(tmp_path):
    program = 'import sys; from tpmpi.lease import Lease; Lease(sys.argv[1]).acquire()'
    subprocess.run([sys.executable, '-c', program, tmp_path / 'lease'], check=True)
    assert (tmp_path / 'lease').exists()
    lease = Lease(tmp_path / 'lease', stale_seconds=60)
    assert seconds_to_acquire(lease) < 20
    assert not lease.may_live
    lease.release()


def test_a_zombie_and_a_reused_pid_are_dead():
    child = subprocess.Popen([sys.executable, '-c', ''], stdout=subprocess.PIPE)
    child.stdout.read()  # to its end
    child.stdout.close()
    ours, deadline = leases._this_process(), time.monotonic() + 20
    started = leases._state(str(child.pid))[1]
    zombie = replace(ours, pid=child.pid, started=started)
    while not zombie.gone() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert zombie.gone()
    child.wait()
    assert replace(ours, started=ours.started + 1).gone()
    assert not ours.gone()
    assert not replace(ours, machine='another', pid=child.pid).gone()  # a pid of another host says nothing here
    assert not replace(ours, pid=1 << 70).gone()


@pytest.mark.parametrize('job', [{'SLURM_JOB_ID': '7'}, {'SLURM_ARRAY_JOB_ID': '5', 'SLURM_ARRAY_TASK_ID': '2'}])
def test_a_restarted_job_follows_itself_at_once(tmp_path, monkeypatch, job):
    first = Lease(tmp_path / 'lease', stale_seconds=60)
    monkeypatch.setattr(leases, '_machine', lambda: 'a node that is lost')
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    first._holder = leases._this_process()
    first.acquire()
    monkeypatch.setenv('SLURM_RESTART_COUNT', '1')
    second = Lease(tmp_path / 'lease', stale_seconds=60)
    assert seconds_to_acquire(second) < 20
    assert second.may_live
    with pytest.raises(ResultsError, match=r'taken over by process \d+ on .* \(Slurm job .*writes nothing more'):
        first.beat()
    first.release()
    second.beat()  # the first has not removed it
    second.release()


@pytest.mark.parametrize('changes', [{'job': '8'}, {'job': '7', 'restarts': 1}, {'job': ''}, {'job': '7', 'restarts': 2}])
def test_others_must_stand_still_first(tmp_path, monkeypatch, changes):
    """Another job, the same one with as many restarts or more, or none: only time tells."""
    monkeypatch.setenv('SLURM_JOB_ID', '7')
    monkeypatch.setenv('SLURM_RESTART_COUNT', '1')
    (tmp_path / 'lease').write_bytes(content(machine='another', **changes))
    lease = Lease(tmp_path / 'lease', stale_seconds=0.5)
    assert seconds_to_acquire(lease) >= 0.5
    assert lease.may_live
    lease.release()


def test_a_torn_lease_stands_still():
    whole = content(machine='another')
    assert leases._parse(whole) == leases._parse(whole[:-1]) is not None
    for end in range(len(whole) - 1):
        assert leases._parse(whole[:end]) is None
    for other in (b'[]', b'7', b'{"pid": 1}', b'\xff', bytes(300), b'[' * 100_000, whole.replace(b'"pid": ', b'"pid": 0.')):
        assert leases._parse(other) is None


@pytest.mark.parametrize('found', [b'', content(machine='another')[:40], content(machine='another')],
                         ids=['empty', 'torn', 'silent'])
def test_of_many_that_wait_one_takes_over(tmp_path, found):
    for number in range(4):
        path = tmp_path / f'lease{number}'
        path.write_bytes(found)
        claims = [Lease(path, stale_seconds=0.3) for _ in range(8)]
        winners, refusals = [], []

        def claim(lease, winners=winners, refusals=refusals):
            try:
                lease.acquire()
                winners.append(lease)
            except ResultsError as error:
                refusals.append(error)

        threads = [threading.Thread(target=claim, args=(lease,)) for lease in claims]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        holders = []
        for lease in winners:
            try:
                lease.beat()
                holders.append(lease)
            except ResultsError:  # removed by mistake, and noticed before a byte is written
                pass
        assert len(holders) == 1 and len(winners) + len(refusals) == 8
        holders[0].release()
        for lease in winners:
            lease.release()
        assert list(tmp_path.iterdir()) == []


def test_a_new_lease_that_was_moved_aside_is_put_back(tmp_path, monkeypatch):
    """Between the judgement of a silent lease and its removal, somebody else takes over."""
    path, rename, quick = tmp_path / 'lease', os.rename, Lease(tmp_path / 'lease', stale_seconds=0.1)
    path.write_bytes(content(machine='another'))

    def too_late(source, target):
        monkeypatch.setattr(os, 'rename', rename)
        quick.acquire()
        rename(source, target)

    monkeypatch.setattr(os, 'rename', too_late)
    with pytest.raises(ResultsError, match='is held by process'):
        Lease(path, stale_seconds=0.1).acquire()
    quick.beat()
    quick.release()
    assert list(tmp_path.iterdir()) == []


def test_a_removed_lease_is_lost(tmp_path):
    lease = Lease(tmp_path / 'lease')
    lease.acquire()
    lease.path.unlink()
    with pytest.raises(ResultsError, match='was removed'):
        lease.beat()
    lease.release()


@pytest.fixture
def worker():
    """Starts WORKER on an output, and returns when it has begun."""
    processes = []

    def start(output: Path, **environ) -> subprocess.Popen:
        processes.append(subprocess.Popen([sys.executable, '-c', WORKER, output], stdout=subprocess.PIPE, text=True,
                                          env={**os.environ, **environ}))
        assert processes[-1].stdout.readline() == 'begun\n'
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        ended(process)


def ended(process: subprocess.Popen) -> str:
    """What a worker said at its end."""
    with process:
        return '' if process.stdout.closed else process.communicate(timeout=180)[0]


def opened(output: Path, **options) -> tuple[list[dict], dict[int, list[int]]]:
    """Opens and closes an output.  Returns its records and the tokens of lines that it does not have."""
    results = Results(output, {}, **options)
    records = list(results.existing())
    for record in records:
        results.forget(record['line'])
    results.close(complete=False)
    return records, results.unfinished


def test_killed_at_random_moments(tmp_path, worker):
    output, finished = tmp_path / 'out.jsonl', 0
    for number in range(12):
        process = worker(output)
        time.sleep(random.Random(number).uniform(0, 0.5))
        process.kill()
        ended(process)
        records, unfinished = opened(output)
        assert output.read_bytes()[-1:] in (b'', b'\n')
        lines = [record['line'] for record in records]
        assert len(lines) == len(set(lines)) >= finished  # each once, and none is lost
        assert all(record['tokens'] == list(range(record['line'] * 1000, record['line'] * 1000 + LENGTH)) for record in records)
        assert all(found == list(range(line * 1000, line * 1000 + len(found))) for line, found in unfinished.items())
        finished = len(lines)
    assert finished > 20


def test_one_process_at_a_time(tmp_path, worker):
    """The second is refused while the first works, and takes over once it is suspended; the first notices that."""
    output = tmp_path / 'out.jsonl'
    process = worker(output)
    with pytest.raises(ResultsError, match=f'is held by process {process.pid} on '):
        Results(output, {}, stale_seconds=60)
    process.send_signal(signal.SIGSTOP)
    results = Results(output, {}, stale_seconds=1)
    records = list(results.existing())
    process.send_signal(signal.SIGCONT)
    assert 'this process writes nothing more' in ended(process)
    results.finish(-1, '{"line": -1}')
    results.close(complete=False)
    assert records and opened(output)[0] == [*records, {'line': -1}]


def test_a_restarted_job_takes_over_at_once(tmp_path, monkeypatch, worker):
    output = tmp_path / 'out.jsonl'
    process = worker(output, SLURM_JOB_ID='7')
    monkeypatch.setenv('SLURM_JOB_ID', '7')
    monkeypatch.setenv('SLURM_RESTART_COUNT', '1')
    start = time.monotonic()
    records, _ = opened(output, stale_seconds=600)
    assert time.monotonic() - start < 60
    assert 'writes nothing more' in ended(process)
    assert opened(output)[0] == records


@pytest.fixture
def lines(tmp_path):
    file = Lines(tmp_path / 'lines')
    file.open(os.O_CREAT)
    yield file
    file.close()


@pytest.mark.parametrize('torn', [0, 1, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 200_000])
@pytest.mark.parametrize('whole', [b'', b'\n', b'one\ntwo\n', b'x' * 100_000 + b'\n'])
def test_a_torn_last_line_is_cut(lines, whole, torn):
    lines.path.write_bytes(whole + b'x' * torn)
    lines.close()
    assert lines.open() == len(whole) + torn
    assert lines.size == len(whole)
    assert b''.join(lines.read()) == b''.join(lines.blocks()) == whole
    lines.cut()
    lines.check()
    lines.append(b'more\n')
    assert lines.path.read_bytes() == whole + b'more\n'


@pytest.mark.parametrize('accepted, left', [(0, b'a\n'), (3, b'a\n'), (4, b'a\nbcd\n'), (6, b'a\nbcd\n'), (8, b'a\n')])
def test_an_append_that_fails_leaves_whole_lines(lines, monkeypatch, accepted, left):
    """The disk takes some bytes, one at a time, and then no more; all 8 of them, but it cannot sync them."""
    lines.append(b'a\n')
    write, fsync, taken = os.write, os.fsync, []

    def one_byte(file, data):
        if len(taken) == accepted:
            raise OSError(errno.ENOSPC, 'full')
        taken.append(1)
        return write(file, data[:1])

    def failing_once(file):
        monkeypatch.setattr(os, 'fsync', fsync)
        raise OSError(errno.EIO, 'lost')

    monkeypatch.setattr(os, 'write', one_byte)
    if accepted == 8:
        monkeypatch.setattr(os, 'fsync', failing_once)
    with pytest.raises(OSError, match='lost' if accepted == 8 else 'full'):
        lines.append(b'bcd\nefg\n')
    monkeypatch.undo()
    assert lines.path.read_bytes() == left
    lines.append(b'z\n')
    assert lines.path.read_bytes() == left + b'z\n'


@pytest.mark.parametrize('change', ['removed', 'replaced', 'written', 'cut'])
def test_a_file_that_others_touch_is_noticed(lines, change):
    lines.append(b'a\n')
    lines.check()
    if change in ('removed', 'replaced'):
        lines.path.unlink()
    if change != 'removed':
        lines.path.write_bytes({'replaced': b'a\n', 'written': b'a\nb\n', 'cut': b''}[change])
    with pytest.raises(ResultsError, match='was removed, replaced or written by somebody else'):
        lines.check()


def test_a_file_is_replaced_at_once_or_not(lines):
    lines.append(b'old\n')
    lines.path.chmod(0o640)

    def lost():
        raise ResultsError('lost')

    with pytest.raises(ResultsError, match='lost'):
        lines.replace([b'new\n'], lost)
    assert lines.path.read_bytes() == b'old\n'
    lines.check()
    with open(lines.path, 'rb') as former:
        lines.replace([b'one\n', b'tw', b'o\n'], lambda: None)
        lines.append(b'three\n')
        assert former.read() == b'old\n'
    assert lines.path.read_bytes() == b'one\ntwo\nthree\n'
    assert lines.path.stat().st_mode & 0o777 == 0o640
    assert list(lines.path.parent.iterdir()) == [lines.path]
