"""The input of a batch: where each line of a JSONL file lies, whose id it has, and which lines are done.

A file of millions of requests is never in memory: 17 bytes stand for a line (its offset, a digest of its id, a flag), and
4 more put the digests in order.
"""

from __future__ import annotations

import os
import stat
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path

from tpmpi.batch_format import MAX_LINE, line_id

PIECE = 1 << 20  # bytes read at once
BLANK = b' \t\r\n'
BYTE_ORDER_MARK = b'\xef\xbb\xbf'
PENDING, EMPTY, DONE = range(3)  # what a line is
NO_ID = 0  # in place of a digest


class InputError(ValueError):
    """An input file that cannot be read, or is not what it was."""


class InputFile:
    """A JSONL file of requests, indexed in one pass.  Lines are numbered from 1; empty ones have numbers too.

    Lines that others append while it is open do no harm and are not seen.  Raises InputError when the file cannot be
    read, is no regular file, or changes otherwise.  meanwhile: called for each megabyte that is read whole.
    """

    def __init__(self, path: Path, meanwhile: Callable[[], object] = lambda: None):
        self.path, self._file, self._meanwhile = Path(path), None, meanwhile
        self._starts = array('Q')  # of each line, and one more: the end of the last one
        self._digests = array('Q')  # of each line's id
        self._flags = bytearray()
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # asked first: opening a pipe would wait for its writer
                raise InputError(f'{path} is no regular file; expected one, since its lines are read by their place')
            self._file = open(path, 'rb', buffering=0)
            self._state = self._now()
            size = self._state[0]
            self.facts = {'bytes': size, 'lines': 0, 'blake2b': self._scan(size)}
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise InputError(f'{path} cannot be read: {error.strerror or error}') from None
            raise
        self.facts['lines'] = len(self._flags)
        self.remaining = self.count()
        self._order = _order(self._digests)  # indices of lines by digest, equal ones by line

    def close(self) -> None:
        """Close the file; what is known of its lines stays."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> InputFile:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def count(self) -> int:
        """Lines that are requests: not empty."""
        return len(self._flags) - self._flags.count(EMPTY)

    def read(self, line: int) -> bytes:
        """One line without its end; of one that is too long only so much that parse_line sees that.

        Raises InputError when there is no such line, or the file is not what was indexed.
        """
        index = self._index(line)
        start, end = self._starts[index:index + 2]
        wanted = min(end - start, MAX_LINE + 3)
        try:
            data = self._read(start, wanted)
            # the end of the line is where it was: noticed even when the clock of the file system has not moved on
            whole = data.find(b'\n') in (-1, end - start - 1) and (line == len(self._flags) or wanted < end - start
                                                                   or data.endswith(b'\n'))
            if len(data) == wanted and whole and (self._now() == self._state or self._same_bytes()):
                return data.removesuffix(b'\n').removesuffix(b'\r')
        except OSError as error:
            raise InputError(f'line {line} of {self.path} cannot be read: {error.strerror or error}') from None
        raise InputError(f'line {line} of {self.path}: the file has changed since the run began; only append to it meanwhile')

    # ---- ids

    def repeated(self, line: int) -> int | None:
        """The first line with the id of this one, where that is an earlier line."""
        digest = self._digests[self._index(line)]
        if digest != NO_ID:
            for other in self._with_digest(digest):
                if other == line:
                    return None
                if line_id(self.read(other)) == line_id(self.read(line)):
                    return other
        return None

    def find(self, id: str | int) -> int | None:
        """The first line with this id."""
        return next((line for line in self._with_digest(_digest(id)) if line_id(self.read(line)) == id), None)

    def _with_digest(self, digest: int) -> Iterator[int]:
        """Lines in ascending order; different ids have equal digests once in 2^64 pairs."""
        at = bisect_left(self._order, digest, key=self._digests.__getitem__)
        while at < len(self._order) and self._digests[self._order[at]] == digest:
            yield self._order[at] + 1
            at += 1

    # ---- what is done

    def mark_done(self, line: int) -> None:
        """A request needs no more work; for an empty line this changes nothing."""
        index = self._index(line)
        if self._flags[index] == PENDING:
            self._flags[index] = DONE
            self.remaining -= 1

    def is_done(self, line: int) -> bool:
        """mark_done was called for this request."""
        return self._flags[self._index(line)] == DONE

    def pending(self) -> Iterator[int]:
        """Requests that are not done, ascending; what is marked meanwhile is taken into account."""
        index = self._flags.find(PENDING)
        while index >= 0:
            yield index + 1
            index = self._flags.find(PENDING, index + 1)

    def changed(self, former: dict) -> str | None:
        """Why results of an earlier run don't belong to this file; None when lines were appended at most.

        former: the `facts` of that run.
        """
        size = former.get('bytes')
        if type(size) is not int or size < 0:
            return f'it is not known what {self.path} was in the former run; use another output file'
        if size > self.facts['bytes']:
            return f"{self.path} has {self.facts['bytes']} bytes and had {size} in the former run; lines may only be appended"
        if self._hash(size) != former.get('blake2b'):
            return f'{self.path} differs in the {size} bytes that the former run read; lines may only be appended'
        line = bisect_right(self._starts, size)
        if size < self.facts['bytes'] and self._starts[line - 1] != size:
            rest = self._read(size, min(self._starts[line] - size, MAX_LINE))
            if rest.strip(BLANK):
                return f'line {line} of {self.path}, the last one of the former run, goes on now; lines may only be appended'
        return None

    # ---- the file

    def _scan(self, size: int) -> str:
        """Index the first `size` bytes (what comes later is not of this run); returns their blake2b."""
        whole = blake2b()
        start, held, length = 0, [], 0  # of a line whose end has not come: offset, pieces, bytes
        for piece in self._pieces(size):
            whole.update(piece)
            *ends, rest = piece.split(b'\n')
            for end in ends:
                self._add(start, b''.join((*held, end)))
                start, held, length = start + length + len(end) + 1, [], 0
            if length <= MAX_LINE:  # more of it is not worth keeping: it is too long
                held.append(rest)
            length += len(rest)
        if length:
            self._add(start, b''.join(held))
        self._starts.append(size)
        return whole.hexdigest()

    def _add(self, start: int, data: bytes) -> None:
        data = data.removesuffix(b'\r')
        empty = len(data) <= MAX_LINE and data.strip(BLANK) in (b'', BYTE_ORDER_MARK)
        self._starts.append(start)
        self._flags.append(EMPTY if empty else PENDING)
        self._digests.append(NO_ID if empty else _digest(line_id(data)))

    def _index(self, line: int) -> int:
        if not 1 <= line <= len(self._flags):
            raise InputError(f'{self.path} has {len(self._flags)} lines, and no line {line}')
        return line - 1

    def _read(self, start: int, size: int) -> bytes:
        """Up to `size` bytes: fewer where the file ends."""
        data = os.pread(self._file.fileno(), size, start)
        while data and len(data) < size and (more := os.pread(self._file.fileno(), size - len(data), start + len(data))):
            data += more
        return data

    def _pieces(self, size: int) -> Iterator[bytes]:
        for start in range(0, size, PIECE):
            data = self._read(start, min(PIECE, size - start))
            if len(data) < min(PIECE, size - start):
                raise InputError(f'{self.path} ended at byte {start + len(data)} of {size}: it was cut while it was read')
            self._meanwhile()
            yield data

    def _hash(self, size: int) -> str:
        digest = blake2b()
        for piece in self._pieces(size):
            digest.update(piece)
        return digest.hexdigest()

    def _now(self) -> tuple[int, int]:
        """(bytes, time of the last change in ns)."""
        now = os.fstat(self._file.fileno())
        return now.st_size, now.st_mtime_ns

    def _same_bytes(self) -> bool:
        """The file was touched: all that was indexed is still there.  Then this state is as good as the first one."""
        now, size = self._now(), self.facts['bytes']
        if now[0] < size or self._hash(size) != self.facts['blake2b']:
            return False
        self._state = now
        return True


def _digest(id: str | int | None) -> int:
    """8 bytes that stand for an id, 1 and "1" differing."""
    if id is None:
        return NO_ID
    data = b's' + id.encode('utf-8', 'surrogatepass') if isinstance(id, str) else f'i{id:x}'.encode()
    return int.from_bytes(blake2b(data, digest_size=8).digest(), 'little') or 1


def _order(digests: array) -> memoryview:
    """Indices that sort the digests, equal ones in their own order."""
    import numpy as np  # not at the top: it must not come before the threads are chosen

    order = np.argsort(np.asarray(digests, np.uint64), kind='stable')
    return memoryview(order.astype(np.uint32 if len(digests) < 1 << 32 else np.uint64))
