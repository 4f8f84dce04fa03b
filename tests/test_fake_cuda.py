"""The emulator of CUDA blocks and the stand-in for CuPy catch what they are there to catch, and compute as NumPy does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ranks import run_ranks

from tpmpi.kernels import reference

FOLDER = Path(__file__).parent / 'cuda'
SUM = '''
__device__ __forceinline__ float warp_sum(float x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}
extern "C" __global__ void __launch_bounds__(128) row_sums(const float* __restrict__ x, float* y, int n) {
    __shared__ float parts[4];
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[(size_t)blockIdx.x * n + i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) y[blockIdx.x] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
}
extern "C" __global__ void barriers(float* x) {
    for (int i = 0; i < 20; i++) {
        x[blockIdx.x * blockDim.x + threadIdx.x] += 1.0f;
        __syncthreads();
    }
}
extern "C" __global__ void found_memory(float* x) {
    DYNAMIC_SHARED(float, a);
    __shared__ float b[32];
    const int t = threadIdx.x;
    x[64 * blockIdx.x + t] = a[t];
    x[64 * blockIdx.x + 32 + t] = b[t];
    a[t] = b[t] = 1.0f;
}'''
MISTAKES = {
    'barrier': ('if (threadIdx.x < 64) __syncthreads();\nx[threadIdx.x] = 1.0f;\n__syncthreads();',
                '64 at __syncthreads in line 2, 64 at __syncthreads in line 4'),
    'lane': ('if (threadIdx.x % 32) x[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1.0f, 1);',
             '124 at a shuffle in line 2, 4 have ended'),
    'mask': ('x[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 0);', 'thread 16: its own lane is not in the mask'),
    'source': ('if (threadIdx.x < 8) x[threadIdx.x] = __shfl_sync(0xffu, 1.0f, 9);', 'reads a lane that is not in the mask'),
    'overrun': ('DYNAMIC_SHARED(float, row); row[threadIdx.x] = 1.0f; x[0] = row[0];', 'byte 256 of dynamic shared memory'),
    'aligned': ('*reinterpret_cast<float4*>(x + 1) = make_float4(1.0f, 2.0f, 3.0f, 4.0f);', 'misaligned address, line 2'),
    'null': ('float* none = blockDim.x ? nullptr : x; *none = 1.0f;', 'null pointer, line 2'),
    'index': ('__shared__ float row[100]; row[threadIdx.x] = 1.0f; x[0] = row[0];', 'thread 100: index 100 of an array'),
}


@pytest.fixture(scope='module')
def tools():
    """emulate, and cupy if it is the stand-in; afterwards neither can be imported any more."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition('.')[0] == 'cupy'}
    sys.path.insert(0, str(FOLDER))
    try:
        import cupy
        import emulate
        yield SimpleNamespace(cupy=cupy, emulate=emulate)
    finally:
        sys.path.remove(str(FOLDER))
        for name in [name for name in sys.modules if name.partition('.')[0] in ('cupy', 'emulate')]:
            del sys.modules[name]
        sys.modules.update(before)


@pytest.fixture
def cupy(tools):
    """The stand-in, with nothing pending and nothing counted."""
    tools.cupy.cuda.Device().synchronize()
    tools.cupy.fake.reset()
    return tools.cupy


@pytest.fixture
def emulate(tools):
    """The emulator, where there is a compiler for it."""
    if tools.emulate.compiler() is None:
        pytest.skip('no g++')
    return tools.emulate


def stream(cupy):
    """The current stream."""
    return cupy.cuda.get_current_stream()


# ---- the emulator


@pytest.mark.parametrize('flags', [(), ('-DEMULATOR_UCONTEXT',)], ids=['own switch', 'ucontext'])
@pytest.mark.parametrize('seed', [0, 7])
def test_sums_of_rows(emulate, flags, seed):
    x, y = np.random.default_rng(1).standard_normal((9, 1000)).astype(np.float32), np.zeros(9, np.float32)
    emulate.compile_source(SUM, flags=flags).launch('row_sums', (9,), (128,), (x, y, np.int32(1000)), seed=seed)
    np.testing.assert_allclose(y, x.sum(axis=1, dtype=np.float64), rtol=0, atol=1e-4)


def test_many_barriers(emulate):
    library, x = emulate.compile_source(SUM), np.zeros(64 * 128, np.float32)
    library.launch('barriers', (64,), (128,), (x,))
    assert (x == 20).all()


def test_mistakes_in_kernels_are_reported(emulate):
    library = emulate.compile_source('\n'.join(
        f'#line 1\nextern "C" __global__ void {name}(float* x) {{\n{body} }}' for name, (body, _) in MISTAKES.items()))
    for name, (_, message) in MISTAKES.items():
        with pytest.raises(emulate.KernelError, match=message) as error:
            library.launch(name, (2,), (128,), (np.zeros(128, np.float32),), 256)
        assert f'kernel {name}, block (0, 0, 0)' in str(error.value)


def test_a_missing_barrier_is_a_race(emulate):
    try:
        without, whole = (emulate.run_sanitized(FOLDER / 'programs/turn_rows.py', how) for how in ('without', 'with'))
    except emulate.NoSanitizer as e:
        pytest.skip(f'no thread sanitizer: {e}')
    assert whole.returncode == 0, whole.stderr
    assert without.returncode == 66 and 'data race' in without.stderr, without.stderr


def test_arguments_and_sizes_are_checked(emulate):
    library = emulate.compile_source(SUM)
    x, y = np.zeros((2, 4), np.float32), np.zeros(2, np.float32)
    for args in [(x, y), (x, y, 4), (x, y, np.int64(4)), (x.astype(np.float64), y, np.int32(4)), (x, 1 << 40, np.int32(4))]:
        with pytest.raises(TypeError, match='kernel row_sums'):
            library.launch('row_sums', (2,), (128,), args)
    for grid, block, shared in [((0,), (32,), 0), ((1, 65536), (32,), 0), ((1,), (1025,), 0), ((1,), (64, 32), 0),
                                ((1,), (32,), (48 << 10) + 1)]:
        with pytest.raises(emulate.LaunchError, match='kernel barriers'):
            library.launch('barriers', grid, block, (x,), shared)
    with pytest.raises(emulate.CompileError, match="was not declared|undeclared"):
        emulate.compile_source('extern "C" __global__ void f(float* x) { x[0] = missing; }')
    with pytest.raises(emulate.CompileError, match='kernel f, parameter .half x'):
        emulate.compile_source('extern "C" __global__ void f(half x) {}')


def test_new_shared_memory_is_not_zero(emulate):
    x = np.zeros(128, np.float32)
    emulate.compile_source(SUM).launch('found_memory', (2,), (32,), (x,), 128)
    assert np.isnan(x).all()


# ---- the stand-in: what it catches


def test_results_are_poison_until_the_stream_runs(cupy):
    x = cupy.asarray(np.arange(4, dtype=np.float32))
    early, integers = (x + 1).get(blocking=False), cupy.zeros(3, np.int64)
    assert np.isnan(early).all() and (integers.host > 1 << 60).all()
    stream(cupy).synchronize()
    assert early.tolist() == [1, 2, 3, 4] and integers.host.tolist() == [0, 0, 0]
    assert cupy.fake.synchronizations == 1 and cupy.fake.device_to_host.bytes == 16


def test_memory_is_given_away_only_when_complete(cupy, capsys):
    x = cupy.ones(4, np.float32)
    with pytest.raises(cupy.PendingWork, match='work pending: synchronize first'):
        _ = x.__cuda_array_interface__
    assert 'synchronize first' in capsys.readouterr().err
    stream(cupy).synchronize()
    assert x.__cuda_array_interface__['data'] == (x.data.ptr, False) and x.__cuda_array_interface__['version'] == 3
    with cupy.cuda.Stream(non_blocking=True) as side:
        x += 1
    stream(cupy).synchronize()  # of another stream
    with pytest.raises(cupy.PendingWork):
        _ = x.__cuda_array_interface__
    side.synchronize()
    assert x.get().tolist() == [2, 2, 2, 2]


def test_direct_sums_over_two_ranks():
    done = run_ranks(2, FOLDER / 'programs/direct_sum.py')
    assert done.returncode == 0, done.stderr
    expected = [2 * 10 * i + 1.5 for i in range(5)]
    report = json.loads(done.stdout.splitlines()[-1])
    assert [values for _, values in report] == [expected, expected]
    assert all(refused in ('PendingWork', 'TypeError') for refused, _ in report) and done.stderr.count('synchronize first') >= 2


def test_a_staging_buffer_that_is_used_too_early(cupy):
    memory = cupy.cuda.alloc_pinned_memory(16)
    buffer = np.frombuffer(memory, np.float32, 4)
    for wait, expected in [(False, 2), (True, 1)]:
        x = cupy.zeros(4, np.float32)
        buffer[:] = 1
        x.set(buffer)
        if wait:
            stream(cupy).synchronize()
        buffer[:] = 2
        assert (x.get() == expected).all()
    buffer[:] = 5
    x.set(buffer)
    (x + 1).get(out=buffer, blocking=False)  # in the order of the stream: x is set before
    stream(cupy).synchronize()
    assert (x.get() == 5).all() and (buffer == 6).all()
    pageable = np.ones(4, np.float32)
    x.set(pageable)
    pageable[:] = 3
    assert (x.get() == 1).all()


def test_numpy_is_not_mixed_in(cupy):
    x, host = cupy.ones((2, 2), np.float32), np.ones((2, 2), np.float32)
    for mix in [lambda: x + host, lambda: host * x, lambda: x == host, lambda: cupy.exp(host), lambda: np.asarray(x),
                lambda: host.__iadd__(x), lambda: x.__iadd__(host), lambda: x.__setitem__(0, host[0]), lambda: x[np.array([0])],
                lambda: cupy.concatenate([x, host]), lambda: np.concatenate([x, host]), lambda: x * np.float64(2)]:
        with pytest.raises(TypeError):
            mix()
    for hidden in [lambda: bool(x[0, 0]), lambda: float(x[0, 0]), lambda: int(x[0, 0]), lambda: list(x), lambda: [0, 1][x[0, 0]]]:
        with pytest.raises(cupy.HiddenSynchronization, match='hidden device sync'):
            hidden()
    assert len(x) == 2 and x[0, 0].item() == 1 and cupy.flatnonzero(x > 0).shape == (4,)
    assert cupy.fake.hidden_synchronizations == {'item': 1, 'flatnonzero': 1}


def test_shapes_are_checked_at_once(cupy):
    x = cupy.ones((2, 3), np.float32)
    for wrong in [lambda: x + cupy.ones(2, np.float32), lambda: x @ x, lambda: cupy.exp(x, out=cupy.empty(3, np.float32)),
                  lambda: x.__setitem__(0, cupy.ones(2, np.float32)), lambda: x.set(np.ones(6, np.float32)),
                  lambda: x.get(out=np.empty((2, 3)))]:
        with pytest.raises(ValueError):
            wrong()


# ---- the stand-in: kernels and devices


def test_a_kernel_is_queued_and_counted(cupy, emulate):
    module = cupy.RawModule(code=SUM, options=('-std=c++17',), backend='nvrtc')
    sums, x, y = module.get_function('row_sums'), cupy.ones((3, 8), np.float32), cupy.empty(3, np.float32)
    sums((3,), (128,), (x, y, np.int32(8)))
    assert np.isnan(y.host).all() and cupy.fake.launches == {'row_sums': 1}
    assert y.get().tolist() == [8, 8, 8]
    for args in [(x, y, 8), (x, np.ones(3, np.float32), np.int32(8)), (x.view(np.int32), y, np.int32(8))]:
        with pytest.raises(TypeError, match='kernel row_sums'):
            sums((3,), (128,), args)
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match='max_dynamic_shared_size_bytes'):
        sums((3,), (128,), (x, y, np.int32(8)), shared_mem=60 << 10)
    sums.max_dynamic_shared_size_bytes = 60 << 10
    sums((3,), (128,), (x, y, np.int32(8)), shared_mem=60 << 10)
    sums((5,), (128,), (cupy.ones((5, 8), np.float32), y, np.int32(8)))
    with pytest.raises(RuntimeError, match='kernel row_sums wrote behind an array of 12 bytes'):
        stream(cupy).synchronize()


def test_devices_come_from_the_environment(cupy, monkeypatch):
    runtime = cupy.cuda.runtime
    monkeypatch.setenv('FAKE_CUDA_DEVICES', '4')
    monkeypatch.setenv('FAKE_CUDA_FREE_BYTES', str(1 << 20))
    assert runtime.getDeviceCount() == 4 and runtime.deviceGetPCIBusId(3) == '0000:04:00.0'
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2')
    assert runtime.getDeviceCount() == 1 and runtime.deviceGetPCIBusId(0) == '0000:03:00.0'
    with pytest.raises(runtime.CUDARuntimeError, match='cudaErrorInvalidDevice'):
        cupy.cuda.Device(1).use()
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
        cupy.empty(1 << 20, np.float32)
    before = runtime.memGetInfo()[0]
    x = cupy.empty(1024, np.float32)
    assert before - runtime.memGetInfo()[0] == x.nbytes
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    with pytest.raises(runtime.CUDARuntimeError, match='cudaErrorNoDevice'):
        runtime.getDeviceCount()


# ---- the stand-in: the numbers


def test_operations_of_the_reference_kernels(cupy):
    random = np.random.default_rng(2)
    x, gain = (random.standard_normal(shape).astype(np.float32) for shape in [(5, 64), (64,)])
    logits = np.round(random.standard_normal(50), 1).astype(np.float32)  # with equal ones

    def all_of(xp):
        a, g, last = xp.asarray(x), xp.asarray(gain), xp.asarray(logits)
        heads = xp.asarray(x).copy()
        reference.norm_heads(heads, 3, 16, 'layer', g[:48], None, 1e-5)
        reference.scale_columns(heads, range(4, 8), a[:, 0], g[:4])
        choice, shares = reference.route(a, 3, True)
        rows = xp.flatnonzero((a[:, :8] > 1).any(axis=1))
        chosen = xp.zeros((5, 64), np.float32)
        chosen[xp.arange(5)[:, None], choice] = 1
        return [reference.rms_norm(a, g, 1e-5), reference.layer_norm(a, g, g, 1e-5), heads, choice, shares, rows, chosen,
                *(reference.activate(a, kind) for kind in ('silu', 'relu', 'gelu', 'gelu_tanh')), reference.log_sum_exp(a),
                reference.gated_activation(a, 'silu'), reference.head_squares(a, (range(3), range(3, 9))),
                *reference.top_k(last, 7), *reference.top_k(last, 1), *reference.top_k(last, 50), a[rows], a[:, [3, 1]]]

    for device, host in zip(all_of(cupy), all_of(np), strict=True):
        assert isinstance(device, cupy.ndarray) and device.dtype == host.dtype
        assert np.array_equal(device.get(), host)
