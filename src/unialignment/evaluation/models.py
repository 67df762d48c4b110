"""Models as a benchmark sees them: this package's own, the photographs themselves, or a class of the user's.

Knows nothing of judges. A model of one's own is a class with ``identity()`` and ``draw(item, seed)``, named as
``python:module:Class``.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from unialignment.errors import InputError
from unialignment.evaluation.benchmarks import Item
from unialignment.evaluation.contestants import readable
from unialignment.evaluation.harness import Model
from unialignment.evaluation.records import digest
from unialignment.images import load_image
from unialignment.model.folders import file_checksum, resolve_model


class PipelineModel:
    """A model of this package.

    Prompts that it can't read whole are shortened to their first words; the record then says so, and what was read.

    Args:
        name: Packaged name, folder or hub id.
        device: Where to compute.
        options: Sampler settings.
    """

    def __init__(self, name: str, device: str | None = None, options: dict[str, Any] | None = None) -> None:
        import unialignment

        self.name, self.options = name, options or {}
        folder = resolve_model(name)
        files = sorted(path for path in folder.rglob("*") if path.suffix in {".json", ".safetensors"})
        parts = [f"{path.relative_to(folder)}:{file_checksum(path)}" for path in files]
        self.fingerprint = digest(*parts)[:16]
        self.pipe = unialignment.load(name, device=device)

    def identity(self) -> dict[str, Any]:
        """See :class:`~unialignment.evaluation.harness.Model`."""
        from unialignment.model.autoencoder import WorldAutoencoder

        world = "scenes" if isinstance(self.pipe.autoencoder, WorldAutoencoder) else "open"
        return {"kind": "unialignment", "fingerprint": self.fingerprint, "settings": self.options, "world": world}

    def draw(self, item: Item, seed: int) -> tuple[Image.Image, dict[str, Any]]:
        """See :class:`~unialignment.evaluation.harness.Model`."""
        picture = load_image(item.photo)
        read = [readable(self.pipe, turn) for turn in item.turns]
        for text in read:
            task = "edit" if item.kind == "edit" else "generate"
            images = picture if item.kind == "edit" else None
            result: Any = self.pipe.run(task, text, images, seed=seed, progress=False, **self.options)
            picture = result.images[0]
        shortened = list(read) != list(item.turns)
        return picture, {"shortened": True, "read": read} if shortened else {}


class Photograph:
    """The item's own photograph: near the ceiling of text-to-image groups, the floor of editing (nothing was done)."""

    def identity(self) -> dict[str, Any]:
        """See :class:`~unialignment.evaluation.harness.Model`."""
        return {"kind": "photograph"}

    def draw(self, item: Item, seed: int) -> tuple[Image.Image, dict[str, Any]]:
        """See :class:`~unialignment.evaluation.harness.Model`."""
        return load_image(item.photo), {}


def build(name: str, device: str | None = None, options: dict[str, Any] | None = None) -> Model:
    """The model that a name stands for: ``photograph``, ``python:module:Class``, or a model of this package.

    Raises:
        InputError: The class can't be imported or made.
    """
    if name == "photograph":
        return Photograph()
    if name.startswith("python:"):
        module, _, attribute = name.removeprefix("python:").partition(":")
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            made: Model = getattr(importlib.import_module(module), attribute)()
            return made
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise InputError(f"can't make the model {name!r}: {error}; expected python:module:Class") from error
    return PipelineModel(name, device, options)
