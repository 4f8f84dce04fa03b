"""On every rank: run the models on their shards, and save on rank 0 what a test compares with one that has no shards.

arguments: OUT.npz messages|shared MODEL.h5 …: how sums go, where shared memory takes even the smallest of C and of E; the last
line printed is JSON: for each model the MPI calls of one decode step.
"""

import json
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI
from rings import cache_and_rings, step_of

from tpmpi import shared_sums
from tpmpi.checkpoint import CheckpointReader
from tpmpi.comm import Communicator
from tpmpi.kernels import reference as ops
from tpmpi.model import forward, logits
from tpmpi.model_shard import load_model
from tpmpi.sharding import shard

TOKENS = np.random.default_rng(1).integers(0, 256, 23)
CHUNKS = ((0, 9), (9, 1), (10, 1), (11, 12))


class Counted:
    """MPI's communicator, with each call and the bytes of its largest buffer noted."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        value = getattr(MPI.COMM_WORLD, name)
        if not callable(value):
            return value

        def call(*arguments, **options):
            self.calls.append((name, max((getattr(a, 'nbytes', 0) for a in arguments), default=0)))
            return value(*arguments, **options)
        return call


def run(path, counted, way):
    comm = Communicator(counted)
    with CheckpointReader(path) as reader:
        config = reader.config
        if way == 'shared':
            shared_sums.LEAST = 1
            comm.shared = shared_sums.share(MPI.COMM_WORLD, 4 * config.hidden_size * len(TOKENS))
        model = load_model(reader, shard(config, comm.rank, comm.size), ops, verify=True)
    cache, rings = cache_and_rings(model, [8] * len(model.groups), 8, ops)
    parts, calls = [], []
    for start, count in CHUNKS:
        counted.calls.clear()
        hidden = forward(step_of(TOKENS[start:start + count], rings, start, count), model, cache, ops, comm)
        if count == 1:
            calls = list(counted.calls)
        parts.append(logits(hidden, model, ops))
    gathered = MPI.COMM_WORLD.gather((np.concatenate(parts), model.nbytes))
    assert all(np.array_equal(h, hidden) for h in MPI.COMM_WORLD.allgather(hidden)), 'ranks differ after the all-reduce'
    if comm.shared is not None:
        comm.shared.close()
    return gathered, calls


def main(out, way, *paths):
    counted, results, report = Counted(), {}, {}
    for path in paths:
        gathered, calls = run(path, counted, way)
        name = Path(path).stem
        if MPI.COMM_WORLD.rank == 0:
            results[name] = np.concatenate([part for part, _ in gathered], axis=1)
            report[name] = {'calls': calls, 'weights': [nbytes for _, nbytes in gathered]}
    if MPI.COMM_WORLD.rank == 0:
        np.savez(out, **results)
        print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
