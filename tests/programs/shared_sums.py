"""Sums in shared memory, of odd sizes, in turn; the argument is how many ranks make a node.  Rank 0 prints what came of it."""

import json
import sys

import numpy as np

from tpmpi.comm import Communicator
from tpmpi.shared_sums import LEAST, SharedSums, share

comm, ranks_of_node, most = Communicator(), int(sys.argv[1]), 1 << 20
if ranks_of_node == comm.size:
    comm.shared = share(comm.mpi_comm, most)
else:
    node, across = (comm.mpi_comm.Split(group) for group in (comm.rank // ranks_of_node, comm.rank % ranks_of_node))
    comm.shared = SharedSums(node, across, most)
rng = np.random.default_rng(0)
worst, kept, before = 0.0, True, None
for shape in [(64, 64), (7, 1001), (512, 512), (5, 4096), (97, 53)]:
    parts = rng.standard_normal((comm.size, *shape)).astype(np.float32)  # the same on all ranks
    x = comm.room(shape)
    x[:] = parts[comm.rank]
    comm.all_reduce(x)
    worst = max(worst, float(np.abs(x - parts.sum(axis=0, dtype=np.float64)).max()))
    if before is not None:
        kept &= bool((before[0] == before[1]).all())  # what the room before holds is the residual stream
    before = x, x.copy()
    alike = comm.exchange(x.tobytes())
    kept &= alike == [alike[0]] * comm.size
small, large = comm.room((1, LEAST // 4 - 1)), comm.room((most // 4 + 1, 1))
plain = np.full((64, 64), comm.rank + 1, np.float32)  # one that was not given out goes by MPI, whatever its size
comm.all_reduce(plain)
report = comm.exchange({'worst': worst, 'kept': kept, 'refused': small is None and large is None, 'plain': float(plain.max()),
                        'calls': comm.traffic['all_reduce'].calls})
comm.shared.close()
if comm.rank == 0:
    print(json.dumps(report))
