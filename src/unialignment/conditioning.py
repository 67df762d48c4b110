"""The conditions of a micro-batch, and the model seen as a function of target tokens given them.

Conditions shared by several samples are encoded once and, in ``prefix`` mode, cached for all denoising steps. Knows
nothing of tasks, seeds or solvers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unialignment.diffusion.guidance import Branch
from unialignment.model.cache import ConditionCache, TimeModulation
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

    def padded(self, multiple: int) -> Condition:
        """The same with texts padded (and masked) to a multiple of tokens: few lengths instead of many."""
        missing = -self.text.shape[1] % multiple
        if not missing:
            return self
        return Condition(F.pad(self.text, [0, 0, 0, missing]), F.pad(self.mask, [0, missing]), self.images)


class Denoiser:
    """Predictions of the model for the guidance branches asked for.

    What doesn't change between steps is computed once: keys and values of each distinct condition (``prefix`` mode),
    and what the time contributes.

    Args:
        model: The transformer.
        conditions: Branch → its U distinct conditions; the fully conditioned branch first.
        index: ``[B]`` which condition each sample has, the same in all branches or one such index for each.
        cached: Encode conditions once (``prefix`` mode only); else anew at every call, with the same result.
        room: Keep room beside each block's cached keys for those of the targets: faster, but for editing the cache is
            twice as large.
    """

    def __init__(
        self,
        model: UniAlignmentTransformer,
        conditions: Mapping[Branch, Condition],
        index: Tensor | Mapping[Branch, Tensor],
        cached: bool,
        room: bool = True,
    ) -> None:
        self.model = model
        self._dtype = model.dtype  # diffusers goes through all parameters for it: not at every step
        self._room = room
        self.cached = cached and model.config.attention_mode == "prefix"
        self._order = tuple(conditions)
        self._parts: list[tuple[ConditionCache, Tensor | None]] = []
        self._whole: ConditionCache | None = None
        self._chosen: tuple[tuple[int, ...], ConditionCache] | None = None
        self._conditions: dict[Branch, Condition] = {}
        self._times: dict[float, TimeModulation] = {}
        self._no_time: TimeModulation | None = None
        self.batch_size = 0
        for branch, condition in conditions.items():
            rows = index if isinstance(index, Tensor) else index[branch]
            self.batch_size = len(rows)
            if model.length_bucket:
                condition = condition.padded(model.length_bucket)
            if self.cached:
                cache = model.prefill(text_embeds=condition.text, text_mask=condition.mask, images=condition.images)
                each_own = torch.equal(rows.cpu(), torch.arange(cache.batch_size))
                self._parts.append((cache, None if each_own else rows))
            else:
                self._conditions[branch] = condition.select(rows)

    def plan(self, sigmas: Sequence[float]) -> None:
        """Computes what these noise levels contribute to pictures' passes, all at once."""
        if not self.cached or not sigmas:
            return
        parameter = self.model.context_embedder.weight
        timesteps = torch.tensor([1000.0 * sigma for sigma in sigmas], device=parameter.device)
        times = self.model.time_modulation("image", timesteps)
        if times is not None:
            self._times = {sigma: times.at(step) for step, sigma in enumerate(sigmas)}

    def _cache(self, branches: tuple[Branch, ...], tokens: int, rows: tuple[int, ...] | None = None) -> ConditionCache:
        """Keys and values for ``branches``, with room for the ``tokens`` of a target.

        ``rows`` names samples if not all are computed.
        """
        if self._whole is None:
            room = tokens if self._room and not torch.is_grad_enabled() else 0
            # Its keys and values are in the whole from here on, and nowhere else.
            self._whole = ConditionCache.assemble(self._parts, room, consume=True)
            self._parts = []
        whole = self._whole
        if rows is not None:
            if self._chosen is None or self._chosen[0] != rows:
                count = self.batch_size
                index = torch.tensor([number * count + row for number in range(len(self._order)) for row in rows])
                self._chosen = rows, whole.select(index.to(whole.keys[0].device))
            whole = self._chosen[1]
        if branches == self._order:
            return whole
        count = self.batch_size if rows is None else len(rows)
        if branches == self._order[: len(branches)]:
            return whole.first(count * len(branches))
        starts = [self._order.index(branch) * count for branch in branches]
        index = torch.cat([torch.arange(start, start + count) for start in starts])
        return whole.select(index.to(whole.keys[0].device))

    def velocity(self, branches: tuple[Branch, ...], latents: Tensor, sigma: float) -> dict[Branch, Tensor]:
        """Predicted velocities.

        Args:
            branches: Which conditions to predict with.
            latents: ``[B, C, H, W]`` at noise level ``sigma``.
            sigma: 0–1.

        Returns:
            Branch → float32 ``[B, C, H, W]``.
        """
        latents = latents.to(self._dtype)
        if self.cached:
            count = len(branches)
            tokens = latents.shape[-2] * latents.shape[-1] // self.model.config.patch_size**2
            output = self.model.denoise(
                self._cache(branches, tokens),
                latents=latents if count == 1 else latents.repeat(count, 1, 1, 1),
                timestep=torch.full((1,), 1000.0 * sigma, device=latents.device),
                modulation=self._times.get(sigma),
            )
            assert output.velocity is not None
            return dict(zip(branches, output.velocity.float().chunk(count), strict=True))
        timestep = torch.full((latents.shape[0],), 1000.0 * sigma, device=latents.device)
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

    def logits(
        self,
        branches: tuple[Branch, ...],
        embeds: Tensor,
        positions: Tensor,
        rows: tuple[int, ...] | None = None,
    ) -> dict[Branch, Tensor]:
        """Predicted logits at the M open positions.

        Args:
            branches: Which conditions to predict with.
            embeds: ``[B, L, D]`` embedded target text.
            positions: Bool ``[B, L]``.
            rows: Which samples ``embeds`` and ``positions`` hold, when not all: those that are still being written.

        Returns:
            Branch → float32 ``[M, V]``.
        """
        timestep = torch.zeros(embeds.shape[0], device=embeds.device)
        if self.cached:
            count = len(branches)
            if self._no_time is None:
                self._no_time = self.model.time_modulation("text", timestep[:1])
            output = self.model.denoise(
                self._cache(branches, embeds.shape[1], rows),
                text_embeds=embeds if count == 1 else embeds.repeat(count, 1, 1),
                timestep=timestep[:1],
                logit_positions=positions if count == 1 else positions.repeat(count, 1),
                modulation=self._no_time,
            )
            assert output.text_logits is not None
            return dict(zip(branches, output.text_logits.float().chunk(count), strict=True))
        predictions = {}
        for branch in branches:
            condition = self._conditions[branch]
            if rows is not None:
                condition = condition.select(torch.tensor(rows, device=embeds.device))
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
