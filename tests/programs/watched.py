"""A run that does nothing but all-reduce in each phase, and in which one rank ends in the way that is asked for.

    mpirun -n 2 python watched.py FOLDER --rank 1 --phase decode --end kill
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import time
from pathlib import Path

from mpi4py import MPI

from tpmpi.launch import Watch, check_world

STRANGERS = {'garbage': b'GET / HTTP/1.1\r\n\r\n' * 100, 'nothing': b'', 'wrong': bytes(32) + b'\0\0\0\1+'}


def visit(offer) -> list[socket.socket]:
    """Strangers on rank 0's port, who stay on the line."""
    visitors = []
    for said in (*STRANGERS.values(), *STRANGERS.values()):
        visitors.append(socket.create_connection((offer[1][0], offer[0]), 5))
        visitors[-1].sendall(said)
    return visitors


def end(how: str) -> None:
    match how:
        case 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        case 'exit0':
            os._exit(0)
        case 'exit3':
            os._exit(3)
        case 'raise':
            raise ValueError('the weights\nare wrong')


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('folder', type=Path)
    parser.add_argument('--rank', type=int, default=-1)
    parser.add_argument('--phase', default='decode')
    parser.add_argument('--end', choices=('kill', 'exit0', 'exit3', 'raise', 'leave'))
    parser.add_argument('--strangers', action='store_true')
    parser.add_argument('--refuse', type=int, help='a rank that is told a wrong port')
    parser.add_argument('--steps', type=int, default=50)
    parser.add_argument('--stuck-abort', action='store_true')
    parser.add_argument('--compute', action='store_true', help='all ranks but one are not in MPI')
    options = parser.parse_args()

    world = MPI.COMM_WORLD
    check_world(world.size)
    (options.folder / f'{world.rank}.pid').write_text(f'{os.getpid()} {socket.gethostname()}')
    visitors = []

    def exchange(item):
        items = world.allgather(item)
        if isinstance(items[0], tuple) and len(items[0]) == 4:
            if options.strangers and world.rank == 0:
                visitors.extend(visit(items[0]))
            if world.rank == options.refuse:
                items[0] = (1, *items[0][1:])
        return items

    def abort():
        if options.stuck_abort:
            time.sleep(60)
        world.Abort(1)

    watch = Watch(world.rank, world.size, exchange, abort)
    try:
        for phase in ('load', 'prefill', 'decode', 'finish'):
            watch.phase = phase
            for step in range(options.steps):
                if world.rank == options.rank and phase == options.phase and step == options.steps // 2:
                    if options.compute:
                        time.sleep(0.5)
                    (options.folder / 'ended').write_text(str(time.time()))
                    end(options.end)
                    if options.end == 'leave':
                        watch.close()
                        return
                if options.end == 'leave':
                    time.sleep(0.01)
                elif options.compute and phase == options.phase and step == options.steps // 2:
                    time.sleep(60)
                else:
                    world.allreduce(step)
    except ValueError as error:
        watch.failed(error)
    watch.close()
    MPI.Finalize()


if __name__ == '__main__':
    main()
