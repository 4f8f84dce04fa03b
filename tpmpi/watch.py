"""The watch over the ranks: when one is lost, fails or makes no progress, all end in seconds, with one message.

Standard library only, since this file is also the watchman's program: rank 0 runs it as a process of its own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import hmac
import ipaddress
import logging
import math
import os
import secrets
import selectors
import signal
import socket
import sys
import termios
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

JOIN_SECONDS = 10  # a rank that cannot join the watch by then goes on without it
CONNECT_SECONDS, WELCOME_SECONDS = 1.5, 3  # for one address, and for the watchman's answer there
STRANGER_SECONDS = 5  # then a caller that has not shown the secret is turned away
SILENT_SECONDS = 8  # a host that answers nothing, not even the kernel's probes, is lost
PRINT_SECONDS = 0.1  # for the launcher to read a message
ABORT_SECONDS = 1  # for the launcher to end a process, once MPI's abort is called
DEPUTY_SECONDS = 2  # for that abort to reach the ranks that leave the message to another rank
ANSWER_SECONDS = 3  # for the watchman to report a failure, and for a rank to tell where it is
BEAT_SECONDS = 0.2  # steps that are shorter are not all told: the watchman of many ranks shall take no core from them
LEAVE_SECONDS = 5  # for the ranks to be gone before the watchman leaves
MAX_LINE = 4096  # bytes that one may say at once
MAX_NAMES = 8  # ranks in one message

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
        self._line: _Line | None = None  # to the watchman
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
        _print(message)
        if len(self._hosts) == 1:
            raise SystemExit(1)
        self._end(abort=True)

    def interrupted(self) -> NoReturn:
        """Ends all ranks because the user wants it (Ctrl-C), with exit code 130.  The first rank to know says so."""
        message = f'interrupted during {self._phase}; all ranks end'
        if not (self._line and self._line.say('failed', message)):
            _print(message)
        os._exit(128 + signal.SIGINT)

    def close(self) -> None:
        """This rank has done its part, and its end is no loss.  It is ended all the same when another one is lost.

        Call MPI.Finalize next, which waits for the others: during the interpreter's own exit the thread is no more.
        """
        self._closed = True
        if self._line:
            self._line.say('goodbye')

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
        _print(f'rank 0 on {self._hosts[0]} was lost during {self._phase} ({reason}); all ranks end')
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


@dataclass(eq=False)
class _Line:
    """A connection on which lines of text travel, a word and its object, and what the watchman knows of the caller."""

    connection: socket.socket
    rank: int = -1  # a stranger
    host: str = ''
    pid: int = 0  # known for a rank of the watchman's own machine
    phase: str = ''  # none before it has joined
    watched: bool = False  # the end of the line would be a loss
    step: str = 'none'
    here: tuple[str, int] | None = None  # its answer: group and collectives
    since: float = field(default_factory=time.monotonic)  # it has called, or its latest step has begun
    unread: bytes = b''

    def __post_init__(self):
        """Lines go at once, and the kernel notices when the other host is dead (the socket options of tcp(7))."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (('TCP_NODELAY', 1), ('TCP_KEEPIDLE', 2), ('TCP_KEEPINTVL', 2), ('TCP_KEEPCNT', 3),
                            ('TCP_USER_TIMEOUT', 1000 * SILENT_SECONDS)):
            if hasattr(socket, name):
                self.connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def say(self, word: str, about: str = '') -> bool:
        """Sends a line, without waiting.  False: nobody is there, or nobody has read thousands of lines."""
        with contextlib.suppress(OSError):
            line = f'{word} {about}'.encode(errors='replace')[:MAX_LINE - 1] + b'\n'
            return self.connection.send(line, socket.MSG_DONTWAIT) > 0
        return False

    def read(self) -> list[tuple[str, str]]:
        """The lines that are whole now.  Waits for data; raises OSError at the end of it, or for too long a line."""
        data = self.connection.recv(MAX_LINE)
        if not data:
            raise ConnectionError(0, 'connection closed')
        *lines, self.unread = (self.unread + data).split(b'\n')
        if len(self.unread) > MAX_LINE:
            raise ConnectionError(0, 'too long a line')
        return [line.decode(errors='replace').partition(' ')[::2] for line in lines]


def _print(message: str) -> None:
    """Writes to stderr and waits until it is read: MPICH's mpirun drops what it has not read before an abort."""
    with contextlib.suppress(OSError, ValueError):  # stderr is closed
        print(f'tpmpi: {message}', file=sys.stderr, flush=True)
        deadline = time.monotonic() + PRINT_SECONDS
        while any(fcntl.ioctl(2, termios.FIONREAD, bytes(4))) and time.monotonic() < deadline:  # unread in the pipe
            time.sleep(0.001)


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
        os.posix_spawn(sys.executable, [sys.executable, '-I', '-S', os.path.abspath(__file__)],
                       {**os.environ, 'TPMPI_WATCHMAN': orders},
                       file_actions=[(os.POSIX_SPAWN_DUP2, listener.fileno(), 0)])
        return listener.getsockname()[1], ['127.0.0.1'] if one_machine else _addresses(), secret, welcome


def _join(rank: int, pid: int, port: int, addresses: Sequence[str], secret: str, welcome: str) -> _Line | None:
    """A rank's line to the watchman, or None where no address leads to a process that knows the word of welcome."""
    deadline = time.monotonic() + JOIN_SECONDS
    while time.monotonic() < deadline:
        for address in addresses:
            with contextlib.suppress(OSError), contextlib.ExitStack() as unless_joined:
                line = _Line(socket.create_connection((address, port), CONNECT_SECONDS))
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


class _Watchman:
    """Waits for all ranks to join and to leave.  When one leaves without a goodbye, it says so and ends the others.

    A stranger is turned away, a silent one keeps nobody waiting, and once all have joined nobody listens any more.
    """

    def __init__(self, listener: socket.socket, size: int, parent: int, secret: str, welcome: str):
        self.listener, self.parent, self.secret, self.welcome = listener, parent, secret, welcome
        self.to_join = size
        self.lines: list[_Line] = []
        self.over = math.inf  # when it leaves, whoever is still there
        self.limit = math.inf  # seconds without a step
        self.looked, self.asked = -math.inf, math.inf  # when it last looked around, and when it asked the ranks
        self.selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Sleeps until something arrives; looks up once a second only where strangers may come, or time may run out."""
        self.selector.register(self.listener, selectors.EVENT_READ)
        while (self.lines or (self.to_join and os.getppid() == self.parent)) and time.monotonic() < self.over:
            for key, _ in self.selector.select(1 if self.to_join or min(self.over, self.limit) < math.inf else None):
                if key.data:
                    self.hear(key.data)
                else:
                    with contextlib.suppress(OSError):  # it has hung up already
                        line = _Line(self.listener.accept()[0])
                        self.selector.register(line.connection, selectors.EVENT_READ, line)
                        self.lines.append(line)
            if (now := time.monotonic()) > self.looked + 1:  # not at each beat of many ranks
                for line in [line for line in self.lines if line.rank < 0 and now > line.since + STRANGER_SECONDS]:
                    self.hang_up(line)
                self.look_for_a_stall(now)
                self.looked = now
        for pid in filter(None, [line.pid for line in self.lines]):
            with contextlib.suppress(OSError):  # a rank that could end itself has: most likely this one is stopped
                os.kill(pid, signal.SIGKILL)

    def hear(self, line: _Line) -> None:
        """Acts on what a caller says, or on the end of its line."""
        try:
            for word, about in line.read():
                if line.rank < 0:
                    self.greet(line, word, about)
                elif word == 'phase':
                    if not line.phase:
                        self.joined(line)
                    line.phase = about
                elif word == 'step':
                    line.step, line.since = about, time.monotonic()
                elif word == 'here':
                    group, collectives, line.step = about.split()
                    line.here = group, int(collectives)
                elif word == 'expect':
                    self.limit, self.asked, self.looked = float(about) + BEAT_SECONDS, math.inf, time.monotonic()
                    for other in self.lines:
                        other.since = self.looked
                elif word == 'stop':
                    for first in (other for other in self.lines if other.rank == 0):
                        first.say(word, about)
                elif word == 'goodbye':
                    line.watched = False
                elif word == 'failed':
                    self.end(about)
        except OSError as error:
            self.hang_up(line)
            if line.watched:
                self.end(f'rank {line.rank} on {line.host} was lost during {line.phase} ({error.strerror}); '
                         f'all ranks end')

    def greet(self, line: _Line, word: str, about: str) -> None:
        """Answers to the secret.  Raises ConnectionError for a stranger."""
        secret, _, caller = about.partition(' ')
        if word != 'join' or not hmac.compare_digest(secret.encode(), self.secret.encode()):
            raise ConnectionError(0, 'a stranger')
        rank, line.host, pid = caller.split()
        line.rank, line.pid = int(rank), int(pid)
        line.say('welcome', self.welcome)

    def joined(self, line: _Line) -> None:
        """From now on the end of this line is a loss."""
        line.watched, line.since = True, time.monotonic()
        self.to_join -= 1
        if not self.to_join:
            self.selector.unregister(self.listener)
            self.listener.close()
        if self.over < math.inf:
            line.say('end')

    def hang_up(self, line: _Line) -> None:
        """Forgets a line."""
        self.selector.unregister(line.connection)
        line.connection.close()
        self.lines.remove(line)

    def look_for_a_stall(self, now: float) -> None:
        """Asks all ranks where they are if one is late.  Then ends them, unless none is late any more."""
        ranks = [line for line in self.lines if line.watched]
        if now > self.looked + ANSWER_SECONDS:  # it was suspended, and the ranks surely with it: that time does not count
            self.asked = math.inf
            for line in ranks:
                line.since = min(line.since + now - self.looked, now)
        late = [line for line in ranks if now > line.since + self.limit]
        if not late:
            self.asked = math.inf
        elif self.asked == math.inf:
            self.asked = now
            for line in ranks:
                line.here = None
                line.say('where')
        elif now > self.asked + ANSWER_SECONDS or all(line.here for line in ranks):
            silent = [line for line in ranks if not line.here and line.since < self.asked]
            self.end(f'no progress for {self.limit - BEAT_SECONDS:g} s: {_blame(silent or _behind(ranks, late), late)}; '
                     f'all ranks end, and the same command goes on', silent)

    def end(self, message: str, silent: Sequence[_Line] = ()) -> None:
        """Says why and ends all ranks, one of them by MPI's abort.  Only the first loss counts: the others follow."""
        if self.over == math.inf:
            self.over = time.monotonic() + LEAVE_SECONDS
            _print(message)
            ranks = sorted((line for line in self.lines if line.phase),
                           key=lambda line: (line in silent, not line.watched, line.rank))
            for number, line in enumerate(ranks):
                line.say('end' if number else 'abort')


def _behind(ranks: Sequence[_Line], late: Sequence[_Line]) -> list[_Line]:
    """Those who have entered fewer collectives than others of their group, of the groups of the late."""
    behind = []
    for group in {line.here[0] for line in late if line.here}:
        counts = {line: line.here[1] for line in ranks if line.here and line.here[0] == group}
        behind += [line for line in counts if counts[line] == min(counts.values()) < max(counts.values())]
    return behind


def _blame(missing: Sequence[_Line], late: Sequence[_Line]) -> str:
    """What a message says of the missing ranks, or of all if there are none."""
    names = [f'rank {line.rank} on {line.host} (last step {line.step})' for line in sorted(missing, key=lambda x: x.rank)]
    names[MAX_NAMES:] = [f'{len(names) - MAX_NAMES} more'] * (len(names) > MAX_NAMES)
    return f'{", ".join(names)} did not arrive' if names else f'every rank waits (last step {late[0].step})'


if __name__ == '__main__':
    os.closerange(3, 1 << 16)  # ends of the launcher's pipes, which would outlive rank 0 here
    os.setsid()  # MPICH's mpirun kills the process groups of the ranks
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the ranks may take them for a wish to stop gently; it leaves after them
    size, parent, secret, welcome = os.environ['TPMPI_WATCHMAN'].split()
    _Watchman(socket.socket(fileno=0), int(size), int(parent), secret, welcome).run()
