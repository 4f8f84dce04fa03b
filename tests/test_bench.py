"""The measuring command: what it computes and reports, never how fast."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from ranks import run_ranks
from test_run import own_errors

from tpmpi import bench
from tpmpi.config import ConfigError

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
    (['--batch', 0], '--batch is 0'), (['--repeat', 0], '--repeat is 0'), (['--threads', 0], '--threads is 0'),
    (['--chunk', 0], 'chunk is 0'), (['--weights', 'int3'], 'invalid choice'), (['--batch', 'many'], 'invalid int'),
    (['--prompt-tokens', 500, '--new-tokens', 13], 'are 513 positions; the model was trained for 512'),
    (['--new-tokens', 512], 'are 513 positions; the model was trained for 512'),
    (['--model', 'nowhere.h5'], r'nowhere\.h5: No such file'), (['--unknown'], 'unrecognized'),
])
def test_bad_input_gets_one_line(arguments, message):
    done = run_ranks(2, '-m', 'tpmpi.bench', *arguments, timeout=30)
    errors = own_errors(done.stderr)
    assert done.returncode != 0 and done.stdout == ''
    assert len(errors) == 1 and re.search(message, errors[0]), done.stderr


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
