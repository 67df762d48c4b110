"""Small random changes of pictures and drawings that a model reads, so that it recognises drawings it was never shown.

A world has few drawings of each class, and a model learns them by heart: it then names what it has seen and little
else. Turned, stretched, bent, recoloured and noisy pictures have the same captions and answers, nearly always. Does
not know which tasks read.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageFilter

from unialignment.data.sample import Image as Picture

TURN = 12.0
"""Degrees."""
STRETCH = 0.15
"""Of width and height, each by itself, in natural logarithms."""
SHIFT = 0.04
"""Of the side. Places are said in thirds of a picture: objects near a border between two may cross it, few do."""
TONE = 0.2
"""Of brightness, contrast and saturation, in natural logarithms. Backgrounds lie further apart than that."""
NOISE = 12.0
"""Standard deviation, of 255."""
BLUR = 0.7
"""Radius, pixels of a picture 64 wide."""
HUE = 0.5
"""Radians by which a single drawing's colours are turned."""
SPRITE_TURN, SPRITE_STRETCH, SPRITE_TONE = 25.0, 0.2, 0.3
"""As the whole picture's, of a single drawing: classes are recognised at angles and in proportions never drawn."""
SPRITE_BEND = 0.12
"""Of a drawing's side, by which each corner of a net of :data:`NET` by :data:`NET` meshes is moved."""
NET = 3
LIGHT, RIM, SHARPEN = 0.35, 0.8, 150
"""Of another hand's ways: a light from one side (of the brightness), an outline (of the way to black or white), and
sharpening (per cent)."""
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def jitter(picture: Picture, strength: float, rng: np.random.Generator) -> Picture:
    """The picture, changed by at most ``strength`` times this module's limits, each change drawn uniformly.

    Args:
        picture: ``[H, W, 3]``, 8-bit.
        strength: 0 changes nothing.
        rng: Source of all choices.

    Returns:
        A picture of the same shape.
    """
    # Some pictures stay nearly as they are: what is asked in the end comes without any of this.
    strength = strength * rng.random()
    changed = _moved(picture, strength, rng)
    if rng.random() < 0.5:
        radius = BLUR * strength * rng.random() * picture.shape[1] / 64
        changed = changed.filter(ImageFilter.GaussianBlur(radius))
    values = np.asarray(changed, dtype=np.float32)
    brightness, contrast, saturation = np.exp(rng.uniform(-TONE, TONE, 3) * strength)
    grey = (values @ _GREY)[..., None]
    values = grey + (values - grey) * saturation
    middle = values.mean()
    values = (middle + (values - middle) * contrast) * brightness
    values += rng.standard_normal(values.shape, dtype=np.float32) * (NOISE * strength * rng.random())
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def vary_sprite(
    color: np.ndarray, alpha: np.ndarray, strength: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One drawing, turned, stretched, bent and recoloured: another drawing of the same class, style, size and place.

    Args:
        color: Premultiplied colour, ``[S, S, 3]``.
        alpha: ``[S, S, 3]``.
        strength: Share of this module's limits, and of :func:`recolor_sprite`.
        rng: Source of all choices.

    Returns:
        Colour and alpha.
    """
    color, alpha = recolor_sprite(color, alpha, strength, rng)
    # As for whole pictures: some drawings stay nearly as they are.
    strength = strength * rng.random()
    angle = math.radians(rng.uniform(-SPRITE_TURN, SPRITE_TURN) * strength)
    across, down = np.exp(rng.uniform(-SPRITE_STRETCH, SPRITE_STRETCH, 2) * strength)
    color, alpha = _turned(color, alpha, angle, float(across), float(down))
    color, alpha = _bent(color, alpha, rng.uniform(-SPRITE_BEND, SPRITE_BEND, (NET + 1, NET + 1, 2)) * strength)
    brightness, contrast, saturation = np.exp(rng.uniform(-SPRITE_TONE, SPRITE_TONE, 3) * strength)
    grey = (color @ _GREY)[..., None]
    color = grey + (color - grey) * saturation
    middle = alpha * (color.sum() / max(float(alpha.sum()), 1.0))
    return (middle + (color - middle) * contrast) * brightness, alpha


def relight_sprite(
    color: np.ndarray, alpha: np.ndarray, strength: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One drawing with what tells hands apart changed at random: light from one side, an outline, fineness of detail.

    For classes to be recognised whatever the style; not for pictures that styles are learned from.

    Args:
        color: Premultiplied colour, ``[S, S, 3]``.
        alpha: ``[S, S, 3]``.
        strength: Share of this module's limits.
        rng: Source of all choices.

    Returns:
        Colour and alpha.
    """
    light, outline, detail = rng.random(3) < 0.5
    if detail:
        picture = _picture(color, alpha)
        fine = rng.random() < 0.5
        mode = picture.mode
        bands = Image.merge("RGB", picture.split()[:3])
        bands = bands.filter(
            ImageFilter.UnsharpMask(1, int(SHARPEN * strength * rng.random())) if fine else ImageFilter.MedianFilter(3)
        )
        changed = np.minimum(np.asarray(bands, dtype=np.float32), 255 * alpha)
        color = changed if mode == "RGBa" else color
    if light:
        angle = rng.uniform(-math.pi, math.pi)
        across, down = np.meshgrid(np.linspace(-1, 1, color.shape[1]), np.linspace(-1, 1, color.shape[0]))
        ramp = across * math.cos(angle) + down * math.sin(angle)
        color = color * (1 + LIGHT * strength * rng.random() * ramp[..., None]).astype(np.float32)
    if outline:
        solid = Image.fromarray(np.rint(255 * alpha[..., 0]).astype(np.uint8))
        inside = np.asarray(solid.filter(ImageFilter.MinFilter(3)), dtype=np.float32)[..., None] / 255
        share = (alpha - inside).clip(0) * (RIM * strength * rng.random())
        line = 255.0 * (rng.random() < 0.2)
        color = color * (1 - share) + line * alpha * share
    return color, alpha


def recolor_sprite(
    color: np.ndarray, alpha: np.ndarray, strength: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One drawing, mirrored or not and with its hues turned. The same for every size, given the same ``rng``.

    Args:
        color: Premultiplied colour, ``[S, S, 3]``.
        alpha: ``[S, S, 3]``.
        strength: Share of :data:`HUE`, and twice the chance of a mirror image (a half at most).
        rng: Source of all choices.

    Returns:
        Colour and alpha.
    """
    if rng.random() < min(0.5, 0.5 * strength):
        color, alpha = color[:, ::-1], alpha[:, ::-1]
    # Half of them keep their colours: many a class is known by them.
    if rng.random() < 0.5:
        angle = rng.uniform(-HUE, HUE) * strength
        cosine, sine = math.cos(angle), math.sin(angle) / math.sqrt(3)
        turn = np.full((3, 3), (1 - cosine) / 3) + cosine * np.eye(3)  # about the axis of greys (Rodrigues' formula)
        turn += sine * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
        color = color @ turn.T.astype(np.float32)
    return color, alpha


def _turned(
    color: np.ndarray, alpha: np.ndarray, angle: float, across: float, down: float
) -> tuple[np.ndarray, np.ndarray]:
    """A drawing turned (radians) and stretched about its middle; what leaves its box is cut off."""
    side = color.shape[0]
    picture = _picture(color, alpha)
    cosine, sine, middle = math.cos(angle), math.sin(angle), side / 2
    matrix = (cosine / across, sine / across, -sine / down, cosine / down)
    start_x = middle - (matrix[0] + matrix[1]) * middle
    start_y = middle - (matrix[2] + matrix[3]) * middle
    moved = picture.transform(
        (side, side),
        Image.Transform.AFFINE,
        (matrix[0], matrix[1], start_x, matrix[2], matrix[3], start_y),
        Image.Resampling.BILINEAR,
    )
    return _layers(moved)


def _bent(color: np.ndarray, alpha: np.ndarray, moves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A drawing bent like a net whose corners were moved: what another hand draws rounder, thinner, leaning.

    Elastic distortions (Simard et al., ICDAR 2003), coarse: fine ones would blur a drawing of thirty pixels.

    Args:
        color: Premultiplied colour, ``[S, S, 3]``.
        alpha: ``[S, S, 3]``.
        moves: Of each corner, from top to bottom and left to right, ``[NET + 1, NET + 1, 2]`` (right, down), in sides.
    """
    side = color.shape[0]
    lines = np.rint(np.linspace(0, side, NET + 1)).astype(int)
    x, y = (axis + side * moves[..., i] for i, axis in enumerate(np.meshgrid(lines, lines)))
    meshes = []
    for i in range(NET):
        for j in range(NET):
            corners = ((i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1))  # anticlockwise from the upper left
            quad = tuple(float(v) for corner in corners for v in (x[corner], y[corner]))
            meshes.append(((int(lines[j]), int(lines[i]), int(lines[j + 1]), int(lines[i + 1])), quad))
    picture = _picture(color, alpha)
    return _layers(picture.transform((side, side), Image.Transform.MESH, meshes, Image.Resampling.BILINEAR))


def _picture(color: np.ndarray, alpha: np.ndarray) -> Image.Image:
    """Premultiplied layers as a picture that Pillow can move about."""
    layers = np.concatenate([np.clip(color, 0, 255), alpha[..., :1] * 255], axis=-1)
    # "RGBa" tells Pillow that colours are premultiplied already.
    return Image.frombytes("RGBa", color.shape[:2], np.rint(layers).astype(np.uint8).tobytes())


def _layers(picture: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Colour and alpha of :func:`_picture`."""
    values = np.asarray(picture, dtype=np.float32)
    return values[..., :3], np.repeat(values[..., 3:] / np.float32(255), 3, -1)


def _moved(picture: Picture, strength: float, rng: np.random.Generator) -> Image.Image:
    """Turned, stretched and shifted about the centre; what comes in from outside continues the border."""
    height, width = picture.shape[:2]
    margin = max(height, width) // 3
    wide = Image.fromarray(np.pad(picture, ((margin, margin), (margin, margin), (0, 0)), mode="edge"))
    angle = math.radians(rng.uniform(-TURN, TURN) * strength)
    across, down = np.exp(rng.uniform(-STRETCH, STRETCH, 2) * strength)
    right, below = rng.uniform(-SHIFT, SHIFT, 2) * strength * (width, height)
    cosine, sine = math.cos(angle), math.sin(angle)
    matrix = (cosine * across, sine * across, -sine * down, cosine * down)
    x, y = width / 2, height / 2
    start_x = x + right + margin - matrix[0] * x - matrix[1] * y
    start_y = y + below + margin - matrix[2] * x - matrix[3] * y
    return wide.transform(
        (width, height),
        Image.Transform.AFFINE,
        (matrix[0], matrix[1], start_x, matrix[2], matrix[3], start_y),
        Image.Resampling.BILINEAR,
    )
