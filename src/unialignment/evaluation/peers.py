"""Pipelines of diffusers as contestants, by folder or hub id. Knows nothing of benchmarks but their items."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from PIL import Image

from unialignment.errors import CheckpointError, InputError
from unialignment.evaluation.benchmarks import Item
from unialignment.evaluation.records import digest
from unialignment.images import load_image
from unialignment.model.folders import file_checksum


class DiffusersModel:
    """Any pipeline that ``DiffusionPipeline`` loads: from text alone, and for editing those that take ``image``.

    Args:
        name: Folder, or hub id (downloaded, since it is asked for by name). Weights are read as safetensors only.
        device: Where to compute; the best there is unless given.
        options: Arguments of every call, e.g. ``num_inference_steps``.

    Raises:
        CheckpointError: It can't be loaded.
    """

    def __init__(self, name: str, device: str | None = None, options: dict[str, Any] | None = None) -> None:
        import torch
        from diffusers import DiffusionPipeline

        self.name, self.options = name, options or {}
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        try:
            folder = Path(name) if Path(name).is_dir() else Path(DiffusionPipeline.download(name))
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
            # Components saved as absent (SD3 without T5) have to be passed as such, or diffusers misses them.
            absent = {key: None for key, value in index.items() if value == [None, None]}
            self.pipe: Any = DiffusionPipeline.from_pretrained(
                folder, torch_dtype=dtype, use_safetensors=True, **absent
            )
        except Exception as error:  # diffusers, the hub's client and safetensors each raise their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"can't load {name!r} with diffusers ({reason[:200]}); expected a folder of a pipeline with "
                "safetensors weights, or the hub id of one"
            ) from error
        self.pipe.to(device)
        self.pipe.set_progress_bar_config(disable=True)
        files = sorted(
            path for path in folder.rglob("*") if path.suffix in {".json", ".safetensors"} and path.is_file()
        )
        # A snapshot of the hub is named after its commit; hashing gigabytes would say no more.
        known = folder.name if not Path(name).is_dir() else ""
        self.fingerprint = (
            known or digest(*(f"{path.relative_to(folder)}:{file_checksum(path)}" for path in files))[:16]
        )
        self._takes = set(inspect.signature(self.pipe.__call__).parameters)

    def identity(self) -> dict[str, Any]:
        """See :class:`~unialignment.evaluation.harness.Model`."""
        kind = type(self.pipe).__name__
        return {"kind": "diffusers", "class": kind, "fingerprint": self.fingerprint, "settings": self.options}

    def draw(self, item: Item, seed: int) -> tuple[Image.Image, dict[str, Any]]:
        """See :class:`~unialignment.evaluation.harness.Model`.

        Raises:
            InputError: The pipeline can't do such items.
        """
        import torch

        edit = item.kind == "edit"
        if edit and "image" not in self._takes:
            raise InputError(f"{type(self.pipe).__name__} takes no image, so it can't edit")
        picture = load_image(item.photo) if edit and item.photo is not None else None
        for text in item.turns:
            given: dict[str, Any] = {"image": picture} if picture is not None and edit else {}
            generator = torch.Generator("cpu").manual_seed(seed)
            output = self.pipe(prompt=text, generator=generator, **given, **self.options)
            picture = output.images[0].convert("RGB")
        assert picture is not None
        return picture, {}
