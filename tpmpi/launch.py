"""What the launcher gave to this process: its world, its cores and its threads.

Standard library only: the threads of the BLAS must be limited before NumPy is imported, so this comes first.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

THREAD_VARIABLES = ('OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS', 'OMP_NUM_THREADS', 'BLIS_NUM_THREADS',
                    'NUMEXPR_NUM_THREADS', 'VECLIB_MAXIMUM_THREADS', 'NUMBA_NUM_THREADS')


class LaunchError(ValueError):
    """The program was started in a way that cannot work."""


def check_world(size: int, environ: Mapping[str, str] = os.environ) -> None:
    """Raises LaunchError where MPI's world has one rank (`size`) and the launcher started more processes.

    Under the wrong launcher every process is a world of its own, does the whole job, and exits with code 0.
    MPICH's mpirun and `srun --mpi=pmi2` set PMI_SIZE, Open MPI's mpirun OMPI_COMM_WORLD_SIZE.  SLURM_STEP_NUM_TASKS
    counts only without them: in an allocation MPICH's mpirun starts one helper per node with srun, so that it is the
    number of nodes.
    """
    launchers = [name for name in ('PMI_SIZE', 'OMPI_COMM_WORLD_SIZE') if environ.get(name, '').isdigit()]
    if not launchers and environ.get('SLURM_STEP_NUM_TASKS', '').isdigit():
        launchers = ['SLURM_STEP_NUM_TASKS']
    # of one launcher inside another both variables are seen, and the inner one may well start a single process
    started, name = min(((int(environ[name]), name) for name in launchers), default=(1, ''))
    if size == 1 and started > 1:
        raise LaunchError(
            f'the launcher started {started} processes ({name}), but MPI sees a world of one rank: launcher and MPI '
            f'library do not match; use `srun --mpi=pmi2` with MPICH, `srun --mpi=pmix` with Open MPI, or the mpirun '
            f"that belongs to this Python's MPI")


def cores() -> frozenset[int]:
    """The cores that this process may run on."""
    if hasattr(os, 'sched_getaffinity'):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def cpu_quota(membership: str = '/proc/self/cgroup', root: str = '/sys/fs/cgroup') -> float | None:
    """The cores' worth of time that containers and batch systems allow this process's groups; None: no limit.

    The least cpu.max (cgroup v2) or cpu.cfs_quota_us (v1) of the groups in `membership` and of all groups above them.
    Source: Documentation/admin-guide/cgroup-v2.rst and Documentation/scheduler/sched-bwc.rst of the Linux kernel.
    """
    limits = []
    with contextlib.suppress(OSError):
        for line in Path(membership).read_text().splitlines():
            _, controllers, group = line.split(':', 2)
            if controllers and 'cpu' not in controllers.split(','):
                continue
            for mount in (controllers, 'cpu') if controllers else ('', 'unified'):
                for level in (group, *PurePosixPath(group).parents):
                    limits += _own_quota(Path(root, mount, str(level).lstrip('/')))
    return min(limits, default=None)


def _own_quota(group: Path) -> list[float]:
    """The limit that one control group sets itself, if any."""
    for names in (('cpu.max',), ('cpu.cfs_quota_us', 'cpu.cfs_period_us')):
        with contextlib.suppress(OSError, ValueError):  # ValueError: 'max'
            quota, period = map(int, ' '.join((group / name).read_text() for name in names).split())
            if quota > 0 and period > 0:
                return [quota / period]
    return []


def fair_threads(masks: Sequence[frozenset[int]], rank_on_node: int, quota: float | None = None,
                 environ: Mapping[str, str] = os.environ) -> int:
    """Threads for one rank, so that the ranks of its node together use no more than the node's cores.

    masks: `cores()` of every rank on this node; quota: `cpu_quota()`.  The ranks that may run on a core share it
    evenly.  At least 1, at most the quota's share, and at most the cores per task of a Slurm step.  OMP_NUM_THREADS is
    not asked: sites and login scripts leave values in it that were meant for something else.
    """
    holders = {core: sum(core in mask for mask in masks) for core in frozenset().union(*masks)}
    unit = math.lcm(*holders.values())  # of a core, so that all shares are whole numbers
    threads = [max(1, sum(unit // holders[core] for core in mask) // unit) for mask in masks]
    while sum(threads) > max(len(holders), len(masks)):  # a rank whose share is less than a core took a whole one
        threads[threads.index(max(threads))] -= 1
    limits = [threads[rank_on_node]]
    if quota is not None:
        limits.append(int(quota / len(masks)))
    if 'SLURM_STEP_ID' in environ:  # srun puts its -c into SLURM_CPUS_PER_TASK; SRUN_CPUS_PER_TASK is the default of -c
        per_task = environ.get('SLURM_CPUS_PER_TASK') or environ.get('SRUN_CPUS_PER_TASK') or ''
        limits += [int(per_task)] if per_task.isdigit() else []
    return max(1, min(limits))


def set_blas_threads(threads: int) -> bool:
    """Limits the threads of NumPy's matrix products and of Numba.  Returns whether the limit is sure to hold.

    Libraries read the variables while they are loaded.  If NumPy is there already, its OpenBLAS is told directly: its
    functions have a prefix in the wheels' builds, and a suffix with 64-bit integers.  False: none was found.
    """
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    if 'numpy' not in sys.modules:
        return True
    held = []
    with contextlib.suppress(OSError):
        mapped = Path('/proc/self/maps').read_text().splitlines()
        for path in {line.split(maxsplit=5)[5] for line in mapped if 'openblas' in line}:
            library = ctypes.CDLL(path)
            for name in ('scipy_openblas_{}_num_threads64_', 'scipy_openblas_{}_num_threads',
                         'openblas_{}_num_threads64_', 'openblas_{}_num_threads'):
                if hasattr(library, name.format('set')):
                    library[name.format('set')](threads)
                    held.append(library[name.format('get')]() == threads)
                    break
    return bool(held) and all(held)
