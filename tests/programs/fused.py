"""On every rank: steps of several requests with all layers at once, and with all_layers, whose bits they must have.

argument: JSON, {"requests": R, "all_parts": bytes of small sums, "cases": [{"model": FILE, and options of tpmpi.load}, …]};
the last line printed is JSON: for each case how many steps went at once on each rank, and of how many.
"""

import json
import sys

import numpy as np
from mpi4py import MPI
from rings import cache_and_rings, step_of

import tpmpi
from tpmpi import shared_sums
from tpmpi.fused import FusedLayers
from tpmpi.model import all_layers, forward

BLOCK, BLOCKS, STEPS = 8, 4, ((0, 3), *((start, 1) for start in range(3, 50)))  # 50 positions in a ring of 32


class Noted(FusedLayers):
    """Counts the steps that go at once."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.at_once = 0

    def _tables(self, tokens, comm):
        tables = super()._tables(tokens, comm)
        self.at_once += tables is not None
        return tables


def work_of(comm):
    """What has been summed so far."""
    return comm.traffic['all_reduce'].calls, comm.traffic['all_reduce'].bytes, comm.entered


def across_nodes(comm, nodes, ops, nbytes):
    """The ranks as if they were on several nodes; sums of 64 bytes and more go through each one's memory."""
    shared_sums.LEAST = 64
    each = comm.size // nodes
    node, across = (comm.mpi_comm.Split(group) for group in (comm.rank // each, comm.rank % each))
    return shared_sums.SharedSums(node, across, nbytes, ops.node_sums)


def shake(model):
    """Another choice of experts for some tokens, on every rank but 0, as of a CPU that rounds in another way."""
    if MPI.COMM_WORLD.rank:
        for layer in model.layers:
            if hasattr(layer.mlp, 'router'):
                router = layer.mlp.router.data.view(np.float32)
                router *= 1 + 0.1 * np.random.default_rng(1).standard_normal(router.shape, np.float32)


def run(case, requests):
    nodes, shaken = case.pop('nodes', 1), case.pop('shaken', False)
    with tpmpi.load(case.pop('model'), **case) as llm:
        engine, tokens = llm.engine, np.random.default_rng(0).integers(0, 256, (requests, STEPS[-1][0] + 1))
        model, ops, comm, kv_dtype = engine.model, engine.ops, engine.comm, engine.run.kv_dtype
        if nodes > 1:
            comm.shared.close()
            comm.shared = across_nodes(comm, nodes, ops, 1 << 20)
        if shaken:
            shake(model)
        found, at_once = [], 0
        for fused in (True, False):
            cache, rings = cache_and_rings(model, [BLOCKS] * len(model.groups), BLOCK, ops, requests, kv_dtype)
            layers, states = Noted(ops, model, cache) if fused else all_layers, []
            if fused:
                for count in {count for _, count in STEPS}:  # with mixtures the ranks agree on these
                    layers._tables(requests * count, comm)
                layers.at_once = 0
            before = work_of(comm)
            for start, count in STEPS:
                step = step_of(tokens[:, start:start + count].reshape(-1), rings, start, count)
                states.append(forward(step, model, cache, ops, comm, layers).copy())
            found.append(([s.tobytes() for s in states], [b - a for a, b in zip(before, work_of(comm), strict=True)]))
            at_once = layers.at_once if fused else at_once
        assert all(np.isfinite(s).all() and s.any() for s in states)
        (bits, work), (expected, of_layers) = found
        assert bits == expected, 'other bits'
        assert work[0] > of_layers[0] if shaken else work == of_layers, 'other sums'  # shaken: some steps twice
        return MPI.COMM_WORLD.allgather(at_once)


asked = json.loads(sys.argv[1])
shared_sums.ALL_PARTS = asked['all_parts']
results = [run(case, asked['requests']) for case in asked['cases']]
if MPI.COMM_WORLD.rank == 0:
    print(json.dumps([[counts, len(STEPS)] for counts in results]))
