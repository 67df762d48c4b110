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


def estimate(values: Sequence[float] | Array, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> Estimate:
    """Mean and percentile-bootstrap interval (Efron 1979) of independent values.

    Args:
        values: One number per item; ``nan`` marks an item to which the metric does not apply and is left out.
        seed: Seed of the resampling.
        resamples: Number of resamples with replacement.
        level: Coverage, 0-1.

    Raises:
        ValueError: no value is left.
    """
    kept = np.asarray(values, dtype=np.float64)
    kept = kept[~np.isnan(kept)]
    if kept.size == 0:
        raise ValueError("estimate: got no values; expected at least one item to which the metric applies")
    draws = np.random.default_rng(seed).integers(0, kept.size, size=(resamples, kept.size))
    means = kept[draws].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(kept.mean()), float(low), float(high), int(kept.size))


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


def recall_at_1(similarity: Array) -> Array:
    """Per query (row), whether the paired item (same column) is the most similar one.

    A tie with another item counts as a miss, so that a collapsed embedding scores zero and not one.

    Args:
        similarity: ``[N, N]`` similarities, query by item.

    Returns:
        ``[N]`` floats, 0 or 1.

    Raises:
        ValueError: the matrix is not square.
    """
    similarity = np.asarray(similarity, dtype=np.float64)
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"recall_at_1: got a matrix of shape {similarity.shape}; expected [N, N]")
    own = np.diag(similarity).copy()
    others = similarity.copy()
    np.fill_diagonal(others, -np.inf)
    return (own > others.max(axis=1)).astype(np.float64)
