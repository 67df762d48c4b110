"""Forward passes over rows of different requests: grouped by what fits into one pass, padded and masked, told apart.

A row is one sample under one guidance branch: its own target tokens, noise level and conditions. Knows nothing of
requests, solvers or threads.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from unialignment.conditioning import Condition
from unialignment.model.cache import ConditionCache, TransformerOutput

if TYPE_CHECKING:
    from unialignment.pipeline import UniAlignmentPipeline

Known = ConditionCache | Condition
"""Conditions of one row: encoded already (``prefix`` models), or as the network takes them at every step."""
SLACK = 256
"""Condition tokens by which rows of a pass may differ without regard to their ratio."""


@dataclass(frozen=True)
class Row:
    """What one pass over one row needs.

    Attributes:
        condition: Its conditions.
        target: ``[1, C, H, W]`` latents, or ``[1, L]`` token ids.
        sigma: Noise level 0–1; 0 for texts.
        positions: Bool ``[1, L]``, where logits are wanted; ``None`` for pictures.
    """

    condition: Known
    target: Tensor
    sigma: float = 0.0
    positions: Tensor | None = None


def length_of(condition: Known) -> int:
    """Condition tokens that attention pads; for uncached conditions their text alone, as pictures aren't padded."""
    return condition.length if isinstance(condition, ConditionCache) else condition.text.shape[1]


def _shape(row: Row) -> Hashable:
    """Rows of unequal shape can't share a pass."""
    condition = row.condition
    kind: Hashable = "image" if row.positions is None else "text"
    # Padding a short answer to a caption's length would cost more than a second pass, so lengths must agree.
    known: Hashable = None
    if isinstance(condition, Condition):
        known = (condition.text.shape[1] > 0, tuple(image.shape for image in condition.images))
    return kind, row.target.shape, known


class Batcher:
    """Runs a pipeline's network over rows.

    Args:
        pipe: The model.
        max_rows: Most rows of a pass.

    Attributes:
        passes: Forward passes done.
        rows: Rows in them.
    """

    def __init__(self, pipe: UniAlignmentPipeline, max_rows: int) -> None:
        self.pipe = pipe
        self.max_rows = max_rows
        self.passes = 0
        self.rows = 0
        self._joined: dict[Hashable, tuple[list[Known], Known]] = {}

    # --------------------------------------------------------------------------------------------------- conditions

    def encode(self, texts: Sequence[str | None], images: Sequence[tuple[Tensor, ...]]) -> list[Known]:
        """Conditions of rows, in as few passes as their pictures' shapes allow.

        Args:
            texts: Condition text of each; ``None``: no text at all.
            images: Latents ``[1, C, h, w]`` of each one's condition pictures.
        """
        groups: dict[Hashable, list[int]] = {}
        for index, (text, pictures) in enumerate(zip(texts, images, strict=True)):
            groups.setdefault((text is None, tuple(picture.shape for picture in pictures)), []).append(index)
        found: dict[int, Known] = {}
        for members in groups.values():
            for start in range(0, len(members), self.max_rows):
                chunk = members[start : start + self.max_rows]
                found.update(zip(chunk, self._encode([texts[i] for i in chunk], [images[i] for i in chunk])))
        return [found[index] for index in range(len(texts))]

    def _encode(self, texts: list[str | None], images: list[tuple[Tensor, ...]]) -> list[Known]:
        pipe, model = self.pipe, self.pipe.transformer
        stacked = tuple(torch.cat(column).to(pipe.dtype) for column in zip(*images, strict=True))
        if texts[0] is None:
            none = torch.zeros(len(texts), 0, pipe.text_embedder.embedding_dim, device=pipe.device, dtype=pipe.dtype)
            condition = Condition(none, none.new_zeros(none.shape[:2], dtype=torch.bool), stacked)
        else:
            condition = pipe.condition([text or "" for text in texts], stacked)
        rows = torch.arange(len(texts), device=pipe.device).split(1)
        if model.config.attention_mode != "prefix":
            return [condition.select(row) for row in rows]
        cache = model.prefill(text_embeds=condition.text, text_mask=condition.mask, images=condition.images)
        return [_trimmed(cache.select(row)) for row in rows]

    # ------------------------------------------------------------------------------------------------------- passes

    def predict(self, rows: Sequence[Row]) -> list[Tensor | Exception]:
        """Predictions of each row: velocity ``[1, C, H, W]``, or logits ``[M, V]`` at its M positions; float32.

        A pass that fails is tried again in halves, so that a failure is that of one row.
        """
        groups: dict[Hashable, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(_shape(row), []).append(index)
        results: dict[int, Tensor | Exception] = {}
        used: dict[Hashable, tuple[list[Known], Known]] = {}
        for shape, members in groups.items():
            for number, chunk in enumerate(self._chunks([(length_of(rows[i].condition), i) for i in members])):
                chosen = [rows[index] for index in chunk]
                key = (shape, number)
                results.update(zip(chunk, self._attempt(key, chosen)))
                if key in self._joined:
                    used[key] = self._joined[key]
        self._joined = used
        return [results[index] for index in range(len(rows))]

    def forget(self) -> None:
        """Let go of what is kept between passes."""
        self._joined = {}

    def _chunks(self, members: list[tuple[int, int]]) -> list[list[int]]:
        """Row numbers that share a pass, from ``(condition length, row)``: of similar length, ``max_rows`` at most.

        The same rows give the same passes, so that joined conditions can be kept between steps.
        """
        chunks: list[list[int]] = []
        longest = 0
        for length, row in sorted(members, key=lambda member: (-member[0], member[1])):
            if chunks and len(chunks[-1]) < self.max_rows and longest - length <= max(SLACK, longest // 2):
                chunks[-1].append(row)
            else:
                chunks.append([row])
                longest = length
        return chunks

    def _attempt(self, key: Hashable, rows: list[Row]) -> Sequence[Tensor | Exception]:
        try:
            return self._pass(key, rows)
        except Exception as error:
            self._joined.pop(key, None)
            if len(rows) == 1:
                return [error]
        # Outside of the handler: its traceback would keep the failed pass's tensors alive.
        middle = len(rows) // 2
        return [*self._attempt((key, 0), rows[:middle]), *self._attempt((key, 1), rows[middle:])]

    def _pass(self, key: Hashable, rows: list[Row]) -> list[Tensor]:
        pipe, model = self.pipe, self.pipe.transformer
        target = torch.cat([row.target for row in rows])
        tokens = target[0, 0].numel() // model.config.patch_size**2 if target.ndim == 4 else target.shape[1]
        condition = self._join(key, [row.condition for row in rows], tokens)
        self.passes += 1
        self.rows += len(rows)
        if rows[0].positions is None:
            timestep = torch.tensor([1000.0 * row.sigma for row in rows], device=target.device)
            latents = target.to(pipe.dtype)
            if isinstance(condition, ConditionCache):
                output = model.denoise(condition, latents=latents, timestep=timestep)
            else:
                output = model(
                    text_embeds=condition.text,
                    text_mask=condition.mask,
                    latents=latents,
                    sources=condition.images,
                    timestep=timestep,
                    target="image",
                    condition_features=False,
                )
            assert output.velocity is not None
            return list(output.velocity.float().split(1))
        positions = torch.cat([row.positions for row in rows if row.positions is not None])
        embeds = pipe.text_embedder.embed(target).to(pipe.dtype)
        timestep = torch.zeros(len(rows), device=target.device)
        if isinstance(condition, ConditionCache):
            output = model.denoise(condition, text_embeds=embeds, timestep=timestep, logit_positions=positions)
        else:
            output = model(
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
        assert output.text_logits is not None
        return list(output.text_logits.float().split(positions.sum(1).tolist()))

    def _join(self, key: Hashable, conditions: list[Known], tokens: int) -> Known:
        """One batch of the rows' conditions, with room for ``tokens`` of a target in encoded ones.

        Kept for the next step, which mostly has the same rows.
        """
        kept = self._joined.get(key)
        if kept is not None and len(kept[0]) == len(conditions) and all(map(_is, kept[0], conditions)):
            return kept[1]
        joined: Known
        if isinstance(conditions[0], ConditionCache):
            room = 0 if torch.is_grad_enabled() else tokens
            joined = ConditionCache.assemble([(c, None) for c in conditions if isinstance(c, ConditionCache)], room)
        else:
            joined = _concatenate([c for c in conditions if isinstance(c, Condition)])
        self._joined[key] = conditions, joined
        return joined


def _is(one: object, other: object) -> bool:
    return one is other


def _trimmed(cache: ConditionCache) -> ConditionCache:
    """A cache of one condition without the padding at its end that it got beside longer ones."""
    if cache.mask is None:
        return cache
    length = int(cache.mask.sum())
    if not bool(cache.mask[0, :length].all()):  # padding elsewhere: leave it
        return cache
    return ConditionCache(
        tuple(key[:, :, :length].contiguous() for key in cache.keys),
        tuple(value[:, :, :length].contiguous() for value in cache.values),
        None,
        TransformerOutput(),
        cache.aligned,
    )


def _concatenate(conditions: list[Condition]) -> Condition:
    """One batch of several uncached conditions; shorter texts are padded and masked."""
    length = max(one.text.shape[1] for one in conditions)
    return Condition(
        torch.cat([F.pad(one.text, (0, 0, 0, length - one.text.shape[1])) for one in conditions]),
        torch.cat([F.pad(one.mask, (0, length - one.mask.shape[1])) for one in conditions]),
        tuple(torch.cat(column) for column in zip(*(one.images for one in conditions), strict=True)),
    )
