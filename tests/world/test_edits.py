"""Edits: the result follows from the words alone, by an interpreter written from the documented conventions."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unialignment.errors import InputError
from unialignment.world import edits
from unialignment.world import language as lang
from unialignment.world.layout import sample_scene
from unialignment.world.presets import BACKGROUNDS, NANO_NAMES, WorldPreset
from unialignment.world.scene import Scene, SceneObject
from unialignment.world.splits import is_held_out

STYLES = {"shaded": "noto", "flat": "fluent", "simple": "twemoji", "outlined": "openmoji"}
SIZES = {"small": 16, "medium": 24, "large": 32}
NANO = WorldPreset("nano", 64, NANO_NAMES, ("noto", "fluent"), (24, 32), 8, tuple(BACKGROUNDS), 3)
FREE = WorldPreset(
    "free", 64, (*NANO_NAMES, "ice cream", "bread"), tuple(STYLES.values()), (16, 24, 32), 1, tuple(BACKGROUNDS), 5
)
SMALL = replace(FREE, name="small", lattice=4, max_objects=4)
PRESETS = [NANO, SMALL, FREE]


# --- an interpreter of instructions, written from the docstring of world/edits.py -----------------------------------


def resolve(text: str, scene: Scene) -> list[int]:
    """Objects meant by a reference."""
    objects = scene.objects
    many = re.fullmatch(r"(?:both|all the|the two|all) (.+)", text)
    if many:
        return [i for i, o in enumerate(objects) if lang.plural(o.name) == many.group(1)]
    word, name, side = re.fullmatch(
        r"the (?:(shaded|flat|simple|outlined|small|medium|large) )?(.+?)(?: (?:on|at) the (left|right|top|bottom))?",
        text,
    ).groups()
    fits = [i for i, o in enumerate(objects) if o.name == name]
    if word:
        fits = [
            i for i in fits if word in (lang.STYLE_ADJECTIVES[objects[i].style], lang.SIZE_ADJECTIVES[objects[i].size])
        ]
    if side:
        axis, sign = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}[side]
        fits = sorted(fits, key=lambda i: sign * objects[i].center[axis])[:1]
    assert len(fits) == 1, (text, scene)
    return fits


def down(value: float, size: int, lattice: int) -> int:
    return int(np.clip(np.floor(value / lattice) * lattice, 0, np.floor((64 - size) / lattice) * lattice))


def spot(words: str, item: SceneObject, scene: Scene, lattice: int) -> SceneObject:
    """Where the words put an object."""
    size = item.size
    edge = re.fullmatch(r"to the (left|right|top|bottom) edge", words)
    if edge:
        change = {"left": {"x": 0}, "right": {"x": 64 - size}, "top": {"y": 0}, "bottom": {"y": 64 - size}}[
            edge.group(1)
        ]
        return replace(item, **{key: down(value, size, lattice) for key, value in change.items()})
    beside = re.fullmatch(r"(?:to the |directly )?(left of|right of|above|below) (the .+)", words)
    if beside:
        a = scene.objects[resolve(beside.group(2), scene)[0]]
        x, y = a.x + (a.size - size) / 2, a.y + (a.size - size) / 2
        side = beside.group(1)
        if side == "left of":
            x = a.x - size
        elif side == "right of":
            x = a.x + a.size
        else:
            y = a.y - size if side == "above" else a.y + a.size
        return replace(item, x=down(x, size, lattice), y=down(y, size, lattice))
    row = 0 if re.search("top|upper", words) else 2 if re.search("bottom|lower", words) else 1
    column = 0 if "left" in words else 2 if "right" in words else 1
    assert re.search("top|upper|bottom|lower|left|right|center|middle", words), words
    return replace(item, x=down((64 - size) * column / 2, size, lattice), y=down((64 - size) * row / 2, size, lattice))


def noun(text: str, scene: Scene) -> dict:
    """Class, style and size said by an indefinite noun phrase."""
    copy = re.fullmatch(r"(?:another|more) (.+)", text)
    if copy:
        (model,) = [o for o in scene.objects if o.name == copy.group(1)]
        return {"name": model.name, "style": model.style, "size": model.size}
    size, style, name = re.fullmatch(
        r"(?:an? )?(?:(small|medium|large) )?(?:(shaded|flat|simple|outlined) )?(.+)", text
    ).groups()
    return {"name": name, "style": STYLES.get(style), "size": SIZES.get(size)}


def said(patterns: list[str], text: str) -> tuple[str, ...] | None:
    for pattern in patterns:
        match = re.fullmatch(pattern, text)
        if match:
            return match.groups()
    return None


AT = r"((?:at|in|on|to|into|above|below|directly) .+)"


def apply(clause: edits.Clause, source: Scene, draft: dict, preset: WorldPreset) -> None:
    """Apply one clause to ``draft``: objects by source index or new key, and "background"."""
    text, kind = clause.text, clause.kind
    if kind == "background":
        draft["background"] = next(name for name in BACKGROUNDS if re.search(rf"\b{name}\b", text))
    elif kind == "remove":
        for i in resolve(re.fullmatch(r"(?:remove|delete|take away|erase|get rid of) (.+)", text).group(1), source):
            del draft[i]
    elif kind == "replace":
        old, new = (
            said(
                [
                    r"replace (.+) with (.+)",
                    r"turn (.+) into (.+)",
                    r"swap (.+) for (.+)",
                    r"change (.+) to (.+)",
                    r"instead of (.+), show (.+)",
                ],
                text,
            )
            or said([r"put (.+) where (.+) (?:is|are)"], text)[::-1]
        )
        (i,) = resolve(old, source)
        new = noun(new, source)
        draft[i] = replace(source.objects[i], name=new["name"], style=new["style"] or source.objects[i].style)
    elif kind == "add":
        what, where = re.fullmatch(rf"(?:add|put|place|insert|draw) (.+?) {AT}", text).groups()
        new = noun(what, source)
        assert new["style"], text
        item = SceneObject(new["name"], new["style"], new["size"] or 24, 0, 0)
        draft[100 + sum(isinstance(key, int) and key >= 100 for key in draft)] = spot(
            where, item, source, preset.lattice
        )
    elif kind == "move":
        pair = said(
            [
                r"swap the positions of (.+) and (.+)",
                r"let (.+) and (.+) trade places",
                r"make (.+) and (.+) change places",
            ],
            text,
        )
        if pair:
            (i,), (j,) = resolve(pair[0], source), resolve(pair[1], source)
            a, b = source.objects[i], source.objects[j]
            draft[i], draft[j] = replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)
        else:
            what, where = re.fullmatch(
                r"(?:move|shift|place|put) (the .+?(?: (?:on|at) the (?:left|right|top|bottom))?) "
                r"((?:to|into|above|below|directly) .+)",
                text,
            ).groups()
            (i,) = resolve(what, source)
            draft[i] = spot(where, source.objects[i], source, preset.lattice)
    elif kind == "resize":
        sizes = sorted(preset.sizes)
        step = (
            said([r"make (.+) (?:bigger|larger)", r"enlarge (.+)"], text),
            said([r"make (.+) smaller", r"shrink (.+)", r"reduce the size of (.+)"], text),
        )
        if step[0] or step[1]:
            (i,) = resolve((step[0] or step[1])[0], source)
            size = sizes[sizes.index(source.objects[i].size) + (1 if step[0] else -1)]
        else:
            what, word = said([r"make (.+) (\w+)", r"resize (.+) to (\w+)", r"change the size of (.+) to (\w+)"], text)
            (i,), size = resolve(what, source), SIZES[word]
        o = source.objects[i]
        shift = (o.size - size) / 2
        draft[i] = replace(
            o, size=size, x=down(o.x + shift, size, preset.lattice), y=down(o.y + shift, size, preset.lattice)
        )
    else:
        style = STYLES[re.findall(r"shaded|flat|simple|outlined", text)[-1]]
        if "everything" in text or "all objects" in text:
            chosen = list(range(len(source.objects)))
        else:
            (what,) = said(
                [
                    r"draw (.+) in the \w+ style",
                    r"give (.+) the \w+ style",
                    r"change the style of (.+) to \w+",
                    r"redraw (.+) in the \w+ style",
                    r"make (.+) \w+",
                ],
                text,
            )
            chosen = resolve(what, source)
        for i in chosen:
            draft[i] = replace(source.objects[i], style=style)


def interpret(edit: edits.Edit, source: Scene, preset: WorldPreset) -> Scene:
    draft: dict = dict(enumerate(source.objects))
    draft["background"] = source.background
    for clause in edit.clauses:
        apply(clause, source, draft, preset)
    background = draft.pop("background")
    return Scene(background, tuple(draft[key] for key in sorted(draft)))


# --- properties -----------------------------------------------------------------------------------------------------


def drawn(
    seed: int, preset: WorldPreset, split: str, clauses: int, kind: str | None
) -> tuple[Scene, edits.Edit | None]:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, preset, split if rng.random() < 0.5 else "train")
    return scene, edits.try_edit(scene, rng, preset, split, clauses, kind)


@settings(max_examples=400, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from(PRESETS),
    st.sampled_from(["train", "held_out"]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([None, *edits.KINDS]),
)
def test_result_follows_from_the_words(seed, preset, split, clauses, kind) -> None:
    source, edit = drawn(seed, preset, split, clauses, kind)
    if edit is None:
        return
    assert interpret(edit, source, preset) == edit.result, (edit, source)
    assert edit.result != source
    assert is_held_out(edit.result) == (split == "held_out")
    assert edit.kinds == tuple(clause.kind for clause in edit.clauses) and len(edit.kinds) == clauses
    assert kind is None or kind in edit.kinds
    position = -1
    for clause in edit.clauses:
        position = edit.instruction.index(clause.text, position + 1)
    assert 1 <= len(edit.result.objects) <= preset.max_objects
    for item in edit.result.objects:
        assert 0 <= item.x <= 64 - item.size and 0 <= item.y <= 64 - item.size
        assert item.x % preset.lattice == 0 and item.y % preset.lattice == 0
        assert item.name in preset.names and item.style in preset.styles and item.size in preset.sizes


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(PRESETS), st.sampled_from([1, 2, 3]))
def test_clauses_state_the_whole_change(seed, preset, clauses) -> None:
    source, edit = drawn(seed, preset, "train", clauses, None)
    if edit is None:
        return
    touched = [i for clause in edit.clauses for i in clause.sources]
    assert len(touched) == len(set(touched)), "clauses overlap"
    kept = [item for i, item in enumerate(source.objects) if i not in touched]
    made = [item for clause in edit.clauses for item in clause.targets]
    assert Counter(edit.result.objects) == Counter(kept + made)
    for clause in edit.clauses:
        assert (clause.background is not None) == (clause.kind == "background")
        for i, target in zip(clause.sources, clause.targets, strict=False):
            assert target != source.objects[i]
    if not any(clause.background for clause in edit.clauses):
        assert edit.result.background == source.background


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(PRESETS), st.sampled_from(["add", "move"]))
def test_new_places_are_free_and_moves_are_visible(seed, preset, kind) -> None:
    source, edit = drawn(seed, preset, "train", 1, kind)
    if edit is None:
        return
    (clause,) = edit.clauses
    for target in clause.targets:
        if len(clause.targets) == 1:
            others = [o for o in edit.result.objects if o != target]
            assert all(target.overlap(o) == 0 for o in others)
        if clause.sources:
            before = next(source.objects[i] for i in clause.sources if source.objects[i].name == target.name)
            assert max(abs(before.x - target.x), abs(before.y - target.y)) >= 8


def test_every_kind_and_split_can_be_had() -> None:
    rng = np.random.default_rng(3)
    for kind in edits.KINDS:
        for split in ("train", "held_out"):
            found = [
                edits.try_edit(sample_scene(rng, NANO, split, count=2), rng, NANO, split, 1, kind) for _ in range(60)
            ]
            share = np.mean([edit is not None for edit in found])
            assert share > 0.6, (kind, split, share)
            assert len({edit.instruction for edit in found if edit}) > 20


def test_an_edit_can_bring_the_held_out_combination_in() -> None:
    rng = np.random.default_rng(4)
    found = [edits.try_edit(sample_scene(rng, NANO, "train"), rng, NANO, "held_out", 1, "replace") for _ in range(50)]
    assert sum(edit is not None for edit in found) > 40


def test_references_are_never_ambiguous_when_a_class_repeats() -> None:
    rng = np.random.default_rng(6)
    seen = set()
    for _ in range(300):
        source = sample_scene(rng, FREE, "train", repeat=True)
        edit = edits.try_edit(source, rng, FREE, "train", 2)
        if edit is not None:
            assert interpret(edit, source, FREE) == edit.result
            seen |= set(re.findall(r"both|on the left|on the right|at the top|at the bottom", edit.instruction))
    assert {"both", "on the left", "at the top"} <= seen


def test_same_seed_same_edit() -> None:
    scene = sample_scene(np.random.default_rng(0), NANO)
    a, b = (edits.sample_edit(scene, np.random.default_rng(9), NANO, "train", 2) for _ in range(2))
    assert a == b


def test_documented_places() -> None:
    """Three conventions by hand, so that a change of meaning is noticed."""
    from unialignment.world import placement

    dog = SceneObject("dog", "noto", 32, 16, 32)
    assert placement.at_place((0, 2), 24, 8) == (40, 0)
    assert placement.at_place((1, 1), 24, 8) == (16, 16)  # 20 is not on the lattice
    assert placement.beside(dog, "above", 24, 8) == (16, 8)
    assert placement.beside(dog, "left", 24, 8) is None
    assert placement.at_edge(dog, "right", 8) == (32, 32)
    assert placement.resized(dog, 24, 8) == SceneObject("dog", "noto", 24, 16, 32)
    assert placement.resized(SceneObject("dog", "noto", 24, 40, 40), 32, 8) == SceneObject("dog", "noto", 32, 32, 32)


def test_unusable_arguments() -> None:
    rng = np.random.default_rng(0)
    scene = Scene("red", (SceneObject("dog", "noto", 24, 0, 0),))
    with pytest.raises(InputError, match="clauses=4"):
        edits.sample_edit(scene, rng, NANO, "train", 4)
    with pytest.raises(InputError, match="unknown edit kind"):
        edits.sample_edit(scene, rng, NANO, "train", kind="sharpen")
    with pytest.raises(InputError, match="without objects"):
        edits.sample_edit(Scene("red"), rng, NANO, "train")
    with pytest.raises(InputError, match="found no remove"):
        edits.sample_edit(scene, rng, NANO, "train", kind="remove")
