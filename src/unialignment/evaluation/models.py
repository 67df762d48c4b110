"""Models as a benchmark sees them: this package's own, other people's, the photographs themselves, a class of the
user's.

Knows nothing of judges. A model of one's own is a class with ``identity()`` and ``draw(item, seed)`` (for benchmarks
that ask for texts ``tell``, for maps ``chart``), named as ``python:module:Class`` or ``python:file.py:Class``.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from unialignment.errors import InputError
from unialignment.evaluation.benchmarks import Item
from unialignment.evaluation.contestants import readable
from unialignment.evaluation.records import digest
from unialignment.images import load_image
from unialignment.model.folders import file_checksum, resolve_model


def fingerprint(name: str) -> str:
    """Checksum of the files that decide what a model of this package makes.

    Raises:
        CheckpointError: There is no such model.
    """
    folder = resolve_model(name)
    files = sorted(path for path in folder.rglob("*") if path.suffix in {".json", ".safetensors"})
    return digest(*(f"{path.relative_to(folder)}:{file_checksum(path)}" for path in files))[:16]


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
        self.fingerprint = fingerprint(name)
        self.pipe = unialignment.load(name, device=device)

    def identity(self) -> dict[str, Any]:
        """See :class:`~unialignment.evaluation.harness.Model`."""
        from unialignment.model.autoencoder import WorldAutoencoder

        world = "scenes" if isinstance(self.pipe.autoencoder, WorldAutoencoder) else "open"
        return {"kind": "unialignment", "fingerprint": self.fingerprint, "settings": self.options, "world": world}

    def draw(self, item: Item, seed: int) -> tuple[Image.Image, dict[str, Any]]:
        """See :class:`~unialignment.evaluation.harness.Model`."""
        picture = None if item.photo is None else load_image(item.photo)
        read = [readable(self.pipe, turn) for turn in item.turns]
        for text in read:
            task = "edit" if item.kind == "edit" else "generate"
            images = picture if item.kind == "edit" else None
            result: Any = self.pipe.run(task, text, images, seed=seed, progress=False, **self.options)
            picture = result.images[0]
        shortened = list(read) != list(item.turns)
        assert picture is not None
        return picture, {"shortened": True, "read": read} if shortened else {}

    def tell(self, picture: Image.Image, question: str, hint: str, seed: int) -> str:
        """See :class:`~unialignment.evaluation.reading.Reader`; the hint is for models of free language."""
        options: dict[str, Any] = {"seed": seed, "progress": False}
        if not question:
            return str(self.pipe.caption(picture, **options).texts[0])
        return str(self.pipe.answer(picture, readable(self.pipe, question), **options).texts[0])

    def chart(self, picture: Image.Image, kind: str, seed: int) -> Image.Image:
        """A map of a picture, stretched to its shape."""
        options: dict[str, Any] = {"seed": seed, "progress": False, **self.options}
        found: Image.Image = self.pipe.perceive(picture.resize((self.pipe.default_size,) * 2), kind, **options).images[
            0
        ]
        return found.resize(picture.size, Image.Resampling.BILINEAR)


class Photograph:
    """The item's own photograph: near the ceiling of text-to-image groups, the floor of editing (nothing was done)."""

    def identity(self) -> dict[str, Any]:
        """See :class:`~unialignment.evaluation.harness.Model`."""
        return {"kind": "photograph"}

    def draw(self, item: Item, seed: int) -> tuple[Image.Image, dict[str, Any]]:
        """See :class:`~unialignment.evaluation.harness.Model`."""
        if item.photo is None:
            raise InputError(f"{item.id} was written about no photograph")
        return load_image(item.photo), {}


def build(name: str, device: str | None = None, options: dict[str, Any] | None = None) -> Any:
    """The model that a name stands for.

    ``photograph``; ``python:module:Class`` or ``python:file.py:Class``; ``diffusers:FOLDER-OR-HUB-ID``;
    ``openai:MODEL`` or ``openai:MODEL@http://host/v1``; or a model of this package.

    Raises:
        InputError: The class can't be imported or made.
        CheckpointError: The weights can't be loaded.
    """
    kind, _, rest = name.partition(":")
    if name == "photograph":
        return Photograph()
    if kind == "python":
        return _own(name, rest)
    if kind == "diffusers" and rest:
        from unialignment.evaluation.peers import DiffusersModel

        return DiffusersModel(rest, device, options)
    if kind == "openai" and rest:
        from unialignment.evaluation.remote import EndpointModel

        if match := re.fullmatch(r"(.+)@(https?://.+)", rest):
            return EndpointModel(match.group(1), match.group(2), options)
        return EndpointModel(rest, None, options)
    return PipelineModel(name, device, options)


def _own(name: str, rest: str) -> Any:
    module, _, attribute = rest.rpartition(":")
    try:
        if module.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module).stem, module)
            if spec is None or spec.loader is None:
                raise ImportError(f"no module in {module}")
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
        else:
            if str(Path.cwd()) not in sys.path:
                sys.path.insert(0, str(Path.cwd()))
            loaded = importlib.import_module(module)
        return getattr(loaded, attribute)()
    except (ImportError, AttributeError, ValueError, TypeError, OSError, SyntaxError) as error:
        expected = "python:module:Class or python:file.py:Class"
        raise InputError(f"can't make the model {name!r}: {error}; expected {expected}") from error
