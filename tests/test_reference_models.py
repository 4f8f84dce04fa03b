"""Random Llama checkpoints, converted and run on ranks, against what transformers computed from the same folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
from ranks import run_ranks
from references import FOLDER, answer, check_greedy

from tpmpi.convert import convert

pytest.importorskip('safetensors', reason='safetensors is not installed (the test extra has it)')


@pytest.fixture(scope='module', params=['tiny_llama', 'tiny_llama_tied'])
def converted(request, tmp_path_factory):
    path = tmp_path_factory.mktemp('converted') / 'model.h5'
    convert(FOLDER / request.param, path)
    return path, json.loads((FOLDER / request.param / 'reference.json').read_text())


@pytest.mark.parametrize('size', [1, 2, 3, 5])
def test_logits_and_greedy_tokens_are_transformers(converted, tmp_path, size):
    path, reference = converted
    cases = reference['cases']
    for case, found in zip(cases, answer(path, cases, size, tmp_path, max_positions=256), strict=True):
        check_greedy(found, case['greedy'])
        for position, logits in zip(case['positions'], case['logits'], strict=True):
            exact = np.array(logits) - np.log(np.exp(logits).sum())
            if position + 1 < len(case['ids']):
                assert found['prompt_logprobs'][position] == pytest.approx(exact[case['ids'][position + 1]], abs=1e-4)
            else:
                best = np.sort(exact)[::-1][:20]
                np.testing.assert_allclose([p for _, p in found['choices'][0][2]], best, atol=1e-4)


def test_the_command_encodes_and_chats_as_transformers(converted):
    path, reference = converted
    case, chat = reference['cases'][2], reference['chats'][0]
    done = run_ranks(2, '-m', 'tpmpi.run', '--model', path, '--prompt', case['prompt'], '--max-new-tokens', 1, '--json')
    assert json.loads(done.stdout)['prompt_tokens'] == case['ids']
    message = chat['messages'][-1]['content']
    done = run_ranks(2, '-m', 'tpmpi.run', '--model', path, '--chat', '--prompt', message, '--max-new-tokens', 1, '--json')
    assert json.loads(done.stdout)['prompt_tokens'] == chat['ids']
