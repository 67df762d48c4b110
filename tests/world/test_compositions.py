"""Compositions: the result follows from the words and the sources, and honours the split."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unialignment.errors import InputError
from unialignment.world import compositions
from unialignment.world.presets import BACKGROUNDS, NANO_NAMES, WorldPreset
from unialignment.world.scene import Scene, SceneObject
from unialignment.world.splits import is_held_out

NANO = WorldPreset("nano", 64, NANO_NAMES, ("noto", "fluent"), (24, 32), 8, tuple(BACKGROUNDS), 3)
ADJECTIVES = {"shaded": "noto", "flat": "fluent", "simple": "twemoji", "outlined": "openmoji"}
SMALL = WorldPreset(
    "small", 128, (*NANO_NAMES, "ice cream"), tuple(ADJECTIVES.values()), (16, 24, 32), 4, tuple(BACKGROUNDS), 4
)


def subjects(text: str, sources: tuple[Scene, ...]) -> list[int]:
    """The pictures whose subjects are named, in order; what is said of a subject must be true."""
    found = []
    anyone = "the (?:subject|object|thing) (?:of|from|in)|what is in"
    named = rf"the (?:({'|'.join(ADJECTIVES)}) )?({'|'.join(SMALL.names)}) (?:of|from|in)"
    for match in re.finditer(rf"(?:{anyone}|{named}) image (\d)", text):
        style, name, number = match.group(1), match.group(2), int(match.group(3)) - 1
        item = sources[number].objects[0]
        assert name in (None, item.name)
        assert style is None or ADJECTIVES[style] == item.style
        found.append(number)
    return found


def centre(item: SceneObject) -> tuple[float, float]:
    return item.x + item.size / 2, item.y + item.size / 2


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([NANO, SMALL]),
    st.sampled_from(["train", "held_out"]),
    st.sampled_from([2, 3]),
)
def test_result_follows_from_words_and_sources(seed, preset, split, references) -> None:
    made = compositions.sample_composition(np.random.default_rng(seed), preset, split, references)
    text, sources, result = made.instruction, made.sources, made.result
    assert len(sources) == references and all(len(scene.objects) == 1 for scene in sources)
    order = subjects(text, sources)
    assert len(order) == len(set(order)) == len(result.objects) == (3 if made.kind == "three" else 2)
    # sizes, styles and classes are the sources'
    placed = {}
    for number in order:
        item = sources[number].objects[0]
        (new,) = [o for o in result.objects if o.name == item.name]
        assert new == replace(item, x=new.x, y=new.y)
        assert 0 <= new.x <= 64 - new.size and 0 <= new.y <= 64 - new.size
        placed[number] = new
    a, b = placed[order[0]], placed[order[1]]
    (ax, ay), (bx, by) = centre(a), centre(b)
    assert all(p.overlap(q) == 0 for p in result.objects for q in result.objects if p != q)
    if made.kind == "three":
        cx, cy = centre(placed[order[2]])
        assert order == [0, 1, 2] and ax < cx < bx and cy > max(ay, by)
    elif re.search(r" (above|below) ", text):
        assert abs(ax - bx) <= preset.lattice and (ay < by) == (" above " in text) and abs(ay - by) >= 16
    else:
        assert abs(ay - by) <= preset.lattice and (ax > bx) == ("right of" in text) and abs(ax - bx) >= 16
    ground = re.search(r"background (?:of|from) image (\d)", text)
    color = re.search(r"(?:on|with) an? (\w+) background", text)
    expected = sources[int(ground.group(1)) - 1 if ground else 0].background
    if color:
        expected = color.group(1)
    assert result.background == expected
    assert (made.kind == "background") == (references == 3 and len(result.objects) == 2)
    assert is_held_out(result) == (split == "held_out")
    if split == "train":
        assert not any(is_held_out(scene) for scene in sources)


def test_wording_varies() -> None:
    rng = np.random.default_rng(0)
    made = [compositions.sample_composition(rng, NANO, "train", 2 + i % 2) for i in range(600)]
    plain = {
        re.sub(r"\bthe (?:(?:shaded|flat) )?[\w ]+? (of|from|in) image", r"X \1 image", m.instruction) for m in made
    }
    assert len(plain) > 150
    assert {m.kind for m in made} == {"pair", "background", "three"}
    assert any("subject of image" in m.instruction for m in made)


def test_same_seed_same_composition() -> None:
    a, b = (compositions.sample_composition(np.random.default_rng(5), NANO, "train", 3) for _ in range(2))
    assert a == b


def test_unusable_arguments() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="references=4"):
        compositions.sample_composition(rng, NANO, "train", 4)
    with pytest.raises(InputError, match="too few classes"):
        compositions.sample_composition(rng, replace(NANO, names=("openmoji",)), "train", 2)
