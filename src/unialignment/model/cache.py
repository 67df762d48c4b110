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
        room: Per block, buffers ``[B, heads, Nc + room, head_dim]`` of keys and of values, of which ``keys`` and
            ``values`` are the beginning; a step writes the target's own behind them instead of copying all. Only for
            passes without gradients, one at a time.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor | None
    output: TransformerOutput
    aligned: Tensor | None = None
    room: tuple[tuple[Tensor, Tensor], ...] | None = None

    @property
    def batch_size(self) -> int:
        """How many conditions the cache holds."""
        return self.keys[0].shape[0]

    @property
    def length(self) -> int:
        """Condition tokens, padding included."""
        return self.keys[0].shape[2]

    def select(self, index: Tensor) -> ConditionCache:
        """The cache of conditions ``index`` (``[n]``, repeats allowed): one prompt shared by many samples.

        Room behind the conditions stays room, so that the steps after it needn't copy them either.
        """
        mask = None if self.mask is None else self.mask[index]
        aligned = None if self.aligned is None else self.aligned[index]
        if self.room is not None:
            room = tuple((key[index], value[index]) for key, value in self.room)
            return ConditionCache(
                tuple(key[:, :, : self.length] for key, _ in room),
                tuple(value[:, :, : self.length] for _, value in room),
                mask,
                TransformerOutput(),
                aligned,
                room,
            )
        keys, values = tuple(key[index] for key in self.keys), tuple(value[index] for value in self.values)
        return ConditionCache(keys, values, mask, TransformerOutput(), aligned)

    def first(self, count: int) -> ConditionCache:
        """The first ``count`` conditions, as views."""
        return ConditionCache(
            tuple(key[:count] for key in self.keys),
            tuple(value[:count] for value in self.values),
            None if self.mask is None else self.mask[:count],
            TransformerOutput(),
            None if self.aligned is None else self.aligned[:count],
            None if self.room is None else tuple((key[:count], value[:count]) for key, value in self.room),
        )

    @staticmethod
    def concatenate(caches: list[ConditionCache]) -> ConditionCache:
        """One batch of several caches; shorter ones are padded and masked, which leaves every result exact."""
        return ConditionCache.assemble([(cache, None) for cache in caches])

    @staticmethod
    def assemble(
        parts: list[tuple[ConditionCache, Tensor | None]], room: int = 0, consume: bool = False
    ) -> ConditionCache:
        """One batch of several caches, or of chosen conditions of each, copied once.

        Args:
            parts: Caches and which of their conditions (``[n]``, repeats allowed; ``None``: all), in order. Shorter
                ones are padded and masked, which leaves every result exact.
            room: Positions to leave behind the conditions for a target's own keys and values (see ``room``).
            consume: Empty ``parts``, and free each block's keys and values once they are copied: the two are then never
                there twice, provided nobody else holds them.
        """
        caches, indices = [cache for cache, _ in parts], [index for _, index in parts]
        if len(parts) == 1 and parts[0][1] is None and not room:
            return caches[0]
        length = max(cache.length for cache in caches)
        count = sum(cache.batch_size if index is None else len(index) for cache, index in parts)
        even = all(cache.length == length for cache in caches)

        def pick(x: Tensor, index: Tensor | None) -> Tensor:
            return x if index is None else x[index]

        def joined(tensors: list[Tensor]) -> Tensor:
            _, heads, _, width = tensors[0].shape
            make = tensors[0].new_empty if even else tensors[0].new_zeros
            whole, row = make(count, heads, length + room, width), 0
            for tensor, index in zip(tensors, indices, strict=True):
                chosen = pick(tensor, index)
                whole[row : row + len(chosen), :, : tensor.shape[2]] = chosen
                row += len(chosen)
            return whole

        def padded_mask(cache: ConditionCache, index: Tensor | None) -> Tensor:
            own = cache.mask
            if own is None:
                own = cache.keys[0].new_ones(cache.batch_size, cache.length, dtype=torch.bool)
            return F.pad(pick(own, index), [0, length - cache.length])

        mask = None
        if not even or any(cache.mask is not None for cache in caches):
            mask = torch.cat([padded_mask(cache, index) for cache, index in parts])
        aligned = None
        known = next((cache.aligned for cache in caches if cache.aligned is not None), None)
        if known is not None:
            # A cache without a source adds nothing.
            zeros = known[:1] * 0
            aligned = torch.cat(
                [
                    pick(cache.aligned if cache.aligned is not None else zeros.expand(cache.batch_size, -1, -1), index)
                    for cache, index in parts
                ]
            )
        layers = range(len(caches[0].keys))
        if torch.is_grad_enabled() and any(key.requires_grad for cache in caches for key in cache.keys):
            keys, values = (
                [
                    torch.cat(
                        [
                            F.pad(pick(getattr(cache, name)[layer], index), [0, 0, 0, length - cache.length])
                            for cache, index in parts
                        ]
                    )
                    for layer in layers
                ]
                for name in ("keys", "values")
            )
            return ConditionCache(tuple(keys), tuple(values), mask, TransformerOutput(), aligned)
        pending = [list(zip(cache.keys, cache.values, strict=True)) for cache in caches]
        if consume:
            parts.clear()
            del caches
        made = []
        for _ in layers:
            found = [pairs.pop(0) for pairs in pending]
            made.append((joined([key for key, _ in found]), joined([value for _, value in found])))
        buffers = tuple(made)
        return ConditionCache(
            tuple(key[:, :, :length] for key, _ in buffers),
            tuple(value[:, :, :length] for _, value in buffers),
            mask,
            TransformerOutput(),
            aligned,
            buffers if room else None,
        )


@dataclass(frozen=True)
class TimeModulation:
    """What a stream's blocks and head take from the time, computed ahead: for one timestep, or for each of several.

    Attributes:
        timestep: ``[S]``.
        embedding: ``[S, D]``.
        blocks: Each block's modulation vectors, ``[S, 6 * D]`` (``[S, 9 * D]`` with a second attention).
    """

    timestep: Tensor
    embedding: Tensor
    blocks: tuple[Tensor, ...]

    def at(self, step: int) -> TimeModulation:
        """That of one timestep, as views of one row."""
        row = slice(step, step + 1)
        return TimeModulation(self.timestep[row], self.embedding[row], tuple(block[row] for block in self.blocks))
