"""The Python interface, in this process and on ranks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny
from ranks import environment, run_ranks

SCRIPT = '''
import json, sys, tpmpi
llm = tpmpi.load(sys.argv[1], threads=1)
pieces = list(llm.stream('x'))
again = llm.generate('x', max_new_tokens=2)
try:
    llm.generate('')
except ValueError as error:
    refused = str(error)
if llm.rank == 0:
    print(json.dumps([''.join(pieces), len(pieces), again.text, again.finish_reason, refused]))
'''
CALLS = '''
import json, sys, numpy as np, tpmpi
llm, found = tpmpi.load(sys.argv[1], threads=1), []
for call in json.loads(sys.argv[2]):
    try:
        found.append(eval(call))
    except ValueError as error:
        found.append(str(error))
if llm.rank == 0:
    print(json.dumps(found))
'''
PROMPTS = 'expected text, integers that are token ids, or chat messages'
X = tiny.byte_ids('x')[0]
FAILING = '''
import sys, tpmpi
llm = tpmpi.load(sys.argv[1], threads=1)
if llm.rank == 1:
    raise KeyError('a mistake in the script')
llm.generate('x')
'''
FAILING_WITHIN = '''
import sys, tpmpi
with tpmpi.load(sys.argv[1], threads=1) as llm:
    if llm.rank == 1:
        raise KeyError('a mistake in the script')
    llm.generate('x')
'''
MODELS = '''
import json, os, sys, threading, tpmpi, weakref
from pathlib import Path

def shared_mappings():
    return sum(line.split()[1].endswith('s') for line in Path('/proc/self/maps').read_text().splitlines())

def watchmen():
    return sum(b'watchman' in Path('/proc', pid, 'cmdline').read_bytes() for pid in os.listdir('/proc') if pid.isdigit()
               and Path('/proc', pid, 'stat').read_text().rpartition(')')[2].split()[1] == str(os.getpid()))

def load(model, **more):
    try:
        return tpmpi.load(model, **more)
    except ValueError as error:
        return str(error)

first, second = tpmpi.load(sys.argv[1], threads=1), tpmpi.load(sys.argv[2])
before = shared_mappings()
found = [load('nothing.h5'), load(sys.argv[1], threads=2)]
for _ in range(3):
    with tpmpi.load(sys.argv[1], weights='bfloat16') as third:
        weights, stream = weakref.ref(third.engine.model), third.stream('x')
        found += [first.generate('x').text, second.generate([5], max_new_tokens=3).tokens, third.generate('日').text]
        pieces = [next(stream, None)]
        try:
            third.close()
        except ValueError as error:
            found.append(str(error))
        found.append([*pieces, *stream])
    third.close()
    found.append(weights() is None)
    for call in (lambda: third.generate('x'), lambda: next(third.stream('x'))):
        try:
            call()
        except ValueError as error:
            found.append(str(error))
if first.rank == 0:
    print(json.dumps([found, shared_mappings() - before, watchmen(), sum(t.name == 'watch' for t in threading.enumerate())]))
'''


@pytest.fixture(scope='module')
def reciter(tmp_path_factory):
    path = tmp_path_factory.mktemp('reciter') / 'reciter.h5'
    tiny.write_reciter(path, 'xé日🎉!')
    return path


def test_a_script_alone(reciter, tmp_path):
    done = subprocess.run([sys.executable, '-c', SCRIPT, reciter], capture_output=True, text=True, env=environment(),
                          timeout=300)  # it may be the first to compile
    expected = ['é日🎉!', 4, 'é', 'length', 'the prompt is empty; expected at least one token']
    assert json.loads(done.stdout) == expected, done.stderr


@pytest.mark.parametrize('size', [2, 3])
def test_a_script_on_ranks(reciter, size):
    done = run_ranks(size, '-c', SCRIPT, reciter)
    assert json.loads(done.stdout)[:4] == ['é日🎉!', 4, 'é', 'length'], done.stderr


@pytest.mark.parametrize('size', [1, 2])
def test_arguments_mean_what_they_say_or_are_refused(reciter, size):
    expected = {
        **{f'llm.generate({prompt}).text': 'é日🎉!' for prompt in (
            f'[{X}]', f'({X},)', f'np.array([{X}], np.uint8)', f'[np.int64({X})]', f'range({X}, {X + 1})')},
        **{f'llm.generate({prompt})': f'the prompt is {prompt}; {PROMPTS}' for prompt in (
            'None', "b'x'", '1.5', '[1.7, 2.2]', "['12', '3']", '[True]', "{'role': 'user'}", '{1, 2}', "[5, {'role': 'user'}]")},
        'llm.generate(np.array([1.5]))': f'the prompt is array([1.5]); {PROMPTS}',
        'llm.generate(np.array([[1, 2]]))': f'the prompt is array([[1, 2]]); {PROMPTS}',
        'llm.generate([])': 'the prompt is empty; expected at least one token',
        "llm.generate('x', stop='日🎉').text": 'é', "llm.generate('x', stop='🎉日', max_new_tokens=np.int8(2)).text": 'é',
        "llm.generate('x', top_k=2.5)": 'top_k is 2.5; expected a number of tokens, 0 for all',
        **{f'tpmpi.load({name}={value})': f'{name} is {value}; expected a whole number' for name in (
            'context', 'chunk', 'block', 'sinks') for value in ("'5'", '5.5', 'True')},
        **{f'tpmpi.load(threads={value})': f'threads is {value}; expected a whole number from 1 to 1024' for value in (
            '-1', '0', "'2'", '1.5', 'True', '1025', '100000')},
        **{f'len({{tuple(llm.generate([5], max_new_tokens=6, temperature=1e6{seed}).tokens) for _ in range(3)}})': count
           for seed, count in ((', seed=1', 1), ('', 3))},
        "llm.generate('x', seed=None, stop='日🎉').text": 'é',
        'llm.generate([5] * llm.config.max_positions).tokens': [],
        'len(llm.generate([5] * (llm.config.max_positions - 1), ignore_eos=True).tokens)': 1,
        'tpmpi.load(sys.argv[1], threads=np.int64(1), context=np.int32(9)).engine.run.context': 9}
    done = run_ranks(size, '-c', CALLS, reciter, json.dumps(list(expected)))
    assert done.returncode == 0, done.stderr
    assert dict(zip(expected, json.loads(done.stdout), strict=True)) == expected


@pytest.mark.parametrize('size', [1, 2])
def test_models_beside_each_other(models, reciter, size):
    path, config, tensors = models['nine_heads']
    tokens = [5]
    for _ in range(3):
        tokens.append(int(tiny.oracle_logits(tensors, config, tokens)[-1].argmax()))
    done = run_ranks(size, '-c', MODELS, reciter, path)
    assert done.returncode == 0, done.stderr
    found, mappings, watchmen, threads = json.loads(done.stdout)
    closed, stream = 'the model is closed; load it again', 'a stream is open: read it to its end, or close it, before the model'
    if size > 1:
        stream = 'a stream is open, and the other ranks compute it: read it to its end, or close it, first'
    assert 'nothing.h5' in found[0]
    assert found[1:] == ['threads is 2, and the first model of this script was loaded with 1; leave it out'] + 3 * [
        'é日🎉!', tokens[1:], '🎉!', stream,
        ['é', '日', '🎉', '!'], True, closed, closed]
    assert (mappings, watchmen, threads) == (0, size > 1, size > 1)


WITHIN = '''
import json, sys, tpmpi
one, two, found = tpmpi.load(sys.argv[1], threads=1), tpmpi.load(sys.argv[1]), []
for piece in one.stream('x'):
    for call in (lambda: one.generate('x'), lambda: two.generate('x').text, two.close, lambda: list(two.stream('x'))):
        try:
            found.append(call())
        except ValueError as error:
            found.append(str(error))
    break
text = one.generate('x').text
if one.rank == 0:
    print(json.dumps([found, text]))
'''


@pytest.mark.parametrize('size', [1, 2])
def test_a_call_within_a_stream(reciter, size):
    """The other ranks compute the stream, and do not come to the calls that rank 0 makes between its pieces."""
    done = run_ranks(size, '-c', WITHIN, reciter)
    assert done.returncode == 0, done.stderr
    open_there = 'a stream is open, and the other ranks compute it: read it to its end, or close it, first'
    another = 'another stream is open: read it to its end, or close it, before the next request'
    closed = 'the model is closed; load it again'
    expected = [another, 'é日🎉!', None, closed] if size == 1 else [open_there] * 4
    assert json.loads(done.stdout) == [expected, 'é日🎉!']


@pytest.mark.parametrize('script', [FAILING, FAILING_WITHIN])
def test_a_script_that_fails_on_one_rank_ends_them_all(reciter, script):
    done = run_ranks(2, '-c', script, reciter, timeout=120)
    assert done.returncode != 0
    assert sum(line.startswith('tpmpi: rank 1 ') for line in done.stderr.splitlines()) == 1, done.stderr
