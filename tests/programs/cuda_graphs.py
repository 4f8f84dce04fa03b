"""On every rank: decode of requests that come and go, with graphs and without; rank 0 prints JSON for each model.

arguments: mpi|staged MODEL.h5 …; `cupy` is the strict stand-in, or with TPMPI_TEST_GPU=1 CuPy.  same: whether all hidden states
have the same bits; kinds: of captured steps; graphs: launched; plain: kernels that were launched beside them, in the last step.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

GPU = os.environ.get('TPMPI_TEST_GPU') == '1'
if not GPU:
    sys.path.insert(0, str(Path(__file__).parents[1] / 'cuda'))

import cupy  # noqa: E402
import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

from tpmpi import graphs  # noqa: E402
from tpmpi.checkpoint import CheckpointReader  # noqa: E402
from tpmpi.collectives import Direct, Staged  # noqa: E402
from tpmpi.comm import Communicator  # noqa: E402
from tpmpi.device import Device, Gpu  # noqa: E402
from tpmpi.kernels import uploads  # noqa: E402
from tpmpi.kernels.cuda import Kernels  # noqa: E402
from tpmpi.kv_cache import KVCache, Ring  # noqa: E402
from tpmpi.model import Step, all_layers, forward  # noqa: E402
from tpmpi.model_shard import load_model  # noqa: E402
from tpmpi.sharding import shard  # noqa: E402

BLOCK, SIZES = 4, (3, 2, 5)  # of a ring's blocks, in three requests: texts go round after 12, 8 and 20 tokens
graphs.MOST_KINDS = 5  # so that some are forgotten
uploads.SPLITS = ((64, 4),)  # keys of a block, so that short texts are split, too
STEPS = [(0,)] * 4 + [(0, 1)] * 4 + [(2,)] * 3 + [(1, 2)] * 8 + [(0, 1, 2)] * 2 + [(2,)] * 3  # which requests are in each


def decode(model, ops, comm, layers_of):
    """The hidden states of all steps, and a step's launches."""
    cache = KVCache(model.config, model.shard, model.groups, sum(SIZES) * len(model.groups), BLOCK, ops)
    rings, free = [], 0
    for size in SIZES:
        rings.append([Ring(np.arange(free + i * size, free + (i + 1) * size), BLOCK) for i in range(len(model.groups))])
        free += size * len(model.groups)
    layers, positions, found, launches = layers_of(cache), [0] * len(SIZES), [], {}
    for number, requests in enumerate(STEPS):
        segments = [[ring.segment(row, positions[r], 1) for ring in rings[r]] for row, r in enumerate(requests)]
        step = Step.of(np.array([(7 * number + r) % 256 for r in requests]), *zip(*segments, strict=True))
        if not GPU:
            cupy.fake.reset()
        found.append(forward(step, model, cache, ops, comm, layers).get())
        launches = {} if GPU else dict(cupy.fake.launches)
        for r in requests:
            positions[r] += 1
    return np.concatenate(found), layers, launches


def run(path: str, collective: str) -> dict:
    cupy.cuda.Device(MPI.COMM_WORLD.rank % cupy.cuda.runtime.getDeviceCount()).use()
    stream = cupy.cuda.Stream()
    stream.use()
    comm, ops = Communicator(carrier=Direct(stream) if collective == 'mpi' else Staged(cupy, stream, 64)), Kernels(cupy)
    with CheckpointReader(path) as reader:
        model = load_model(reader, shard(reader.config, comm.rank, comm.size), ops, xp=cupy)
    device = Device('cuda:0', cupy, Gpu('a GPU', '0'), stream)
    plain, _, before = decode(model, ops, comm, lambda cache: all_layers)
    sums = comm.traffic['all_reduce'].calls
    replayed, layers, launches = decode(model, ops, comm, lambda cache: graphs.Graphs(device))
    assert len(layers.captured) <= graphs.MOST_KINDS
    return {'same': bool(np.array_equal(plain, replayed)), 'usable': layers.usable, 'kinds': len(layers.captured),
            'parts': [sum(graph is not None for graph, _ in c.parts) for c in layers.captured.values()],
            'sums': [sums, comm.traffic['all_reduce'].calls - sums], 'before': before, 'launches': launches}


def main(collective, *paths):
    reports = {Path(path).stem: MPI.COMM_WORLD.gather(run(path, collective)) for path in paths}
    if MPI.COMM_WORLD.rank == 0:
        print(json.dumps(reports))


if __name__ == '__main__':
    main(*sys.argv[1:])
