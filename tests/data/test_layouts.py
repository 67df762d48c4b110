"""Layouts: the published manifests, LLaVA's, WebDataset's and plain columns mean what the documentation says."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unialignment.data.layouts import read_row
from unialignment.errors import InputError


def by_task(row: dict, tasks=None) -> dict:
    return {recipe.task: recipe for recipe in read_row(row, tasks)}


def conversation(human: str, gpt: str, **more) -> dict:
    return {"conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}], **more}


def test_published_text_to_image() -> None:
    found = by_task(conversation("a red dog", "<image>", image=["a.png"], img_w=[640], img_h=[480]))
    assert set(found) == {"generate", "caption", "infill"}
    assert found["generate"].prompt == "a red dog" and found["generate"].target == "a.png"
    assert found["generate"].size == (640, 480) and found["generate"].paired
    assert found["caption"].sources == ("a.png",) and found["caption"].target_text == "a red dog"
    assert found["caption"].prompt == ""


def test_published_editing() -> None:
    row = conversation("a cat", "", image=["s.png", "t.png"], instruction="make it a cat", img_w=[9, 8], img_h=[7, 6])
    edit = by_task(row)["edit"]
    assert (edit.sources, edit.target, edit.prompt, edit.caption) == (("s.png",), "t.png", "make it a cat", "a cat")
    assert edit.size == (8, 6) and not edit.paired
    assert set(by_task(row, ["perceive"])) == {"perceive"}
    assert set(by_task(row, ["control", "generate"])) == {"control"}


def test_published_composition_takes_any_number_of_references() -> None:
    for count in (2, 3):
        references = [f"{i}.png" for i in range(count)]
        row = {"original_images": references, "generated_images": ["t.png"], "edit_prompt": ' "both"', "caption": "c"}
        found = by_task(row)["compose"]
        assert (found.sources, found.target, found.prompt) == (tuple(references), "t.png", "both")


def test_llava_conversations_become_questions_or_captions() -> None:
    turns = conversation("<image>\nWhat is it?", "a dog", image="a.png")
    turns["conversations"] += [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "left"}]
    found = read_row(turns)
    assert [(r.prompt, r.target_text) for r in found] == [("What is it?", "a dog"), ("Where?", "left")]
    assert {r.task for r in found} == {"answer"}
    described = by_task(turns, ["caption"])
    assert described["caption"].target_text == "a dog" and described["caption"].prompt == ""
    assert set(by_task(conversation("<image>", "a dog", image="a.png"))) == {"generate", "caption", "infill"}


@pytest.mark.parametrize(
    "row, task",
    [
        ({"image": "a.png", "text": "a dog"}, "generate"),
        ({"jpg": b"bytes", "txt": b"a dog"}, "caption"),
        ({"png": {"bytes": b"x", "path": None}, "json": {"caption": "a dog"}}, "generate"),
        ({"png": b"x", "json": '{"question": "what?", "answer": "dog"}'}, "answer"),
        ({"image": "a.png", "question": "what?", "answers": ["dog", "cat"]}, "answer"),
        ({"source": "a.png", "instruction": "more", "target": "b.png"}, "edit"),
        ({"original_image": b"a", "edit_prompt": "more", "edited_image": b"b"}, "edit"),
        ({"source.png": b"a", "target.png": b"b", "txt": b"x", "json": {"prompt": "more"}}, "edit"),
        ({"sources": ["a.png", "b.png"], "target": "c.png", "prompt": "both"}, "compose"),
        ({"task": "caption", "image": "a.png", "caption": "a dog"}, "caption"),
    ],
)
def test_plain_columns(row: dict, task: str) -> None:
    assert task in by_task(row)


def test_a_kind_applies_the_tasks_template() -> None:
    row = {"task": "perceive", "kind": "segment", "source": "a.png", "prompt": "the dog", "target": "m.png"}
    assert by_task(row)["perceive"].prompt == "segment the dog"
    depth = {"task": "perceive", "kind": "depth", "source": "a.png", "target": "m.png"}
    assert by_task(depth)["perceive"].prompt == "estimate the depth"
    other = {"task": "perceive", "kind": "pose", "source": "a.png", "prompt": "find the pose", "target": "m.png"}
    assert by_task(other)["perceive"].prompt == "find the pose"


@pytest.mark.parametrize(
    "row, message",
    [
        ({}, "no picture"),
        ({"caption": "a dog"}, "no picture"),
        ({"image": "a.png"}, "no text"),
        ({"image": 3, "text": "a"}, "a picture must be"),
        ({"image": "a.png", "text": 3}, "must be a text"),
        ({"image": "a.png", "text": "  "}, "isn't empty"),
        ({"source": "a.png", "target": "b.png"}, "instruction that isn't empty"),
        ({"task": "painting", "image": "a.png", "text": "a"}, "unknown task"),
        ({"task": "edit", "image": "a.png", "text": "a"}, "but edit is wanted"),
        ({"image": "a.png", "question": "what?"}, "must be a text"),
        (conversation("a", "<image>"), "needs 'image'"),
        ({"image": "a.png", "conversations": "a"}, "'conversations' must be a list"),
        ({"image": "a.png", "conversations": [{"x": 1}, {"x": 2}]}, "turn 0"),
        (conversation("a", "", image=["a.png"], instruction="b"), "a source and a target"),
        ({"sources": ["a"] * 5, "target": "b", "prompt": "c"}, "compose takes 1 to 4"),
        ({"png": b"x", "json": "{"}, "json member"),
        ({"image": "a.png", "txt": b"\xff"}, "not UTF-8"),
    ],
)
def test_what_is_wrong_is_said(row: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_row(row)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
COLUMNS = ("image", "conversations", "instruction", "source", "target", "caption", "task", "kind", "img_w", "img_h",
           "json", "question", "answer", "original_images", "generated_images")  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=5))
def test_no_row_whatsoever_raises_anything_else(row: dict) -> None:
    with contextlib.suppress(InputError):
        assert read_row(row)


def test_examples_serve_what_their_guide_says(examples: Path) -> None:
    served = {}
    for manifest in sorted(examples.glob("*/manifest.jsonl")):
        rows = [json.loads(line) for line in manifest.read_text().splitlines()]
        served[manifest.parent.name] = {recipe.task for row in rows for recipe in read_row(row)}
        for row in rows:
            for recipe in read_row(row):
                for reference in (*recipe.sources, *([recipe.target] if recipe.target else [])):
                    assert (manifest.parent / reference).is_file()
    assert served == {
        "text-image": {"generate", "caption", "infill"},
        "editing": {"edit"},
        "perception": {"perceive"},
        "questions": {"answer"},
        "personalization": {"compose"},
    }
