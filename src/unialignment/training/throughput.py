"""How fast a run is: samples, tokens, floating-point operations a second, against what the machine can do; memory.

Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B) is the rate of useful operations, recomputation not
counted, over the rate of the machine. The latter is measured here, with a large matrix product in the run's own type on
the run's own threads, rather than taken from a data sheet. Knows nothing of what is trained.
"""

from __future__ import annotations

import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Throughput:
    """Speed over some steps.

    Attributes:
        steps: Optimizer steps.
        seconds: They took.
        tokens: They processed, in all processes.
        flops: Floating-point operations of one step, forward and backward, in all processes; 0: unknown.
        machine: What all processes' matrix products do in a second; 0: unknown.
    """

    steps: int
    seconds: float
    tokens: int
    flops: float
    machine: float

    def numbers(self) -> dict[str, float]:
        """``tokens_per_second``; where known, ``flops_per_second`` and ``model_flops_utilisation`` (0-1)."""
        result = {"tokens_per_second": self.tokens / self.seconds}
        if self.flops:
            result["flops_per_second"] = self.flops * self.steps / self.seconds
            if self.machine:
                result["model_flops_utilisation"] = result["flops_per_second"] / self.machine
        return result


def step_flops(forward: Callable[[], Any], frozen: Callable[[], Any] | None = None) -> float:
    """Operations of forward and backward passes: three times those of the forward pass, which is run and counted.

    Matrix products, convolutions and attention count, a multiplication and an addition as two. Of a LoRA run the
    weights' own gradients, which are not computed, are counted too.

    Args:
        forward: The pass.
        frozen: The part of it that no gradient flows through, which counts once.
    """
    whole = _counted(forward)
    return 3.0 * whole - (0.0 if frozen is None else 2.0 * _counted(frozen))


@torch.no_grad()
def _counted(run: Callable[[], Any]) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def gemm_rate(device: torch.device, precision: str) -> float:
    """Operations a second of a large matrix product on a device; measured once per process, device and type."""
    return _gemm_rate(device.type, device.index, precision, torch.get_num_threads())


@functools.cache
def _gemm_rate(kind: str, index: int | None, precision: str, threads: int) -> float:
    device = torch.device(kind, index) if index is not None else torch.device(kind)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 8192 if kind == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):  # the first is a warm-up
        if kind == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        a @ a
        if kind == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def memory_bytes() -> int:
    """Most memory that this process has held: of its accelerator if it uses one, else of the machine."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Window:
    """Mean logs and speed since the last report.

    Attributes:
        steps: Steps added.
        tokens: Tokens that this process has processed.
        waited: Seconds spent waiting for data.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = defaultdict(int)
        self.steps = 0
        self.tokens = 0
        self.waited = 0.0
        self.began = time.monotonic()

    def add(self, logs: dict[str, Tensor]) -> None:
        """One step's logs."""
        self.steps += 1
        for name, value in logs.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] += 1

    def means(self) -> dict[str, float]:
        """Mean of each log over the steps that had it."""
        return {name: float(value) / self.counts[name] for name, value in self.sums.items()}

    @property
    def seconds(self) -> float:
        """How long the window has been open."""
        return max(1e-9, time.monotonic() - self.began)

    def plain(self) -> dict[str, Any]:
        """What other processes need to know of it."""
        sums = {name: float(value) for name, value in self.sums.items()}
        return {"sums": sums, "counts": dict(self.counts), "tokens": self.tokens, "memory": memory_bytes()}


def combined(windows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean logs over processes' :meth:`Window.plain`: each has its part of the whole, times the number of parts."""
    means = {}
    for name in dict.fromkeys(name for window in windows for name in window["sums"]):
        total = sum(window["sums"].get(name, 0.0) for window in windows) / len(windows)
        means[name] = total / max(window["counts"].get(name, 0) for window in windows)
    return means
