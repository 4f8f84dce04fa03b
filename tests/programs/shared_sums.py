"""Sums in shared memory, of odd sizes, in turn; the argument is how many ranks make a node.  Rank 0 prints what came of it."""

import json
import sys
import time

import numpy as np

from tpmpi.comm import Communicator
from tpmpi.kernels import jit
from tpmpi.kernels.meeting import SUMS
from tpmpi.shared_sums import ALL_PARTS, LEAST, SharedSums, share

comm, ranks_of_node, most = Communicator(), int(sys.argv[1]), 1 << 20
jit.build(SUMS)
if ranks_of_node == comm.size:
    comm.shared = share(comm.mpi_comm, most, SUMS)
else:
    node, across = (comm.mpi_comm.Split(group) for group in (comm.rank // ranks_of_node, comm.rank % ranks_of_node))
    comm.shared = SharedSums(node, across, most, SUMS)
rng = np.random.default_rng(0)
worst, kept, before = 0.0, True, None
for shape in [(64, 65), (7, 1001), (512, 512), (5, 4096), (97, 53)]:
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
calls, pauses = comm.traffic['all_reduce'].calls, np.random.default_rng(comm.rank)
exact, largest = True, min(LEAST, ALL_PARTS // comm.size) // 4
for turn in range(600):
    shape = (int(rng.integers(1, 4)), int(rng.integers(1, largest // 3)))
    parts = rng.standard_normal((comm.size, *shape)).astype(np.float32)
    x = parts[comm.rank].copy()
    if pauses.random() < 0.03:
        time.sleep(pauses.random() / 200)  # now and then the others lose patience
    comm.all_reduce(x)
    expected = parts[0].copy()
    for part in parts[1:]:
        expected += part  # in the order of ranks: the same bits
    exact &= bool((x == expected).all() if ranks_of_node == comm.size else np.abs(x - expected).max() < 1e-5)
    if turn % 50 == 0:  # a large one between
        room = comm.room((80, 100))
        room[:] = comm.rank + turn
        comm.all_reduce(room)
        exact &= bool((room == comm.size * turn + comm.size * (comm.size - 1) / 2).all())
numbers = comm.shared.number
comm.traffic['all_reduce'].calls = calls
small, large = comm.room((1, largest if ranks_of_node == comm.size else LEAST // 4 - 1)), comm.room((most // 4 + 1, 1))
plain = np.full((64, 64), comm.rank + 1, np.float32)  # one that was not given out goes by MPI, whatever its size
comm.all_reduce(plain)
report = comm.exchange({'worst': worst, 'kept': kept, 'refused': small is None and large is None, 'plain': float(plain.max()),
                        'exact': exact, 'numbers': numbers,
                        'calls': comm.traffic['all_reduce'].calls})
comm.shared.close()
if comm.rank == 0:
    print(json.dumps(report))
