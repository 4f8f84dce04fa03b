"""Free memory from trees of files that systems and batch systems show, against numbers computed by hand."""

from __future__ import annotations

import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpmpi import memory

ROOT = Path(__file__).resolve().parents[1]
G, M = 2 ** 30, 2 ** 20
UNLIMITED_V1 = 9223372036854771712  # 2^63 - 4096
MEMINFO = """\
MemTotal:       67108864 kB
MemFree:         1048576 kB
MemAvailable:   33554432 kB
Cached:         40000000 kB
HugePages_Free:     4096
Hugepagesize:       2048 kB
Hugetlb:         8388608 kB
"""  # 32 GiB available; the 8 GiB of free huge pages are of no use to NumPy


@pytest.fixture
def free(tmp_path):
    """free_bytes() in a system of these files."""
    def call(membership=None, files=(), environ=None, meminfo=MEMINFO, **options):
        named = {f'fs/{name}': content for name, content in dict(files).items()}
        named |= {'cgroup': membership, 'meminfo': meminfo}
        for name, content in named.items():
            if content is not None:
                path = tmp_path / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f'{content}\n')
        return memory.free_bytes(environ or {}, str(tmp_path / 'meminfo'), str(tmp_path / 'cgroup'), str(tmp_path / 'fs'),
                                 **options)
    return call


@pytest.mark.parametrize(('membership', 'files', 'expected'), [
    # version 2
    (None, {}, 32 * G),
    ('0::/', {}, 32 * G),
    ('0::/job', {'job/memory.max': 'max', 'job/memory.high': 'max', 'job/memory.current': 5 * G}, 32 * G),
    ('0::/job', {'job/memory.max': 8 * G, 'job/memory.high': 'max', 'job/memory.current': 3 * G}, 5 * G),
    ('0::/job', {'job/memory.max': 8 * G, 'job/memory.high': 6 * G, 'job/memory.current': 3 * G}, 3 * G),
    ('0::/job', {'job/memory.max': 8 * G, 'job/memory.current': 7 * G,
                 'job/memory.stat': f'anon 5\nactive_file {G}\ninactive_file {2 * G}\nslab 0'}, 3 * G),
    ('0::/job', {'job/memory.max': 8 * G, 'job/memory.current': G, 'job/memory.stat': f'inactive_file {3 * G}'}, 8 * G),
    ('0::/job', {'job/memory.max': 8 * G, 'job/memory.current': 9 * G}, 0),
    ('0::/job', {'job/memory.max': 8 * G}, 8 * G),  # usage not shown
    ('0::/job', {'job/memory.max': 'nonsense', 'job/memory.current': 'nonsense'}, 32 * G),
    ('0::/job/step/task', {'job/memory.max': 10 * G, 'job/memory.current': 8 * G,  # the tighter limit is above
                           'job/step/memory.max': 20 * G, 'job/step/memory.current': 7 * G,
                           'job/step/task/memory.max': 'max', 'job/step/task/memory.current': 6 * G}, 2 * G),
    ('0::/job/step', {'job/memory.max': 10 * G, 'job/memory.current': G,
                      'job/step/memory.max': 4 * G, 'job/step/memory.current': G}, 3 * G),
    ('0::/job', {'other/memory.max': G, 'job/below/memory.max': G}, 32 * G),  # not ours
    ('0::/seen/from/outside', {'memory.max': 6 * G, 'memory.current': G}, 5 * G),  # a container's own root
    ('garbage\n0::/job', {'job/memory.max': 6 * G, 'job/memory.current': G}, 5 * G),
    # version 1
    ('4:memory:/job', {'memory/job/memory.limit_in_bytes': UNLIMITED_V1, 'memory/job/memory.usage_in_bytes': G,
                       'memory/memory.limit_in_bytes': UNLIMITED_V1}, 32 * G),
    ('4:memory:/slurm/job_7/step_0', {
        'memory/slurm/job_7/memory.limit_in_bytes': 12 * G, 'memory/slurm/job_7/memory.usage_in_bytes': 9 * G,
        'memory/slurm/job_7/memory.stat': f'inactive_file 4096\ntotal_inactive_file {G}',  # the job's, and with its steps
        'memory/slurm/job_7/step_0/memory.limit_in_bytes': UNLIMITED_V1,
        'memory/slurm/job_7/step_0/memory.usage_in_bytes': 9 * G}, 4 * G),
    ('3:cpu,memory:/job', {'cpu,memory/job/memory.limit_in_bytes': 4 * G, 'cpu,memory/job/memory.usage_in_bytes': G}, 3 * G),
    ('3:cpu,memory:/job', {'memory/job/memory.limit_in_bytes': 4 * G, 'memory/job/memory.usage_in_bytes': G}, 3 * G),
    ('4:memory:/job', {'memory/job/memory.limit_in_bytes': -1, 'memory/job/memory.usage_in_bytes': G}, 32 * G),
    ('5:hugetlb:/job\n4:cpuset:/job', {'memory/job/memory.limit_in_bytes': G, 'job/memory.max': G,
                                       'hugetlb/job/hugetlb.2MB.limit_in_bytes': G}, 32 * G),
    # both at once
    ('4:memory:/old\n1:name=systemd:/x\n0::/new', {
        'memory/old/memory.limit_in_bytes': 9 * G, 'memory/old/memory.usage_in_bytes': 2 * G,
        'unified/new/memory.max': 8 * G, 'unified/new/memory.current': 2 * G}, 6 * G),
    ('4:memory:/old\n0::/new', {
        'memory/old/memory.limit_in_bytes': 7 * G, 'memory/old/memory.usage_in_bytes': 2 * G,
        'unified/new/memory.max': 8 * G, 'unified/new/memory.current': 2 * G}, 5 * G),
])
def test_free_by_cgroups(free, membership, files, expected):
    assert free(membership, files) == expected


@pytest.mark.parametrize(('environ', 'resident', 'expected'), [
    ({'SLURM_MEM_PER_NODE': '16384'}, 0, 16 * G),
    ({'SLURM_MEM_PER_NODE': '16384'}, 3 * G, 13 * G),
    ({'SLURM_MEM_PER_NODE': '65536'}, 3 * G, 32 * G),  # the job holds more than the node has left
    ({'SLURM_MEM_PER_NODE': '1024'}, 3 * G, 0),
    ({'SLURM_MEM_PER_NODE': '0'}, 3 * G, 32 * G),
    ({'SLURM_MEM_PER_NODE': ''}, 3 * G, 32 * G),
    ({'SLURM_MEM_PER_CPU': '2000', 'SLURM_CPUS_ON_NODE': '4'}, 1000 * M, 7000 * M),
    ({'SLURM_MEM_PER_CPU': '2000'}, 0, 32 * G),
    ({'SLURM_MEM_PER_CPU': '0', 'SLURM_CPUS_ON_NODE': '4'}, 0, 32 * G),
    ({'SLURM_MEM_PER_GPU': '4096', 'SLURM_GPUS_ON_NODE': '2'}, G, 7 * G),
])
def test_free_by_slurm(free, environ, resident, expected):
    assert free(environ=environ, resident=resident) == expected


def test_the_least_counts(free):
    files = {'job/memory.max': 8 * G, 'job/memory.current': 2 * G}
    assert free('0::/job', files, {'SLURM_MEM_PER_NODE': '8000'}, resident=G) == 6 * G
    assert free('0::/job', files, {'SLURM_MEM_PER_NODE': '6000'}, resident=G) == 6000 * M - G
    assert free('0::/job', files, meminfo='MemAvailable: 5000 kB') == 5000 * 1024


def test_free_without_meminfo(free):
    assert 0 < free(meminfo=None) < 1 << 50
    assert free('0::/job', {'job/memory.max': M, 'job/memory.current': 0}, meminfo='MemFree: 1 kB') == M


def test_free_on_this_machine():
    total = next(int(line.split()[1]) for line in Path('/proc/meminfo').read_text().splitlines() if 'MemTotal' in line)
    assert 0 < memory.free_bytes({}) <= total * 1024


@pytest.mark.parametrize(('text', 'count'), [
    ('800000000', 800_000_000), ('0', 0), ('4G', 4 * G), ('512M', 512 * M), ('1.5GiB', 3 * G // 2), ('.5K', 512),
    ('4g', 4 * G), ('2 GB', 2 * 10 ** 9), ('2Gi', 2 * G), ('3kb', 3000), ('1T', 2 ** 40), ('7B', 7), (' 8k\n', 8192),
    ('0.3K', 307),
])
def test_parse_bytes(text, count):
    assert memory.parse_bytes(text) == count


@given(st.integers(0, 10 ** 12), st.decimals(0, 10 ** 6, places=3), st.sampled_from('KMGT'))
def test_parse_bytes_is_exact(whole, number, unit):
    assert memory.parse_bytes(str(whole)) == whole
    assert memory.parse_bytes(f'{number:f}{unit}') == int(Decimal(number) * 1024 ** ('KMGT'.index(unit) + 1))


BAD_SIZES = ['', ' ', 'G', 'four', '4X', '4GG', '-4G', '+4', '1e9', '4 G B', '1_000', '0x10', '4G\n5G', '\u0664G', '4iB', '1.5',
             '1.2.3G', '1,5G', 'inf', 'nan', '9' * 5000]


@pytest.mark.parametrize('text', BAD_SIZES, ids=lambda text: text[:8])
def test_no_size(text):
    with pytest.raises(memory.MemoryOptionError, match='is no size; expected bytes, such as'):
        memory.parse_bytes(text)
    with pytest.raises(memory.MemoryOptionError, match='--kv-memory is .*; expected bytes for each rank.* or a share'):
        memory.kv_bytes_per_rank(text, 2, G)


@given(st.text(max_size=12) | st.text('0123456789.%KMGiB ', max_size=8))
def test_any_text_is_a_size_or_an_error(text):
    try:
        assert 0 < memory.kv_bytes_per_rank(text, 3, G) <= G // 3
    except memory.MemoryOptionError as e:
        assert '\n' not in str(e)


@pytest.mark.parametrize(('asked', 'ranks', 'free', 'expected'), [
    (None, 1, 10 * G, 5 * G),
    (None, 4, 10 * G, 5 * G // 4),
    ('60%', 3, 1000, 200),
    ('0.6', 3, 1000, 200),
    ('.25', 1, 1000, 250),
    ('12.5 %', 1, 1000, 125),
    ('100%', 3, 1000, 333),
    ('1.0', 3, 1000, 333),
    ('33%', 7, 1001, 47),  # 47.19
    ('1G', 4, 4 * G, G),
    ('250', 4, 1000, 250),
])
def test_kv_bytes_per_rank(asked, ranks, free, expected):
    assert memory.kv_bytes_per_rank(asked, ranks, free) == expected


@pytest.mark.parametrize(('asked', 'ranks', 'free', 'message'), [
    ('4G', 8, 30 * G, 'is 4G, for 8 ranks on this node 32.0 GiB, but only 30.0 GiB are free; give at most 3840M, '),
    ('251', 4, 1000, 'for 4 ranks on this node 1004 bytes, but only 1000 bytes are free; give at most 250, '),
    ('120%', 2, 2 * G, 'is 120%, for 2 ranks on this node 2.4 GiB, but only 2.0 GiB are free; give at most 1024M, '),
    ('0', 2, G, 'is 0; expected more than nothing, here at most 512M'),
    ('0%', 2, G, 'is 0%; expected more than nothing'),
    (None, 2, 0, 'is 50%, but nothing is free on this node for its 2 ranks; ask for more memory'),
    ('1G', 2, 1, 'is 1G, but nothing is free'),
])
def test_more_than_there_is(asked, ranks, free, message):
    with pytest.raises(memory.MemoryOptionError) as caught:
        memory.kv_bytes_per_rank(asked, ranks, free)
    assert message in str(caught.value)
    assert str(caught.value).startswith('--kv-memory is ') and '\n' not in str(caught.value)


def test_what_is_proposed_is_accepted():
    for free in (1000, 12345678, 30 * G + 7):
        with pytest.raises(memory.MemoryOptionError) as caught:
            memory.kv_bytes_per_rank('1T', 3, free)
        proposed = str(caught.value).partition('give at most ')[2].partition(',')[0]
        assert 0.9 * free / 3 < memory.kv_bytes_per_rank(proposed, 3, free) <= free / 3


def test_resident_and_peak_of_another_process():
    program = """
import mmap
from tpmpi.memory import peak_bytes, resident_bytes
before = resident_bytes()
block = mmap.mmap(-1, 64 << 20)
block.write(b'x' * 4096 * 16384)
held = resident_bytes()
print(before, held, flush=True)
input()
block.close()
print(resident_bytes(), peak_bytes())
"""
    process = subprocess.Popen([sys.executable, '-c', program], cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        before, held = map(int, process.stdout.readline().split())
        seen = memory.resident_bytes(process.pid)
        output, _ = process.communicate('\n', timeout=180)
    finally:
        process.kill()
        process.communicate()
    after, peak = map(int, output.split())
    assert held - before > 60 * M  # counters of the kernel are a little late
    assert abs(seen - held) < 4 * M
    assert after < held - 60 * M and peak > held + 60 * M  # the written bytes and the block
    assert memory.resident_bytes(process.pid) == 0  # it is gone
