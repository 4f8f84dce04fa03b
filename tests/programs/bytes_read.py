"""Load a model on ranks and report, for each, the bytes that its process read from files and those of its weights."""

import json
import sys

from tpmpi.checkpoint import CheckpointReader
from tpmpi.comm import Communicator
from tpmpi.kernels import reference
from tpmpi.model_shard import load_model
from tpmpi.sharding import shard


def bytes_read():
    """Bytes that read calls of this process have returned so far (proc(5): rchar)."""
    with open('/proc/self/io') as f:
        return int(f.readline().split()[1])


comm = Communicator()
CheckpointReader(sys.argv[1]).close()  # modules that are imported at the first use are not the model's bytes
before = bytes_read()
with CheckpointReader(sys.argv[1]) as reader:
    model = load_model(reader, shard(reader.config, comm.rank, comm.size), reference)
report = comm.exchange((bytes_read() - before, model.nbytes))
if comm.rank == 0:
    print(json.dumps(report))
