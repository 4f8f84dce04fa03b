"""Steps of an all-reduce and a nap, until rank 0 is asked to stop; tests stop its ranks and send it signals.

    mpirun -n 3 python steps.py FOLDER --limit 2

Each rank writes its process id to FOLDER/RANK.pid, and at step 20, when the others are in the all-reduce or will be,
the last one writes FOLDER/ready.  Exit code 75: it was asked to stop; 0: it made all its steps.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path

from tpmpi import session

STOPPED = 75


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument('folder', type=Path)
    parser.add_argument('--limit', type=float, help='seconds without a step that are a stall')
    parser.add_argument('--nap', type=float, default=0.01)
    parser.add_argument('--steps', type=int, default=10_000)
    parser.add_argument('--ready', type=int, default=20, help='the step at which something happens')
    parser.add_argument('--stuck', type=int, help='a rank that never comes back from that step')
    parser.add_argument('--kernel', action='store_true', help='the last rank computes for some seconds in that step')
    return parser.parse_args(argv)


def body(s: session.Session, options: argparse.Namespace) -> int:
    import numpy as np
    rank, last = s.comm.rank, s.comm.size - 1
    (options.folder / f'{rank}.pid').write_text(str(os.getpid()))
    s.stop_on_signals()
    s.watch.phase = 'decode'
    s.watch.where = lambda: (0, s.comm.entered)
    s.comm.exchange(None)
    if options.limit and rank == 0:
        s.watch.expect_steps(options.limit)
    asked = np.zeros(1, np.float32)
    for number in range(options.steps):
        s.watch.step(number)
        time.sleep(options.nap)
        if number == options.ready:
            if rank == last:
                (options.folder / 'ready').touch()
                if options.kernel:  # C code without the GIL, as a kernel is: Python's own handlers do not run
                    hashlib.pbkdf2_hmac('sha256', b'', b'', 3_000_000)
                    (options.folder / 'computed').touch()
            if rank == options.stuck:
                time.sleep(1000)
        asked[0] = rank == 0 and s.watch.stop_requested
        s.comm.all_reduce(asked)
        if asked[0]:
            (options.folder / f'{rank}.stopped').write_text(str(number))
            return STOPPED
    return 0


if __name__ == '__main__':
    if '--kernel' in sys.argv:
        request_stop = session.Watch.request_stop

        def noted(watch, why):
            """Tells when, to compare with the kernel's end."""
            request_stop(watch, why)
            if watch.stop_requested:
                (Path(sys.argv[1]) / 'asked').touch()

        session.Watch.request_stop = noted
    sys.exit(session.command(body, parse, None))
