"""What is free now, and what this process uses: bytes of memory, of a GPU or of the machine."""

from __future__ import annotations

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: str) -> float:
    """Bytes that are free now: of the GPU `device`, or of the machine within its container's limit.

    A container's files in the page cache count as used in `memory.current`; those that the kernel drops when memory is
    asked for (`inactive_file`) are counted as free here.
    """
    if device.startswith("cuda"):
        import torch

        return float(torch.cuda.mem_get_info(torch.device(device))[0])
    import psutil

    free = float(psutil.virtual_memory().available)
    limit, used, parts = (CGROUP / name for name in ("memory.max", "memory.current", "memory.stat"))
    if limit.exists() and used.exists() and (most := limit.read_text().strip()).isdigit():
        counts = dict(line.split() for line in parts.read_text().splitlines()) if parts.exists() else {}
        free = min(free, float(most) - float(used.read_text()) + float(counts.get("inactive_file", 0)))
    return free


def memory_used() -> int:
    """Bytes of this process: the most that it has held of its GPU, or what it holds now of the machine's memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss
