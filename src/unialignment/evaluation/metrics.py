"""Metrics as pure functions of arrays and lists: agreement of maps and pictures, retrieval, confidence intervals.

Knows nothing of models, tasks, scenes or files. Pictures are ``[H, W, 3]`` or ``[H, W]`` 8-bit arrays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

MAX_PSNR = 60.0
"""Decibels reported for (nearly) identical pictures, so that means stay finite."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its bootstrap interval.

    Attributes:
        value: Mean of the values.
        low: Lower end of the interval.
        high: Upper end of the interval.
        count: Number of values.
    """

    value: float
    low: float
    high: float
    count: int


class Weighted(float):
    """A share that stands for several things: the share of an item's objects, weighing as many as there are.

    Means of such values are pooled over the things, and resampled over the items.
    """

    weight: float

    def __new__(cls, value: float, weight: float) -> Weighted:
        made = super().__new__(cls, value)
        made.weight = weight
        return made


def estimate(values: Sequence[float] | Array, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> Estimate:
    """Mean and percentile-bootstrap interval (Efron 1979) of independent values.

    Args:
        values: One number per item; ``nan`` marks an item to which the metric does not apply and is left out. A
            :class:`Weighted` number counts as often as its weight says; the others once.
        seed: Seed of the resampling.
        resamples: Number of resamples with replacement.
        level: Coverage, 0-1.

    Raises:
        ValueError: no value is left.
    """
    weights = np.array([getattr(value, "weight", 1.0) for value in values], dtype=np.float64)
    kept = np.asarray(values, dtype=np.float64)
    weights, kept = weights[~np.isnan(kept)], kept[~np.isnan(kept)]
    if kept.size == 0:
        raise ValueError("estimate: got no values; expected at least one item to which the metric applies")
    means = _resampled(kept, weights, np.random.default_rng(seed), resamples)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(np.average(kept, weights=weights)), float(low), float(high), int(kept.size))


def _resampled(values: Array, weights: Array, rng: np.random.Generator, resamples: int) -> Array:
    draws = rng.integers(0, values.size, size=(resamples, values.size))
    means: Array = (values * weights)[draws].sum(axis=1) / weights[draws].sum(axis=1)
    return means


def mean_of_groups(
    groups: Sequence[Sequence[float]], seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Estimate:
    """Unweighted mean of the groups' means, each group resampled on its own (a stratified bootstrap).

    Raises:
        ValueError: A group is empty.
    """
    if not groups or not all(len(group) for group in groups):
        raise ValueError("mean_of_groups: expected at least one value in every group")
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    means = np.mean([_resampled(array, np.ones(array.size), rng, resamples) for array in arrays], axis=0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    value = float(np.mean([array.mean() for array in arrays]))
    return Estimate(value, float(low), float(high), sum(array.size for array in arrays))


def contains_all(found: Iterable[str], expected: Iterable[str]) -> bool:
    """Whether every expected name is found, as often as expected (multiset inclusion)."""
    return not Counter(expected) - Counter(found)


def same_names(found: Iterable[str], expected: Iterable[str]) -> bool:
    """Whether exactly the expected names are found (multiset equality)."""
    return Counter(found) == Counter(expected)


def grey(image: Array) -> Array:
    """Mean over channels as float64 ``[H, W]``, 0-255."""
    values = np.asarray(image, dtype=np.float64)
    return values.mean(axis=-1) if values.ndim == 3 else values


def psnr(first: Array, second: Array, where: Array | None = None) -> float:
    """Peak signal-to-noise ratio in decibels, at most :data:`MAX_PSNR`.

    Args:
        first: Picture, 8-bit.
        second: Picture of the same shape.
        where: ``[H, W]`` booleans: pixels to compare; all by default. ``nan`` is returned if none is chosen.

    Raises:
        ValueError: the shapes differ.
    """
    if np.shape(first) != np.shape(second):
        raise ValueError(f"psnr: pictures of shapes {np.shape(first)} and {np.shape(second)}; expected equal shapes")
    squared = (np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)) ** 2
    if where is not None:
        squared = squared[np.asarray(where, dtype=bool)]
    if squared.size == 0:
        return float("nan")
    error = float(squared.mean())
    floor = 255.0**2 / 10 ** (MAX_PSNR / 10)
    return float(10 * np.log10(255.0**2 / max(error, floor)))


def iou(prediction: Array, target: Array, threshold: float = 127.5) -> float:
    """Intersection over union, 0-1, of the bright areas of two masks; 1 if both are empty."""
    first, second = grey(prediction) > threshold, grey(target) > threshold
    union = np.logical_or(first, second).sum()
    return float(np.logical_and(first, second).sum() / union) if union else 1.0


def share_found(found: Iterable[str], expected: Iterable[str]) -> Weighted:
    """Share of the expected names that are found, as often as expected, weighing as many as are expected."""
    wanted = Counter(expected)
    total = wanted.total()
    missing = (wanted - Counter(found)).total()
    return Weighted((total - missing) / total if total else float("nan"), total)


def depth_abs_rel(prediction: Array, target: Array) -> float:
    """Mean of ``|given - true| / true`` over the target's foreground (AbsRel of Eigen et al. 2014); 0 is best.

    ``nan`` if there is no foreground.
    """
    expected = grey(target)
    foreground = expected > 0.5
    if not foreground.any():
        return float("nan")
    return float((np.abs(grey(prediction) - expected)[foreground] / expected[foreground]).mean())


def depth_delta1(prediction: Array, target: Array, ratio: float = 1.25) -> float:
    """Share of the target's foreground pixels whose value is within a factor ``ratio`` (delta-1 of Eigen et al. 2014).

    Maps are bright where near, and 0 on the background, which is left out here. ``nan`` if there is no foreground.
    """
    expected = grey(target)
    foreground = expected > 0.5
    if not foreground.any():
        return float("nan")
    expected = expected[foreground]
    given = np.maximum(grey(prediction)[foreground], 1e-6)
    return float((np.maximum(given / expected, expected / given) < ratio).mean())


def dilate(mask: Array, radius: int) -> Array:
    """Binary dilation by a square of side ``2 * radius + 1``."""
    mask = np.asarray(mask, dtype=bool)
    if radius == 0:
        return mask
    padded = np.pad(mask, radius)
    rows, columns = mask.shape
    result = np.zeros_like(mask)
    for y in range(2 * radius + 1):
        for x in range(2 * radius + 1):
            result |= padded[y : y + rows, x : x + columns]
    return result


def edge_f1(prediction: Array, target: Array, tolerance: int = 1, threshold: float = 127.5) -> float:
    """F1 of edge pixels, 0-1, where a pixel counts as matched within ``tolerance`` pixels (as in BSDS, by dilation)."""
    first, second = grey(prediction) > threshold, grey(target) > threshold
    if not first.any() and not second.any():
        return 1.0
    if not first.any() or not second.any():
        return 0.0
    precision = float((first & dilate(second, tolerance)).sum() / first.sum())
    recall = float((second & dilate(first, tolerance)).sum() / second.sum())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def recall_at(similarity: Array, k: int = 1) -> Array:
    """Per query (row), whether the paired item (same column) is among the ``k`` most similar ones.

    Ties with other items count against it, so that a collapsed embedding scores zero and not one.

    Args:
        similarity: ``[N, N]`` similarities, query by item.
        k: How many may be shown.

    Returns:
        ``[N]`` floats, 0 or 1.

    Raises:
        ValueError: the matrix is not square.
    """
    similarity = np.asarray(similarity, dtype=np.float64)
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"recall_at: got a matrix of shape {similarity.shape}; expected [N, N]")
    before = (similarity >= np.diag(similarity)[:, None]).sum(axis=1) - 1
    return (before < k).astype(np.float64)
