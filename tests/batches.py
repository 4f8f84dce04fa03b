"""Batches under mpirun, which tests watch, strike and go on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from ranks import PROGRAMS, alive, command, environment

STOPPED = 75  # exit code of a batch that can go on
PLAIN = ('--kernels', 'reference')  # where kernels do not matter: without Numba a rank starts in a third of the time


class Job:
    """`mpirun -n SIZE python -m tpmpi.batch ARGUMENTS`, with the process ids of its ranks.  Ends with its `with` block."""

    def __init__(self, size: int, *arguments):
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        self.pids: list[int] = []
        self.messages = Path(self._folder.name) / 'messages'  # its standard error
        with open(self.messages, 'wb') as file:
            self.launcher = subprocess.Popen(
                command(size, PROGRAMS / 'batch.py', *arguments), env=environment(TPMPI_TEST_PIDS=self._folder.name),
                stdin=subprocess.DEVNULL, stdout=file, stderr=file)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_):
        for pid in filter(alive, (self.launcher.pid, *self.pids)):
            os.kill(pid, signal.SIGKILL)
        self.launcher.wait()
        self._folder.cleanup()

    @property
    def said(self) -> str:
        """What it has said so far."""
        return self.messages.read_bytes().replace(b'\0', b'').decode()

    def wait(self, condition, seconds: float = 180) -> bool:
        """Waits until condition() holds, or the job has ended: False."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.launcher.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.said
            time.sleep(0.005)
        return True

    def wait_for_ranks(self) -> None:
        """Until all ranks have started."""
        files = [Path(self._folder.name) / str(rank) for rank in range(self.size)]
        assert self.wait(lambda: all(file.exists() for file in files)), self.said
        self.pids = [int(file.read_text()) for file in files]

    def wait_for_work(self) -> bool:
        """Until the ranks compute, False where they have nothing to do any more."""
        return self.wait(self.computes)

    def computes(self) -> bool:
        """The model is loaded."""
        return ' in the cache of each replica' in self.said

    def processes(self) -> list[int]:
        """The launcher and all that it has started, parents before children."""
        found = [self.launcher.pid]
        for pid in found:
            for file in Path(f'/proc/{pid}/task').glob('*/children'):
                try:
                    found += map(int, file.read_text().split())
                except OSError:  # it has just ended
                    continue
        return found

    def end(self, seconds: float = 180) -> int:
        """The exit code, once all processes are gone, which takes no longer than some seconds."""
        start = time.monotonic()
        code = self.launcher.wait(seconds)
        while left := [pid for pid in self.pids if alive(pid)]:
            assert time.monotonic() < start + seconds, f'{left} live on after: {self.said}'
            time.sleep(0.01)
        assert 'Traceback' not in self.said, self.said
        return code


def batch(size: int, *arguments, code: int = 0) -> str:
    """Run a batch that must end with this code; returns what it said."""
    with Job(size, *arguments) as job:
        found = job.end(400)
        assert found == code, f'exit code {found}: {job.said}'
        return job.said


def write_lines(path: Path, requests) -> Path:
    """An input of these requests, objects or bytes."""
    path.write_bytes(b''.join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b'\n' for r in requests))
    return path


def records(path: Path) -> list[dict]:
    """The output's lines, each of them whole."""
    data = path.read_bytes()
    assert not data or data.endswith(b'\n')
    return [json.loads(line) for line in data.splitlines()]


def report(path: Path) -> dict:
    """The report of an output."""
    return json.loads(Path(f'{path}.report.json').read_text())
