"""What the host decides for a step reaches the device in one copy, and a copy under way is never overwritten."""

from __future__ import annotations

import cuda_device
import numpy as np
import pytest

from tpmpi.kernels.uploads import SMALLEST, Uploads


@pytest.fixture(params=cuda_device.STAND_IN_OR_GPU)
def xp(request):
    with cuda_device.device(request.param) as cupy:
        yield cupy


def queued_steps(xp, sizes):
    """Sums that are queued, none waited for, of arrays that are uploaded again and again; and what they should be."""
    uploads, found, expected = Uploads(xp), [], []
    for step, size in enumerate(sizes):
        arrays = np.arange(size) + 1000 * step, np.full((2, 3), step, np.float32), np.full(5, step / 3)
        found.append([x + 1 for x in uploads.send(arrays)])
        expected.append([x + 1 for x in arrays])
    return [[x.get() for x in one] for one in found], expected


def test_every_step_has_its_own_numbers_although_none_was_waited_for(xp):
    found, expected = queued_steps(xp, [3, 3, 7, 3, SMALLEST, 3, 4 * SMALLEST, 2, 2])  # and buffers that grow
    for one, other in zip(found, expected, strict=True):
        for x, y in zip(one, other, strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def test_a_buffer_that_is_written_too_early_is_noticed(monkeypatch):
    with cuda_device.device('stand-in') as cupy:
        monkeypatch.setattr(cupy.cuda.Event, 'synchronize', lambda self: None)
        found, expected = queued_steps(cupy, [3] * 4)
        assert not all(np.array_equal(x, y) for one, other in zip(found, expected, strict=True)
                       for x, y in zip(one, other, strict=True))


def test_a_step_is_one_copy(xp):
    if not hasattr(xp, 'fake'):
        pytest.skip('CuPy does not count copies')
    uploads = Uploads(xp)
    uploads.send([np.arange(3)])
    xp.fake.reset()
    views = uploads.send([np.arange(3), np.ones((4, 2), np.float32)])
    assert xp.fake.host_to_device.calls == 1 and [x.shape for x in views] == [(3,), (4, 2)]
    assert views == uploads.send([np.arange(3), np.ones((4, 2), np.float32)])  # the same places
