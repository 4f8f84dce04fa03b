"""On every rank: logits of given tokens from models on their shards, saved on rank 0.

arguments: OUT.npz CASES.json reference|cpu; CASES.json: [{"name", "model": FILE.h5, "tokens", "prompt": their number in the
prompt}, …].  The prompt is computed in two chunks, then one token at a time from a cache of small blocks, which holds no more
than the windows need.  The last line printed is JSON: for each name the all-reduces of one decode step, in bytes, and for
each layer the positions that its ring holds.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI
from rings import cache_and_rings, step_of
from shards import Counted

from tpmpi.checkpoint import CheckpointReader
from tpmpi.comm import Communicator
from tpmpi.kernels import reference
from tpmpi.kv_cache import ring_positions
from tpmpi.model import forward, logits
from tpmpi.model_shard import load_model, matrix_kinds
from tpmpi.sharding import shard

BLOCK = 8
WORLD = MPI.COMM_WORLD


def kernels(name: str, reader):
    """The kernel set, ready for a model."""
    if name == 'reference':
        return reference
    from tpmpi.kernels.cpu import Kernels
    ops = Kernels()
    needed = ops.needed(reader.config, sorted(matrix_kinds(reader)), 'float32')
    ops.compile_missing(needed, 1, f'families-{WORLD.bcast(os.getpid())}')
    WORLD.barrier()
    ops.build(needed)
    return ops


def run(case: dict, name: str, counted: Counted):
    """This rank's columns of the logits of all tokens, the bytes of the last step's all-reduces, and each layer's ring."""
    comm, tokens, prompt = Communicator(counted), np.asarray(case['tokens']), case['prompt']
    with CheckpointReader(Path(case['model'])) as reader:
        config = reader.config
        ops = kernels(name, reader)
        model = load_model(reader, shard(config, comm.rank, comm.size), ops, verify=True)
    chunk = prompt * 2 // 3
    sizes = [-(-ring_positions(len(tokens), group.window, chunk) // BLOCK) for group in model.groups]
    cache, (rings, _) = cache_and_rings(model, sizes, BLOCK, ops, requests=2)
    chunks = [(0, chunk), (chunk, prompt - chunk), *((i, 1) for i in range(prompt, len(tokens)))]
    parts = []
    for start, rows in chunks:
        counted.calls.clear()
        step = step_of(tokens[start:start + rows], [rings], start, rows, prompt)
        parts.append(logits(forward(step, model, cache, ops, comm), model, ops))
    held = {layer: ring.capacity for group, ring in zip(model.groups, rings, strict=True) for layer in group.layers}
    return np.concatenate(parts), [nbytes for name, nbytes in counted.calls if name == 'Allreduce'], held


def main(out: str, cases: str, name: str):
    counted, results, report = Counted(), {}, {}
    for case in json.loads(Path(cases).read_text()):
        part, reduced, held = run(case, name, counted)
        gathered = WORLD.gather(part)
        if WORLD.rank == 0:
            results[case['name']] = np.concatenate(gathered, axis=1)
            report[case['name']] = {'all_reduces': reduced, 'rings': [held[layer] for layer in sorted(held)]}
    if WORLD.rank == 0:
        np.savez(out, **results)
        print(json.dumps(report))


if __name__ == '__main__':
    main(*sys.argv[1:])
