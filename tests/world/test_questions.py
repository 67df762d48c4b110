"""Questions: every answer is recomputed from the question's words and the scene by an independent reader."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unialignment.errors import InputError
from unialignment.world import language as lang
from unialignment.world import questions
from unialignment.world.layout import sample_scene
from unialignment.world.presets import BACKGROUNDS, NANO_NAMES, WorldPreset
from unialignment.world.questions import Question, is_correct
from unialignment.world.scene import Scene, SceneObject

STYLES = {"shaded": "noto", "flat": "fluent", "simple": "twemoji", "outlined": "openmoji"}
SIZES = {"small": 16, "medium": 24, "large": 32}
NUMBERS = ("zero", "one", "two", "three", "four", "five")
NAMES = (*NANO_NAMES, "ice cream", "green apple", "bread")
NANO = WorldPreset("nano", 64, NANO_NAMES, ("noto", "fluent"), (24, 32), 8, tuple(BACKGROUNDS), 3)
FREE = WorldPreset("free", 64, NAMES, tuple(STYLES.values()), (16, 24, 32), 1, tuple(BACKGROUNDS), 5)
WAYS = {
    "left": r"(?:to the |on the )?left of",
    "right": r"(?:to the |on the )?right of",
    "above": "above|over|higher up than",
    "below": "below|under|beneath|underneath",
    "front": "in front of|partly covering",
    "behind": "behind|partly hidden by",
}


def resolve(text: str, scene: Scene) -> list[int]:
    """Objects that a definite reference fits, read as a person would."""
    match = re.fullmatch(
        r"the (?:(shaded|flat|simple|outlined|small|medium|large) )?(.+?)(?: (?:on|at) the (left|right|top|bottom))?",
        text,
    )
    assert match, text
    word, name, side = match.groups()
    fits = [i for i, o in enumerate(scene.objects) if o.name == name]
    if word:
        fits = [
            i
            for i in fits
            if word in (lang.STYLE_ADJECTIVES[scene.objects[i].style], lang.SIZE_ADJECTIVES[scene.objects[i].size])
        ]
    if side:
        axis, sign = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}[side]
        best = min(sign * scene.objects[i].center[axis] for i in fits)
        fits = [i for i in fits if sign * scene.objects[i].center[axis] < best + 8]
    return fits


def one(text: str, scene: Scene) -> int:
    fits = resolve(text, scene)
    assert len(fits) == 1, (text, scene)
    return fits[0]


def toward(scene: Scene, a: int, relation: str, b: int) -> float:
    """How much ``a`` is in relation to ``b``: units between centres, or percent of overlap; negative: the other way."""
    (ax, ay), (bx, by) = scene.objects[a].center, scene.objects[b].center
    if relation in ("front", "behind"):
        return scene.objects[a].overlap(scene.objects[b]) * 100 * (1 if (a > b) == (relation == "front") else -1)
    return {"left": bx - ax, "right": ax - bx, "above": by - ay, "below": ay - by}[relation]


def relation_in(text: str) -> tuple[str, str, str]:
    """Text before the relation, the relation, text after it."""
    text = re.sub(r"(on|at) the (left|right|top|bottom)(?! of)", r"\1_the_\2", text)
    for relation, way in WAYS.items():
        match = re.search(rf"^(.*?) ?\b(?:{way}) (the .+?)[?.]$", text)
        if match:
            return match.group(1).replace("_", " "), relation, match.group(2).replace("_", " ")
    raise AssertionError(text)


def names_in(answer: str) -> str:
    return next(name for name in FREE.names if answer in (name, lang.plural(name)))


def check(scene: Scene, q: Question) -> None:
    """Recompute the answer of a question."""
    text = q.question
    everyone = range(len(scene.objects))
    if q.kind == "background":
        assert q.answer == scene.background
    elif q.kind == "exists":
        noun = re.search(r"\b(?:any|an?) (.+?)(?: in the picture| here)?\?", text).group(1)
        assert q.answer == ("yes" if noun in {o.name for o in scene.objects} else "no")
    elif q.kind == "count":
        noun = re.search(
            r"(?:how many|count the) (?:sets of |pieces of )?(.+?)(?: are there| are in| do you see| can you see|\.)",
            text,
        ).group(1)
        if noun in ("objects", "things"):
            number = len(scene.objects)
        else:
            number = sum(noun in (o.name, lang.plural(o.name)) for o in scene.objects)
        assert q.answer == NUMBERS[number]
    elif q.kind == "where":
        item = scene.objects[one(re.search(r"(?:is|are) (the .+)\?", text).group(1), scene)]
        x, y = item.center
        row, column = ["top", "", "bottom"][int(y // (64 / 3))], ["left", "", "right"][int(x // (64 / 3))]
        assert q.answer == (f"{row} {column}".strip() or "center")
    elif q.kind == "style":
        match = re.search(r"(?:is|are|does|do) (the .+?) (?:drawn|in|have)\?", text)
        if match and "object" not in text and not text.startswith("what is drawn"):
            assert STYLES[q.answer] == scene.objects[one(match.group(1), scene)].style
            assert q.answer not in text.split()
        else:
            word = re.search(r"\b(shaded|flat|simple|outlined)\b", text).group(1)
            assert [names_in(q.answer)] == [o.name for o in scene.objects if o.style == STYLES[word]]
    elif q.kind == "size":
        match = re.search(r"(bigger|larger|smaller)[,:] (the .+) or (the .+)\?", text)
        if match:
            a, b = (scene.objects[one(t, scene)] for t in match.group(2, 3))
            assert a.size != b.size
            bigger = a if a.size > b.size else b
            expected = bigger if match.group(1) != "smaller" else (b if bigger is a else a)
            assert q.answer == expected.name
        else:
            item = scene.objects[one(re.search(r"(?:is|are|does|do) (the .+?)(?: have)?\?", text).group(1), scene)]
            assert SIZES[q.answer] == item.size
    elif q.kind == "relation":
        before, relation, other = relation_in(text)
        subject = re.search(r"(the .+?)(?: is| are)?$", before.replace("in the picture, ", "")).group(1)
        a, b = one(subject, scene), one(other, scene)
        amount = toward(scene, a, relation, b)
        assert abs(amount) >= 8
        assert q.answer == ("yes" if amount > 0 else "no")
    elif q.kind == "what":
        end = re.search(
            r"leftmost|furthest left|furthest to the left|rightmost|furthest right|furthest to the right|highest|"
            r"topmost|very top|lowest|very bottom",
            text,
        )
        if end:
            word = end.group()
            relation = (
                "left"
                if "left" in word
                else "right"
                if "right" in word
                else "above"
                if word in ("highest", "topmost", "very top")
                else "below"
            )
            for i in everyone:
                if all(toward(scene, i, relation, j) >= 8 for j in everyone if j != i):
                    assert q.answer == scene.objects[i].name
                    return
            raise AssertionError(text)
        if len(scene.objects) == 1:
            assert q.answer == scene.objects[0].name
            return
        _, relation, other = relation_in(text)
        b = one(other, scene)
        candidates = [i for i in everyone if i != b and toward(scene, i, relation, b) > 0]
        assert [scene.objects[i].name for i in candidates] == [q.answer]
    else:
        raise AssertionError(q.kind)


@settings(max_examples=250, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([NANO, FREE]), st.sampled_from(questions.KINDS))
def test_answers_agree_with_an_independent_reading(seed, preset, kind) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, preset)
    q = questions.ask(scene, rng, kind, names=preset.names)
    if q is None:
        assert kind in ("what", "relation", "size", "style", "where")
        return
    assert q.kind == kind
    assert q.accepted[0] == q.answer and 1 <= len(q.answer.split()) <= 4
    assert all(is_correct(option, q) for option in q.accepted)
    check(scene, q)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_two_equal_objects_are_told_apart(seed) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, FREE, repeat=True)
    for kind in ("relation", "what", "size", "style", "where"):
        q = questions.ask(scene, rng, kind, names=FREE.names)
        if q is not None:
            check(scene, q)


def many(kind: str, n: int = 1500) -> list[Question]:
    rng = np.random.default_rng(5)
    found = []
    while len(found) < n:
        q = questions.ask(sample_scene(rng, NANO), rng, kind, names=NANO.names)
        if q is not None:
            found.append(q)
    return found


@pytest.mark.parametrize("kind", ["exists", "relation"])
def test_yes_and_no_are_balanced_whatever_the_wording(kind: str) -> None:
    found = many(kind)
    assert 0.46 < np.mean([q.answer == "yes" for q in found]) < 0.54
    for word in {"exists": ("there", "see"), "relation": ("left", "above", "behind")}[kind]:
        some = [q.answer == "yes" for q in found if word in q.question]
        assert len(some) > 20 and 0.3 < np.mean(some) < 0.7


def test_counts_cover_none_to_several() -> None:
    share = Counter(q.answer for q in many("count"))
    assert set(share) == {"zero", "one", "two", "three"}
    assert share.most_common(1)[0][1] < 0.7 * sum(share.values())


def test_any_kind_is_chosen_about_evenly() -> None:
    rng = np.random.default_rng(2)
    kinds = Counter(questions.ask(sample_scene(rng, NANO, count=3), rng, names=NANO.names).kind for _ in range(1600))
    assert set(kinds) == set(questions.KINDS)
    assert min(kinds.values()) > 80


def test_absent_classes_often_resemble_present_ones() -> None:
    scene = Scene("red", (SceneObject("apple", "noto", 24, 0, 0),))
    rng = np.random.default_rng(0)
    asked = Counter(questions.ask(scene, rng, "exists", names=NAMES).question for _ in range(600))
    similar = sum(count for text, count in asked.items() if "green apple" in text)
    assert similar > 60  # by chance alone about 5


@pytest.mark.parametrize(
    ("question", "right", "wrong"),
    [
        (
            Question("what", "what is this?", "dog", ("dog", "dogs")),
            ["Dog", "a dog", "The dog.", "it's a dog", "dogs"],
            ["cat", "hot dog", ""],
        ),
        (Question("count", "?", "two", ("two", "2")), ["2", "Two.", "there are two"], ["three", "1", "twenty two"]),
        (Question("count", "how many?", "zero", ("zero", "0", "no")), ["none", "0", "no", "zero"], ["one"]),
        (Question("exists", "is there?", "no", ("no",)), ["No.", "no, there is not", "nope"], ["yes", "not sure yes"]),
        (
            Question("where", "where?", "top left", ("top left", "top")),
            ["upper left corner", "at the top left", "in the top left of the picture", "top", "at the top center"],
            ["left", "bottom left", "center", "top right"],
        ),
        (Question("where", "where?", "center", ("center",)), ["in the middle", "the centre"], ["left", "top center"]),
        (Question("background", "?", "gray", ("gray",)), ["grey", "a gray background"], ["green"]),
        (Question("size", "?", "large", ("large", "big")), ["big", "it is large"], ["medium", "small"]),
    ],
)  # fmt: skip
def test_is_correct(question: Question, right: list[str], wrong: list[str]) -> None:
    assert [text for text in right if not is_correct(text, question)] == []
    assert [text for text in wrong if is_correct(text, question)] == []


def test_unusable_arguments() -> None:
    rng = np.random.default_rng(0)
    scene = Scene("red", (SceneObject("dog", "noto", 24, 0, 0),))
    with pytest.raises(InputError, match="kind"):
        questions.ask(scene, rng, "why")
    with pytest.raises(InputError, match="names="):
        questions.ask(scene, rng, "exists")
    with pytest.raises(InputError, match="without objects"):
        questions.ask(Scene("red"), rng)
    assert questions.ask(scene, rng, "relation", names=NAMES) is None
    assert questions.ask(scene, rng) is not None
