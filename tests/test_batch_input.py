"""The index of a batch's input, against Python's own split and dicts; and files that change under it."""

from __future__ import annotations

import json
import os
import re
import time
import tracemalloc
from hashlib import blake2b
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tpmpi import batch_input
from tpmpi.batch_format import MAX_LINE, line_id
from tpmpi.batch_input import InputError, InputFile


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    return tmp_path_factory.mktemp('input') / 'in.jsonl'


def indexed(path: Path, data: bytes) -> InputFile:
    path.write_bytes(data)
    return InputFile(path)


def requests(count: int) -> bytes:
    return b''.join(b'{"id": %d, "prompt": "x"}\n' % n for n in range(1, count + 1))


def later(path: Path) -> None:
    """The clock of the file system has moved on since the file was written."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


# ---- against brute force

ids = st.one_of(st.integers(0, 4), st.sampled_from(['0', '1', 'é', '']))
lines = st.one_of(
    ids.map(lambda id: json.dumps({'id': id, 'prompt': 'x'}).encode()),
    ids.map(lambda id: json.dumps({'prompt': 'a\u2028b\x0b', 'custom_id': id}, ensure_ascii=False).encode()),
    st.sampled_from([b'', b' ', b'\t', b'{', b'{"prompt": "x"}', b'\xff', b'a\rb', b'{"id": [1]}', b'\0']),
    st.integers(0, 20).map(lambda n: b'{"id": 7, "prompt": "' + b'x' * n + b'"}'))
files = st.tuples(st.booleans(), st.lists(st.tuples(lines, st.sampled_from([b'\n', b'\r\n'])), max_size=12), lines).map(
    lambda parts: b'\xef\xbb\xbf' * parts[0] + b''.join(line + end for line, end in parts[1]) + parts[2])


@given(files, st.integers(1, 40), st.randoms())
@settings(max_examples=200)
@example(b'', 1, None)
@example(b'\xef\xbb\xbf', 1, None)
@example(b'\n', 1, None)
def test_the_index_is_what_split_and_dicts_find(path, data, piece, random):
    expected = data.split(b'\n')
    expected = [line.removesuffix(b'\r') for line in (expected[:-1] if expected[-1] == b'' else expected)]
    full = [n for n, line in enumerate(expected, 1) if line.removeprefix(b'\xef\xbb\xbf').strip(b' \t\r')]
    first, repeated = {}, {}
    for n in full:
        if (id := line_id(expected[n - 1])) is not None and first.setdefault((type(id), id), n) != n:
            repeated[n] = first[type(id), id]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_input, 'PIECE', piece)
        with indexed(path, data) as file:
            assert file.facts == {'bytes': len(data), 'lines': len(expected), 'blake2b': blake2b(data).hexdigest()}
            assert [file.read(n) for n in range(1, len(expected) + 1)] == expected
            assert {n: file.repeated(n) for n in full if file.repeated(n)} == repeated
            assert all(file.find(id) == n for (_, id), n in first.items())
            assert file.find('absent') is None and file.find('\ud800') is None
            assert file.changed(file.facts) is None
            assert (list(file.pending()), file.remaining, file.count()) == (full, len(full), len(full))
            done = set() if random is None else {n for n in range(1, len(expected) + 1) if random.random() < 0.5}
            for n in sorted(done) * 2:
                file.mark_done(n)
            left = [n for n in full if n not in done]
            assert (list(file.pending()), file.remaining, file.count()) == (left, len(left), len(full))
            assert [n for n in range(1, len(expected) + 1) if file.is_done(n)] == sorted(done & set(full))


def test_equal_digests_of_different_ids(path, monkeypatch):
    monkeypatch.setattr(batch_input, '_digest', lambda id: 0 if id is None else 1)
    with indexed(path, b'{"id": 1}\n{"id": 2}\nnone\n{"id": "1"}\n{"id": 2}\n{"id": 1}\n') as file:
        assert [file.repeated(n) for n in range(1, 7)] == [None, None, None, None, 2, 1]
        assert [file.find(id) for id in (1, 2, '1', 3)] == [1, 2, 4, None]


def test_marks_set_while_pending_runs_count(path):
    with indexed(path, requests(4)) as file:
        seen = []
        for n in file.pending():
            seen.append(n)
            file.mark_done(min(n + 1, 4))
        assert seen == [1, 3] and file.remaining == 2


@pytest.mark.parametrize('line', [0, 3, -1])
def test_lines_that_do_not_exist(path, line):
    with indexed(path, requests(2)) as file:
        for call in (file.read, file.repeated, file.mark_done, file.is_done):
            with pytest.raises(InputError, match=f'has 2 lines, and no line {line}'):
                call(line)


def test_long_lines(path):
    """One of 10 MB is read whole; one above the limit takes neither memory nor an id, and the next one is found."""
    ten = b'{"id": 1, "prompt": "' + b'x' * 10_000_000 + b'"}'
    with indexed(path, ten + b'\n{"id": 2}\n') as file:
        assert file.read(1) == ten and file.find(1) == 1 and file.find(2) == 2
    with open(path, 'wb') as out:
        out.write(b'{"id": 1, "prompt": "')
        out.truncate(5 * MAX_LINE)  # a hole
        out.seek(5 * MAX_LINE)
        out.write(b'"}\n' + b' ' * (MAX_LINE + 1) + b'\n{"id": 2}')
    tracemalloc.start()
    with InputFile(path) as file:
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_LINE
        tracemalloc.stop()
        assert (file.find(1), file.find(2), list(file.pending())) == (None, 3, [1, 2, 3])
        assert MAX_LINE < len(file.read(1)) <= MAX_LINE + 3
    path.unlink()


def test_memory_and_time(path):
    count = 200_000
    path.write_bytes(b''.join(b'{"id": "request-%d", "prompt": "Once upon"}\n' % n for n in range(count)))
    start = time.process_time()
    InputFile(path).close()
    assert time.process_time() - start < 20  # of this process: about 2
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    with InputFile(path) as file:
        after, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert after - before < 25 * count and peak - before < 60 * count + 8 * batch_input.PIECE
        assert file.find('request-77777') == 77778 and file.repeated(count) is None


# ---- files that are not what they were

def test_what_cannot_be_indexed(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    for name in ('pipe', '.'):
        with pytest.raises(InputError, match='is no regular file'):
            InputFile(tmp_path / name)
    with pytest.raises(InputError, match='cannot be read: No such file'):
        InputFile(tmp_path / 'absent')


@pytest.mark.parametrize('damage', [
    lambda path, data: os.truncate(path, 30),
    lambda path, data: os.truncate(path, 0),
    lambda path, data: path.write_bytes(data.replace(b'"x"', b'"y"')),  # in place: the same length, other texts
    lambda path, data: path.write_bytes(b'\n' * len(data)),
    lambda path, data: path.write_bytes(b'{}' + data),
])
def test_a_file_that_changes_is_noticed(path, damage):
    data = requests(3)
    with indexed(path, data) as file:
        damage(path, data)
        later(path)
        with pytest.raises(InputError, match='line 3 of .*in.jsonl: the file has changed'):
            file.read(3)


def test_moved_lines_are_noticed_without_the_clock(path):
    data = requests(3)
    with indexed(path, data) as file:
        before = path.stat()
        path.write_bytes(b' ' + data[:-1])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(InputError, match='line 2'):
            file.read(2)


def test_touched_continued_and_replaced_files_do_no_harm(path):
    data = requests(3)
    with indexed(path, data) as file:
        later(path)
        assert file.read(2) == b'{"id": 2, "prompt": "x"}'
        with open(path, 'ab') as out:
            out.write(b'{"id": 4}\n')
        later(path)
        assert file.read(3) == b'{"id": 3, "prompt": "x"}' and file.facts['lines'] == 3
        other = path.with_name('other')
        other.write_bytes(b'other')
        os.replace(other, path)  # as editors save: the file that is open stays
        assert file.read(1) == b'{"id": 1, "prompt": "x"}'


def test_a_file_that_is_cut_while_it_is_indexed(path, monkeypatch):
    def cut(data):
        os.truncate(path, 40)
        return None

    monkeypatch.setattr(batch_input, 'PIECE', 25)
    monkeypatch.setattr(batch_input, 'line_id', cut)
    with pytest.raises(InputError, match='ended at byte 40 of 75'):
        indexed(path, requests(3))


# ---- the input of an earlier run

@pytest.mark.parametrize('former, now, message', [
    (b'{"id": 1}\n', b'{"id": 1}\n', None),
    (b'', b'{"id": 1}\n', None),
    (b'{"id": 1}\n', b'{"id": 1}\n{"id": 2}\n', None),
    (b'{"id": 1}', b'{"id": 1}\n', None),
    (b'{"id": 1}', b'{"id": 1} \r\n{"id": 2}', None),
    (b'{"id": 1}\n\n', b'{"id": 1}\n\n\n{"id": 2}', None),
    (b'{"id": 1, ', b'{"id": 1, "prompt": "x"}\n', 'line 1 of .*, the last one of the former run, goes on now'),
    (b'\n{"id": 1}', b'\n{"id": 1}{"id": 2}\n', 'line 2 of .*goes on now'),
    (b'{"id": 1}\n{"id": 2}\n', b'{"id": 1}\n', 'has 10 bytes and had 20'),
    (b'{"id": 1}\n', b'{"id": 2}\n', 'differs in the 10 bytes'),
    (b'{"id": 1}\n', b'{"id": 0}\n{"id": 1}\n', 'differs in the 10 bytes'),
])
def test_only_appended_lines_go_on(path, former, now, message):
    with indexed(path, former) as file:
        facts = json.loads(json.dumps(file.facts))
    with indexed(path, now) as file:
        found = file.changed(facts)
        assert found is None if message is None else re.search(message, found)
        assert 'not known' in file.changed({}) and 'not known' in file.changed({'bytes': -1})
