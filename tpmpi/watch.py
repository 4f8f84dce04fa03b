"""The watch over the ranks: when one is lost, fails or makes no progress, all end in seconds, with one message."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import ipaddress
import logging
import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from tpmpi import watchman
from tpmpi.watchman import ANSWER_SECONDS, BEAT_SECONDS, Line, say_at_the_end

JOIN_SECONDS = 10  # a rank that cannot join the watch by then goes on without it
CONNECT_SECONDS, WELCOME_SECONDS = 1.5, 3  # for one address, and for the watchman's answer there
ABORT_SECONDS = 1  # for the launcher to end a process, once MPI's abort is called
DEPUTY_SECONDS = 2  # for that abort to reach the ranks that leave the message to another rank

log = logging.getLogger(__name__)


class Watch:
    """Ends all ranks, with one message on stderr, when one of them is lost or fails, or takes no step where one is due.

    Most launchers let the others hang in a collective for ever.  Here rank 0 starts a watchman, a small process to
    which each rank keeps one TCP connection: the kernel closes the connections of a dead process, and its probes notice
    a dead host.  It is no thread of rank 0, since MPICH's mpirun kills all ranks of a node within some 10 ms of a loss,
    sometimes before any of them could speak.  A rank that cannot connect is not watched, and a warning says so.

    The constructor is collective.
    exchange: collective, returns the list of all ranks' objects (`MPI.COMM_WORLD.allgather`).
    abort: ends the MPI job, called from any thread (`lambda: MPI.COMM_WORLD.Abort(1)`).
    """

    def __init__(self, rank: int, size: int, exchange: Callable[[object], list], abort: Callable[[], object]):
        self.rank = rank
        self.stop_requested = False  # on rank 0: somebody wants the run to stop gently
        self.where: Callable[[], tuple[int, int]] = lambda: (0, 0)  # this rank's group, and its collectives entered so far
        self._abort = abort
        self._phase = 'start'
        self._step, self._told = 'none', -math.inf  # the number of the latest, and when the watchman heard of one
        self._closed = False
        self._hosts: Sequence[str] = [socket.gethostname()]
        self._line: Line | None = None  # to the watchman
        if size == 1:
            return
        self._hosts, machines = zip(*exchange((socket.gethostname(), _machine())), strict=True)
        offer = None
        if rank == 0:
            try:
                offer = _start_watchman(size, one_machine=len({machine[:2] for machine in machines}) == 1)
            except OSError as error:
                log.warning('no watch over the ranks: if one is lost, the rest may hang (%s)', error)
        offer = exchange(offer)[0]
        if offer is None:
            return
        self._line = _join(rank, os.getpid() if machines[rank] == machines[0] else 0, *offer)
        if self._line:
            threading.Thread(target=self._listen, name='watch', daemon=True).start()
        else:
            log.warning('no watch over rank %d, which cannot connect to %s: if it is lost, the rest may hang',
                        rank, ' or '.join(offer[1]))

    @property
    def phase(self) -> str:
        """What this rank is doing, for the message of its loss: start, load, prefill, decode, finish."""
        return self._phase

    @phase.setter
    def phase(self, phase: str) -> None:
        if phase != self._phase:  # all that a token costs
            self._phase = phase
            if self._line:
                self._line.say('phase', phase)

    def expect_steps(self, seconds: float) -> None:
        """Rank 0: from now on a rank that calls `step` for so long no more, and has not closed, ends the run; inf: none."""
        if self._line:
            self._line.say('expect', str(float(seconds)))

    def step(self, number: int) -> None:
        """This rank begins a step.  Costs some microseconds and never waits."""
        self._step, now = str(number), time.monotonic()
        if self._line and now > self._told + BEAT_SECONDS and self._line.say('step', self._step):
            self._told = now

    def request_stop(self, why: str) -> None:
        """Set `stop_requested` on rank 0, from any rank and any thread.  why: for rank 0's log, such as 'SIGTERM'."""
        if self.rank == 0:
            if not self.stop_requested:
                log.info('%s: asked to stop', why)
            self.stop_requested = True
        elif not (self._line and self._line.say('stop', f'{why} on rank {self.rank}')):
            log.warning('%s: rank %d cannot tell rank 0 to stop', why, self.rank)

    def failed(self, exception: BaseException) -> NoReturn:
        """Ends all ranks, with exit code 1, because of an exception on this one.  The watchman prints it."""
        log.debug('failed during %s', self._phase, exc_info=exception)
        reason = ' '.join(f'{type(exception).__name__}: {exception}'.split())[:1000]
        message = f'rank {self.rank} on {self._hosts[self.rank]} failed during {self._phase}: {reason}'
        if self._line and self._line.say('failed', message):
            time.sleep(ANSWER_SECONDS)  # the watchman answers, and the other thread ends this process
        say_at_the_end(message)
        if len(self._hosts) == 1:
            raise SystemExit(1)
        self._end(abort=True)

    def interrupted(self) -> NoReturn:
        """Ends all ranks because the user wants it (Ctrl-C), with exit code 130.  The first rank to know says so."""
        message = f'interrupted during {self._phase}; all ranks end'
        if not (self._line and self._line.say('failed', message)):
            say_at_the_end(message)
        os._exit(128 + signal.SIGINT)

    def close(self) -> None:
        """This rank has done its part, and its end is no loss.  It is ended all the same when another one is lost, or enters a
        collective that this one never came to.

        Call MPI.Finalize next, which waits for the others: during the interpreter's own exit the thread is no more.
        """
        self._closed = True
        if self._line:
            self._line.say('goodbye', '{} {}'.format(*self.where()))

    def _listen(self) -> None:
        """The thread: does what the watchman says, until that is lost, and rank 0's host surely with it."""
        try:
            while True:
                for word, about in self._line.read():
                    if word == 'where':
                        self._line.say('here', '{} {} {}'.format(*self.where(), self._step))
                    elif word == 'stop':
                        self.request_stop(about)
                    else:
                        self._end(abort=word == 'abort')
        except OSError as error:
            reason = error.strerror
        if self._closed:  # batch systems kill what is left on a node whose ranks have finished
            return
        elsewhere = [rank for rank, host in enumerate(self._hosts) if host != self._hosts[0]] or [0]
        if self.rank != elsewhere[0]:  # one rank shall say it
            time.sleep(min(DEPUTY_SECONDS + 0.1 * self.rank, 2 * DEPUTY_SECONDS))
        say_at_the_end(f'rank 0 on {self._hosts[0]} was lost during {self._phase} ({reason}); all ranks end')
        self._end(abort=True)

    def _end(self, abort: bool) -> NoReturn:
        """Ends this process, and the job by MPI's abort.  Should that block, a timer that needs no GIL ends it."""
        faulthandler.dump_traceback_later(ABORT_SECONDS, exit=True, file=os.open(os.devnull, os.O_WRONLY))
        try:
            if abort:
                self._abort()
            time.sleep(ABORT_SECONDS)
        finally:
            os._exit(1)


def _machine() -> tuple[str, ...]:
    """Kernel and namespaces.  The loopback interface connects ranks with equal first two, a process id needs all three."""
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text()
        return boot, os.readlink('/proc/self/ns/net'), os.readlink('/proc/self/ns/pid')
    except OSError:
        return (socket.gethostname(),)


def _addresses() -> list[str]:
    """Where other hosts may find this one: on all its interfaces.  Its name comes last, since it may mean 127.0.1.1."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, interface in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no IPv4 address; 0x8915 is SIOCGIFADDR of netdevice(7)
                reply = fcntl.ioctl(any_socket, 0x8915, interface.encode().ljust(256, b'\0'))
                found.append(ipaddress.ip_address(reply[20:24]))
    with contextlib.suppress(OSError):
        for line in Path('/proc/net/if_inet6').read_text().splitlines():
            found.append(ipaddress.ip_address(bytes.fromhex(line.split()[0])))
    return [str(ip) for ip in found if not (ip.is_loopback or ip.is_link_local)] + [socket.gethostname()]


def _start_watchman(size: int, one_machine: bool) -> tuple[int, list[str], str, str]:
    """Runs this file as a process that listens.  Returns port, addresses, the secret, and the word of welcome."""
    secret, welcome = secrets.token_hex(32), secrets.token_hex(32)
    both = not one_machine and socket.has_dualstack_ipv6()
    with socket.create_server(('127.0.0.1' if one_machine else '', 0), backlog=4 * size + 64, dualstack_ipv6=both,
                              family=socket.AF_INET6 if both else socket.AF_INET) as listener:
        orders = f'{size} {os.getpid()} {secret} {welcome}'  # in the environment, which other users cannot read
        os.posix_spawn(sys.executable, [sys.executable, '-I', '-S', os.path.abspath(watchman.__file__)],
                       {**os.environ, 'TPMPI_WATCHMAN': orders},
                       file_actions=[(os.POSIX_SPAWN_DUP2, listener.fileno(), 0)])
        return listener.getsockname()[1], ['127.0.0.1'] if one_machine else _addresses(), secret, welcome


def _join(rank: int, pid: int, port: int, addresses: Sequence[str], secret: str, welcome: str) -> Line | None:
    """A rank's line to the watchman, or None where no address leads to a process that knows the word of welcome."""
    deadline = time.monotonic() + JOIN_SECONDS
    while time.monotonic() < deadline:
        for address in addresses:
            with contextlib.suppress(OSError), contextlib.ExitStack() as unless_joined:
                line = Line(socket.create_connection((address, port), CONNECT_SECONDS))
                unless_joined.enter_context(line.connection)
                line.say('join', f'{secret} {rank} {socket.gethostname()} {pid}')
                line.connection.settimeout(WELCOME_SECONDS)
                if line.read() == [('welcome', welcome)]:
                    line.connection.settimeout(None)
                    line.say('phase', 'start')  # watched from here on, and no earlier: it might have given up
                    unless_joined.pop_all()
                    return line
        time.sleep(0.05)
    return None
