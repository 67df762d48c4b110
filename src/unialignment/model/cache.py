"""What a pass of the transformer returns, and the keys and values of conditions that are kept between passes.

Plain data with the few operations that batches need. Knows nothing of weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class TransformerOutput:
    """What a pass returns; entries that weren't asked for are ``None``.

    Attributes:
        velocity: ``[B, C, H, W]`` image prediction as dx/dσ = noise − clean.
        text_logits: ``[B, L, V]``, or ``[M, V]`` for the M selected positions when ``logit_positions`` was given.
        image_features: ``[B, N, D]`` after the last block and the final norm (tokens of ``latents``).
        text_features: ``[B, L, D]`` likewise (tokens of ``text_embeds``).
        mid_image_features: ``[B, N, D]`` at ``feature_layer``.
        mid_text_features: ``[B, L, D]`` at ``feature_layer``.
    """

    velocity: Tensor | None = None
    text_logits: Tensor | None = None
    image_features: Tensor | None = None
    text_features: Tensor | None = None
    mid_image_features: Tensor | None = None
    mid_text_features: Tensor | None = None

    def to_tuple(self) -> tuple[Tensor, ...]:
        """The entries that aren't ``None``, in the order above."""
        return tuple(value for value in vars(self).values() if value is not None)


@dataclass(frozen=True)
class ConditionCache:
    """Keys and values of clean conditions, computed once and reused for every denoising step (``prefix`` mode).

    Attributes:
        keys: One ``[B, heads, Nc, head_dim]`` a block.
        values: Likewise.
        mask: Bool ``[B, Nc]``, ``True`` for real tokens; ``None`` when all are real.
        output: Features of the conditions (those asked for at prefill).
        aligned: ``[B, N, D]`` what a single source adds to the target's token at the same place (``aligned_source``).
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None
    output: TransformerOutput
    aligned: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """How many conditions the cache holds."""
        return self.keys[0].shape[0]

    @property
    def length(self) -> int:
        """Condition tokens, padding included."""
        return self.keys[0].shape[2]

    def select(self, index: Tensor) -> ConditionCache:
        """The cache of conditions ``index`` (``[n]``, repeats allowed): one prompt shared by many samples."""
        return ConditionCache(
            tuple(key[index] for key in self.keys),
            tuple(value[index] for value in self.values),
            None if self.mask is None else self.mask[index],
            TransformerOutput(),
            None if self.aligned is None else self.aligned[index],
        )

    @staticmethod
    def concatenate(caches: list[ConditionCache]) -> ConditionCache:
        """One batch of several caches; shorter ones are padded and masked, which leaves every result exact."""
        length = max(cache.length for cache in caches)
        padded_any = any(cache.length < length or cache.mask is not None for cache in caches)

        def pad(x: Tensor, dim: int) -> Tensor:
            missing = length - x.shape[dim]
            return x if not missing else F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, missing])

        mask = None
        if padded_any:
            masks = [
                c.mask if c.mask is not None else c.keys[0].new_ones(c.batch_size, c.length, dtype=torch.bool)
                for c in caches
            ]
            mask = torch.cat([pad(m, 1) for m in masks])
        aligned = None
        known = next((cache.aligned for cache in caches if cache.aligned is not None), None)
        if known is not None:
            # A cache without a source adds nothing.
            zeros = known[:1] * 0
            aligned = torch.cat(
                [c.aligned if c.aligned is not None else zeros.expand(c.batch_size, -1, -1) for c in caches]
            )
        layers = range(len(caches[0].keys))
        return ConditionCache(
            tuple(torch.cat([pad(c.keys[i], 2) for c in caches]) for i in layers),
            tuple(torch.cat([pad(c.values[i], 2) for c in caches]) for i in layers),
            mask,
            TransformerOutput(),
            aligned,
        )
