"""The output file of a batch, safe against crashes: finished lines, appended once, and a journal of unfinished ones.

    out.jsonl          one record a line, in the order in which requests finish
    out.jsonl.journal  {"tpmpi_journal": 1, "began": …, "facts": …}, then {"line": 3, "from": 0, "tokens": [5, 7]} and so on
    out.jsonl.lease    names the process that writes, see tpmpi.lease

A thread brings both to disk: first the lease is checked, then records are appended and synced, then the journal.  So
after a crash between two of them the journal holds at most tokens of a request that the output says is finished.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import stat
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tpmpi.lease import Lease, Lines, ResultsError

__all__ = ['Results', 'ResultsError']

VERSION = 1
QUEUE_BYTES = 64 << 20  # then who brings more waits for the disk
COMPACT_BYTES, COMPACT_FACTOR = 1 << 20, 8  # the journal is rewritten beyond both, as a multiple of its live content

log = logging.getLogger(__name__)


class Results:
    """Finished lines and the tokens of unfinished ones, on disk within a second or so.  For one process of a job.

    output: the file; `<output>.journal` and `<output>.lease` stand beside it.
    facts: what decides the text (input, model, options), for JSON.  A run that finds an output goes on with it, and only
        with the same facts.
    same: compares the former `facts['input']` with this one; returns what is wrong, or None.  By default they are equal.
    stale_seconds: how long another process's lease must stand still before it is taken over.
    sync_seconds: how long the thread gathers before it writes.
    hung_seconds: how long a write may take before `check` says that the disk does not answer.
    meanwhile: called again and again where the constructor, `existing`, `flush` or `close` may take long.

    began: when the first run that found nothing done began, local time without a zone: a date in a prompt stays the same.
    unfinished: line number -> the tokens that the journal had at the opening, but for lines finished or forgotten since.

    The constructor cuts a torn last line.  It raises ResultsError where the output cannot be written, another process
    writes it, the facts differ, or it was not begun by this class.
    """

    def __init__(self, output: str | os.PathLike, facts: dict, *, same: Callable[[Any, Any], str | None] | None = None,
                 stale_seconds: float = 20.0, sync_seconds: float = 0.5, hung_seconds: float = 300.0,
                 meanwhile: Callable[[], object] = lambda: None):
        output = os.path.realpath(output) if os.path.islink(output) else output  # its lease must be one for all links
        self.output = Path(output)
        self.unfinished: dict[int, list[int]] = {}
        self.began = datetime.now().replace(microsecond=0)
        self._facts = facts
        self._lease, self._meanwhile = Lease(f'{output}.lease', stale_seconds, meanwhile), meanwhile
        self._results, self._journal = Lines(self.output), Lines(Path(f'{output}.journal'))
        self._sync_seconds, self._hung_seconds = sync_seconds, hung_seconds

        self._changed = threading.Condition()  # guards what follows
        self._records: list[bytes] = []
        self._finished: list[int] = []  # their line numbers
        self._tokens: dict[int, array] = {}  # of each unfinished line, as int64
        self._saved: dict[int, int] = {}  # how many of them are in the journal
        self._waiting = 0  # bytes that are not on disk yet
        self._asked = self._served = 0  # requests for a sync at once, and how far they are fulfilled
        self._rounds = 0  # of the thread
        self._failure = ''
        self._leaving = self._closed = False
        self._seen_rounds, self._seen_at, self._silent_seconds = 0, time.monotonic(), 0.0  # by check()
        try:
            self._open(same)
        except OSError as error:
            self._leave()
            hint = 'free some space' if _is_full(error) else 'choose another --output'
            raise ResultsError(f'cannot write {self.output}: {error.strerror}; {hint}') from error
        except BaseException:
            self._leave()
            raise
        self._thread = threading.Thread(target=self._run, name='results', daemon=True)
        self._thread.start()

    def existing(self) -> Iterator[dict]:
        """The records that the output has now, in order.  Raises ResultsError for a line that is no JSON object."""
        for number, line in enumerate(self._results.read(), 1):
            self._meanwhile()
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise ResultsError(f'{self.output}, line {number}: not a JSON object, so not of tpmpi.batch; '
                                   f'remove the line, or choose another --output')
            yield record

    def forget(self, line: int) -> None:
        """Drops the journal's tokens of a line: the output has it, or it shall start anew."""
        with self._changed:
            self.unfinished.pop(line, None)
            self._tokens.pop(line, None)
            self._saved.pop(line, None)

    def finish(self, line: int, record: str) -> None:
        """Queues a record, JSON without a newline, for the output.  Blocks only while 64 MB wait for the disk."""
        assert '\n' not in record
        data = record.encode() + b'\n'
        with self._room():
            self._records.append(data)
            self._finished.append(line)
            self._waiting += len(data)
            self.unfinished.pop(line, None)

    def progress(self, line: int, tokens: Sequence[int]) -> None:
        """Queues the tokens that a line has gained since the last call, or since the journal's `unfinished`."""
        with self._room():
            self._tokens.setdefault(line, array('q')).extend(array('q', tokens))
            self._waiting += 8 * len(tokens)

    def check(self) -> None:
        """Raises ResultsError when the thread could not write or lost the lease, or a write takes `hung_seconds`."""
        with self._changed:
            if self._failure:
                raise ResultsError(self._failure)
            now = time.monotonic()
            gap = min(now - self._seen_at, self._hung_seconds / 10)  # this process may itself have been suspended
            self._silent_seconds = self._silent_seconds + gap if self._rounds == self._seen_rounds else 0.0
            self._seen_rounds, self._seen_at = self._rounds, now
            if self._silent_seconds > self._hung_seconds:
                raise ResultsError(f'cannot write {self.output}: the disk has not answered for {self._hung_seconds:g} s; '
                                   f'what is finished is safe: start the same command again when it does')

    def flush(self) -> None:
        """Returns when all that was queued before is on disk.  Raises as `check` does."""
        with self._changed:
            self._asked += 1
            ticket = self._asked
            self._changed.notify_all()
            while self._served < ticket:
                self.check()
                self._meanwhile()
                self._changed.wait(min(1.0, self._hung_seconds / 20))

    def close(self, complete: bool) -> None:
        """Flushes and gives the lease back.  Raises as `check` does; a second call does nothing.

        complete: all requests are finished.  The journal then keeps its first line, with the facts, so that the same
        command finds nothing to do and a different one is refused.  Otherwise it keeps the tokens for the next run.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
            self._end_thread()
            if complete:
                self._journal.replace([self._header], self._beat)
        except OSError as error:
            raise ResultsError(self._refusal(error)) from error
        finally:
            if self._end_thread():  # else its write may still land
                self._leave()

    def _open(self, same: Callable[[Any, Any], str | None] | None) -> None:
        """Acquires the lease, and opens the output and the journal.  Touches neither before the facts are compared."""
        if not self.output.parent.is_dir():
            raise ResultsError(f'cannot write {self.output}: there is no folder {self.output.parent}; '
                               f'make it, or choose another --output')
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(self.output).st_mode):
                raise ResultsError(f'cannot write {self.output}: it is no regular file; choose another --output')
        self._lease.acquire()
        empty = self._results.open(os.O_CREAT) == 0
        header = self._load()
        if header is None and not empty:
            raise ResultsError(f'{self.output} holds results that were not written by tpmpi.batch, or its journal '
                               f'{self._journal.path} is gone; move it away, or choose another --output')
        if header is not None and not (empty and not self._tokens):
            self._compare(header['facts'], json.loads(json.dumps(self._facts)), same)
            with contextlib.suppress(TypeError, ValueError):  # of a version that did not write it
                self.began = datetime.fromisoformat(header.get('began'))
        if self._lease.may_live:  # the former process may wake up within a write: it shall not find this file
            self._results.replace(self._results.blocks(), self._beat)
        else:
            self._results.cut()
        self._journal.replace([self._header + self._entries(self._tokens)], self._beat)
        self._saved = {line: len(tokens) for line, tokens in self._tokens.items()}
        self.unfinished = {line: tokens.tolist() for line, tokens in self._tokens.items()}

    @property
    def _header(self) -> bytes:
        return json.dumps({'tpmpi_journal': VERSION, 'began': self.began.isoformat(), 'facts': self._facts}).encode() + b'\n'

    def _beat(self) -> None:
        """Of the lease, in the caller's thread."""
        self._meanwhile()
        self._lease.beat()

    def _load(self) -> dict | None:
        """Reads the journal into `_tokens`, as far as it fits together, and returns its first line; None without one."""
        try:
            self._journal.open()
        except FileNotFoundError:
            return None
        lines = self._journal.read()
        first = next(lines, None)
        if first is None:
            return None
        try:
            header = json.loads(first)
            known = header['tpmpi_journal'] == VERSION and isinstance(header['facts'], dict)
        except (ValueError, TypeError, KeyError, RecursionError):
            known = False
        if not known:
            raise ResultsError(f'{self._journal.path} is not a journal of this version of tpmpi.batch; move it and '
                               f'{self.output} away, or choose another --output')
        for entry in lines:
            self._meanwhile()
            with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
                entry = json.loads(entry)
                line, start, tokens = entry['line'], entry['from'], array('q', entry['tokens'])
                if type(line) is int and start == 0:  # the first tokens, or the line was started anew
                    self._tokens[line] = tokens
                elif start == len(self._tokens[line]):
                    self._tokens[line].extend(tokens)
        return header

    def _compare(self, former: dict, facts: dict, same: Callable[[Any, Any], str | None] | None) -> None:
        """Raises ResultsError when the output was begun with other facts."""
        if same is not None:
            message = same(former.pop('input', None), facts.pop('input', None))
            if message:
                raise ResultsError(message)
        for name, old, new in _differences(former, facts):
            raise ResultsError(f'{self.output} was begun with {name} {_short(old)}, now it is {_short(new)}: '
                               f'choose another --output, or take the former {name}')

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """Waits until less than QUEUE_BYTES are queued, and holds the lock."""
        with self._changed:
            while self._waiting > QUEUE_BYTES:
                self.flush()
            yield

    def _run(self) -> None:
        """The thread."""
        try:
            while not self._leaving:
                self._sync()
                with self._changed:
                    self._rounds += 1
                    self._changed.wait_for(lambda: self._leaving or self._asked > self._served, self._sync_seconds)
        except Exception as error:
            log.debug('cannot write %s', self.output, exc_info=True)
            with self._changed:
                self._failure = str(error) if isinstance(error, ResultsError) else self._refusal(error)
                self._changed.notify_all()

    def _sync(self) -> None:
        """Brings what is queued to disk: records, then tokens."""
        with self._changed:
            asked, waiting = self._asked, self._waiting
            records, self._records = self._records, []
            for line in self._finished:
                self._tokens.pop(line, None)
                self._saved.pop(line, None)
            self._finished.clear()
            gained = {line: tokens[self._saved.get(line, 0):] for line, tokens in self._tokens.items()
                      if len(tokens) > self._saved.get(line, 0)}
            entries = self._entries(gained, self._saved)
            self._saved.update((line, len(self._tokens[line])) for line in gained)
        self._lease.beat()
        self._results.check()
        self._journal.check()
        if records:
            self._results.append(b''.join(records))
        if entries:
            self._journal.append(entries)
        if self._journal.size > COMPACT_BYTES:
            self._compact()
        with self._changed:
            self._waiting -= waiting
            self._served = asked
            self._changed.notify_all()

    def _compact(self) -> None:
        """Rewrites the journal if most of it is about finished lines.  Their records are on disk by now."""
        with self._changed:
            live = {line: tokens[:] for line, tokens in self._tokens.items()}
        data = self._entries(live)
        if self._journal.size > COMPACT_FACTOR * (len(self._header) + len(data)):
            self._journal.replace([self._header + data], self._lease.beat)
            with self._changed:
                self._saved.update((line, len(tokens)) for line, tokens in live.items() if line in self._saved)

    @staticmethod
    def _entries(tokens: dict[int, array], saved: dict[int, int] | None = None) -> bytes:
        """The journal's lines for these tokens, which begin where the saved ones end."""
        return b''.join(b'{"line": %d, "from": %d, "tokens": %s}\n' % (
            line, (saved or {}).get(line, 0), str(new.tolist()).encode()) for line, new in tokens.items() if new)

    def _refusal(self, error: Exception) -> str:
        """What to say when a write failed."""
        hint = 'free some space and ' if _is_full(error) else ''
        return (f'cannot write {self.output}: {getattr(error, "strerror", None) or repr(error)}; what is finished is safe: '
                f'{hint}start the same command again')

    def _end_thread(self) -> bool:
        """Lets the thread end; False when it hangs in a write."""
        with self._changed:
            self._leaving = True
            self._changed.notify_all()
        self._thread.join(10)
        return not self._thread.is_alive()

    def _leave(self) -> None:
        """Closes the files and gives the lease back."""
        self._results.close()
        self._journal.close()
        with contextlib.suppress(OSError):  # left behind, it will be seen to be a dead process's
            self._lease.release()


def _is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _differences(old: Any, new: Any, name: str = '') -> Iterator[tuple[str, Any, Any]]:
    """(name, old, new) of each fact that differs; those of a nested dict are named like `sampling.temperature`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f'{name}.{key}' if name else key)
    elif old != new:
        yield name, old, new


def _short(value: Any) -> str:
    text = 'absent' if value is None else json.dumps(value)
    return text if len(text) <= 80 else f'{text[:77]}...'
