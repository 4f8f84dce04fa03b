"""The communicator: sums in place, refuses what MPI would get wrong, and lets all ranks end alike."""

from __future__ import annotations

import numpy as np
import pytest
from ranks import run_program

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


def test_a_device_is_synchronized_before_and_its_arrays_go_over_the_host():
    """The order of calls for a device array: wait, copy out, reduce, copy in."""
    events = []

    class Staging:
        def to_host(self, x):
            events.append('out')
            return x.copy()

        def from_host(self, host, x):
            events.append('in')
            x[...] = host

    x = np.arange(3, dtype=np.float32)
    Communicator(synchronize=lambda: events.append('wait'), staging=Staging()).all_reduce(x)
    assert events == ['wait', 'out', 'in'] and x.tolist() == [0, 1, 2]
