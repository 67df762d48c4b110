"""Least-squares template matching: how much of a picture's error does one more sprite explain, anywhere, at any depth?

Knows templates (premultiplied RGBA), canvases and arithmetic; knows nothing of classes, search or acceptance.

One sprite with premultiplied colour ``S`` and coverage ``a`` is drawn between what lies behind it, ``B``, and what lies
in front of it (premultiplied colour ``F``, transmittance ``w``):

    picture = F + w * ((1 - a) * B + S)

With ``D = I - F - w * B`` (the error without the sprite) the squared error falls by

    gain = 2 <w D, S - a B> - |w (S - a B)|^2

which is linear in nine per-pixel features of the canvas, ``wD`` (3), ``w <D, B>``, ``w^2``, ``w^2 B`` (3) and
``w^2 |B|^2``, against nine per-pixel weights of the template. A tenth, ``|D|^2`` against ``a``, gives the error that
there is to explain where the sprite would be. All templates at all positions are therefore three matrix products.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Key = tuple[int, int]
"""A template: index of class and style, side in scene units."""

CORRELATION = slice(0, 4)
"""The features that carry ``<wD, S - aB>``."""

ENERGY = slice(4, 9)
"""The features that carry the template's energy ``|w (S - aB)|^2``."""

MISSING = slice(9, 10)
"""The feature that carries the error to be explained where the template would be."""


def blur_matrix(size: int, sigma: float, pad: int = 0) -> Array:
    """Matrix ``[size + 2 pad, size]`` that blurs one axis with a Gaussian of ``sigma`` pixels.

    Without padding rows are renormalised (a picture's edge does not darken); with padding the signal is zero outside,
    as a sprite's coverage is.
    """
    target = np.arange(size + 2 * pad, dtype=np.float64) - pad
    kernel = np.exp(-0.5 * ((target[:, None] - np.arange(size)[None]) / sigma) ** 2)
    norm = np.exp(-0.5 * (np.arange(-64, 65) / sigma) ** 2).sum() if pad else kernel.sum(axis=1, keepdims=True)
    return np.asarray(kernel / norm, dtype=np.float32)


def shrink_matrix(size: int, factor: int, offset: int = 0) -> Array:
    """Matrix ``[size / factor, size]`` of block means; blocks begin at ``offset``, the last one may be cut short."""
    block = (np.arange(size) - offset) // factor
    matrix = (np.arange(size // factor)[:, None] == block[None]).astype(np.float32)
    return np.asarray(matrix / matrix.sum(axis=1, keepdims=True), dtype=np.float32)


def apply_separable(image: Array, rows: Array, columns: Array | None = None) -> Array:
    """``rows`` along the first axis of ``image [H, W, C]``, ``columns`` (by default the same) along the second."""
    height, width, channels = image.shape
    first = (rows @ image.reshape(height, -1)).reshape(-1, width, channels)
    return np.ascontiguousarray((rows if columns is None else columns) @ first)


def canvas_features(picture: Array, behind: Array, front: Array | None, weight: Array | None, pad: int) -> Array:
    """Ten features per pixel, ``[H + 2 pad, W + 2 pad, 10]``.

    Args:
        picture: ``[H, W, 3]``.
        behind: What lies behind the sprite, ``[H, W, 3]``.
        front: Premultiplied colour of what lies in front, or ``None`` for nothing.
        weight: Transmittance ``[H, W, 1]`` of what lies in front, or ``None``.
        pad: Zero features around the canvas: what is drawn there neither explains nor costs anything.
    """
    height, width, _ = picture.shape
    padded = np.zeros((height + 2 * pad, width + 2 * pad, 10), dtype=np.float32)
    features = padded[pad : pad + height, pad : pad + width]
    if front is None or weight is None:
        difference = picture - behind
        features[..., 0:3] = difference
        features[..., 4] = 1.0
        features[..., 5:8] = behind
    else:
        difference = picture - front - weight * behind
        features[..., 0:3] = weight * difference
        features[..., 4:5] = weight * weight
        features[..., 5:8] = features[..., 4:5] * behind
    for target, channels, factor in ((3, slice(0, 3), behind), (8, slice(5, 8), behind), (9, slice(0, 3), difference)):
        product = features[..., channels] * factor
        features[..., target] = product[..., 0] + product[..., 1] + product[..., 2]  # faster than a sum over three
    return padded


def template_weights(rgba: Array) -> Array:
    """Weights ``[..., 10]`` against :func:`canvas_features`, from premultiplied ``rgba [..., 4]``."""
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    weights = np.empty((*rgba.shape[:-1], 10), dtype=np.float32)
    weights[..., 0:3] = colour
    weights[..., 3:4] = -alpha
    weights[..., 4] = (colour * colour).sum(-1)
    weights[..., 5:8] = -2.0 * alpha * colour
    weights[..., 8:9] = alpha * alpha
    weights[..., 9:10] = alpha
    return weights


@dataclass(frozen=True)
class ScanBank:
    """All templates of one size at scan resolution.

    Attributes:
        correlation: ``[T, n * n * 4]``.
        energy: ``[T, n * n * 5 / 4]`` and
        missing: ``[T, n * n / 4]``, summed over blocks of 2 x 2 pixels: what lies behind a sprite is smooth nearly
            everywhere, and where it isn't, an approximate energy is good enough for choosing candidates.
        side: ``n``, padded side in scan pixels, even.
        starts: Left and top edges searched, in scan pixels.
    """

    correlation: Array
    energy: Array
    missing: Array
    side: int
    starts: NDArray[np.int64]

    @classmethod
    def build(cls, templates: list[Array], starts: NDArray[np.int64]) -> ScanBank:
        """From premultiplied templates ``[n, n, 4]`` at scan resolution."""
        weights = template_weights(np.stack(templates))
        count, side = weights.shape[:2]
        blocks = weights.reshape(count, side // 2, 2, side // 2, 2, -1).sum((2, 4))
        return cls(
            correlation=weights[..., CORRELATION].reshape(count, -1).copy(),
            energy=blocks[..., ENERGY].reshape(count, -1).copy(),
            missing=blocks[..., MISSING].reshape(count, -1).copy(),
            side=side,
            starts=starts,
        )

    def scan(self, features: Array, where: NDArray[np.int64]) -> tuple[Array, Array, Array]:
        """Correlation, energy and missing error of every template at chosen places.

        Args:
            features: Padded features at scan resolution.
            where: Places, ``row * len(starts) + column``. The products cost in proportion to how many there are.

        Returns:
            Each ``[T, len(where)]``.
        """
        down, across = np.divmod(where, len(self.starts))
        rows, columns, count = self.starts[down], self.starts[across], len(where)
        sharp = features[..., CORRELATION]
        windows = np.lib.stride_tricks.sliding_window_view(sharp, (self.side, self.side), axis=(0, 1))
        first = windows.transpose(0, 1, 3, 4, 2)[rows, columns].reshape(count, -1)
        coarse = 0.25 * (features[:-1, :-1] + features[1:, :-1] + features[:-1, 1:] + features[1:, 1:])
        windows = np.lib.stride_tricks.sliding_window_view(coarse, (self.side - 1, self.side - 1), axis=(0, 1))
        second = windows[..., ::2, ::2].transpose(0, 1, 3, 4, 2)[rows, columns]
        energy = self.energy @ second[..., ENERGY].reshape(count, -1).T
        missing = self.missing @ second[..., MISSING].reshape(count, -1).T
        return self.correlation @ first.T, energy, missing


class TemplateCache:
    """Blurred, padded full-resolution templates and their weights; the least recently used ones are dropped.

    Args:
        load: Gives the premultiplied sprite ``[n, n, 4]`` of a key at full resolution.
        sigma: Blur in pixels.
        pad: Padding in pixels on each side, room for the blur.
        capacity: Templates kept.
    """

    def __init__(self, load: Callable[[Key], Array], sigma: float, pad: int, capacity: int) -> None:
        self._load, self._sigma, self._pad, self._capacity = load, sigma, pad, capacity
        self._matrices: dict[int, Array] = {}
        self._entries: OrderedDict[Key, tuple[Array, Array]] = OrderedDict()

    def rgba(self, key: Key) -> Array:
        """Blurred premultiplied template ``[n + 2 pad, n + 2 pad, 4]``."""
        return self._get(key)[0]

    def weights(self, key: Key) -> Array:
        """Matching weights ``[n + 2 pad, n + 2 pad, 10]``."""
        return self._get(key)[1]

    def _get(self, key: Key) -> tuple[Array, Array]:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
            return entry
        sharp = self._load(key)
        size = sharp.shape[0]
        if size not in self._matrices:
            self._matrices[size] = blur_matrix(size, self._sigma, self._pad)
        rgba = apply_separable(sharp, self._matrices[size])
        entry = rgba, template_weights(rgba)
        self._entries[key] = entry
        if len(self._entries) > self._capacity:
            self._entries.popitem(last=False)
        return entry
