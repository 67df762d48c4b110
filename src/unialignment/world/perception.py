"""Prompts that ask for a map of a picture (segment, depth, edges), and the inverse: a picture from a map and a caption.

The maps come from the renderer, exactly. Knows nothing of models.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from unialignment.data.sample import Image
from unialignment.errors import InputError
from unialignment.world import language as lang
from unialignment.world.scene import Scene

KINDS = ("segment", "depth", "edges")
"""Kinds of map."""

_SEGMENT = (
    "segment {}",
    "segment {} in the picture",
    "make a mask of {}",
    "show the mask of {}",
    "cut out {}",
    "select {}",
    "mark {} in white",
)
_DEPTH = (
    "estimate the depth",
    "depth map",
    "show the depth of the picture",
    "how far away is everything? draw a depth map",
    "make a depth map of this picture",
)
_EDGES = (
    "detect the edges",
    "edge map",
    "draw the outlines of the objects",
    "find the edges in the picture",
    "trace the contours",
)
_FOREGROUND = ("all objects", "everything but the background", "the foreground")
_CONTROL: dict[str, tuple[str, ...]] = {
    "segment": (
        "mask of {target}: {caption}",
        "{caption}, with {target} as in this mask",
        "this mask is {target}: {caption}",
    ),
    "depth": ("depth map: {caption}", "{caption}, following this depth map", "from this depth map: {caption}"),
    "edges": ("edge map: {caption}", "{caption}, following these edges", "from this edge map: {caption}"),
}


class MapRenderer(Protocol):
    """The part of ``world.render.Renderer`` that draws maps."""

    def mask(self, scene: Scene, index: tuple[int, ...]) -> Image: ...
    def depth(self, scene: Scene) -> Image: ...
    def edges(self, scene: Scene) -> Image: ...


class Perception(NamedTuple):
    """A perception example.

    Attributes:
        prompt: What to do, e.g. ``"segment the dog"``.
        kind: One of :data:`KINDS`.
        map: The exact map, uint8 ``[R, R, 3]``.
        indices: Objects in a segmentation mask; empty for other kinds.
        target: How those objects are called (``"the dog"``); empty for other kinds.
    """

    prompt: str
    kind: str
    map: Image
    indices: tuple[int, ...] = ()
    target: str = ""


def _target(scene: Scene, rng: np.random.Generator) -> tuple[tuple[int, ...], str]:
    """What to segment: one object that can be singled out, all of a repeated class, or all objects."""
    names = [item.name for item in scene.objects]
    draw = rng.random()
    if draw < 0.06 and len(names) > 1:
        return tuple(range(len(names))), lang.pick(rng, _FOREGROUND)
    index = int(rng.random() * len(names))
    equals = tuple(i for i, name in enumerate(names) if name == names[index])
    if len(equals) == 1:
        extra = f"{lang.adjectives(scene.objects[index])} " if draw > 0.8 else ""
        return equals, f"the {extra}{names[index]}"
    reference = lang.refer(scene, index, rng)
    if reference is not None and draw < 0.7:
        return (index,), reference
    return equals, lang.all_of(names[index], len(equals), rng)


def sample_perception(
    scene: Scene, rng: np.random.Generator, renderer: MapRenderer, kind: str | None = None
) -> Perception:
    """A prompt that asks for a map of the scene, with the exact map.

    Args:
        scene: What the picture shows; at least one object.
        rng: Source of the variety.
        renderer: Draws the map.
        kind: One of :data:`KINDS`; ``None``: segment half of the time, depth and edges a quarter each.

    Raises:
        InputError: unknown ``kind`` or an empty scene.
    """
    if kind is not None and kind not in KINDS:
        raise InputError(f"unknown map kind {kind!r}; expected one of {', '.join(KINDS)}")
    if not scene.objects:
        raise InputError("a scene without objects has no maps; give one with at least one object")
    if kind is None:
        kind = lang.pick(rng, ("segment", "segment", "depth", "edges"))
    if kind == "depth":
        return Perception(lang.pick(rng, _DEPTH), kind, renderer.depth(scene))
    if kind == "edges":
        return Perception(lang.pick(rng, _EDGES), kind, renderer.edges(scene))
    indices, target = _target(scene, rng)
    return Perception(lang.pick(rng, _SEGMENT).format(target), kind, renderer.mask(scene, indices), indices, target)


def control_prompt(perception: Perception, caption: str, rng: np.random.Generator) -> str:
    """Prompt of the inverse task: which map it is, and what the picture shall show."""
    templates = _CONTROL[perception.kind]
    if ". " in caption:  # nothing can follow a full sentence
        templates = tuple(template for template in templates if template.endswith("{caption}"))
    return lang.pick(rng, templates).format(caption=caption, target=perception.target)
