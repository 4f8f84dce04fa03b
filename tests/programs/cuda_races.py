"""Every CUDA kernel once, on small arrays, compiled for the thread sanitizer: what it reports is a race.

Run by emulate.run_sanitized with FAKE_CUDA_SANITIZE=1.  The last line printed is JSON: the kernels that ran.
"""

from __future__ import annotations

import json

import cupy
import numpy as np

from tpmpi.config import Rope
from tpmpi.kernels.cuda import CHUNK, FEW_ROWS, Kernels
from tpmpi.kernels.cuda_source import TILE_DIMS
from tpmpi.kernels.uploads import KEYS, TILED_FROM
from tpmpi.kv_cache import LayerCache, Ring
from tpmpi.weights import STORED_KINDS, encode


def numbers(*shape):
    return cupy.asarray(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


def products(ops):
    for kind in STORED_KINDS:
        weight = ops.new_weight(5, 64, False, kind, 'W')
        ops.fill(weight, 0, encode(numbers(5, 64).get(), kind))
        even = ops.new_weight(6, 64, False, kind, 'W')
        for rows in (1, 2, 4, 9, FEW_ROWS + 1):
            ops.linear(numbers(rows, 64), weight)
            ops.gated_linear(numbers(rows, 64), even, 'silu')
        ops.embed(np.array([1, 9]), weight, range(5))
        up, down = ops.new_experts(2, 64, 64, False, kind, 'W'), ops.new_experts(2, 32, 64, True, kind, 'W')
        choice = cupy.asarray(np.array([[0, 1]]))
        ops.experts(numbers(1, 64), choice, numbers(1, 2), up, down, 'silu')


def rows(ops):
    x, gain = numbers(2, 70), numbers(70)
    ops.rms_norm(x, gain, 1e-5)
    ops.added_norm(x, numbers(2, 70), 'layer', gain, gain, 1e-5)
    ops.layer_norm(x, gain, gain, 1e-5)
    ops.norm_heads(x, 2, 35, 'layer', gain, gain, 1e-5)
    ops.head_squares(x, (range(70), range(3, 9)))
    ops.scale_columns(x, range(70), numbers(2), gain)
    ops.softcap(x, 3.0)
    ops.activate(x, 'gelu')


def attention(ops):
    for kv in ('float32', 'bfloat16'):
        for dim, heads, rope in ((8, 1, Rope(1e4, 8)), (136, 4, None), (264, 8, Rope(1e4, 4))):
            cache, length = LayerCache(*ops.new_cache(1, 704, dim, kv)), 4 * KEYS + 140 if dim == 8 else 3
            segment = Ring(np.arange(11), 64).segment(0, length, 1)
            table = ops.rope_table(np.array([length]), np.array([length]), rope) if rope else None
            q = ops.rope_append(numbers(1, (heads + 2) * dim), heads, dim, table, cache, segment.slots)
            ops.attend(q, cache, (range(heads),), (segment,), None, 0.1, 5.0)


def tiles(_):
    for activations in ('float32', 'bfloat16'):
        for kv in ('float32', 'bfloat16'):
            for dim in TILE_DIMS if activations == 'bfloat16' else (TILE_DIMS[0],):
                ops = Kernels(cupy, activations)
                cache, segment = LayerCache(*ops.new_cache(1, 64, dim, kv)), Ring(np.arange(1), 64).segment(0, 30, TILED_FROM)
                ops.rope_append(numbers(TILED_FROM, 3 * dim), 1, dim, None, cache, segment.slots)
                ops.attend(numbers(TILED_FROM, 1, dim), cache, (range(1),), (segment,), None, 0.1)


def head(ops):
    ops.best(numbers(2, CHUNK + 9), 3, np.array([0.5, 2.0]))


if __name__ == '__main__':
    for part in (products, rows, attention, tiles, head):
        part(Kernels(cupy))
    cupy.cuda.get_current_stream().synchronize()
    print(json.dumps(sorted(cupy.fake.launches)))
