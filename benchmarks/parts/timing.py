"""Time, and memory, on a device that is told what to do and goes on by itself."""

from __future__ import annotations

import time
from collections.abc import Callable


def timed(action: Callable[[], object]) -> float:
    """Milliseconds until all that was asked of the device is done."""
    synchronise()
    started = time.perf_counter()
    action()
    synchronise()
    return 1000 * (time.perf_counter() - started)


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_gb() -> float | None:
    """The most that tensors took of the GPU since the last call; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 1)
