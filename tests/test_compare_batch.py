"""The comparison of batches with vLLM: its prompts and its table, and one run with a made-up vLLM."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
from ranks import ROOT

from tpmpi.api import bundled_model

sys.path.insert(0, str(ROOT / 'data'))  # where it finds compare_peers
spec = importlib.util.spec_from_file_location('compare_batch', ROOT / 'data' / 'compare_batch.py')
batches = importlib.util.module_from_spec(spec)
spec.loader.exec_module(batches)
sys.path.remove(str(ROOT / 'data'))


def test_prompts_differ_after_what_they_have_in_common(tmp_path):
    o = batches.parse(['--model', 'm.h5', '--prompts', '9', '--prompt-tokens', '12', '--common', '7', '--new-tokens', '3'])
    batches.write_prompts(tmp_path / 'in', o)
    lines = [json.loads(line) for line in (tmp_path / 'in').read_text().splitlines()]
    assert len({line['id'] for line in lines}) == 9 and all(line['max_new_tokens'] == 3 and line['ignore_eos'] for line in lines)
    assert {len(line['prompt']) for line in lines} == {12}
    assert len({tuple(line['prompt'][:7]) for line in lines}) == 1 and len({tuple(line['prompt'][7:]) for line in lines}) == 9


def test_the_table_has_medians_of_the_ratios_of_rounds(tmp_path, monkeypatch):
    """3, 1 and 0.5 times vLLM: the median is 1, and not the ratio of the medians."""
    ours, theirs = iter([300, 100, 100]), iter([100, 100, 200])
    monkeypatch.setattr(batches, 'run_tpmpi', lambda o, options, source, one=False: 10 if one else next(ours))
    monkeypatch.setattr(batches.compare_peers, 'run', lambda command, env: {'version': '9', 'rate': next(theirs)})
    o = batches.parse(['--model', 'm.h5', '--vllm-python', 'V', '--vllm-model', 'F', '--one', '--options', '--weights int8'])
    batches.write_prompts(tmp_path / 'in', o)
    rows = [line for line in batches.compare(o, tmp_path / 'in').splitlines() if line.startswith('|')]
    assert rows[2:] == ['| tpmpi.batch --weights int8 | 100 | 1.00 | 300, 100, 100 |',
                        '| one sequence at a time | 10 | 0.10 | 10, 10, 10 |',
                        '| vLLM 9, bfloat16 | 100 | 1.00 | 100, 100, 200 |']
    assert len((tmp_path / 'few.jsonl').read_text().splitlines()) == 8


@pytest.mark.parametrize('arguments', [[], ['--model', 'm.h5', '--common', '100'], ['--model', 'm.h5', '--common', '-1']])
def test_what_cannot_be_run_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        batches.parse(arguments)
    assert 'error' in capsys.readouterr().err


def test_a_run_of_tpmpi_counts_all_new_tokens(tmp_path):
    o = batches.parse(['--model', str(bundled_model()), '--ranks', '2', '--new-tokens', '4'])
    (tmp_path / 'in').write_text(''.join(
        json.dumps({'id': i, 'prompt': [5 + i, 7, 9], 'max_new_tokens': 4, 'ignore_eos': True}) + '\n' for i in range(5)))
    assert batches.run_tpmpi(o, '--kernels reference', tmp_path / 'in') > 0
    assert batches.run_tpmpi(o, '--kernels reference', tmp_path / 'in', one=True) > 0
