"""Process-level matters of a run: device, threads, precision, compilation, and stopping cleanly on a signal.

Knows nothing of models, losses or data.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from unialignment.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """The device that a configuration names; ``auto`` takes the first accelerator, else the CPU.

    Raises:
        ConfigError: unknown or absent device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"run.device: {name!r} is not a device; use auto, cpu, cuda, cuda:1 or mps.") from None
    absent = (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if absent:
        raise ConfigError(f"run.device: {name!r} was asked for, but this machine has none; use auto or cpu.")
    return device


def set_threads(threads: int | None, processes: int = 1) -> int:
    """Set torch's CPU threads (``None``: this process's part of every processor it may use); returns the number."""
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, threads // processes)
    torch.set_num_threads(threads)
    return threads


def seed_everything(seed: int) -> None:
    """Seed the global generators of python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def autocast(device: torch.device, precision: str) -> Any:
    """Context manager for the forward pass: bf16 autocast, or nothing."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def uncompile(modules: Iterable[nn.Module]) -> None:
    """Undo ``module.compile()``."""
    for module in modules:
        module._compiled_call_impl = None


def compile_if_faster(
    mode: str,
    modules: list[nn.Module],
    step: Callable[[], None],
    report: Callable[[str], None],
    repeats: int = 4,
    dynamic: bool | None = False,
) -> bool:
    """Compile modules in place where it pays.

    Args:
        mode: ``off``, ``on``, or ``auto``: time ``step`` both ways and keep the faster.
        modules: Modules to compile; their parameter names do not change.
        step: One forward and backward pass on typical data, without lasting effects.
        report: Receives one sentence on what was found.
        repeats: Timed repetitions.
        dynamic: torch.compile's: ``False``: one compilation per shape; ``None``: general code from the second shape on.

    Returns:
        Whether the modules are compiled now.
    """
    if mode == "off":
        return False

    def timed() -> float:
        best = float("inf")
        for _ in range(repeats):
            began = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
        return best

    eager = float("inf")
    if mode == "auto":
        step()
        eager = timed()
    began = time.perf_counter()
    try:
        # One code serves all modules of a class, in every combination of arguments; the default limit of 8 is too few.
        torch._dynamo.config.recompile_limit = 64
        for module in modules:
            module.compile(dynamic=dynamic)
        step()
        step()
        compiled = timed()
    except Exception as error:
        uncompile(modules)
        if mode == "on":
            raise ConfigError(
                f"run.compile=on, but compilation failed ({type(error).__name__}: {str(error).splitlines()[0]}). "
                "Install a C++ compiler or use run.compile=auto or off."
            ) from error
        report(f"Compilation failed ({type(error).__name__}); going on without.")
        return False
    spent = time.perf_counter() - began
    if mode == "auto" and compiled > 0.97 * eager:
        uncompile(modules)
        report(f"Not compiled: {compiled * 1e3:.0f} ms a pass against {eager * 1e3:.0f} ms without.")
        return False
    against = "" if mode == "on" else f" against {eager * 1e3:.0f} ms without"
    report(f"Compiled in {spent:.0f} s: {compiled * 1e3:.0f} ms a pass{against}.")
    return True


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request that the loop honours after its step; the second kills.

    Attributes:
        requested: Name of the signal, or ``None``.
    """

    def __init__(self) -> None:
        self.requested: str | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[StopRequest]:
        """Handle signals within the block; restores the earlier handlers. Does nothing outside the main thread."""

        def handle(number: int, _: FrameType | None) -> None:
            if self.requested is not None:
                raise KeyboardInterrupt
            self.requested = signal.Signals(number).name

        earlier: dict[int, Any] = {}
        try:
            for watched in (signal.SIGINT, signal.SIGTERM):
                earlier[watched] = signal.signal(watched, handle)
        except ValueError:  # not the main thread: signals are somebody else's
            pass
        try:
            yield self
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)
