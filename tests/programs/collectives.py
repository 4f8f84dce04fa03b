"""One of each call of the communicator; rank 0 prints what came of it as JSON."""

import json

import numpy as np

from tpmpi.comm import Communicator, GroupError

comm = Communicator()
x = np.arange(4, dtype=np.float32) + comm.rank
returned = comm.all_reduce(x)
gathered = np.empty((comm.size, 2), np.int64) if comm.rank == 0 else None
comm.gather(np.array([10 * comm.rank, 10 * comm.rank + 1]), gathered)
message = np.array([7, 8] if comm.rank == 0 else [0, 0])
comm.broadcast(message)
try:
    comm.agree(ValueError('rank is too large') if comm.rank == comm.size - 1 else None)
except GroupError as e:
    agreed = [e.rank, str(e)]
report = {
    'sum': x.tolist(), 'returned': returned, 'gathered': gathered.tolist() if gathered is not None else None,
    'broadcast': message.tolist(), 'shared': comm.share(f'from {comm.rank}'), 'agreed': comm.exchange(agreed),
    'node': comm.exchange(comm.exchange_on_node(comm.rank)),
    'traffic': {name: [t.calls, t.bytes] for name, t in comm.traffic.items()}}
if comm.rank == 0:
    print(json.dumps(report))
