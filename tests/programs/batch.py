"""tpmpi.batch, whose ranks each write their process id to the folder TPMPI_TEST_PIDS, in a file of their number.

On rank TPMPI_TEST_HANGS the file system hangs in the middle of the model; loading may then take TPMPI_TEST_LOAD_SECONDS.
TPMPI_TEST_HANGS_IN names a function of tpmpi.batch in which rank 0's file system hangs.
Rank TPMPI_TEST_STOPS stops once the model is loaded, before it meets the others to begin.
"""

import itertools
import os
import signal
import sys
import time
from pathlib import Path

from mpi4py import MPI

from tpmpi import batch, checkpoint

rank, folder = MPI.COMM_WORLD.rank, Path(os.environ['TPMPI_TEST_PIDS'])
(folder / f'{rank}.new').write_text(str(os.getpid()))
(folder / f'{rank}.new').rename(folder / str(rank))
batch.LOAD_SECONDS = float(os.environ.get('TPMPI_TEST_LOAD_SECONDS', batch.LOAD_SECONDS))
if os.environ.get('TPMPI_TEST_HANGS') == str(rank):
    calls, read_rows = itertools.count(), checkpoint.CheckpointReader.read_rows

    def hang(*arguments):
        """Reads three times, and then never again."""
        if next(calls) == 3:
            time.sleep(3600)
        return read_rows(*arguments)

    checkpoint.CheckpointReader.read_rows = hang
if rank == 0 and 'TPMPI_TEST_HANGS_IN' in os.environ:
    setattr(batch, os.environ['TPMPI_TEST_HANGS_IN'], lambda *_: time.sleep(3600))
if os.environ.get('TPMPI_TEST_STOPS') == str(rank):
    compute = batch.compute

    def stop(*arguments):
        """As SIGSTOP from elsewhere would, at the worst moment."""
        os.kill(os.getpid(), signal.SIGSTOP)
        compute(*arguments)

    batch.compute = stop
sys.exit(batch.main())
