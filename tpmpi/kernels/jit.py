"""How Numba compiles the CPU kernels: for which CPU, with which options, and where the machine code is kept.

Every entry point has an explicit signature and is built before the first step: compiled, or loaded from the cache.
Kernels release the GIL, so that the threads of Python (the watch over the ranks) go on.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import itertools
import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import llvmlite
import numba
import numpy as np
from numba.core import bytecode, registry
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from numba.core.runtime import rtsys

TRIPLE, CPU, _FEATURES = registry.cpu_target.target_context.codegen().magic_tuple()  # follows NUMBA_CPU_NAME as well
FEATURES = frozenset(f[1:] for f in _FEATURES.split(',') if f.startswith('+'))

# 32-bit lanes of a vector: AVX-512, AVX2, or the 128 bits that every x86-64 and aarch64 has
NATIVE_WIDTH = 16 if {'avx512f', 'avx512bw'} <= FEATURES else 8 if {'avx2', 'fma'} <= FEATURES else 4
WIDTH = int(os.environ.get('TPMPI_VECTOR_LANES', NATIVE_WIDTH))  # the tests: LLVM makes two vectors of one too wide
X86 = TRIPLE.startswith('x86_64') and WIDTH <= NATIVE_WIDTH  # may use the instructions for integers
VNNI = X86 and {16: 'avx512vnni', 8: 'avxvnni'}.get(WIDTH) in FEATURES  # products of pairs, added in one instruction
HALVES = 'f16c' in FEATURES or not TRIPLE.startswith('x86_64')  # the CPU widens float16 itself

UNSEEN = {'no_cpython_wrapper': True, 'no_cfunc_wrapper': True}  # of helpers: only compiled code calls them
OPTIONS = {'nogil': True, 'error_model': 'numpy', 'fastmath': {'contract', 'nsz'}}
PARALLEL = int(os.environ.get('NUMBA_NUM_THREADS', '1')) > 1  # what session.start chose for this rank


# only loops that say prange: the kernels work on addresses, which Numba's own rearranging of array expressions cannot see
SHARED_LOOPS = {'prange': True} | dict.fromkeys(
    ('comprehension', 'reduction', 'inplace_binop', 'setitem', 'numpy', 'stencil', 'fusion'), False)


# Numba tells functions that one `def` makes, such as a helper for int8 and for int4, by a number that counts from 1 in each
# process, and the linker takes two of one name for the same: kernels that several processes have put into the cache would
# call each other's helpers.  So each process begins somewhere else.
bytecode.FunctionIdentity._unique_ids = itertools.count(int.from_bytes(os.urandom(7), 'little'))


def helper(function):
    """A function that kernels call; it becomes part of each of them.

    It is compiled for each kind of arguments that it is called with, and a constant is another kind than a variable: where
    both occur, the constant is written np.int64(1).
    """
    return numba.njit(**OPTIONS, **UNSEEN)(function)


def inlined(function):
    """A helper copied into its caller before anything is compiled: a chain of large ones would be compiled at each level."""
    return numba.njit(inline='always', **OPTIONS, **UNSEEN)(function)


def kernel(signature: str):
    """An entry point for one signature; `build` compiles it or loads it from the cache."""
    return _entry(signature, {})


def shared_kernel(signature: str):
    """An entry point whose prange loop the threads of the rank share."""
    return _entry(signature, {'parallel': SHARED_LOOPS} if PARALLEL else {})


def _entry(signature: str, options: dict):
    def decorate(function):
        dispatcher = numba.njit(no_cfunc_wrapper=True, **OPTIONS, **options)(function)
        dispatcher._cache = Cache(function)
        dispatcher.only_signature = signature
        return dispatcher
    return decorate


class Place(_CacheLocator):
    """Where Numba keeps the machine code of a kernel.

    Numba's own places go by a source's path and date, and are tried with a file for each kernel at every start, of which a
    parallel file system has many ranks' at once.
    """

    def __init__(self, function, source: str):
        self.line, self.source = function.__code__.co_firstlineno, source

    @classmethod
    def from_function(cls, function, source):
        return cls(function, source)

    def ensure_cache_path(self):
        pass  # cache_folder has tried it

    def get_cache_path(self):
        return str(FOLDER)

    def get_source_stamp(self):
        return hashed(self.source)  # those of the package count by FOLDER's name

    def get_disambiguator(self):
        return str(self.line)


class Code(CompileResultCacheImpl):
    """What Numba keeps of a kernel."""

    _locator_classes = [Place]


class Cache(FunctionCache):
    """Numba's cache of machine code, which is loaded without all that Numba knows of types: only compiling needs that,
    and filling its tables would take longer than loading all kernels of a model."""

    _impl_class = Code

    def load_overload(self, sig, target_context):
        rtsys.initialize(target_context)  # what arrays are handed over by
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)


def build(kernels) -> None:
    """Make kernels ready: compile them, or load them from the cache.  Nothing compiles after this."""
    for dispatcher in kernels:
        if not dispatcher.signatures:
            dispatcher.compile(dispatcher.only_signature)
            dispatcher.disable_compile()
            _mark(dispatcher).touch()


def address_of(dispatcher) -> int:
    """Where the machine code of a kernel that is ready begins, for `call` in a kernel (see layers.py)."""
    compiled, = dispatcher.overloads.values()
    return compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)


def missing(kernels) -> int:
    """How many of the kernels the cache does not hold yet."""
    return sum(not _mark(dispatcher).exists() for dispatcher in kernels)


CHILD = 'from tpmpi.kernels import jit; jit.compile_claimed()'


def compile_missing(kernels, processes: int, ticket: str, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Compile what the cache lacks, in child processes: what a compiler takes of memory is given back when they end.

    ticket: a name of this build, the same in all the processes that share it, each of which begins `processes` children.
    A kernel that no child could compile is left for `build`, which then says why.  meanwhile: called once a second.
    """
    names = [_name(k) for k in kernels if not _mark(k).exists()]
    if not names:
        return
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get('PYTHONPATH')])]
    env = os.environ | {'TPMPI_MATRIX_UNITS': MATRIX_UNITS, 'TPMPI_CACHE_DIR': str(FOLDER.parent),
                        'PYTHONPATH': os.pathsep.join(path)}
    children = []
    with contextlib.suppress(OSError):  # where no processes are granted
        for _ in range(processes):
            children.append(subprocess.Popen([sys.executable, '-c', CHILD, ticket, *names], env=env, stdin=subprocess.PIPE,
                                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    for child in children:
        while child.poll() is None:  # it ends at once if this process does: its standard input is then closed
            meanwhile()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1)
        child.stdin.close()


def compile_claimed() -> None:
    """The child: compile those of the kernels named on the command line that no other child has begun."""
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()  # at the end of what began it
    ticket, *names = sys.argv[1:]
    for name in names:
        claim, (module, _, function) = FOLDER / f'{name}.{ticket}', name.rpartition('.')
        with contextlib.suppress(FileExistsError):
            claim.touch(exist_ok=False)
            build([getattr(importlib.import_module(module), function)])
            claim.unlink()


def _name(dispatcher) -> str:
    """Where a kernel is found: those for experts have the names of those for one matrix."""
    return f'{dispatcher.py_func.__module__}.{dispatcher.py_func.__name__}'


def _mark(dispatcher) -> Path:
    """A file that says that the machine code of a kernel is whole."""
    return FOLDER / f'{_name(dispatcher)}.built'


@functools.cache
def hashed(source: str) -> str:
    """A digest of a source."""
    return hashlib.sha256(Path(source).read_bytes()).hexdigest()


def cache_folder(environ=os.environ) -> Path:
    """The folder for machine code: named by the kernels' sources, the versions of the compiler and the CPU.

    An edited helper in another file, another CPU that shares the home folder, or another compiler thus never meets old
    code, and a second installation of the same finds that of the first.
    In $TPMPI_CACHE_DIR, $XDG_CACHE_HOME/tpmpi or ~/.cache/tpmpi; where none can be written, in a private folder of the
    temporary directory.
    """
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob('*.py')):
        digest.update(f'{source.name} {hashed(str(source))} '.encode())
    digest.update(repr((numba.__version__, llvmlite.__version__, np.__version__, sys.version_info[:2], TRIPLE, CPU, _FEATURES,
                        PARALLEL, MATRIX_UNITS, WIDTH)).encode())
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
    folder = Path(tempfile.mkdtemp(prefix='tpmpi-'), name)
    folder.mkdir()
    return folder


CHECK = 'from tpmpi.kernels.matrix_units import self_check; raise SystemExit(not self_check())'
KINDS_OF_UNITS = ('none', 'amx', 'avx512bf16', 'emulated')


def granted_units(environ=os.environ) -> str:
    """The matrix units that this CPU has and the system grants, or what $TPMPI_MATRIX_UNITS names."""
    asked = environ.get('TPMPI_MATRIX_UNITS', 'auto')
    if asked not in ('auto', *KINDS_OF_UNITS):
        raise ValueError(f'TPMPI_MATRIX_UNITS is {asked!r}; expected auto, {", ".join(KINDS_OF_UNITS)}')
    lacking = {'amx': {'amx-tile', 'amx-bf16'}, 'avx512bf16': {'avx512f', 'avx512bw', 'avx512bf16'}}.get(asked, set()) - FEATURES
    if lacking:  # LLVM would end the process over an instruction that it cannot select
        raise ValueError(f'TPMPI_MATRIX_UNITS is {asked}; this CPU lacks {", ".join(sorted(lacking))}: leave it at auto')
    if asked in ('auto', 'amx') and {'amx-tile', 'amx-bf16'} <= FEATURES and sys.platform == 'linux':
        arch_prctl, request_permission, tile_data = 158, 0x1023, 18
        if ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0:
            return 'amx'
    if asked == 'auto':
        return 'avx512bf16' if WIDTH == 16 and 'avx512bf16' in FEATURES else 'none'
    return asked


def units_work() -> bool:
    """Whether a child process, which a wrong instruction may kill, got right products in tiles; kept beside the code.

    The other units are vector instructions, which a system grants with AVX-512 or not at all.
    """
    works, fails = (FOLDER / f'{MATRIX_UNITS}.{word}' for word in ('works', 'fails'))
    if not works.exists() and not fails.exists():
        path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get('PYTHONPATH')])]
        env = os.environ | {'TPMPI_MATRIX_UNITS': MATRIX_UNITS, 'PYTHONPATH': os.pathsep.join(path)}
        child = subprocess.run([sys.executable, '-c', CHECK], env=env, stdin=subprocess.DEVNULL, capture_output=True)
        (fails if child.returncode else works).touch()
    return works.exists()


MATRIX_UNITS = granted_units()
FOLDER = cache_folder()
if os.environ.get('TPMPI_MATRIX_UNITS', 'auto') == 'auto' and MATRIX_UNITS == 'amx' and not units_work():
    MATRIX_UNITS = 'none'
    FOLDER = cache_folder()
# whether vectors of pairs of bfloat16 are multiplied by an instruction: beside tiles, or alone
HAS_PAIRS = MATRIX_UNITS in ('amx', 'avx512bf16') and WIDTH == 16 and 'avx512bf16' in FEATURES
