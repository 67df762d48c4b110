"""The conditions of a micro-batch, and the model seen as a function of target tokens given them.

Conditions shared by several samples are encoded once and, in ``prefix`` mode, cached for all denoising steps. Knows
nothing of tasks, seeds or solvers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unialignment.diffusion.guidance import Branch
from unialignment.model.cache import ConditionCache
from unialignment.model.transformer import UniAlignmentTransformer


@dataclass(frozen=True)
class Condition:
    """Clean condition tokens of U distinct conditions.

    Attributes:
        text: ``[U, L, D]`` embedded text; L may be 0.
        mask: Bool ``[U, L]``, true at real tokens.
        images: Clean latents, each ``[U, C, h, w]``.
    """

    text: Tensor
    mask: Tensor
    images: tuple[Tensor, ...] = ()

    def select(self, index: Tensor) -> Condition:
        """The conditions of samples ``index`` ``[B]``."""
        return Condition(self.text[index], self.mask[index], tuple(image[index] for image in self.images))


class Denoiser:
    """Predictions of the model for the guidance branches asked for.

    Args:
        model: The transformer.
        conditions: Branch → its U distinct conditions.
        index: ``[B]`` which condition each sample has.
        cached: Encode conditions once (``prefix`` mode only); else anew at every call, with the same result.
    """

    def __init__(
        self, model: UniAlignmentTransformer, conditions: Mapping[Branch, Condition], index: Tensor, cached: bool
    ) -> None:
        self.model = model
        self.cached = cached and model.config.attention_mode == "prefix"
        self._caches: dict[tuple[Branch, ...], ConditionCache] = {}
        self._conditions: dict[Branch, Condition] = {}
        self._prefilled: dict[Branch, ConditionCache] = {}
        for branch, condition in conditions.items():
            if self.cached:
                cache = model.prefill(text_embeds=condition.text, text_mask=condition.mask, images=condition.images)
                self._prefilled[branch] = cache.select(index)
            else:
                self._conditions[branch] = condition.select(index)

    def _cache(self, branches: tuple[Branch, ...]) -> ConditionCache:
        if branches not in self._caches:
            self._caches[branches] = ConditionCache.concatenate([self._prefilled[branch] for branch in branches])
        return self._caches[branches]

    def velocity(self, branches: tuple[Branch, ...], latents: Tensor, sigma: float) -> dict[Branch, Tensor]:
        """Predicted velocities.

        Args:
            branches: Which conditions to predict with.
            latents: ``[B, C, H, W]`` at noise level ``sigma``.
            sigma: 0–1.

        Returns:
            Branch → float32 ``[B, C, H, W]``.
        """
        latents = latents.to(self.model.dtype)
        timestep = torch.full((latents.shape[0],), 1000.0 * sigma, device=latents.device)
        if self.cached:
            count = len(branches)
            output = self.model.denoise(
                self._cache(branches), latents=latents.repeat(count, 1, 1, 1), timestep=timestep.repeat(count)
            )
            assert output.velocity is not None
            return dict(zip(branches, output.velocity.float().chunk(count), strict=True))
        predictions = {}
        for branch in branches:
            condition = self._conditions[branch]
            output = self.model(
                text_embeds=condition.text,
                text_mask=condition.mask,
                latents=latents,
                sources=condition.images,
                timestep=timestep,
                target="image",
                condition_features=False,
            )
            predictions[branch] = output.velocity.float()
        return predictions

    def logits(self, branches: tuple[Branch, ...], embeds: Tensor, positions: Tensor) -> dict[Branch, Tensor]:
        """Predicted logits at the M open positions.

        Args:
            branches: Which conditions to predict with.
            embeds: ``[B, L, D]`` embedded target text.
            positions: Bool ``[B, L]``.

        Returns:
            Branch → float32 ``[M, V]``.
        """
        timestep = torch.zeros(embeds.shape[0], device=embeds.device)
        if self.cached:
            count = len(branches)
            output = self.model.denoise(
                self._cache(branches),
                text_embeds=embeds.repeat(count, 1, 1),
                timestep=timestep.repeat(count),
                logit_positions=positions.repeat(count, 1),
            )
            assert output.text_logits is not None
            return dict(zip(branches, output.text_logits.float().chunk(count), strict=True))
        predictions = {}
        for branch in branches:
            condition = self._conditions[branch]
            output = self.model(
                text_embeds=embeds,
                latents=condition.images[0] if condition.images else None,
                sources=condition.images[1:],
                condition_text_embeds=condition.text,
                condition_text_mask=condition.mask,
                timestep=timestep,
                target="text",
                logit_positions=positions,
                condition_features=False,
            )
            predictions[branch] = output.text_logits.float()
        return predictions
