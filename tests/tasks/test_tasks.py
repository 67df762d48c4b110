"""Task declarations: the eight of the design and one more, their refusals, and how little adding one takes."""

from __future__ import annotations

import pytest

from unialignment.errors import InputError
from unialignment.tasks import TASKS, Task, TaskRegistry


def test_the_eight_tasks_of_the_design_and_rewriting() -> None:
    targets = {name: TASKS.get(name).target for name in TASKS.names}
    assert targets == {
        "generate": "image",
        "edit": "image",
        "perceive": "image",
        "control": "image",
        "compose": "image",
        "caption": "text",
        "answer": "text",
        "infill": "text",
        "rewrite": "text",
    }


def test_condition_text_comes_from_the_kinds_template() -> None:
    perceive = TASKS.get("perceive")
    assert perceive.condition_text("the  dog\n") == "segment the dog"
    assert perceive.condition_text(kind="depth") == "estimate the depth"
    assert perceive.needs_prompt("segment")
    assert not perceive.needs_prompt("edges")
    assert TASKS.get("generate").condition_text("") == ""


@pytest.mark.parametrize(
    ("task", "prompt", "kind", "message"),
    [
        ("edit", " \n ", "", "edit needs a prompt"),
        ("perceive", "", "segment", r"perceive \(segment\) needs a prompt"),
        ("perceive", "the dog", "depth", "takes no prompt"),
        ("perceive", "the dog", "pose", "no kind 'pose': use one of segment, depth, edges"),
    ],
)
def test_unusable_prompts_are_refused(task: str, prompt: str, kind: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TASKS.get(task).condition_text(prompt, kind)


@pytest.mark.parametrize(
    ("task", "count", "message"),
    [
        ("generate", 1, "generate takes no picture, 1 given"),
        ("edit", 0, "edit takes 1 picture, 0 given"),
        ("compose", 5, "compose takes 1 to 4 pictures, 5 given"),
    ],
)
def test_wrong_numbers_of_pictures_are_refused(task: str, count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TASKS.get(task).check_sources(count)


def test_unknown_task_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'generate'"):
        TASKS.get("generat")


def test_a_name_is_taken_once() -> None:
    registry = TaskRegistry()
    registry.register(Task("draw", "draw", "image"))
    with pytest.raises(ValueError, match="registered already"):
        registry.register(Task("draw", "draw again", "image"))


@pytest.mark.parametrize(
    "arguments",
    [
        {"target": "text"},
        {"target": "image", "min_sources": 2, "max_sources": 1},
        {"target": "image", "templates": {}},
    ],
)
def test_contradictory_declarations_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="task 'odd'"):
        Task("odd", "odd", **arguments)  # type: ignore[arg-type]
