"""CIDEr-D, the consensus metric of captions (Vedantam, Zitnick and Parikh 2015, arXiv 1411.5726, section 5).

As in the evaluation code of COCO captions: n-grams of 1 to 4 words weighted by TF-IDF over the references at hand,
counts clipped to the reference's, a Gaussian penalty (sigma 6) on the difference of lengths, times ten. It differs
there in the words: this module lowers case and drops punctuation, COCO's tokenizer (a Java program) splits clitics
as well, and neither stems.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

LENGTHS = 4
SIGMA = 6.0

_Grams = Counter[tuple[str, ...]]


def words(text: str) -> list[str]:
    """Lower-case words, punctuation dropped."""
    return re.findall(r"[\w'-]+", text.lower())


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each candidate, 0-10.

    The score depends on the whole set of references, through the document frequencies: an n-gram that occurs in the
    references of every item says nothing.

    Args:
        candidates: One caption per item.
        references: The captions that people, or the world, gave to each item; at least one each.

    Raises:
        ValueError: Lengths differ, or an item has no reference.
    """
    if len(candidates) != len(references) or not all(references):
        raise ValueError(
            f"cider: got {len(candidates)} captions and references for {len(references)} items; "
            "expected one caption and at least one reference for each"
        )
    known = [[_grams(text) for text in texts] for texts in references]
    frequency: Counter[tuple[str, ...]] = Counter()
    for texts in known:
        frequency.update({gram for grams in texts for gram in grams})
    log_items = math.log(max(1, len(known)))

    def vector(grams: _Grams) -> dict[tuple[str, ...], float]:
        return {gram: count * (log_items - math.log(max(1, frequency[gram]))) for gram, count in grams.items()}

    scores: list[float] = []
    for text, texts in zip(candidates, known, strict=True):
        given, length = vector(_grams(text)), len(words(text))
        total = 0.0
        for number, grams in enumerate(texts):
            penalty = math.exp(-((length - _length(references, len(scores), number)) ** 2) / (2 * SIGMA**2))
            total += penalty * _likeness(given, vector(grams))
        scores.append(10 * total / len(texts))
    return scores


def _length(references: Sequence[Sequence[str]], item: int, number: int) -> int:
    return len(words(references[item][number]))


def _grams(text: str) -> _Grams:
    found = words(text)
    return Counter(
        tuple(found[start : start + n]) for n in range(1, LENGTHS + 1) for start in range(len(found) - n + 1)
    )


def _likeness(given: dict[tuple[str, ...], float], wanted: dict[tuple[str, ...], float]) -> float:
    """Mean over the lengths of clipped cosines."""
    total = 0.0
    for n in range(1, LENGTHS + 1):
        a = {gram: value for gram, value in given.items() if len(gram) == n}
        b = {gram: value for gram, value in wanted.items() if len(gram) == n}
        norm = math.sqrt(sum(v * v for v in a.values())) * math.sqrt(sum(v * v for v in b.values()))
        if norm:
            total += sum(min(value, b[gram]) * b[gram] for gram, value in a.items() if gram in b) / norm
    return total / LENGTHS
