"""Steps by CUDA graphs have the bits that they have without, on the strict stand-in for CuPy, or on GPUs (-m gpu)."""

from __future__ import annotations

import shutil

import cuda_device
import numpy as np
import pytest
from ranks import environment, run_program

from tpmpi.device import Device, Gpu
from tpmpi.graphs import SUMS_ALONE, Graphs


def check(reports, models, size):
    for name, ranks in reports.items():
        config = models[name][1]
        for found in ranks:
            assert found['same'] and found['usable'], name
            assert found['sums'][0] == found['sums'][1]
            assert found['kinds'] == 0 if config.num_experts else found['kinds'] > 0
            assert set(found['parts']) <= {graphs_of_a_step(found['sums'][0] // STEPS, size)}


STEPS = 24


def graphs_of_a_step(sums, size):
    return sums + 1 if size > 1 else -(-sums // SUMS_ALONE) + 1


@pytest.mark.skipif(shutil.which('g++') is None, reason='no g++: the kernels cannot be run on the CPU')
@pytest.mark.parametrize(('size', 'collective'), [(1, 'mpi'), (2, 'staged')])
def test_steps_by_graphs_have_the_same_bits(models, size, collective):
    """Requests come and go, texts grow and go round: an argument that changes from step to step would be the old one."""
    reports = run_program('cuda_graphs.py', size, collective, *(path for path, _, _ in models.values()), timeout=600)
    check(reports, models, size)
    config, last = models['nine_heads'][1], reports['nine_heads'][0]
    assert sum(last['before'].values()) >= 8 * config.num_layers + 3  # kernels of a step
    assert last['launches'] == {'graph': graphs_of_a_step(2 * config.num_layers + 1, size)}


@pytest.mark.gpu
def test_steps_by_graphs_have_the_same_bits_on_gpus(models):
    with cuda_device.device('gpu') as cupy:
        size = min(4, cupy.cuda.runtime.getDeviceCount())
    reports = run_program('cuda_graphs.py', size, 'staged', *(path for path, _, _ in models.values()), timeout=600,
                          env=environment(TPMPI_TEST_GPU='1'))
    check(reports, models, size)


def test_the_stand_in_refuses_what_cuda_does_and_replays_old_arguments():
    with cuda_device.device('stand-in') as cupy:
        stream, x, pool = cupy.cuda.Stream(), cupy.zeros(3, np.float32), cupy.cuda.MemoryPool()
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match='StreamCaptureUnsupported'):
            cupy.cuda.get_current_stream().begin_capture()  # the null stream
        assert (x.get() == 0).all()
        with stream:
            stream.begin_capture()
            for refused in (x.get, stream.synchronize, lambda: cupy.asarray(np.ones(3)), lambda: x.set(np.ones(3, np.float32)),
                            lambda: x[x > 0], stream.record, stream.begin_capture):
                with pytest.raises((cupy.cuda.runtime.CUDARuntimeError, RuntimeError)):
                    refused()
            with pytest.raises(RuntimeError, match='memory of the common pool in a capture'):
                x + 1
            with cupy.cuda.using_allocator(pool.malloc):
                y, step = x + 1, 5
                x += step
                step = 6
            graph = stream.end_capture()
            assert not stream.is_capturing()
            for sums, before in ((5, 0), (10, 5), (15, 10)):
                graph.launch()
                assert (x.get() == sums).all() and (y.get() == before + 1).all()


class Refusing:
    """A stream that cannot be captured."""

    def begin_capture(self):
        raise RuntimeError('cudaErrorNotSupported: operation\nnot supported')

    def end_capture(self):
        raise RuntimeError('cudaErrorIllegalState: no capture')


def test_where_nothing_can_be_captured_kernels_are_launched_one_by_one(monkeypatch, caplog):
    computed = []
    monkeypatch.setattr('tpmpi.graphs.all_layers', lambda *arguments: computed.append(arguments) or 'hidden')
    with cuda_device.device('stand-in') as cupy:
        graphs = Graphs(Device('cuda:0', cupy, Gpu('a GPU', '0'), Refusing()))
        step, ops = type('Step', (), {'tokens': [1]}), type('Ops', (), {'kind_of_step': 1})
        model, comm = type('Model', (), {'config': type('Config', (), {'num_experts': 0})}), type('Comm', (), {'size': 1})
        assert [graphs(step, model, None, ops, comm) for _ in range(3)] == ['hidden'] * 3 and len(computed) == 3
    assert [r.getMessage() for r in caplog.records] == [
        'CUDA graphs cannot be captured (cudaErrorNotSupported: operation not supported): kernels are launched one by one']
