"""The contrastive loss over pairs that lie in different batches, micro-batches and processes.

Pictures and texts of a pair are embedded in different passes. Here their embeddings are gathered, matched by id and
compared, each process computing its own part of the rows against all columns. Two ways exist to the same gradient:

* through the gather (:class:`GatherRows`): backward sums over processes, and each receives the gradient of its rows;
* GradCache (Gao et al., arXiv 2101.06983): embed everything without gradient, differentiate the loss by the embeddings
  alone, then let each micro-batch's ordinary pass add ``<embedding, that gradient>``. Exact, and no more than one
  micro-batch's activations are ever held.

Knows nothing of models: embeddings come in, a loss or gradients go out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class GatherRows(torch.autograd.Function):
    """``[b, D]`` of each process of a group to ``[N·b, D]`` of all, with gradient.

    Backward sums the gradients that the processes have for the gathered rows and returns this process's own.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        """All processes' rows, in order of rank."""
        ctx.group, ctx.size, ctx.place = group, rows.shape[0], dist.get_rank(group)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, rows.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        """This process's rows of the sum over processes."""
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.place * ctx.size : (ctx.place + 1) * ctx.size], None


@dataclass(frozen=True)
class Exchange:
    """How embeddings travel between processes that compute one loss together.

    Attributes:
        group: Their process group; ``None``: this process is alone.
        parts: How many they are.
        part: Which one this is.
    """

    group: Any = None
    parts: int = 1
    part: int = 0

    def gather(self, rows: Tensor) -> Tensor:
        """Everyone's rows ``[b, …]``, the same number from each, with gradient where they have one."""
        if self.parts == 1:
            return rows
        if rows.requires_grad:
            gathered: Tensor = GatherRows.apply(rows, self.group)  # type: ignore[no-untyped-call]
            return gathered
        parts = [torch.empty_like(rows) for _ in range(self.parts)]
        dist.all_gather(parts, rows.contiguous(), group=self.group)
        return torch.cat(parts)


@dataclass
class Side:
    """Embeddings of one modality, as they come: ids ``[b]`` (−1: unpaired) and unit vectors ``[b, E]``."""

    ids: list[Tensor] = field(default_factory=list)
    embeddings: list[Tensor] = field(default_factory=list)

    def add(self, ids: Tensor, embeddings: Tensor) -> None:
        """One batch more."""
        self.ids.append(ids)
        self.embeddings.append(embeddings)

    def gathered(self, exchange: Exchange) -> tuple[list[int], Tensor | None]:
        """Ids and embeddings of all processes; ``[]`` and ``None`` where there are none."""
        if not self.ids:
            return [], None
        embeddings = torch.cat(self.embeddings)
        ids = exchange.gather(torch.cat(self.ids).to(embeddings.device))
        return ids.tolist(), exchange.gather(embeddings)


def matched(images: Sequence[int], texts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Rows of pictures and of texts that belong together, in order of their ids; of equal ids the last counts."""
    image_rows = {number: row for row, number in enumerate(images) if number >= 0}
    text_rows = {number: row for row, number in enumerate(texts) if number >= 0}
    shared = sorted(image_rows.keys() & text_rows.keys())
    return [image_rows[i] for i in shared], [text_rows[i] for i in shared]


def shared_contrastive_loss(
    images: Tensor, texts: Tensor, temperature: float, exchange: Exchange
) -> tuple[Tensor, Tensor]:
    """This process's part of symmetric InfoNCE over all pairs; summed over the processes it is the whole loss.

    Args:
        images: ``[P, E]`` of all pairs.
        texts: ``[P, E]``, row i belonging to row i.
        temperature: τ.
        exchange: Which rows are this process's.

    Returns:
        The part of the loss, and the part of the share of pictures that find their text (without gradient).
    """
    images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
    count = len(images)
    rows = slice(count * exchange.part // exchange.parts, count * (exchange.part + 1) // exchange.parts)
    labels = torch.arange(count, device=images.device)[rows]
    scores = images[rows] @ texts.T
    to_text = F.cross_entropy(scores / temperature, labels, reduction="sum")
    to_image = F.cross_entropy(texts[rows] @ images.T / temperature, labels, reduction="sum")
    right = (scores.detach().argmax(1) == labels).float().sum() if len(labels) else scores.new_zeros(())
    return (to_text + to_image) / (2 * count), right / count


@dataclass
class Contrast:
    """The contrastive loss of one micro-batch, collected while its batches pass.

    Attributes:
        temperature: τ.
        exchange: The processes that share the micro-batch's rows; each calls the same methods for each batch.
        losses: This process's parts of the losses so far, times the number of parts, or surrogates for them.
        images: Pictures that are compared with ``texts`` once all have come.
        texts: Their texts.
    """

    temperature: float
    exchange: Exchange
    losses: list[Tensor] = field(default_factory=list)
    images: Side = field(default_factory=Side)
    texts: Side = field(default_factory=Side)

    def compare_within(self, ids: Tensor, images: Tensor, texts: Tensor) -> None:
        """Compare the pairs of one batch, which has both sides of each, with one another alone."""
        images, texts, ids = (self.exchange.gather(each) for each in (images, texts, ids.to(images.device)))
        rows = (ids >= 0).nonzero().flatten().tolist()
        if len(rows) > 1:
            self._add(images[rows], texts[rows])

    def compare(self) -> Tensor | None:
        """Compare the pictures and texts that have come; returns the accuracy, ``None`` for fewer than two pairs."""
        text_ids, texts = self.texts.gathered(self.exchange)
        image_ids, images = self.images.gathered(self.exchange)
        first, second = matched(image_ids, text_ids)
        if len(first) < 2 or images is None or texts is None:
            return None
        return self._add(images[first], texts[second])

    def _add(self, images: Tensor, texts: Tensor) -> Tensor:
        loss, accuracy = shared_contrastive_loss(images, texts, self.temperature, self.exchange)
        self.losses.append(loss * self.exchange.parts)
        return accuracy * self.exchange.parts


@dataclass(frozen=True)
class CachedGradients:
    """What GradCache keeps between its two passes.

    Attributes:
        gradients: By micro-batch, by batch: gradients of the loss by its picture and text embeddings ``[b, E]``;
            ``None`` where it has none.
        loss: The loss over all pairs.
        accuracy: Share of pictures that find their text.
        pairs: How many pairs.
    """

    gradients: list[list[tuple[Tensor | None, Tensor | None]]]
    loss: Tensor
    accuracy: Tensor
    pairs: int


def cached_gradients(
    features: list[list[tuple[Tensor, Tensor | None, Tensor | None]]], temperature: float, exchange: Exchange
) -> CachedGradients | None:
    """First half of GradCache: the contrastive loss of all micro-batches of all processes, by its embeddings.

    Args:
        features: By micro-batch, by batch: pair ids ``[b]``, picture embeddings ``[b, E]`` and text embeddings
            ``[b, E]``, without gradient; ``None`` where the batch gives none.
        temperature: τ.
        exchange: All processes of the run.

    Returns:
        The gradients, the same sum on every number of processes; ``None`` if there are fewer than two pairs.
    """
    leaves = [[(ids, _leaf(image), _leaf(text)) for ids, image, text in micro] for micro in features]
    images, texts = Side(), Side()
    for micro in leaves:
        for ids, image, text in micro:
            if image is not None:
                images.add(ids, image)
            if text is not None:
                texts.add(ids, text)
    with torch.enable_grad():
        image_ids, all_images = _ragged(images, exchange)
        text_ids, all_texts = _ragged(texts, exchange)
        first, second = matched(image_ids, text_ids)
        if len(first) < 2 or all_images is None or all_texts is None:
            return None
        loss, accuracy = shared_contrastive_loss(all_images[first], all_texts[second], temperature, exchange)
        loss.backward()  # type: ignore[no-untyped-call]
    totals = torch.stack([loss.detach(), accuracy])
    if exchange.parts > 1:
        dist.all_reduce(totals, group=exchange.group)
    gradients = [
        [(None if i is None else i.grad, None if t is None else t.grad) for _, i, t in micro] for micro in leaves
    ]
    return CachedGradients(gradients, totals[0], totals[1], len(first))


def _leaf(embeddings: Tensor | None) -> Tensor | None:
    return None if embeddings is None else embeddings.detach().clone().requires_grad_()


def _ragged(side: Side, exchange: Exchange) -> tuple[list[int], Tensor | None]:
    """Gather where processes may have different numbers of rows, or none: padded with unpaired ones."""
    if exchange.parts == 1:
        return side.gathered(exchange)
    size = torch.tensor([sum(map(len, side.ids)), side.embeddings[0].shape[1] if side.ids else 0])
    device = side.embeddings[0].device if side.ids else torch.device("cpu")
    backend_device = "cuda" if dist.get_backend(exchange.group) == "nccl" else "cpu"
    largest = size.clone().to(backend_device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=exchange.group)
    rows, width = largest.tolist()
    if not rows:
        return [], None
    missing = rows - int(size[0])
    if missing:
        where = device if side.ids else torch.device(backend_device)
        side.add(
            torch.full((missing,), -1, device=where, dtype=torch.int64),
            torch.zeros(missing, width, device=where, requires_grad=True),
        )
    side.ids = [ids.to(side.embeddings[0].device) for ids in side.ids]
    return side.gathered(exchange)
