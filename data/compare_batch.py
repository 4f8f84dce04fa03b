"""Compare tpmpi.batch with vLLM's offline generation on one file of prompts, in turn; prints a table in Markdown.

    python data/compare_batch.py --model smollm2-int8.h5 --options='--weights int8 --activations int8' \
        --vllm-python vllm/bin/python --vllm-model smollm2-folder

The prompts are random token ids, all different; --common N makes the first N of them the same in all.  Each round runs
tpmpi.batch once for each --options, and vLLM with all prompts given at once; the table shows medians of new tokens per
second, without the time to load, and of the rounds' ratios.  --one adds a run of tpmpi with one sequence at a time, on an
eighth of the prompts.  What compare_peers.py says of a quiet machine holds here, too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import compare_peers


def write_prompts(path: Path, o: argparse.Namespace) -> None:
    """The input of both sides, a JSON object a line."""
    source = random.Random(0)
    common = [source.randrange(100, 20000) for _ in range(o.common)]
    with open(path, 'w') as file:
        for index in range(o.prompts):
            prompt = common + [source.randrange(100, 20000) for _ in range(o.prompt_tokens - o.common)]
            file.write(json.dumps({'id': index, 'prompt': prompt, 'max_new_tokens': o.new_tokens, 'ignore_eos': True}) + '\n')


def run_vllm(o: argparse.Namespace) -> dict:
    """Run under vLLM's Python: {'version', 'rates'}, one rate for each repetition."""
    vllm = compare_peers.import_vllm()
    lines = [json.loads(line) for line in Path(o.input).read_text().splitlines()]
    longest = max(len(line['prompt']) + line['max_new_tokens'] for line in lines)
    llm = vllm.LLM(o.vllm_model, dtype=o.vllm_dtype, max_model_len=longest + 8, enable_prefix_caching=o.common > 0)

    def rate(asked: list[dict]) -> float:
        params = [vllm.SamplingParams(temperature=0, max_tokens=line['max_new_tokens'], ignore_eos=True) for line in asked]
        start = perf_counter()
        done = llm.generate([{'prompt_token_ids': line['prompt']} for line in asked], params, use_tqdm=False)
        return sum(len(each.outputs[0].token_ids) for each in done) / (perf_counter() - start)

    rate([line | {'prompt': line['prompt'][::-1]} for line in lines])  # a warm-up, of other prompts
    return {'version': vllm.__version__, 'rate': rate(lines)}


def run_tpmpi(o: argparse.Namespace, options: str, source: Path, one: bool = False) -> float:
    """New tokens per second of one run of tpmpi.batch.  Raises SystemExit when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / 'out.jsonl'
        command = [*compare_peers.launcher(o.ranks), '-m', 'tpmpi.batch', '--model', o.model, '--input', str(source), '--output',
                   str(output), '--threads', str(max(1, o.cores // o.ranks)), *shlex.split(options)]
        command += ['--max-sequences', '1'] if one else []
        print('…', shlex.join(command), file=sys.stderr, flush=True)
        done = subprocess.run(command, env=compare_peers.environment(o), capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise SystemExit(f'exit code {done.returncode} of {shlex.join(command)}\n{done.stderr[-2000:]}')
        report = json.loads(Path(f'{output}.report.json').read_text())
        asked = [json.loads(line)['max_new_tokens'] for line in source.read_text().splitlines()]
        if report['tokens'] != sum(asked):
            raise SystemExit(f'{report["tokens"]} new tokens; expected {sum(asked)}')
        return report['tokens_per_s']


def parse(argv: list[str]) -> argparse.Namespace:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', metavar='FILE', help="tpmpi's")
    p.add_argument('--options', action='append', metavar='TEXT', help='of tpmpi.batch, as in a shell; may be repeated')
    p.add_argument('--one', action='store_true', help='one sequence at a time besides, with the first --options')
    p.add_argument('--vllm-python', metavar='FILE', help='the Python that has vLLM')
    p.add_argument('--vllm-model', metavar='FOLDER')
    p.add_argument('--vllm-dtype', default='bfloat16', metavar='TYPE')
    p.add_argument('--prompts', type=int, default=64, metavar='N')
    p.add_argument('--prompt-tokens', type=int, default=100, metavar='N')
    p.add_argument('--common', type=int, default=0, metavar='N', help='tokens that all prompts begin with (default: 0)')
    p.add_argument('--new-tokens', type=int, default=100, metavar='N')
    p.add_argument('--rounds', type=int, default=3, metavar='N', help='of runs in turn (default: 3)')
    p.add_argument('--ranks', type=int, metavar='N', help='of tpmpi (default: one on each core)')
    p.add_argument('--cores', type=int, metavar='N', help='cores that everyone may use (default: all)')
    p.add_argument('--input', help=argparse.SUPPRESS)  # run as vLLM
    o = p.parse_args(argv)
    o.cores = o.cores or len(os.sched_getaffinity(0))
    o.ranks, o.options = o.ranks or o.cores, o.options or ['']
    if not o.input and not o.model:
        p.error('nothing to run; give --model')
    if not 0 <= o.common < o.prompt_tokens:
        p.error(f'--common is {o.common}; expected 0 to {o.prompt_tokens - 1}')
    return o


def compare(o: argparse.Namespace, source: Path) -> str:
    """All rounds, and their table."""
    ours, alone, theirs = {options: [] for options in o.options}, [], []
    few = source.with_name('few.jsonl')
    few.write_text(''.join(source.read_text().splitlines(keepends=True)[:max(1, o.prompts // 8)]))
    version = ''
    for _ in range(o.rounds):
        for options in o.options:
            ours[options].append(run_tpmpi(o, options, source))
        if o.one:
            alone.append(run_tpmpi(o, o.options[0], few, one=True))
        if o.vllm_python:
            command = [o.vllm_python, str(Path(__file__).resolve()), *sys.argv[1:], '--input', str(source)]
            found = compare_peers.run(command, compare_peers.environment(o, 'vllm'))
            theirs.append(found['rate'])
            version = found['version']
    rows = [(f'tpmpi.batch {options}', rates) for options, rates in ours.items()]
    rows += [('one sequence at a time', alone)] if alone else []
    rows += [(f'vLLM {version}, {o.vllm_dtype}', theirs)] if theirs else []
    lines = [f'{o.prompts} prompts of {o.prompt_tokens} tokens, {o.common} of them common, {o.new_tokens} new ones each; '
             f'{o.ranks} ranks on {o.cores} cores; medians of {o.rounds} rounds.', '',
             '| | new tokens/s | of vLLM | all rounds |', '| --- | --- | --- | --- |']
    for name, rates in rows:
        ratio = f'{statistics.median(a / b for a, b in zip(rates, theirs, strict=True)):.2f}' if theirs else ''
        lines.append(f'| {name} | {statistics.median(rates):,.0f} | {ratio} | {", ".join(f"{rate:,.0f}" for rate in rates)} |')
    return '\n'.join(lines)


def main() -> None:
    """The command, or vLLM's run."""
    o = parse(sys.argv[1:])
    if o.input:
        print(json.dumps(run_vllm(o)))
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:o.cores])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / 'prompts.jsonl'
        write_prompts(source, o)
        print(compare(o, source))


if __name__ == '__main__':
    main()
