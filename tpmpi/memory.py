"""How much memory the ranks of a node may still take, and a rank's part of it for the KV cache.

Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path, PurePosixPath

# Slurm's limits in MiB, and what each has to be multiplied by
SLURM_LIMITS = (('SLURM_MEM_PER_NODE', None), ('SLURM_MEM_PER_CPU', 'SLURM_CPUS_ON_NODE'),
                ('SLURM_MEM_PER_GPU', 'SLURM_GPUS_ON_NODE'))
# limits and usage of a control group, version 2 and version 1
GROUP_FILES = ((('memory.max', 'memory.high'), 'memory.current'), (('memory.limit_in_bytes',), 'memory.usage_in_bytes'))
NUMBER = r'([0-9]{0,18}\.?[0-9]{1,18})'
UNITS = {'': 1, 'b': 1} | {
    prefix + ending: base ** power for power, prefix in enumerate('kmgt', 1)
    for ending, base in (('', 1024), ('i', 1024), ('ib', 1024), ('b', 1000))}


class MemoryOptionError(ValueError):
    """A size is no size, or more than there is."""


def free_bytes(environ: Mapping[str, str] = os.environ, meminfo: str = '/proc/meminfo',
               membership: str = '/proc/self/cgroup', root: str = '/sys/fs/cgroup', *, resident: int = 0) -> int:
    """Bytes that this node's ranks together may still take: the least of what the system, cgroups and Slurm leave.

    The system leaves MemAvailable (free huge pages are not in it), each cgroup of this process and of its ancestors its
    limit less its usage, and Slurm the job's memory on this node less `resident`, the bytes that the node's ranks
    together hold already (sum of `resident_bytes`).  The ranks of a node may see slightly different numbers.
    """
    left = [_available(meminfo), *_groups_leave(membership, root)]
    left += [limit - resident for limit in _slurm_limits(environ)]
    return max(0, min(left))


def _available(meminfo: str) -> int:
    """MemAvailable, or the free pages where the kernel doesn't say."""
    found = _kilobytes(meminfo, 'MemAvailable')
    return os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') if found is None else found


def _kilobytes(path: str, field: str) -> int | None:
    """Bytes of a field `NAME: 123 kB` in a file of /proc, if it is there."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(path).read_text().splitlines():
            name, _, value = line.partition(':')
            if name == field:
                return int(value.removesuffix('kB')) * 1024
    return None


def _groups_leave(membership: str, root: str) -> Iterator[int]:
    """What each limit of the groups in `membership` and of all groups above them leaves.

    Source: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of the Linux kernel.
    """
    try:
        lines = [line.split(':', 2) for line in Path(membership).read_text().splitlines()]
    except OSError:
        return
    for _, controllers, group in (parts for parts in lines if len(parts) == 3):
        if controllers and 'memory' not in controllers.split(','):
            continue
        for mount in (controllers, 'memory') if controllers else ('', 'unified'):
            for level in (group, *PurePosixPath(group).parents):
                yield from _group_leaves(Path(root, mount, str(level).lstrip('/')))


def _group_leaves(group: Path) -> Iterator[int]:
    """What one control group's own limits leave, if it has any; unlimited ones are 'max' or larger than any memory."""
    for limits, usage in GROUP_FILES:
        known = [limit for name in limits if (limit := _number(group / name)) is not None]
        if known:
            yield min(known) - max(0, (_number(group / usage) or 0) - _reclaimable(group))


def _number(path: Path) -> int | None:
    """The number that a file holds; None without the file or for 'max'."""
    with contextlib.suppress(OSError, ValueError):
        value = int(path.read_text())
        return value if value >= 0 else None
    return None


def _reclaimable(group: Path) -> int:
    """Bytes of cached files that the kernel gives up before it refuses memory to the group and those below it."""
    with contextlib.suppress(OSError, ValueError):
        stat = dict(line.split(maxsplit=1) for line in (group / 'memory.stat').read_text().splitlines())
        # version 1 counts the usage with the groups below, but only the total_ lines do so too
        return int(stat.get('total_inactive_file', stat.get('inactive_file', '0')))
    return 0


def _slurm_limits(environ: Mapping[str, str]) -> Iterator[int]:
    """The bytes of this node that belong to the job, by each variable that says so; 0 is Slurm's word for no limit."""
    for limit, factor in SLURM_LIMITS:
        values = [environ.get(name, '') for name in (limit, factor) if name is not None]
        if all(value.isdecimal() for value in values) and int(values[0]):
            count = int(values[1]) if factor else 1
            yield int(values[0]) * count << 20


def kv_bytes_per_rank(asked: str | None, ranks_on_node: int, free: int, default: str = '50%') -> int:
    """What one rank may spend on its KV cache, in bytes.

    asked: `--kv-memory`, either bytes for each rank ('4G', '512M', '1.5GiB', '800000000'), or a share of `free` that the
    ranks of the node divide evenly ('60%', '0.6'); None takes `default`.  free: bytes, `free_bytes()`.
    Raises MemoryOptionError for anything else, for nothing, and for more than is free.
    """
    text = default if asked is None else asked
    most = free // ranks_on_node
    share = _share(text)
    try:
        wanted = parse_bytes(text) if share is None else int(share * free / ranks_on_node)
    except MemoryOptionError as e:
        raise MemoryOptionError(f'--kv-memory is {text!r}; expected bytes for each rank, such as 4G, 512M, 1.5GiB or '
                                f'800000000, or a share of the free memory, such as 60% or 0.6') from e
    if most < 1:
        raise MemoryOptionError(f'--kv-memory is {text}, but nothing is free on this node for its {ranks_on_node} ranks; '
                                f'ask for more memory or use more nodes')
    if wanted > most:
        raise MemoryOptionError(
            f'--kv-memory is {text}, for {ranks_on_node} ranks on this node {_readable(wanted * ranks_on_node)}, but only '
            f'{_readable(free)} are free; give at most {_exact(most)}, ask for more memory, or put fewer ranks on a node')
    if wanted < 1:
        raise MemoryOptionError(f'--kv-memory is {text}; expected more than nothing, here at most {_exact(most)}')
    return wanted


def _share(text: str) -> Fraction | None:
    """A percentage, or a number with a point and no unit that is at most 1; None for any other text."""
    text = text.strip()
    if found := re.fullmatch(NUMBER + r'\s*%', text):
        return Fraction(found[1]) / 100
    if '.' in text and re.fullmatch(NUMBER, text) and Fraction(text) <= 1:
        return Fraction(text)
    return None


def parse_bytes(text: str) -> int:
    """Bytes of '800000000', '512M', '1.5GiB': K, M, G, T and KiB … are powers of 1024, KB … of 1000; case is free.

    A part of a byte is dropped, but a number with a point needs a unit.  Raises MemoryOptionError for anything else.
    """
    found = re.fullmatch(NUMBER + r'\s*([a-z]*)', text.strip().lower())
    if not found or found[2] not in UNITS or ('.' in found[1] and UNITS[found[2]] == 1):
        raise MemoryOptionError(f'{text!r} is no size; expected bytes, such as 800000000, 512M, 4G or 1.5GiB')
    return int(Fraction(found[1]) * UNITS[found[2]])


def _readable(count: int) -> str:
    """A size for a person."""
    for power, unit in ((4, 'TiB'), (3, 'GiB'), (2, 'MiB'), (1, 'KiB')):
        if count >= 1024 ** power:
            return f'{count / 1024 ** power:.1f} {unit}'
    return f'{count} bytes'


def _exact(count: int) -> str:
    """A size that `parse_bytes` reads as no more than `count`."""
    return f'{count >> 20}M' if count >= 1 << 27 else str(count)


def resident_bytes(pid: int | str = 'self') -> int:
    """Bytes of memory that a process holds, pages it shares with others included (VmRSS); 0 where unknown."""
    return _kilobytes(f'/proc/{pid}/status', 'VmRSS') or 0


def peak_bytes() -> int:
    """The most bytes that this process ever held (VmHWM); 0 where unknown."""
    return _kilobytes('/proc/self/status', 'VmHWM') or 0
