"""The start and the end of a parallel run, the same for every command and for the Python API.

`start` begins MPI, limits the BLAS threads before NumPy is imported, and sets the ranks to watch each other; `command`
turns whatever happens into one message and an exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

from tpmpi import comm as mpi
from tpmpi import launch
from tpmpi.watch import Watch

FAILED, USAGE = 1, 2  # exit codes


@dataclass(frozen=True)
class Session:
    """What this rank was given."""

    comm: mpi.Communicator
    watch: Watch
    host: str
    local_rank: int  # among the ranks of this node
    local_size: int
    threads: int  # that this rank computes with

    def agreed(self, function: Callable, *arguments, **options):
        """Call a function that every rank calls; if it fails on any, all raise the same GroupError."""
        result, error = None, None
        try:
            result = function(*arguments, **options)
        except (ValueError, OSError, MemoryError, ImportError) as e:
            error = e
        self.comm.agree(error)
        return result


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with errors in one line."""

    def error(self, message: str):
        """Print one line and exit with code 2."""
        self.exit(USAGE, f'{self.prog}: error: {message}; see {self.prog} --help\n')


def start(threads: int | None = None) -> Session:
    """Begin a parallel run on all ranks.  threads: per rank; None takes this rank's fair share of the cores.

    Raises LaunchError where the launcher started more ranks than MPI can see.
    """
    comm = mpi.Communicator()
    launch.check_world(comm.size)
    local_rank, masks = comm.exchange_on_node(launch.cores())
    threads = threads or launch.fair_threads(masks, local_rank, launch.cpu_quota(), os.environ)
    launch.set_blas_threads(threads)
    host = mpi.host_name()
    watch = Watch(comm.rank, comm.size, comm.exchange, mpi.abort)
    return Session(comm, watch, host, local_rank, len(masks), threads)


def command(body: Callable[[Session, object], int], parse: Callable[[list[str]], object], argv: list[str] | None) -> int:
    """Run a command on all ranks and return this rank's exit code.

    parse: the options from the arguments, raising SystemExit as argparse does; `threads` among them, if there is one.
    body: the command itself.  An error that all ranks know (GroupError) is one line of the rank that had it; any other
    ends all ranks through the watch.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    world = mpi.Communicator()
    with contextlib.nullcontext() if world.rank == 0 else _silence():
        options = parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO if world.rank == 0 else logging.WARNING,
                        format=f'tpmpi [{world.rank}/{world.size}] %(message)s')
    try:
        session = start(getattr(options, 'threads', None))
    except launch.LaunchError as e:
        print(f'tpmpi: {e}', file=sys.stderr, flush=True)
        return FAILED
    _end_on_interrupt(session.watch)
    try:
        code = body(session, options)
    except mpi.GroupError as e:
        if session.comm.rank == e.rank:
            print(f'tpmpi: {e}', file=sys.stderr, flush=True)
        code = FAILED
    except BaseException as e:
        session.watch.failed(e)
        raise
    session.watch.close()
    return code


def _end_on_interrupt(watch: Watch) -> None:
    """Ctrl-C ends all ranks at once, also in the middle of a collective, where Python would not look at signals.

    The interpreter's own handler writes to a pipe at once, in whichever thread it runs, and this thread reads it.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, lambda *_: None)

    def wait():
        os.read(reading, 1)
        watch.interrupted()

    threading.Thread(target=wait, name='interrupt', daemon=True).start()


def _silence():
    """Nothing is printed inside: usage and help are rank 0's."""
    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
    return stack
