"""From one row of somebody's data set to samples in the making: which tasks it serves, with which texts and pictures.

Understands the published manifests (text to image, editing, composition), LLaVA's conversations, WebDataset members and
plain columns. Pictures stay references (a path, or encoded bytes) here: nothing is opened. Knows nothing of files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unialignment.errors import InputError
from unialignment.tasks import TASKS

PAIR_TASKS = ("generate", "caption", "infill")
"""Tasks that a picture with its text serves; at one number they show the same row, for the contrastive loss."""

PLACEHOLDER = "<image>"

_IMAGE = ("image", "images", "picture", "jpg", "jpeg", "png", "webp")
_SOURCE = ("sources", "source", "source_image", "input_image", "original_image", "original_images", "references",
           "source.png", "source.jpg", "source.webp", "input.png", "input.jpg")  # fmt: skip
_TARGET = ("target", "target_image", "edited_image", "output_image", "generated_images", "generated_image",
           "target.png", "target.jpg", "target.webp", "output.png", "output.jpg")  # fmt: skip
_PROMPT = ("instruction", "edit_prompt", "edit", "prompt")
_TEXT = ("caption", "text", "txt", "target_text", "description", "prompt")


@dataclass(frozen=True)
class Recipe:
    """One sample that a row can become.

    Attributes:
        task: Task name in the registry.
        prompt: Condition text, the task's template applied when the row names a kind.
        sources: References of the condition pictures.
        target: Reference of the target picture, for image targets.
        target_text: For text targets.
        kind: Finer label.
        caption: Text that describes the target (or only) picture: what a text teacher embeds.
        paired: Whether the prompt or target text describes the picture, so that the contrastive loss may pair them.
        size: Width and height in pixels of the deciding picture, where the row says so.
    """

    task: str
    prompt: str = ""
    sources: tuple[Any, ...] = ()
    target: Any = None
    target_text: str | None = None
    kind: str = ""
    caption: str = ""
    paired: bool = False
    size: tuple[int, int] | None = None

    @property
    def deciding_picture(self) -> Any:
        """The picture whose shape chooses the bucket: the target, or for text targets the first source."""
        return self.target if self.target is not None else self.sources[0]


def read_row(row: Mapping[str, Any], tasks: Sequence[str] | None = None) -> tuple[Recipe, ...]:
    """The samples that a row can become.

    Args:
        row: Column name to value; see ``docs/data.md`` for the layouts.
        tasks: Only these. It also says what a picture-to-picture row is for: ``edit`` unless told otherwise.

    Returns:
        At least one recipe.

    Raises:
        InputError: no known layout, a column is missing or of the wrong type, or none of ``tasks`` fits.
    """
    row = _flat(row)
    named = row.get("task")
    if named is not None:
        if not isinstance(named, str):
            raise InputError(f"'task' must be a task's name, got {type(named).__name__}")
        TASKS.get(named)
        wanted: tuple[str, ...] | None = (named,)
        if tasks is not None and named not in tasks:
            raise InputError(f"the row is for {named!r}, the source is for {', '.join(tasks)}")
    else:
        wanted = None if tasks is None else tuple(tasks)
    found = _conversation(row, wanted) if "conversations" in row else _plain(row, wanted)
    chosen = tuple(recipe for recipe in found if wanted is None or recipe.task in wanted)
    if not chosen:
        could = ", ".join(dict.fromkeys(recipe.task for recipe in found)) or "no task"
        raise InputError(f"the row serves {could}, but {', '.join(wanted or ())} is wanted")
    for recipe in chosen:
        _check(recipe)
    return chosen


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with a WebDataset ``json`` member's entries as columns, and without empty ones."""
    result = dict(row)
    member = result.pop("json", None)
    if isinstance(member, str | bytes):
        try:
            member = json.loads(member)
        except ValueError as error:
            raise InputError(f"the json member is not JSON ({error})") from None
    if isinstance(member, Mapping):
        result = {**member, **result}
    return {key: value for key, value in result.items() if value is not None}


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if name in row:
            return row[name]
    return None


def _pictures(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        items: tuple[Any, ...] = tuple(value)
    else:
        items = (value,)
    for item in items:
        if not (isinstance(item, str | bytes) and item) and not isinstance(item, Mapping):
            raise InputError(f"a picture must be a path or encoded bytes, got {type(item).__name__} {str(item)[:40]!r}")
    return items


def _text(value: Any, what: str) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{what} is not UTF-8 ({error})") from None
    if not isinstance(value, str):
        raise InputError(f"{what} must be a text, got {type(value).__name__}")
    return " ".join(value.split())


def _size(row: Mapping[str, Any], picture: int) -> tuple[int, int] | None:
    sides = []
    for name in ("img_w", "img_h"):
        value = row.get(name)
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = value[picture] if -len(value) <= picture < len(value) else None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            return None
        sides.append(value)
    return sides[0], sides[1]


def _pair(row: Mapping[str, Any], picture: Any, text: str) -> list[Recipe]:
    common: dict[str, Any] = {"caption": text, "paired": True, "size": _size(row, 0), "kind": str(row.get("kind", ""))}
    return [
        Recipe("generate", text, target=picture, **common),
        Recipe("caption", "", (picture,), target_text=text, **common),
        Recipe("infill", "", (picture,), target_text=text, **common),
    ]


def _to_picture(
    row: Mapping[str, Any], wanted: Sequence[str] | None, sources: tuple[Any, ...], target: Any, prompt: str, about: str
) -> list[Recipe]:
    """A picture from pictures: what it is called depends on what the source or row says."""
    fitting = ["edit", "perceive", "control"] if len(sources) == 1 else []
    fitting.append("compose")
    named = [task for task in wanted or () if task in fitting] or fitting[:1]
    kind = str(row.get("kind", ""))
    recipes = []
    for task in named:
        declared = TASKS.get(task)
        text = declared.condition_text(prompt, kind) if kind in declared.templates and kind else prompt
        recipes.append(Recipe(task, text, sources, target, kind=kind, caption=about, size=_size(row, len(sources))))
    return recipes


def _conversation(row: Mapping[str, Any], wanted: Sequence[str] | None) -> list[Recipe]:
    """Published manifests and LLaVA's: ``image`` and ``conversations`` of alternating human and gpt turns."""
    turns = row["conversations"]
    if not isinstance(turns, Sequence) or isinstance(turns, str) or len(turns) < 2:
        raise InputError("'conversations' must be a list of a human and a gpt turn, or several such pairs")
    texts = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or "value" not in turn:
            raise InputError(f"turn {number} of 'conversations' must be {{'from': ..., 'value': ...}}")
        texts.append(_text(turn["value"], f"turn {number} of 'conversations'"))
    pictures = _pictures(_first(row, _IMAGE))
    if not pictures:
        raise InputError("a row with 'conversations' needs 'image'")
    asked, answer = texts[0], texts[1]
    if "instruction" in row:
        if len(pictures) < 2:
            raise InputError(f"'instruction' needs a source and a target picture, got {len(pictures)}")
        prompt = _text(row["instruction"], "'instruction'")
        return _to_picture(row, wanted, pictures[:-1], pictures[-1], prompt, asked)
    if answer in ("", PLACEHOLDER):  # the picture is the answer
        if len(pictures) > 1:
            return _to_picture(row, wanted, pictures[:-1], pictures[-1], _question(asked), "")
        return _pair(row, pictures[0], asked)
    if len(pictures) != 1:
        raise InputError(f"a conversation about pictures takes one picture here, got {len(pictures)}")
    recipes = []
    if wanted is not None and "answer" not in wanted:  # "describe this picture": the question is no condition
        return _pair(row, pictures[0], answer)
    for question, reply in zip(texts[::2], texts[1::2]):
        question = _question(question)
        if not question:
            return _pair(row, pictures[0], reply)
        recipes.append(
            Recipe("answer", question, pictures, target_text=reply, kind=str(row.get("kind", "")), size=_size(row, 0))
        )
    return recipes


def _question(text: str) -> str:
    return " ".join(text.replace(PLACEHOLDER, " ").split())


def _plain(row: Mapping[str, Any], wanted: Sequence[str] | None) -> list[Recipe]:
    sources, targets = _pictures(_first(row, _SOURCE)), _pictures(_first(row, _TARGET))
    images = _pictures(_first(row, _IMAGE))
    if not sources and not targets and len(images) > 1:
        sources, targets = images[:-1], images[-1:]
    if targets and (sources or images):
        sources = sources or images
        prompt = _text(_first(row, _PROMPT) or "", "the instruction").strip(' \\"')
        about = _text(row.get("caption", ""), "'caption'")
        return _to_picture(row, wanted, sources, targets[0], prompt, about)
    picture = (images or sources or targets)[:1]
    if not picture:
        raise InputError(f"no picture: expected a column such as 'image', or 'source' and 'target'; got {_names(row)}")
    kind = str(row.get("kind", ""))
    if "question" in row or "answer" in row:
        answer = _first(row, ("answer", "answers"))
        if isinstance(answer, Sequence) and not isinstance(answer, str | bytes) and answer:
            answer = answer[0]
        question = _question(_text(row.get("question"), "'question'"))
        text = _text(answer, "'answer'")
        return [Recipe("answer", question, picture, target_text=text, kind=kind, size=_size(row, 0))]
    value = _first(row, _TEXT)
    if value is None:
        raise InputError(
            f"no text: expected a column such as 'caption', 'instruction' or 'question'; got {_names(row)}"
        )
    return _pair(row, picture[0], _text(value, "the text"))


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in list(row)[:12]) or "nothing"


def _check(recipe: Recipe) -> None:
    task = TASKS.get(recipe.task)
    task.check_sources(len(recipe.sources))
    if task.needs_prompt() and not recipe.prompt and task.target == "image" and not recipe.kind:
        raise InputError(f"a {recipe.task} row needs an instruction that isn't empty")
    if recipe.task == "answer" and not recipe.prompt:
        raise InputError("an answer row needs a question that isn't empty")
    if task.target == "image" and recipe.target is None:
        raise InputError(f"a {recipe.task} row needs a target picture")
    if task.target == "text" and not recipe.target_text:
        raise InputError(f"a {recipe.task} row needs a text that isn't empty")
