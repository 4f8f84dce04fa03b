"""How much it gives that all layers of a step are one call: tokens of decode with it and without, in turn in one process.

    mpirun -n 2 python data/compare_layers.py --model smollm2.h5 --weights int8

Prints the medians of both in microseconds, and their ratio in each round.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', metavar='FILE')
    parser.add_argument('--weights', help='kind of the matrices in memory')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--prompt-tokens', type=int, default=512, metavar='N')
    parser.add_argument('--new-tokens', type=int, default=50, metavar='N')
    parser.add_argument('--rounds', type=int, default=5, metavar='N')
    o = parser.parse_args()

    import tpmpi
    from tpmpi.model import all_layers
    llm = tpmpi.load(o.model, threads=o.threads, weights=o.weights)
    engine, step, times = llm.engine, llm.engine.step, []

    def timed(*arguments):
        begin = perf_counter()
        plan = step(*arguments)
        times.append(perf_counter() - begin)
        return plan

    engine.step, found = timed, []
    prompt = [10 + 7919 * i % (engine.model.config.vocab_size - 10) for i in range(o.prompt_tokens)]
    llm.generate(prompt, max_new_tokens=o.new_tokens, ignore_eos=True)  # makes the cache
    fused = engine.layers
    if fused is all_layers:
        raise SystemExit('compare_layers: layers are one call on CPUs with compiled kernels only')
    for _ in range(o.rounds):
        for layers in (all_layers, fused):
            engine.layers = layers
            times.clear()
            llm.generate(prompt, max_new_tokens=o.new_tokens, ignore_eos=True)
            found.append(1e6 * median(times[2:]))  # without the prompt
    if llm.rank == 0:
        without, together = found[::2], found[1::2]
        ratios = ', '.join(f'{a / b:.2f}' for a, b in sorted(zip(without, together, strict=True), key=lambda p: p[0] / p[1]))
        print(f'one by one {median(without):,.0f} us, in one call {median(together):,.0f} us; ratios {ratios}')


if __name__ == '__main__':
    main()
