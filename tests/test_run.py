"""The command: text, JSON, options and refusals, under mpirun and alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny
from ranks import environment, is_open_mpi, run_ranks

PROMPT = 'abc é 日本 🎉'
RECITED = 'xé日🎉!'


def run(size, *arguments, **options):
    return run_ranks(size, '-m', 'tpmpi.run', *arguments, **options)


def result(size, *arguments):
    """The object that --json prints."""
    done = run(size, '--json', *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('\n') == 1
    return json.loads(done.stdout)


def own_errors(stderr: str) -> list[str]:
    """The error lines, without what Open MPI's mpirun adds of its own when an exit code is not 0."""
    assert 'Traceback' not in stderr
    stderr = re.sub(r'.*PMIX ERROR.*\n', '', stderr)  # first: one of them can stand in the middle of the next
    stderr = re.sub(r'(?s)-{60,}\nprterun .*?-{60,}\n', '', stderr)
    return [line for line in stderr.splitlines() if line and not line.startswith('tpmpi [')]


def run_into(output: str, *arguments) -> subprocess.CompletedProcess:
    """Run `python arguments` alone, with a standard output that is closed or full, or whose reader has gone away."""
    command = [sys.executable, *map(str, arguments)]
    if output == 'closed':
        command = ['sh', '-c', 'exec "$0" "$@" >&-', *command]
    reading, writing = (None, os.open('/dev/full', os.O_WRONLY)) if output == 'full' else os.pipe()
    if reading is not None:
        os.close(reading)
    try:
        return subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment(), timeout=180)
    finally:
        os.close(writing)


STANDARD_OUTPUTS = {'closed': ['tpmpi: standard output is closed; redirect it to a file, or to /dev/null'],
                    'full': ['tpmpi: standard output: No space left on device'], 'gone': []}


@pytest.fixture(scope='module')
def reciter(tmp_path_factory):
    path = tmp_path_factory.mktemp('reciter') / 'reciter.h5'
    tiny.write_reciter(path, RECITED)
    return path


@pytest.mark.parametrize('size', [1, 2, 4, 9])
def test_json_holds_the_tokens_and_log_probabilities_of_the_whole_model(models, size):
    path, config, tensors = models['nine_heads']
    found = result(size, '--model', path, '--prompt', PROMPT, '--max-new-tokens', 8, '--logprobs', 3, '--prompt-logprobs')
    assert found['prompt'] == PROMPT and found['prompt_tokens'] == tiny.byte_ids(PROMPT)
    tokens = found['prompt_tokens'] + found['tokens']
    exact = tiny.oracle_logits(tensors, config, tokens)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    start = len(found['prompt_tokens'])
    np.testing.assert_allclose(found['prompt_logprobs'], [exact[i, t] for i, t in enumerate(tokens[1:start])], atol=1e-4)
    assert len(found['tokens']) == len(found['logprobs']) == 8 and found['finish_reason'] == 'length'
    for i, step in enumerate(found['logprobs']):
        row = exact[start + i - 1]
        assert step['token'] == found['tokens'][i] == step['top'][0][0] == int(row.argmax())
        assert step['logprob'] == pytest.approx(row.max(), abs=1e-4) and len(step['top']) == 3
    timing = found['timing']
    assert timing['ranks'] == size and timing['prefill_tokens'] == start and timing['decode_tokens'] == 7
    assert timing['allreduce_bytes_per_token'] == 4 * config.hidden_size * (1 + 2 * config.num_layers)


def test_float16_is_for_gpus(models):
    done = run(2, '--model', models['nine_heads'][0], '--weights', 'float16', '--device', 'cpu')
    assert done.returncode == 1
    assert own_errors(done.stderr) == ['tpmpi: weights float16: only a GPU computes with it; choose bfloat16, or leave weights '
                                       'out: a file of float16 is then float32 in memory, without loss']


def test_text_comes_whole_and_the_rest_goes_to_standard_error(reciter):
    done = run(2, '--model', reciter, '--prompt', 'x', text=False)
    assert done.stdout.decode() == RECITED[1:] + '\n'
    lines = [line for line in done.stderr.decode().splitlines() if line]
    assert all(line.startswith('tpmpi [0/2] ') for line in lines)
    assert re.fullmatch(
        r'tpmpi \[0/2\] done: prefill 1 tokens at [\d,.]+ tokens/s, decode \d+ at [\d,.]+ tokens/s, weights read at [\d,.]+ '
        r'GB/s, all-reduce [\d.]+ ms and [\d,]+ bytes per token', lines[-1])
    assert '2 ranks x 1 thread' in lines[0]


def test_pieces_appear_while_the_run_goes_on(models):
    process = subprocess.Popen(
        [sys.executable, '-m', 'tpmpi.run', '--model', models['nine_heads'][0], '--prompt', 'a', '--context', '32',
         '--max-new-tokens', '100000'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment())
    with process:
        assert process.stdout.read(10) and process.poll() is None
        process.kill()


def test_a_prompt_from_a_file(reciter, tmp_path):
    for text in (b'x', b'\xef\xbb\xbfx'):  # as some editors write it
        (tmp_path / 'prompt.txt').write_bytes(text)
        assert run(2, '--model', reciter, '--prompt-file', tmp_path / 'prompt.txt').stdout == RECITED[1:] + '\n'
    (tmp_path / 'prompt.txt').write_bytes(b'\xef\xbb\xbf')
    assert 'the prompt is empty' in run(1, '--model', reciter, '--prompt-file', tmp_path / 'prompt.txt').stderr


def test_a_prompt_from_standard_input(reciter):
    if is_open_mpi():
        pytest.skip("Open MPI 5.0's mpirun never ends a piped standard input: a bare `sys.stdin.read()` hangs under it too")
    assert run(2, '--model', reciter, '--prompt-file', '-', stdin=None, input='x').stdout == RECITED[1:] + '\n'


def test_stop_texts_and_lengths(reciter):
    assert result(1, '--model', reciter, '--prompt', 'x', '--stop', '🎉', '--stop', '??')['text'] == 'é日'
    cut = result(1, '--model', reciter, '--prompt', 'x', '--max-new-tokens', 3)
    assert (cut['text'], cut['finish_reason']) == ('é\ufffd', 'length')  # the first byte of three
    assert result(1, '--model', reciter, '--prompt', 'x')['finish_reason'] == 'stop'


def test_sampling_is_the_same_on_any_number_of_ranks_and_differs_by_seed(models):
    path = models['nine_heads'][0]
    options = ('--model', path, '--prompt', 'q', '--max-new-tokens', 12, '--temperature', 1.5, '--top-p', 0.9, '--seed')
    found = [result(size, *options, 5)['tokens'] for size in (1, 2, 3)]
    assert found[0] == found[1] == found[2] != result(1, *options, 6)['tokens']


def test_the_trace_shows_each_stage_of_each_rank(models):
    path, config, _ = models['nine_heads']
    done = run(2, '--model', path, '--prompt', 'abcdef', '--max-new-tokens', 4, '--trace')
    blocks = re.split(r'(?m)^rank ', done.stderr)[1:]
    assert [b.split(':')[0].split(' on ')[0] + b.split(',')[1].split(':')[0] for b in blocks] == [
        '0 prefill', '0 decode', '1 prefill', '1 decode']
    ffn = 0
    for rank, heads, kv_heads in ((0, 5, 2), (1, 4, 2)):
        rows = dict(re.findall(r'(?m)^  (\S+) +(\[[\d, ]+\]) +[\d.]+ ms', blocks[2 * rank + 1]))
        assert set(rows) == {'embedding', 'AllReduce(embedding)', 'A', 'Q', 'K', 'V', 'cache', 'B', 'C', 'AllReduce(C)', 'D', 'E',
                             'AllReduce(E)', 'logits'}
        assert rows['Q'] == f'[1, {heads}, 8]' and rows['K'] == rows['V'] == f'[1, {kv_heads}, 8]'
        assert rows['B'] == f'[1, {heads * 8}]' and rows['C'] == rows['E'] == rows['AllReduce(E)'] == '[1, 36]'
        ffn += int(rows['D'].strip('[]').split(', ')[1])
    assert ffn == config.ffn_size


@pytest.mark.parametrize(('arguments', 'message'), [
    (['--model', 'nowhere.h5'], r'nowhere\.h5: No such file'),
    (['--model', __file__], 'not an HDF5 file'),
    (['--prompt', ''], 'the prompt is empty'),
    (['--prompt', b'\xff\xfe'], '--prompt: not UTF-8 at byte 0'), (['--stop', b'a\xff'], '--stop: not UTF-8 at byte 1'),
    (['--model', 'nowhere.h5', '--chat', '--system', b'ab\xff'], '--system: not UTF-8 at byte 2'),
    (['--prompt', 'x' * 300], 'the model was trained for 256'),
    (['--prompt', 'x', '--max-new-tokens', 999], 'the model was trained for 256'),
    (['--prompt-file', 'nowhere.txt'], r'nowhere\.txt: No such file'),
    (['--temperature', -1], 'temperature is -1'), (['--top-p', 0], 'top_p is 0'), (['--temperature', 'hot'], 'invalid float'),
    (['--temperature', 1e-300], 'temperature is 1e-300'), (['--repetition-penalty', 1e300], r'repetition_penalty is 1e\+300'),
    (['--max-new-tokens', -1], 'max_new_tokens is -1'), (['--seed', -3], 'seed is -3'), (['--stop', ''], 'stop is empty'),
    (['--context', 0], 'context is 0'), (['--context', 257], 'the model was trained for 256'), (['--chunk', 0], 'chunk is 0'),
    (['--threads', 0], 'threads is 0; expected a whole number from 1 to 1024'), (['--threads', 100000], 'threads is 100000'),
    (['--device', 'tpu'], 'invalid choice'), (['--unknown'], 'unrecognized'),
    (['--chat'], 'chat template'), (['--system', 'x'], '--system needs --chat'), (['--logprobs', 2], 'need --json'),
    (['--prompt', 'a', '--prompt-file', 'b'], 'not allowed with'),
])
def test_bad_input_gets_one_line(models, arguments, message):
    if '--model' not in arguments:
        arguments = ['--model', models['nine_heads'][0], *arguments]
    done = run(2, *(a if isinstance(a, bytes) else str(a) for a in arguments), timeout=120)
    errors = own_errors(done.stderr)
    assert done.returncode != 0 and done.stdout == ''
    assert len(errors) == 1 and re.search(message, errors[0]), done.stderr


@pytest.mark.parametrize('arguments', [[], ['--json'], ['--version'], ['--help']], ids=lambda a: ''.join(a) or 'text')
@pytest.mark.parametrize('output', STANDARD_OUTPUTS)
def test_a_standard_output_that_takes_nothing_is_one_line_at_most(reciter, output, arguments):
    done = run_into(output, '-m', 'tpmpi.run', '--model', reciter, '--prompt', 'x', *arguments)
    assert own_errors(done.stderr) == STANDARD_OUTPUTS[output]
    assert done.returncode == bool(STANDARD_OUTPUTS[output])


def test_all_ranks_end_where_rank_0_cannot_write(reciter):
    code = 'import os, sys; os.environ["PMI_RANK"] != "0" or os.dup2(os.open("/dev/full", os.O_WRONLY), 1)'
    if is_open_mpi():
        pytest.skip('its ranks have another variable')
    done = run_ranks(2, '-c', f'{code}; from tpmpi import run; sys.exit(run.main(sys.argv[1:]))', '--model', reciter, timeout=120)
    assert done.returncode == 1 and own_errors(done.stderr) == STANDARD_OUTPUTS['full']


@pytest.mark.parametrize(('closing', 'arguments', 'output', 'errors'), [
    ('<&-', ['--prompt-file', '-'], '', ['tpmpi: --prompt-file -: standard input is closed; redirect a file to it']),
    ('2>&-', ['--prompt', 'x', '--trace'], RECITED[1:] + '\n', []),
    ('2>&-', ['--prompt', ''], '', [])])
def test_a_closed_standard_stream_is_no_other_one(reciter, closing, arguments, output, errors):
    command = [sys.executable, '-m', 'tpmpi.run', '--model', str(reciter), *arguments]
    done = subprocess.run(['sh', '-c', f'exec "$0" "$@" {closing}', *command], capture_output=True, text=True, env=environment(),
                          timeout=180)
    assert done.stdout == output and own_errors(done.stderr) == errors


def test_a_gpu_that_is_not_there_is_one_line(models):
    done = run(2, '--model', models['nine_heads'][0], '--device', 'cuda', '--prompt', 'x')
    if done.returncode == 0:
        pytest.skip('there is a GPU')
    assert len(own_errors(done.stderr)) == 1 and 'device cuda: ' in done.stderr


def test_help_and_version_are_printed_once():
    assert run(2, '--help').stdout.count('usage: ') == 1
    version = run(2, '--version')
    assert version.returncode == 0 and version.stdout.count('tpmpi ') == 1
    for name in ('Python', 'NumPy', 'BLAS', 'MPI', 'HDF5', 'CPU', 'GPU'):
        assert name in version.stdout


def test_threads_are_the_rank_s_share_whatever_the_environment_says(models):
    code = ('import tpmpi.session as s, json; x = s.start(); import numpy, os; '
            'print(json.dumps([x.threads, os.environ["OPENBLAS_NUM_THREADS"], x.local_size]))')
    done = run_ranks(2, '-c', code, env=environment(OMP_NUM_THREADS='77', OPENBLAS_NUM_THREADS='77'))
    found = [json.loads(part) for part in re.findall(r'\[[^]]*\]', done.stdout)]  # two ranks may share a line
    import os
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert len(found) == 2 and all(int(b) == t <= share and n == 2 for t, b, n in found)
