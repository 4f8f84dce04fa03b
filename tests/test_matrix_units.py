"""The matrix units: emulated on this CPU against float64, compiled for CPUs that have them, refused where there are none."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from ranks import environment

pytest.importorskip('numba', reason='Numba is not installed: pip install numba')

ERRORS = '''
import json
import numpy as np
from tpmpi.kernels import matrix_units as units, packing, products
from tpmpi.kernels.cpu import Kernels
from tpmpi.weights import decode, encode

ops, rng, found = Kernels(threads=1), np.random.default_rng(0), {}
kernels = [(kind, kind, kernel) for kind, kernel in units.TILES.items()] + [('pairs', 'bfloat16', units.pairs_bfloat16)]
for name, kind, kernel in kernels:
    ops.build([kernel, getattr(packing, f'pack_{kind}')])
    for tokens, k, outputs in ((8, 32, 16), (9, 64, 5), (37, 96, 70), (65, 352, 48)):
        stored = encode(rng.standard_normal((outputs, k)).astype(np.float32), kind)
        weight = ops.new_weight(outputs, k, False, kind, 'W')
        ops.fill(weight, 0, stored)
        x = rng.standard_normal((tokens, k)).astype(np.float32) * np.float32(10.0 ** rng.integers(-5, 5))
        if name == 'pairs':
            x = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        assert name == 'pairs' or ops._product(x, weight) is kernel
        y = np.full((tokens, outputs), np.nan, np.float32)
        kernel(x, weight.data, y, 1)
        w = decode(stored).astype(np.float64).T
        worst = np.abs(y - x.astype(np.float64) @ w) / (np.abs(x.astype(np.float64)) @ np.abs(w))
        found[name] = max(found.get(name, 0), worst.max())
        rounded = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        assert units.split(rounded)[1] == 1
print(json.dumps(found))
'''
INSTRUCTIONS = '''
import json
from tpmpi.kernels import jit, matrix_units as units
kernel = {'amx': units.tiles_bfloat16, 'avx512bf16': units.pairs_bfloat16}[jit.MATRIX_UNITS]
kernel.compile(kernel.only_signature)
text = ''.join(kernel.inspect_asm().values())
print(json.dumps({name: name in text for name in ('ldtilecfg', 'tileloadd', 'tdpbf16ps', 'tilestored', 'vdpbf16ps', 'zmm')}))
'''
AVX512 = '+avx,+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni,+avx512bf16'


def run(program: str, **variables):
    """The last line that a program prints, as JSON."""
    done = subprocess.run([sys.executable, '-c', program], env=environment(**variables), capture_output=True, text=True,
                          timeout=400)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_emulated_units_give_the_products(tmp_path):
    """Two parts of x hold 16 bits of it, two parts of an integer weight likewise: an error of 2^-16 of each term at most."""
    errors = run(ERRORS, TPMPI_MATRIX_UNITS='emulated', TPMPI_CACHE_DIR=str(tmp_path))
    assert sorted(errors) == ['bfloat16', 'int4', 'int8', 'pairs']
    assert errors['pairs'] < 1e-6 and errors['bfloat16'] < 2 ** -16 and max(errors.values()) < 2 ** -15, errors


@pytest.mark.parametrize(('cpu', 'unit', 'features', 'expected'), [
    ('sapphirerapids', 'amx', AVX512 + ',+amx-tile,+amx-bf16', {'ldtilecfg', 'tileloadd', 'tdpbf16ps', 'tilestored', 'zmm'}),
    ('znver4', 'avx512bf16', AVX512, {'vdpbf16ps', 'zmm'})])
def test_units_compile_to_their_instructions(cpu, unit, features, expected, tmp_path):
    """Compiled only: the CPU that runs this need not have them."""
    found = run(INSTRUCTIONS, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features, TPMPI_MATRIX_UNITS=unit,
                TPMPI_CACHE_DIR=str(tmp_path))
    assert {name for name, there in found.items() if there} == expected


ATTENTION = '''
import json
import numpy as np
from kernel_cases import ring_steps
from tpmpi.kernels import attention, elementwise
from tpmpi.kernels.cpu import Kernels
from tpmpi.kv_cache import LayerCache, Ring

ops, rng, worst = Kernels(), np.random.default_rng(3), 0
ops.build([attention.attend_pairs, attention.attend_bfloat16, elementwise.rope_append_bfloat16])
for dim, window in ((64, None), (24, 20), (7, None)):
    ring = Ring(np.array([2, 0, 1]), 32)
    cache = LayerCache(*ops.new_cache(2, 96, dim, 'bfloat16'))
    for segment, seen in ring_steps(ring, (50, 1, 40, 30, 1), window, 0):
        qkv = rng.standard_normal((len(segment.slots), 7 * dim)).astype(np.float32)
        q = ops.rope_append(qkv, 3, dim, None, cache, segment.slots)
        arguments = q, cache, (range(0, 2), range(2, 3)), (segment,), seen, dim ** -0.5
        ops.pairs = {}
        expected = ops.attend(*arguments)
        ops.pairs = {'bfloat16': None}
        found = ops.attend(*arguments)
        worst = max(worst, np.abs(found - expected).max())
        assert (found != expected).any()
print(json.dumps(float(worst)))
'''


def test_attention_in_pairs_rounds_queries_and_exponentials(tmp_path):
    """Beside the attention that multiplies in float32, over a ring that goes round: 2^-8 of each term, which average out."""
    assert 1e-5 < run(ATTENTION, TPMPI_MATRIX_UNITS='emulated', TPMPI_CACHE_DIR=str(tmp_path)) < 2 ** -6


def test_a_unit_that_fails_its_check_is_not_used(tmp_path):
    """The check, in a child, meets instructions that this CPU lacks or that the system does not grant, or finds them right."""
    program = '''
import json, sys
from tpmpi.kernels import jit
before = jit.MATRIX_UNITS
jit.CHECK = 'import os, signal; os.kill(os.getpid(), signal.SIGILL)'
jit.MATRIX_UNITS = 'amx'
print(json.dumps([jit.units_work(), (jit.FOLDER / 'amx.fails').exists()]))
'''
    assert run(program, TPMPI_MATRIX_UNITS='none', TPMPI_CACHE_DIR=str(tmp_path)) == [False, True]


@pytest.mark.parametrize(('unit', 'message'), [('tpu', "is 'tpu'; expected auto, none, amx"),
                                               ('amx', 'is amx; this CPU lacks amx-bf16, amx-tile')])
def test_a_unit_that_is_unknown_or_not_there_is_refused(unit, message):
    done = subprocess.run([sys.executable, '-c', 'from tpmpi.kernels import jit'], capture_output=True, text=True,
                          env=environment(TPMPI_MATRIX_UNITS=unit, NUMBA_CPU_NAME='generic'))
    assert done.returncode == 1 and 'TPMPI_MATRIX_UNITS ' + message in done.stderr


WIDTHS = '''
import hashlib, json
import numpy as np
from tpmpi.kernels import elementwise, jit, products
from tpmpi.kernels.cpu import Kernels
from tpmpi.weights import encode
from tpmpi.kernels import packing
ops, rng, digest = Kernels(), np.random.default_rng(0), hashlib.sha256()
ops.build([elementwise.rms_norm, elementwise.log_sum_exp])
for kind in ('bfloat16', 'int4'):
    ops.build([products.MULTIPLY[kind], getattr(packing, f'pack_{kind}')])
    weight = ops.new_weight(100, 96, False, kind, 'W')
    ops.fill(weight, 0, encode(rng.standard_normal((100, 96)).astype(np.float32), kind))
    for tokens in (1, 2, 7):
        digest.update(ops.linear(rng.standard_normal((tokens, 96)).astype(np.float32), weight).tobytes())
x = rng.standard_normal((3, 101)).astype(np.float32)
digest.update(ops.rms_norm(x, x[0], 1e-5).tobytes() + ops.log_sum_exp(x).tobytes())
print(json.dumps([jit.WIDTH, digest.hexdigest()]))
'''


def test_vectors_of_any_length_give_the_same_bits(tmp_path):
    """Lanes are outputs, and sums along a row have sixteen lanes always, so that ranks on different CPUs agree."""
    found = {lanes: run(WIDTHS, TPMPI_VECTOR_LANES=lanes, TPMPI_CACHE_DIR=str(tmp_path)) for lanes in ('8', '16')}
    assert [width for width, _ in found.values()] == [8, 16]
    assert len({bits for _, bits in found.values()}) == 1
