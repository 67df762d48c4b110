"""Does the contrastive loss measure understanding, or can it be solved by looking at the pair?

The published form compares the two streams of one image pass. In ``joint`` attention each stream has attended to the
other; in ``prefix`` attention the picture has attended to the text. So the picture's features may simply carry the
text. Four readings tell the two explanations apart, over a pool of P pairs with chance 1/P:

* **as trained**: retrieval between features computed as the loss computes them, by noise level;
* **blind**: the same with pure noise in the picture's place (noise level 1). Nothing of the picture is left, so
  whatever is above chance is the text found again in the picture's stream;
* **swapped**: each picture is passed with another picture's caption. Features that describe the picture stay with its
  own caption; features that leak go with the caption of the pass;
* **separate**: each side embedded without the other, as a dual encoder is used. This is what the loss is for.

Knows nothing of training runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unialignment.errors import InputError
from unialignment.images import load_image

if TYPE_CHECKING:
    from unialignment.pipeline import UniAlignmentPipeline

FORMS = ("condition", "published")
LEVELS = (0.25, 0.5, 0.75, 0.95)
"""Noise levels of the readings *as trained* and *swapped*. All are kept: at one that training seldom drew, features
match nothing, with or without a leak."""


@dataclass(frozen=True)
class Leak:
    """Recall at 1 over one pool, both directions pooled, 0-1; chance is ``1 / pool``.

    Attributes:
        form: ``"condition"`` or ``"published"``, see :class:`~unialignment.training.objective.ObjectiveSettings`.
        pool: Number of pairs.
        as_trained: By noise level of the picture; ``"clean"`` for the condition form, whose pictures never are noised.
        blind: With noise in the picture's place.
        swapped_pass: By noise level as well, the share of pictures, passed with another's caption, whose features lie
            nearest that caption.
        swapped_own: The share of them whose features lie nearest their own caption.
        separate: With each side embedded alone.
    """

    form: str
    pool: int
    as_trained: dict[str, float]
    blind: float
    swapped_pass: dict[str, float]
    swapped_own: dict[str, float]
    separate: float

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return asdict(self)


@torch.no_grad()
def measure_leak(
    pipe: UniAlignmentPipeline,
    pictures: Sequence[Any],
    captions: Sequence[str],
    form: str,
    seed: int = 0,
    batch_size: int = 50,
) -> Leak:
    """Take all readings of one model.

    Args:
        pipe: The model.
        pictures: One for each pair, uint8 ``[R, R, 3]`` at the model's own size.
        captions: One for each pair; should be distinct, since a caption that occurs twice can't be told apart.
        form: How the model's contrastive loss took its pairs.
        seed: Seed of the noise.
        batch_size: Pairs per pass; features of a pair don't depend on it.

    Raises:
        InputError: the form is unknown, or pictures and captions don't pair up.
    """
    if form not in FORMS:
        raise InputError(f"form={form!r} is unknown; expected one of {', '.join(FORMS)}")
    if len(pictures) != len(captions) or len(pictures) < 2:
        raise InputError(f"{len(pictures)} pictures and {len(captions)} captions; expected at least two pairs")
    latents = torch.cat(
        [
            pipe.encode_images([load_image(one) for one in pictures[start : start + batch_size]])
            for start in range(0, len(pictures), batch_size)
        ]
    )
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    captions = list(captions)
    clean, texts = _embed_pictures(pipe, latents, batch_size), pipe.embed_text(captions)
    separate = recall(clean, texts)
    if form == "condition":
        blind = recall(_embed_pictures(pipe, noise, batch_size), texts)
        # Sides are encoded apart: the caption that goes with a pass can't change the picture's features.
        to_pass, to_own = _nearest(clean, texts.roll(-1, dims=0))
        return Leak(form, len(captions), {"clean": separate}, blind, {"clean": to_pass}, {"clean": to_own}, separate)

    def passed(texts: list[str], sigma: float) -> tuple[Tensor, Tensor]:
        return _streams(pipe, (1 - sigma) * latents + sigma * noise, texts, sigma, batch_size)

    as_trained = {f"{sigma:g}": recall(*passed(captions, sigma)) for sigma in LEVELS}
    swapped = captions[1:] + captions[:1]
    exchanged = {f"{sigma:g}": _nearest(*passed(swapped, sigma)) for sigma in LEVELS}
    return Leak(
        form,
        len(captions),
        as_trained,
        recall(*passed(captions, 1.0)),
        {level: found[0] for level, found in exchanged.items()},
        {level: found[1] for level, found in exchanged.items()},
        separate,
    )


def recall(images: Tensor, texts: Tensor) -> float:
    """Recall at 1 between unit vectors ``[P, E]``, row i belonging to row i, both directions pooled, 0-1."""
    similarity = images.double() @ texts.double().T
    return (_hits(similarity) + _hits(similarity.T)) / 2


def _hits(similarity: Tensor) -> float:
    """Share of rows whose largest entry is on the diagonal; a tie counts as a miss, so that a collapse scores zero."""
    others = similarity.clone().fill_diagonal_(-torch.inf)
    return float((similarity.diagonal() > others.max(dim=1).values).double().mean())


def _nearest(images: Tensor, shifted: Tensor) -> tuple[float, float]:
    """Where row i of ``shifted`` belongs to picture i + 1: shares of pictures nearest row i, and nearest their own."""
    similarity = images.double() @ shifted.double().T
    return _hits(similarity), _hits(similarity.roll(1, dims=1))


def _embed_pictures(pipe: UniAlignmentPipeline, latents: Tensor, batch_size: int) -> Tensor:
    return torch.cat([pipe.embed_latents(part) for part in latents.split(batch_size)])


def _streams(
    pipe: UniAlignmentPipeline, noised: Tensor, captions: list[str], sigma: float, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Embeddings of both streams of one image pass, as the published contrastive loss takes them."""
    images, texts = [], []
    for start in range(0, len(captions), batch_size):
        part = noised[start : start + batch_size].to(pipe.dtype)
        condition = pipe.condition(captions[start : start + batch_size])
        output = pipe.transformer(
            text_embeds=condition.text,
            text_mask=condition.mask,
            latents=part,
            timestep=torch.full((len(part),), 1000.0 * sigma, device=part.device),
            target="image",
        )
        images.append(pipe.transformer.embed(output.image_features, "image").float().cpu())
        texts.append(pipe.transformer.embed(output.text_features, "text", condition.mask).float().cpu())
    return torch.cat(images), torch.cat(texts)
