"""The communicator: sums in place, refuses what MPI would get wrong, and lets all ranks end alike."""

from __future__ import annotations

import json

import numpy as np
import pytest
from ranks import run_program, run_ranks

from tpmpi.comm import Communicator, GroupError


@pytest.mark.parametrize('size', [1, 2, 3])
def test_collectives(size):
    report = run_program('collectives.py', size)
    assert report['sum'] == [sum(range(size)) + size * i for i in range(4)] and report['returned'] is None
    assert report['gathered'] == [[10 * r, 10 * r + 1] for r in range(size)]
    assert report['broadcast'] == [7, 8] and report['shared'] == 'from 0'
    assert report['agreed'] == [[size - 1, 'rank is too large']] * size
    assert report['node'] == [[r, list(range(size))] for r in range(size)]
    assert report['traffic'] == {'all_reduce': [1, 16], 'gather': [1, 16], 'broadcast': [1, 16]}


@pytest.mark.parametrize('x', [
    np.ones(4), np.ones(4, np.float16), np.ones(4, np.uint16), np.asfortranarray(np.ones((2, 3), np.float32)),
    np.ones((4, 4), np.float32)[:, ::2]])
def test_what_mpi_would_sum_wrongly_is_refused(x):
    with pytest.raises(TypeError, match='expected C-contiguous float32'):
        Communicator().all_reduce(x)


def test_an_agreed_error_is_one_line_and_an_unexpected_one_names_its_type():
    with pytest.raises(GroupError, match='^a b$'):
        Communicator().agree(ValueError('a\n b'))
    with pytest.raises(GroupError, match='^KeyError: '):
        Communicator().agree(KeyError('x'))
    Communicator().agree(None)


class DeviceArray:
    """An array whose memory is the GPU's, by its type."""

    __cuda_array_interface__ = None

    def __init__(self, memory):
        self.memory, self.dtype, self.flags, self.nbytes = memory, memory.dtype, memory.flags, memory.nbytes


class Carrier:
    def __init__(self):
        self.events = []

    def sum(self, x, reduce):
        self.events.append(x)
        reduce(x.memory)


class TwoRanks:
    """An MPI communicator of two ranks that hold the same."""

    rank, size = 0, 2

    def Allreduce(self, _, x):
        x *= 2


def test_device_memory_goes_by_the_carrier_and_host_memory_does_not():
    carrier = Carrier()
    comm = Communicator(TwoRanks(), carrier)
    x, host = DeviceArray(np.arange(3, dtype=np.float32)), np.arange(3, dtype=np.float32)
    comm.all_reduce(x)
    comm.all_reduce(host)
    assert carrier.events == [x] and x.memory.tolist() == [0, 2, 4] == host.tolist()
    assert (comm.traffic['all_reduce'].calls, comm.traffic['all_reduce'].bytes) == (2, 24)


def test_device_memory_without_a_carrier_never_reaches_mpi():
    with pytest.raises(TypeError, match='device memory without a carrier'):
        Communicator(TwoRanks()).all_reduce(DeviceArray(np.ones(3, np.float32)))


@pytest.mark.parametrize('dtype', [np.float16, np.uint16, np.float64])
def test_what_is_no_float32_never_reaches_a_carrier(dtype):
    carrier = Carrier()
    with pytest.raises(TypeError, match='expected C-contiguous float32'):
        Communicator(TwoRanks(), carrier).all_reduce(DeviceArray(np.ones(3, dtype)))
    assert not carrier.events


def test_one_rank_sends_nothing_and_waits_for_nothing():
    carrier = Carrier()
    comm = Communicator(carrier=carrier)
    comm.all_reduce(DeviceArray(np.ones(3, np.float32)))
    assert comm.size == 1 and not carrier.events and comm.traffic['all_reduce'].bytes == 12


@pytest.mark.parametrize(('size', 'ranks_of_node'), [(2, 2), (3, 3), (4, 2), (4, 4), (6, 2), (9, 9)])
def test_sums_in_shared_memory(size, ranks_of_node):
    """Also across nodes, which parts of one node stand for; there small ones go by MPI."""
    for found in run_program('shared_sums.py', size, str(ranks_of_node)):
        assert found['worst'] < 1e-5 and found['kept'] and found['refused'] and found['exact']
        assert found['numbers'] == (600 + 2 * 17 if size == ranks_of_node else 0)  # meetings: 600 small sums, 17 large ones
        assert found['plain'] == size * (size + 1) / 2 and found['calls'] == 6


PLACE = '''
import json, os, types
from mpi4py import MPI
from tpmpi import shared_sums
os.statvfs = lambda path: types.SimpleNamespace(f_bavail=500_000, f_frsize=1)
found = [shared_sums.share(MPI.COMM_WORLD, 4096, None, ranks) for ranks in (1, 8)]
if MPI.COMM_WORLD.rank == 0:
    print(json.dumps([sums is not None for sums in found]))
for sums in filter(None, found):
    sums.close()
'''


def test_shared_memory_must_hold_the_rooms_of_all_replicas_of_a_node():
    done = run_ranks(2, '-c', PLACE)
    assert json.loads(done.stdout) == [True, False], done.stderr  # two ranks take 114,688 bytes, of twice as many free
