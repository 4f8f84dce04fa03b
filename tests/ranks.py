"""Running ranks: real ones under mpirun, and threads that stand in for ranks where a property test needs hundreds."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tpmpi.comm import Traffic

PROGRAMS = Path(__file__).parent / 'programs'
ROOT = Path(__file__).parent.parent


def mpirun() -> str:
    """The mpirun that belongs to this Python, else the PATH's; skips the test where there is none."""
    beside = Path(sys.executable).parent / 'mpirun'
    found = str(beside) if beside.exists() else shutil.which('mpirun')
    if found is None:
        pytest.skip('no mpirun: install the mpich or the openmpi extra, or load an MPI module')
    return found


def environment(**changes) -> dict[str, str]:
    """The environment of a rank: nothing set that the program should decide itself, and the package that the tests import."""
    env = {k: v for k, v in os.environ.items() if not k.endswith('_NUM_THREADS')}
    env['PYTHONPATH'] = os.pathsep.join(p for p in (*sys.path, str(PROGRAMS)) if p and Path(p).is_dir())
    env.update({'OMPI_ALLOW_RUN_AS_ROOT': '1', 'OMPI_ALLOW_RUN_AS_ROOT_CONFIRM': '1', 'PYTHONWARNINGS': 'error',
                'PYTHONSAFEPATH': '1'})  # not the sources in the working directory, whose kernels would be compiled as well
    return env | changes


def command(size: int, *arguments) -> list[str]:
    """The command line that runs Python on `size` ranks."""
    launcher = mpirun()
    extra = ['--oversubscribe'] if is_open_mpi() else []
    return [launcher, '-n', str(size), *extra, sys.executable, *(a if isinstance(a, bytes) else str(a) for a in arguments)]


def is_open_mpi() -> bool:
    """The launcher is Open MPI's."""
    return 'Open MPI' in _version(mpirun())


def _version(launcher: str, _cache: dict = {}) -> str:  # noqa: B006  one look per session
    if launcher not in _cache:
        _cache[launcher] = subprocess.run([launcher, '--version'], capture_output=True, text=True).stdout
    return _cache[launcher]


def run_ranks(size: int, *arguments, timeout: float = 400, **options) -> subprocess.CompletedProcess:
    """Run `python arguments` on `size` ranks and return what it printed, whatever its exit code."""
    options = {'text': True, 'env': environment(), 'stdin': subprocess.DEVNULL} | options
    return subprocess.run(command(size, *arguments), capture_output=True, timeout=timeout, **options)


def run_program(name: str, size: int, *arguments, timeout: float = 400, **options):
    """Run tests/programs/<name> on `size` ranks; it must succeed, and its last line of output is JSON."""
    done = run_ranks(size, PROGRAMS / name, *arguments, timeout=timeout, **options)
    assert done.returncode == 0, f'{done.stdout}\n{done.stderr}'
    return json.loads(done.stdout.splitlines()[-1])


def alive(pid: int) -> bool:
    """A process is there and no zombie."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


class ThreadCommunicator:
    """The communicator's numeric calls between threads of one process."""

    def __init__(self, rank: int, size: int, shared: dict):
        self.rank, self.size, self.shared = rank, size, shared
        self.traffic = {name: Traffic() for name in ('all_reduce', 'gather', 'broadcast')}

    def _meet(self, value):
        self.shared[self.rank] = value
        self.shared['barrier'].wait(60)
        values = [self.shared[r] for r in range(self.size)]
        self.shared['barrier'].wait(60)
        return values

    def all_reduce(self, x):
        assert x.dtype == np.float32 and x.flags.c_contiguous
        self.traffic['all_reduce'].calls += 1
        self.traffic['all_reduce'].bytes += x.nbytes
        x[...] = np.sum(self._meet(x.copy()), axis=0, dtype=np.float32)

    def room(self, shape):
        return None

    def gather(self, x, out):
        values = self._meet(x.copy())
        if self.rank == 0:
            out[...] = values

    def broadcast(self, x):
        x[...] = self._meet(x.copy())[0]

    def announce(self, value=None):
        return pickle.loads(self._meet(pickle.dumps(value))[0])

    def rest(self):
        self._meet(None)


def on_threads(size: int, function) -> list:
    """function(comm) on `size` threads, each a rank; the results in the order of ranks, or the first error."""
    shared = {'barrier': threading.Barrier(size)}
    results, errors = [None] * size, []

    def work(rank):
        try:
            results[rank] = function(ThreadCommunicator(rank, size, shared))
        except BaseException as e:
            errors.append(e)
            shared['barrier'].abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results
