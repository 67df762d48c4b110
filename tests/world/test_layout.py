"""Sampled scenes: inside the canvas, on the lattice, on the right side of the split, as asked."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unialignment.errors import InputError
from unialignment.world.layout import MAX_OVERLAP, MIN_OVERLAP, find_position, positions, sample_scene
from unialignment.world.presets import BACKGROUNDS, NANO_NAMES, WorldPreset, preset
from unialignment.world.scene import CANVAS_UNITS, Scene
from unialignment.world.splits import is_held_out
from unialignment.world.sprites import SpritePack

NANO = WorldPreset("nano", 64, tuple(sorted(NANO_NAMES)), ("noto", "fluent"), (24, 32), 8, tuple(BACKGROUNDS), 3)
FREE = WorldPreset("free", 128, NANO.names, ("noto", "fluent", "twemoji"), (16, 24, 32), 1, tuple(BACKGROUNDS), 5)


def overlaps(scene: Scene) -> list[float]:
    objects = scene.objects
    found = [a.overlap(b) for index, a in enumerate(objects) for b in objects[:index]]
    return [share for share in found if share > 0]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    world=st.sampled_from([NANO, FREE]),
    split=st.sampled_from(["train", "held_out"]),
    count=st.sampled_from([None, 1, 2, 3]),
    overlap=st.sampled_from([None, False]),
)
def test_scenes_keep_the_rules(seed: int, world: WorldPreset, split, count: int | None, overlap: bool | None) -> None:
    scene = sample_scene(np.random.default_rng(seed), world, split, count=count, overlap=overlap)
    assert is_held_out(scene) == (split == "held_out")
    assert scene.background in world.backgrounds
    assert 1 <= len(scene.objects) <= world.max_objects
    assert count is None or len(scene.objects) == count
    for item in scene.objects:
        assert item.name in world.names and item.style in world.styles and item.size in world.sizes
        for start in (item.x, item.y):
            assert 0 <= start <= CANVAS_UNITS - item.size
            assert start % world.lattice == 0
    shares = overlaps(scene)
    assert len(shares) <= (0 if overlap is False else 1)
    assert all(MIN_OVERLAP <= share <= MAX_OVERLAP for share in shares)


@pytest.mark.parametrize("world", [NANO, FREE], ids=lambda world: world.name)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_an_overlap_on_request(world: WorldPreset, split) -> None:
    rng = np.random.default_rng(1)
    for count in (None, 2, 3):
        for _ in range(40):
            scene = sample_scene(rng, world, split, count=count, overlap=True)
            assert len(overlaps(scene)) == 1
            assert is_held_out(scene) == (split == "held_out")


def test_either_of_an_overlapping_pair_may_be_in_front() -> None:
    rng = np.random.default_rng(0)
    higher_in_front = 0
    for _ in range(200):
        far, near = sample_scene(rng, NANO, count=2, overlap=True).objects
        higher_in_front += near.y < far.y
    assert 50 < higher_in_front < 150


def test_repeats() -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        objects = sample_scene(rng, NANO, repeat=True).objects
        (name, number), *_ = Counter(item.name for item in objects).most_common()
        assert number == 2
        assert len({(item.style, item.size) for item in objects if item.name == name}) == 1
        distinct = [item.name for item in sample_scene(rng, NANO, repeat=False).objects]
        assert len(set(distinct)) == len(distinct)


def test_default_frequencies() -> None:
    """Every count and class about as often, overlaps and repeats in about 15 % of the scenes of two or more."""
    rng = np.random.default_rng(3)
    scenes = [sample_scene(rng, NANO) for _ in range(3000)]
    counts = Counter(len(scene.objects) for scene in scenes)
    assert all(900 < counts[number] < 1100 for number in (1, 2, 3))
    several = [scene for scene in scenes if len(scene.objects) > 1]
    assert 0.12 < sum(bool(overlaps(scene)) for scene in several) / len(several) < 0.26
    repeated = sum(len({item.name for item in scene.objects}) < len(scene.objects) for scene in several)
    assert 0.11 < repeated / len(several) < 0.19
    names = Counter(item.name for scene in scenes for item in scene.objects)
    assert set(names) == set(NANO.names)
    assert max(names.values()) < 2.5 * min(names.values())
    assert set(Counter(scene.background for scene in scenes)) == set(NANO.backgrounds)


def test_required_names_and_background() -> None:
    rng = np.random.default_rng(4)
    for split in ("train", "held_out"):
        for _ in range(50):
            scene = sample_scene(rng, FREE, split, names=("owl", "bee"), background="teal")
            assert {"owl", "bee"} <= {item.name for item in scene.objects}
            assert scene.background == "teal"
            assert is_held_out(scene) == (split == "held_out")
    with pytest.raises(InputError, match="no train scene"):  # a held-out pair
        sample_scene(rng, FREE, names=("owl", "apple"))
    order = {sample_scene(rng, NANO, names=("owl", "bee"), count=2, overlap=False).objects[0].name for _ in range(40)}
    assert order == {"owl", "bee"}


def test_the_seed_decides_everything() -> None:
    first = [sample_scene(np.random.default_rng(seed), NANO) for seed in range(30)]
    again = [sample_scene(np.random.default_rng(seed), NANO) for seed in range(30)]
    assert first == again
    assert len(set(first)) == 30


def test_an_empty_scene() -> None:
    assert sample_scene(np.random.default_rng(0), NANO, count=0).objects == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "train or held_out"),
        ({"count": 4}, "0 to 3"),
        ({"count": -1}, "0 to 3"),
        ({"count": 1, "overlap": True}, "at least 2"),
        ({"count": 1, "repeat": True}, "at least 2"),
        ({"names": ("gryphon",)}, "gryphon"),
        ({"names": ("owl", "owl")}, "repeat"),
        ({"names": ("owl", "bee"), "count": 1}, "2 names"),
        ({"names": ("owl", "bee", "dog"), "repeat": True}, "3 names"),
        ({"background": "mauve"}, "mauve"),
        ({"count": 0, "split": "held_out"}, "held_out"),
    ],
)
def test_impossible_wishes_are_input_errors(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sample_scene(np.random.default_rng(0), NANO, **arguments)


def test_one_style_alone() -> None:
    """The pip route's pack: no single object is held out, so such scenes have two or more; asking for one says so."""
    world = WorldPreset("nano", 64, NANO.names, ("openmoji",), (24, 32), 8, NANO.backgrounds, 3)
    rng = np.random.default_rng(0)
    assert all(len(sample_scene(rng, world, "held_out").objects) >= 2 for _ in range(20))
    with pytest.raises(InputError, match="count=1"):
        sample_scene(rng, world, "held_out", count=1)


def test_finding_a_free_place() -> None:
    rng = np.random.default_rng(0)
    scene = sample_scene(rng, NANO, count=2, overlap=False)
    item, other = scene.objects
    found = [find_position(rng, NANO, item, [other]) for _ in range(50)]
    assert all(place is not None and place.overlap(other) == 0 for place in found)
    assert len(set(found)) > 1
    assert all(place is not None and place.x in positions(NANO, item.size) for place in found)


def test_presets(pack: SpritePack) -> None:
    nano, small, full = (preset(name, pack) for name in ("nano", "small", "full"))
    assert (len(nano.names), len(small.names)) == (64, 256)
    assert len(full.names) >= 512
    assert set(nano.names) < set(small.names) < set(full.names)
    assert len(nano.backgrounds) == 12
    assert all(" " not in name for name in nano.names)
    for world in (nano, small, full):
        assert list(world.names) == sorted(world.names)
        assert world.resolution % 64 == 0
        rng = np.random.default_rng(0)
        for count in range(1, world.max_objects + 1):
            assert len(sample_scene(rng, world, count=count).objects) == count
    with pytest.raises(InputError, match="nano, small, full"):
        preset("giant", pack)
