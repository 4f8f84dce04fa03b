"""What a bug report needs: versions of everything, and facts of the machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import h5py
import numpy as np

import tpmpi
from tpmpi import comm

CPU_FEATURES = ('avx2', 'fma', 'f16c', 'avx512f', 'avx512_bf16', 'avx512_vnni', 'amx_bf16', 'amx_int8', 'asimd', 'sve', 'bf16')


def report() -> str:
    """Versions and facts, one per line."""
    rows = {
        'tpmpi': tpmpi.__version__, 'Python': platform.python_version(), 'system': platform.platform(),
        'CPU': cpu(), 'NumPy': f'{np.__version__}, BLAS {blas()}', 'MPI': comm.describe(),
        'HDF5': f'{h5py.version.hdf5_version}, h5py {h5py.__version__}', 'tokenizers': installed('tokenizers'),
        'jinja2': installed('jinja2'), 'GPU': gpu()}
    return '\n'.join(f'{name:<11} {value}' for name, value in rows.items())


def installed(package: str) -> str:
    """A package's version, or that it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return 'not installed'


def blas() -> str:
    """The linear algebra library that NumPy was built with."""
    facts = np.show_config(mode='dicts')['Build Dependencies']['blas']
    return f'{facts.get("name", "unknown")} {facts.get("version", "")}'.strip()


def cpu() -> str:
    """Model, cores that this process may use, and the vector and matrix units that matter here."""
    model, flags = platform.processor() or platform.machine(), set()
    try:
        with open('/proc/cpuinfo') as f:
            for line in f:
                key, _, value = line.partition(':')
                if key.strip() == 'model name':
                    model = value.strip()
                elif key.strip() in ('flags', 'Features'):
                    flags = set(value.split())
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return f'{model}, {cores} cores usable, {" ".join(f for f in CPU_FEATURES if f in flags) or "no known vector units"}'


def gpu() -> str:
    """What CuPy sees, or why it sees nothing."""
    if importlib.util.find_spec('cupy') is None:
        return 'CuPy not installed'
    try:
        import cupy
    except Exception as e:  # built for another CUDA, or a library of it is missing
        return f'CuPy cannot be imported ({" ".join(str(e).split())})'
    try:
        count = cupy.cuda.runtime.getDeviceCount()
        names = {cupy.cuda.runtime.getDeviceProperties(i)['name'].decode() for i in range(count)}
    except Exception as e:  # a missing or old driver is a fact to report here, not an error
        return f'CuPy {cupy.__version__}, no usable GPU ({" ".join(str(e).split())})'
    return f'CuPy {cupy.__version__}, {count} x {", ".join(sorted(names))}, driver {cupy.cuda.runtime.driverGetVersion()}'
