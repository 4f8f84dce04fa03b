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
FAILING = '''
import sys, tpmpi
llm = tpmpi.load(sys.argv[1], threads=1)
if llm.rank == 1:
    raise KeyError('a mistake in the script')
llm.generate('x')
'''


@pytest.fixture(scope='module')
def reciter(tmp_path_factory):
    path = tmp_path_factory.mktemp('reciter') / 'reciter.h5'
    tiny.write_reciter(path, 'xé日🎉!')
    return path


def test_a_script_alone(reciter, tmp_path):
    done = subprocess.run([sys.executable, '-c', SCRIPT, reciter], capture_output=True, text=True, env=environment(), timeout=60)
    expected = ['é日🎉!', 4, 'é', 'length', 'the prompt is empty; expected at least one token']
    assert json.loads(done.stdout) == expected, done.stderr


@pytest.mark.parametrize('size', [2, 3])
def test_a_script_on_ranks(reciter, size):
    done = run_ranks(size, '-c', SCRIPT, reciter)
    assert json.loads(done.stdout)[:4] == ['é日🎉!', 4, 'é', 'length'], done.stderr


def test_a_script_that_fails_on_one_rank_ends_them_all(reciter):
    done = run_ranks(2, '-c', FAILING, reciter, timeout=30)
    assert done.returncode != 0
    assert sum(line.startswith('tpmpi: rank 1 ') for line in done.stderr.splitlines()) == 1, done.stderr
