"""The comparison with peers: its arithmetic and its order on made-up outputs, and one run with a made-up peer."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys

import pytest
from ranks import ROOT, mpirun

from tpmpi import bench
from tpmpi.api import bundled_model

spec = importlib.util.spec_from_file_location('compare_peers', ROOT / 'data' / 'compare_peers.py')
peers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peers)

ALL = ['--tpmpi-model', 'bfloat16=b.h5', '--tpmpi-model', 'int8=i.h5', '--tpmpi-model', 'float32=f.h5', '--ranks', '2',
       '--cores', '2', '--llama-python', 'L', '--gguf', 'int8=q8.gguf', '--vllm-python', 'V', '--vllm-model', 'bfloat16=folder']


def made_up(figures):
    """A `run` that answers from lists of (prefill, decode): by peer, and by batch for tpmpi.  Also what it was asked."""
    asked, answers = [], {key: itertools.cycle(values) for key, values in figures.items()}

    def run(command, env):
        if '--peer' in command:
            peer = command[command.index('--peer') + 1]
            asked.append(peer)
            rates = {str(batch): dict(zip(('prefill', 'decode'), next(answers[peer, batch]), strict=True))
                     for batch in peers.BATCHES[peer]}
            return {'version': '9', 'rates': rates}
        batch = int(command[command.index('--batch') + 1])
        asked.append(batch)
        prefill, decode = next(answers[batch])
        return {'prefill_tokens_per_s': prefill, 'decode_tokens_per_s': decode, 'bandwidth_fraction': 0.5, 'machine': 'a machine',
                'tpmpi': '1'}

    return run, asked


def test_the_table_has_medians_of_the_ratios_of_pairs():
    o = peers.parse([*ALL, '--rounds', '3', '--name', 'M'])
    run, asked = made_up({
        1: [(100, 10), (300, 30), (200, 60)], 16: [(1, 400)],
        ('llama', 1): [(100, 20), (100, 10), (200, 30)], ('vllm', 1): [(1000, 10)], ('vllm', 16): [(1000, 800)]})
    assert peers.comparisons(o) == [('bfloat16', 'vllm'), ('int8', 'llama')]
    results = [peers.compare(o, kind, peer, run) for kind, peer in peers.comparisons(o)]
    assert asked == [1, 16, 'vllm'] * 3 + [1, 'llama'] * 3
    text = peers.table(o, results)
    rows = [line for line in text.splitlines() if line.startswith('|')]
    assert rows == [
        '| M | prefill | decode, 1 sequence | decode, 16 sequences |', '| --- | --- | --- | --- |',
        '| bfloat16, vLLM 9 | **0.20** (200 / 1,000) | **3.00** (30 / 10) | **0.50** (400 / 800) |',
        '| int8, llama.cpp 9 | **1.00** (200 / 100) | **2.00** (30 / 20) |  |']  # of 0.5, 3, 2: not 30 / 20
    assert text.startswith('On a machine: prompts of 512 tokens') and 'medians of 3 pairs' in text
    lines = text.splitlines()
    assert sum(line.startswith('{"load"') for line in lines) == 6 and sum('-m tpmpi.bench' in line for line in lines) == 3


def test_a_column_that_nobody_has_is_left_out():
    o = peers.parse([*ALL, '--only', 'int8', 'float32', '--rounds', '1'])
    run, _ = made_up({1: [(100, 10)], ('llama', 1): [(100, 20)]})
    assert peers.comparisons(o) == [('int8', 'llama')]
    text = peers.table(o, [peers.compare(o, 'int8', 'llama', run)])
    assert '| the model | prefill | decode, 1 sequence |\n| --- | --- | --- |\n' in text


def test_a_busy_machine_is_told(monkeypatch):
    o = peers.parse([*ALL, '--only', 'int8', '--rounds', '1'])
    for load, told in ((2.4, False), (3.1, True)):
        monkeypatch.setattr(peers.os, 'getloadavg', lambda load=load: (load, 0, 0))
        run, _ = made_up({1: [(100, 10)], ('llama', 1): [(100, 20)]})
        assert ('Not to be trusted' in peers.table(o, [peers.compare(o, 'int8', 'llama', run)])) == told


def test_a_pair_counts_where_memory_was_steady():
    """Before, between and after each pair: the second pair's third figure is another speed's."""
    speeds = iter([50, 51, 49, 50, 50, 80, 80, 79, 80])
    paired, asked = made_up({1: [(100, 10), (100, 20), (100, 30)], ('llama', 1): [(100, 10)]})

    def run(command, env):
        return paired(command, env) if '--peer' in command or '--batch' in command else {'stream_gb_per_s': next(speeds)}

    o = peers.parse([*ALL, '--only', 'int8', '--rounds', '2', '--steady'])
    rounds = peers.compare(o, 'int8', 'llama', run)['rounds']
    assert [r['tpmpi'][1]['decode'] for r in rounds] == [10, 30] and [r['memory'] for r in rounds] == [[50, 51, 49], [80, 79, 80]]
    assert asked == [1, 'llama'] * 3
    speeds = itertools.cycle([50, 80])
    with pytest.raises(SystemExit, match='memory was alike around 0 of them'):
        peers.compare(o, 'int8', 'llama', run)


def test_commands_are_options_that_exist(monkeypatch):
    o = peers.parse([*ALL, '--prompt-tokens', '7', '--new-tokens', '5', '--tpmpi-options', '--kv bfloat16'])
    command = peers.tpmpi_command(o, 'int8', 16)
    found = bench.parse(command[command.index('tpmpi.bench') + 1:])
    assert (found.model, found.weights, found.batch, found.threads) == ('i.h5', 'int8', 16, 1)
    assert (found.prompt_tokens, found.new_tokens, found.kv, found.json) == (7, 5, 'bfloat16', True)
    command = peers.peer_command(o, 'bfloat16', 'vllm')
    found = peers.parse(command[2:])
    assert command[0] == 'V' and (found.peer, found.kind, found.path, found.threads) == ('vllm', 'bfloat16', 'folder', 2)
    assert (found.prompt_tokens, found.new_tokens, found.repeat) == (7, 5, o.repeat)
    monkeypatch.setenv('PYTHONPATH', 'ours')
    assert 'PYTHONPATH' not in peers.environment(o, 'llama') and 'LD_PRELOAD' in peers.environment(o, 'vllm')


def test_no_prompt_comes_twice_in_a_process():
    """OpenVINO's cache of prefixes made a prefill of a prompt seen before fifty times faster than any computation is."""
    prompts = list(itertools.islice(peers.random_prompts(20), 50))
    assert len({prompt[0] for prompt in prompts}) > 45 and len(set(map(tuple, prompts))) == 50
    assert all(len(prompt) == 20 and min(prompt) >= 100 for prompt in prompts)


def test_rates_of_a_peer_that_gives_whole_answers():
    o = peers.parse([*ALL, '--prompt-tokens', '100', '--new-tokens', '10', '--repeat', '1'])
    found = peers.rates(lambda batch, new: batch * 2 + new * 0.5, 2, o)  # 4.5 s for one token, 9.5 s for eleven
    assert found == pytest.approx({'prefill': 200 / 4.5, 'decode': 20 / 5})


@pytest.mark.parametrize(('arguments', 'message'), [
    ([], 'nothing to compare'), (['--gguf', 'int3=x'], 'expected KIND=PATH'), (['--gguf', 'int8='], 'expected KIND=PATH'),
    ([*ALL, '--rounds', '0'], '--rounds is 0'), ([*ALL, '--only', 'int4'], 'nothing to compare'),
])
def test_bad_options_are_told(capsys, arguments, message):
    with pytest.raises(SystemExit):
        peers.parse(arguments)
    assert message in capsys.readouterr().err


def test_a_run_of_tpmpi_beside_a_made_up_peer(tmp_path, monkeypatch, capsys):
    mpirun()
    for name in ('OMPI_ALLOW_RUN_AS_ROOT', 'OMPI_ALLOW_RUN_AS_ROOT_CONFIRM'):
        monkeypatch.setenv(name, '1')
    peer = tmp_path / 'python'
    answer = json.dumps({'version': '9', 'rates': {'1': {'prefill': 1, 'decode': 1}}})
    peer.write_text(f"#!/bin/sh\necho a line of noise\necho '{answer}'\n")
    peer.chmod(0o755)
    options = ['--tpmpi-model', f'bfloat16={bundled_model()}', '--tpmpi-options', '--kernels reference', '--ranks', '1',
               '--gguf', 'bfloat16=x', '--llama-python', str(peer), '--rounds', '1', '--repeat', '1', '--prompt-tokens', '4',
               '--new-tokens', '2']
    peers.main(options)
    text = capsys.readouterr().out
    assert '| bfloat16, llama.cpp 9 | **' in text and str(bundled_model()) in text
    peer.write_text('#!/bin/sh\necho why >&2\nexit 3\n')
    with pytest.raises(SystemExit, match='exit code 3 of .*\nwhy'):
        peers.main(options)
    assert sys.executable in text
