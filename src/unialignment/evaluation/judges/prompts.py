"""The texts that judges are given: files beside this package, each replaceable by one of the same name.

Knows nothing of what is asked about.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from unialignment.errors import InputError
from unialignment.evaluation.records import digest
from unialignment.evaluation.scoring import Aspect, Protocol

COUNTS = {"edit_consistency": 2, "generate_consistency": 1, "quality": 2}
"""Prompt name to the numbers that it asks for."""
_PLACE = "{instruction}"


@dataclass(frozen=True)
class Question:
    """What to ask about one aspect of one picture.

    Attributes:
        text: The prompt with the instruction in its place.
        count: Numbers asked for.
        with_source: Whether the source is shown before the result.
        yes_no: The answer is yes or no, which count as 1 and 0, instead of numbers.
    """

    text: str
    count: int
    with_source: bool
    yes_no: bool = False


def yes_no_question(text: str) -> Question:
    """A question of a benchmark's own about the picture."""
    return Question(f"{text}\nLook at the picture and answer with yes or no only.", 1, False, yes_no=True)


class PromptSet:
    """All prompts of a run.

    Args:
        folder: Holds files named like ours, ``NAME.txt``, that take their place; ``None``: only ours.

    Raises:
        InputError: A file there has an unknown name, or lacks ``{instruction}``.
    """

    def __init__(self, folder: Path | None = None) -> None:
        ours = resources.files("unialignment.evaluation") / "prompts"
        self.texts = {name: (ours / f"{name}.txt").read_text(encoding="utf-8") for name in COUNTS}
        if folder is not None:
            files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
            if not files:
                raise InputError(f"{folder} holds no prompts; expected some of {', '.join(f'{n}.txt' for n in COUNTS)}")
            for file in files:
                if file.stem not in COUNTS:
                    raise InputError(f"unknown prompt {file.name}; expected some of {', '.join(COUNTS)} (.txt)")
                self.texts[file.stem] = file.read_text(encoding="utf-8")
        for name, text in self.texts.items():
            if name != "quality" and _PLACE not in text:
                raise InputError(f"the prompt {name}.txt must hold {_PLACE} where the instruction belongs")

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all texts."""
        return digest(*(part for name in sorted(self.texts) for part in (name, self.texts[name])))

    def question(self, kind: str, aspect: Aspect, instruction: str, protocol: Protocol) -> Question:
        """The question about an aspect of an item.

        Args:
            kind: ``"generate"`` or ``"edit"``.
            aspect: What to judge.
            instruction: The item's prompt.
            protocol: Whether text-to-image items get the editing prompt.
        """
        if aspect == "quality":
            return Question(self.texts["quality"].replace(_PLACE, instruction), COUNTS["quality"], False)
        editing = kind == "edit" or protocol.editing_prompts_everywhere
        name = "edit_consistency" if editing else "generate_consistency"
        return Question(self.texts[name].replace(_PLACE, instruction), COUNTS[name], kind == "edit")
