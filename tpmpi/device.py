"""Opens the device that a rank computes on: the array module, and what MPI must wait for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


class DeviceError(ValueError):
    """The asked-for device cannot be had, with what to install or change."""


@dataclass(frozen=True)
class Device:
    """Where a rank's arrays live.

    synchronize: waits for all work in flight, None where there is nothing to wait for; staging: how the communicator
    carries an array over the host, None where MPI may read the array's memory.
    """

    name: str
    xp: Any
    identity: str | None = None  # of a GPU, the same for two ranks that see one card under different numbers
    synchronize: Callable[[], None] | None = None
    staging: Any = None

    def to_host(self, x) -> np.ndarray:
        """x as a NumPy array, complete."""
        return x if isinstance(x, np.ndarray) else x.get()


class HostStaging:
    """Carries device arrays over one host buffer, pinned and allocated once per size that grows."""

    def __init__(self, xp):
        self.xp, self.buffer = xp, None

    def to_host(self, x) -> np.ndarray:
        """A host copy of x, complete."""
        if self.buffer is None or self.buffer.size < x.size:
            memory = self.xp.cuda.alloc_pinned_memory(x.nbytes)
            self.buffer = np.frombuffer(memory, np.float32, x.size)
        host = self.buffer[:x.size].reshape(x.shape)
        x.get(out=host)
        return host

    def from_host(self, host: np.ndarray, x) -> None:
        """Overwrite x with the host copy, complete before the buffer is used again."""
        x.set(host)
        self.xp.cuda.get_current_stream().synchronize()


def open_device(choice: str, local_rank: int, local_size: int) -> Device:
    """The device for this rank.  choice: 'cpu', 'cuda', or 'auto' (a GPU where there is one for each rank of the node).

    CuPy is imported only when a GPU is asked for or, with 'auto', when the driver shows one.  Raises DeviceError.
    """
    if choice == 'cpu' or (choice == 'auto' and not _driver_present()):
        return Device('cpu', np)
    try:
        return _open_cuda(local_rank, local_size)
    except DeviceError:
        if choice == 'cuda':
            raise
        return Device('cpu', np)


def _driver_present() -> bool:
    import os
    return os.path.exists('/dev/nvidiactl')


def _open_cuda(local_rank: int, local_size: int) -> Device:
    try:
        import cupy
    except ImportError as e:
        raise DeviceError('device cuda: CuPy is not installed; pip install "tpmpi[cuda12]" or "tpmpi[cuda13]"') from e
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as e:  # CuPy raises its own CUDARuntimeError, and others where the driver is missing or too old
        raise DeviceError(f'device cuda: no usable GPU ({" ".join(str(e).split())}); check nvidia-smi, or use cpu') from e
    if count == 0:
        raise DeviceError('device cuda: the driver shows no GPU; check CUDA_VISIBLE_DEVICES, or use --device cpu')
    if 1 < count < local_size:
        raise DeviceError(f'device cuda: {local_size} ranks on this node and {count} GPUs; start one rank per GPU')
    index = local_rank % count
    cupy.cuda.Device(index).use()
    name = cupy.cuda.runtime.getDeviceProperties(index)['name'].decode()
    stream = cupy.cuda.get_current_stream()
    identity = cupy.cuda.runtime.deviceGetPCIBusId(index)
    return Device(f'cuda:{index} {name}', cupy, identity, stream.synchronize, HostStaging(cupy))


def check_one_rank_per_gpu(identities: list[str | None]) -> None:
    """Raises DeviceError when two ranks of this node opened the same GPU.  identities: of all ranks on the node."""
    shared = {i for i in identities if i is not None and identities.count(i) > 1}
    if shared:
        raise DeviceError(f'device cuda: {len(identities)} ranks on this node share GPU {sorted(shared)[0]}; '
                          f'start one rank per GPU')
