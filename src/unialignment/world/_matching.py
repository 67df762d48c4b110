"""Least-squares template matching: how much of a picture's error does one more sprite explain, anywhere, at any depth?

Knows templates (premultiplied RGBA), canvases and arithmetic; knows nothing of scenes, classes, search or acceptance.

One sprite with premultiplied colour ``S`` and coverage ``a`` is drawn between what lies behind it, ``B``, and what lies in
front of it (premultiplied colour ``F``, transmittance ``w``):

    picture = F + w * ((1 - a) * B + S)

With ``D = I - F - w * B`` (the error without the sprite) the squared error falls by

    gain = 2 <w D, S - a B> - |w (S - a B)|^2

which is linear in nine per-pixel features of the canvas, ``wD`` (3), ``w <D, B>``, ``w^2``, ``w^2 B`` (3) and ``w^2 |B|^2``,
against nine per-pixel weights of the template. All templates at all positions are therefore two matrix products.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

CORRELATION_CHANNELS = 4
"""The first features carry ``<wD, S - aB>``; the other five carry the template's energy ``|w (S - aB)|^2``."""


def blur_matrix(size: int, sigma: float, pad: int = 0) -> Array:
    """Matrix ``[size + 2 pad, size]`` that blurs one axis with a Gaussian of ``sigma`` pixels.

    Without padding rows are renormalised (the picture's edge does not darken); with padding the signal is taken as zero
    outside, as a sprite's coverage is. ``sigma = 0`` only pads.
    """
    target = np.arange(size + 2 * pad, dtype=np.float64) - pad
    distance = target[:, None] - np.arange(size, dtype=np.float64)[None]
    if sigma <= 0:
        return (distance == 0).astype(np.float32)
    kernel = np.exp(-0.5 * (distance / sigma) ** 2)
    norm = np.exp(-0.5 * (np.arange(-64, 65) / sigma) ** 2).sum() if pad else kernel.sum(axis=1, keepdims=True)
    return (kernel / norm).astype(np.float32)


def apply_separable(image: Array, matrix: Array) -> Array:
    """``matrix`` applied along both leading axes of ``image [H, W, C]``."""
    rows = np.tensordot(matrix, image, axes=(1, 0))
    return np.ascontiguousarray(np.moveaxis(np.tensordot(matrix, rows, axes=(1, 1)), 0, 1))


def shrink(image: Array, factor: int) -> Array:
    """Mean over ``factor x factor`` blocks of ``image [H, W, C]``."""
    if factor == 1:
        return image
    height, width, channels = image.shape
    return image.reshape(height // factor, factor, width // factor, factor, channels).mean(axis=(1, 3))


def canvas_features(image: Array, behind: Array, front: Array | None, weight: Array | None) -> Array:
    """Nine features per pixel, ``[H, W, 9]``; ``front=None`` means nothing lies in front."""
    height, width, _ = image.shape
    features = np.empty((height, width, 9), dtype=np.float32)
    if front is None or weight is None:
        difference = image - behind
        features[..., 0:3] = difference
        features[..., 3] = np.einsum("hwc,hwc->hw", difference, behind)
        features[..., 4] = 1.0
        features[..., 5:8] = behind
        features[..., 8] = np.einsum("hwc,hwc->hw", behind, behind)
        return features
    difference = image - front - weight * behind
    features[..., 0:3] = weight * difference
    features[..., 3] = weight[..., 0] * np.einsum("hwc,hwc->hw", difference, behind)
    square = weight * weight
    features[..., 4] = square[..., 0]
    features[..., 5:8] = square * behind
    features[..., 8] = square[..., 0] * np.einsum("hwc,hwc->hw", behind, behind)
    return features


def template_weights(rgba: Array) -> Array:
    """Weights ``[..., 9]`` against :func:`canvas_features`, from premultiplied ``rgba [..., 4]``."""
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    weights = np.empty((*rgba.shape[:-1], 9), dtype=np.float32)
    weights[..., 0:3] = colour
    weights[..., 3:4] = -alpha
    weights[..., 4] = np.einsum("...c,...c->...", colour, colour)
    weights[..., 5:8] = -2.0 * alpha * colour
    weights[..., 8:9] = alpha * alpha
    return weights


def pad_features(features: Array, pad: int) -> Array:
    """Zero features outside the canvas: what is drawn there neither explains nor costs anything."""
    return np.pad(features, ((pad, pad), (pad, pad), (0, 0)))


@dataclass(frozen=True)
class ScanBank:
    """All templates of one size at scan resolution.

    Attributes:
        keys: Template key of each row.
        correlation: ``[T, n * n * 4]``.
        energy: ``[T, n * n * 5]``.
        side: ``n``, padded side in scan pixels.
    """

    keys: tuple[tuple[int, int], ...]
    correlation: Array
    energy: Array
    side: int

    @classmethod
    def build(cls, keys: tuple[tuple[int, int], ...], templates: list[Array]) -> ScanBank:
        """From premultiplied templates ``[n, n, 4]`` at scan resolution."""
        weights = template_weights(np.stack(templates))
        count, side = weights.shape[:2]
        return cls(
            keys=keys,
            correlation=weights[..., :CORRELATION_CHANNELS].reshape(count, -1).copy(),
            energy=weights[..., CORRELATION_CHANNELS:].reshape(count, -1).copy(),
            side=side,
        )

    def scan(self, padded: Array, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> tuple[Array, Array]:
        """Correlation and energy of every template at every ``(row, column)``.

        Args:
            padded: Zero-padded features ``[H + 2, W + 2, 9]`` at scan resolution.
            rows: Top edges in the padded canvas.
            columns: Left edges in the padded canvas.

        Returns:
            ``<wD, S - aB>`` and ``|w (S - aB)|^2``, each ``[T, len(rows) * len(columns)]``.
        """
        windows = np.lib.stride_tricks.sliding_window_view(padded, (self.side, self.side), axis=(0, 1))
        patches = windows[rows[:, None], columns[None, :]]  # [r, c, 9, n, n]
        patches = patches.reshape(len(rows) * len(columns), 9, -1).transpose(0, 2, 1)
        first = np.ascontiguousarray(patches[..., :CORRELATION_CHANNELS]).reshape(len(patches), -1)
        second = np.ascontiguousarray(patches[..., CORRELATION_CHANNELS:]).reshape(len(patches), -1)
        return self.correlation @ first.T, self.energy @ second.T


class TemplateCache:
    """Blurred, padded full-resolution templates and their weights, least recently used ones dropped.

    Args:
        load: ``key -> premultiplied rgba [n, n, 4]`` at full resolution, unblurred.
        sigma: Blur in pixels.
        pad: Padding in pixels on each side, room for the blur.
        capacity: Templates kept.
    """

    def __init__(self, load: Callable[[tuple[int, int]], Array], sigma: float, pad: int, capacity: int) -> None:
        self._load, self._sigma, self._pad, self._capacity = load, sigma, pad, capacity
        self._matrices: dict[int, Array] = {}
        self._entries: OrderedDict[tuple[int, int], tuple[Array, Array]] = OrderedDict()

    def rgba(self, key: tuple[int, int]) -> Array:
        """Blurred premultiplied template ``[n + 2 pad, n + 2 pad, 4]``."""
        return self._get(key)[0]

    def weights(self, key: tuple[int, int]) -> Array:
        """Matching weights ``[n + 2 pad, n + 2 pad, 9]``."""
        return self._get(key)[1]

    def blurred(self, key: tuple[int, int]) -> Array:
        """Like :meth:`rgba`, without keeping it."""
        sharp = self._load(key)
        size = sharp.shape[0]
        if size not in self._matrices:
            self._matrices[size] = blur_matrix(size, self._sigma, self._pad)
        return apply_separable(sharp, self._matrices[size])

    def _get(self, key: tuple[int, int]) -> tuple[Array, Array]:
        entry = self._entries.get(key)
        if entry is None:
            rgba = self.blurred(key)
            entry = (rgba, template_weights(rgba))
            self._entries[key] = entry
            if len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
        else:
            self._entries.move_to_end(key)
        return entry
