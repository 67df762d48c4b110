"""Draws scenes and their exact maps.

Pure functions of scene, sprite pack and resolution: pictures, visible masks, depth, outlines. Knows nothing of
language or of how scenes are sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from unialignment.errors import InputError
from unialignment.world.presets import BACKGROUNDS
from unialignment.world.scene import CANVAS_UNITS, Scene, SceneObject
from unialignment.world.sprites import ArrayCache, SpritePack

GRADIENT = 0.10
"""Backgrounds are this much lighter at the top and darker at the bottom than their mean."""

Change = Callable[[SceneObject, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From an object, its sprite's premultiplied colour (0-255) and alpha (0-1), both float32 ``[S, S, 3]``, to others."""

LAYER_BYTES = 640 << 20
"""Memory that a renderer may hold prepared sprites in. All of the full preset's take 500 MB, the nano preset's 4 MB."""

DEPTH_FAR, DEPTH_NEAR, DEPTH_STEP = 64, 208, 24
"""Grey of an object standing at the top and at the bottom edge, and by how much an occluder is nearer (at least)."""


def background_image(name: str, resolution: int) -> np.ndarray:
    """A background with its vertical gradient, float32 ``[R, R, 3]``, 0-255.

    Raises:
        InputError: unknown background.
    """
    if name not in BACKGROUNDS:
        raise InputError(f"unknown background {name!r}: expected one of {', '.join(BACKGROUNDS)}")
    color = np.array(BACKGROUNDS[name], dtype=np.float32)
    down = np.linspace(1, -1, resolution, dtype=np.float32)[:, None]
    # Towards white and towards black by the same share, so that light and dark colours change visibly alike.
    rows = np.where(down > 0, color + (255 - color) * down * GRADIENT, color * (1 + down * GRADIENT))
    return np.ascontiguousarray(np.broadcast_to(rows[:, None], (resolution, resolution, 3)))


class Renderer:
    """Draws scenes at one resolution.

    Sprites and backgrounds are kept after their first use, so that a picture of three objects takes some tens of
    microseconds.

    Args:
        pack: Sprites.
        resolution: Side of the pictures in pixels, a multiple of 64.

    Raises:
        InputError: the resolution isn't a positive multiple of 64.
    """

    def __init__(self, pack: SpritePack, resolution: int) -> None:
        if resolution < CANVAS_UNITS or resolution % CANVAS_UNITS:
            raise InputError(f"resolution {resolution}: expected a positive multiple of {CANVAS_UNITS}")
        self.pack = pack
        self.resolution = resolution
        self._scale = resolution // CANVAS_UNITS
        self._backgrounds: dict[str, np.ndarray] = {}
        self._layers = ArrayCache[tuple[str, str, int]](LAYER_BYTES)

    def render(self, scene: Scene, change: Change | None = None) -> np.ndarray:
        """The picture, uint8 ``[R, R, 3]``.

        Args:
            scene: What to draw.
            change: Applied to every object's sprite before it is drawn, e.g. to recolour it.

        Raises:
            InputError: unknown class, style or background, or an object that leaves the canvas.
        """
        ground = self._backgrounds.get(scene.background)
        if ground is None:
            # Everything carries a half, so that the cast below rounds instead of truncating.
            ground = background_image(scene.background, self.resolution) + np.float32(0.5)
            self._backgrounds[scene.background] = ground
        canvas = ground.copy()
        for item in scene.objects:
            rows, columns = self._window(item)
            color, transparency, _ = self._layer(item)
            if change is not None:
                alpha = 1 - transparency
                color, alpha = change(item, color - alpha * np.float32(0.5), alpha)
                color, transparency = np.clip(color, 0, alpha * 255) + alpha * np.float32(0.5), 1 - alpha
            window = canvas[rows, columns]
            window *= transparency
            window += color
        return canvas.astype(np.uint8)

    def visible(self, scene: Scene) -> np.ndarray:
        """Which object is seen where: int16 ``[R, R]``, 0 for the background, else 1 + index into ``scene.objects``."""
        owner = np.zeros((self.resolution, self.resolution), np.int16)
        for index, item in enumerate(scene.objects):
            rows, columns = self._window(item)
            owner[rows, columns][self.silhouette(item)] = index + 1
        return owner

    def mask(self, scene: Scene, index: int | Iterable[int]) -> np.ndarray:
        """Visible pixels (alpha above one half, not covered by a nearer object) of one or more objects.

        Args:
            scene: The scene.
            index: Index or indices into ``scene.objects``.

        Returns:
            uint8 ``[R, R, 3]``, white on black.

        Raises:
            InputError: there is no object of that index.
        """
        indices = [index] if isinstance(index, int | np.integer) else list(index)
        chosen = np.zeros(len(scene.objects) + 1, np.uint8)
        for number in indices:
            if not 0 <= number < len(scene.objects):
                raise InputError(f"no object {number} in a scene of {len(scene.objects)}")
            chosen[number + 1] = 255
        return _grey(chosen[self.visible(scene)])

    def depth(self, scene: Scene) -> np.ndarray:
        """A depth map that can be inferred from the picture alone.

        Objects stand on a ground plane seen from above, so the lower an object's bottom edge the nearer it is
        (``DEPTH_FAR`` to ``DEPTH_NEAR``); and what covers another is nearer than it by at least ``DEPTH_STEP``.

        Returns:
            uint8 ``[R, R, 3]``, grey, near is bright, the background 0.
        """
        levels = np.zeros(len(scene.objects) + 1, np.uint8)
        for index, level in enumerate(self.depth_levels(scene)):
            levels[index + 1] = level
        return _grey(levels[self.visible(scene)])

    def depth_levels(self, scene: Scene) -> tuple[int, ...]:
        """Grey (0-255) of each object in the depth map."""
        levels: list[int] = []
        for index, item in enumerate(scene.objects):
            share = (item.y + item.size) / CANVAS_UNITS
            level = round(DEPTH_FAR + (DEPTH_NEAR - DEPTH_FAR) * share)
            for other, behind in zip(scene.objects[:index], levels, strict=True):
                if self.covers(item, other):
                    level = max(level, behind + DEPTH_STEP)
            levels.append(min(level, 255))
        return tuple(levels)

    def covers(self, near: SceneObject, far: SceneObject) -> bool:
        """Whether two objects share pixels (alpha above one half), not only parts of their boxes."""
        left, right = max(near.x, far.x), min(near.x + near.size, far.x + far.size)
        top, bottom = max(near.y, far.y), min(near.y + near.size, far.y + far.size)
        if left >= right or top >= bottom:
            return False
        parts = []
        for item in (near, far):
            rows = slice((top - item.y) * self._scale, (bottom - item.y) * self._scale)
            columns = slice((left - item.x) * self._scale, (right - item.x) * self._scale)
            parts.append(self.silhouette(item)[rows, columns])
        return bool((parts[0] & parts[1]).any())

    def edges(self, scene: Scene) -> np.ndarray:
        """Outlines of the visible objects, ``R / 64`` pixels wide, drawn inside them.

        Returns:
            uint8 ``[R, R, 3]``, white on black.
        """
        owner = self.visible(scene)
        outline = np.zeros(owner.shape, bool)
        for _ in range(self._scale):
            around = np.pad(owner, 1)
            inside = around[1:-1, 1:-1]
            thin = np.zeros(owner.shape, bool)
            for shifted in (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]):
                thin |= shifted != inside
            thin &= inside > 0
            outline |= thin
            owner = np.where(thin, 0, owner)
        return _grey(outline.astype(np.uint8) * np.uint8(255))

    def silhouette(self, item: SceneObject) -> np.ndarray:
        """Where an object's sprite is opaque (alpha above one half): bool ``[size px, size px]``, read-only."""
        return self._layer(item)[2]

    def _layer(self, item: SceneObject) -> tuple[np.ndarray, ...]:
        """A sprite ready for use: premultiplied colour (0-255, plus the rounding half), transparency, silhouette."""
        key = (item.name, item.style, item.size)
        layer = self._layers.get(key)
        if layer is None:
            rgba = self.pack.rgba(item.name, item.style, item.size * self._scale)
            alpha = np.repeat(rgba[..., 3:], 3, -1)
            solid = rgba[..., 3] > 0.5
            solid.flags.writeable = False
            layer = (rgba[..., :3] * np.float32(255) + alpha * np.float32(0.5), 1 - alpha, solid)
            self._layers.put(key, *layer)
        return layer

    def _window(self, item: SceneObject) -> tuple[slice, slice]:
        scale = self._scale
        if item.x < 0 or item.y < 0 or item.x + item.size > CANVAS_UNITS or item.y + item.size > CANVAS_UNITS:
            raise InputError(f"{item} leaves the canvas of {CANVAS_UNITS} x {CANVAS_UNITS} units")
        return (
            slice(item.y * scale, (item.y + item.size) * scale),
            slice(item.x * scale, (item.x + item.size) * scale),
        )


def _grey(image: np.ndarray) -> np.ndarray:
    """uint8 ``[R, R]`` to ``[R, R, 3]``."""
    return np.repeat(image[..., None], 3, -1)
