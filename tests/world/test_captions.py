"""Captions: everything said is true of the scene, and enough is said."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unialignment.errors import InputError
from unialignment.world import captions
from unialignment.world import language as lang
from unialignment.world.layout import sample_scene
from unialignment.world.presets import BACKGROUNDS, NANO_NAMES, WorldPreset
from unialignment.world.scene import Scene, SceneObject

STYLES = {"shaded": "noto", "flat": "fluent", "simple": "twemoji", "outlined": "openmoji"}
SIZES = {"small": 16, "medium": 24, "large": 32}
NANO = WorldPreset("nano", 64, NANO_NAMES, ("noto", "fluent"), (24, 32), 8, tuple(BACKGROUNDS), 3)
FREE = WorldPreset(
    "free", 64, (*NANO_NAMES, "ice cream", "bread", "statue of liberty"), tuple(STYLES.values()), (16, 24, 32), 1,
    tuple(BACKGROUNDS), 5,
)  # fmt: skip


@st.composite
def scenes(draw) -> tuple[Scene, np.random.Generator]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return sample_scene(rng, draw(st.sampled_from([NANO, FREE])), draw(st.sampled_from(["train", "held_out"]))), rng


def in_relation(scene: Scene, a: int, relation: str, b: int) -> bool:
    """Recomputed from the boxes, not from the language's own test: by 8 units, and more so than across."""
    first, second = scene.objects[a], scene.objects[b]
    dx = (second.x + second.size / 2) - (first.x + first.size / 2)
    dy = (second.y + second.size / 2) - (first.y + first.size / 2)
    if relation in ("front", "behind"):
        touching = abs(dx) < (first.size + second.size) / 2 and abs(dy) < (first.size + second.size) / 2
        return touching and (a > b) == (relation == "front")
    along, across = {"left": (dx, dy), "right": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along >= 8 and along > abs(across)


def place_name(item: SceneObject) -> str:
    row = ["top", "", "bottom"][int((item.y + item.size / 2) // (64 / 3))]
    column = ["left", "", "right"][int((item.x + item.size / 2) // (64 / 3))]
    return f"{row} {column}".strip() or "center"


def read_canonical(text: str) -> tuple[Counter, str]:
    """Objects ``(name, style, size, place)`` and background of a canonical caption, by the grammar alone."""
    head, background, _ = re.fullmatch(r"(.*), on an? (\w+) background((?:, the .*)?)", text).groups()
    where = r"(?:at|on|in) the ((?:top|bottom)(?: left| right)?|left|right|center)"
    noun = r"(?:an? |(two|three|four|five) )?(?:(small|large) )?(shaded|flat|simple|outlined) (.+?)"
    spots = rf"(?:, (?:one|two|three|four) {where}(?:(?:,| and) (?:one|two|three|four) {where})*| {where})"
    found: Counter = Counter()
    rest = head
    while rest:
        match = re.match(rf"{noun}(?P<spots>{spots})(?:, and |, | and |$)", rest)
        assert match, rest
        count, size, style, name = match.group(1, 2, 3, 4)
        name = re.sub(r"^(sets|pieces) of ", "", name)
        number = ["one", "two", "three", "four", "five"].index(count) + 1 if count else 1
        singular = next(n for n in FREE.names if name in (n, lang.plural(n)))
        places = re.findall(rf"(?:, | and )?(one|two|three|four)?\s?{where}", match["spots"])
        places = [(p, ["one", "two", "three", "four"].index(k) + 1 if k else number) for k, p in places]
        assert sum(k for _, k in places) == number
        for place, times in places:
            found[singular, STYLES[style], SIZES[size or "medium"], place] += times
        rest = rest[match.end() :]
    return found, background


@settings(max_examples=150, deadline=None)
@given(scenes())
def test_canonical_caption_can_be_read_back_exactly(drawn) -> None:
    scene, rng = drawn
    text = captions.caption(scene, rng, canonical=True)
    found, background = read_canonical(text)
    assert background == scene.background
    assert found == Counter((o.name, o.style, o.size, place_name(o)) for o in scene.objects)


def test_canonical_caption_uses_no_randomness_and_ignores_object_order() -> None:
    a, b = SceneObject("dog", "noto", 24, 0, 0), SceneObject("apple", "fluent", 32, 32, 32)
    rng = np.random.default_rng(0)
    expected = "a shaded dog at the top left and a large flat apple at the bottom right, on an orange background"
    assert captions.caption(Scene("orange", (a, b)), rng, canonical=True) == expected
    assert captions.caption(Scene("orange", (b, a)), rng, canonical=True) == expected
    assert rng.random() == np.random.default_rng(0).random()


def test_canonical_caption_says_what_is_in_front() -> None:
    far, near = SceneObject("dog", "noto", 32, 8, 8), SceneObject("apple", "fluent", 32, 24, 8)
    text = captions.describe_canonical(Scene("red", (far, near))).text
    assert text.endswith(", the apple in front of the dog")
    assert captions.describe_canonical(Scene("red", (near, far))).text.endswith(", the dog in front of the apple")


def check_facts(scene: Scene, made: captions.Description) -> None:
    text = made.text.lower().replace(" of the picture", "")
    for a, relation, b in made.relations:
        assert in_relation(scene, a, relation, b), (relation, made, scene)
        pairs = ((a, relation, b), (b, lang.OPPOSITE[relation], a))
        patterns = [
            rf"{re.escape(scene.objects[i].name)}\b.* (?:{'|'.join(lang.RELATION_PHRASES[r])})\b.*"
            rf"{re.escape(scene.objects[j].name)}"
            for i, r, j in pairs
        ]
        assert any(re.search(pattern, text) for pattern in patterns), (relation, text)
    for m, a, b in made.between:
        (mx, my), (ax, ay), (bx, by) = (scene.objects[i].center for i in (m, a, b))
        assert min(ax, bx) - 8 < mx < max(ax, bx) + 8
        assert min(ay, by) - 8 < my < max(ay, by) + 8
        assert np.hypot(mx - ax, my - ay) < np.hypot(bx - ax, by - ay) > np.hypot(mx - bx, my - by)
        assert "between" in text
    said = {phrase for phrases in lang.RELATION_PHRASES.values() for phrase in phrases if f" {phrase} the " in text}
    assert bool(said) <= bool(made.relations)


@settings(max_examples=150, deadline=None)
@given(scenes())
def test_short_captions_are_true_and_complete(drawn) -> None:
    scene, rng = drawn
    made = captions.describe_short(scene, rng)
    text = made.text
    assert set(lang.mentioned(text, FREE.names)) == {item.name for item in scene.objects}
    assert re.search(rf"\b{scene.background}\b", text)
    assert len(text.split()) <= captions.MAX_SHORT_WORDS or made.kind == "canonical"
    check_facts(scene, made)
    adjectives = set(re.findall(r"\b(shaded|flat|simple|outlined)\b", text))
    if made.styles:
        assert adjectives == {lang.style_adjective(item.style) for item in scene.objects}
    else:
        assert not adjectives
    for name, count in Counter(item.name for item in scene.objects).items():
        spoken = len(re.findall(rf"\b(?:{re.escape(name)}|{re.escape(lang.plural(name))})\b", text))
        assert spoken >= 1
        if count == 1:
            assert not re.search(
                rf"\b(two|three|four|five) (?:\w+ )*(?:sets of |pieces of )?{re.escape(lang.plural(name))}\b", text
            )


@settings(max_examples=100, deadline=None)
@given(scenes())
def test_places_said_in_varied_captions_are_true(drawn) -> None:
    scene, rng = drawn
    made = captions.describe_short(scene, rng)
    text = re.sub(r"\bupper\b", "top", re.sub(r"\blower\b", "bottom", made.text))
    for item in scene.objects:
        if sum(other.name == item.name for other in scene.objects) > 1:
            continue
        match = re.search(
            rf"\b{re.escape(item.name)} (?:at|in|on) the "
            r"(top left|top right|bottom left|bottom right|top|bottom|middle left|middle right|left|right|middle|"
            r"center)( of)?",
            text,
        )
        if match and not match.group(2):
            said = match.group(1).replace("middle left", "left").replace("middle right", "right")
            assert said.replace("middle", "center") == place_name(item), (text, scene)


@settings(max_examples=150, deadline=None)
@given(scenes())
def test_long_captions_are_long_true_and_complete(drawn) -> None:
    scene, rng = drawn
    made = captions.describe_long(scene, rng)
    assert len(made.text.split()) >= 60
    assert set(lang.mentioned(made.text, FREE.names)) == {item.name for item in scene.objects}
    assert f"{scene.background} background" in made.text
    check_facts(scene, made)
    unique = [o for o in scene.objects if sum(p.name == o.name for p in scene.objects) == 1]
    for item in unique:
        sentences = [s for s in made.text.lower().split(". ") if re.search(rf"\bthe {re.escape(item.name)}\b", s)]
        details = next(s for s in sentences if "taking up" in s)
        assert lang.size_adjective(item.size) in details and lang.style_adjective(item.style) in details


@settings(max_examples=100, deadline=None)
@given(scenes(), st.sampled_from(["short", "long"]))
def test_articles_agree(drawn, length) -> None:
    scene, rng = drawn
    text = captions.caption(scene, rng, length).lower()
    for article, word in re.findall(r"\b(an?) (\w+)", text):
        assert (article == "an") == (word[0] in "aeiou"), text
    assert "  " not in text and " ," not in text and ".." not in text


def test_wording_varies_and_style_is_mostly_said() -> None:
    scene = Scene("blue", (SceneObject("dog", "noto", 24, 0, 16), SceneObject("apple", "fluent", 32, 32, 16)))
    rng = np.random.default_rng(1)
    made = [captions.describe_short(scene, rng) for _ in range(1000)]
    assert len({d.text for d in made}) > 500
    assert 0.75 < np.mean([d.styles for d in made]) < 0.95
    assert 0.3 < np.mean([bool(d.relations) for d in made]) < 0.9
    assert any(d.text.index("apple") < d.text.index("dog") for d in made)


def test_counts_of_repeated_classes() -> None:
    dogs = tuple(SceneObject("dog", "noto", 24, x, 0) for x in (0, 40))
    assert (
        "two shaded dogs, one at the top left and one at the top right"
        in captions.describe_canonical(Scene("red", dogs)).text
    )
    same = (SceneObject("grapes", "noto", 16, 0, 0), SceneObject("grapes", "noto", 16, 4, 2))
    assert captions.describe_canonical(Scene("red", same)).text.startswith(
        "two small shaded sets of grapes at the top left"
    )


def test_unusable_arguments() -> None:
    scene, rng = Scene("red", (SceneObject("dog", "noto", 24, 0, 0),)), np.random.default_rng(0)
    with pytest.raises(InputError, match="length"):
        captions.caption(scene, rng, "medium")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="canonical"):
        captions.caption(scene, rng, "long", canonical=True)
    with pytest.raises(InputError, match="known styles"):
        captions.caption(scene.with_object(0, style="cubist"), rng)


@pytest.mark.parametrize(
    ("name", "article", "many"),
    [
        ("dog", "a dog", "dogs"),
        ("apple", "an apple", "apples"),
        ("unicorn", "a unicorn", "unicorns"),
        ("hourglass", "an hourglass", "hourglasses"),
        ("grapes", "grapes", "grapes"),
        ("bread", "bread", "bread"),
        ("cactus", "a cactus", "cactuses"),
        ("butterfly", "a butterfly", "butterflies"),
        ("statue of liberty", "a statue of liberty", "statues of liberty"),
        ("bow and arrow", "a bow and arrow", "bows and arrows"),
        ("computer mouse", "a computer mouse", "computer mice"),
    ],
)
def test_articles_and_plurals(name: str, article: str, many: str) -> None:
    assert lang.indefinite(name) == article
    assert lang.plural(name) == many


def test_mentioned_prefers_the_longest_name_and_knows_plurals() -> None:
    names = ("apple", "green apple", "dog", "hot dog", "mouse")
    assert lang.mentioned("Two mice, a green apple; the hot dogs and a dog.", names) == [
        "mouse",
        "green apple",
        "hot dog",
        "dog",
    ]
    assert lang.mentioned("a doghouse and pineapples", names) == []
