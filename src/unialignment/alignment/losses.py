"""Alignment losses: hidden states towards a teacher (intrinsic), picture towards its text (cross-modal).

Knows nothing of models, teachers or how features travel between processes: a gather function is handed in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from unialignment.errors import InputError

Gather = Callable[[Tensor], tuple[Tensor, int]]
"""Features of this process ``[b, D]`` to those of all, ``[B, D]`` with gradient, and the row where this one's begin."""


def mean_pool(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens.

    Args:
        tokens: ``[B, N, D]``, or already pooled ``[B, D]``.
        mask: ``[B, N]``, true at the tokens that count; all when ``None``. A row without any gives zeros.

    Returns:
        ``[B, D]``.
    """
    if tokens.ndim == 2:
        return tokens
    if mask is None:
        return tokens.mean(dim=1)
    weight = mask.to(tokens.dtype)[..., None]
    return (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1)


def intrinsic_loss(predicted: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """``1 − cos(predicted, teacher)``, averaged.

    Pooled (published): both ``[B, D]``. Per token (REPA, arXiv 2410.06940): ``predicted [B, N, D]`` against a teacher
    of ``[B, N, D]``, or of ``[B, D]`` that every token is pulled to.

    Args:
        predicted: Projected hidden states.
        teacher: Teacher embeddings; no gradient flows into them.
        mask: Which rows ``[B]`` or tokens ``[B, N]`` count; all when ``None``.

    Returns:
        Scalar in ``[0, 2]``; 0 where nothing counts.

    Raises:
        InputError: Shapes that do not fit.
    """
    if predicted.ndim == 3 and teacher.ndim == 2:
        teacher = teacher[:, None].expand(-1, predicted.shape[1], -1)
    if predicted.shape != teacher.shape:
        raise InputError(
            f"predicted {list(predicted.shape)} and teacher {list(teacher.shape)} features differ in shape; "
            "is the projector's output_dim the teacher's width?"
        )
    distance = 1 - F.cosine_similarity(predicted.float(), teacher.detach().float(), dim=-1)
    if mask is None:
        return distance.mean()
    if mask.shape != distance.shape:
        raise InputError(f"mask must be {list(distance.shape)}, got {list(mask.shape)}")
    weight = mask.to(distance.dtype)
    return (distance * weight).sum() / weight.sum().clamp_min(1)


def contrastive_loss(
    image_tokens: Tensor,
    text_tokens: Tensor,
    *,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    gather: Gather | None = None,
) -> Tensor:
    """Symmetric InfoNCE between mean-pooled, then normalised picture and text features.

    ``L = ½ · (CE(I Tᵀ / τ) + CE(T Iᵀ / τ))`` with row i of each modality belonging together. The published form is
    this over the micro-batch, without masks. With ``gather`` the negatives come from every process; each computes the
    rows of its own samples, so that the mean over processes is the loss of the whole batch.

    Args:
        image_tokens: ``[B, N, D]`` or pooled ``[B, D]``.
        text_tokens: ``[B, L, D]`` or pooled ``[B, D]``.
        image_mask: ``[B, N]``, true at tokens that count.
        text_mask: ``[B, L]``, true at real (not padding) tokens.
        temperature: τ.
        gather: See ``Gather``; ``None`` in a single process.

    Returns:
        Scalar. 0 (with gradient) for fewer than two pairs, of which nothing can be learned.

    Raises:
        InputError: Numbers of pictures and texts differ.
    """
    image = F.normalize(mean_pool(image_tokens, image_mask).float(), dim=-1)
    text = F.normalize(mean_pool(text_tokens, text_mask).float(), dim=-1)
    if image.shape != text.shape:
        raise InputError(
            f"contrastive features come in pairs of one width, got {list(image.shape)}, {list(text.shape)}"
        )
    (all_images, offset), (all_texts, _) = (gather(image), gather(text)) if gather else ((image, 0), (text, 0))
    if len(all_images) < 2:
        return (image.sum() + text.sum()) * 0.0
    labels = torch.arange(offset, offset + len(image), device=image.device)
    to_text = F.cross_entropy(image @ all_texts.T / temperature, labels)
    to_image = F.cross_entropy(text @ all_images.T / temperature, labels)
    return (to_text + to_image) / 2


@torch.no_grad()
def retrieval_accuracy(image: Tensor, text: Tensor, top: int = 1) -> tuple[float, float]:
    """Recall at ``top`` of text by picture and of picture by text, features ``[B, D]``, row i belonging to row i."""
    scores = F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T
    labels = torch.arange(len(scores), device=scores.device)[:, None]
    top = min(top, len(scores))
    return (
        (scores.topk(top, dim=1).indices == labels).any(1).float().mean().item(),
        (scores.T.topk(top, dim=1).indices == labels).any(1).float().mean().item(),
    )
