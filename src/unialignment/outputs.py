"""What the pipeline returns. Knows nothing of how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from unialignment.errors import InputError
from unialignment.metadata import save_image


@dataclass(frozen=True)
class ImageResult:
    """Pictures and how they were made; all lists run in step.

    Attributes:
        images: 8-bit RGB pictures, grouped by prompt, with ``best_of`` the best first.
        seeds: Seed of each picture; passing it alone draws that picture again.
        prompts: What the user wrote for each picture; empty if nothing.
        scores: With ``best_of``, similarity of each picture to its prompt, −1…1; else ``None``.
        task: Task name.
        model: Name of the model.
        settings: Sampler settings in force, JSON-serialisable.
        revised_prompts: With ``rewrite``, what each picture was drawn from instead of its prompt; else ``None``.
    """

    images: list[Image.Image]
    seeds: list[int]
    prompts: list[str]
    task: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    scores: list[float] | None = None
    revised_prompts: list[str] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def metadata(self) -> list[dict[str, Any]]:
        """One JSON-serialisable description for each picture, as stored in saved files."""
        entries: list[dict[str, Any]] = []
        for index, (prompt, seed) in enumerate(zip(self.prompts, self.seeds, strict=True)):
            entry = {"task": self.task, "prompt": prompt, "seed": seed, "model": self.model, "settings": self.settings}
            if self.scores is not None:
                entry["score"] = round(self.scores[index], 6)
            if self.revised_prompts is not None:
                entry["revised_prompt"] = self.revised_prompts[index]
            entries.append(entry)
        return entries

    def save(self, path: str | Path | Sequence[str | Path]) -> list[Path]:
        """Write the pictures with their metadata inside.

        Args:
            path: A file name (several pictures get ``-1``, ``-2``, … before the ending), or one name for each picture.

        Returns:
            The paths written.

        Raises:
            InputError: The number of names or the ending of one is wrong.
            StorageError: A picture can't be written; it is then not left half-written.
        """
        if isinstance(path, (str, Path)):
            base = Path(path)
            numbers = range(1, len(self.images) + 1)
            paths = [base] if len(self.images) == 1 else [base.with_stem(f"{base.stem}-{i}") for i in numbers]
        else:
            paths = [Path(name) for name in path]
        if len(paths) != len(self.images):
            raise InputError(
                f"{len(paths)} file names for {len(self.images)} pictures; give as many, or one to be numbered"
            )
        entries = zip(self.images, paths, self.metadata(), strict=True)
        return [save_image(image, name, metadata) for image, name, metadata in entries]


@dataclass(frozen=True)
class TextResult:
    """Texts and how they were made; all lists run in step.

    Attributes:
        texts: One for each input.
        seeds: Seed of each text; matters when sampling (temperature above 0, or ancestral decoding).
        prompts: What the user wrote for each (question, text with gaps); empty if nothing.
        task: Task name.
        model: Name of the model.
        settings: Decoder settings in force, JSON-serialisable.
    """

    texts: list[str]
    seeds: list[int]
    prompts: list[str]
    task: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.texts)
