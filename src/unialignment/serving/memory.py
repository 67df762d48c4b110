"""How much memory serving may take. Knows nothing of models."""

from __future__ import annotations

from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
DEFAULT = 2 * 2**30
"""Bytes where the system doesn't say what is free."""


def free_bytes(device: torch.device) -> int:
    """Memory that could be had now: the device's, or this machine's or container's (Linux), whichever is less."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [value for value in (_machine(), _container()) if value is not None]
    return max(0, min(found)) if found else DEFAULT


def _machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _container() -> int | None:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        return None if limit == "max" else int(limit) - int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return None
