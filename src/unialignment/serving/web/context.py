"""What all tabs share: the engine, files of results, defaults of the tasks, and following one request to its end.

Knows nothing of widgets.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from unialignment.errors import InputError
from unialignment.images import fit_image, load_image
from unialignment.inputs import merge_options
from unialignment.outputs import ImageResult
from unialignment.serving.requests import Done, Event, Failed, Preview, Progress, TaskRequest, TextSoFar
from unialignment.tasks import TASKS, TaskRegistry

MAX_FILES = 400
"""Result files kept for download; the oldest go first."""
MAX_PREVIEWS = 12
"""Live pictures of one request: enough to watch, few enough to cost little."""
COMPARED_SIDE = 512
"""Least side, in pixels, of pictures that are laid over one another."""
OPEN = "▢"
"""Stands for a word that isn't written yet."""


class EngineLike(Protocol):
    """The part of :class:`~unialignment.serving.engine.Engine` that the page uses; a remote one has it too."""

    def submit(self, request: TaskRequest) -> Any:
        """Accept a request; returns something like a :class:`~unialignment.serving.handle.Handle`."""


@dataclass
class PageContext:
    """What the tabs are built on.

    Attributes:
        engine: Runs the requests.
        model: The model's name, for the heading.
        size: Side of its pictures in pixels.
        sampling: The model's sampler defaults by task.
        max_steps: Most denoising steps that may be asked for.
        max_n: Most pictures of one request.
        max_pixels: Largest picture that may be given, width × height.
        tasks: The tasks' declarations.
        gallery: Pictures to start from, each with its description.
    """

    engine: EngineLike
    model: str
    size: int
    sampling: Mapping[str, Mapping[str, Any]]
    max_steps: int = 200
    max_n: int = 4
    max_pixels: int = 25_000_000
    tasks: TaskRegistry = TASKS
    gallery: Sequence[tuple[Path, str]] = ()
    _folder: tempfile.TemporaryDirectory[str] = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="unialign-web-"), repr=False
    )
    _files: deque[Path] = field(default_factory=deque, repr=False)
    _numbers: itertools.count[int] = field(default_factory=itertools.count, repr=False)

    @property
    def folder(self) -> Path:
        """Where result files lie; removed with the server."""
        return Path(self._folder.name)

    def default(self, task: str) -> dict[str, Any]:
        """Sampler settings of a task that apply when nothing else is asked for."""
        return merge_options(self.tasks.get(task), self.sampling.get(task, {}), {})

    def new_file(self, stem: str) -> Path:
        """A fresh name for a result; the oldest result is removed when there are too many."""
        while len(self._files) >= MAX_FILES:
            oldest = self._files.popleft()
            oldest.unlink(missing_ok=True)
            oldest.parent.rmdir()
        folder = self.folder / f"{next(self._numbers)}-{secrets.token_hex(8)}"
        folder.mkdir()
        path = folder / f"{re.sub(r'[^a-z0-9-]+', '-', stem.lower()).strip('-')[:60] or 'picture'}.png"
        self._files.append(path)
        return path

    def save(self, result: ImageResult) -> list[Path]:
        """Write a result's pictures with their metadata, for display and download."""
        return result.save([self.new_file(f"{result.task}-{seed}") for seed in result.seeds])

    def save_picture(self, image: Image.Image, stem: str) -> Path:
        """Write one picture."""
        path = self.new_file(stem)
        image.save(path)
        return path

    def compared(self, source: str, result: ImageResult) -> tuple[str, str]:
        """Files of a source as the model saw it and of what was made of it, large enough to lay over one another."""
        made = result.images[0]
        seen = fit_image(load_image(source, max_pixels=self.max_pixels), *made.size)
        scale = max(1, -(-COMPARED_SIDE // max(made.size)))
        size = made.width * scale, made.height * scale
        paths = [self.new_file(name) for name in ("before", "after")]
        for image, path in zip((seen, made), paths, strict=True):
            image.resize(size, Image.Resampling.BICUBIC).save(path)
        return str(paths[0]), str(paths[1])


@dataclass(frozen=True)
class Update:
    """What a tab shows next.

    Attributes:
        fraction: Of the work, 0–1.
        note: The same in words.
        index: Which of several results a picture belongs to.
        image: The picture so far.
        text: The text so far.
        result: The end, else ``None``.
    """

    fraction: float = 0.0
    note: str = ""
    index: int = 0
    image: Image.Image | None = None
    text: str | None = None
    result: Any = None


async def follow(engine: EngineLike, request: TaskRequest) -> AsyncIterator[Update]:
    """Run a request; the updates end with the one that has a result. Leaving early cancels the request.

    Raises:
        UniAlignmentError: It can't be served, or failed in a way that its user can mend.
    """
    # Pictures are decoded while submitting: not in the thread that serves everybody.
    handle = await asyncio.to_thread(engine.submit, request)
    try:
        yield Update(0.0, "waiting for its turn")
        async for event in handle:
            update = _update(event)
            if update is not None:
                yield update
    finally:
        handle.cancel()


def _update(event: Event) -> Update | None:
    if isinstance(event, Failed):
        raise event.error
    if isinstance(event, Done):
        return Update(1.0, f"done in {event.seconds:.1f} s", result=event.result)
    note = f"step {event.step} of {event.steps}"
    if isinstance(event, Preview):
        return Update(event.fraction, note, event.index, image=event.image)
    if isinstance(event, TextSoFar):
        return Update(event.fraction, note, event.index, text=event.text.replace("[MASK]", OPEN))
    if isinstance(event, Progress) and event.index == 0:
        return Update(event.fraction, note)
    return None


def picture_path(value: Any, what: str = "a picture") -> str:
    """A picture that a widget holds.

    Raises:
        InputError: There is none.
    """
    if not value:
        raise InputError(f"choose {what} first: upload or paste one, take one from the strip, or sketch it")
    return str(value)


def new_seed() -> int:
    """A seed that is short enough to read out."""
    return secrets.randbelow(10**6)
