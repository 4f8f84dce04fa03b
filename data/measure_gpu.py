"""What a GPU makes of tpmpi: a random model of the shape of 8 billion parameters, every kind of weights and collective.

    python data/measure_gpu.py --ranks 1
    python data/measure_gpu.py --ranks 4 --collectives mpi staged nccl

Each run is `tpmpi.bench --device cuda --json`, and the table shows, in Markdown: prefill and decode in tokens/s, the parts
that they reach of the rates of products of bfloat16 and of copies measured in the same run, launches of a token, and the time
of all-reduces, of a token and of one alone.  A run that fails is a line with what it said.  `pytest -m gpu` shows first that
all results are right.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

COLUMNS = {'prefill_tokens_per_s': 'prefill, tokens/s', 'prefill_fraction': 'of the rate of products',
           'decode_tokens_per_s': 'decode, tokens/s',
           'bandwidth_fraction': 'of the rate of copies', 'launches_per_token': 'launches a token',
           'allreduce_us_per_token': 'all-reduce, us a token', 'allreduce_us_alone': 'one alone, us'}


def command(o: argparse.Namespace, kind: str, collective: str) -> list[str]:
    """The command line of one measurement, under the mpirun of this Python."""
    beside = Path(sys.executable).parent / 'mpirun'
    launcher = str(beside) if beside.exists() else shutil.which('mpirun') or 'mpirun'
    return [launcher, '-n', str(o.ranks), sys.executable, '-m', 'tpmpi.bench', '--device', 'cuda', '--json',
            *(('--model', str(o.model)) if o.model else ('--random', o.shape)), '--weights', kind, '--collective', collective,
            '--prompt-tokens', str(o.prompt_tokens), '--new-tokens', str(o.new_tokens), '--batch', str(o.batch),
            *shlex.split(o.options)]


def run(arguments: list[str]) -> dict:
    """What the measurement printed, or {'failed': the last line of what it said}."""
    print('…', shlex.join(arguments), file=sys.stderr, flush=True)
    root = str(Path(__file__).resolve().parent.parent)
    env = os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, [root, os.environ.get('PYTHONPATH')]))}
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        return {'failed': (done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def table(results: list[tuple[str, str, dict]]) -> str:
    """(weights, collective, what was found) of each run, as Markdown."""
    lines = ['| weights | sums | ' + ' | '.join(COLUMNS.values()) + ' |', '| --- ' * (2 + len(COLUMNS)) + '|']
    for kind, collective, found in results:
        cells = [f'{found[key]:.4g}' for key in COLUMNS] if 'failed' not in found else [found['failed'].replace('|', '\\|')]
        lines.append(' | '.join(['| ' + kind, found.get('collective', collective), *cells]) + ' |')
    return '\n'.join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ranks', type=int, default=1, metavar='N', help='one for each GPU (default: 1)')
    parser.add_argument('--shape', default='8b', help='of the random model: 1b, 8b, 70b (default: 8b)')
    parser.add_argument('--model', type=Path, metavar='FILE', help='a model, instead of it')
    parser.add_argument('--kinds', nargs='+', default=['bfloat16', 'int8', 'int4'], metavar='KIND', help='of weights')
    parser.add_argument('--collectives', nargs='+', default=['auto'], metavar='NAME',
                        help='auto, mpi, staged, nccl (default: auto)')
    parser.add_argument('--prompt-tokens', type=int, default=512, metavar='N')
    parser.add_argument('--new-tokens', type=int, default=64, metavar='N')
    parser.add_argument('--batch', type=int, default=1, metavar='B', help='sequences at once (default: 1)')
    parser.add_argument('--options', default='', metavar='TEXT', help='more options for tpmpi.bench, as in a shell')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, run=run) -> int:
    """Measure, and print the table; 1 where a run failed."""
    o = parse(argv)
    results = [(kind, collective, run(command(o, kind, collective))) for kind in o.kinds for collective in o.collectives]
    devices = [found['device'] for _, _, found in results if 'device' in found]
    print(f'{devices[0] if devices else "no GPU"}, {o.ranks} ranks, {o.model or o.shape}, batch {o.batch}: {o.prompt_tokens} + '
          f'{o.new_tokens} tokens\n\n{table(results)}')
    return int(any('failed' in found for _, _, found in results))


if __name__ == '__main__':
    sys.exit(main())
