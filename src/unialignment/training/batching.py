"""From samples to the tensors of one forward pass. Knows tasks and tokenizers, not models or losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from unialignment.data.sample import Image, Sample
from unialignment.errors import InputError
from unialignment.model.tokenizer import TextTokenizer, encode_conditions
from unialignment.tasks import TASKS

T = TypeVar("T")
PROMPT_BUCKET = 8
"""Condition texts are padded to a multiple of this many tokens, to bound the number of distinct shapes."""
LONG_PROMPT = 160
"""Prompts of more characters, and twice as long as most, form a batch of their own."""


@dataclass(frozen=True)
class Batch:
    """Samples of one signature (same target kind, same number of sources), as tensors.

    Attributes:
        target: ``"image"`` or ``"text"``.
        tasks: Task of each sample.
        kinds: Finer label of each sample.
        prompt_ids: ``[B, L]`` condition text, each ended by one visible end token.
        prompt_mask: Bool ``[B, L]``.
        sources: Each ``[B, 3, H, W]`` in −1…1.
        target_images: ``[B, 3, H, W]`` in −1…1, for image targets.
        target_ids: ``[B, L]``, for text targets; ends are padded with the end token, which is learned too.
        maskable: Bool ``[B, L]``, target positions that diffusion may mask.
        pair_ids: ``[B]``, −1 where unpaired, see :class:`~unialignment.data.sample.Sample`.
        weights: ``[B]`` weight of each sample's loss.
        image_teacher: ``[B, D]`` teacher embeddings of the target pictures, or ``None``.
        text_teacher: ``[B, D]`` teacher embeddings of the captions, or ``None``.
        question_lengths: ``[B]`` tokens that ``target_ids`` begin with and that aren't the target's own, for tokenizers
            with ``question_first``; else ``None``.
        encoded: ``sources`` and ``target_images`` are latents ``[B, C, h, w]``, from a feature cache.
        prompt_embeds: ``[B, L, D]`` embedding of ``prompt_ids`` by a frozen encoder, from a feature cache.
    """

    target: str
    tasks: tuple[str, ...]
    kinds: tuple[str, ...]
    prompt_ids: Tensor
    prompt_mask: Tensor
    sources: tuple[Tensor, ...]
    target_images: Tensor | None
    target_ids: Tensor | None
    maskable: Tensor | None
    pair_ids: Tensor
    weights: Tensor
    image_teacher: Tensor | None = None
    text_teacher: Tensor | None = None
    question_lengths: Tensor | None = None
    encoded: bool = False
    prompt_embeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tasks)

    def without_questions(self, ids: Tensor) -> list[list[int]]:
        """Target ids ``[B, L]``, true or predicted, less the questions that they begin with."""
        rows: list[list[int]] = ids.tolist()
        if self.question_lengths is None:
            return rows
        return [row[start:] for row, start in zip(rows, self.question_lengths.tolist(), strict=True)]


def images_to_tensor(images: Sequence[Image]) -> Tensor:
    """uint8 pictures ``[H, W, 3]`` of one size to floats ``[B, 3, H, W]`` in −1…1.

    Raises:
        InputError: the pictures differ in size.
    """
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise InputError(f"pictures of one batch must have one size, got {sorted(shapes)}: resize or bucket them.")
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return stacked.float().mul_(2 / 255).sub_(1)


def _stack(latents: Sequence[Any]) -> Tensor:
    """Latents ``[C, h, w]`` of one shape to ``[B, C, h, w]``."""
    return torch.stack([torch.as_tensor(each, dtype=torch.float32) for each in latents])


def collate(
    samples: Sequence[Sample],
    tokenizer: TextTokenizer,
    *,
    prompt_dropout: float = 0.0,
    rng: np.random.Generator | None = None,
    task_weights: dict[str, float] | None = None,
    teacher: dict[int, tuple[Tensor, Tensor]] | None = None,
    encoded: bool = False,
) -> list[Batch]:
    """Groups samples by signature and makes each group a batch.

    Args:
        samples: Any mixture of tasks.
        tokenizer: The text tokenizer.
        prompt_dropout: Probability of replacing the prompt of an image target by the empty one, which trains the
            unconditional branch of classifier-free guidance. Not for text targets: a question can't be dropped.
        rng: Source of that randomness; needed when ``prompt_dropout`` is positive.
        task_weights: Loss weight by task; 1 where absent.
        teacher: ``pair_id -> (image embedding, text embedding)``; used where all samples of a batch have one.
        encoded: The samples hold latents ``[C, h, w]`` in place of pictures.

    Raises:
        InputError: a text is longer than its task's canvas, or a sample lacks its target.
    """
    stack = _stack if encoded else images_to_tensor
    groups: dict[tuple[str, int, int, tuple[tuple[int, ...], ...]], list[Sample]] = {}
    for sample in samples:
        task = TASKS.get(sample.task)
        shapes = tuple(image.shape for image in (sample.target_image, *sample.sources) if image is not None)
        groups.setdefault((task.target, len(sample.sources), task.target_length, shapes), []).append(sample)
    batches = []
    parts = [(key, part) for key, group in sorted(groups.items()) for part in _by_length(group)]
    for (target, source_count, length, _), group in parts:
        # A text with gaps is no condition: its words stand in the target's canvas, where they are never masked.
        gaps = [TASKS.get(sample.task).gaps for sample in group]
        prompts = ["" if gap else sample.prompt for gap, sample in zip(gaps, group, strict=True)]
        paired = [sample.pair_id is not None for sample in group]
        if target == "image" and prompt_dropout > 0:
            if rng is None:
                raise InputError("prompt_dropout needs a random generator: pass rng.")
            drop = rng.random(len(group)) < prompt_dropout
            prompts = ["" if d else p for d, p in zip(drop, prompts, strict=True)]
            # A dropped prompt says nothing of the picture, so it is no partner for the contrastive loss.
            paired = [p and not d for p, d in zip(paired, drop, strict=True)]
        ids, mask = encode_conditions(tokenizer, prompts, PROMPT_BUCKET)
        target_images = target_ids = maskable = question_lengths = None
        if target == "image":
            target_images = stack([_need(s.target_image, s, "target_image") for s in group])
        else:
            texts = [_need(sample.target_text, sample, "target_text") for sample in group]
            target_ids, _ = tokenizer.encode(texts, length=length)
            maskable = torch.ones_like(target_ids, dtype=torch.bool)
            for row in (row for row, gap in enumerate(gaps) if gap):
                maskable[row] = _gap_positions(group[row], target_ids[row], tokenizer)
            for row, sample in enumerate(group):
                for span in sample.given:
                    first, behind = (_tokens(tokenizer, texts[row][:end]) for end in span)
                    maskable[row, first:behind] = False
            if tokenizer.question_first:
                target_ids, maskable, question_lengths = _lead(prompts, target_ids, maskable, tokenizer)
                ids, mask = ids[:, :0], mask[:, :0]
        image_teacher = text_teacher = None
        if teacher is not None and all(s.pair_id in teacher for s in group):
            image_teacher = torch.stack([teacher[s.pair_id][0] for s in group if s.pair_id is not None])
            text_teacher = torch.stack([teacher[s.pair_id][1] for s in group if s.pair_id is not None])
        batches.append(
            Batch(
                target=target,
                tasks=tuple(sample.task for sample in group),
                kinds=tuple(sample.kind for sample in group),
                prompt_ids=ids,
                prompt_mask=mask,
                sources=tuple(stack([s.sources[i] for s in group]) for i in range(source_count)),
                target_images=target_images,
                target_ids=target_ids,
                maskable=maskable,
                pair_ids=torch.tensor(
                    [s.pair_id if p and s.pair_id is not None else -1 for s, p in zip(group, paired, strict=True)]
                ),
                weights=torch.tensor([(task_weights or {}).get(sample.task, 1.0) for sample in group]),
                image_teacher=image_teacher,
                text_teacher=text_teacher,
                question_lengths=question_lengths,
                encoded=encoded,
            )
        )
    return batches


def _by_length(group: list[Sample]) -> list[list[Sample]]:
    """The group, without the few prompts beside which all others would be mostly padding, and those."""
    lengths = [len(sample.prompt) for sample in group]
    limit = max(LONG_PROMPT, 2 * sorted(lengths)[len(lengths) // 2])
    short, long = (
        [sample for sample, length in zip(group, lengths, strict=True) if (length > limit) is side]
        for side in (False, True)
    )
    return [part for part in (short, long) if part]


def _lead(
    prompts: Sequence[str], target_ids: Tensor, maskable: Tensor, tokenizer: TextTokenizer
) -> tuple[Tensor, Tensor, Tensor]:
    """Target ids and maskable positions with the questions put before them, and the questions' lengths.

    Rows of shorter questions are filled up with the end token, which is learned like any other end.
    """
    questions = [tokenizer.encode([prompt])[0][0] if prompt else target_ids.new_zeros(0) for prompt in prompts]
    length = max(len(question) for question in questions) + target_ids.shape[1]
    ids = target_ids.new_full((len(questions), length), tokenizer.pad_token_id)
    allowed = maskable.new_ones(ids.shape)
    for row, question in enumerate(questions):
        start, end = len(question), len(question) + target_ids.shape[1]
        ids[row, :start], ids[row, start:end] = question, target_ids[row]
        allowed[row, :start], allowed[row, start:end] = False, maskable[row]
        if not bool(maskable[row].all()):  # only the gaps of a text are its target
            allowed[row, end:] = False
    return ids, allowed, torch.tensor([len(question) for question in questions])


def _gap_positions(sample: Sample, target: Tensor, tokenizer: TextTokenizer) -> Tensor:
    """Bool ``[L]``: where the prompt of an infill sample has gaps in its target's canvas.

    Raises:
        InputError: the prompt has no gaps, or isn't the target with gaps of one token each.
    """
    given = tokenizer.encode([sample.prompt], length=len(target), gaps=True, truncate=True)[0][0]
    gaps = given == tokenizer.mask_token_id
    if not bool(gaps.any()) or not torch.equal(given[~gaps], target[~gaps]):
        raise InputError(
            f"an infill sample's prompt must be its target text with some words replaced by [MASK], each of one token; "
            f"got prompt {sample.prompt!r} for {sample.target_text!r}."
        )
    return gaps


def _tokens(tokenizer: TextTokenizer, text: str) -> int:
    """Tokens of the beginning of a text, which ends between words."""
    ids = tokenizer.encode([text.rstrip()])[1] if text.strip() else None
    return 0 if ids is None else int(ids.sum()) - (tokenizer.eos_token_id is not None)


def _need(value: T | None, sample: Sample, name: str) -> T:
    if value is None:
        raise InputError(f"a {sample.task} sample lacks its {name}.")
    return value
