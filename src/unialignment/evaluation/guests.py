"""Other people's models on SemGen-World: what ``models.build`` makes of a name, in the place of a pipeline.

Knows what a guest can be asked, and how; nothing of scenes or judging.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from unialignment.errors import InputError
from unialignment.evaluation.benchmarks import Item
from unialignment.evaluation.benchmarks.vqa import SHORT
from unialignment.evaluation.semgen_world import GROUPS

PREFIXES = ("python:", "diffusers:", "openai:")
DESCRIBE = "Describe the picture in one sentence."


class Guest:
    """A model with ``draw``, ``tell`` or both, called as a pipeline is.

    Pictures are resized to the world's size. Of an item that it refuses, nothing comes: a grey picture, an empty text.

    Args:
        model: See :class:`~unialignment.evaluation.harness.Model` and :class:`~unialignment.evaluation.reading.Reader`.
        side: Side of the world's pictures, pixels.

    Raises:
        InputError: It does neither.
    """

    def __init__(self, model: Any, side: int = 64) -> None:
        self.model, self.side = model, side
        draws = ("generate", "edit", *GROUPS, "turns") if hasattr(model, "draw") else ()
        self.parts: tuple[str, ...] = (*draws, *(("caption", "answer") if hasattr(model, "tell") else ()))
        """The parts of the evaluation that it can take part in."""
        if not self.parts:
            raise InputError(f"semgen-world needs a model with draw or tell; {type(model).__name__} has neither")

    def run(
        self,
        task: str,
        prompts: Sequence[str | None],
        images: Sequence[Sequence[np.ndarray]] | None,
        *,
        seed: Sequence[int],
        **_: Any,
    ) -> SimpleNamespace:
        """As ``UniAlignmentPipeline.run`` for lists; sampler settings are given when the model is built."""
        sources = images or [()] * len(prompts)
        rows = list(zip(prompts, sources, seed, strict=True))
        if task in ("caption", "answer"):
            return SimpleNamespace(texts=[self._tell(prompt, own[0], one) for prompt, own, one in rows])
        with tempfile.TemporaryDirectory() as folder:
            return SimpleNamespace(
                images=[self._draw(task, prompt, own, one, Path(folder)) for prompt, own, one in rows]
            )

    def _tell(self, question: str | None, picture: np.ndarray, seed: int) -> str:
        try:
            shown = Image.fromarray(picture)
            return str(self.model.tell(shown, question or "", SHORT if question else DESCRIBE, seed))
        except InputError:
            return ""

    def _draw(
        self, task: str, prompt: str | None, sources: Sequence[np.ndarray], seed: int, folder: Path
    ) -> Image.Image:
        photo = folder / f"{seed}.png" if sources else None
        if photo is not None:
            Image.fromarray(sources[0]).save(photo)
        text = prompt or ""
        kind: Any = "edit" if sources else "generate"
        try:
            picture, _ = self.model.draw(Item(f"{task}/{seed}", task, kind, text, (text,), photo, 0), seed)
        except InputError:
            picture = Image.new("RGB", (self.side, self.side), "gray")
        made: Image.Image = picture.convert("RGB").resize((self.side, self.side), Image.Resampling.LANCZOS)
        return made
