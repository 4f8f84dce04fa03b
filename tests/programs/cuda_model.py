"""On every rank: logits of shards.TOKENS from models on a GPU's kernels, saved on rank 0.

arguments: OUT.npz mpi|staged MODEL.h5 …; `cupy` is the strict stand-in, or with TPMPI_TEST_GPU=1 CuPy.  The last line printed
is JSON: for each model what the decode step of rank 0 did on the stand-in: launches by kernel, copies to the host,
synchronizations, hidden ones.
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
from rings import cache_and_rings, step_of  # noqa: E402
from shards import CHUNKS, TOKENS  # noqa: E402

from tpmpi.checkpoint import CheckpointReader  # noqa: E402
from tpmpi.collectives import Direct, Staged  # noqa: E402
from tpmpi.comm import Communicator  # noqa: E402
from tpmpi.kernels.cuda import Kernels  # noqa: E402
from tpmpi.model import forward, logits  # noqa: E402
from tpmpi.model_shard import load_model  # noqa: E402
from tpmpi.sharding import shard  # noqa: E402


def run(path: str, collective: str, shaken: bool = False):
    cupy.cuda.Device(MPI.COMM_WORLD.rank % cupy.cuda.runtime.getDeviceCount()).use()
    stream = cupy.cuda.get_current_stream()
    comm = Communicator(carrier=Direct(stream) if collective == 'mpi' else Staged(cupy, stream, 64))
    ops, parts, report = Kernels(cupy), [], None
    if shaken and comm.rank:  # as on a GPU that rounds in another way
        ops.route = lambda *arguments: shake(*Kernels.route(*arguments))
    with CheckpointReader(path) as reader:
        model = load_model(reader, shard(reader.config, comm.rank, comm.size), ops, verify=True, xp=cupy)
    cache, rings = cache_and_rings(model, [8] * len(model.groups), 8, ops)
    for start, count in CHUNKS:
        step = step_of(TOKENS[start:start + count], rings, start, count)
        stream.synchronize()
        if not GPU:
            cupy.fake.reset()
        hidden = forward(step, model, cache, ops, comm)
        if count == 1 and not GPU:
            fake = cupy.fake
            report = {'launches': dict(fake.launches), 'to_host': fake.device_to_host.calls,
                      'to_device': fake.host_to_device.calls,
                      'synchronizations': fake.synchronizations, 'broadcasts': comm.traffic['broadcast'].calls,
                      'hidden': dict(fake.hidden_synchronizations)}
        parts.append(logits(hidden, model, ops).get())
    return np.concatenate(parts), report


def shake(choice, shares):
    """Every other token goes to other experts."""
    host = choice.get()
    host[::2] = np.sort((host[::2] + 1) % (host.max() + 1))
    return cupy.asarray(host), shares


def main(out, collective, *paths):
    results, reports = {}, {}
    for path, shaken in [(path, False) for path in paths] + [(path, True) for path in paths if Path(path).stem == 'experts']:
        name = Path(path).stem + '_shaken' * shaken
        part, reports[name] = run(path, collective, shaken)
        parts = MPI.COMM_WORLD.gather(part)
        if MPI.COMM_WORLD.rank == 0:
            results[name] = np.concatenate(parts, axis=1)
    if MPI.COMM_WORLD.rank == 0:
        np.savez(out, **results)
        print(json.dumps(reports))


if __name__ == '__main__':
    main(*sys.argv[1:])
