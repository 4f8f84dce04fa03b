"""An all-reduce of arrays of the stand-in, with a synchronize before it and without; rank 0 prints what came of it as JSON."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import cupy  # noqa: E402
from mpi4py import MPI  # noqa: E402

comm = MPI.COMM_WORLD
x = cupy.arange(5, dtype=cupy.float32) * cupy.float32(10) + comm.rank
try:
    comm.Allreduce(MPI.IN_PLACE, x)
    refused = None
except Exception as e:
    refused = type(e).__name__
cupy.cuda.get_current_stream().synchronize()
comm.Allreduce(MPI.IN_PLACE, x)
y = x + cupy.float32(0.5)
report = comm.gather([refused, y.get().tolist()])
if comm.rank == 0:
    print(json.dumps(report))
