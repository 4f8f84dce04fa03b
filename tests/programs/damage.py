"""Read damaged copies of a model file; prints how many were refused.  arguments: GOOD.h5 TRIALS"""

import sys
from pathlib import Path

import numpy as np

from tpmpi.checkpoint import CheckpointError, CheckpointReader


def load_all(path):
    with CheckpointReader(path) as reader:
        for name, spec in reader.specs.items():
            reader.read_rows(name, range(spec.shape[0]), verify=True)


good, rng, refused = Path(sys.argv[1]), np.random.default_rng(0), 0
data = good.read_bytes()
bad = good.with_name('bad.h5')
for trial in range(int(sys.argv[2])):
    damaged = bytearray(data)
    for at in rng.integers(0, 4096 if trial % 2 else len(data), 3):
        damaged[at] ^= int(rng.integers(1, 256))
    bad.write_bytes(damaged)
    try:
        load_all(bad)
    except CheckpointError:
        refused += 1
print(refused)
