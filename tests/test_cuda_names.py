"""Every name of CuPy that the package uses is one of CuPy's, without a device."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import tpmpi

pytestmark = pytest.mark.cuda
ROOTS = ('xp', 'cupy', 'cuda')  # variables that hold CuPy, and its part of that name
LIBRARIES = ('cublas', 'nccl')  # extensions that cannot be imported without the library that they bind


def chains() -> set[str]:
    """The dotted names that follow such a variable, or an attribute called xp, anywhere in the package."""
    found = set()
    for path in Path(tpmpi.__file__).parent.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = []
            while isinstance(node, ast.Attribute):
                parts.insert(0, node.attr)
                node = node.value
            if isinstance(node, ast.Name) and node.id in ROOTS:
                found.add('.'.join((['cuda'] if node.id == 'cuda' else []) + parts))
            elif isinstance(node, ast.Name) and 'xp' in parts[:2]:
                found.add('.'.join(parts[parts.index('xp') + 1:]))
    return {name for name in found if name}


def test_names_are_cupy_s():
    cupy = pytest.importorskip('cupy', reason='CuPy is not installed: pip install cupy-cuda12x')
    names, unknown = chains(), []
    assert {'RawModule', 'empty', 'cuda.cublas', 'cuda.runtime.CUDA_R_16BF', 'cuda.alloc_pinned_memory'} <= names
    for name in sorted(names):
        at = cupy
        for part in name.split('.'):
            if part in LIBRARIES:
                break
            if not hasattr(at, part):
                unknown.append(name)
                break
            at = getattr(at, part)
    assert unknown == []


@pytest.mark.parametrize(('library', 'variables', 'some'), [
    ('cublas', ('cublas', 'blas'), {'gemmEx', 'CUBLAS_COMPUTE_32F'}), ('nccl', ('nccl',), {'NcclCommunicator', 'NCCL_FLOAT32'})])
def test_names_of_the_libraries_are_in_their_extensions(library, variables, some):
    pytest.importorskip('cupy', reason='CuPy is not installed: pip install cupy-cuda12x')
    folder = Path(importlib.import_module('cupy_backends').__file__).parent / 'cuda/libs'
    code = next(folder.glob(f'{library}.*.so')).read_bytes()
    names = {node.attr for path in Path(tpmpi.__file__).parent.rglob('*.py') for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in variables}
    assert some <= names
    assert [name for name in names if name.encode() not in code] == []
