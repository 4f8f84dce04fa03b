"""The matrix units: emulated on this CPU against float64, compiled for CPUs that have them, refused where there are none."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from ranks import environment

pytest.importorskip('numba', reason='Numba is not installed: pip install numba')
from tpmpi.kernels.jit import MATRIX_UNITS as HERE  # noqa: E402

ERRORS = '''
import dataclasses
import json
import numpy as np
from kernel_cases import ready
from tpmpi.kernels import elementwise, matrix_units as units, packing
from tpmpi.kernels.cpu import Kernels
from tpmpi.weights import decode, encode

rng, found = np.random.default_rng(0), {}
SHAPES = ((1, 32, 16), (9, 64, 5), (16, 64, 33), (33, 96, 64), (37, 96, 70), (65, 352, 48), (64, 64, 96))


def packed(ops, outputs, k, kind):
    stored = encode(rng.standard_normal((outputs, k)).astype(np.float32) / 8, kind)
    weight = ops.new_weight(outputs, k, False, kind, 'W')
    ops.fill(weight, 0, stored)
    return weight, decode(stored).astype(np.float64).T


def error(y, x, w):
    return float((np.abs(y - x.astype(np.float64) @ w) / (np.abs(x.astype(np.float64)) @ np.abs(w))).max())


def bfloat16(x):
    return decode(encode(x, 'bfloat16'))


for activations in ('float32', 'bfloat16', 'int8'):
    for threads in (1, 3):
        ops = Kernels(threads, activations)
        ops.units = {kind: dataclasses.replace(unit, fewest=1) for kind, unit in ops.units.items()}
        ops.norms_in_tiles = 1
        for kind, unit in ops.units.items():
            if activations == 'int8' and kind not in ('int8', 'int4'):
                continue
            ready(ops, [*unit.kernels, getattr(packing, f'pack_{kind}'), packing.touch])
            for tokens, k, outputs in SHAPES:
                weight, w = packed(ops, outputs, k, kind)
                x = rng.standard_normal((tokens, k)).astype(np.float32) * np.float32(10.0 ** rng.integers(-5, 5))
                if unit.parts == 1:
                    x = bfloat16(x)
                y = ops.linear(x, weight)
                assert y.shape == (tokens, outputs)
                name = f'{activations} {kind}'
                found[name] = max(found.get(name, 0), error(y, x, w))
                if unit.parts == 1:  # a norm leaves what it gives in tiles as well
                    ready(ops, [units.add_rms_norm_in_tiles])
                    part, gain = x[::-1].copy(), rng.standard_normal(k).astype(np.float32)
                    a = ops.added_norm(x, part, 'rms', gain, None, 1e-5)
                    assert ops.normed[0] is a and (ops.linear(a, weight) == ops.linear(a.copy(), weight)).all()
                    plain = Kernels(units=False)
                    ready(plain, [elementwise.add_rms_norm])
                    again = x[::-1].copy()
                    assert (plain.added_norm(x, again, 'rms', gain, None, 1e-5) == a).all() and (again == part).all()
                if unit.gated and outputs % 64 == 0:  # silu(gate) * up, in tiles, and what follows, of whatever kind
                    d = ops.gated_linear(x / np.abs(x).max(), weight, 'silu')
                    assert isinstance(d, units.Tiles) and len(d) == tokens and d.parts == 1
                    gate, up = np.split(bfloat16(x / np.abs(x).max()).astype(np.float64) @ w, 2, axis=1)
                    expected = gate / (1 + np.exp(-gate)) * up
                    name = 'gated ' + kind
                    found[name] = max(found.get(name, 0), float(np.abs(d.numbers() - expected).max() / np.abs(expected).max()))
                    for after in (kind, 'float32'):
                        ready(ops, [*ops.units[after].kernels, getattr(packing, f'pack_{after}')])
                        down, w_down = packed(ops, 40, outputs // 2, after)
                        assert error(ops.linear(d, down), d.numbers(), w_down) < 2 ** -7
print(json.dumps(found))
'''
PAIRS = '''
import json
import numpy as np
from kernel_cases import ready
from tpmpi.kernels import matrix_units as units, packing
from tpmpi.kernels.cpu import Kernels
from tpmpi.weights import decode, encode

ops, rng, worst = Kernels(), np.random.default_rng(0), 0
ready(ops, [units.pairs_bfloat16, packing.pack_bfloat16])
for tokens, k, outputs in ((1, 32, 16), (8, 32, 16), (9, 64, 5), (37, 96, 70)):
    stored = encode(rng.standard_normal((outputs, k)).astype(np.float32), 'bfloat16')
    weight, x = ops.new_weight(outputs, k, False, 'bfloat16', 'W'), rng.standard_normal((tokens, k)).astype(np.float32)
    ops.fill(weight, 0, stored)
    y = np.full((tokens, outputs), np.nan, np.float32)
    units.pairs_bfloat16(x, weight.data, y, 1)
    x, w = decode(encode(x, 'bfloat16')).astype(np.float64), decode(stored).astype(np.float64).T
    worst = max(worst, float((np.abs(y - x @ w) / (np.abs(x) @ np.abs(w))).max()))
print(json.dumps(worst))
'''
BYTES = '''
import json
import numpy as np
from kernel_cases import ready
from tpmpi.kernels import integer_units, packing, products
from tpmpi.kernels.cpu import Kernels
from tpmpi.weights import encode

rng, compared = np.random.default_rng(0), 0
for kind in ('int8', 'int4'):
    pairs = (products.MULTIPLY[kind], integer_units.BYTES[kind]), (products.COARSE[kind], integer_units.COARSE[kind])
    ops = Kernels()
    ready(ops, [getattr(packing, f'pack_{kind}'), *(kernel for pair in pairs for kernel in pair)])
    for k, outputs in ((32, 16), (64, 5), (96, 70), (1056, 33)):
        weight = ops.new_weight(outputs, k, False, kind, 'W')
        ops.fill(weight, 0, encode(rng.standard_normal((outputs, k)).astype(np.float32), kind))
        for tokens in (1, 7, 8, 9, 16, 17, 40):
            x = rng.standard_normal((tokens, k)).astype(np.float32) * np.float32(10.0 ** rng.integers(-5, 5))
            if tokens == 9:
                x[3], x[4, 5], x[5, 6] = 0, np.nan, np.inf
            for threads in (1, 3):
                for plain, in_tiles in pairs:
                    expected, y = np.empty((2, tokens, outputs), np.float32)
                    y.fill(7)
                    plain(x, weight.data, expected, 1)
                    in_tiles(x, weight.data, y, threads)
                    assert np.array_equal(y, expected, equal_nan=True), (kind, k, outputs, tokens)
                    compared += 1
print(json.dumps(compared))
'''
INSTRUCTIONS = '''
import json
from tpmpi.kernels import integer_units, jit, matrix_units as units
kernels = {'amx': [units.rounded_bfloat16, integer_units.bytes_int8], 'avx512bf16': [units.pairs_bfloat16]}[jit.MATRIX_UNITS]
for kernel in kernels:
    kernel.compile(kernel.only_signature)
text = ''.join(code for kernel in kernels for code in kernel.inspect_asm().values())
print(json.dumps({name: name in text for name in ('ldtilecfg', 'tileloadd', 'tdpbf16ps', 'tdpbsud', 'tdpbuud', 'tilestored',
                                                  'vdpbf16ps', 'zmm')}))
'''
UNITS = ['emulated', *(['amx'] if HERE == 'amx' else [])]
AVX512 = '+avx,+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni,+avx512bf16'


def run(program: str, **variables):
    """The last line that a program prints, as JSON."""
    done = subprocess.run([sys.executable, '-c', program], env=environment(**variables), capture_output=True, text=True,
                          timeout=1200)  # emulated units compile for minutes
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('unit', UNITS)
def test_products_in_tiles(unit):
    """Three parts of each number are all of it; two hold 16 bits, whose products err by 2^-16 at most; one has 8."""
    found = run(ERRORS, TPMPI_MATRIX_UNITS=unit)
    assert found.pop('float32 float32') < 2 ** -21 and found.pop('bfloat16 float32') < 2 ** -21
    assert found.pop('bfloat16 bfloat16') < 2 ** -21  # x had no more bits
    for kind, bound in (('bfloat16', 2 ** -16), ('int8', 2 ** -15), ('int4', 2 ** -15)):
        assert found.pop(f'float32 {kind}') < bound
    assert max(found.pop(f'gated {kind}') for kind in ('bfloat16', 'int8', 'int4')) < 2 ** -7
    assert sorted(found) == ['bfloat16 int4', 'bfloat16 int8', 'int8 int4', 'int8 int8'] and max(found.values()) < 2 ** -7


@pytest.mark.parametrize('unit', UNITS)
def test_products_of_bytes_in_tiles_have_the_bits_of_the_ordinary_kernels(unit):
    """Sums of a group are exact in both, and scaled alike."""
    assert run(BYTES, TPMPI_MATRIX_UNITS=unit) == 2 * 4 * 7 * 2 * 2


def test_products_in_pairs():
    assert run(PAIRS, TPMPI_MATRIX_UNITS='emulated') < 1e-6


@pytest.mark.parametrize(('cpu', 'unit', 'features', 'expected'), [
    ('sapphirerapids', 'amx', AVX512 + ',+amx-tile,+amx-bf16,+amx-int8',
     {'ldtilecfg', 'tileloadd', 'tdpbf16ps', 'tdpbsud', 'tdpbuud', 'tilestored', 'zmm'}),
    ('znver4', 'avx512bf16', AVX512, {'vdpbf16ps', 'zmm'})])
def test_units_compile_to_their_instructions(cpu, unit, features, expected, tmp_path):
    """Compiled only: the CPU that runs this need not have them."""
    found = run(INSTRUCTIONS, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features, TPMPI_MATRIX_UNITS=unit,
                TPMPI_CACHE_DIR=str(tmp_path))
    assert {name for name, there in found.items() if there} == expected


ATTENTION = '''
import json
import numpy as np
from kernel_cases import ready, ring_steps
from tpmpi.kernels import attention, attention_tiles, elementwise
from tpmpi.kernels.cpu import Kernels
from tpmpi.kv_cache import LayerCache, Ring

KERNELS = {'pairs': attention.attend_pairs, 'rounded': attention_tiles.attend_rounded, 'tiles': attention_tiles.attend_tiles}
ops, rng, worst = Kernels(), np.random.default_rng(3), dict.fromkeys(KERNELS, 0)
ready(ops, [*KERNELS.values(), attention.attend_bfloat16, elementwise.rope_append_bfloat16])
for dim, window, sinks, cap in ((64, None, 0, None), (96, 20, 0, 5.0), (32, None, 5, None), (24, 20, 0, None),
                                (7, None, 0, None)):
    ring = Ring(np.array([2, 0, 1]), 48, 1 if sinks else 0)
    cache = LayerCache(*ops.new_cache(2, 3 * 48 + 10, dim, 'bfloat16'))
    for segment, seen in ring_steps(ring, (50, 1, 40, 30, 1), window, sinks):
        qkv = rng.standard_normal((len(segment.slots), 7 * dim)).astype(np.float32)
        q = ops.rope_append(qkv, 3, dim, None, cache, segment.slots)
        arguments = q, cache, (range(0, 2), range(2, 3)), (segment,), seen, dim ** -0.5, cap, sinks
        ops._attention = lambda kv, head_dim: attention.attend_bfloat16
        expected = ops.attend(*arguments)
        for name, kernel in KERNELS.items():
            if name == 'pairs' or dim % 32 == 0:
                ops._attention = lambda kv, head_dim: kernel
                found = ops.attend(*arguments)
                worst[name] = max(worst[name], float(np.abs(found - expected).max()))
                assert (found != expected).any()
print(json.dumps(worst))
'''
OTHERS = '''
import json
import numpy as np
from kernel_cases import ready
from tpmpi.kernels.cpu import Kernels
from tpmpi.kernels import elementwise, attention_tiles
from tpmpi.kv_cache import LayerCache, Ring

ops, rng, same = Kernels(activations='bfloat16'), np.random.default_rng(4), []
ready(ops, [attention_tiles.attend_rounded, elementwise.rope_append_bfloat16])
qkv = rng.standard_normal((70, 3 * 64)).astype(np.float32)
for foreign in (0, 0x7FC0):  # what the other slots hold: zeros, or no numbers
    for chunk in (70, 9, 1):
        cache, ring, rows = LayerCache(*ops.new_cache(1, 96, 64, 'bfloat16')), Ring(np.array([1, 2, 4, 5, 0]), 16), []
        cache.k[:] = foreign
        cache.v[:] = foreign
        for at in range(0, 70, chunk):
            segment = ring.segment(0, at, min(chunk, 70 - at))
            q = ops.rope_append(qkv[at:at + chunk], 1, 64, None, cache, segment.slots)
            rows.append(ops.attend(q, cache, (range(1),), (segment,), None, 0.125))
        same.append(np.concatenate(rows).tobytes().hex())
print(json.dumps(len(set(same))))
'''


@pytest.mark.parametrize('unit', UNITS)
def test_attention_in_matrix_units(unit):
    """Beside the one that multiplies in float32, over a ring that goes round.  Where Q and the exponentials are rounded:
    2^-8 of each term, which average out; in two parts: 2^-16."""
    found = run(ATTENTION, TPMPI_MATRIX_UNITS=unit)
    assert 1e-5 < found['pairs'] < 2 ** -6 and 1e-5 < found['rounded'] < 2 ** -6 and found['tiles'] < 2 ** -14, found


@pytest.mark.parametrize('unit', UNITS)
def test_attention_in_tiles_is_the_same_alone_and_whatever_lies_beside(unit):
    """Blocks of 16 slots of which a tile takes two: the other one's values are not touched."""
    assert run(OTHERS, TPMPI_MATRIX_UNITS=unit) == 1


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
from kernel_cases import ready
from tpmpi.kernels import elementwise, jit, products
from tpmpi.kernels.cpu import Kernels
from tpmpi.weights import encode
from tpmpi.kernels import packing
ops, rng, digest = Kernels(), np.random.default_rng(0), hashlib.sha256()
ready(ops, [elementwise.rms_norm, elementwise.log_sum_exp])
for kind in ('bfloat16', 'int4'):
    ready(ops, [products.MULTIPLY[kind], getattr(packing, f'pack_{kind}')])
    weight = ops.new_weight(100, 96, False, kind, 'W')
    ops.fill(weight, 0, encode(rng.standard_normal((100, 96)).astype(np.float32), kind))
    for tokens in (1, 2, 7):
        digest.update(ops.linear(rng.standard_normal((tokens, 96)).astype(np.float32), weight).tobytes())
x = rng.standard_normal((3, 101)).astype(np.float32)
digest.update(ops.rms_norm(x, x[0], 1e-5).tobytes() + ops.log_sum_exp(x).tobytes())
print(json.dumps([jit.WIDTH, digest.hexdigest()]))
'''


def test_vectors_of_any_length_give_the_same_bits():
    """Lanes are outputs, and sums along a row have sixteen lanes always, so that ranks on different CPUs agree."""
    found = {lanes: run(WIDTHS, TPMPI_VECTOR_LANES=lanes) for lanes in ('8', '16')}
    assert [width for width, _ in found.values()] == [8, 16]
    assert len({bits for _, bits in found.values()}) == 1
