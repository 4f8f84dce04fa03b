"""One writer of a file on a parallel file system: a lease to be the only one, and files of whole lines.

File locks fail on many parallel file systems, so a lease is a small file, created exclusively.  Its holder moves a
counter in it; who finds one that does not move takes it over.  The clocks of two hosts are never compared.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

CONFIRM_SECONDS = 0.05  # after the creation, for another process that had judged the former lease
MISSING_SECONDS = (0, 0.1, 0.3, 0.6)  # another process may have moved a lease aside by mistake, and puts it back
COUNTER_AT = len('{"counter": "')
BLOCK_BYTES = 1 << 24  # of a copy

log = logging.getLogger(__name__)


class ResultsError(ValueError):
    """Why the output of a batch cannot be written, or no more: one line that says what to do."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease, as the lease says it."""

    host: str
    pid: int
    started: int  # clock ticks from the boot to the process's start, since pids are reused; 0: unknown
    machine: str  # boot and pid namespace: only there does the pid mean this process; '': unknown
    job: str  # Slurm's job or array task; '': none
    restarts: int  # of that job, so far
    token: str

    def __str__(self) -> str:
        return f'process {self.pid} on {self.host}' + (f' (Slurm job {self.job})' if self.job else '')

    def gone(self) -> bool:
        """Whether this process is seen to be dead; False also where it cannot be seen."""
        if not self.machine or self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            pass
        state, started = _state(str(self.pid))
        return state in ('Z', 'X') or (started != self.started and 0 not in (started, self.started))

    def restarted_as(self, other: Holder) -> bool:
        """Whether Slurm has started the same job again since, as that other process."""
        return self.job == other.job != '' and self.restarts < other.restarts


class Lease:
    """The right to write, held by a file at `path` that names this process and moves with each `beat`.

    stale_seconds: a lease that does not move for so long, by the waiting process's own clock, is taken over.
    meanwhile: called again and again while `acquire` waits.
    """

    def __init__(self, path: str | os.PathLike, stale_seconds: float = 20.0, meanwhile: Callable[[], object] = lambda: None):
        self.path = Path(path)
        self.stale_seconds, self._meanwhile = stale_seconds, meanwhile
        self.may_live = False  # taken over from a process that was not seen dead, and may wake up
        self._holder = _this_process()
        self._counter = 0
        self._file = -1

    def acquire(self) -> None:
        """Creates the lease, or takes over one whose holder is dead, restarted or silent.

        Waits up to `stale_seconds`.  Raises ResultsError when the lease moves, OSError when it cannot be written.
        """
        judged, since = None, 0.0
        while not self._create():
            self._meanwhile()
            raw, now = _read(self.path), time.monotonic()
            former = _parse(raw)
            dead = former is not None and former.gone()
            restarted = former is not None and former.restarted_as(self._holder)
            if judged is None or (raw != judged and not raw):
                judged, since = raw, now
                log.info('%s exists: is %s still at work?', self.path, former or 'its holder')
            elif raw != judged and not (dead or restarted):
                raise ResultsError(f'{self.path} is held by {former or "another process"}, which is at work: '
                                   f'wait for its end or end it, or choose another --output')
            if dead or restarted or now - since > self.stale_seconds:
                if self._retire(raw):
                    self.may_live |= not dead
                    log.info('%s: taken over from %s', self.path, former or 'a process that died while it began')
            else:
                time.sleep(min(0.1, self.stale_seconds / 10))

    def beat(self) -> None:
        """Moves the counter.  Raises ResultsError when the lease is no longer ours: then write nothing more.

        Only digits change, in place and through the file that this process created: a reader never sees a torn lease,
        and a process that wakes up late moves its own, discarded file, where a rename would remove the new holder's.
        """
        for seconds in MISSING_SECONDS:
            time.sleep(seconds)
            raw = _read(self.path)
            if raw:
                break
        if not self._ours(raw):
            self._lost(raw)
        self._counter += 1
        try:
            os.pwrite(self._file, b'%012d' % self._counter, COUNTER_AT)
            os.fsync(self._file)  # NFS shows it to other hosts only now
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            self._lost(b'')

    def release(self) -> None:
        """Removes the lease if it is ours."""
        if self._file >= 0:
            raw = _read(self.path)
            if self._ours(raw):
                self._retire(raw)
            os.close(self._file)
            self._file = -1

    def _create(self) -> bool:
        """Creates the lease exclusively; False where there is one."""
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            return False
        try:
            line = json.dumps({'counter': f'{self._counter:012}', **asdict(self._holder)}).encode() + b'\n'
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
            time.sleep(CONFIRM_SECONDS)
            self.beat()
        except OSError:  # the disk is full: leave no empty lease
            self._close()
            with contextlib.suppress(OSError):
                os.unlink(self.path)
            raise
        except ResultsError:  # another process was here first
            self._close()
            return False
        return True

    def _retire(self, raw: bytes) -> bool:
        """Removes the lease if this is still its content.  Of several processes that try, one succeeds."""
        aside = self.path.with_name(f'{self.path.name}.{self._holder.token}')
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return False
        if _read(aside) == raw:
            os.unlink(aside)
            return True
        os.rename(aside, self.path)  # it has moved, or is new.  Should a third one stand there, its holder will notice
        return False

    def _ours(self, raw: bytes) -> bool:
        found = _parse(raw)
        return found is not None and found.token == self._holder.token

    def _lost(self, raw: bytes) -> None:
        """Raises ResultsError for a lease of this content, which is not ours."""
        now = _parse(raw)
        raise ResultsError(f'{self.path} {f"was taken over by {now}" if now else "was removed"}: this process writes '
                           f'nothing more; only one may write an output at a time')

    def _close(self) -> None:
        os.close(self._file)
        self._file = -1


class Lines:
    """A file of whole lines that grows at its end.  `size`: bytes up to the end of the last one."""

    def __init__(self, path: Path):
        self.path = path
        self.size = 0
        self._file = -1

    def open(self, flags: int = 0) -> int:
        """Opens the file, with os.O_CREAT a new one, and finds the last whole line.  Returns the bytes in the file."""
        self._file = os.open(self.path, flags | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o666)
        bytes_in_file = end = os.fstat(self._file).st_size
        while end:
            start = max(0, end - (1 << 16))
            newline = os.pread(self._file, end - start, start).rfind(b'\n')
            if newline >= 0:
                self.size = start + newline + 1
                break
            end = start
        return bytes_in_file

    def cut(self) -> None:
        """Cuts the torn last line."""
        if os.fstat(self._file).st_size > self.size:
            os.ftruncate(self._file, self.size)
            os.fsync(self._file)

    def read(self) -> Iterator[bytes]:
        """The whole lines that are there now."""
        left = self.size
        with open(self.path, 'rb') as file:
            for line in file:
                left -= len(line)
                if left < 0:
                    break
                yield line

    def blocks(self) -> Iterator[bytes]:
        """The whole lines, in large blocks."""
        for start in range(0, self.size, BLOCK_BYTES):
            yield os.pread(self._file, min(BLOCK_BYTES, self.size - start), start)

    def check(self) -> None:
        """Raises ResultsError when the path leads to another file now, or another process has written this one."""
        ours, there = os.fstat(self._file), None
        with contextlib.suppress(FileNotFoundError):
            there = os.stat(self.path)
        if there is None or not os.path.samestat(ours, there) or there.st_size != self.size:
            raise ResultsError(f'{self.path} was removed, replaced or written by somebody else: this process writes '
                               f'nothing more; let the file be, and start the same command again')

    def append(self, data: bytes) -> None:
        """Appends whole lines and syncs.  When that fails, whole lines are left, and the OSError is raised."""
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, memoryview(data)[written:])
            os.fsync(self._file)
        except OSError:
            if written < len(data):  # else fsync failed, and nobody knows which bytes are on disk
                self.size += data.rfind(b'\n', 0, written) + 1
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self.size)
                os.fsync(self._file)
            raise
        self.size += len(data)

    def replace(self, blocks: Iterable[bytes], beat: Callable[[], None]) -> None:
        """Puts a new file with this content in the place of the old one, at once, and goes on with it.

        beat: raises when this process may write no more; called often, and last before the new file takes the place.
        """
        new = Lines(Path(f'{self.path}.tpmpi-new'))
        new.path.unlink(missing_ok=True)  # and never truncated: a process that was taken over may still write to it
        try:
            new.open(os.O_CREAT | os.O_EXCL)
            if self._file >= 0:
                os.fchmod(new._file, stat.S_IMODE(os.fstat(self._file).st_mode))
            for block in blocks:
                new.append(block)
                beat()
            beat()
            os.rename(new.path, self.path)
        except BaseException as error:
            new.close()
            if isinstance(error, OSError):  # else the lease is lost, and the new file may be another process's
                new.path.unlink(missing_ok=True)
            raise
        self.close()
        self._file, self.size = new._file, new.size
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # some file systems cannot; after a crash the old file is as good
            os.fsync(folder)
        os.close(folder)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _read(path: Path) -> bytes:
    """The content of a lease, b'' where there is none.  Opened each time: only then does NFS look for the newest."""
    try:
        with open(path, 'rb') as file:
            return file.read(1 << 16)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return b''
        raise


def _parse(raw: bytes) -> Holder | None:
    """Who holds a lease of this content; None for an empty or torn one."""
    try:
        facts = json.loads(raw)
        holder = Holder(**{name: facts[name] for name in Holder.__dataclass_fields__})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return holder if all(type(getattr(holder, f.name)).__name__ == f.type for f in fields(holder)) else None


def _this_process() -> Holder:
    environ = os.environ
    job = environ.get('SLURM_ARRAY_JOB_ID') or environ.get('SLURM_JOB_ID', '')
    if job:
        task, cluster = environ.get('SLURM_ARRAY_TASK_ID'), environ.get('SLURM_CLUSTER_NAME')
        job += (f'_{task}' if task else '') + (f'@{cluster}' if cluster else '')
    restarts = environ.get('SLURM_RESTART_COUNT', '')
    return Holder(host=socket.gethostname(), pid=os.getpid(), started=_state('self')[1], machine=_machine(), job=job,
                  restarts=int(restarts) if restarts.isdecimal() else 0, token=secrets.token_hex(8))


def _machine() -> str:
    """Equal for two processes that mean the same by a pid, and find it in /proc; '' where that cannot be told."""
    with contextlib.suppress(OSError):
        if os.readlink('/proc/self') == str(os.getpid()):  # /proc may belong to another namespace
            boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
            return f'{boot} {os.readlink("/proc/self/ns/pid")}'
    return ''


def _state(pid: str) -> tuple[str, int]:
    """State and start of a process, fields 3 and 22 of proc_pid_stat(5); ('', 0) where they cannot be read."""
    try:
        stat = Path(f'/proc/{pid}/stat').read_bytes().rpartition(b')')[2].decode().split()
        return stat[0], int(stat[19])
    except OSError:
        return '', 0
