"""Sums of device arrays over the ranks by real MPI, on a device that works late: rank 0 prints what came of it.

Its memory is the host's, but an operation is only queued until the stream is waited for, and what is not yet written is NaN.
"""

import json
import sys
import types

import numpy as np

from tpmpi.collectives import Direct, Staged
from tpmpi.comm import Communicator


class Stream:
    def __init__(self):
        self.queue, self.waits = [], 0

    def synchronize(self):
        self.waits += 1
        while self.queue:
            self.queue.pop(0)()


class DeviceArray:
    def __init__(self, values, stream):
        self.memory, self.stream = np.full(values.shape, np.nan, np.float32), stream
        self.dtype, self.flags, self.shape = self.memory.dtype, self.memory.flags, values.shape
        self.nbytes, self.size = self.memory.nbytes, self.memory.size
        stream.queue.append(lambda: np.copyto(self.memory, values))

    @property
    def __cuda_array_interface__(self):
        return self.memory.__array_interface__ | {'version': 3}

    def get(self, stream, out, blocking):
        assert not blocking and stream is self.stream and out.shape == self.shape
        stream.queue.append(lambda: np.copyto(out, self.memory))

    def set(self, host, stream):
        assert stream is self.stream
        stream.queue.append(lambda: np.copyto(self.memory, host))


class Impatient(Direct):
    """What must not be done."""

    def sum(self, x, reduce):
        reduce(x)


comm, stream, buffers = Communicator(), Stream(), []


def pinned(nbytes):
    buffers.append(bytearray(nbytes))
    return buffers[-1]


xp = types.SimpleNamespace(cuda=types.SimpleNamespace(alloc_pinned_memory=pinned))
comm.carrier = {'mpi': Direct, 'staged': lambda s: Staged(xp, s, 4 * 6), 'impatient': Impatient}[sys.argv[1]](stream)
shapes = [(2, 3), (1, 3), (2, 3), (5, 4), (2, 3), (5, 4)]
arrays, waits = [], []
for number, shape in enumerate(shapes):
    size = shape[0] * shape[1]
    arrays.append(DeviceArray((100 * number + comm.rank + np.arange(size, dtype=np.float32)).reshape(shape), stream))
    before = stream.waits
    comm.all_reduce(arrays[-1])
    waits.append(stream.waits - before)
comm.carrier.close()
stream.synchronize()
expected = [comm.size * (100 * number + np.arange(a.size, dtype=np.float32)).reshape(a.shape) + sum(range(comm.size))
            for number, a in enumerate(arrays)]
rights = comm.exchange([bool(np.array_equal(a.memory, e)) for a, e in zip(arrays, expected, strict=True)])
if comm.rank == 0:
    print(json.dumps({'right': rights, 'waits': waits, 'buffers': [len(b) for b in buffers],
                      'traffic': [comm.traffic['all_reduce'].calls, comm.traffic['all_reduce'].bytes]}))
