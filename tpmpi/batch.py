"""Run a file of prompts and lose nothing:  mpirun -n 4 python -m tpmpi.batch --model M.h5 --input in.jsonl --output out.jsonl

One line of JSON for each request, and one for each result.  The same command, on any number of ranks, goes on where an
earlier one ended, however that ended.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from pathlib import Path
from time import perf_counter

import tpmpi
from tpmpi import api, session
from tpmpi.config import (
    ACTIVATION_DTYPES,
    COLLECTIVES,
    CUDA_GRAPHS,
    DEVICES,
    KERNELS,
    KV_DTYPES,
    STORED_KINDS,
    ConfigError,
    ModelConfig,
    RunConfig,
)

STOPPED = 75  # exit code of a run that can go on: EX_TEMPFAIL of sysexits.h
MAX_SEQUENCES = 64
STALL_SECONDS = 300.0
LOAD_SECONDS = 60.0  # without a sign of life, at least, while files are opened or closed or the model loaded: disks may be slow

log = logging.getLogger('tpmpi')


def seconds(text: str) -> float:
    """A duration as Slurm writes it: seconds, M:S, H:M:S, days-hours, D-H:M or D-H:M:S, but that one number is seconds."""
    days, dash, clock = text.rpartition('-')
    parts = clock.split(':')
    if len(parts) > 3 or (dash and not days.isdecimal()):
        raise ValueError(text)
    parts += ['0'] * (3 - len(parts)) if dash else []  # behind days come hours, whatever follows
    total = 0.0
    for part in parts:
        total = 60 * total + float(part)
    total += 86400 * int(days or 0)
    if not 0 < total < 1e9:
        raise ValueError(text)
    return total


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of a batch.  Raises SystemExit, as argparse does, for a bad one."""
    p = session.ArgumentParser('python -m tpmpi.batch', description=__doc__.partition('\n')[0])
    p.add_argument('--model', metavar='FILE', help='model file made by tpmpi.convert (default: the bundled one)')
    p.add_argument('--input', metavar='FILE', required=True, help='a request in each line, JSON: {"id", "prompt"} or '
                   '{"id", "messages"}, or the OpenAI batch format')
    p.add_argument('--output', metavar='FILE', required=True, help='a result in each line; what it holds is not done again')
    p.add_argument('--replicas', type=int, default=1, metavar='R', help='copies of the model that share the ranks')
    p.add_argument('--max-new-tokens', type=int, metavar='N', help='of a line that does not say (default: 128, or what fits)')
    p.add_argument('--temperature', type=float, default=0.0, help='of lines that are not in the OpenAI format, where it is 1 '
                   '(default: 0, the most probable token)')
    p.add_argument('--top-k', type=int, default=0, metavar='K')
    p.add_argument('--top-p', type=float, default=1.0, metavar='P')
    p.add_argument('--min-p', type=float, default=0.0, metavar='P')
    p.add_argument('--seed', type=int, default=0, help='with the number of the line: the same seed gives the same texts')
    p.add_argument('--stop', action='append', default=[], metavar='TEXT', help='end before this text; may be repeated')
    p.add_argument('--ignore-eos', action='store_true', help="go on after the model's end token")
    p.add_argument('--logprobs', type=int, default=0, metavar='K', help='the K best tokens of each step')
    p.add_argument('--prompt-logprobs', action='store_true', help='log-probability of each prompt token (scoring)')
    p.add_argument('--embeddings', action='store_true', help="the hidden state of each prompt's last token")
    p.add_argument('--kv-memory', metavar='SIZE', help="bytes of the KV cache on each rank, such as 4G, or a share of what is "
                   'free on the node, such as 60%% (default: 50%%, and no more than can be used)')
    p.add_argument('--max-sequences', type=int, default=MAX_SEQUENCES, metavar='N',
                   help=f'requests that are computed together (default: {MAX_SEQUENCES})')
    p.add_argument('--chunk', type=int, default=512, metavar='N', help='tokens of one step')
    p.add_argument('--no-prefix-sharing', action='store_true', help='compute equal beginnings of prompts again and again')
    p.add_argument('--context', type=int, metavar='N', help='attention sees the last N tokens, older ones roll off')
    p.add_argument('--sinks', type=int, default=0, metavar='N', help='and the first N tokens besides, however long the text')
    p.add_argument('--kv', choices=KV_DTYPES, help='element type of the KV cache (default: as tpmpi.run)')
    p.add_argument('--weights', choices=STORED_KINDS, help='kind of the matrices in memory (default: as in the file)')
    p.add_argument('--activations', default='float32', choices=ACTIVATION_DTYPES)
    p.add_argument('--kernels', default='auto', choices=KERNELS)
    p.add_argument('--device', default='auto', choices=DEVICES)
    p.add_argument('--collective', default='auto', choices=COLLECTIVES, help='how sums over the ranks go (see tpmpi.run)')
    p.add_argument('--share-gpu', action='store_true', help='several ranks may compute on one GPU')
    p.add_argument('--cuda-graphs', choices=CUDA_GRAPHS, default='auto', help='off: launch kernels of a GPU one by one')
    p.add_argument('--threads', type=int, metavar='N', help="per rank (default: the rank's fair share of the cores)")
    p.add_argument('--verify', action='store_true', help="check the model file's checksums while loading")
    p.add_argument('--time-limit', type=seconds, metavar='TIME', help='stop in time to be started again: seconds, or H:M:S')
    p.add_argument('--stall-timeout', type=seconds, default=STALL_SECONDS, metavar='TIME',
                   help=f'end when a rank takes no step for so long (default: {STALL_SECONDS:.0f})')
    p.add_argument('--lease-timeout', type=seconds, default=20.0, metavar='TIME',
                   help='another writer of the output that shows no life for so long is taken for dead (default: 20)')
    p.add_argument('--arrays', metavar='FILE', help='in the end also the numbers of all results, HDF5')
    p.add_argument('--report', metavar='FILE', help='figures of the run, JSON (default: OUTPUT.report.json)')
    options = p.parse_args(argv)
    for name in ('replicas', 'max_sequences', 'threads'):
        value = getattr(options, name)
        if value is not None and value < 1:
            p.error(f'--{name.replace("_", "-")} is {value}; expected at least 1')
    options.report = options.report or options.output + '.report.json'
    beside = [os.path.realpath(options.output) + suffix for suffix in ('.journal', '.lease', '.journal.tpmpi-new', '.tpmpi-new')]
    files = [options.model, options.input, options.output, options.report, options.arrays, *beside]
    files = [os.path.realpath(f) for f in files if f is not None]
    if len(set(files)) < len(files):
        p.error('--model, --input, --output with its journal and lease, --report and --arrays must be different files')
    return options


# ---- what rank 0 opens before a large model is read


def defaults_of(options: argparse.Namespace):
    """What holds for lines that do not say.  Raises ValueError for a value out of range, or a text that is not UTF-8."""
    from tpmpi.batch_format import Defaults
    from tpmpi.sampling import SamplingParams
    names = ('temperature', 'top_k', 'top_p', 'min_p', 'seed', 'ignore_eos', 'logprobs', 'prompt_logprobs')
    values = {name: getattr(options, name) for name in names}
    values['stop'] = tuple(session.decoded(os.fsencode(text), '--stop') for text in options.stop)
    SamplingParams(**values, max_new_tokens=options.max_new_tokens or 0)
    return Defaults(**values, max_new_tokens=options.max_new_tokens, embedding=options.embeddings)


def facts_of(options: argparse.Namespace, model: Path, lines) -> dict:
    """What decides the text of the results: an output is only continued with the same."""
    from tpmpi.file_layout import fingerprint, reason
    try:
        size = model.stat().st_size
        if not model.is_file():  # opening a pipe would wait for its writer
            raise ConfigError(f'{model} is no regular file; expected a model file made by tpmpi.convert')
        digest = fingerprint(model)
    except (OSError, TypeError, RuntimeError, KeyError) as e:  # what HDF5 raises over a damaged file
        raise ConfigError(f'{model}: {reason(e)}') from None
    names = ('max_new_tokens', 'temperature', 'top_k', 'top_p', 'min_p', 'seed', 'stop', 'ignore_eos', 'logprobs',
             'prompt_logprobs', 'embeddings', 'context', 'sinks', 'kv', 'weights', 'activations')
    return {'input': lines.facts, 'model': {'bytes': size, 'blake2b': digest},
            'options': {name: getattr(options, name) for name in names}}


def open_files(s: session.Session, options: argparse.Namespace):
    """On rank 0 the input and the output, with what is done already marked; None elsewhere."""
    if options.replicas > s.comm.size:
        raise ConfigError(f'--replicas is {options.replicas} with {s.comm.size} ranks; expected one rank or more for each')
    if s.comm.rank:
        return None
    from tpmpi.batch_format import record_key
    from tpmpi.batch_input import InputFile
    from tpmpi.results import Results

    def meanwhile():
        s.comm.while_waiting()  # which `compute` changes

    with contextlib.ExitStack() as unless_opened:
        lines = unless_opened.enter_context(InputFile(Path(options.input), meanwhile))
        facts = facts_of(options, api.bundled_model() if options.model is None else Path(options.model), lines)
        results = Results(Path(options.output), facts, same=lambda former, _: lines.changed(former),
                          stale_seconds=options.lease_timeout, hung_seconds=options.stall_timeout,
                          meanwhile=meanwhile)
        unless_opened.callback(results.close, complete=False)
        for name, path in (('report', options.report), ('arrays', options.arrays)):  # said before the work, not after it
            if path is not None and not Path(path).parent.is_dir():
                raise ConfigError(f'--{name} is {path}, and there is no folder {Path(path).parent}; make it, or choose another')
            if path is not None and Path(path).exists() and not Path(path).is_file():
                raise ConfigError(f'--{name} is {path}, which is no regular file; choose another')
        for record in results.existing():
            kind, key = record_key(record)
            line = key if kind == 'line' else lines.find(key)
            if line is not None:
                lines.mark_done(line)
                results.forget(line)
        Path(options.report).unlink(missing_ok=True)  # of an earlier run
        unless_opened.pop_all()
    return lines, results


# ---- the model's replicas


def load(s: session.Session, options: argparse.Namespace):
    """The model on this rank, as a part of its replica: (llm, the replica's communicator, its number)."""
    replica = s.comm.rank * options.replicas // s.comm.size
    group = s.comm.split(replica)
    group.while_waiting = s.comm.while_waiting
    llm = api.load(options.model, context=options.context, sinks=options.sinks, device=options.device, kv=options.kv,
                   chunk=options.chunk, verify=options.verify, weights=options.weights, kernels=options.kernels,
                   activations=options.activations, share_prefixes=not options.no_prefix_sharing,
                   collective=options.collective, share_gpu=options.share_gpu,
                   cuda_graphs=options.cuda_graphs, session=s, group=group)
    return llm, group, replica


def longest(config: ModelConfig, run: RunConfig) -> int:
    """Tokens of a text that takes as much of the cache as any: with a context one that rolls on, however long."""
    from tpmpi.kv_cache import rolling_tokens
    rolling = 0 if run.context is None else rolling_tokens(run.context, run.sinks, run.chunk, run.block)
    return max(config.max_positions + run.sinks + run.chunk, rolling)


def cache_blocks(s: session.Session, options: argparse.Namespace, llm: api.LLM, group) -> int:
    """Blocks of the cache, equal on all ranks of a replica: what the memory given holds, and no more than can be used."""
    from tpmpi.kv_cache import block_bytes, rings_blocks
    from tpmpi.memory import free_bytes, kv_bytes_per_rank, resident_bytes
    engine, config = llm.engine, llm.config
    run, model = engine.run, engine.model
    s.comm.exchange(None)  # all have loaded: what is free now is free
    gpu = engine.device.gpu
    on_node = s.comm.exchange_on_node((resident_bytes(), None if gpu is None else gpu.identity))[1]
    if gpu is None:
        free, sharers = free_bytes(resident=sum(resident for resident, _ in on_node)), s.local_size
    else:
        free, sharers = s.agreed(engine.device.free_bytes), sum(identity == gpu.identity for _, identity in on_node)
    given = s.agreed(lambda: kv_bytes_per_rank(options.kv_memory, sharers, free))
    each = block_bytes(config, model.shard, model.groups, run.block, engine.ops, run.kv_dtype)
    most = options.max_sequences * rings_blocks(model.groups, longest(config, run), run.chunk, run.block)
    blocks = min(group.exchange(min(most, given // each if each else most)))

    def check():
        if blocks < 1:
            raise ConfigError(f'the KV cache may take {given:,} bytes on this rank and one block of {run.block} positions takes '
                              f'{each:,}: give it more with --kv-memory, or use more ranks')
    s.agreed(check)
    return blocks


# ---- the run


def body(s: session.Session, options: argparse.Namespace) -> int:
    """Open, load, run, report; returns the exit code, on every rank alike."""
    s.stop_on_signals()
    start, began = perf_counter(), time.time()
    s.watch.where, s.comm.while_waiting = lambda: (0, s.comm.entered), lambda: s.watch.step(0)
    if s.comm.rank == 0:
        s.watch.expect_steps(max(options.stall_timeout, LOAD_SECONDS))
    defaults = s.agreed(defaults_of, options)
    files = s.agreed(open_files, s, options)
    try:
        return run(s, options, defaults, files, start, began)
    finally:
        if files is not None:  # after an error, too: what is finished is safe, and the next run finds the output free
            files[1].close(complete=False)
            files[0].close()


def run(s: session.Session, options: argparse.Namespace, defaults, files, start: float, began: float) -> int:
    """The batch, from loading the model to the report."""
    from tpmpi.dispatch import Queue
    from tpmpi.progress import Energy
    queue = engine = energy = None
    if s.comm.rank == 0:
        limit = float('inf') if options.time_limit is None else start + options.time_limit
        queue = Queue(*files, options.replicas, lambda: s.watch.stop_requested or perf_counter() > limit)
        log.info('%s: %d requests, %d done before; %d replica%s on %d rank%s', options.input, queue.total, queue.before,
                 options.replicas, 's' * (options.replicas > 1), s.comm.size, 's' * (s.comm.size > 1))
    loaded = perf_counter()
    if s.comm.share(queue is None or queue.left > 0):  # otherwise there is nothing to load a model for
        llm, group, number = load(s, options)
        began_first = s.comm.share(None if queue is None else files[1].began)
        if llm.tokenizer is not None:
            llm.tokenizer.now = began_first  # a template that writes the date writes the same one after a restart
        engine, blocks = llm.engine, cache_blocks(s, options, llm, group)
        s.agreed(engine.allocate, blocks, options.max_sequences)
        energy = Energy() if s.local_rank == 0 else None
        if queue is not None:
            s.watch.expect_steps(options.stall_timeout)
            log.info('%d blocks of %d positions in the cache of each replica', blocks, engine.run.block)
        loaded = perf_counter()
        compute(s, options, defaults, engine, group, number, queue, energy)
    s.watch.where = lambda: (0, s.comm.entered)
    if queue is not None:
        s.watch.expect_steps(max(options.stall_timeout, LOAD_SECONDS))
    figures = s.comm.exchange(rank_figures(s, engine, energy))

    def conclude() -> bool:
        if queue is None:
            return True
        complete = close_files(options, queue, *files)
        report(s, options, queue, figures, complete, loaded - start, perf_counter() - loaded, began)
        return complete
    complete = s.comm.share(s.agreed(conclude))
    if queue is not None:
        s.watch.expect_steps(float('inf'))  # nobody takes steps from here on
    return 0 if complete else STOPPED


def compute(s: session.Session, options: argparse.Namespace, defaults, engine, group, number: int, queue, energy) -> None:
    """All requests, until none is left or the run is to stop.  queue: on rank 0; energy: on the first rank of a node."""
    from tpmpi.comm import Mail
    from tpmpi.dispatch import Replica, follow, lead_all, lead_replica
    from tpmpi.progress import Progress
    leaders = s.comm.split(0 if group.rank == 0 else 1)
    progress = None if queue is None else Progress(queue.total, queue.before)
    beats = 0

    def beat():
        nonlocal beats
        beats += 1
        s.watch.step(engine.steps)
        if energy is not None and beats % 1000 == 0:
            energy.poll()
        if progress is not None:
            progress.update(queue.before + queue.finished + queue.failed, queue.tokens, sum(queue.held), queue.left)

    s.watch.where = lambda: (number, group.entered)
    group.while_waiting = s.comm.while_waiting = lambda: s.watch.step(engine.steps)
    if group.rank == 0:
        mail = Mail(leaders)
        replica = Replica(engine, defaults, Path(options.model or 'bundled').stem, options.max_sequences)
        if queue is not None:
            lead_all(queue, replica, mail, beat)
        else:
            lead_replica(replica, mail, beat)
        mail.close()
    else:
        follow(engine, beat)
    s.comm.exchange(None)  # all have ended
    if progress is not None:
        progress.close()


def close_files(options: argparse.Namespace, queue, lines, results) -> bool:
    """Rank 0: everything on disk; returns whether the batch is complete.  Raises the error that stopped it."""
    from tpmpi.arrays import numbers_of, write_arrays
    if queue.error is not None:
        raise queue.error
    complete = lines.remaining == 0
    if complete and options.arrays is not None:
        results.flush()
        write_arrays(Path(options.arrays), filter(None, map(numbers_of, results.existing())))
    results.close(complete)
    return complete


def rank_figures(s: session.Session, engine, energy) -> dict:
    """What the report says of this rank; engine: None where there was nothing to do."""
    from tpmpi.memory import peak_bytes
    figures = {'host': s.host, 'seconds': {}, 'all_reduce_seconds': 0.0, 'steps': 0, 'peak_bytes': peak_bytes(),
               'energy': None if energy is None else energy.read(), 'shared_tokens': 0, 'preemptions': 0}
    if engine is not None:
        figures |= {'seconds': {name: round(value, 3) for name, value in engine.seconds.items()}, 'steps': engine.steps,
                    'all_reduce_seconds': round(engine.comm.traffic['all_reduce'].seconds, 3)}
        if engine.scheduler:
            figures |= {'shared_tokens': engine.scheduler.shared_tokens, 'preemptions': engine.scheduler.preemptions}
    return figures


def report(s: session.Session, options: argparse.Namespace, queue, figures: list[dict], complete: bool, load_seconds: float,
           run_seconds: float, began: float) -> None:
    """The report's file and the closing line."""
    from tpmpi.progress import node_list, write_report
    joules = [f['energy'] for f in figures if f['energy'] is not None]

    def sum_of(name):
        known = [j[name] for j in joules if j[name] is not None]
        return round(sum(known), 1) if known else None

    rate = queue.tokens / run_seconds if run_seconds else 0.0
    write_report(Path(options.report), {
        'complete': complete, 'requests': queue.total, 'done': queue.finished, 'failed': queue.failed,
        'skipped': queue.before,
        'tokens': queue.tokens, 'prompt_tokens': queue.prompt_tokens, 'tokens_per_s': round(rate, 2),
        'began': time.strftime('%Y-%m-%dT%H:%M:%S%z', time.localtime(began)),
        'load_seconds': round(load_seconds, 3), 'run_seconds': round(run_seconds, 3),
        'shared_prompt_tokens': sum(f['shared_tokens'] for f in figures), 'preemptions': sum(f['preemptions'] for f in figures),
        'replicas': options.replicas, 'threads': s.threads, 'nodes': node_list([f['host'] for f in figures]),
        'rapl_joules': sum_of('rapl_joules'), 'gpu_joules': sum_of('gpu_joules'),
        'ranks': [{key: f[key] for key in ('host', 'steps', 'seconds', 'all_reduce_seconds', 'peak_bytes')} for f in figures],
        'job': {name: os.environ[name] for name in ('SLURM_JOB_ID', 'SLURM_ARRAY_JOB_ID', 'SLURM_ARRAY_TASK_ID',
                                                    'SLURM_RESTART_COUNT') if name in os.environ},
        'tpmpi': tpmpi.__version__})
    left = queue.total - queue.before - queue.finished - queue.failed
    counts = f'{queue.finished} done, {queue.failed} failed, {queue.before} skipped'
    if complete:
        log.info('done: %s; %.1f tokens/s', counts, rate)
    else:
        log.info('stopped: %s, %d left; the same command goes on', counts, left)


def main(argv: list[str] | None = None) -> int:
    """The command; returns this rank's exit code."""
    return session.command(body, parse, argv)


if __name__ == '__main__':
    sys.exit(main())
