"""What a task is: a declaration of which tokens are conditions and which are target (DESIGN section 1).

Model, trainer and pipeline read declarations and never ask for a task by name. Knows nothing of tensors or files.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from unialignment.errors import InputError

TargetKind = Literal["image", "text"]


@dataclass(frozen=True)
class Task:
    """A task's declaration.

    Attributes:
        name: Unique name; also the pipeline method and the command.
        summary: One line for help texts.
        target: What is denoised: a picture (continuous diffusion) or a text (masked diffusion).
        prompt: ``"required"``, ``"optional"`` or ``"none"``.
        min_sources: Fewest condition pictures.
        max_sources: Most condition pictures.
        templates: Condition text by kind, with ``{prompt}`` for what the user wrote. The first kind is the default. A
            task without kinds has the one kind ``""``.
        gaps: The target text is partly given: only its gaps are denoised (infill).
        target_length: Text canvas in tokens, for text targets.
        sampling: Defaults of the sampler (``num_inference_steps``, ``guidance_scale``, ``image_guidance_scale``, …).
        size_from_source: The result has the first source's size, rather than the model's default.

    Raises:
        ValueError: the declaration contradicts itself.
    """

    name: str
    summary: str
    target: TargetKind
    prompt: Literal["required", "optional", "none"] = "required"
    min_sources: int = 0
    max_sources: int = 0
    templates: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({"": "{prompt}"}))
    gaps: bool = False
    target_length: int = 0
    sampling: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    size_from_source: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.min_sources <= self.max_sources:
            raise ValueError(f"task {self.name!r}: 0 <= min_sources <= max_sources must hold")
        if self.target == "text" and self.target_length < 1:
            raise ValueError(f"task {self.name!r}: a text target needs a target_length")
        if not self.templates:
            raise ValueError(f"task {self.name!r}: at least one template is needed")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the task's kinds; ``("",)`` when it has none."""
        return tuple(self.templates)

    def needs_prompt(self, kind: str = "") -> bool:
        """Whether a prompt must be given for ``kind``."""
        return self.prompt == "required" and "{prompt}" in self.templates[kind or self.kinds[0]]

    def condition_text(self, prompt: str = "", kind: str = "") -> str:
        """The condition text the model sees.

        Raises:
            InputError: unknown kind, a needed prompt is empty, or one is given where none is used.
        """
        kind = kind or self.kinds[0]
        if kind not in self.templates:
            raise InputError(f"{self.name} has no kind {kind!r}: use one of {', '.join(self.kinds)}.")
        prompt = " ".join(prompt.split())
        if self.needs_prompt(kind) and not prompt:
            what = f"{self.name} ({kind})" if kind else self.name
            raise InputError(f"{what} needs a prompt that isn't empty.")
        template = self.templates[kind]
        if prompt and "{prompt}" not in template:
            raise InputError(f"{self.name}{f' ({kind})' if kind else ''} takes no prompt: leave it out.")
        return " ".join(template.format(prompt=prompt).split())

    def check_sources(self, count: int) -> None:
        """Refuses a wrong number of condition pictures.

        Raises:
            InputError: too few or too many.
        """
        if self.min_sources <= count <= self.max_sources:
            return
        if self.max_sources == 0:
            wanted = "no picture"
        elif self.min_sources == self.max_sources:
            wanted = f"{self.min_sources} picture" + "s" * (self.min_sources != 1)
        else:
            wanted = f"{self.min_sources} to {self.max_sources} pictures"
        raise InputError(f"{self.name} takes {wanted}, {count} given.")


class TaskRegistry:
    """Tasks by name; adding one is one :meth:`register` call."""

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {}

    def register(self, task: Task) -> Task:
        """Adds a task.

        Raises:
            ValueError: the name is taken.
        """
        if task.name in self._tasks:
            raise ValueError(f"task {task.name!r} is registered already")
        self._tasks[task.name] = task
        return task

    def get(self, name: str) -> Task:
        """The task called ``name``.

        Raises:
            InputError: there is none; the nearest name is suggested.
        """
        if name not in self._tasks:
            close = difflib.get_close_matches(name, self._tasks, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise InputError(f"unknown task {name!r}: known are {', '.join(self._tasks)}.{hint}")
        return self._tasks[name]

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in order of registration."""
        return tuple(self._tasks)
