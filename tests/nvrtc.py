"""NVIDIA's runtime compiler, as the wheel nvidia-cuda-nvrtc brings it: it needs neither a GPU nor a driver.

The functions are those of "NVRTC", NVIDIA's documentation of the library.
"""

from __future__ import annotations

import ctypes
import re
from importlib import metadata
from pathlib import Path


def library() -> Path | None:
    """The compiler, if one is installed."""
    for distribution in metadata.distributions():
        if (distribution.metadata['Name'] or '').startswith('nvidia-cuda-nvrtc'):
            found = [distribution.locate_file(f) for f in distribution.files or () if re.search(r'libnvrtc\.so\.\d+$', str(f))]
            if found:
                return Path(found[0])
    return None


def compile_source(source: str, architecture: str) -> dict[str, dict[str, int]]:
    """Compile for a real architecture such as sm_80.  For each kernel: registers, bytes that are spilled.

    Raises RuntimeError with the compiler's words.
    """
    nvrtc, program = ctypes.CDLL(str(library())), ctypes.c_void_p()
    text = source.encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b'kernels.cu', 0, None, None) == 0
    options = [b'-std=c++17', f'-arch={architecture}'.encode(), b'--ptxas-options=-v']
    try:
        code = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        if code:
            raise RuntimeError(log.value.decode())
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        assert size.value > 1000
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return report(log.value.decode())


def report(log: str) -> dict[str, dict[str, int]]:
    """What ptxas says of each kernel, with -v."""
    found, name = {}, None
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            name = entry[1]
            found[name] = {'registers': 0, 'spilled': 0}
        elif spills := re.search(r'(\d+) bytes spill stores, (\d+) bytes spill loads', line):
            found[name]['spilled'] = int(spills[1]) + int(spills[2])
        elif registers := re.search(r'Used (\d+) registers', line):
            found[name]['registers'] = int(registers[1])
    return found
