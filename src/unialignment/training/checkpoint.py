"""Training checkpoints that are either complete or absent.

A checkpoint is a folder ``step-00001234`` with ``tensors.safetensors``, ``state.json`` and ``manifest.json``
(sizes and sha256 of the others). It is written beside its final place, flushed to disk and renamed; only then does
the ``latest`` pointer move. So a crash, a kill or a full disk leaves the previous checkpoint untouched and in
force. No pickle is involved, except in sharded ones (:mod:`unialignment.training.sharded`). Knows nothing of what
the tensors mean.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unialignment.errors import CheckpointError, StorageError
from unialignment.model.folders import file_checksum
from unialignment.storage import atomic_folder, storage_error, write_json, write_text

PREFIX = "step-"
LATEST = "latest"
BEST = "best.json"
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
SHARDS = "shards"
"""Folder of ``torch.distributed.checkpoint``, instead of ``TENSORS``, where every process writes its own part."""


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file and force it to disk. Separate so that tests can make it fail.

    Raises:
        StorageError: it could not be written.
    """
    try:
        save_file(tensors, path)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        raise storage_error(path, error) from error


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: Folder for this run's checkpoints; created on the first save.
        keep: How many of the newest to keep.
        keep_best: How many of those with the best validations to keep besides.
    """

    def __init__(self, folder: Path, keep: int = 2, keep_best: int = 0) -> None:
        self.folder = folder
        self.keep = max(1, keep)
        self.keep_best = keep_best

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Write a checkpoint and make it the latest.

        Args:
            step: Optimizer steps done; names the folder.
            tensors: Everything with a shape, by unique name.
            state: Everything else; JSON-serialisable.

        Returns:
            The checkpoint's folder.

        Raises:
            StorageError: it could not be written; earlier checkpoints are intact and still the latest.
        """
        final = self.place(step)
        self.remove_partials()
        try:
            with atomic_folder(final) as partial:
                own = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
                write_tensors(partial / TENSORS, _unshare(own))
                write_json(partial / STATE, {"step": step, **state})
                files = {name: partial / name for name in (TENSORS, STATE)}
                manifest = {n: {"bytes": f.stat().st_size, "sha256": file_checksum(f)} for n, f in files.items()}
                write_json(partial / MANIFEST, manifest)
            self.announce(step)
        except StorageError as error:
            raise self.failed(step, error) from error
        return final

    def place(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / f"{PREFIX}{step:08d}"

    def announce(self, step: int) -> None:
        """Make the checkpoint of a step the latest and remove those that are no longer kept.

        Raises:
            StorageError: the pointer could not be written.
        """
        write_text(self.folder / LATEST, self.place(step).name)
        self._prune()

    def failed(self, step: int, reason: object) -> StorageError:
        """The error to raise when a checkpoint could not be written."""
        return StorageError(
            f"Could not save the checkpoint of step {step}: {reason}. Earlier checkpoints in {self.folder} are "
            "intact; free some space and resume."
        )

    def best(self) -> list[dict[str, float]]:
        """``step`` and ``score`` of the best checkpoints that are kept, best first."""
        try:
            found = json.loads((self.folder / BEST).read_text())
        except (OSError, ValueError):
            return []
        return [entry for entry in found if self.place(int(entry["step"])).is_dir()]

    def is_better(self, score: float) -> bool:
        """Whether a validation score (lower is better) is among the best that are kept."""
        known = self.best()
        return self.keep_best > 0 and (len(known) < self.keep_best or score < known[-1]["score"])

    def mark_best(self, step: int, score: float) -> None:
        """Keep the checkpoint of a step, which exists, as one of the best.

        Raises:
            StorageError: the list could not be written.
        """
        entries = [entry for entry in self.best() if entry["step"] != step] + [{"step": step, "score": score}]
        write_json(self.folder / BEST, sorted(entries, key=lambda entry: entry["score"])[: self.keep_best])
        self._prune()

    def latest(self) -> Path | None:
        """Folder of the newest complete checkpoint, or ``None``. Falls back to older ones if one is damaged."""
        for candidate in self._candidates():
            if self._intact(candidate):
                return candidate
        return None

    def newest(self) -> Path | None:
        """Folder of the checkpoint that the pointer names, or of the newest; not verified, so quick to find."""
        return next((c for c in self._candidates() if (c / STATE).is_file()), None)

    def load(self, folder: Path | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and state of a checkpoint, by default of the latest.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        folder = folder or self.latest()
        if folder is None:
            raise CheckpointError(f"No usable checkpoint in {self.folder}.")
        if not self._intact(folder):
            raise CheckpointError(f"The checkpoint {folder} is incomplete or damaged (its checksums do not match).")
        return read_tensors(folder), read_state(folder)

    def clear(self) -> None:
        """Remove every checkpoint of the run."""
        for path in self._candidates():
            shutil.rmtree(path, ignore_errors=True)
        for name in (LATEST, BEST):
            (self.folder / name).unlink(missing_ok=True)

    def _candidates(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        found = sorted((p for p in self.folder.glob(f"{PREFIX}*") if p.is_dir()), reverse=True)
        pointer = self.folder / LATEST
        if pointer.is_file():
            pointed = self.folder / pointer.read_text().strip()
            if pointed in found:
                found.remove(pointed)
                found.insert(0, pointed)
        return found

    @staticmethod
    def _intact(folder: Path) -> bool:
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            for name, facts in manifest.items():
                if (folder / name).stat().st_size != facts["bytes"] or file_checksum(folder / name) != facts["sha256"]:
                    return False
        except (OSError, ValueError, KeyError, TypeError):
            return False
        names = set(manifest)
        return {TENSORS, STATE} <= names or {f"{SHARDS}/.metadata", STATE} <= names

    def remove_partials(self) -> None:
        """What a killed save left behind; its names start with a dot, so nothing ever takes it for a checkpoint."""
        for path in self.folder.glob(f".{PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _prune(self) -> None:
        spared = {self.place(int(entry["step"])) for entry in self.best()}
        for path in self._candidates()[self.keep :]:
            if path not in spared:
                shutil.rmtree(path, ignore_errors=True)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an intact checkpoint that one process wrote."""
    return load_file(folder / TENSORS)


def read_state(folder: Path) -> dict[str, Any]:
    """The plain part of an intact checkpoint."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def _unshare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that share memory with an earlier one; safetensors stores no aliases."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if pointer in seen and tensor.numel() else tensor
        seen.add(pointer)
    return result


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer state as named tensors plus plain settings; inverse of :func:`restore_optimizer`."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                plain.setdefault(str(index), {})[key] = value
    return tensors, {"state": plain, "param_groups": state["param_groups"]}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Load what :func:`flatten_optimizer` returned."""
    state: dict[int, dict[str, Any]] = {int(i): dict(entry) for i, entry in plain["state"].items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            # In the parameter's own memory layout: fused kernels walk both in storage order.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})


def random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States of the global generators of torch, numpy and python."""
    kind, keys, position, has_gauss, cached = np.random.get_state()  # type: ignore[misc]  # noqa: NPY002
    version, internal, gauss = random.getstate()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    plain = {
        "numpy": [kind, int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }
    return tensors, plain


def restore_random_states(tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Load what :func:`random_states` returned."""
    torch.set_rng_state(tensors["torch"].to(torch.uint8))
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"].to(torch.uint8))
    kind, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``{prefix + name: tensor}``."""
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries that start with ``prefix``, with the prefix taken off."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
