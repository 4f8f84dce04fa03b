"""Measure how fast a model runs, and how near to the memory's limit:  mpirun -n 2 python -m tpmpi.bench --model model.h5

A round is the prefill of a batch of random prompts, each by itself, and the decode of all of them together.  Medians of
the rounds are set beside the rate at which the same cores, all ranks at once, can read memory; of GPUs beside the rate at
which they copy a large buffer, read and written, by their own clocks.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import tpmpi
from tpmpi import api, session
from tpmpi.config import ACTIVATION_DTYPES, COLLECTIVES, CUDA_GRAPHS, DEVICES, KERNELS, KV_DTYPES, STORED_KINDS, ConfigError

PROMPT_TOKENS, NEW_TOKENS = 512, 64
STREAM_TOTAL = 1 << 30  # bytes that all ranks together stream at least: far more than their caches hold
STREAM_MOST = 4 << 30  # bytes that one rank streams at most: more would show nothing new, and may not be there
STREAM_PASSES = 5
SUMS = 50  # all-reduces that are timed alone
MOST_PRODUCT = 8192  # rows and columns of the product of two matrices that is timed alone


@dataclass
class Round:
    """What one round gave on this rank."""

    tokens: list[list[int]]  # of each sequence: the token that its prompt gave, then one for each step of decode
    prefill_seconds: float  # until the last sequence's first token is chosen
    decode_seconds: float
    all_reduce_seconds: float  # in decode
    all_reduce_bytes: int  # in decode
    launches: int  # in decode, of a GPU's kernels


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of a measurement.  Raises SystemExit, as argparse does, for a bad one."""
    p = session.ArgumentParser('python -m tpmpi.bench', description=__doc__.partition('\n')[0])
    p.add_argument('--model', metavar='FILE', help='model file made by tpmpi.convert (default: the bundled one)')
    p.add_argument('--random', choices=('1b', '8b', '70b', 'tiny'), metavar='SHAPE', help='instead: random weights of the shape '
                   'of so many parameters, 1b, 8b or 70b; no file is needed')
    p.add_argument('--prompt-tokens', type=int, metavar='N', help=f'random tokens in each prompt (default: {PROMPT_TOKENS}, '
                   'or what fits); decode starts at this depth')
    p.add_argument('--new-tokens', type=int, default=NEW_TOKENS, metavar='N', help=f'steps of decode (default: {NEW_TOKENS})')
    p.add_argument('--batch', type=int, default=1, metavar='N', help='sequences that are decoded together (default: 1)')
    p.add_argument('--repeat', type=int, default=3, metavar='N', help='rounds, after one to warm up (default: 3)')
    p.add_argument('--weights', choices=STORED_KINDS, help='kind of the matrices in memory (default: as in the file)')
    p.add_argument('--kernels', choices=KERNELS, help='of the CPU: cpu, compiled by Numba, or reference, NumPy')
    p.add_argument('--activations', choices=ACTIVATION_DTYPES, help='what they may be rounded to (see tpmpi.run)')
    p.add_argument('--kv', choices=KV_DTYPES, help='element type of the KV cache (default: as tpmpi.run)')
    p.add_argument('--chunk', type=int, metavar='N', help='prompt tokens computed at once')
    p.add_argument('--device', choices=DEVICES)
    p.add_argument('--collective', choices=COLLECTIVES, help='how sums over the ranks go (see tpmpi.run)')
    p.add_argument('--share-gpu', action='store_true', default=None, help='several ranks may compute on one GPU')
    p.add_argument('--cuda-graphs', choices=CUDA_GRAPHS, help='off: launch kernels of a GPU one by one (default: auto)')
    p.add_argument('--threads', type=int, metavar='N', help="per rank (default: the rank's fair share of the cores)")
    p.add_argument('--json', action='store_true', help='one JSON object instead of the table')
    options = p.parse_args(argv)
    if options.model is not None and options.random is not None:
        p.error('--random takes the place of --model; give one of them')
    for name in ('prompt_tokens', 'new_tokens', 'batch', 'repeat'):
        value = getattr(options, name)
        if value is not None and value < 1:
            p.error(f'--{name.replace("_", "-")} is {value}; expected at least 1')
    return options


def prompt_length(asked: int | None, new_tokens: int, max_positions: int) -> int:
    """Tokens of each prompt.  Raises ConfigError when prompt and new tokens are more than the model's positions."""
    length = max(1, min(PROMPT_TOKENS, max_positions - new_tokens)) if asked is None else asked
    if length + new_tokens > max_positions:
        raise ConfigError(f'--prompt-tokens {length} and --new-tokens {new_tokens} are {length + new_tokens} positions; '
                          f'the model was trained for {max_positions}: ask for fewer')
    return length


# ---- a round


class Batch:
    """Random prompts and the cache that their rounds use again and again."""

    def __init__(self, engine, size: int, prompt_tokens: int, new_tokens: int):
        import numpy as np

        from tpmpi.kv_cache import KVCache, Ring, ring_blocks
        model, run = engine.model, engine.run
        self.prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (size, prompt_tokens))
        self.new_tokens = new_tokens
        total, free, self.rings = prompt_tokens + new_tokens, 0, []  # for each prompt, one for each group of layers
        needed = [ring_blocks(total, group.window, run.chunk, run.block)[0] for group in model.groups]
        for _ in range(size):
            ends = free + np.cumsum(needed)
            self.rings.append([Ring(np.arange(end - each, end), run.block) for each, end in zip(needed, ends, strict=True)])
            free = int(ends[-1])
        self.cache = KVCache(model.config, model.shard, model.groups, free, run.block, engine.ops, run.kv_dtype,
                             engine.device.xp)
        self.layers = engine.layers_of(self.cache)


def run_round(engine, batch: Batch) -> Round:
    """Prefill all prompts, one after another, then decode all sequences together.  All ranks call it at once."""
    import numpy as np

    from tpmpi.model import Step, forward
    model, ops, comm, chunk = engine.model, engine.ops, engine.comm, engine.run.chunk
    depth = batch.prompts.shape[1]
    engine.on_phase('prefill')
    start = perf_counter()
    firsts = []
    for prompt, rings in zip(batch.prompts, batch.rings, strict=True):
        for at in range(0, depth, chunk):
            part = prompt[at:at + chunk]
            step = Step.of(part, *((ring.segment(0, at, len(part), depth),) for ring in rings))
            hidden = forward(step, model, batch.cache, ops, comm, batch.layers)
        firsts.append(best_tokens(hidden[-1:], engine))
    tokens = [np.concatenate(firsts)]  # each [batch]
    prefill_seconds = perf_counter() - start

    engine.on_phase('decode')
    traffic = comm.traffic['all_reduce']
    seconds, nbytes, launches, start = traffic.seconds, traffic.bytes, getattr(ops, 'launches', 0), perf_counter()
    for position in range(depth, depth + batch.new_tokens):
        segments = [[ring.segment(row, position, 1) for ring in rings] for row, rings in enumerate(batch.rings)]
        step = Step.of(tokens[-1], *zip(*segments, strict=True))
        tokens.append(best_tokens(forward(step, model, batch.cache, ops, comm, batch.layers), engine))
    decode_seconds = perf_counter() - start
    return Round(np.stack(tokens, axis=1).tolist(), prefill_seconds, decode_seconds,
                 traffic.seconds - seconds, traffic.bytes - nbytes, getattr(ops, 'launches', 0) - launches)


def best_tokens(hidden, engine):
    """The most probable next token of each row, over the vocabulary of all ranks.  [rows, hidden] -> [rows], on all ranks"""
    import numpy as np

    from tpmpi.model import logits
    from tpmpi.sampling import most_probable
    comm, vocab = engine.comm, engine.model.shard.vocab
    mine = np.full((len(hidden), 2), -np.inf)  # of each row this rank's largest logit, and whose it is
    if len(vocab):
        _, mine[:, 0], best = most_probable(logits(hidden, engine.model, engine.ops), engine.ops)
        mine[:, 1] = best + vocab.start
    everyone = np.empty((comm.size, *mine.shape)) if comm.rank == 0 else None
    comm.gather(mine, everyone)
    chosen = np.empty(len(mine), np.int64)
    if everyone is not None:
        chosen[:] = everyone[everyone[:, :, 0].argmax(axis=0), np.arange(len(mine)), 1]
    comm.broadcast(chosen)
    return chosen


# ---- the memory's limit


def read_all(buffer, threads: int) -> None:
    """Read every byte of a float32 array with so many threads, as fast as NumPy can: the largest of its bits as integers.

    (Measured: 20 GB/s on a core, against 18 for a sum of squares by the BLAS, which also keeps to one thread.)
    """
    import numpy as np
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(np.max, np.array_split(buffer.view(np.int32), threads)))


def stream_buffer(weight_bytes: int, ranks: int):
    """What a rank streams: as many bytes as its weights have, within limits, and written to, so that they exist."""
    import numpy as np
    return np.ones(min(max(weight_bytes, STREAM_TOTAL // ranks), STREAM_MOST) // 4, np.float32)


def copy_buffers(device, weight_bytes: int, ranks: int) -> tuple:
    """What a rank copies on its GPU, and where to: as large as a CPU's buffer, where memory is left for both."""
    size = min(max(weight_bytes, STREAM_TOTAL // ranks), STREAM_MOST, device.free_bytes() // 16) // 4
    return device.xp.ones(size, device.xp.float32), device.xp.empty(size, device.xp.float32)


def copy_seconds(comm, device, source, target) -> list[float]:
    """This rank's times, by events of its stream, for copying one buffer to the other, in passes that all begin together."""
    times, cuda = [], device.xp.cuda
    for _ in range(STREAM_PASSES + 1):
        begin, end = cuda.Event(), cuda.Event()
        device.synchronize()
        comm.exchange(None)
        begin.record(device.stream)
        device.xp.copyto(target, source)
        end.record(device.stream)
        end.synchronize()
        times.append(cuda.get_elapsed_time(begin, end) / 1e3)
    return times[1:]


def product_flops(engine) -> float:
    """This rank's median rate for a square product of bfloat16 by the GPU's library, as large as the model's, in 1/s.

    It is smaller where little memory is left: six bytes for each number, of a fourth of what is free.
    """
    device = engine.device
    size = min(MOST_PRODUCT, -(-engine.model.config.ffn_size // 64) * 64, int((device.free_bytes() / 24) ** 0.5) // 64 * 64)
    xp, cuda, times = device.xp, device.xp.cuda, []
    x = xp.asarray(_random_halves(size))
    y = xp.empty((size, size), xp.float32)
    for _ in range(STREAM_PASSES + 1):
        begin, end = cuda.Event(), cuda.Event()
        begin.record(device.stream)
        engine.ops.products.add_product(x, x, y, first=True)
        end.record(device.stream)
        end.synchronize()
        times.append(cuda.get_elapsed_time(begin, end) / 1e3)
    return 2 * size**3 / statistics.median(times[1:])


def _random_halves(size: int):
    """A square of random numbers as the bits of bfloat16: of zeros a product is faster."""
    import numpy as np

    from tpmpi.weights import encode_bfloat16
    return encode_bfloat16(np.random.default_rng(0).standard_normal((size, size), np.float32))


def flops_per_token(model) -> int:
    """Of this rank's matrices in all layers, of experts those that one token goes to."""
    def count(weight) -> float:
        return sum(map(count, weight.data)) if weight.kind == 'mixed' else 2.0 * weight.in_features * weight.out_features

    chosen, total = model.config.experts_per_token, 0.0
    for layer in model.layers:
        total += sum(count(w) for w in layer.matrices)
        if hasattr(layer.mlp, 'router'):
            total += (chosen - 1) * (count(layer.mlp.up) + count(layer.mlp.down))
    return round(total)


def sum_seconds(engine, rows: int) -> float:
    """This rank's median time for one all-reduce of what a layer of such a step sums, with nothing else under way."""
    device, times = engine.device, []
    x = device.xp.zeros((rows, engine.model.config.hidden_size), device.xp.float32)
    for _ in range(SUMS + 1):
        device.synchronize()
        start = perf_counter()
        engine.comm.all_reduce(x)
        device.synchronize()
        times.append(perf_counter() - start)
    return statistics.median(times[1:])


def stream_seconds(comm, buffer, read) -> list[float]:
    """This rank's times for reading its buffer, in passes that all ranks begin together."""
    times = []
    for _ in range(STREAM_PASSES + 1):
        comm.exchange(None)
        start = perf_counter()
        read(buffer)
        times.append(perf_counter() - start)
    return times[1:]


# ---- the report


def measure(llm: api.LLM, options: argparse.Namespace) -> dict:
    """All figures; a collective call, with the same result on every rank."""
    comm, engine, model = llm.session.comm, llm.engine, llm.engine.model
    depth = llm.session.agreed(prompt_length, options.prompt_tokens, options.new_tokens, llm.config.max_positions)
    batch = llm.session.agreed(Batch, engine, options.batch, depth, options.new_tokens)
    rounds = [run_round(engine, batch) for _ in range(options.repeat + 1)][1:]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # before the buffer to stream comes
    all_rounds = list(zip(*comm.exchange(rounds), strict=True))  # [repeat][rank]

    def per_round(function) -> float:
        return statistics.median(map(function, all_rounds))

    decoded = options.batch * options.new_tokens
    step = per_round(lambda ranks: max(r.decode_seconds for r in ranks)) / options.new_tokens
    weights = comm.exchange(model.bytes_per_token)
    engine.on_phase('stream')
    if engine.device.gpu is None:
        buffer = llm.session.agreed(stream_buffer, model.bytes_per_token, comm.size)
        read = getattr(engine.ops, 'stream', None) or partial(read_all, threads=llm.session.threads)
        moved, times = buffer.nbytes, stream_seconds(comm, buffer, read)
    else:
        buffers = llm.session.agreed(copy_buffers, engine.device, model.bytes_per_token, comm.size)
        moved, times = 2 * buffers[0].nbytes, copy_seconds(comm, engine.device, *buffers)  # read and written
    everyone = comm.exchange((moved, times))
    passes = zip(*(times for _, times in everyone), strict=True)
    stream = sum(moved for moved, _ in everyone) / statistics.median(max(ranks) for ranks in passes)
    prefill = options.batch * depth / per_round(lambda ranks: max(r.prefill_seconds for r in ranks))
    of_gpus = {}
    if engine.device.gpu is not None:
        products, alone = sum(comm.exchange(product_flops(engine))), 0.0
        if comm.size > 1:
            alone = max(comm.exchange(sum_seconds(engine, options.batch)))
        of_gpus = {
            'product_tflops': round(products / 1e12, 3),
            'prefill_fraction': round(prefill * sum(comm.exchange(flops_per_token(model))) / products, 4),
            'copy_gb_per_s_by_rank': [round(moved / statistics.median(times) / 1e9, 3) for moved, times in everyone],
            'launches_per_token': round(rounds[0].launches / decoded, 3),
            'collective': 'none' if comm.size == 1 else comm.carrier.name,
            'allreduce_us_alone': round(1e6 * alone, 3)}
    return of_gpus | {
        'prefill_tokens_per_s': round(prefill, 3),
        'decode_tokens_per_s': round(options.batch / step, 3),
        'weights_gb_per_s': round(sum(weights) / step / 1e9, 3),
        'weights_gb_per_s_by_rank': [round(w / step / 1e9, 3) for w in weights],
        'stream_gb_per_s': round(stream / 1e9, 3),
        'bandwidth_fraction': round(sum(weights) / step / stream, 4),
        'allreduce_us_per_token': round(
            1e6 * per_round(lambda ranks: statistics.mean(r.all_reduce_seconds for r in ranks)) / decoded, 3),
        'allreduce_bytes_per_token': rounds[0].all_reduce_bytes // decoded,
        'peak_rss_mb': [round(m, 1) for m in comm.exchange(memory)],
        'ranks': comm.size, 'threads': llm.session.threads, 'batch': options.batch, 'prompt_tokens': depth,
        'new_tokens': options.new_tokens, 'weights': weight_kinds(model), 'weights_mb': round(sum(weights) / 1e6, 3),
        'kernels': getattr(engine.ops, '__name__', type(engine.ops).__module__).rpartition('.')[2],  # a module, or of a class
        'activations': engine.run.activations, 'kv': engine.run.kv_dtype, 'chunk': engine.run.chunk, 'device': engine.device.name}


def weight_kinds(model) -> str:
    """How the kernels hold the matrices of a step: one kind, or several joined by +, the one with most bytes first."""
    from tpmpi.weights import Weight
    found: dict[str, int] = {}

    def add(weight: Weight):
        if weight.kind == 'mixed':
            for part in weight.data:
                add(part)
        else:
            found[weight.kind] = found.get(weight.kind, 0) + weight.nbytes

    for weight in (model.head.weight, *(w for layer in model.layers for w in layer.matrices)):
        add(weight)
    return '+'.join(sorted(found, key=lambda kind: -found[kind]))


def table(f: dict) -> str:
    """The figures for a reader."""
    by_rank = ' '.join(f'{rate:.1f}' for rate in f['weights_gb_per_s_by_rank'])
    memory = ' '.join(f'{m:,.0f}' for m in f['peak_rss_mb'])
    sequences, depth = f'{f["batch"]} sequence' + 's' * (f['batch'] > 1), f['prompt_tokens']
    rows = {
        'machine': f['machine'] + (f', {f["device"]}' if 'collective' in f else ''),
        'run': f'{f["model"]}, {f["weights"]} weights, {f["kernels"]} kernels, {f["ranks"]} rank{"s" * (f["ranks"] > 1)} x '
               f'{f["threads"]} thread{"s" * (f["threads"] > 1)}, loaded in {f["load_seconds"]:.1f} s',
        'prefill': f'{f["prefill_tokens_per_s"]:,.1f} tokens/s  ({sequences} of {depth} tokens)',
        'decode': f'{f["decode_tokens_per_s"]:,.1f} tokens/s  ({sequences}, {f["new_tokens"]} steps at depth {depth})',
        'weights read': f'{f["weights_gb_per_s"]:.1f} GB/s  (by rank: {by_rank})',
        'memory allows': f'{f["stream_gb_per_s"]:.1f} GB/s, of which decode reaches {f["bandwidth_fraction"]:.0%}',
        'all-reduce': f'{f["allreduce_us_per_token"]:,.0f} us and {f["allreduce_bytes_per_token"]:,} bytes per token',
        'peak memory': f'{memory} MB  (by rank)'}
    if 'collective' in f:
        rows['prefill'] += f', {f["prefill_fraction"]:.0%} of what products of bfloat16 reach, {f["product_tflops"]:,.0f} TFLOP/s'
        rows['memory allows'] += '  (copies, read and written)'
        rows['all-reduce'] += f' by {f["collective"]}, each {f["allreduce_us_alone"]:,.0f} us with nothing else under way'
        rows['launches'] = f'{f["launches_per_token"]:,.1f} per token'
    return '\n'.join(f'{name:<14} {text}' for name, text in rows.items())


def name_of(options: argparse.Namespace) -> str:
    """What is measured, in words."""
    return f'random weights, shape {options.random}' if options.random else str(options.model or 'bundled model')


def random_model(s: session.Session, options: argparse.Namespace):
    """What is read instead of a file; its tokenizer is the bundled model's, for the texts are random, too."""
    from tpmpi.checkpoint import CheckpointReader
    from tpmpi.random_model import SHAPES, RandomReader

    def make():
        with CheckpointReader(api.bundled_model()) as bundled:
            return RandomReader(SHAPES[options.random], options.weights or 'bfloat16', bundled.tokenizer)

    return s.agreed(make)


def body(s: session.Session, options: argparse.Namespace) -> int:
    """Load, measure, print."""
    names = ('weights', 'kernels', 'activations', 'kv', 'chunk', 'device', 'collective', 'share_gpu', 'cuda_graphs')
    chosen = {name: value for name in names if (value := getattr(options, name)) is not None}
    output = session.Output()
    s.agreed(output.check)
    start = perf_counter()
    llm = api.load(options.model if options.random is None else random_model(s, options), session=s, **chosen)
    load_seconds = max(s.comm.exchange(perf_counter() - start))
    figures = measure(llm, options)
    if s.comm.rank == 0:
        from tpmpi.versions import cpu
        figures |= {'model': name_of(options), 'machine': cpu(), 'load_seconds': round(load_seconds, 3),
                    'tpmpi': tpmpi.__version__}
        output.write((json.dumps(figures) if options.json else table(figures)) + '\n')
    s.agreed(output.check)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command; returns this rank's exit code."""
    return session.command(body, parse, argv)


if __name__ == '__main__':
    sys.exit(main())
