"""The published procedure for captions and answers, as its released pipeline runs it, on a pipeline of ours.

One picture at a time. A canvas of masks goes through the ancestral sampler of MDLM (arXiv 2406.07524, section 3.4) with
its cache, which is valid as long as a step has unmasked nothing, and a last pass writes the most likely word where a
mask is left. Nothing is kept between passes: every pass computes the picture's tokens, both streams and both heads, all
positions' logits and their softmax. Texts don't stop at their end. Its defaults are 64 steps, whatever the length.

Knows nothing of timing or judging.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from unialignment.errors import InputError

if TYPE_CHECKING:
    from unialignment.conditioning import Condition
    from unialignment.pipeline import UniAlignmentPipeline

STEPS = 64
"""Steps of the published pipeline's text sampler unless told otherwise."""


@dataclass(frozen=True)
class Written:
    """Texts and what they took.

    Attributes:
        texts: One a picture.
        passes: Network evaluations of each.
    """

    texts: list[str]
    passes: list[int]


@torch.no_grad()
def write_published(
    pipe: UniAlignmentPipeline,
    pictures: Sequence[Image.Image],
    questions: Sequence[str],
    length: int,
    seeds: Sequence[int],
    steps: int = STEPS,
) -> Written:
    """Write a text about each picture, one after the other.

    Args:
        pipe: The model.
        pictures: RGB pictures of the model's size.
        questions: One a picture; ``""``: a caption.
        length: Canvas in tokens.
        seeds: One a picture.
        steps: Steps of the reverse process.

    Raises:
        InputError: the lists differ in length, or there are no steps.
    """
    if not len(pictures) == len(questions) == len(seeds):
        raise InputError(f"{len(pictures)} pictures, {len(questions)} questions, {len(seeds)} seeds: give as many")
    if steps < 1 or length < 1:
        raise InputError(f"steps and length must be at least 1, got {steps} and {length}")
    texts, passes = [], []
    for picture, question, seed in zip(pictures, questions, seeds, strict=True):
        # The picture goes through the autoencoder once a text, as published.
        condition = pipe.condition([question], [pipe.encode_images([picture])])
        ids, count = _sample(pipe, condition, length, steps, torch.Generator().manual_seed(int(seed)))
        texts += pipe.tokenizer.decode(ids.tolist())
        passes.append(count)
    return Written(texts, passes)


def _sample(
    pipe: UniAlignmentPipeline, condition: Condition, length: int, steps: int, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Ids ``[1, L]`` and how many passes they took.

    The reverse step from t to s = t − 1/steps: a masked position stays so with weight s, and becomes a token with
    weight (t − s)·p(token); unmasked ones are copied.
    """
    mask = pipe.tokenizer.mask_token_id
    ids = torch.full((1, length), mask, device=pipe.device)
    probabilities: Tensor | None = None
    passes = 0
    for step in range(steps):
        here, there = 1 - step / steps, 1 - (step + 1) / steps
        if probabilities is None:
            probabilities, passes = _predict(pipe, condition, ids), passes + 1
        weights = probabilities * (here - there)
        weights[..., mask] = there
        # Exponential races: the smallest of E / w is w's winner, for all positions of the canvas at once.
        races = torch.empty(weights.shape).exponential_(generator=generator).to(weights.device)
        drawn = torch.where(ids == mask, (weights / races).argmax(-1), ids)
        if not torch.equal(drawn, ids):
            probabilities = None
        ids = drawn
    last = _predict(pipe, condition, ids).argmax(-1)
    return torch.where(ids == mask, last, ids), passes + 1


def _predict(pipe: UniAlignmentPipeline, condition: Condition, ids: Tensor) -> Tensor:
    """Probabilities ``[1, L, V]`` of every position's word, by one pass over everything."""
    model = pipe.transformer
    joint = model.config.attention_mode == "joint"
    output = model(
        text_embeds=pipe.text_embedder.embed(ids).to(pipe.dtype),
        latents=condition.images[0],
        condition_text_embeds=condition.text,
        condition_text_mask=condition.mask,
        timestep=torch.zeros(1, device=ids.device),
        target="both" if joint else "text",
    )
    if not joint:
        # `prefix` models have no pass for both targets: the picture's head, whose result nobody wants, on its own.
        model.image_proj_out(output.image_features)
    logits = output.text_logits.float()
    logits[..., pipe.tokenizer.mask_token_id] = -torch.inf
    return logits.softmax(-1)
