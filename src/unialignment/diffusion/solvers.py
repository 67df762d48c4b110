"""Solvers of the probability-flow ODE dx/dσ = v(x, σ), from noise (σ = 1) to data (σ = 0).

Know nothing of networks or guidance: the velocity is a function.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from unialignment.diffusion.base import drive
from unialignment.diffusion.flow import shift_sigma
from unialignment.errors import InputError

Velocity = Callable[[Tensor, float], Tensor]
"""``(x [B, C, H, W], σ) -> dx/dσ [B, C, H, W]``."""
StepCallback = Callable[[int, float, Tensor], Tensor | None]
"""``(step, σ reached, x) -> replacement x or None``, after every step."""
SOLVERS = ("euler", "heun")


def sigma_schedule(steps: int, shift: float = 1.0) -> list[float]:
    """``steps + 1`` noise levels from 1 to 0, evenly spaced, then shifted.

    Raises:
        InputError: fewer than one step or a non-positive shift.
    """
    if steps < 1:
        raise InputError(f"num_inference_steps={steps} must be at least 1.")
    if shift <= 0:
        raise InputError(f"shift={shift} must be positive.")
    return [float(sigma) for sigma in shift_sigma(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)]


def solve(
    velocity: Velocity,
    noise: Tensor,
    sigmas: list[float],
    solver: str = "euler",
    callback: StepCallback | None = None,
) -> Tensor:
    """Integrates from ``sigmas[0]`` to ``sigmas[-1]``.

    Args:
        velocity: dx/dσ.
        noise: ``[B, C, H, W]`` at ``sigmas[0]``.
        sigmas: Decreasing noise levels.
        solver: ``"euler"`` (one evaluation a step) or ``"heun"`` (two, second order; the last step to σ = 0 is Euler,
            as in EDM, arXiv 2206.00364, algorithm 1).
        callback: Called after every step.

    Raises:
        InputError: unknown solver.
    """
    return drive(solver_steps(noise, sigmas, solver, callback), velocity)


def solver_steps(
    noise: Tensor, sigmas: list[float], solver: str = "euler", callback: StepCallback | None = None
) -> Generator[tuple[Tensor, float], Tensor, Tensor]:
    """:func:`solve` turned inside out: yields ``(x, σ)``, is sent the velocity there, and returns the solution.

    Whoever drives several of these can evaluate what they ask for in one pass, at different noise levels.

    Raises:
        InputError: unknown solver.
    """
    if solver not in SOLVERS:
        raise InputError(f"solver={solver!r} is unknown: use one of {', '.join(SOLVERS)}.")
    x = noise
    for step, (here, there) in enumerate(pairwise(sigmas)):
        slope = yield x, here
        following = x + (there - here) * slope
        if solver == "heun" and there > 0:
            second = yield following, there
            following = x + (there - here) * 0.5 * (slope + second)
        x = following
        if callback is not None:
            replacement = callback(step, there, x)
            x = x if replacement is None else replacement
    return x


def solve_with_scheduler(
    velocity: Velocity, noise: Tensor, scheduler: Any, steps: int, callback: StepCallback | None = None
) -> Tensor:
    """The same with one of diffusers' flow-matching schedulers (an object with ``set_timesteps`` and ``step``)."""
    scheduler.set_timesteps(steps)
    x = noise
    for step, timestep in enumerate(scheduler.timesteps):
        sigma = float(timestep) / scheduler.config.num_train_timesteps
        x = scheduler.step(velocity(x, sigma), timestep, x, return_dict=False)[0]
        if callback is not None:
            replacement = callback(step, sigma, x)
            x = x if replacement is None else replacement
    return x
