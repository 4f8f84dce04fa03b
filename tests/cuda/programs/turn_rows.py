"""A kernel that turns rows around in shared memory, under the thread sanitizer.  argument: with or without its barrier."""

import sys

import emulate
import numpy as np

barrier = {'with': '__syncthreads();', 'without': ''}[sys.argv[1]]
library = emulate.compile_source(f'''
extern "C" __global__ void turn(const float* x, float* y) {{
    DYNAMIC_SHARED(float, row);
    const int t = threadIdx.x, at = blockIdx.x * blockDim.x + t;
    row[t] = x[at] + __shfl_xor_sync(0xffffffffu, x[at], 1);
    {barrier}
    y[at] = row[blockDim.x - 1 - t];
}}''', sanitize=True)
x, y = np.arange(128, dtype=np.float32), np.zeros(128, np.float32)
library.launch('turn', (2,), (64,), (x, y), 4 * 64)
if sys.argv[1] == 'with':
    pairs = x.reshape(2, 32, 2).sum(axis=-1).repeat(2, axis=-1)
    assert np.array_equal(y.reshape(2, 64), pairs[:, ::-1])
