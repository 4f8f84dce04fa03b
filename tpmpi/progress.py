"""What a long run says of itself: its progress on standard error, its energy, and a report in a file.

Standard library only.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

WINDOW = 60.0  # seconds that tokens/s looks back
FIRST_LINE = 10.0  # seconds until a log shows that something moves
LONGEST_BAR, SHORTEST_BAR = 30, 10


class Progress:
    """What a batch has done, on rank 0's standard error: a bar on a terminal, one line a minute in a log.

    total, done: lines of the batch, and those that were done before this process.  stream: standard error by default.
    every: seconds between lines, by default 0.2 on a terminal and 60 elsewhere, there with a first line after 10 s.
    A stream that cannot be written to is no error.
    """

    def __init__(self, total: int, done: int = 0, stream: TextIO | None = None,
                 clock: Callable[[], float] = time.monotonic, every: float | None = None,
                 wall: Callable[[], float] = time.time):
        self.stream = sys.stderr if stream is None else stream  # None where the process has no standard error
        self.terminal = False
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self.terminal = self.stream.isatty()
        self.total, self.first_done = total, done
        self.clock, self.wall = clock, wall
        self.every = (0.2 if self.terminal else 60.0) if every is None else every
        self.start = clock()
        self.due = self.start + min(self.every, FIRST_LINE)
        self.samples = deque([(self.start, 0)])  # (time, tokens), a second apart or more, back to the window's begin
        self.drawn = 0  # characters that stand on the terminal's line

    def update(self, done: int, tokens: int, running: int = 0, waiting: int = 0) -> None:
        """Note where the batch stands, and say so when it is time.  Cheap enough for every step.

        done: lines of the whole batch, those of earlier processes included; tokens: made by this process so far;
        running, waiting: requests at this moment.
        """
        now = self.clock()
        if now - self.samples[-1][0] >= 1.0:
            self.samples.append((now, tokens))
            while self.samples[1][0] <= now - WINDOW:
                self.samples.popleft()
        if now < self.due:
            return
        self.due = now + self.every
        rate, seconds = self._tokens_per_second(now, tokens), self._seconds_left(now, done, running)
        share = done / self.total if self.total else 1.0
        tenths = done * 1000 // self.total if self.total else 1000  # rounded down: 100.0 % only when all is done
        parts = [f'{done:,} of {self.total:,} done ({tenths / 10} %)', f'{rate} tokens/s', f'{running:,} running']
        parts += [f'{waiting:,} waiting'] if waiting else []
        if self.terminal:
            parts.insert(2, '- left' if seconds is None else f'about {duration(seconds)} left')
            self._draw(bar(parts, share, self._columns() - 1))  # in the last column some terminals wrap
        else:
            parts += [] if done >= self.total else [f'ends in about {self._end(seconds)}']
            self._write('tpmpi: ' + ', '.join(parts) + '\n')

    def close(self) -> None:
        """Erase the bar.  Nothing is written after this."""
        self.due = math.inf
        self._write('\r' + ' ' * self.drawn + '\r' if self.drawn else '')
        self.drawn = 0

    def _tokens_per_second(self, now: float, tokens: int) -> str:
        """The rate over the window; '-' before the first token."""
        then, before = self.samples[0]
        return f'{(tokens - before) / (now - then):,.1f}' if tokens and now > then else '-'

    def _seconds_left(self, now: float, done: int, running: int) -> float | None:
        """From this process's lines per second; None while fewer lines have ended than run at once.

        The first lines to end are the shortest of those that began together, and would promise too much.
        """
        made = done - self.first_done
        if made < max(1, running) or now <= self.start:
            return None
        return max(0, self.total - done) * (now - self.start) / made

    def _end(self, seconds: float | None) -> str:
        """How long it will take and when that is, with the date if it is not within a day."""
        if seconds is None:
            return '-'
        with contextlib.suppress(OSError, ValueError, OverflowError):  # years that the calendar doesn't have
            at = time.strftime('%H:%M' if seconds < 86400 else '%Y-%m-%d %H:%M', time.localtime(self.wall() + seconds))
            return f'{duration(seconds)} (at {at})'
        return duration(seconds)

    def _columns(self) -> int:
        """The terminal's width: COLUMNS, or that of standard output, or of the stream itself."""
        own = 80
        with contextlib.suppress(OSError, ValueError, AttributeError):
            own = os.get_terminal_size(self.stream.fileno()).columns or own
        return shutil.get_terminal_size((own, 24)).columns

    def _draw(self, line: str) -> None:
        """Put a line in place of the one that stands there."""
        self._write('\r' + line + ' ' * (self.drawn - len(line)))
        self.drawn = len(line)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # gone, closed, or never there
            self.stream.write(text)
            self.stream.flush()


def bar(parts: Sequence[str], share: float, width: int) -> str:
    """One line of at most `width` characters: a bar filled to `share` of 1, and as many of the first parts as fit."""
    parts = list(parts)
    while len(parts) > 1 and len(', '.join(parts)) + SHORTEST_BAR + 3 > width:
        parts.pop()
    text = ', '.join(parts)
    room = min(LONGEST_BAR, width - len(text) - 3)
    if room >= SHORTEST_BAR:
        text = f'[{"#" * int(min(1.0, share) * room):.<{room}}] {text}'
    return text[:max(0, width)]


def duration(seconds: float) -> str:
    """A time for a person, in its two largest units: '45 s', '3 min', '1 h 20 min', '2 d 3 h'."""
    rounded = round(seconds)
    if rounded < 60:
        return f'{rounded} s'
    minutes, hours = (rounded + 30) // 60, (rounded + 1800) // 3600
    days = hours // 24 if minutes >= 24 * 60 else 0
    units = ((days, 'd'), (hours % 24, 'h')) if days else ((minutes // 60, 'h'), (minutes % 60, 'min'))
    return ' '.join(f'{count} {unit}' for count, unit in units if count)


class Energy:
    """Joules of this node's processors and NVIDIA GPUs, whoever uses them, from construction to `read()`.

    Processors: the package domains of RAPL (psys and the sub-domains would count the same energy again), which many
    systems show only to root.  GPUs: NVML's total energy, all that NVML shows; only if the package pynvml is there.
    RAPL's counters wrap after minutes at full power: call `poll()` or `read()` each minute.
    """

    def __init__(self, root: str | Path = '/sys/class/powercap'):
        self.ranges: dict[Path, int] = {}  # domain: the counter's largest value, in microjoules
        self.last: dict[Path, int] = {}
        self.microjoules = 0
        with contextlib.suppress(OSError, ValueError):
            for domain in sorted(Path(root).iterdir()):
                if re.fullmatch(r'intel-rapl:[0-9]+', domain.name) and _is_package(domain):
                    self.ranges[domain] = _integer(domain / 'max_energy_range_uj')
            self.last = self._counters()
        self.nvml, self.gpus = _open_gpus()
        self.first_millijoules = self._gpu_millijoules()

    def _counters(self) -> dict[Path, int]:
        return {domain: _integer(domain / 'energy_uj') for domain in self.ranges}

    def poll(self) -> None:
        """Count what was used since the last call."""
        try:
            counters = self._counters() if self.last else {}
        except (OSError, ValueError):
            counters = {}  # a part of the packages would be a wrong number: None from now on
        for domain, value in counters.items():
            step = value - self.last[domain]
            self.microjoules += step if step >= 0 else step + self.ranges[domain]
        self.last = counters

    def read(self) -> dict[str, float | None]:
        """{'rapl_joules': …, 'gpu_joules': …} since construction; None where they cannot be read."""
        self.poll()
        now = self._gpu_millijoules()
        known = now is not None and self.first_millijoules is not None
        return {'rapl_joules': self.microjoules / 1e6 if self.last else None,
                'gpu_joules': (now - self.first_millijoules) / 1e3 if known else None}

    def _gpu_millijoules(self) -> int | None:
        """The sum over the GPUs since their driver was loaded; None where one of them does not count."""
        try:
            return sum(self.nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) for gpu in self.gpus) if self.gpus else None
        except Exception:  # another package's errors: no figure of a report may end a batch
            return None


def _is_package(domain: Path) -> bool:
    """Whether a domain calls itself package-N or package-N-die-M, and not psys."""
    return (domain / 'name').read_text().startswith('package-')


def _integer(path: Path) -> int:
    return int(path.read_text())


def _open_gpus() -> tuple:
    """(NVML's module, handles of the GPUs that it shows); (None, []) without the module or a GPU."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # an old package of this name says that it is old
            nvml = importlib.import_module('pynvml')
        nvml.nvmlInit()
        return nvml, [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    except Exception:  # as above; without a driver this is an NVMLError
        return None, []


def node_list(hosts: Sequence[str]) -> list[dict]:
    """[{'host': 'node1', 'ranks': [0, 1]}, …] in the order of first appearance; hosts: of each rank."""
    ranks: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks.setdefault(host, []).append(rank)
    return [{'host': host, 'ranks': own} for host, own in ranks.items()]


def write_report(path: Path, report: dict) -> None:
    """Write a report as indented JSON: afterwards the file is whole, or as it was before.

    Raises OSError where it cannot be written, ValueError or TypeError where it is not JSON (as NaN is not).
    """
    path = Path(path)
    text = json.dumps(report, indent=2, allow_nan=False) + '\n'
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        with open(temporary, 'w', encoding='utf-8') as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
