"""Discrete diffusion of text: absorbing-state (masked) diffusion, MDLM (arXiv 2406.07524).

Log-linear schedule: total_noise(t) = −log(1 − (1 − ε)·t); a token is masked at time t with probability
1 − exp(−total_noise(t)) = (1 − ε)·t. SUBS parameterization: the mask is never predicted, unmasked tokens are copied.
Knows nothing of networks, tokenizers or tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unialignment.diffusion.base import PathSample
from unialignment.errors import ConfigError


@dataclass(frozen=True)
class MaskedPath:
    """Masked diffusion with antithetic times.

    Attributes:
        mask_id: Token id of the mask.
        epsilon: ε of the schedule; keeps the rate finite at t = 1.
        weighting: ``"elbo"``: rate / expm1(total), MDLM's bound and the published loss, averaged over all positions;
            ``"uniform"``: mean cross entropy over the masked positions, of lower variance.
        padding: Weight, in either mean, of positions behind a text's end. Short texts on a long canvas are mostly
            these, which are easily told from the words. 1 is the published loss.
        padding_id: Token id that ends a text and fills its canvas; needed when ``padding`` is not 1.

    Raises:
        ConfigError: a field is out of range.
    """

    mask_id: int
    epsilon: float = 1e-3
    weighting: str = "elbo"
    padding: float = 1.0
    padding_id: int | None = None

    def __post_init__(self) -> None:
        if self.weighting not in ("elbo", "uniform"):
            raise ConfigError(f"masked.weighting={self.weighting!r} is unknown: use 'elbo' or 'uniform'.")
        if not 0 < self.epsilon < 1:
            raise ConfigError(f"masked.epsilon={self.epsilon} must lie between 0 and 1.")
        if not 0 <= self.padding <= 1 or (self.padding < 1 and self.padding_id is None):
            raise ConfigError(f"masked.padding={self.padding} must lie between 0 and 1, and needs a padding token.")

    def total_noise(self, time: Tensor) -> Tensor:
        """−log(1 − (1 − ε)·t)."""
        return -torch.log1p(-(1 - self.epsilon) * time)

    def rate(self, time: Tensor) -> Tensor:
        """d total_noise / dt = (1 − ε) / (1 − (1 − ε)·t)."""
        return (1 - self.epsilon) / (1 - (1 - self.epsilon) * time)

    def sample_time(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """``[B]`` antithetic times: one uniform draw for the batch, spread evenly (MDLM, section 3.5)."""
        offset = torch.rand(batch, generator=generator)
        time = (offset / batch + torch.arange(batch) / batch) % 1
        # Shuffled, since a batch is ordered by task and times must not be.
        return ((1 - self.epsilon) * time + self.epsilon)[torch.randperm(batch, generator=generator)]

    def sample_path(
        self,
        clean: Tensor,
        time: Tensor,
        generator: torch.Generator | None = None,
        maskable: Tensor | None = None,
    ) -> PathSample:
        """Masks token ids ``[B, L]`` with probability (1 − ε)·t, only where ``maskable`` (given words never are)."""
        probability = -torch.expm1(-self.total_noise(time)).view(-1, 1)
        corrupted = torch.rand(clean.shape, generator=generator).to(clean.device) < probability.to(clean.device)
        if maskable is not None:
            corrupted &= maskable
        noised = torch.where(corrupted, self.mask_id, clean)
        return PathSample(clean, noised, time, torch.zeros_like(time), corrupted=corrupted)

    def loss(self, prediction: Tensor, path: PathSample) -> Tensor:
        """``[B]`` loss of logits, given at all positions ``[B, L, V]`` or at the masked ones only ``[M, V]``."""
        assert path.corrupted is not None
        logits = prediction if prediction.ndim == 2 else prediction[path.corrupted]
        per_token = path.clean.new_zeros(path.clean.shape, dtype=torch.float32)
        if logits.shape[0]:
            cross_entropy = F.cross_entropy(self.subs(logits), path.clean[path.corrupted], reduction="none")
            per_token = per_token.masked_scatter(path.corrupted, cross_entropy)
        counted = self._counted(path.clean)
        if self.weighting == "uniform":
            # Where nothing counted is masked the sum is 0, and so is the loss.
            return (per_token * counted).sum(1) / (path.corrupted * counted).sum(1).clamp_min(1e-6)
        return self.weight(path.time.to(per_token)) * (per_token * counted).sum(1) / counted.sum(1)

    def _counted(self, clean: Tensor) -> Tensor:
        """``[B, L]`` weights of positions: 1 up to the first padding token, which is a text's end, then ``padding``."""
        if self.padding == 1 or self.padding_id is None:
            return torch.ones_like(clean, dtype=torch.float32)
        behind = torch.eq(clean, self.padding_id).cumsum(1) > 1
        return torch.where(behind, self.padding, 1.0)

    def weight(self, time: Tensor) -> Tensor:
        """rate / expm1(total), the factor of MDLM's bound; equals 1 / t up to rounding. Finite at t = 0 too."""
        time = time.clamp_min(self.epsilon)
        return self.rate(time) / torch.expm1(self.total_noise(time))

    def subs(self, logits: Tensor) -> Tensor:
        """Float32 logits ``[..., V]`` in which the mask has probability zero."""
        logits = logits.float().clone()
        logits[..., self.mask_id] = -torch.inf
        return logits
