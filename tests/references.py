"""Comparing our answers with what transformers computed in float32 (tests/references/*.json)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from ranks import run_program

FOLDER = Path(__file__).parent / 'references'
TIE = 1e-3  # log-probabilities this near may come in either order


def answer(model, cases, size: int, folder, timeout: float = 120, max_positions: int = 8192) -> list[dict]:
    """The greedy continuation of each case with 20 alternatives a step, and the prompt's log-probabilities, on `size` ranks.

    A continuation ends where the model's length does, which transformers does not mind.
    """
    params = {'logprobs': 20, 'prompt_logprobs': True, 'ignore_eos': True}
    requests = [[case['ids'], params | {'max_new_tokens': min(len(case['greedy']), max_positions - len(case['ids']))}]
                for case in cases]
    (folder / 'requests.json').write_text(json.dumps(requests))
    report = run_program('answers.py', size, model, folder / 'requests.json', folder / 'answers.json', timeout=timeout)
    assert report == {'ranks': size}
    return json.loads((folder / 'answers.json').read_text())


def check_greedy(answer: dict, expected: list) -> None:
    """Equal tokens up to the first step where transformers' own two best are within TIE."""
    assert len(answer['tokens']) >= min(len(expected), 8)
    for step, (token, best, second) in enumerate(expected[:len(answer['tokens'])]):
        if answer['tokens'][step] != token:
            assert best - second < TIE, f'step {step}: {answer["tokens"][step]}, transformers has {token}'
            return
        assert abs(answer['choices'][step][1] - best) < TIE


def check_top(answer: dict, top_ids: list[int], top_logprobs: list[float]) -> float:
    """The same best tokens in the same order but for ties, with the same log-probabilities; returns the largest difference."""
    found = answer['choices'][0][2]
    differences = [abs(p - q) for (_, p), q in zip(found, top_logprobs, strict=True)]
    assert max(differences) < TIE
    for (token, p), wanted in zip(found, top_ids, strict=True):
        if token != wanted:
            near = dict(zip(top_ids, top_logprobs, strict=True)).get(token, top_logprobs[-1])
            assert abs(near - p) < TIE, f'token {token} where transformers has {wanted}'
    return max(differences)


def check_logprobs(answer: dict, expected: list[float]) -> float:
    """The log-probability of each prompt token; returns the largest difference."""
    differences = np.abs(np.subtract(answer['prompt_logprobs'], expected))
    assert differences.max() < TIE
    return float(differences.max())
