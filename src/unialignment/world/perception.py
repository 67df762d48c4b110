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

_SEGMENT = ("segment {}", "segment {} in the picture", "make a mask of {}", "show the mask of {}", "where exactly is {}? answer with a mask",
            "select {}", "mark {} in white")  # fmt: skip
_DEPTH = ("estimate the depth", "depth map", "show the depth of the picture", "how far away is everything? draw a depth map",
          "make a depth map of this picture")  # fmt: skip
_EDGES = ("detect the edges", "edge map", "draw the outlines of the objects", "find the edges in the picture", "trace the contours")

_CONTROL = {
    "segment": ("{caption}. the mask shows {target}", "use this mask for {target}: {caption}", "mask of {target}. {caption}"),
    "depth": ("{caption}. follow this depth map", "from this depth map, make {caption}", "depth map: {caption}"),
    "edges": ("{caption}. follow these edges", "from this edge map, make {caption}", "edge map: {caption}"),
}


class MapRenderer(Protocol):
    """The part of ``world.render.Renderer`` that draws maps."""

    def mask(self, scene: Scene, indices: int | tuple[int, ...]) -> Image: ...
    def depth(self, scene: Scene) -> Image: ...
    def edges(self, scene: Scene) -> Image: ...


class Perception(NamedTuple):
    """A perception example.

    Attributes:
        prompt: What to do, e.g. ``"segment the dog"``.
        kind: One of :data:`KINDS`.
        map: The exact map, ``[R, R, 3]`` uint8.
        indices: Objects in a segmentation mask; empty for other kinds.
        target: How those objects are called (``"the dog"``); empty for other kinds.
    """

    prompt: str
    kind: str
    map: Image
    indices: tuple[int, ...]
    target: str


def _target(scene: Scene, rng: np.random.Generator) -> tuple[tuple[int, ...], str]:
    """What to segment: one object that can be singled out, all of a repeated class, or all objects."""
    names = [item.name for item in scene.objects]
    draw = rng.random()
    if draw < 0.06 and len(names) > 1:
        return tuple(range(len(names))), lang.pick(rng, ("all objects", "everything but the background", "the foreground"))
    index = int(rng.random() * len(names))
    equals = tuple(i for i, name in enumerate(names) if name == names[index])
    if len(equals) == 1:
        noun = f"the {names[index]}"
        if draw < 0.25:
            noun = f"the {lang.adjectives(scene.objects[index])} {names[index]}"
        return equals, noun
    reference = lang.refer(scene, index, rng)
    if reference is not None and draw < 0.7:
        return (index,), reference
    noun = lang.plural(names[index])
    return equals, f"both {noun}" if len(equals) == 2 and noun != names[index] else f"all the {noun}"


def sample_perception(scene: Scene, rng: np.random.Generator, renderer: MapRenderer, kind: str | None = None) -> Perception:
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
        return Perception(lang.pick(rng, _DEPTH), kind, renderer.depth(scene), (), "")
    if kind == "edges":
        return Perception(lang.pick(rng, _EDGES), kind, renderer.edges(scene), (), "")
    indices, target = _target(scene, rng)
    template = lang.pick(rng, _SEGMENT)
    if "exactly is" in template and (len(indices) > 1 or lang.is_plural(scene.objects[indices[0]].name)):
        template = template.replace("exactly is", "exactly are")
    return Perception(template.format(target), kind, renderer.mask(scene, indices), indices, target)


def control_prompt(perception: Perception, caption: str, rng: np.random.Generator) -> str:
    """Prompt of the inverse task: what the map is, and what the picture shall show."""
    template = lang.pick(rng, _CONTROL[perception.kind])
    return template.format(caption=caption, target=perception.target)
