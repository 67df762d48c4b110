"""What the reader gets out of captions: by hand, and against scenes, of which every caption is true."""

from __future__ import annotations

import numpy as np
import pytest

from unialignment.evaluation.reading import Relation, holds, stated_relations
from unialignment.world.captions import caption
from unialignment.world.layout import sample_scene
from unialignment.world.presets import BACKGROUNDS, NANO_NAMES, WorldPreset
from unialignment.world.scene import Scene, SceneObject

NANO = WorldPreset("nano", 64, tuple(sorted(NANO_NAMES)), ("noto", "fluent"), (24, 32), 8, tuple(BACKGROUNDS), 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a flat dog to the left of a large shaded cat on a red background", [("dog", "left", "cat")]),
        ("a dog above a cat, and a car partly hidden by the dog", [("dog", "above", "cat"), ("car", "behind", "dog")]),
        ("a dog on the left and a cat on the right side, on a blue background", []),
        ("a dog in the upper left and a cat at the bottom", []),
        ("a dog. below it is nothing. there is also a cat under the dog", [("cat", "below", "dog")]),
    ],
)
def test_relations_by_hand(text: str, expected: list[tuple[str, str, str]]) -> None:
    assert stated_relations(text, ("dog", "cat", "car")) == tuple(Relation(*item) for item in expected)


def test_longer_names_win() -> None:
    assert stated_relations("a red apple left of an apple", ("apple", "red apple")) == (
        Relation("red apple", "left", "apple"),
    )


def test_holds_needs_the_right_way_round() -> None:
    scene = Scene("red", (SceneObject("dog", "noto", 24, 0, 0), SceneObject("cat", "noto", 24, 40, 0)))
    assert holds(Relation("dog", "left", "cat"), scene)
    assert not holds(Relation("cat", "left", "dog"), scene)
    assert not holds(Relation("dog", "left", "car"), scene)


def test_everything_read_from_a_caption_is_true_of_its_scene() -> None:
    stated = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng, NANO, "train", count=int(rng.integers(2, 4)))
        names = tuple(item.name for item in scene.objects)
        if len(set(names)) < len(names):
            continue
        text = caption(scene, rng)
        relations = stated_relations(text, names)
        stated += len(relations)
        assert all(holds(relation, scene) for relation in relations), (text, relations, scene)
    assert stated > 100
