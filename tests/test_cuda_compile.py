"""The CUDA sources compile for the architectures that they are meant for, without a GPU, and no kernel spills registers."""

from __future__ import annotations

import re

import nvrtc
import pytest

from tpmpi.kernels.cuda_source import FILES, source

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('architecture', ['sm_80', 'sm_86', 'sm_90'])
def test_compiles_without_spills(name, architecture):
    if nvrtc.library() is None:
        pytest.skip('no runtime compiler: pip install nvidia-cuda-nvrtc-cu12')
    kernels = nvrtc.compile_source(source(name), architecture)
    assert set(kernels) == entries(source(name))
    assert {called: k['spilled'] for called, k in kernels.items() if k['spilled']} == {}
    assert all(0 < k['registers'] <= 255 for k in kernels.values())


def entries(text: str) -> set[str]:
    """The kernels that a source declares."""
    return set(re.findall(r'^extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(', text, re.MULTILINE))


def test_a_mistake_is_reported():
    if nvrtc.library() is None:
        pytest.skip('no runtime compiler: pip install nvidia-cuda-nvrtc-cu12')
    with pytest.raises(RuntimeError, match='identifier "missing" is undefined'):
        nvrtc.compile_source('extern "C" __global__ void f(float* x) { x[0] = missing; }', 'sm_80')
