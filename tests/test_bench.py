"""The measuring command: what it computes and reports, never how fast."""

from __future__ import annotations

import json
import os
import re
import shutil
from time import perf_counter
from types import SimpleNamespace

import cuda_device
import numpy as np
import pytest
from ranks import environment, run_ranks
from test_run import STANDARD_OUTPUTS, own_errors, run_into

from tpmpi import bench
from tpmpi.config import ConfigError
from tpmpi.device import Device, Gpu

BRIEF = 'import sys; from tpmpi import bench; bench.STREAM_TOTAL = 1 << 20; sys.exit(bench.main(sys.argv[1:]))'
OPTIONS = ('--prompt-tokens', 9, '--new-tokens', 3, '--batch', 4, '--repeat', 2)
TOKENS = '''
import json, sys
from tpmpi import api, bench
llm = api.load(None if sys.argv[1] == 'bundled' else sys.argv[1], chunk=5, block=4, threads=1)
batch = bench.Batch(llm.engine, 4, 13, 6)
rounds = [bench.run_round(llm.engine, batch) for _ in range(2)]
alone = [llm.generate(prompt.tolist(), max_new_tokens=7, ignore_eos=True).tokens for prompt in batch.prompts]
if llm.rank == 0:
    print(json.dumps([r.tokens for r in rounds] + [alone]))
'''


@pytest.mark.parametrize('size', [1, 2, 3])
def test_json_holds_every_figure(size):
    done = run_ranks(size, '-c', BRIEF, *OPTIONS, '--kv', 'bfloat16', '--chunk', 4, '--threads', 1, '--device', 'cpu',
                     '--kernels', 'reference', '--weights', 'float32', '--json')
    assert done.returncode == 0 and done.stderr == '', done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    rates = ('prefill_tokens_per_s', 'decode_tokens_per_s', 'weights_gb_per_s', 'stream_gb_per_s', 'bandwidth_fraction',
             'allreduce_us_per_token', 'load_seconds', 'weights_mb')
    assert all(isinstance(found[name], float) and found[name] > 0 for name in rates)
    for name in ('peak_rss_mb', 'weights_gb_per_s_by_rank'):
        assert len(found[name]) == size and all(isinstance(value, float) and value >= 0 for value in found[name])
    assert all(10 < memory < 2000 for memory in found['peak_rss_mb'])
    expected = {
        'ranks': size, 'threads': 1, 'batch': 4, 'prompt_tokens': 9, 'new_tokens': 3, 'chunk': 4, 'kv': 'bfloat16',
        'device': 'cpu', 'kernels': 'reference', 'activations': 'float32', 'weights': 'float32', 'model': 'bundled model',
        'allreduce_bytes_per_token': 4 * 160 * (1 + 2 * 5)}
    assert {name: found[name] for name in expected} == expected
    for name in ('machine', 'tpmpi'):
        assert isinstance(found[name], str) and found[name]


@pytest.mark.skipif(shutil.which('g++') is None, reason='no g++: the kernels cannot be run on the CPU')
@pytest.mark.parametrize(('size', 'graphs', 'launches'), [(1, 'off', 8 * 5 + 3), (2, 'auto', 2 * 5 + 2)])
def test_of_gpus_it_says_what_their_memory_copies_and_what_a_token_takes(size, graphs, launches):
    """On the stand-in for CuPy, whose speed means nothing: which figures there are, and that they fit each other."""
    env = environment(FAKE_CUDA_DEVICES='2')
    env['PYTHONPATH'] = os.pathsep.join([str(cuda_device.STAND_IN), env['PYTHONPATH']])
    done = run_ranks(size, '-c', BRIEF, *OPTIONS, '--repeat', 1, '--device', 'cuda', '--collective', 'staged', '--cuda-graphs',
                     graphs, '--json', env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    copies, rate = found['copy_gb_per_s_by_rank'], found['stream_gb_per_s']
    assert len(copies) == size and all(copy > 0 for copy in copies) and 0 < rate <= sum(copies) * 1.001
    assert found['bandwidth_fraction'] == pytest.approx(found['weights_gb_per_s'] / rate, rel=0.05, abs=1e-4)
    assert found['launches_per_token'] * 4 == launches + 3  # the layers' kernels, or graphs behind sums, and the head's
    assert (found['collective'], found['allreduce_us_alone'] > 0) == (('staged', True) if size > 1 else ('none', False))
    assert found['device'].startswith('cuda:0') and found['kernels'] == 'cuda'
    lines = bench.table(found).splitlines()
    assert lines[-1].startswith('launches') and 'copies, read and written' in lines[-4] and 'Fake GPU 0' in lines[0]


def test_times_of_copies_are_those_between_their_events():
    with cuda_device.device('stand-in') as cupy:
        device = Device('cuda:0', cupy, Gpu('fake', '0'), cupy.cuda.get_current_stream())
        source, target = bench.copy_buffers(device, 100, 1 << 10)
        assert source.nbytes == 1 << 20 == target.nbytes
        start = perf_counter()
        times = bench.copy_seconds(SimpleNamespace(exchange=lambda value: [value]), device, source, target)
        assert len(times) == bench.STREAM_PASSES and all(0 < t for t in times) and sum(times) < perf_counter() - start
        assert (target.get() == 1).all()
        event = cupy.cuda.Event()
        event.record()
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match='cudaErrorNotReady'):
            cupy.cuda.get_elapsed_time(event, event)


@pytest.mark.parametrize(('model', 'size'), [('bundled', 1), ('bundled', 2), ('bundled', 3), ('nine_heads', 2)])
def test_a_batch_gives_each_sequence_the_tokens_that_it_has_alone(models, model, size):
    done = run_ranks(size, '-c', TOKENS, model if model == 'bundled' else models[model][0])
    assert done.returncode == 0, done.stderr
    first, second, alone = json.loads(done.stdout)
    assert first == second == alone and len(alone) == 4 and all(len(tokens) == 7 for tokens in alone)


def test_the_table_is_short_and_for_rank_0_alone():
    done = run_ranks(2, '-c', BRIEF, *OPTIONS)
    assert done.returncode == 0, done.stderr
    names = ['machine', 'run', 'prefill', 'decode', 'weights read', 'memory allows', 'all-reduce', 'peak memory']
    assert [re.split(' {2,}', line)[0].strip() for line in done.stdout.splitlines()] == names
    assert '(4 sequences, 3 steps at depth 9)' in done.stdout


@pytest.mark.parametrize(('arguments', 'message'), [
    (['--prompt-tokens', 0], '--prompt-tokens is 0; expected at least 1'), (['--new-tokens', -1], '--new-tokens is -1'),
    (['--batch', 0], '--batch is 0'), (['--repeat', 0], '--repeat is 0'), (['--threads', 0], 'threads is 0; expected'),
    (['--threads', 20000], 'threads is 20000; expected a whole number from 1 to 1024'),
    (['--chunk', 0], 'chunk is 0'), (['--weights', 'int3'], 'invalid choice'), (['--batch', 'many'], 'invalid int'),
    (['--prompt-tokens', 500, '--new-tokens', 13], 'are 513 positions; the model was trained for 512'),
    (['--new-tokens', 512], 'are 513 positions; the model was trained for 512'),
    (['--model', 'nowhere.h5'], r'nowhere\.h5: No such file'), (['--unknown'], 'unrecognized'),
])
def test_bad_input_gets_one_line(arguments, message):
    done = run_ranks(2, '-m', 'tpmpi.bench', *arguments, timeout=120)
    errors = own_errors(done.stderr)
    assert done.returncode != 0 and done.stdout == ''
    assert len(errors) == 1 and re.search(message, errors[0]), done.stderr


@pytest.mark.parametrize('output', STANDARD_OUTPUTS)
def test_a_standard_output_that_takes_nothing_is_one_line_at_most(output):
    done = run_into(output, '-c', BRIEF, *OPTIONS, '--repeat', 1, '--json')
    assert own_errors(done.stderr) == STANDARD_OUTPUTS[output]
    assert done.returncode == bool(STANDARD_OUTPUTS[output])


def test_without_a_length_the_prompt_is_what_fits():
    assert bench.prompt_length(None, 64, 8192) == 512 and bench.prompt_length(None, 64, 512) == 448
    assert bench.prompt_length(448, 64, 512) == 448
    with pytest.raises(ConfigError, match='449 and --new-tokens 64 are 513'):
        bench.prompt_length(449, 64, 512)


def test_what_is_streamed_is_as_large_as_the_weights_within_limits(monkeypatch):
    monkeypatch.setattr(bench, 'STREAM_TOTAL', 1 << 16)
    monkeypatch.setattr(bench, 'STREAM_MOST', 1 << 18)
    assert [bench.stream_buffer(weights, 4).nbytes for weights in (100, 1 << 17, 1 << 20)] == [1 << 14, 1 << 17, 1 << 18]
    buffer = bench.stream_buffer(100, 1)
    assert buffer.dtype == np.float32 and buffer.all()
    for threads in (1, 3):
        bench.read_all(buffer, threads)
