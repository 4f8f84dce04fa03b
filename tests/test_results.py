"""The output of a batch: files that are torn or of others, runs with other facts, disks that are full or hang."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
import time
import tracemalloc
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tpmpi import lease as leases
from tpmpi import results as module
from tpmpi.results import Results, ResultsError

FACTS = {'input': {'sha256': 'ab', 'bytes': 5}, 'model': 'm', 'sampling': {'temperature': 0.5, 'seed': 1}}
@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    """These tests may run in a Slurm job themselves."""
    for name in [name for name in os.environ if name.startswith('SLURM_')]:
        monkeypatch.delenv(name)


def tokens(line: int, count: int) -> list[int]:
    return [line * 1000 + k for k in range(count)]


def opened(output: Path, **options) -> tuple[list[dict], dict[int, list[int]]]:
    """Opens and closes an output.  Returns its records and the tokens of lines that it does not have."""
    results = Results(output, FACTS, **options)
    try:
        records = list(results.existing())
        for record in records:
            results.forget(record['line'])
        return records, results.unfinished
    finally:
        results.close(complete=False)


def beside(output: Path, end: str) -> Path:
    return Path(f'{output}.{end}')


def test_a_batch_in_two_runs(tmp_path):
    output = tmp_path / 'out.jsonl'
    results = Results(output, FACTS)
    results.finish(1, json.dumps({'line': 1, 'text': 'é\u2028'}, ensure_ascii=False))
    results.progress(0, [5, 6])
    results.progress(2, [9])
    results.flush()
    assert output.read_text() == '{"line": 1, "text": "é\u2028"}\n'
    results.progress(0, [7])
    results.close(complete=False)
    assert not beside(output, 'lease').exists()

    results = Results(output, FACTS)
    assert results.unfinished == {0: [5, 6, 7], 2: [9]}
    results.progress(0, [8])
    results.forget(2)
    results.progress(2, [1])  # anew
    results.flush()
    assert [json.loads(line) for line in beside(output, 'journal').read_text().splitlines()[-2:]] == [
        {'line': 0, 'from': 3, 'tokens': [8]}, {'line': 2, 'from': 0, 'tokens': [1]}]
    results.finish(0, '{"line": 0}')
    results.finish(2, '{"line": 2}')
    results.close(complete=True)
    results.close(complete=True)
    began = results.began.isoformat()
    assert json.loads(beside(output, 'journal').read_text()) == {'tpmpi_journal': 1, 'began': began, 'facts': FACTS}
    assert sorted(tmp_path.iterdir()) == [output, beside(output, 'journal')]
    records, unfinished = opened(output)
    assert [record['line'] for record in records] == [1, 0, 2] and unfinished == {}


def test_torn_at_every_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, 'CONFIRM_SECONDS', 0)
    monkeypatch.setattr(os, 'fsync', lambda file: None)  # for speed: nothing here is about the disk
    whole = tmp_path / 'whole.jsonl'
    results = Results(whole, FACTS)
    for line in range(3):
        results.progress(line, tokens(line, 2))
        results.flush()
        results.progress(line, tokens(line, 4)[2:])
        results.flush()
        if line < 2:
            results.finish(line, json.dumps({'line': line}))
    results.close(complete=False)
    output = tmp_path / 'out.jsonl'
    records, journal = whole.read_bytes(), beside(whole, 'journal').read_bytes()
    header = journal.index(b'\n') + 1
    for end in range(len(records) + 1):
        output.write_bytes(records[:end])
        beside(output, 'journal').write_bytes(journal)
        found, unfinished = opened(output)
        assert output.read_bytes() == records[:records.rfind(b'\n', 0, end) + 1]
        assert {r['line'] for r in found} | unfinished.keys() == {0, 1, 2}
    for end in range(len(journal)):
        output.write_bytes(records)
        beside(output, 'journal').write_bytes(journal[:end])
        if end < header:
            with pytest.raises(ResultsError, match='journal .* is gone'):
                opened(output)
        else:
            unfinished = opened(output)[1]
            whole_lines = [json.loads(line) for line in journal[header:end].splitlines(True) if line.endswith(b'\n')]
            assert unfinished.get(2, []) == [t for entry in whole_lines if entry['line'] == 2 for t in entry['tokens']]


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])  # it waits for the disk
@given(st.lists(st.tuples(st.sampled_from(['progress', 'anew', 'finish', 'flush', 'reopen']), st.integers(0, 3),
                          st.lists(st.integers(0, 1 << 20), max_size=5)), max_size=30))
def test_against_a_model(tmp_path_factory, steps):
    """Any sequence of calls, with a journal that is rewritten all the time: a new run finds what a dictionary holds."""
    output = tmp_path_factory.mktemp('model') / 'out.jsonl'
    live, finished = {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leases, 'CONFIRM_SECONDS', 0)
        patch.setattr(os, 'fsync', lambda file: None)
        patch.setattr(module, 'COMPACT_BYTES', 1)
        patch.setattr(module, 'COMPACT_FACTOR', 1.1)
        results = Results(output, FACTS, sync_seconds=0.001)
        try:
            for number, (step, line, new) in enumerate([*steps, ('reopen', 0, [])]):
                if step == 'progress':
                    results.progress(line, new)
                    live[line] = live.get(line, []) + new
                elif step == 'anew' and new:
                    results.forget(line)
                    results.progress(line, new)
                    live[line] = new
                elif step == 'finish':
                    results.finish(line, str(number))
                    live.pop(line, None)
                    finished.append(number)
                    results.flush()  # the line is used again below, which no batch does
                    results.forget(line)
                    results.progress(line, [number])
                    live[line] = [number]
                elif step == 'flush':
                    results.flush()
                elif step == 'reopen':
                    results.close(complete=False)
                    results = Results(output, FACTS, sync_seconds=0.001)
                    assert results.unfinished == {line: found for line, found in live.items() if found}
                    assert [int(line) for line in output.read_text().splitlines()] == finished
        finally:  # a thread that stays would hinder all tests after this one
            results.close(complete=False)


def test_a_line_without_tokens_is_not_in_the_journal(tmp_path, monkeypatch):
    """Also when the journal is rewritten, which it is here at each sync."""
    monkeypatch.setattr(module, 'COMPACT_BYTES', 1)
    monkeypatch.setattr(module, 'COMPACT_FACTOR', 0)
    results = Results(tmp_path / 'out.jsonl', FACTS, sync_seconds=0.001)
    results.progress(1, [])
    results.progress(2, [5])
    results.flush()
    results.flush()  # both of them are there, and it is rewritten
    results.close(complete=False)
    assert opened(tmp_path / 'out.jsonl')[1] == {2: [5]}


def test_what_does_not_fit_in_a_journal_is_left_out(tmp_path):
    output = tmp_path / 'out.jsonl'
    opened(output)
    with beside(output, 'journal').open('a') as file:
        for entry in ({'line': 3, 'from': 0, 'tokens': [1, 2]}, {'line': 3, 'from': 2, 'tokens': [3]},
                      {'line': 3, 'from': 2, 'tokens': [3]}, {'line': 3, 'from': 9, 'tokens': [4]}, 'torn', [],
                      {'line': 4, 'from': 1, 'tokens': [4]}, {'line': '5', 'from': 0, 'tokens': [4]},
                      {'line': 6, 'from': 0, 'tokens': [1 << 70]}, {'line': 6, 'from': 0, 'tokens': 'ab'}):
            file.write(json.dumps(entry) + '\n')
        file.write('\0' * 100 + '\n' + '[' * 100_000 + '\n')
    assert opened(output) == ([], {3: [1, 2, 3]})


def test_a_process_that_wakes_up_within_a_write(tmp_path):
    """It has checked the lease and is suspended before its write, which then reaches no file that anybody reads."""
    output, reached, go = tmp_path / 'out.jsonl', threading.Event(), threading.Event()
    first = Results(output, FACTS)
    first.finish(0, '{"line": 0}')
    first.flush()
    append = first._results.append

    def late(data):
        reached.set()
        go.wait()
        append(data)

    first._results.append = late
    first.finish(1, '{"line": 1}')
    assert reached.wait(30)
    second = Results(output, FACTS, stale_seconds=0.3)
    second.finish(2, '{"line": 2}')
    go.set()
    with pytest.raises(ResultsError):
        first.flush()
    with pytest.raises(ResultsError):
        first.close(complete=True)
    second.finish(3, '{"line": 3}')
    second.close(complete=False)
    assert [record['line'] for record in opened(output)[0]] == [0, 2, 3]


@pytest.mark.parametrize('facts, message', [
    ({**FACTS, 'model': 'n'}, 'begun with model "m", now it is "n": choose another --output, or take the former model'),
    ({**FACTS, 'sampling': {'temperature': 1.0, 'seed': 1}}, 'with sampling.temperature 0.5, now it is 1.0'),
    ({**FACTS, 'stop': ['x']}, r'with stop absent, now it is \["x"\]'),
    ({**FACTS, 'input': {'sha256': 'cd', 'bytes': 5}}, 'with input.sha256 "ab", now it is "cd"'),
    ({'input': FACTS['input'], 'model': 'm'}, 'with sampling {.*}, now it is absent'),
])
@pytest.mark.parametrize('complete', [False, True])
def test_other_facts_are_refused(tmp_path, facts, message, complete):
    output = tmp_path / 'out.jsonl'
    results = Results(output, FACTS)
    results.finish(0, '{"line": 0}')
    results.close(complete)
    with output.open('a') as file:
        file.write('torn')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ResultsError, match=message):
        Results(output, facts)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    beside(output, 'lease').unlink(missing_ok=True)
    assert opened(output)[0] == [{'line': 0}]


def test_the_input_is_compared_by_the_caller(tmp_path):
    output, seen = tmp_path / 'out.jsonl', []
    results = Results(output, FACTS)
    results.finish(0, '{"line": 0}')
    results.close(complete=False)
    longer = {**FACTS, 'input': {'sha256': 'cd', 'bytes': 9}}
    Results(output, longer, same=lambda *inputs: seen.append(inputs)).close(complete=False)
    assert seen == [(FACTS['input'], longer['input'])]
    with pytest.raises(ResultsError, match='^the input is shorter$'):
        Results(output, FACTS, same=lambda former, now: 'the input is shorter' if now['bytes'] < former['bytes'] else None)


def test_an_output_that_was_moved_away_may_be_begun_anew(tmp_path):
    output = tmp_path / 'out.jsonl'
    results = Results(output, FACTS)
    results.finish(0, '{"line": 0}')
    results.close(complete=True)
    output.unlink()
    header = json.loads(beside(output, 'journal').read_text())
    beside(output, 'journal').write_text(json.dumps(header | {'began': '2001-02-03T04:05:06'}) + '\n')
    Results(output, {'model': 'n'}).close(complete=False)
    header = json.loads(beside(output, 'journal').read_text())
    assert header['facts'] == {'model': 'n'} and datetime.fromisoformat(header['began']).year > 2001


@pytest.mark.parametrize('began', [{}, {'began': None}, {'began': 5}, {'began': 'yesterday'}])
def test_a_journal_without_its_beginning(tmp_path, began):
    output = tmp_path / 'out.jsonl'
    results = Results(output, FACTS)
    results.progress(3, [5])
    results.close(complete=False)
    first, rest = beside(output, 'journal').read_text().split('\n', 1)
    header = {name: value for name, value in json.loads(first).items() if name != 'began'} | began
    beside(output, 'journal').write_text(json.dumps(header) + '\n' + rest)
    assert opened(output) == ([], {3: [5]})
    assert datetime.fromisoformat(json.loads(beside(output, 'journal').read_text().split('\n')[0])['began']).year > 2001


def test_files_of_others(tmp_path):
    output = tmp_path / 'notes.txt'
    output.write_text('my notes, without a newline')
    with pytest.raises(ResultsError, match='were not written by tpmpi.batch, or its journal .*notes.txt.journal is gone'):
        Results(output, FACTS)
    assert output.read_text() == 'my notes, without a newline'
    for first in ('hello', '{"tpmpi_journal": 2, "facts": {}}', '{"tpmpi_journal": 1, "facts": []}', '[]'):
        beside(output, 'journal').write_text(first + '\n')
        with pytest.raises(ResultsError, match='is not a journal of this version'):
            Results(output, FACTS)
    assert not beside(output, 'lease').exists()


@pytest.mark.parametrize('line', ['[]', '{"a"', '', '\udcff', '[' * 100_000])
def test_a_line_that_is_no_object(tmp_path, line):
    output = tmp_path / 'out.jsonl'
    opened(output)
    output.write_bytes(b'{"line": 0}\n' + line.encode(errors='surrogateescape') + b'\n')
    with pytest.raises(ResultsError, match='out.jsonl, line 2: not a JSON object'):
        opened(output)


@pytest.mark.parametrize('place, message', [
    ('.', 'is no regular file'), ('file/out.jsonl', 'no folder'), ('missing/out.jsonl', 'no folder .*missing; make it'),
    ('/dev/null', 'is no regular file'), ('/proc/out.jsonl', 'No such file'), ('n' * 250, 'File name too long; choose')])
def test_places_where_nothing_can_be_written(tmp_path, place, message):
    (tmp_path / 'file').touch()
    with pytest.raises(ResultsError, match=f'^cannot write .*{message}') as caught:
        Results(tmp_path / place, FACTS)
    assert '\n' not in str(caught.value)
    assert list(tmp_path.iterdir()) == [tmp_path / 'file']


def test_a_link_is_the_file_that_it_leads_to(tmp_path):
    (tmp_path / 'scratch').mkdir()
    (tmp_path / 'out.jsonl').symlink_to(tmp_path / 'scratch' / 'out.jsonl')
    results = Results(tmp_path / 'out.jsonl', FACTS)
    with pytest.raises(ResultsError, match='is held by'):
        Results(tmp_path / 'scratch' / 'out.jsonl', FACTS)
    results.close(complete=True)
    assert (tmp_path / 'out.jsonl').is_symlink()


FULL = 'No space left on device; what is finished is safe: free some space and start the same command again'


def test_a_full_disk(tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=256k', 'none', disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f'cannot mount a small disk: {mounted.stderr.strip()}')
    try:
        output = disk / 'out.jsonl'
        results = Results(output, FACTS)
        for line in range(100):
            results.progress(line, [line])
            results.finish(line, json.dumps({'line': line, 'text': 'x' * 5000}))
        with pytest.raises(ResultsError, match=f'cannot write {output}: {FULL}'):
            results.flush()
        with pytest.raises(ResultsError, match=FULL):
            results.close(complete=True)
        lines = output.read_text().splitlines(True)
        assert 20 < len(lines) < 60 and all(line.endswith('}\n') for line in lines)
        with open(disk / 'rest', 'wb') as file:
            os.posix_fallocate(file.fileno(), 0, os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize)
        with pytest.raises(ResultsError, match='No space left on device; free some space$'):
            Results(output, FACTS)
        subprocess.run(['mount', '-o', 'remount,size=1m', disk], check=True)
        assert [record['line'] for record in opened(output)[0]] == list(range(len(lines)))
        assert not beside(output, 'lease').exists()
    finally:
        subprocess.run(['umount', '-l', disk], check=True)


@pytest.mark.parametrize('number', [errno.EDQUOT, errno.EIO])
def test_a_sync_that_fails(tmp_path, monkeypatch, number):
    output, fsync = tmp_path / 'out.jsonl', os.fsync
    results = Results(output, FACTS, sync_seconds=60)
    results.finish(0, '{"line": 0}')
    results.flush()

    def failing(file):
        if os.fstat(file).st_size == 24:
            raise OSError(number, os.strerror(number))
        fsync(file)

    monkeypatch.setattr(os, 'fsync', failing)
    results.finish(1, '{"line": 1}')
    with pytest.raises(ResultsError, match=f'{os.strerror(number)}; what is finished is safe: .*start the same command'):
        results.close(complete=True)
    assert opened(output)[0] == [{'line': 0}]


def test_a_disk_that_does_not_answer(tmp_path, monkeypatch):
    output, fsync, answer = tmp_path / 'out.jsonl', os.fsync, threading.Event()
    monkeypatch.setattr(module, 'QUEUE_BYTES', 1000)
    results = Results(output, FACTS, hung_seconds=0.5)
    results.flush()
    monkeypatch.setattr(os, 'fsync', lambda file: (answer.wait(), fsync(file)))
    with pytest.raises(ResultsError, match='the disk has not answered for 0.5 s'):
        for line in range(100):  # blocks when enough is waiting
            results.finish(line, json.dumps({'line': line}))
    waiting = line
    answer.set()
    rounds, deadline = results._rounds, time.monotonic() + 30
    while results._rounds == rounds and time.monotonic() < deadline:
        time.sleep(0.01)
    results.check()
    results.close(complete=False)
    assert 50 < waiting < 100
    assert [record['line'] for record in opened(output)[0]] == list(range(waiting))


@pytest.mark.parametrize('end', ['', '.journal', '.lease'])
def test_when_a_file_is_removed_nothing_more_is_written(tmp_path, end):
    output = tmp_path / 'out.jsonl'
    results = Results(output, FACTS)
    results.finish(0, '{"line": 0}')
    results.flush()
    Path(f'{output}{end}').unlink()
    results.finish(1, '{"line": 1}')
    with pytest.raises(ResultsError, match=f'{output}{end} was removed.* writes nothing more'):
        results.flush()
    with pytest.raises(ResultsError):
        results.close(complete=True)
    assert not output.exists() or output.read_text() == '{"line": 0}\n'


def test_memory_does_not_grow_with_finished_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'QUEUE_BYTES', 1 << 16)
    results = Results(tmp_path / 'out.jsonl', FACTS, sync_seconds=0.01)
    record = json.dumps({'line': 0, 'text': 'x' * 80})
    tracemalloc.start()
    try:
        for line in range(100_000):
            results.progress(line, [line])
            results.finish(line, record)
        results.flush()
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert left < 300_000 and peak < 6_000_000  # the lines have 10 MB
    assert beside(tmp_path / 'out.jsonl', 'journal').stat().st_size < 2 * module.COMPACT_BYTES
    assert sum(1 for _ in results.existing()) == 100_000
    results.close(complete=True)
