"""Opening a device: whose GPU is whose, what is said where there is none, what errors of a GPU mean."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import cuda_device
import gpu_driver
import numpy as np
import pytest
from gpu_driver import CUDADriverError, CUDARuntimeError, OutOfMemoryError, gpu
from hypothesis import given
from hypothesis import strategies as st
from ranks import PROGRAMS, run_ranks

from tpmpi import api
from tpmpi.checkpoint import CheckpointReader
from tpmpi.config import RunConfig
from tpmpi.device import (
    DeviceError,
    Gpu,
    check_memory,
    choose_gpu,
    device_lost,
    driver_present,
    host,
    in_words,
    open_gpu,
    ranks_on,
    table,
    visible_gpus,
)
from tpmpi.sharding import shard

CARDS = [Gpu('Fake GPU', f'0000:{number:02X}:00.0', f'{number}') for number in range(8)]


# ---- whose GPU is whose


@pytest.mark.parametrize('on_node, expected', [
    ([CARDS[:4]] * 4, [0, 1, 2, 3]),  # all see all
    ([CARDS[:4]] * 2, [0, 1]),
    ([CARDS[i:i + 1] for i in range(4)], [0, 0, 0, 0]),  # the launcher gave each its own
    ([CARDS[:2], CARDS[:2], CARDS[2:4], CARDS[2:4]], [0, 1, 0, 1]),  # and two to each pair
    ([CARDS[:2], CARDS[2:4]], [0, 0]),
    ([[Gpu('MIG', 'same', 'one')], [Gpu('MIG', 'same', 'two')]], [0, 0])])
def test_each_rank_takes_a_gpu_of_its_own(on_node, expected):
    assert [choose_gpu(on_node, rank) for rank in range(len(on_node))] == expected


@given(st.lists(st.lists(st.sampled_from(CARDS), min_size=1, unique=True), min_size=1, max_size=6))
def test_no_two_ranks_take_one_gpu_unless_they_share(on_node):
    ranks = range(len(on_node))
    shared = [on_node[rank][choose_gpu(on_node, rank, share=True)] for rank in ranks]
    try:
        chosen = [on_node[rank][choose_gpu(on_node, rank)] for rank in ranks]
    except DeviceError as e:
        assert 'start one rank for each GPU, or give --share-gpu' in str(e)
        assert len(set(shared)) < len(ranks)
    else:
        assert len(set(chosen)) == len(ranks) and shared == chosen


@pytest.mark.parametrize('one', [CARDS[:1], [Gpu('MIG', 'same', 'one')]])
def test_two_ranks_on_one_gpu_are_refused_or_share(one):
    assert choose_gpu([one, one], 0) == 0
    with pytest.raises(DeviceError, match='2 ranks on this node see 1 GPU together, and none is left for rank 1'):
        choose_gpu([one, one], 1)
    assert choose_gpu([one, one], 1, share=True) == 0
    assert [choose_gpu([CARDS[:2]] * 5, rank, share=True) for rank in range(5)] == [0, 1, 0, 1, 0]


def test_ranks_of_different_containers_on_one_gpu_are_refused():
    placed = [('n1', CARDS[0]), ('n1', CARDS[1]), ('n2', CARDS[0])]
    assert [ranks_on(placed, rank) for rank in range(3)] == [1, 1, 1]
    placed.append(('n1', CARDS[1]))
    with pytest.raises(DeviceError, match='ranks 1 and 3 on n1 both have GPU 0000:01:00.0; .* --share-gpu'):
        ranks_on(placed, 0)
    assert [ranks_on(placed, rank, share=True) for rank in range(4)] == [1, 2, 1, 2]


def test_the_table_of_ranks_is_short():
    assert table([('n1', CARDS[0]), ('n2', CARDS[3])]) == [
        'rank 0: n1, Fake GPU, PCI 0000:00:00.0', 'rank 1: n2, Fake GPU, PCI 0000:03:00.0']
    lines = table([(f'n{i // 4}', CARDS[i % 4]) for i in range(32)])
    assert len(lines) == 8
    assert lines[1] == 'ranks 4-7: n1, Fake GPU, PCI 0000:00:00.0 0000:01:00.0 0000:02:00.0 0000:03:00.0'
    assert table([(f'n{i % 17}', CARDS[0]) for i in range(34)])[0] == 'ranks 0 17: n0, Fake GPU, PCI 0000:00:00.0 0000:00:00.0'
    lines = table([(f'n{i}', CARDS[0]) for i in range(500)])
    assert len(lines) == 16 and lines[-1] == 'and 485 more hosts'


# ---- opening


def test_a_gpu_is_opened(monkeypatch):
    cupy = gpu_driver.install(monkeypatch, gpu_driver.make([gpu(0), gpu(1)], free=5))
    gpus = visible_gpus({})
    assert [g.identity for g in gpus] == [('0000:00:00.0', '10' * 16), ('0000:01:00.0', '11' * 16)]
    device = open_gpu(gpus, 1)
    assert device.name == 'cuda:1 Fake GPU' and device.gpu == gpus[1] and cupy.cuda.used == [1] and device.xp is cupy
    assert device.free_bytes() == 5
    device.synchronize()
    assert device.stream.waits == 1
    assert type(device.to_host(cupy.ones(2, np.float32))) is np.ndarray


def test_all_models_of_a_rank_have_one_stream_which_graphs_can_be_captured_on():
    with cuda_device.device('stand-in') as cupy:
        first, second = (open_gpu(visible_gpus({}), 0) for _ in range(2))
        assert first.stream is second.stream is cupy.cuda.get_current_stream() and first.stream.ptr != 0
        first.stream.begin_capture()
        first.stream.end_capture()


def test_the_cpu_has_nothing_to_wait_for():
    device, x = host(), np.ones(2)
    assert device.name == 'cpu' and device.xp is np and device.synchronize is None and device.free_bytes() is None
    assert device.to_host(x) is x


@pytest.mark.parametrize('files, present', [
    ([], False), (['/dev/nvidiactl'], True), (['/dev/dxg'], True), (['/dev/nvhost-gpu'], True), (['/dev/null'], False)])
def test_a_driver_is_seen_by_its_files(files, present):
    assert driver_present(lambda path: path in files) is present


@pytest.mark.parametrize('value', ['', ' ', '-1', '-1,0', 'NoDevFiles'])
def test_hidden_gpus_are_told_without_cupy(monkeypatch, value):
    monkeypatch.setitem(sys.modules, 'cupy', None)
    with pytest.raises(DeviceError, match=f'CUDA_VISIBLE_DEVICES is {value!r}, which hides every GPU; unset it'):
        visible_gpus({'CUDA_VISIBLE_DEVICES': value})


@pytest.mark.parametrize('make, said', [
    ({'error': gpu_driver.OLD_DRIVER, 'driver': 0}, 'no NVIDIA driver is loaded on this node; run where nvidia-smi works'),
    ({'error': gpu_driver.OLD_DRIVER, 'driver': 11080},
     r'the driver is for CUDA 11\.8 and older, CuPy 14\.2\.0 for CUDA 12\.9; update the driver, or pip install'),
    ({'error': CUDARuntimeError('cudaErrorNoDevice: no CUDA-capable device is detected')}, 'the driver shows no GPU; check'),
    ({'gpus': []}, 'the driver shows no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu'),
    ({'error': CUDARuntimeError('cudaErrorUnknown: unknown\nerror')}, r'the GPU failed \(cudaErrorUnknown: unknown error\)'),
    ({'error': RuntimeError('odd')}, r'no usable GPU \(odd\); check nvidia-smi, or use --device cpu')])
def test_a_driver_that_cannot_is_one_line(monkeypatch, make, said):
    gpu_driver.install(monkeypatch, gpu_driver.make(**make))
    with pytest.raises(DeviceError, match=f'^{said}') as e:
        visible_gpus({'CUDA_VISIBLE_DEVICES': '0'})
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('error, said', [
    (CUDARuntimeError('cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy or unavailable'),
     'the GPU is busy or in exclusive mode'),
    (CUDADriverError('CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available for execution on the device'),
     'the GPU is of a kind that this CuPy was not built for'),
    (RuntimeError('Failure finding "libnvrtc.so.13 or libnvrtc.so.12": No such file: libnvrtc.so.13\n'),  # CuPy 14
     r"CuPy does not find libnvrtc\.so\.13 or libnvrtc\.so\.12: .* another CUDA than this node's; load the CUDA mod"),
    (ImportError('libcublas.so.12: cannot open shared object file'), r'CuPy does not find libcublas\.so\.12')])
def test_what_the_first_work_lacks_is_one_line(monkeypatch, error, said):
    gpu_driver.install(monkeypatch, gpu_driver.make([gpu(0)], work_error=error))
    with pytest.raises(DeviceError, match=f'^{said}') as e:
        open_gpu(visible_gpus({}), 0)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('source, said', [
    (None, r'CuPy is not installed; pip install "tpmpi\[cuda12\]" or "tpmpi\[cuda13\]"'),
    ('raise ImportError("' + '=' * 64 + r'\nFailed to import CuPy.\n\nOriginal error:\n  ImportError: libcudart.so.11.0: cannot '
     r'open shared object file")', r'CuPy does not find libcudart\.so\.11\.0: '),  # as CuPy 13 says it
    ('raise ImportError("libcuda.so.1: cannot open shared object file")', 'no NVIDIA driver is installed on this node'),
    ('import no_such_module_of_cupy', r"CuPy cannot be imported \(No module named 'no_such_module_of_cupy'\)"),
    ('raise RuntimeError("x" * 900)', r'CuPy cannot be imported \(… x{300}\)')])
def test_a_cupy_that_cannot_be_imported_is_one_line(monkeypatch, tmp_path, source, said):
    if source is None:
        monkeypatch.setitem(sys.modules, 'cupy', None)
    else:
        (tmp_path / 'cupy.py').write_text(source)
        monkeypatch.delitem(sys.modules, 'cupy', raising=False)
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DeviceError, match=f'^{said}') as e:
        visible_gpus({})
    assert '\n' not in str(e.value)


# ---- memory, and errors at work


def test_too_little_memory_is_told_in_numbers():
    parts = {'weights': 3_000_000_000, 'cache': 500_000_000}
    check_memory(3_500_000_000, 3_500_000_000, 'cuda:0', parts)
    with pytest.raises(DeviceError, match=r'^cuda:0: 3\.50 GB are needed \(weights 3\.00, cache 0\.50\) and 3\.25 GB are free; '
                                          'use more ranks, --weights int8, or a smaller --kv-memory, --context or --chunk$'):
        check_memory(3_500_000_000, 3_250_000_000, 'cuda:0', parts)


@pytest.mark.parametrize('error, said', [
    (CUDARuntimeError('cudaErrorECCUncorrectable: uncorrectable ECC error encountered'), 'has an error of its memory'),
    (CUDADriverError('CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable ECC error encountered'), 'has an error of its memory'),
    (CUDARuntimeError('cudaErrorIllegalAddress: an illegal memory access was encountered'), 'was asked for memory that is not'),
    (CUDADriverError('CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered'), 'was asked for memory that is not'),
    (CUDARuntimeError('cudaErrorMemoryAllocation: out of memory'), 'is out of memory'),
    (CUDADriverError('CUDA_ERROR_OUT_OF_MEMORY: out of memory'), 'is out of memory'),
    (OutOfMemoryError('Out of memory allocating 512 bytes'), 'is out of memory'),
    (CUDARuntimeError('cudaErrorLaunchFailure: unspecified launch failure'), 'failed in a kernel'),
    (CUDADriverError('CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure'), 'failed in a kernel'),
    (CUDARuntimeError('cudaErrorDevicesUnavailable: busy'), 'is busy'),
    (CUDADriverError('CUDA_ERROR_DEVICE_UNAVAILABLE: busy'), 'is busy'),
    (CUDARuntimeError('cudaErrorNewInCuda14: never seen'), 'failed (cudaErrorNewInCuda14: never seen)')])
def test_an_error_of_the_gpu_is_told_in_words(error, said):
    line = device_lost(error)
    assert line.startswith(f'the GPU {said}') and str(error) in line and '; ' in line
    told = in_words(error)
    assert type(told) is DeviceError and str(told) == line and told.__cause__ is error


@pytest.mark.parametrize('error', [KeyError('cudaErrorIllegalAddress'), RuntimeError('cudaErrorIllegalAddress: x'), MemoryError(),
                                   DeviceError('told already'), KeyboardInterrupt()])
def test_other_errors_stay_what_they_are(error):
    assert device_lost(error) is None and in_words(error) is error


# ---- all ranks alike


def opened(*gpus, **options):
    """What api.load makes of it on ranks that see these GPUs: (device, ranks on it) or the error; and the log."""
    done = run_ranks(len(gpus), PROGRAMS / 'open_device.py', json.dumps(options), *map(json.dumps, gpus))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return [f if isinstance(f, str) else f[:2] for f in found], done.stderr.splitlines()


def test_ranks_open_their_gpus_and_the_table_is_logged_once():
    found, log = opened([0, 1], [0, 1])
    assert found == [['cuda:0 Fake GPU', 1], ['cuda:1 Fake GPU', 1]]
    assert [line.partition(': ')[0] for line in log] == ['rank 0', 'rank 1', 'all-reduce of GPU memory']  # and no more
    assert '0000:00:00.0' in log[0] and '0000:01:00.0' in log[1]


def test_ranks_share_a_gpu_only_where_they_are_told_to():
    refused, _ = opened([3], [3])
    assert refused[0] == refused[1] and 'device cuda: 2 ranks on this node see 1 GPU together' in refused[0]
    assert opened([3], [3], share_gpu=True)[0] == [['cuda:0 Fake GPU', 2]] * 2


def test_auto_computes_on_the_cpu_everywhere_where_one_rank_has_no_gpu():
    found, log = opened([0], [], device='auto')
    assert found == [['cpu', 1]] * 2
    assert log == ['device auto: rank 1: the driver shows no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or '
                   'use --device cpu; all ranks compute on the CPU']
    refused, _ = opened([0], [])
    assert refused[0] == refused[1] and 'device cuda: the driver shows no GPU' in refused[0]


def test_a_model_that_does_not_fit_is_refused_before_a_weight_is_read(monkeypatch, nine_heads):
    gpu_driver.install(monkeypatch, gpu_driver.make([gpu(0)], free=100_000_000))
    with CheckpointReader(nine_heads) as reader:
        part, run = shard(reader.config, 0, 1), RunConfig(device='cuda')
        device = open_gpu(visible_gpus({}), 0)
        with pytest.raises(DeviceError, match=r'^cuda:0 Fake GPU: 0\.41 GB are needed .*weights 0\.00.* and 0\.10 GB are free'):
            api._check_memory(device, 1, reader, part, run)
        gpu_driver.install(monkeypatch, gpu_driver.make([gpu(0)], free=600_000_000))
        device = open_gpu(visible_gpus({}), 0)
        api._check_memory(device, 1, reader, part, run)
        with pytest.raises(DeviceError, match=r'0\.30 GB are free'):  # two ranks share it
            api._check_memory(device, 2, reader, part, run)
        with pytest.raises(DeviceError, match=r'graphs 0\.\d+\) and 0\.30 GB are free'):  # which keep memory of their own
            api._check_memory(device, 2, reader, part, replace(run, cuda_graphs='auto'))
    api._check_memory(host(), 1, None, None, run)


@pytest.mark.parametrize(('asked', 'sharers', 'blocks'), [
    (None, 1, 8), (None, 2, 4), ('25%', 1, 4), ('16K', 1, 2), ('1G', 1, None), ('1K', 1, None)])
def test_the_cache_of_a_batch_takes_its_part_of_the_gpu_and_not_of_the_node(monkeypatch, nine_heads, asked, sharers, blocks):
    """128 KiB are free, a block takes 8 KiB, and half of what is free is taken where nothing is said."""
    from tpmpi import batch
    device = SimpleNamespace(gpu=SimpleNamespace(identity='a GPU'), free_bytes=lambda: 128 << 10)
    model = SimpleNamespace(shard=None, groups=())
    engine = SimpleNamespace(run=RunConfig(), model=model, device=device, ops=None)
    config = SimpleNamespace(max_positions=1 << 20)
    comm = SimpleNamespace(exchange=lambda value: [value], exchange_on_node=lambda value: (0, [value] * sharers))
    session = SimpleNamespace(comm=comm, local_size=8, agreed=lambda function, *a: function(*a))
    options = SimpleNamespace(kv_memory=asked, context=None, max_sequences=4)
    monkeypatch.setattr('tpmpi.kv_cache.block_bytes', lambda *a: 8 << 10)
    monkeypatch.setattr('tpmpi.kv_cache.rings_blocks', lambda *a: 1000)
    if blocks is None:
        with pytest.raises(ValueError, match='--kv-memory'):
            batch.cache_blocks(session, options, SimpleNamespace(engine=engine, config=config), comm)
    else:
        assert batch.cache_blocks(session, options, SimpleNamespace(engine=engine, config=config), comm) == blocks
