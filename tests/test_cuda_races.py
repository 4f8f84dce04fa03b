"""No CUDA kernel has a race: each once with a thread of the system for every thread of the GPU, watched by the sanitizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from test_cuda_compile import entries

from tpmpi.kernels.cuda_source import FILES, source

pytestmark = pytest.mark.cuda
PROGRAM = Path(__file__).parent / 'programs/cuda_races.py'


def test_no_kernel_has_a_race(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / 'cuda'))
    import emulate
    monkeypatch.setenv('FAKE_CUDA_SANITIZE', '1')
    try:
        done = emulate.run_sanitized(PROGRAM, timeout=900)
    except emulate.NoSanitizer as e:
        pytest.skip(str(e))
    finally:
        sys.modules.pop('emulate', None)
    assert done.returncode == 0, done.stderr[-3000:]
    ran = set(json.loads(done.stdout.splitlines()[-1])) - {'gemmEx'}
    kernels = set().union(*(entries(source(name)) for name in FILES))
    assert {kernel.rstrip('_0123456789') for kernel in kernels} == {kernel.rstrip('_0123456789') for kernel in ran}
