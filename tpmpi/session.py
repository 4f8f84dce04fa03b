"""The start and the end of a parallel run, the same for every command and for the Python API.

`start` begins MPI, limits the BLAS threads before NumPy is imported, and sets the ranks to watch each other; `command`
turns whatever happens into one message and an exit code.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import io
import itertools
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral

from tpmpi import comm as mpi
from tpmpi import device, launch
from tpmpi.config import ConfigError
from tpmpi.watch import Watch

FAILED, USAGE = 1, 2  # exit codes
MOST_THREADS = 1024  # of a rank: more than the cores of any node; libraries hang or crash with many thousands
GENTLE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


@dataclass(frozen=True)
class Session:
    """What this rank was given."""

    comm: mpi.Communicator
    watch: Watch
    host: str
    local_rank: int  # among the ranks of this node
    local_size: int
    threads: int  # that this rank computes with
    streams: list = field(default_factory=list)  # requests of a script that are being read

    def check_streams(self) -> None:
        """Raises ConfigError where this rank is in the middle of a stream, in which the others do nothing but compute it."""
        if self.streams and self.comm.size > 1:
            raise ConfigError('a stream is open, and the other ranks compute it: read it to its end, or close it, first')

    def agreed(self, function: Callable, *arguments, **options):
        """Call a function that every rank calls; if it fails on any, all raise the same GroupError."""
        result, error = None, None
        try:
            result = function(*arguments, **options)
        except (ValueError, OSError, MemoryError, ImportError) as e:
            error = device.in_words(e)
        self.comm.agree(error)
        return result

    def stop_on_signals(self) -> None:
        """From now on a signal on any rank only asks to stop, by `watch.stop_requested` on rank 0; the second Ctrl-C ends.

        Called by every rank's main thread; it is no collective.  The signals are SIGTERM, SIGUSR1, SIGUSR2 and the first
        SIGINT.  What the launchers do with one that they get themselves, tried by hand:

        - MPICH's mpirun (hydra 5.0) passes SIGTERM, SIGUSR1 and the first SIGINT on to each rank, and waits for their end
          and their exit code; at the second SIGINT it kills them, and SIGUSR2 and SIGHUP kill mpirun and the ranks.
        - Open MPI's mpirun (5.0) passes SIGUSR1 and SIGUSR2 on and waits.  After SIGTERM or SIGINT it kills the ranks
          within half a second, which no rank can prevent and no option delays: send it SIGUSR1.
        - Slurm's `scancel --signal`, `sbatch --signal` and the end of the time limit reach all ranks of a step (sbatch(1)).
        """
        interrupts = itertools.count()

        def act(number: int) -> None:
            if number == signal.SIGINT and next(interrupts):
                self.watch.interrupted()
            self.watch.request_stop(signal.Signals(number).name)

        _on_signals(GENTLE, act)


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with errors in one line."""

    def error(self, message: str):
        """Print one line and exit with code 2."""
        self.exit(USAGE, f'{self.prog}: error: {message}; see {self.prog} --help\n')

    def print_help(self, file=None):
        """Print the options and exit."""
        self.tell(self.format_help())

    def tell(self, text: str):
        """Print a text on standard output and exit, with code 1 where it cannot be written."""
        output = Output()
        output.write(text)
        self.exit(FAILED if output.error else 0, output.error and f'tpmpi: {output.error}\n')


class Output:
    """Standard output as UTF-8 bytes.  When the reader has gone away, or nothing can be written, it notes that and is silent.

    `error` is what `check` tells all ranks; a reader that wants no more is none.
    """

    def __init__(self):
        self.closed, self.error = sys.stdout is None, None
        if self.closed:
            self.error = 'standard output is closed; redirect it to a file, or to /dev/null'

    def write(self, text: str) -> None:
        """Write and flush, so that a reader sees each piece as it is made."""
        if self.closed:
            return
        try:
            sys.stdout.buffer.write(text.encode('utf-8', 'replace'))
            sys.stdout.buffer.flush()
        except OSError as e:
            self.closed = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing fails at exit either
            if not isinstance(e, BrokenPipeError):
                self.error = f'standard output: {e.strerror}'

    def check(self) -> None:
        """Raises ValueError where something could not be written."""
        if self.error:
            raise ValueError(self.error)


def start(threads: int | None = None) -> Session:
    """Begin a parallel run on all ranks.  threads: per rank; None takes this rank's fair share of the cores.

    Raises LaunchError where the launcher started more ranks than MPI can see, GroupError for threads out of range.
    """
    comm = mpi.Communicator()
    launch.check_world(comm.size)
    _check_threads(comm, threads)
    local_rank, masks = comm.exchange_on_node(launch.cores())
    threads = int(threads or launch.fair_threads(masks, local_rank, launch.cpu_quota(), os.environ))
    launch.set_blas_threads(threads)
    host = mpi.host_name()
    watch = Watch(comm.rank, comm.size, comm.exchange, mpi.abort)
    return Session(comm, watch, host, local_rank, len(masks), threads)


def of_script(threads: int | None = None, _begun: list[Session] = []) -> Session:  # noqa: B006  one of a process, as MPI is
    """The session of a script on all ranks: begun by the first call, and the same for all later ones.

    Raises what `start` raises, and GroupError where threads are not those that it was begun with: libraries cannot change.
    """
    if not _begun:
        session = start(threads)
        _begun.append(session)
        sys.excepthook = _end_all_ranks(session, sys.excepthook)
        atexit.register(session.watch.close)
        return session
    session = _begun[0]
    _check_threads(session.comm, threads)
    session.comm.agree(None if threads in (None, session.threads) else launch.LaunchError(
        f'threads is {threads}, and the first model of this script was loaded with {session.threads}; leave it out'))
    return session


def _check_threads(comm: mpi.Communicator, threads) -> None:
    number = isinstance(threads, Integral) and not isinstance(threads, bool)
    valid = threads is None or number and 1 <= threads <= MOST_THREADS
    comm.agree(None if valid else launch.LaunchError(
        f'threads is {threads!r}; expected a whole number from 1 to {MOST_THREADS}'))


def _end_all_ranks(session: Session, before: Callable) -> Callable:
    """An uncaught exception on one rank of a script must not leave the others waiting."""
    def hook(kind, error, trace):
        if before is sys.__excepthook__:  # which writes piece by piece, and another rank's words would come between
            sys.stderr.write(''.join(traceback.format_exception(kind, error, trace)))
            sys.stderr.flush()
        else:
            before(kind, error, trace)
        if session.comm.size > 1:
            session.watch.failed(error)
    return hook


def command(body: Callable[[Session, object], int], parse: Callable[[list[str]], object], argv: list[str] | None) -> int:
    """Run a command on all ranks and return this rank's exit code.

    parse: the options from the arguments, raising SystemExit as argparse does; `threads` among them, if there is one.
    body: the command itself.  An error that all ranks know (GroupError) is one line of the rank that had it; any other
    ends all ranks through the watch.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.stderr is None:  # closed; print and argparse would take standard output instead
        sys.stderr = open(os.devnull, 'w')  # noqa: SIM115
    world = mpi.Communicator()
    with contextlib.nullcontext() if world.rank == 0 else _silence():
        options = parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO if world.rank == 0 else logging.WARNING,
                        format=f'tpmpi [{world.rank}/{world.size}] %(message)s')
    try:
        session = start(getattr(options, 'threads', None))
    except (launch.LaunchError, mpi.GroupError) as e:
        if world.rank == getattr(e, 'rank', 0):
            print(f'tpmpi: {e}', file=sys.stderr, flush=True)
        return FAILED
    _on_signals([signal.SIGINT], lambda _: session.watch.interrupted())
    try:
        code = body(session, options)
    except mpi.GroupError as e:
        if session.comm.rank == e.rank:
            print(f'tpmpi: {e}', file=sys.stderr, flush=True)
        code = FAILED
    except BaseException as e:
        session.watch.failed(device.in_words(e))
        raise
    session.watch.close()
    return code


def _on_signals(numbers: Sequence[int], act: Callable[[int], object]) -> None:
    """Call act(number) for each of these signals at once, also in a collective or a kernel, where Python looks at none.

    The interpreter's own handler writes the number to a pipe, in whichever thread it runs, and a thread reads it.  A
    later call takes the place of an earlier one.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, lambda *_: None)
        signal.siginterrupt(number, False)  # nobody below expects a call to be cut short by a signal

    def listen():
        while True:
            for number in os.read(reading, 64):
                if number in numbers:
                    act(number)

    threading.Thread(target=listen, name='signals', daemon=True).start()


def _silence():
    """Nothing is printed inside: usage and help are rank 0's."""
    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())))  # with the buffer that Output writes to
    stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
    return stack


def decoded(data: bytes, name: str) -> str:
    """The text of an option, or of the file that it names.  Raises ValueError when it is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise ValueError(f'{name}: not UTF-8 at byte {e.start}; convert the text to UTF-8') from e
