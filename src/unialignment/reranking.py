"""``best_of=N``: which of the pictures drawn for one input are kept, by the model's own image–text similarity.

Also the arithmetic for judging it: what best-of-n would have given, for every n, from one set of scored samples. Knows
nothing of how pictures are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unialignment.errors import InputError

if TYPE_CHECKING:
    from unialignment.pipeline import UniAlignmentPipeline


class Reranker:
    """Collects similarities while pictures are drawn, then says which are kept.

    Args:
        pipe: The model, by whose embeddings pictures and texts are compared.
        texts: What the pictures of each input are compared with.
        drawn: Pictures for each input.

    Raises:
        InputError: A text is empty or too long.
    """

    def __init__(self, pipe: UniAlignmentPipeline, texts: Sequence[str], drawn: int) -> None:
        self._pipe, self._drawn = pipe, drawn
        self._texts = pipe.embed_text(list(texts))
        self.scores = torch.zeros(len(texts) * drawn)
        """Cosines, −1…1, of every picture to its text, grouped by input."""

    def see(self, indices: Sequence[int], latents: Tensor) -> None:
        """Score pictures, given as latents ``[B, C, h, w]``; ``indices`` count all pictures, grouped by input."""
        rows = [index // self._drawn for index in indices]
        self.scores[list(indices)] = (self._pipe.embed_latents(latents) * self._texts[rows]).sum(-1)

    def best(self, keep: int) -> list[int]:
        """Indices of the ``keep`` highest scores of each input, best first; of equal ones the earlier."""
        order = self.scores.view(-1, self._drawn).argsort(dim=1, descending=True, stable=True)[:, :keep]
        return [row * self._drawn + int(column) for row, columns in enumerate(order.tolist()) for column in columns]


def expected_best_of(scores: Sequence[float], values: Sequence[float], n: int) -> float:
    """Mean value of the highest-scoring of ``n`` pictures, over all subsets of n of the given ones.

    Of m pictures in falling order of score, the one of rank k (from 0) is the best of ``C(m - k - 1, n - 1)`` of the
    ``C(m, n)`` subsets. So one set of m drawn and judged pictures gives an unbiased estimate for every n up to m.
    Pictures of equal score count with their mean value, as if ties were broken at random.

    Args:
        scores: Score of each picture.
        values: What a judge found of each picture.
        n: Pictures to choose from.

    Raises:
        InputError: ``n`` is not between 1 and the number of pictures, or scores and values differ in number.
    """
    count = len(scores)
    if len(values) != count or not 1 <= n <= count:
        raise InputError(f"best of {n} among {count} scores and {len(values)} values; expected 1 ≤ n ≤ their number")
    by_score: dict[float, list[float]] = {}
    for score, value in zip(scores, values, strict=True):
        by_score.setdefault(float(score), []).append(float(value))
    total, rank = 0.0, 0
    for score in sorted(by_score, reverse=True):
        tied = by_score[score]
        chances = sum(math.comb(count - k - 1, n - 1) for k in range(rank, rank + len(tied)))
        total += chances * sum(tied) / len(tied)
        rank += len(tied)
    return total / math.comb(count, n)
