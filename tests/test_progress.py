"""Progress by a fake clock, on logs and terminals; energy from fake counters; reports."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import stat
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpmpi import progress

ROOT = Path(__file__).resolve().parents[1]
NOON = time.mktime((2025, 6, 2, 12, 0, 30, 0, 0, -1))


class Clock:
    """Seconds that pass when told to; wall() begins half a minute after noon."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wall(self) -> float:
        return NOON + self.now - 1000


class Terminal(io.StringIO):
    """A terminal of one line: what stands there, and the longest that ever did."""

    def __init__(self):
        super().__init__()
        self.shown, self.cursor, self.longest, self.writes = '', 0, 0, 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.writes += 1
        for letter in text:
            assert letter.isprintable() and letter.isascii() or letter == '\r'
            if letter == '\r':
                self.cursor = 0
            else:
                self.shown = self.shown[:self.cursor] + letter + self.shown[self.cursor + 1:]
                self.cursor += 1
            self.longest = max(self.longest, self.cursor)
        return len(text)


@pytest.fixture
def clock():
    return Clock()


def start(clock, total, done=0, stream=None, **options):
    stream = io.StringIO() if stream is None else stream
    return progress.Progress(total, done, stream, clock, wall=clock.wall, **options), stream


def test_lines_of_a_log(clock):
    bar, log = start(clock, 10_000, 1_000)
    for second in range(1, 151):  # two lines and 512 tokens a second
        clock.now += 1
        bar.update(1_000 + 2 * second, 512 * second, running=16, waiting=40 if second < 20 else 0)
    bar.close()
    clock.now += 1000
    bar.update(10_000, 10 ** 6)
    assert log.getvalue().splitlines() == [
        'tpmpi: 1,020 of 10,000 done (10.2 %), 512.0 tokens/s, 16 running, 40 waiting, '
        'ends in about 1 h 15 min (at 13:15)',  # 8,980 lines / 2 = 4,490 s from 12:00:40
        'tpmpi: 1,140 of 10,000 done (11.4 %), 512.0 tokens/s, 16 running, ends in about 1 h 14 min (at 13:15)',
        'tpmpi: 1,260 of 10,000 done (12.6 %), 512.0 tokens/s, 16 running, ends in about 1 h 13 min (at 13:15)']


def test_the_end_is_more_than_a_day_away(clock):
    bar, log = start(clock, 200_000)
    clock.now += 20
    bar.update(10, 1)  # half a line a second: 399,980 s
    assert log.getvalue().endswith('ends in about 4 d 15 h (at 2025-06-07 03:07)\n')


def test_nothing_is_known_at_the_start(clock):
    bar, log = start(clock, 100, every=0)
    bar.update(0, 0, 8)  # no time has passed
    clock.now += 5
    bar.update(0, 0, 8)
    bar.update(7, 70, 8)  # only short lines have ended
    bar.update(8, 80, 8)
    lines = log.getvalue().splitlines()
    assert lines[0] == lines[1] == 'tpmpi: 0 of 100 done (0.0 %), - tokens/s, 8 running, ends in about -'
    assert lines[2] == 'tpmpi: 7 of 100 done (7.0 %), 14.0 tokens/s, 8 running, ends in about -'
    assert lines[3] == 'tpmpi: 8 of 100 done (8.0 %), 16.0 tokens/s, 8 running, ends in about 58 s (at 12:01)'  # 57.5 s


def test_the_end_of_a_batch(clock):
    bar, log = start(clock, 3_000, every=0)
    clock.now += 1
    bar.update(2_999, 10)
    bar.update(3_000, 10)
    bar, empty = start(clock, 0, every=0)
    bar.update(0, 0)
    assert '(99.9 %)' in log.getvalue().splitlines()[0]
    assert log.getvalue().splitlines()[1] == 'tpmpi: 3,000 of 3,000 done (100.0 %), 10.0 tokens/s, 0 running'
    assert empty.getvalue() == 'tpmpi: 0 of 0 done (100.0 %), - tokens/s, 0 running\n'


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5000)), min_size=1, max_size=60))
def test_rate_over_the_last_minute(steps):
    """Against a search through all that ever happened: back to the last update that is a minute old, or to the start."""
    clock = Clock()
    bar, log = start(clock, 10, every=0)
    history, tokens = [(clock.now, 0)], 0
    for seconds, more in steps:
        clock.now, tokens = clock.now + seconds, tokens + more
        history.append((clock.now, tokens))
        bar.update(1, tokens)
        then, before = max([h for h in history if h[0] <= clock.now - 60], default=history[0])
        expected = f'{(tokens - before) / (clock.now - then):,.1f}' if tokens else '-'
        assert log.getvalue().splitlines()[-1].split(', ')[1] == f'{expected} tokens/s'
    assert len(bar.samples) <= 62


def test_many_steps_a_second_keep_little(clock):
    bar, log = start(clock, 10)
    for step in range(200_000):
        clock.now += 0.001
        bar.update(0, step)
    assert len(bar.samples) <= 62 and len(log.getvalue().splitlines()) == 4  # at 10, 70, 130 and 190 s
    assert '1,000.0 tokens/s' in log.getvalue().splitlines()[-1]


@pytest.mark.parametrize('columns', [1, 5, 20, 40, 60, 80, 120, 300])
def test_bar_fits_and_goes(clock, monkeypatch, columns):
    monkeypatch.setenv('COLUMNS', str(columns))
    bar, terminal = start(clock, 12_345, stream=Terminal())
    for done in (1, 9, 5_000, 12_345):
        clock.now += 1
        bar.update(done, 100 * done, running=1, waiting=100_000 // done)
        assert columns == 1 or terminal.shown.strip()
    assert terminal.longest < columns
    bar.close()
    bar.close()
    assert terminal.shown.strip(' ') == '' and terminal.cursor == 0


def test_what_a_bar_says(clock, monkeypatch):
    monkeypatch.setenv('COLUMNS', '110')
    bar, terminal = start(clock, 200, stream=Terminal())
    clock.now += 0.1
    bar.update(1, 1)
    assert terminal.writes == 0
    clock.now += 9.9
    bar.update(50, 1234, running=4, waiting=146)
    assert terminal.shown == (
        '[######....................] 50 of 200 done (25.0 %), 123.4 tokens/s, about 30 s left, 4 running, 146 waiting')
    clock.now += 0.1
    bar.update(51, 1234)
    assert terminal.writes == 1
    monkeypatch.setenv('COLUMNS', '60')
    clock.now += 0.1
    bar.update(100, 2040)
    assert terminal.shown.rstrip() == '[########........] 100 of 200 done (50.0 %), 200.0 tokens/s'


@given(st.lists(st.text('abc ', max_size=30), min_size=1, max_size=5), st.floats(0, 2), st.integers(-1, 200))
def test_bar_of_any_width(parts, share, width):
    line = progress.bar(parts, share, width)
    assert len(line) <= max(0, width)
    filled, empty = line.partition(']')[0].count('#'), line.partition(']')[0].count('.')
    if filled + empty:
        assert 10 <= filled + empty <= 30
        assert filled == int(min(share, 1) * (filled + empty))
        assert line.partition('] ')[2] in [', '.join(parts[:count]) for count in range(1, len(parts) + 1)]


def test_width_of_a_real_terminal(clock, monkeypatch):
    monkeypatch.delenv('COLUMNS', raising=False)
    monkeypatch.setattr(sys, '__stdout__', None)  # output goes to a file, errors to the terminal
    master, slave = pty.openpty()
    with open(master, 'rb', buffering=0) as keyboard, open(slave, 'w') as stream:
        for columns, room in ((100, 99), (50, 49), (0, 79)):  # 0: a terminal that doesn't know
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
            bar, _ = start(clock, 10, stream=stream)
            clock.now += 1
            bar.update(5, 50, running=2, waiting=3)
            bar.close()
            print(file=stream, flush=True)
            _, line, erased, *_ = keyboard.readline().decode().split('\r')
            assert room - 30 < len(line) <= room and erased == ' ' * len(line)


def test_closed_and_missing_streams(clock, monkeypatch):
    closed = io.StringIO()
    closed.close()
    streams = [closed, SimpleNamespace(isatty=lambda: True), io.TextIOWrapper(io.BytesIO(), encoding='ascii')]
    streams[-1].detach()
    monkeypatch.setattr(sys, 'stderr', None)
    for stream in [*streams, None]:
        bar = progress.Progress(10, 0, stream, clock)
        clock.now += 100
        bar.update(5, 5)
        bar.close()


@pytest.mark.parametrize('target', ['pipe', '/dev/full', 'closed'])
def test_standard_error_that_is_gone(target):
    program = """
import os, sys
from tpmpi.progress import Progress
if sys.argv[1] == 'closed':
    os.close(2)
bar = Progress(10, every=0)
for step in range(5):
    bar.update(step, step)
bar.close()
print('alive')
"""
    if target == 'pipe':
        reader, errors = os.pipe()
        os.close(reader)
    else:
        errors = os.open('/dev/full' if target == '/dev/full' else os.devnull, os.O_WRONLY)
    try:
        done = subprocess.run([sys.executable, '-c', program, target], cwd=ROOT, timeout=180, stdout=subprocess.PIPE,
                              stderr=errors, text=True)
    finally:
        os.close(errors)
    assert (done.returncode, done.stdout) == (0, 'alive\n')


def test_standard_error_is_looked_up_late(clock, capsys):
    bar = progress.Progress(10, clock=clock, every=0)
    bar.update(1, 1)
    assert capsys.readouterr().err.startswith('tpmpi: 1 of 10 done')


@pytest.mark.parametrize(('seconds', 'text'), [
    (0, '0 s'), (45, '45 s'), (59.4, '59 s'), (59.6, '1 min'), (180, '3 min'), (3569, '59 min'), (3570, '1 h'),
    (4800, '1 h 20 min'), (86369, '23 h 59 min'), (86370, '1 d'), (2 * 86400 + 3 * 3600, '2 d 3 h'),
    (2 * 86400 + 1799, '2 d'), (3 * 86400 - 1, '3 d'), (400 * 86400, '400 d')])
def test_duration(seconds, text):
    assert progress.duration(seconds) == text


class Counters:
    """/sys/class/powercap with these domains: {folder: (name, range)}, every counter at `at`."""

    def __init__(self, root: Path, domains: dict[str, tuple[str, int]], at: int = 0):
        self.root, self.domains = root, domains
        self.value = dict.fromkeys(domains, at)
        for domain, (name, most) in domains.items():
            (root / domain).mkdir()
            (root / domain / 'name').write_text(name + '\n')
            (root / domain / 'max_energy_range_uj').write_text(f'{most}\n')
            self.add(domain, 0)

    def add(self, domain: str, microjoules: int) -> None:
        self.value[domain] = (self.value[domain] + microjoules) % self.domains[domain][1]
        (self.root / domain / 'energy_uj').write_text(f'{self.value[domain]}\n')


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pynvml', None)


PACKAGES = {'intel-rapl:0': ('package-0', 262_143_328_850), 'intel-rapl:1': ('package-1-die-0', 65_532_610_987)}
OTHERS = {'intel-rapl:0:0': ('package-core', 10 ** 9), 'intel-rapl:1:0': ('dram', 10 ** 9), 'intel-rapl:2': ('psys', 10 ** 9),
          'intel-rapl-mmio:0': ('package-0', 10 ** 9)}


def test_only_packages_count(tmp_path):
    counters = Counters(tmp_path, PACKAGES | OTHERS, at=12_345)
    (tmp_path / 'intel-rapl').mkdir()  # the control type itself
    energy = progress.Energy(tmp_path)
    assert energy.read() == {'rapl_joules': 0.0, 'gpu_joules': None}
    for domain in counters.domains:
        counters.add(domain, 5_000_000)
    assert energy.read() == {'rapl_joules': 10.0, 'gpu_joules': None}


@given(st.lists(st.tuples(st.sampled_from(['intel-rapl:0', 'intel-rapl:1']), st.integers(0, 60_000_000_000)), max_size=30))
def test_wraps_are_counted(tmp_path_factory, steps):
    counters = Counters(tmp_path_factory.mktemp('powercap'), PACKAGES, at=65_000_000_000)
    energy = progress.Energy(str(counters.root))
    for domain, microjoules in steps:
        counters.add(domain, microjoules)
        energy.poll()
    assert energy.read()['rapl_joules'] == pytest.approx(sum(m for _, m in steps) / 1e6)


def test_energy_that_cannot_be_read(tmp_path):
    nothing = {'rapl_joules': None, 'gpu_joules': None}
    assert progress.Energy(tmp_path / 'none').read() == nothing
    assert progress.Energy(tmp_path).read() == nothing
    counters = Counters(tmp_path, PACKAGES)
    energy = progress.Energy(tmp_path)
    counters.add('intel-rapl:0', 7_000_000)
    assert energy.read()['rapl_joules'] == 7.0
    (tmp_path / 'intel-rapl:1/energy_uj').unlink()  # a directory cannot be read by root either
    (tmp_path / 'intel-rapl:1/energy_uj').mkdir()
    energy.poll()
    assert energy.read() == nothing
    assert progress.Energy(tmp_path).read() == nothing


class NVMLError(Exception):
    pass


def nvml(millijoules: list, driver: bool = True):
    """A pynvml whose GPUs have used so much; None: a GPU that doesn't count."""
    def known(value):
        if value is None:
            raise NVMLError('Not Supported')
        return value

    return SimpleNamespace(nvmlInit=lambda: known(driver or None), nvmlDeviceGetCount=lambda: len(millijoules),
                           nvmlDeviceGetHandleByIndex=lambda index: index,
                           nvmlDeviceGetTotalEnergyConsumption=lambda gpu: known(millijoules[gpu]))


def test_energy_of_gpus(tmp_path, monkeypatch):
    used = [1_000_000, 5_000]
    monkeypatch.setitem(sys.modules, 'pynvml', nvml(used))
    energy = progress.Energy(tmp_path)
    used[:] = [1_002_500, 6_000]
    assert energy.read() == {'rapl_joules': None, 'gpu_joules': 3.5}
    used[1] = None
    assert energy.read()['gpu_joules'] is None


@pytest.mark.parametrize('module', [nvml([]), nvml([None]), nvml([5, None]), nvml([5], driver=False)])
def test_gpus_that_do_not_count(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, 'pynvml', module)
    assert progress.Energy(tmp_path).read()['gpu_joules'] is None


def test_node_list():
    assert progress.node_list(['b', 'b', 'a', 'b', 'a']) == [{'host': 'b', 'ranks': [0, 1, 3]}, {'host': 'a', 'ranks': [2, 4]}]
    assert progress.node_list([]) == []


@pytest.mark.parametrize(('umask', 'mode'), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_report(tmp_path, umask, mode):
    path, report = tmp_path / 'report.json', {'nodes': progress.node_list(['n1']), 'joules': None, 'name': 'Zürich \udcff'}
    path.write_text('an older one')
    before = os.umask(umask)
    try:
        progress.write_report(path, report)
    finally:
        os.umask(before)
    assert json.loads(path.read_text()) == report
    assert path.read_text().startswith('{\n  "nodes": [') and path.read_text().endswith('\n}\n')
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert os.listdir(tmp_path) == ['report.json']


@pytest.mark.parametrize('report', [{'rate': float('nan')}, {'path': Path('x')}])
def test_report_that_is_not_json(tmp_path, report):
    (tmp_path / 'report.json').write_text('an older one')
    with pytest.raises((ValueError, TypeError)):
        progress.write_report(tmp_path / 'report.json', report)
    assert (tmp_path / 'report.json').read_text() == 'an older one' and os.listdir(tmp_path) == ['report.json']


def test_report_on_a_disk_that_fails(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, 'No space left on device')

    (tmp_path / 'report.json').write_text('an older one')
    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(OSError, match='No space left'):
        progress.write_report(tmp_path / 'report.json', {'a': 1})
    assert (tmp_path / 'report.json').read_text() == 'an older one' and os.listdir(tmp_path) == ['report.json']


def test_report_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    progress.write_report(Path('report.json'), {})
    assert json.loads((tmp_path / 'report.json').read_text()) == {}
    with pytest.raises(FileNotFoundError):
        progress.write_report(tmp_path / 'none/report.json', {})
