"""How Numba compiles the CPU kernels: for which CPU, with which options, and where the machine code is kept.

Every entry point has an explicit signature and is built before the first step: compiled, or loaded from the cache.
Kernels release the GIL, so that the threads of Python (the watch over the ranks) go on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import tempfile
from pathlib import Path

import llvmlite
import numba
import numpy as np
from numba.core import config, registry

TRIPLE, CPU, _FEATURES = registry.cpu_target.target_context.codegen().magic_tuple()  # follows NUMBA_CPU_NAME as well
FEATURES = frozenset(f[1:] for f in _FEATURES.split(',') if f.startswith('+'))
X86 = TRIPLE.startswith('x86_64')

# 32-bit lanes of a vector: AVX-512, AVX2, or the 128 bits that every x86-64 and aarch64 has
WIDTH = 16 if {'avx512f', 'avx512bw'} <= FEATURES else 8 if {'avx2', 'fma'} <= FEATURES else 4
HALVES = 'f16c' in FEATURES or not X86  # the CPU widens float16 itself

OPTIONS = {'nogil': True, 'error_model': 'numpy', 'fastmath': {'contract', 'nsz'}}
PARALLEL = int(os.environ.get('NUMBA_NUM_THREADS', '1')) > 1  # what session.start chose for this rank


# only loops that say prange: the kernels work on addresses, which Numba's own rearranging of array expressions cannot see
SHARED_LOOPS = {'prange': True} | dict.fromkeys(
    ('comprehension', 'reduction', 'inplace_binop', 'setitem', 'numpy', 'stencil', 'fusion'), False)


def helper(function):
    """A function that kernels call; it becomes part of each of them."""
    return numba.njit(**OPTIONS)(function)


def inlined(function):
    """A helper copied into its caller before anything is compiled: a chain of large ones would be compiled at each level."""
    return numba.njit(inline='always', **OPTIONS)(function)


def kernel(signature: str):
    """An entry point for one signature; `build` compiles it or loads it from the cache."""
    return _entry(signature, {})


def shared_kernel(signature: str):
    """An entry point whose prange loop the threads of the rank share."""
    return _entry(signature, {'parallel': SHARED_LOOPS} if PARALLEL else {})


def _entry(signature: str, options: dict):
    def decorate(function):
        dispatcher = numba.njit(cache=True, **OPTIONS, **options)(function)
        dispatcher.only_signature = signature
        return dispatcher
    return decorate


def build(kernels) -> None:
    """Make kernels ready: compile them, or load them from the cache.  Nothing compiles after this."""
    for dispatcher in kernels:
        if not dispatcher.signatures:
            dispatcher.compile(dispatcher.only_signature)
            dispatcher.disable_compile()
            _mark(dispatcher).touch()


def missing(kernels) -> int:
    """How many of the kernels the cache does not hold yet."""
    return sum(not _mark(dispatcher).exists() for dispatcher in kernels)


def _mark(dispatcher) -> Path:
    """A file that says that the machine code of a kernel is whole."""
    return FOLDER / f'{dispatcher.py_func.__name__}.built'


def cache_folder(environ=os.environ) -> Path:
    """The folder for machine code: named by the kernels' sources, the versions of the compiler and the CPU.

    An edited helper in another file, another CPU that shares the home folder, or another compiler thus never meets old
    code.  Numba keeps code by a source's path and date, so these count too: a second installation compiles its own.
    In $TPMPI_CACHE_DIR, $XDG_CACHE_HOME/tpmpi or ~/.cache/tpmpi; where none can be written, in a private folder of the
    temporary directory.
    """
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob('*.py')):
        digest.update(repr((str(source), source.stat().st_mtime_ns)).encode() + source.read_bytes())
    digest.update(repr((numba.__version__, llvmlite.__version__, np.__version__, sys.version_info[:2], TRIPLE, CPU, _FEATURES,
                        PARALLEL)).encode())
    name = f'kernels-{digest.hexdigest()[:16]}'
    choices = [environ.get('TPMPI_CACHE_DIR'), environ.get('XDG_CACHE_HOME') and environ['XDG_CACHE_HOME'] + '/tpmpi']
    for base in [Path(c) for c in choices if c] + [Path(os.path.expanduser('~/.cache/tpmpi'))]:
        with contextlib.suppress(OSError):
            folder = base / name
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
    private = Path(tempfile.gettempdir(), f'tpmpi-{os.getuid()}')  # machine code is run: it must be ours alone
    with contextlib.suppress(OSError):
        private.mkdir(mode=0o700, exist_ok=True)
        found = private.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            (private / name).mkdir(exist_ok=True)
            return private / name
    return Path(tempfile.mkdtemp(prefix='tpmpi-'))


FOLDER = cache_folder()
config.CACHE_DIR = str(FOLDER)
