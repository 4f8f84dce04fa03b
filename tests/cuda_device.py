"""The device of the CUDA tests: a real GPU through CuPy, or the strict stand-in whose kernels run on the CPU."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import sys
from pathlib import Path

import pytest

STAND_IN = Path(__file__).parent / 'cuda'


STAND_IN_OR_GPU = ['stand-in', pytest.param('gpu', marks=pytest.mark.gpu)]  # for a fixture that calls `device`


@contextlib.contextmanager
def device(kind: str):
    """The module `cupy`: the stand-in, or CuPy on a real GPU; skips where that cannot be."""
    if kind == 'stand-in':
        with stand_in() as cupy:
            yield cupy
        return
    cupy = pytest.importorskip('cupy', reason='CuPy is not installed: pip install "tpmpi[cuda12]" or "tpmpi[cuda13]"')
    try:
        cupy.cuda.runtime.getDeviceCount()
    except Exception as e:
        pytest.skip(f'no GPU: {e}')
    yield cupy


@contextlib.contextmanager
def stand_in():
    """The module `cupy` is the stand-in as long as this lasts; skips where there is no C++ compiler."""
    if shutil.which('g++') is None:
        pytest.skip('no g++: the kernels cannot be run on the CPU')
    before = {name: module for name, module in sys.modules.items() if name.partition('.')[0] == 'cupy'}
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(STAND_IN))
    try:
        yield importlib.import_module('cupy')
    finally:
        sys.path.remove(str(STAND_IN))
        for name in [name for name in sys.modules if name.partition('.')[0] == 'cupy']:
            del sys.modules[name]
        sys.modules.update(before)
