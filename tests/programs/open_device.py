"""Opens the device that is asked for and what carries its sums, on ranks that see the GPUs given for each.

Rank 0 prints what came of it."""

import json
import logging
import os
import sys
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))
import gpu_driver

from tpmpi import api, session
from tpmpi.comm import GroupError
from tpmpi.config import RunConfig

options, *gpus = map(json.loads, sys.argv[1:])
run = RunConfig(**{'device': 'cuda'} | options)
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format='%(message)s')
os.environ.pop('CUDA_VISIBLE_DEVICES', None)
ours = session.start(threads=1)
sys.modules.update(gpu_driver.make(list(map(gpu_driver.gpu, gpus[ours.comm.rank])), nccl=gpu_driver.Nccl))
with patch('tpmpi.device.driver_present', lambda: True):
    try:
        device, sharers = api._open_device(ours, run)
        carrier = api._carrier(ours, ours.comm, run, device, sharers > 1, hidden=64)
        result = [device.name, sharers, type(carrier).__name__]
    except GroupError as e:
        result = str(e)
results = ours.comm.exchange(result)
if ours.comm.rank == 0:
    print(json.dumps(results))
ours.watch.close()
