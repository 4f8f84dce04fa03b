"""Batches of the bundled model that are cut off again and again, in all ways and at any moment: nothing is lost.

    TPMPI_INTERRUPTIONS=100 pytest tests/test_interruptions.py -s
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

from batches import STOPPED, Job, batch, records, write_lines
from ranks import is_open_mpi

INTERRUPTIONS = int(os.environ.get('TPMPI_INTERRUPTIONS', 8))
SEED = int(os.environ.get('TPMPI_INTERRUPTIONS_SEED', 0)) or random.SystemRandom().randrange(1, 1_000_000)
PROMPTS = 200
OPENINGS = ('And the LORD said unto', 'In those days', 'Blessed is', 'Then Peter', 'The words of', 'My son,', 'Woe unto')
NEAR = 1e-3  # two tokens whose log-probabilities differ by less may change places when sums are taken in another order
KILLS = ('SIGKILL of a rank', 'SIGKILL of all', 'SIGSTOP of a rank')  # after which the last line may be torn
KINDS = {'SIGKILL of a rank': 30, 'SIGKILL of all': 30, 'SIGTERM to the launcher': 18, 'SIGTERM to a rank': 18,
         'SIGSTOP of a rank': 4}  # and how often


def strike(job: Job, kind: str, rng: random.Random) -> None:
    """One interruption."""
    pid = rng.choice(job.pids)
    if kind == 'SIGKILL of all':
        for process in job.processes():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
    elif kind == 'SIGTERM to the launcher':  # Open MPI's kills its ranks then, and passes on SIGUSR1
        job.launcher.send_signal(signal.SIGUSR1 if is_open_mpi() else signal.SIGTERM)
    else:
        os.kill(pid, getattr(signal, kind.split()[0]))


def whole_lines(output: Path, may_be_torn: bool) -> bytes:
    """The output as far as it is whole, each line of it JSON."""
    data = output.read_bytes() if output.exists() else b''
    whole = data[:data.rfind(b'\n') + 1]
    assert whole == data or may_be_torn, data[-200:]
    for line in whole.splitlines():
        json.loads(line)
    return whole


def compare(found: list[dict], expected: list[dict]) -> int:
    """Each request once, with the tokens of the uninterrupted run.  Returns how many differ from a near tie on."""
    expected, ties = {record['id']: record for record in expected}, 0
    assert sorted(record['id'] for record in found) == sorted(expected)
    for record in found:
        tokens, wanted = record['tokens'], expected[record['id']]
        if tokens != wanted['tokens']:
            at = next(i for i, (a, b) in enumerate(zip(tokens, wanted['tokens'], strict=False)) if a != b)
            near = {token: logprob for token, _, logprob in wanted['logprobs'][at]['top']}
            assert tokens[at] in near and abs(near[tokens[at]] - near[wanted['tokens'][at]]) < NEAR, (record, wanted, at)
            ties += 1
    return ties


def attempt(output: Path, options: tuple, rng: random.Random, seen: Counter) -> bool:
    """Begin or go on, and strike.  Returns whether the batch is complete."""
    size = rng.randint(1, 4)
    replicas, kind = rng.randint(1, size), rng.choices(list(KINDS), KINDS.values())[0]
    if kind == 'SIGSTOP of a rank' and size == 1:  # nobody watches one that is alone
        kind = 'SIGKILL of a rank'
    loading = kind != 'SIGSTOP of a rank' and rng.random() < 0.2
    before = whole_lines(output, may_be_torn=True)
    stall = 1 if kind == 'SIGSTOP of a rank' else 300
    with Job(size, *options, '--output', output, '--replicas', replicas, '--stall-timeout', stall) as job:
        job.wait_for_ranks()
        if loading or job.wait_for_work():
            time.sleep(rng.uniform(0, 1.2))
        computing, running = job.computes(), job.launcher.poll() is None
        if running:
            strike(job, kind, rng)
        code, said = job.end(60), job.said
    after = whole_lines(output, may_be_torn=kind in KILLS or not computing)
    assert after.startswith(before), f'finished lines have changed: {said}'
    seen['attempts'] += 1
    seen['results'] += after.count(b'\n') - before.count(b'\n')
    if after.count(b'\n') == PROMPTS:  # all was done before it struck
        return True
    assert running and code != 0, f'exit code {code} after {kind}: {said}'
    assert code == STOPPED or not (computing and 'SIGTERM' in kind), f'exit code {code} after {kind}: {said}'
    assert code != STOPPED or 'SIGTERM' in kind, f'exit code {code} after {kind}: {said}'
    seen[kind, 'computing' if computing else 'loading'] += 1
    seen['interruptions'] += 1
    seen[size, replicas] += 1
    return False


def table(seen: Counter, seconds: float) -> str:
    """What was done, for a person."""
    rows = [f'{"":26}{"loading":>10}{"computing":>10}']
    rows += [f'{kind:26}{seen[kind, "loading"]:10}{seen[kind, "computing"]:10}' for kind in KINDS]
    layouts = ', '.join(f'{size}/{replicas}: {seen[size, replicas]}' for size in range(1, 5) for replicas in range(1, size + 1))
    rows += [f'{seen["interruptions"]} interruptions of {seen["batches"]} batches of {PROMPTS} prompts, seed {SEED}',
             f'{seen["attempts"]} attempts, {seen["results"]} results, all of them compared; {seen["ties"]} differ from a near '
             f'tie on; {seconds:.0f} s', f'ranks/replicas: {layouts}']
    return '\n'.join(rows)


def test_whatever_cuts_a_batch_off_nothing_is_lost_and_nothing_done_twice(tmp_path):
    rng, seen, start = random.Random(SEED), Counter(), time.monotonic()
    print(f'\nTPMPI_INTERRUPTIONS_SEED={SEED}')
    while seen['interruptions'] < INTERRUPTIONS:
        number = seen['batches'] = seen['batches'] + 1
        lines = write_lines(tmp_path / f'{number}.jsonl', (
            {'id': i, 'prompt': f'{rng.choice(OPENINGS)} {rng.randint(0, 999)} ' * rng.randint(1, 4),
             'max_new_tokens': rng.randint(40, 120)} for i in range(PROMPTS)))
        output, reference = tmp_path / f'{number}.out', tmp_path / f'{number}.reference'
        options = ('--input', lines, '--lease-timeout', 2)
        batch(2, *options, '--output', reference, '--logprobs', 4)
        while seen['interruptions'] < INTERRUPTIONS and not attempt(output, options, rng, seen):
            pass
        before = whole_lines(output, may_be_torn=True)
        batch(2, *options, '--output', output)  # what is left, if anything
        assert output.read_bytes().startswith(before)
        seen['results'] += output.read_bytes().count(b'\n') - before.count(b'\n')
        ties = compare(records(output), records(reference))
        assert ties <= PROMPTS // 20
        seen['ties'] += ties
    print(table(seen, time.monotonic() - start))
