"""Training checkpoints that are either complete or absent.

A checkpoint is a folder ``step-00001234`` with ``tensors.safetensors``, ``state.json`` and ``manifest.json``
(sizes and sha256 of the others). It is written beside its final place, synced to disk and renamed; only then does
the ``latest`` pointer move. So a crash, a kill or a full disk leaves the previous checkpoint untouched and in
force. No pickle is involved. Knows nothing of what the tensors mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from unialignment.errors import CheckpointError, StorageError

PREFIX = "step-"
LATEST = "latest"


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file and force it to disk. Separate so that tests can make it fail."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace one file by new content, completely or not at all.

    Raises:
        StorageError: it could not be written (disk full, no permission); the old content is still there.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(temporary, data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"Could not write {path}: {error.strerror or error}. The previous version is unchanged.") from error


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: Folder for this run's checkpoints; created on the first save.
        keep: How many of the newest to keep.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = max(1, keep)

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
        final = self.folder / f"{PREFIX}{step:08d}"
        partial = self.folder / f".partial-{PREFIX}{step:08d}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_partials()
            partial.mkdir()
            files = {
                "tensors.safetensors": save({k: v.detach().cpu().contiguous() for k, v in _unshare(tensors).items()}),
                "state.json": json.dumps({"step": step, **state}).encode(),
            }
            manifest = {n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()}
            for name, data in files.items():
                write_bytes(partial / name, data)
            write_bytes(partial / "manifest.json", json.dumps(manifest, indent=1).encode())
            _sync_folder(partial)
            if final.exists():
                shutil.rmtree(final)
            os.rename(partial, final)
            _sync_folder(self.folder)
            write_atomic(self.folder / LATEST, final.name.encode())
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, StorageError):
                raise
            raise StorageError(
                f"Could not save the checkpoint of step {step} in {self.folder}: {error.strerror or error}. "
                "Nothing was left half-written and earlier checkpoints are intact; free some space and resume."
            ) from error
        self._prune()
        return final

    def latest(self) -> Path | None:
        """Folder of the newest complete checkpoint, or ``None``. Falls back to older ones if one is damaged."""
        for candidate in self._candidates():
            if self._intact(candidate):
                return candidate
        return None

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
        state = json.loads((folder / "state.json").read_text())
        return load_file(folder / "tensors.safetensors"), state

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
            manifest = json.loads((folder / "manifest.json").read_text())
            for name, facts in manifest.items():
                if (folder / name).stat().st_size != facts["bytes"]:
                    return False
                with (folder / name).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                        return False
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return {"tensors.safetensors", "state.json"} <= set(manifest)

    def _remove_partials(self) -> None:
        for path in self.folder.glob(f".partial-{PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _prune(self) -> None:
        for path in self._candidates()[self.keep :]:
            shutil.rmtree(path, ignore_errors=True)


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
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": plain["param_groups"]})


def random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States of the global generators of torch, numpy and python."""
    kind, keys, position, has_gauss, cached = np.random.get_state()  # type: ignore[misc]
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
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``{prefix + name: tensor}``."""
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries that start with ``prefix``, with the prefix taken off."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
