"""CUDA kernels compiled by g++ and run on the CPU, block by block, with the limits of a GPU; see emulator.h."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
DEFAULT_SHARED, MOST_SHARED = 48 << 10, 99 << 10  # bytes of dynamic shared memory: without asking, and at most
MOST_THREADS = 1024
GRID, BLOCK = (2**31 - 1, 65535, 65535), (1024, 1024, 64)  # along x, y, z, at most
FLAGS = ('-std=c++20', '-O2', '-g1', '-fPIC', '-fvisibility=hidden', '-fno-gnu-unique', '-ffp-contract=off',
         '-fcf-protection=none', '-U_FORTIFY_SOURCE', '-w')
FIBERS = ('-fsanitize=alignment,null,bounds',)
THREADS = ('-O1', '-fsanitize=thread', '-DEMULATOR_THREADS', '-pthread')
DTYPES = {
    'float': 'float32', 'double': 'float64', 'bool': 'bool', 'signed char': 'int8', 'unsigned char': 'uint8', 'short': 'int16',
    'unsigned short': 'uint16', 'int': 'int32', 'unsigned int': 'uint32', 'unsigned': 'uint32', 'long long': 'int64',
    'unsigned long long': 'uint64', 'size_t': 'uint64'}
VECTORS = {
    'float2': 'float32', 'float4': 'float32', 'uint2': 'uint32', 'uint4': 'uint32', 'int2': 'int32', 'int4': 'int32',
    'ushort4': 'uint16'}  # behind a pointer
_ONE_LAUNCH = threading.Lock()  # the state of a block is its library's, and libraries are shared by those who load them
HEAD = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(([^)]*)\)')


class CompileError(ValueError):
    """g++ refuses the source, or a kernel has a parameter of a type that is not known here; with what was said."""


class LaunchError(ValueError):
    """A grid, a block or an amount of shared memory that a GPU refuses."""


class KernelError(RuntimeError):
    """What a kernel did wrong while it ran: its name, its block and what happened."""


class NoSanitizer(RuntimeError):
    """The thread sanitizer cannot be used here, and why."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel."""

    name: str
    type: str  # as C++ has it, without const and __restrict__
    dtype: np.dtype  # of the number, or of what it points to
    pointer: bool


@dataclass(frozen=True)
class Pointer:
    """An address in host memory, and what lies there."""

    address: int
    dtype: np.dtype


class Library:
    """The kernels of one source."""

    def __init__(self, path: Path, kernels: dict[str, tuple[Parameter, ...]]):
        self.path, self.kernels = path, kernels
        self._code = ctypes.CDLL(str(path))

    def check_launch(self, name: str, grid: Sequence[int], block: Sequence[int], shared_bytes: int = 0,
                     shared_limit: int = DEFAULT_SHARED) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Grid and block with all three axes.  Raises LaunchError where a GPU would refuse them."""
        grid, block = (tuple(int(n) for n in sizes) + (1,) * (3 - len(sizes)) for sizes in (grid, block))
        for what, sizes, most in (('grid', grid, GRID), ('block', block, BLOCK)):
            if len(sizes) != 3 or not all(1 <= n <= limit for n, limit in zip(sizes, most, strict=True)):
                raise LaunchError(f'kernel {name}: {what} {sizes}; expected 1 to {most} along x, y and z')
        if block[0] * block[1] * block[2] > MOST_THREADS:
            raise LaunchError(f'kernel {name}: block {block} of more than {MOST_THREADS} threads')
        if not 0 <= shared_bytes <= shared_limit:
            raise LaunchError(f'kernel {name}: {shared_bytes} bytes of dynamic shared memory; expected at most {shared_limit}, '
                              f'and max_dynamic_shared_size_bytes raised for more, up to {MOST_SHARED}')
        return grid, block

    def bind(self, name: str, args: Sequence) -> list[np.ndarray]:
        """The arguments' values as the kernel takes them.  Raises TypeError with the kernel and the parameter."""
        parameters = self.kernels[name]
        if len(args) != len(parameters):
            raise TypeError(f'kernel {name}: {len(args)} arguments; expected {len(parameters)}: '
                            f'{", ".join(f"{p.type} {p.name}" for p in parameters)}')
        return [_value(f'kernel {name}, parameter {p.type} {p.name}', p, x) for p, x in zip(parameters, args, strict=True)]

    def launch(self, name: str, grid: Sequence[int], block: Sequence[int], args: Sequence, shared_bytes: int = 0,
               shared_limit: int = DEFAULT_SHARED, seed: int = 0) -> None:
        """Run a kernel to its end.

        args: for a pointer a C-contiguous array or a view, a Pointer, or None for null; for a number a NumPy scalar of
        its very type.  seed: of the order of the blocks, and of the threads in them; 0 is ascending.
        Raises TypeError for the arguments, LaunchError for the sizes, KernelError for what the kernel does.
        """
        values = self.bind(name, args)
        grid, block = self.check_launch(name, grid, block, shared_bytes, shared_limit)
        function = self._code[f'emulate_{name}']
        function.restype = ctypes.c_char_p
        launch = (ctypes.c_uint * 8)(*grid, *block, shared_bytes, seed)
        with _ONE_LAUNCH:
            error = function(launch, (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values)))
        if error is not None:
            raise KernelError(error.decode())


def _value(where: str, parameter: Parameter, x) -> np.ndarray:
    if not parameter.pointer:
        if not isinstance(x, np.generic) or x.dtype != parameter.dtype:
            raise TypeError(f'{where}: {_described(x)}; expected np.{parameter.dtype}')
        return np.array(x)
    if x is None or (isinstance(x, np.uint64) and x == 0):
        return np.zeros((), np.uint64)
    if isinstance(x, np.ndarray):
        x = Pointer(x.ctypes.data, x.dtype)
    if not isinstance(x, Pointer) or x.dtype != parameter.dtype:
        raise TypeError(f'{where}: {_described(x)}; expected an array of {parameter.dtype}')
    return np.array(x.address, np.uint64)


def _described(x) -> str:
    if isinstance(x, (np.ndarray, Pointer)):
        return f'an array of {x.dtype}'
    return f'np.{x.dtype}' if isinstance(x, np.generic) else type(x).__name__


def compiler() -> str | None:
    """The path of g++, if there is one."""
    return shutil.which('g++')


def compile_source(source: str, sanitize: bool = False, flags: tuple[str, ...] = ()) -> Library:
    """The kernels of a CUDA C++ source, compiled for this CPU; the result is kept below the system's temporary folder.

    sanitize: with threads and the thread sanitizer; such a library can be loaded in a program under `run_sanitized` only.
    flags: more for g++.  Raises CompileError.
    """
    kernels = parse(source)
    flags = (*FLAGS, *(THREADS if sanitize else FIBERS), *_native(), *flags)
    text = '\n'.join(['#include "emulator.h"', 'namespace {', '#line 1 "kernels.cu"', source, '}',
                      *(_trampoline(name, parameters) for name, parameters in kernels.items())])
    key = hashlib.sha256('\0'.join([text, *(h.read_text() for h in sorted(FOLDER.glob('*.h'))), *flags]).encode()).hexdigest()
    path = _folder() / f'{key[:40]}.so'
    if not path.exists():
        _build(text, flags, path)
    return Library(path, kernels)


def parse(source: str) -> dict[str, tuple[Parameter, ...]]:
    """The parameters of each kernel that is declared with extern "C"."""
    source = re.sub(r'//[^\n]*|/\*.*?\*/', ' ', source, flags=re.DOTALL)
    return {name: tuple(_parameter(name, text) for text in inside.split(',') if text.strip())
            for name, inside in HEAD.findall(source)}


def _parameter(kernel: str, text: str) -> Parameter:
    words = re.sub(r'\b(const|__restrict__|__restrict)\b', ' ', text).replace('*', ' * ').split()
    *kind, name = words
    pointer = '*' in kind
    base = ' '.join(word for word in kind if word != '*')
    dtype = DTYPES.get(base) or (VECTORS.get(base) if pointer else None)
    if dtype is None or kind.count('*') > 1:
        raise CompileError(f'kernel {kernel}, parameter {" ".join(text.split())!r}: a type that is not known here; '
                           f'known are {", ".join(DTYPES)} and pointers to them')
    return Parameter(name, base + '*' * pointer, np.dtype(dtype), pointer)


def _trampoline(name: str, parameters: tuple[Parameter, ...]) -> str:
    """What takes the arguments by address, under a name that ctypes finds."""
    values = ', '.join(f'*static_cast<{p.type}*>(a[{i}])' for i, p in enumerate(parameters))
    return (f'static void call_{name}(void** a) {{ {name}({values}); }}\n'
            f'extern "C" __attribute__((visibility("default"))) const char* emulate_{name}(const emulator::Launch* launch, '
            f'void** a) {{ return emulator::run("{name}", *launch, call_{name}, a); }}')


@functools.cache
def _native() -> tuple[str, ...]:
    """fmaf is one instruction where the CPU has it, and a slow function elsewhere."""
    info = Path('/proc/cpuinfo')
    return ('-mfma',) if info.exists() and re.search(r'^flags\s*:.*\bfma\b', info.read_text(), re.MULTILINE) else ()


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f'tpmpi-cuda-emulator-{os.getuid()}'
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise CompileError(f'{folder} belongs to somebody else; set TMPDIR to a folder of your own')
    return folder


def _build(text: str, flags: Sequence[str], path: Path) -> None:
    """Compile and link, under a name of its own first: several ranks may build at once."""
    if compiler() is None:
        raise CompileError('no g++: the CUDA emulator needs GCC 11 or newer')
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, code, library = (Path(folder) / name for name in ('kernels.cpp', 'kernels.o', 'kernels.so'))
        source.write_text(text)
        link = [flag for flag in flags if flag not in FIBERS]  # the header has what libubsan would bring
        for command in ([*flags, '-I', FOLDER, '-c', source, '-o', code], [*link, '-shared', code, '-o', library]):
            done = subprocess.run([compiler(), *command], capture_output=True, text=True)
            if done.returncode:
                raise CompileError(done.stderr)
        os.replace(library, path)


def run_sanitized(program: Path, *arguments, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a Python program that loads sanitized libraries.  Exit code 66: races, each told on stderr.

    Raises NoSanitizer where it cannot be: no g++, no libtsan, or a kernel whose layout of memory it does not know.
    """
    if compiler() is None:
        raise NoSanitizer('no g++')
    runtime = subprocess.run([compiler(), '-print-file-name=libtsan.so'], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        raise NoSanitizer('no libtsan beside g++')
    env = os.environ | {'LD_PRELOAD': os.path.realpath(runtime), 'OPENBLAS_NUM_THREADS': '1', 'OMP_NUM_THREADS': '1',
                        'TSAN_OPTIONS': 'exitcode=66:report_signal_unsafe=0',
                        'PYTHONPATH': os.pathsep.join(p for p in [str(FOLDER), *sys.path] if p)}
    fixed = [shutil.which('setarch'), '-R'] if shutil.which('setarch') else []  # addresses where the sanitizer expects them
    done = subprocess.run([*fixed, sys.executable, program, *map(str, arguments)], capture_output=True, text=True, env=env,
                          timeout=timeout, stdin=subprocess.DEVNULL)
    if 'FATAL: ThreadSanitizer' in done.stderr:
        raise NoSanitizer(done.stderr.strip().splitlines()[0])
    return done
