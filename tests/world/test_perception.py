"""Perception prompts: the map shows exactly what the words ask for."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unialignment.errors import InputError
from unialignment.world import captions, perception
from unialignment.world import language as lang
from unialignment.world.layout import sample_scene
from unialignment.world.presets import BACKGROUNDS, NANO_NAMES, WorldPreset
from unialignment.world.scene import Scene

NANO = WorldPreset("nano", 64, NANO_NAMES, ("noto", "fluent"), (24, 32), 8, tuple(BACKGROUNDS), 3)


class Recorder:
    """Draws nothing: the map tells what was asked of it."""

    def mask(self, scene: Scene, index: tuple[int, ...]) -> np.ndarray:
        marks = np.zeros((1, 8, 3), np.uint8)
        marks[0, list(index)] = 255
        return marks

    def depth(self, scene: Scene) -> np.ndarray:
        return np.full((1, 8, 3), 1, np.uint8)

    def edges(self, scene: Scene) -> np.ndarray:
        return np.full((1, 8, 3), 2, np.uint8)


def meant(text: str, scene: Scene) -> set[int]:
    """Objects that the words of a segmentation prompt ask for."""
    objects = scene.objects
    if re.search("all objects|everything but the background|the foreground", text):
        return set(range(len(objects)))
    name = next(o.name for o in objects if re.search(rf"\b({o.name}|{lang.plural(o.name)})\b", text))
    fits = {i for i, o in enumerate(objects) if o.name == name}
    if re.search(r"\b(both|all|the two)\b", text):
        return fits
    side = re.search(r"(?:on|at) the (left|right|top|bottom)", text)
    if side and len(fits) > 1:
        axis, sign = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}[side.group(1)]
        return {min(fits, key=lambda i: sign * objects[i].center[axis])}
    words = set(text.split())
    styles, sizes = set(lang.STYLE_ADJECTIVES.values()) & words, set(lang.SIZE_ADJECTIVES.values()) & words
    fits = {i for i in fits if not styles or lang.STYLE_ADJECTIVES[objects[i].style] in styles}
    return {i for i in fits if not sizes or lang.SIZE_ADJECTIVES[objects[i].size] in sizes}


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_the_mask_shows_what_is_asked_for(seed, repeat) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, NANO, repeat=repeat or None)
    made = perception.sample_perception(scene, rng, Recorder(), "segment")
    assert set(made.indices) == meant(made.prompt, scene)
    assert set(np.flatnonzero(made.map[0, :, 0])) == set(made.indices)
    assert made.target in made.prompt
    text = perception.control_prompt(made, captions.describe_canonical(scene).text, rng)
    assert "mask" in text and made.target in text and captions.describe_canonical(scene).text in text


def test_maps_and_their_names_belong_together() -> None:
    rng = np.random.default_rng(1)
    scene = sample_scene(rng, NANO)
    seen: Counter = Counter()
    for _ in range(400):
        made = perception.sample_perception(scene, rng, Recorder())
        seen[made.kind] += 1
        if made.kind == "segment":
            continue
        words = {"depth": "depth|far away", "edges": "edge|outline|contour"}
        other = words["edges" if made.kind == "depth" else "depth"]
        control = perception.control_prompt(made, "a dog", rng)
        for text in (made.prompt, control):
            assert re.search(words[made.kind], text) and not re.search(other, text)
        assert "a dog" in control
        assert made.map[0, 0, 0] == {"depth": 1, "edges": 2}[made.kind]
    assert set(seen) == set(perception.KINDS)
    assert 0.4 < seen["segment"] / 400 < 0.6


def test_masks_agree_with_the_renderer(nano, renderer) -> None:
    """White exactly where painting the chosen objects black and white makes a difference."""
    rng = np.random.default_rng(2)
    for _ in range(20):
        scene = sample_scene(rng, nano)
        made = perception.sample_perception(scene, rng, renderer, "segment")
        assert made.map.shape == (64, 64, 3) and set(np.unique(made.map)) <= {0, 255}
        without = Scene(scene.background, tuple(o for i, o in enumerate(scene.objects) if i not in made.indices))
        changed = (renderer.render(scene) != renderer.render(without)).any(-1)
        inside = made.map[..., 0] > 0
        assert inside.any() and (changed | ~inside).mean() > 0.99


def test_unusable_arguments() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="map kind"):
        perception.sample_perception(sample_scene(rng, NANO), rng, Recorder(), "pose")
    with pytest.raises(InputError, match="without objects"):
        perception.sample_perception(Scene("red"), rng, Recorder())
