"""Solvers of the probability-flow ODE dx/dσ = v(x, σ), and a stochastic one, from noise (σ = 1) to data (σ = 0).

Know nothing of networks or guidance: the velocity is a function.
"""

from __future__ import annotations

import math
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
Noise = Callable[[], Tensor]
"""Fresh standard normal noise ``[B, C, H, W]`` at every call."""
SOLVERS = ("euler", "heun", "dpmpp", "stochastic")


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
    fresh: Noise | None = None,
) -> Tensor:
    """Integrates from ``sigmas[0]`` to ``sigmas[-1]``.

    Args:
        velocity: dx/dσ.
        noise: ``[B, C, H, W]`` at ``sigmas[0]``.
        sigmas: Decreasing noise levels.
        solver: ``"euler"`` (one evaluation a step), ``"heun"`` (two, second order; the last step to σ = 0 is Euler,
            as in EDM, arXiv 2206.00364, algorithm 1), ``"dpmpp"`` (one, second order from the step before:
            DPM-Solver++(2M), see :func:`_dpmpp`) or ``"stochastic"`` (one; not the ODE: each step noises the model's
            x̂ anew, x_there = (1 − σ_there)·x̂ + σ_there·z with fresh z ~ N(0, 1), as diffusers'
            ``stochastic_sampling`` of flow matching and the multistep sampling of consistency models, arXiv
            2303.01469, algorithm 1. Errors of earlier steps are not carried on in the noise).
        callback: Called after every step.
        fresh: Noise for ``"stochastic"``.

    Raises:
        InputError: unknown solver, or ``"stochastic"`` without ``fresh``.
    """
    return drive(solver_steps(noise, sigmas, solver, callback, fresh), velocity)


def solver_steps(
    noise: Tensor,
    sigmas: list[float],
    solver: str = "euler",
    callback: StepCallback | None = None,
    fresh: Noise | None = None,
) -> Generator[tuple[Tensor, float], Tensor, Tensor]:
    """:func:`solve` turned inside out: yields ``(x, σ)``, is sent the velocity there, and returns the solution.

    Whoever drives several of these can evaluate what they ask for in one pass, at different noise levels.

    Raises:
        InputError: unknown solver, or ``"stochastic"`` without ``fresh``.
    """
    if solver not in SOLVERS:
        raise InputError(f"solver={solver!r} is unknown: use one of {', '.join(SOLVERS)}.")
    if solver == "stochastic" and fresh is None:
        raise InputError("solver='stochastic' needs fresh=: a function that returns noise of x's shape.")
    x = noise
    earlier: tuple[float, Tensor] | None = None
    for step, (here, there) in enumerate(pairwise(sigmas)):
        slope = yield x, here
        if solver == "dpmpp":
            clean = x - here * slope
            following = _dpmpp(x, clean, here, there, earlier)
            earlier = here, clean
        elif solver == "stochastic":
            following = (1 - there) * (x - here * slope)
            if there > 0:
                assert fresh is not None
                following = following + there * fresh().to(x)
        else:
            following = x + (there - here) * slope
            if solver == "heun" and there > 0:
                second = yield following, there
                following = x + (there - here) * 0.5 * (slope + second)
        x = following
        if callback is not None:
            replacement = callback(step, there, x)
            x = x if replacement is None else replacement
    return x


def _dpmpp(x: Tensor, clean: Tensor, here: float, there: float, earlier: tuple[float, Tensor] | None) -> Tensor:
    """One step of DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2) on the path x_σ = (1 − σ)·x + σ·ε.

    With λ = log((1 − σ) / σ), h = λ_there − λ_here and r = h_before / h,

        x_there = (σ_there / σ_here)·x_here − (1 − σ_there)·(e^−h − 1)·((1 + 1/2r)·x̂_here − (1/2r)·x̂_before).

    First order where λ is infinite: for the step from σ = 1, the one after it, and the last, to σ = 0.

    Args:
        x: At ``here``.
        clean: The model's x̂ there.
        here: σ.
        there: σ to go to.
        earlier: σ and x̂ of the step before.
    """

    def log_ratio(sigma: float) -> float:
        return math.log1p(-sigma) - math.log(sigma)

    estimate = clean
    if earlier is not None and earlier[0] < 1 and there > 0:
        weight = 0.5 * (log_ratio(there) - log_ratio(here)) / (log_ratio(here) - log_ratio(earlier[0]))
        estimate = (1 + weight) * clean - weight * earlier[1]
    # e^−h = (1 − here)·there / (here·(1 − there)), so that (1 − there)·(1 − e^−h) is this, without an infinity:
    return (there / here) * x + ((1 - there) - (1 - here) * there / here) * estimate


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
