"""The watchman: a small process beside rank 0 to which each rank keeps a connection.

Standard library only, and nothing of the package: rank 0 runs this file as a program of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import math
import os
import selectors
import signal
import socket
import sys
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

STRANGER_SECONDS = 5  # then a caller that has not shown the secret is turned away
SILENT_SECONDS = 8  # a host that answers nothing, not even the kernel's probes, is lost
PRINT_SECONDS = 0.1  # for the launcher to read a message
ANSWER_SECONDS = 3  # for the watchman to report a failure, and for a rank to tell where it is
BEAT_SECONDS = 0.2  # steps that are shorter are not all told: the watchman of many ranks shall take no core from them
LEAVE_SECONDS = 5  # for the ranks to be gone before the watchman leaves
MAX_LINE = 4096  # bytes that one may say at once
MAX_NAMES = 8  # ranks in one message


@dataclass(eq=False)
class Line:
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


def say_at_the_end(message: str) -> None:
    """Writes to stderr and waits until it is read: MPICH's mpirun drops what it has not read before an abort."""
    with contextlib.suppress(OSError, ValueError):  # stderr is closed
        print(f'tpmpi: {message}', file=sys.stderr, flush=True)
        deadline = time.monotonic() + PRINT_SECONDS
        while any(fcntl.ioctl(2, termios.FIONREAD, bytes(4))) and time.monotonic() < deadline:  # unread in the pipe
            time.sleep(0.001)


class Watchman:
    """Waits for all ranks to join and to leave.  When one leaves without a goodbye, it says so and ends the others.

    A stranger is turned away, a silent one keeps nobody waiting, and once all have joined nobody listens any more.
    """

    def __init__(self, listener: socket.socket, size: int, parent: int, secret: str, welcome: str):
        self.listener, self.parent, self.secret, self.welcome = listener, parent, secret, welcome
        self.to_join = size
        self.lines: list[Line] = []
        self.over = math.inf  # when it leaves, whoever is still there
        self.limit = math.inf  # seconds without a step
        self.looked, self.asked = -math.inf, math.inf  # when it last looked around, and when it asked the ranks
        self.left: list[tuple[str, str, int]] = []  # who said goodbye: rank and host, group, collectives
        self.selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Sleeps until something arrives; looks up once a second only for strangers, time limits, and who has left."""
        self.selector.register(self.listener, selectors.EVENT_READ)
        while (self.lines or (self.to_join and os.getppid() == self.parent)) and time.monotonic() < self.over:
            look_up = self.to_join or self.left or min(self.over, self.limit) < math.inf
            for key, _ in self.selector.select(1 if look_up else None):
                if key.data:
                    self.hear(key.data)
                else:
                    with contextlib.suppress(OSError):  # it has hung up already
                        line = Line(self.listener.accept()[0])
                        self.selector.register(line.connection, selectors.EVENT_READ, line)
                        self.lines.append(line)
            if (now := time.monotonic()) > self.looked + 1:  # not at each beat of many ranks
                for line in [line for line in self.lines if line.rank < 0 and now > line.since + STRANGER_SECONDS]:
                    self.hang_up(line)
                self.look_for_a_stall(now)
                self.look_for_the_deserted()
                self.looked = now
        for pid in filter(None, [line.pid for line in self.lines]):
            with contextlib.suppress(OSError):  # a rank that could end itself has: most likely this one is stopped
                os.kill(pid, signal.SIGKILL)

    def hear(self, line: Line) -> None:
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
                    group, collectives = about.split()
                    line.watched = False
                    self.left.append((f'rank {line.rank} on {line.host}', group, int(collectives)))
                elif word == 'failed':
                    self.end(about)
        except OSError as error:
            self.hang_up(line)
            if line.watched:
                self.end(f'rank {line.rank} on {line.host} was lost during {line.phase} ({error.strerror}); '
                         f'all ranks end')

    def greet(self, line: Line, word: str, about: str) -> None:
        """Answers to the secret.  Raises ConnectionError for a stranger."""
        secret, _, caller = about.partition(' ')
        if word != 'join' or not hmac.compare_digest(secret.encode(), self.secret.encode()):
            raise ConnectionError(0, 'a stranger')
        rank, line.host, pid = caller.split()
        line.rank, line.pid = int(rank), int(pid)
        line.say('welcome', self.welcome)

    def joined(self, line: Line) -> None:
        """From now on the end of this line is a loss."""
        line.watched, line.since = True, time.monotonic()
        self.to_join -= 1
        if not self.to_join:
            self.selector.unregister(self.listener)
            self.listener.close()
        if self.over < math.inf:
            line.say('end')

    def hang_up(self, line: Line) -> None:
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

    def look_for_the_deserted(self) -> None:
        """Ends all ranks if one has entered a collective to which another, which has left, never came.  Then asks once more."""
        for line in [line for line in self.lines if line.watched and self.left]:
            for name, group, collectives in self.left:
                if line.here and line.here[0] == group and line.here[1] > collectives:
                    self.end(f'{name} has ended, and rank {line.rank} on {line.host} waits for it: every rank must make the '
                             f'same calls; all ranks end')
            line.say('where')

    def end(self, message: str, silent: Sequence[Line] = ()) -> None:
        """Says why and ends all ranks, one of them by MPI's abort.  Only the first loss counts: the others follow."""
        if self.over == math.inf:
            self.over = time.monotonic() + LEAVE_SECONDS
            say_at_the_end(message)
            ranks = sorted((line for line in self.lines if line.phase),
                           key=lambda line: (line in silent, not line.watched, line.rank))
            for number, line in enumerate(ranks):
                line.say('end' if number else 'abort')


def _behind(ranks: Sequence[Line], late: Sequence[Line]) -> list[Line]:
    """Those who have entered fewer collectives than others of their group, of the groups of the late."""
    behind = []
    for group in {line.here[0] for line in late if line.here}:
        counts = {line: line.here[1] for line in ranks if line.here and line.here[0] == group}
        behind += [line for line in counts if counts[line] == min(counts.values()) < max(counts.values())]
    return behind


def _blame(missing: Sequence[Line], late: Sequence[Line]) -> str:
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
    Watchman(socket.socket(fileno=0), int(size), int(parent), secret, welcome).run()
