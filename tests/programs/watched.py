"""A run that only all-reduces, in which one rank ends in the middle of a phase in the way that is asked for.

    mpirun -n 2 python watched.py FOLDER --rank 1 --phase decode --end kill

Each rank writes its process id to FOLDER/RANK.pid.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import time
from pathlib import Path

from mpi4py import MPI

from tpmpi.launch import check_world
from tpmpi.watch import Watch

STRANGERS = (b'GET / HTTP/1.1\r\n\r\n' * 1000, b'', b'x' * 100_000, b'join \xff\n',
             b'join ' + b'0' * 64 + b' 1 somewhere\nphase start\n')


def visit(port: int) -> list[socket.socket]:
    """Strangers at the watchman's door, who stay there."""
    visitors = []
    for said in STRANGERS:
        visitors.append(socket.create_connection(('127.0.0.1', port), 5))
        visitors[-1].sendall(said)
    return visitors


def closes(port: int, seconds: float) -> bool:
    """Whether the door is closed within some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            socket.create_connection(('127.0.0.1', port), 1).close()
        except ConnectionRefusedError:
            return True
        time.sleep(0.01)
    return False


def end(how: str, watch: Watch) -> None:
    """Ends this rank."""
    if how == 'kill':
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == 'exit0':
        os._exit(0)
    elif how == 'exit3':
        os._exit(3)
    elif how == 'raise':
        raise ValueError('the weights\nare wrong')
    elif how == 'watchman':  # the only child of rank 0
        children = Path(f'/proc/self/task/{os.getpid()}/children').read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        time.sleep(60)  # otherwise the run may be over before its loss is noticed
    elif how == 'leave':
        watch.close()
        MPI.Finalize()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('folder', type=Path)
    parser.add_argument('--rank', type=int, default=-1, help='the rank that ends')
    parser.add_argument('--phase', default='decode')
    parser.add_argument('--end', default='kill')
    parser.add_argument('--steps', type=int, default=20, help='in each phase')
    parser.add_argument('--alone', action='store_true', help='the ranks do not communicate')
    parser.add_argument('--busy', action='store_true', help='the other ranks are not in MPI at the end')
    parser.add_argument('--strangers', action='store_true', help='call while the ranks join')
    parser.add_argument('--misled', type=int, help='a rank that cannot connect')
    parser.add_argument('--hosts', action='store_true', help='each rank seems to have its own host')
    parser.add_argument('--stuck', action='store_true', help="MPI's abort blocks")
    options = parser.parse_args()

    world = MPI.COMM_WORLD
    check_world(world.size)
    (options.folder / f'{world.rank}.pid').write_text(str(os.getpid()))
    ports, visitors = [], []

    def exchange(item):
        items = world.allgather(item)
        if items[0] is not None and len(items[0]) == 4:
            ports.append(items[0][0])
            if options.strangers and world.rank == 0:
                visitors.extend(visit(ports[0]))
            if options.misled == world.rank:
                items[0] = (1, *items[0][1:])
        elif options.hosts and items[-1] is not None:
            items = [(f'host{rank}', (str(rank),)) for rank in range(world.size)]
        return items

    def abort():
        time.sleep(60 if options.stuck else 0)
        world.Abort(1)

    watch = Watch(world.rank, world.size, exchange, abort)
    if options.strangers and world.rank == 0:
        if options.misled is None:
            assert closes(ports[0], 5)
        else:
            visitors.extend(visit(ports[0]))
    try:
        for phase in ('load', 'prefill', 'decode', 'finish'):
            watch.phase = phase
            for step in range(options.steps):
                if phase == options.phase and step == options.steps // 2:
                    if world.rank == options.rank:
                        time.sleep(0.2)  # the others are waiting
                        (options.folder / 'end').write_text(str(time.time()))
                        end(options.end, watch)
                        if options.end == 'leave':
                            return
                    elif options.busy:
                        time.sleep(60)
                if options.alone:
                    time.sleep(0.01)
                else:
                    world.allreduce(step)
    except ValueError as error:
        watch.failed(error)
    watch.close()
    MPI.Finalize()


if __name__ == '__main__':
    main()
