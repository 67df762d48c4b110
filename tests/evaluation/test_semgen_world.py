"""The four groups: items are what they say, the truth gets full marks, a copied source none, each mistake its price."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from unialignment.data.sample import Sample
from unialignment.errors import InputError
from unialignment.evaluation import clauses
from unialignment.evaluation.contestants import CopySource, RandomOther, Truth
from unialignment.evaluation.judge import Judge
from unialignment.evaluation.semgen_world import GROUPS, group_sample, group_scores, marks, needs_understanding, turns
from unialignment.world.captions import Description
from unialignment.world.edits import Clause, Edit
from unialignment.world.scene import Scene, SceneObject
from unialignment.world.splits import is_held_out
from unialignment.world.stream import WorldStream

DOG, CAR = SceneObject("dog", "noto", 24, 0, 0), SceneObject("car", "fluent", 24, 40, 40)
CAT = SceneObject("cat", "noto", 24, 0, 40)
SOURCE = Scene("blue", (DOG, CAR, CAT))
MOVED = replace(DOG, x=40)
EDIT = Edit(
    "move the dog to the right edge, remove the car and make the background red",
    Scene("red", (MOVED, CAT)),
    ("move", "remove", "background"),
    (
        Clause("move", "move the dog to the right edge", (0,), (MOVED,)),
        Clause("remove", "remove the car", (1,)),
        Clause("background", "make the background red", background="red"),
    ),
)


@pytest.fixture(scope="module")
def stream(pack, nano) -> WorldStream:
    if len(nano.styles) < 2:
        pytest.skip("held-out edits need two styles: the artwork of `unialign world build --source npm`")
    return WorldStream(pack, nano, "held_out", 11)


@pytest.fixture(scope="module")
def judge(pack, nano) -> Judge:
    return Judge(pack, nano)


@pytest.mark.parametrize("group", GROUPS)
def test_truth_full_marks_copy_none_random_little(stream: WorldStream, judge: Judge, group: str) -> None:
    items = [group_sample(stream, group, index) for index in range(12)]
    given = {
        who: type_().outputs(items, 0)
        for who, type_ in (("truth", Truth), ("copy", CopySource), ("random", RandomOther))
    }
    overall = {
        who: [marks(judge, item, out).o for item, out in zip(items, outputs, strict=True) if out is not None]
        for who, outputs in given.items()
    }
    assert np.mean(overall["truth"]) >= 9.9
    assert np.mean(overall["random"]) < 3
    assert overall["copy"] == ([0.0] * 12 if group.startswith("edit") else [])


@pytest.mark.parametrize("group", GROUPS)
def test_items_are_what_their_group_says(stream: WorldStream, group: str) -> None:
    for index in range(12):
        item = group_sample(stream, group, index)
        assert is_held_out(item.meta["scene"])
        if group == "t2i_long":
            assert len(item.prompt.split()) >= 60
        elif group == "t2i_complex":
            stated = item.meta["description"]
            assert len(item.meta["scene"].objects) == 3
            assert stated.relations or stated.between
        else:
            source, edit = item.meta["source"], item.meta["edit"]
            assert len(edit.clauses) == 3 if group == "edit_multi" else needs_understanding(source, edit)
    again = group_sample(stream, group, 11)
    assert again.prompt == item.prompt and (again.target_image == item.target_image).all()


def test_seeds_draw_other_items(pack, nano, stream: WorldStream) -> None:
    other = WorldStream(pack, nano, "held_out", 12)
    assert all(group_sample(stream, g, 0).prompt != group_sample(other, g, 0).prompt for g in GROUPS)


def test_unknown_groups_and_indices_are_refused(stream: WorldStream) -> None:
    with pytest.raises(InputError, match="unknown group 't2i'"):
        group_sample(stream, "t2i", 0)
    with pytest.raises(InputError, match="index=-1"):
        group_sample(stream, "t2i_long", -1)


def test_clauses_of_an_edit_one_by_one() -> None:
    result = EDIT.result
    assert clauses.edit_clauses(result, SOURCE, EDIT) == [True, True, True]
    assert clauses.edit_clauses(SOURCE, SOURCE, EDIT) == [False, False, False]
    only_red = replace(SOURCE, background="red")
    assert clauses.edit_clauses(only_red, SOURCE, EDIT) == [False, False, True]
    restyled = Scene("red", (replace(MOVED, style="fluent"), CAT))
    assert clauses.edit_clauses(restyled, SOURCE, EDIT) == [False, True, True]
    near = Scene("red", (replace(MOVED, x=MOVED.x - 3), CAT))
    assert clauses.edit_clauses(near, SOURCE, EDIT) == [True, True, True]
    hidden = Scene("red", (MOVED, CAT, replace(CAR, x=20)))  # moved away is not removed
    assert clauses.edit_clauses(hidden, SOURCE, EDIT) == [True, False, True]


def test_removing_the_wrong_one_of_two_is_not_carried_out() -> None:
    left, right = replace(CAR, x=0, y=20), replace(CAR, x=40, y=20)
    source = Scene("blue", (left, right))
    edit = Edit("remove the car on the left", Scene("blue", (right,)), ("remove",), (Clause("remove", "...", (0,)),))
    assert clauses.edit_clauses(Scene("blue", (right,)), source, edit) == [True]
    assert clauses.edit_clauses(Scene("blue", (left,)), source, edit) == [False]
    assert clauses.edit_clauses(source, source, edit) == [False]


def test_what_is_preserved() -> None:
    result = EDIT.result  # the cat, and nothing else
    assert clauses.preserved(result, SOURCE, EDIT) == [True, True]
    assert clauses.preserved(Scene("red", (MOVED,)), SOURCE, EDIT) == [False, True]
    assert clauses.preserved(Scene("red", (MOVED, CAT, CAR)), SOURCE, EDIT) == [True, False]
    only = replace(EDIT, clauses=EDIT.clauses[:2], result=Scene("blue", (MOVED, CAT)))
    assert clauses.preserved(Scene("green", (MOVED, CAT)), SOURCE, only) == [True, False, True]


def test_facts_of_a_prompt_one_by_one() -> None:
    scene = Scene("blue", (DOG, replace(CAR, y=0)))
    stated = Description("...", "short", sizes=False, places=(0,), relations=((0, "left", 1),))
    facts = clauses.stated_facts(scene, scene, stated)
    assert [kind for kind, _ in facts] == ["object"] * 2 + ["style"] * 2 + ["place", "relation", "background"]
    assert all(right for _, right in facts)
    alone = clauses.stated_facts(Scene("red", (replace(CAR, style="noto", y=0),)), scene, stated)
    assert [right for _, right in alone] == [False, True, False, False, False, False, False]


def test_ruining_a_picture_costs_quality_and_no_picture_costs_all(stream: WorldStream, judge: Judge) -> None:
    item = group_sample(stream, "t2i_complex", 0)
    blurred = item.target_image.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
    assert marks(judge, item, blurred).pq < 7
    blank = np.full_like(item.target_image, 128)
    assert marks(judge, item, blank).o == 0


def test_group_scores_have_the_parts_and_the_likeness(stream: WorldStream, judge: Judge) -> None:
    item = group_sample(stream, "edit_multi", 1)
    scores = group_scores(judge, item, item.target_image)
    assert set(scores) == {f"semgen.edit_multi{part}" for part in ("", ".ic", ".pq", ".psnr")}
    assert scores["semgen.edit_multi"] == pytest.approx(
        (scores["semgen.edit_multi.ic"] * scores["semgen.edit_multi.pq"]) ** 0.5
    )


def test_turns_are_the_clauses(stream: WorldStream) -> None:
    item = group_sample(stream, "edit_multi", 2)
    told = turns(item)
    assert [turn.prompt for turn in told] == [clause.text for clause in item.meta["edit"].clauses]
    assert all(isinstance(turn, Sample) and turn.prompt in item.prompt for turn in told)
