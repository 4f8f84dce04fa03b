"""What a test asks the stand-in: how often each thing happened since `reset`."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass


@dataclass
class Copies:
    """Copies in one direction."""

    calls: int = 0
    bytes: int = 0


launches: Counter[str] = Counter()  # of each kernel
synchronizations = 0  # that the caller asked for: of a stream, an event, a device
hidden_synchronizations: Counter[str] = Counter()  # what waits without being called so: item, flatnonzero, …
host_to_device, device_to_host = Copies(), Copies()
seed = int(os.environ.get('FAKE_CUDA_SEED', '0'))  # of the order of blocks and threads; 0: ascending


def reset() -> None:
    """All counters to nothing."""
    global synchronizations
    launches.clear()
    hidden_synchronizations.clear()
    synchronizations = 0
    for copies in (host_to_device, device_to_host):
        copies.calls = copies.bytes = 0


def count_synchronization() -> None:
    """One that the caller asked for."""
    global synchronizations
    synchronizations += 1


def count_copy(copies: Copies, nbytes: int) -> None:
    """One copy between host and device."""
    copies.calls += 1
    copies.bytes += nbytes
