"""Timing A against B, and what the machine could do at most. Knows nothing of models.

Both sides run in one process, in turns, so that whatever else the machine does hits both alike; what is reported is the
median of the paired ratios with its spread. Seconds are those of the processor when one thread is used (a busy machine
then changes little), else of the wall clock.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


def clock() -> float:
    """Seconds: of the processor with one thread on a CPU, else of the wall clock, with the device idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing, from several repetitions.

    Attributes:
        median: The middle one.
        low: 16th percentile.
        high: 84th percentile.
        repeats: How many.
    """

    median: float
    low: float
    high: float
    repeats: int

    @staticmethod
    def of(values: list[float]) -> Timing:
        """From measured values."""
        ordered = sorted(values)
        last = len(ordered) - 1
        low, high = ordered[round(0.16 * last)], ordered[round(0.84 * last)]
        return Timing(statistics.median(ordered), low, high, len(ordered))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}–{self.high:.3g})"


def interleave(runs: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each run, measured in turns: A B C, C B A, A B C, …

    Args:
        runs: Name → what to time.
        repeats: Measurements of each.
        warm_up: Runs of each before measuring.
    """
    for run in runs.values():
        for _ in range(warm_up):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats):
        for name in list(runs) if turn % 2 == 0 else reversed(list(runs)):
            began = clock()
            runs[name]()
            seconds[name].append(clock() - began)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> Timing:
    """Of measurements taken in turns: the spread of the paired ratios."""
    return Timing.of([above / below for above, below in zip(numerator, denominator, strict=True)])


@dataclass(frozen=True)
class Machine:
    """What the processor reaches, measured: the bound that everything is held against.

    Attributes:
        name: Model of the processor.
        threads: Threads of torch.
        torch: Version.
        gemm: Type → operations a second of a 1024³ matrix product.
        bandwidth: Bytes a second of reading a matrix far larger than the caches (matrix-vector product).
    """

    name: str
    threads: int
    torch: str
    gemm: dict[str, float]
    bandwidth: float

    @staticmethod
    def measured(repeats: int = 7, side: int = 1024) -> Machine:
        """Measure this one; the best of ``repeats``."""

        def best(run: Callable[[], Any]) -> float:
            return min(interleave({"run": run}, repeats)["run"])

        rates = {}
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            x = torch.randn(side, side).to(dtype)
            rates[name] = 2 * side**3 / best(lambda x=x: x @ x)  # type: ignore[misc]
        matrix, vector = torch.randn(8 * side, 4 * side), torch.randn(4 * side)
        bandwidth = 4 * matrix.numel() / best(lambda: matrix @ vector)
        return Machine(_processor(), torch.get_num_threads(), torch.__version__, rates, bandwidth)

    def bound(self, flops: float, read: float, dtype: str) -> float:
        """Least seconds for so many operations on so many bytes (the roofline)."""
        return max(flops / self.gemm[dtype], read / self.bandwidth)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def exponent(sizes: list[float], costs: list[float]) -> float:
    """Slope of log cost over log size, by least squares: 1 is linear, 2 quadratic."""
    import numpy as np

    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])
