"""Continuous diffusion of pictures: rectified flow (arXiv 2209.03003, as in Stable Diffusion 3, arXiv 2403.03206).

    x_σ = (1 − σ)·x + σ·ε,   velocity dx/dσ = ε − x,   σ = 0 clean, σ = 1 noise.

Knows nothing of networks, tasks or conditions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unialignment.diffusion.base import PathSample
from unialignment.errors import ConfigError


@dataclass(frozen=True)
class FlowPath:
    """Rectified flow with logit-normal times.

    Attributes:
        logit_mean: Mean of logit(σ); above 0 trains more at high noise, where prompts matter.
        logit_std: Standard deviation of logit(σ).
        shift: Resolution shift of SD 3 (equation 23), σ' = s·σ / (1 + (s − 1)·σ).
        loss_space: ``"velocity"``: mean squared error of the velocity; ``"sample"``: of x̂ = x_σ − σ·v̂ (published).
        weight_floor: With ``loss_space="sample"``, the error is multiplied by 1 / max(σ, weight_floor)²; 0 leaves it
            as published (weight one). 1/σ² alone would be velocity space, dominated by low noise under x-prediction.

    Raises:
        ConfigError: a field is out of range.
    """

    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0
    loss_space: str = "velocity"
    weight_floor: float = 0.0

    def __post_init__(self) -> None:
        if self.loss_space not in ("velocity", "sample"):
            raise ConfigError(f"flow.loss_space={self.loss_space!r} is unknown: use 'velocity' or 'sample'.")
        if self.shift <= 0 or self.logit_std <= 0 or not 0 <= self.weight_floor <= 1:
            raise ConfigError("flow needs shift > 0, logit_std > 0 and 0 <= weight_floor <= 1.")

    def sample_time(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """``[B]`` noise levels σ, logit-normal, shifted; in random order.

        Stratified: one draw from each of ``batch`` equally likely intervals. Every level is still logit-normal, but a
        batch covers all of them evenly, which takes much of the noise out of the loss.
        """
        uniform = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        normal = torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))
        sigma = torch.sigmoid(self.logit_mean + self.logit_std * normal)
        return shift_sigma(sigma[torch.randperm(batch, generator=generator)], self.shift)

    def sample_path(
        self, clean: Tensor, time: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> PathSample:
        """Noises latents ``[B, C, H, W]`` to σ = ``time`` ``[B]``."""
        if noise is None:
            noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype).to(clean.device)
        sigma = time.to(clean).view(-1, *[1] * (clean.ndim - 1))
        return PathSample(clean, torch.lerp(clean, noise, sigma), time, 1000.0 * time, noise=noise)

    def loss(self, prediction: Tensor, path: PathSample) -> Tensor:
        """``[B]`` mean squared error of a predicted velocity ``[B, C, H, W]`` in the configured space."""
        assert path.noise is not None
        velocity_error = (prediction.float() - (path.noise - path.clean).float()).square().flatten(1).mean(1)
        if self.loss_space == "velocity":
            return velocity_error
        # x̂ − x = −σ (v̂ − v), so the error in sample space is σ² times that in velocity space.
        sigma = path.time.to(velocity_error)
        weight = sigma.square()
        if self.weight_floor:
            weight = weight / sigma.clamp_min(self.weight_floor).square()
        return weight * velocity_error


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """SD 3's resolution shift, σ' = s·σ / (1 + (s − 1)·σ): s > 1 moves mass towards noise."""
    return sigma if shift == 1.0 else shift * sigma / (1 + (shift - 1) * sigma)
