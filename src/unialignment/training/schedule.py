"""How far a run has come, and the learning rate that follows from it.

A run is bounded by optimizer steps, by wall-clock seconds, or by both (whichever ends first). Progress is a
number 0-1, and the cosine follows progress, so that a run planned by time ends exactly when planned and with its
learning rate annealed, however fast the machine is. Knows nothing of models or optimizers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Progress:
    """Steps and seconds spent, across restarts.

    Attributes:
        max_steps: Optimizer steps of the whole run; ``None`` for no bound.
        budget_seconds: Wall-clock seconds of the whole run, time between two starts not counted; ``None``: no bound.
        step: Optimizer steps done.
        elapsed_before: Seconds spent by earlier starts of this run.
        clock: Monotonic clock in seconds; replaced in tests.
    """

    max_steps: int | None = None
    budget_seconds: float | None = None
    step: int = 0
    elapsed_before: float = 0.0
    clock: Callable[[], float] = time.monotonic
    _started: float | None = field(default=None, repr=False)
    _agreed: float | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.max_steps is None and self.budget_seconds is None:
            raise ValueError("A run needs an end: give max_steps, budget_seconds or both.")

    def start(self) -> None:
        """Start the clock; called once per process, when training begins."""
        self._started = self.clock()

    @property
    def elapsed(self) -> float:
        """Seconds spent so far, all starts of the run together."""
        if self._agreed is not None:
            return self._agreed
        return self.elapsed_before + (0.0 if self._started is None else self.clock() - self._started)

    def agree(self, elapsed: float | None) -> None:
        """Take a time that several processes have agreed on, until the next one; ``None``: the own clock again."""
        self._agreed = elapsed

    @property
    def fraction(self) -> float:
        """Position in the schedule, 0-1; the larger of the two if both bounds are set."""
        parts = [0.0]
        if self.max_steps is not None:
            parts.append(self.step / max(1, self.max_steps))
        if self.budget_seconds is not None:
            parts.append(self.elapsed / max(1e-9, self.budget_seconds))
        return min(1.0, max(parts))

    @property
    def done(self) -> bool:
        """True when a bound is reached."""
        return self.fraction >= 1.0

    @property
    def remaining_seconds(self) -> float | None:
        """Estimated seconds to the end (from the mean speed so far); ``None`` before the first step."""
        if self.fraction >= 1.0:
            return 0.0
        if self.budget_seconds is not None and self.max_steps is None:
            return self.budget_seconds - self.elapsed
        if self.step == 0:
            return None
        return self.elapsed * (1 - self.fraction) / max(1e-9, self.fraction)

    def state_dict(self) -> dict[str, float]:
        """Steps and seconds; plain numbers."""
        return {"step": self.step, "elapsed": self.elapsed}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.step = int(state["step"])
        self.elapsed_before = float(state["elapsed"])
        self._started = self._agreed = None


def learning_rate_factor(
    step: int,
    fraction: float,
    warmup_steps: int,
    schedule: Literal["cosine", "constant", "linear"] = "cosine",
    final: float = 0.02,
) -> float:
    """Multiplier of the base learning rate for the step about to be taken.

    Args:
        step: Optimizer steps already done.
        fraction: :attr:`Progress.fraction`, 0-1.
        warmup_steps: Steps of linear warm-up; step ``warmup_steps - 1`` is the first at the full rate.
        schedule: Shape after the warm-up, a function of ``fraction``.
        final: Factor at the end of the run, 0-1.

    Returns:
        A factor in (0, 1].
    """
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    if schedule == "constant":
        return warmup
    shape = 0.5 * (1 + math.cos(math.pi * fraction)) if schedule == "cosine" else 1 - fraction
    return warmup * (final + (1 - final) * shape)
