"""The held-out split: stable for ever, symmetric, about a tenth, and no class lost to training."""

from __future__ import annotations

from itertools import combinations

from unialignment.world.classes import CLASSES
from unialignment.world.presets import NANO_NAMES
from unialignment.world.scene import Scene, SceneObject
from unialignment.world.splits import combination_held_out, is_held_out, is_held_out_pair, is_held_out_style

NAMES = [item.name for item in CLASSES]
HELD_NANO = [
    "apple",
    "book",
    "cactus",
    "corn",
    "hamburger",
    "lemon",
    "mushroom",
    "penguin",
    "popcorn",
    "rocket",
    "sailboat",
    "tree",
    "turtle",
    "watermelon",
]
HELD_PAIRS = [
    ("airplane", "apple"),
    ("airplane", "bee"),
    ("airplane", "book"),
    ("apple", "banana"),
    ("banana", "book"),
    ("banana", "cake"),
    ("bee", "cactus"),
    ("book", "bus"),
]
STYLES = ("noto", "fluent", "twemoji", "openmoji")


def scene(*objects: tuple[str, str]) -> Scene:
    return Scene("red", tuple(SceneObject(name, style, 24, 0, 0) for name, style in objects))


def test_the_split_never_changes() -> None:
    """Trained weights depend on it: what these lines say must hold in every later version."""
    held = [name for name in sorted(NANO_NAMES) for style in ("noto", "fluent") if is_held_out_style(name, style)]
    assert held == HELD_NANO
    assert [pair for pair in combinations(sorted(NANO_NAMES)[:12], 2) if is_held_out_pair(*pair)] == HELD_PAIRS


def test_pairs_are_symmetric_and_about_a_tenth() -> None:
    pairs = list(combinations(NAMES[:200], 2))
    assert all(is_held_out_pair(a, b) == is_held_out_pair(b, a) for a, b in pairs)
    assert 0.09 < sum(is_held_out_pair(a, b) for a, b in pairs) / len(pairs) < 0.11
    assert not any(is_held_out_pair(name, name) for name in NAMES)


def test_every_class_is_seen_in_training() -> None:
    for name in NAMES:
        assert not (is_held_out_style(name, "noto") and is_held_out_style(name, "fluent")), name
        assert not is_held_out_style(name, "openmoji")
    share = sum(is_held_out_style(name, style) for name in NAMES for style in STYLES) / (len(NAMES) * len(STYLES))
    assert 0.07 < share < 0.13


def test_both_nano_styles_are_tested() -> None:
    for style in ("noto", "fluent"):
        assert 3 <= sum(is_held_out_style(name, style) for name in NANO_NAMES) <= 13


def test_scenes() -> None:
    pair = next((a, b) for a, b in combinations(sorted(NANO_NAMES), 2) if is_held_out_pair(a, b))
    free = next(name for name in sorted(NANO_NAMES) if not any(is_held_out_pair(name, other) for other in pair))
    single = next(name for name in sorted(NANO_NAMES) if is_held_out_style(name, "noto"))
    assert is_held_out(scene((single, "noto")))
    assert not is_held_out(scene((single, "fluent")))
    assert is_held_out(scene((pair[0], "openmoji"), (free, "openmoji"), (pair[1], "openmoji")))
    assert not is_held_out(scene((pair[0], "openmoji"), (free, "openmoji"), (pair[0], "openmoji")))
    assert not is_held_out(Scene("red"))
    assert combination_held_out(((single, "noto"),))


def test_unknown_names_and_styles_are_allowed() -> None:
    assert isinstance(is_held_out_pair("an unheard-of thing", "dog"), bool)
    assert not is_held_out_style("dog", "a style of tomorrow")
