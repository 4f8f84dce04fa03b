"""tpmpi.batch, whose ranks each write their process id to the folder TPMPI_TEST_PIDS, in a file of their number."""

import os
import sys
from pathlib import Path

from mpi4py import MPI

from tpmpi import batch

folder = Path(os.environ['TPMPI_TEST_PIDS'])
(folder / f'{MPI.COMM_WORLD.rank}.new').write_text(str(os.getpid()))
(folder / f'{MPI.COMM_WORLD.rank}.new').rename(folder / str(MPI.COMM_WORLD.rank))
sys.exit(batch.main())
