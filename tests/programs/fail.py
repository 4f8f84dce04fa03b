"""tpmpi.run with one rank that fails.  arguments: RANK PHASE HOW, then those of tpmpi.run.

HOW: kill (SIGKILL), exit0, exit3 (os._exit), raise.  In the phases prefill and decode it happens at an all-reduce, when
the other ranks are already waiting in it; in load, while the model file is read.  The file TPMPI_TEST_FAILED is made then.
"""

import os
import signal
import sys
import time

from tpmpi import checkpoint, comm, run, watch

rank, phase, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
watches = []


def fail():
    time.sleep(0.2)
    if 'TPMPI_TEST_FAILED' in os.environ:
        with open(os.environ['TPMPI_TEST_FAILED'], 'w'):
            pass
    if how == 'kill':
        os.kill(os.getpid(), signal.SIGKILL)
    if how.startswith('exit'):
        os._exit(int(how[4:]))
    raise RuntimeError('the test says so')


def noted(init):
    def construct(self, *arguments):
        init(self, *arguments)
        watches.append(self)
    return construct


def failing(function):
    def call(self, *arguments, **options):
        if watches and watches[0].rank == rank and watches[0].phase == phase:
            fail()
        return function(self, *arguments, **options)
    return call


watch.Watch.__init__ = noted(watch.Watch.__init__)
if phase == 'load':
    checkpoint.CheckpointReader.read_rows = failing(checkpoint.CheckpointReader.read_rows)
else:
    comm.Communicator.all_reduce = failing(comm.Communicator.all_reduce)
with open(f'{os.environ["TPMPI_TEST_PIDS"]}/{os.getpid()}', 'w'):
    pass
sys.exit(run.main(sys.argv[4:]))
