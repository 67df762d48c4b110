"""Model folders: where a model lies, what it consists of, and whether it is whole.

A folder holds ``model_index.json``, one subfolder per component and ``checksums.json``. Knows nothing of what
components compute, or of tasks.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from unialignment.errors import CheckpointError, InputError, StorageError
from unialignment.model.checkpoints import check_settings, load_component, name_list, read_json, save_component
from unialignment.model.published import (
    LoadedModel,
    LoadOptions,
    check_transformer,
    empty_transformer,
    load_t5_embedder,
    load_transformer,
)
from unialignment.storage import atomic_folder, write_json

INDEX_NAME = "model_index.json"
CHECKSUMS_NAME = "checksums.json"


def file_checksum(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: str | Path) -> None:
    """Write ``checksums.json`` with the SHA-256 of every weight, config and tokenizer file in a folder.

    Raises:
        StorageError: It can't be written.
    """
    folder = Path(folder)
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and file.parent != folder and file.suffix in (".safetensors", ".json", ".model")
    )
    write_json(folder / CHECKSUMS_NAME, {file.relative_to(folder).as_posix(): file_checksum(file) for file in files})


def verify_checksums(folder: str | Path) -> bool:
    """Compare a folder with its ``checksums.json``.

    Returns:
        ``False`` when the folder has none (a model from elsewhere), ``True`` when all files agree.

    Raises:
        CheckpointError: A file is missing or differs.
    """
    folder = Path(folder)
    if not (folder / CHECKSUMS_NAME).is_file():
        return False
    checksums = read_json(folder / CHECKSUMS_NAME)
    missing = [name for name in checksums if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} is incomplete: {len(missing)} files missing ({name_list(missing)}); get it again"
        )
    changed = [name for name, digest in checksums.items() if file_checksum(folder / name) != digest]
    if changed:
        raise CheckpointError(f"{folder} is damaged: {name_list(changed)} differ from {CHECKSUMS_NAME}; get it again")
    return True


def save_folder(
    components: Mapping[str, Any],
    folder: str | Path,
    *,
    index: Mapping[str, Any],
    dtypes: Mapping[str, str] | None = None,
) -> None:
    """Write a model folder (``model_index.json`` and one subfolder per component) atomically, with checksums.

    An existing model folder is replaced as a whole, its card included: a card of other weights would be wrong.

    Args:
        components: Component name → object; ``None`` is left out.
        folder: Destination.
        index: Further entries of ``model_index.json``.
        dtypes: Component name → dtype on disk; ``"float32"`` unless given.

    Raises:
        StorageError: It can't be written; what was there before is still there.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / INDEX_NAME).is_file():
        raise StorageError(f"could not write {folder}: the folder isn't empty and isn't a model; choose another one")
    classes = {
        name: [type(component).__module__.split(".")[0], type(component).__name__]
        for name, component in components.items()
        if component is not None
    }
    with atomic_folder(folder) as temporary:
        for name, component in components.items():
            if component is not None:
                save_component(component, temporary / name, (dtypes or {}).get(name, "float32"))
        write_json(temporary / INDEX_NAME, {**index, **classes})
        write_checksums(temporary)


def packaged_models() -> list[str]:
    """Names of the models that are part of the package."""
    weights = resources.files("unialignment") / "weights"
    if not weights.is_dir():
        return []
    return sorted(entry.name for entry in weights.iterdir() if (entry / INDEX_NAME).is_file())


_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


def resolve_model(name: str | Path, revision: str | None = None) -> Path:
    """Find a model's folder on disk.

    Args:
        name: Name of a packaged model (``"nano"``), a path, or a hub id (``"owner/name"``), which is downloaded once
            (safetensors, configs, tokenizer and the published mask embedding only).
        revision: Branch, tag or commit of a hub id.

    Returns:
        A folder.

    Raises:
        CheckpointError: There is no such model, or it can't be downloaded.
    """
    text = str(name).strip()
    if not text or "\0" in text:
        raise CheckpointError("expected the name or path of a model, got an empty or invalid one")
    packaged = packaged_models()
    if text in packaged:
        return Path(str(resources.files("unialignment") / "weights" / text))
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{text} is a file; give the folder that holds {INDEX_NAME}")
    known = f"known names: {', '.join(packaged) or 'none is packaged'}"
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or not _HUB_ID.match(text):
        raise CheckpointError(
            f"no model {text!r}: not a folder, nor a packaged model ({known}), nor a hub id owner/name"
        )
    return _download(text, revision, known, _PIPELINE)


def fetch_snapshot(name: str | Path, subfolder: str | None = None, revision: str | None = None, **options: Any) -> Path:
    """Download a repository of the hub, or one folder of it: safetensors, configs and tokenizers only.

    Args:
        name: Hub id, ``"owner/name"``.
        subfolder: Only this folder of it.
        revision: Branch, tag or commit.
        options: ``huggingface_hub.snapshot_download``'s (``cache_dir``, ``token``, ``local_files_only``, …).

    Returns:
        The snapshot's folder (not the subfolder).

    Raises:
        CheckpointError: It is no hub id, or can't be downloaded.
    """
    text = str(name)
    if isinstance(name, Path) or not _HUB_ID.match(text):
        raise CheckpointError(f"no folder {text!r}, and it is no hub id (owner/name) either; check the path")
    patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in _ANYWHERE]
    return _download(text, revision, "or a packaged model's name", patterns, **options)


_PATTERNS = ("*.json", "*.model", "*.txt", "*.md", "*mask_token_emb*.pth")
_WEIGHT_FOLDERS = (
    *("transformer", "text_embedder", "autoencoder", "tokenizer", "published"),
    *("vae", "text_encoder", "text_encoder_3", "tokenizer_3"),
)
"""Where a pipeline's weights are. Repositories of Stable Diffusion 3 have them a second time, in single files beside
these folders, for other programs."""
_ANYWHERE = (*_PATTERNS, "*.safetensors")
_PIPELINE = (*_PATTERNS, *(f"{folder}/*.safetensors" for folder in _WEIGHT_FOLDERS))


def _download(hub_id: str, revision: str | None, known: str, patterns: Iterable[str], **options: Any) -> Path:
    try:
        import huggingface_hub

        return Path(
            huggingface_hub.snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=["*.fp16*"],  # a second copy of the same weights
                **options,
            )
        )
    except Exception as error:  # the hub client raises its own, requests' or httpx' errors, by version
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"no folder {hub_id!r} here, and downloading it from the hub failed ({reason[:160]}); "
            f"check the name and the network, or give a path ({known})"
        ) from error


COMPONENTS = {
    "UniAlignmentTransformer": "unialignment.model.transformer",
    "TokenEmbedder": "unialignment.model.text",
    "T5TextEmbedder": "unialignment.model.text",
    "PixelAutoencoder": "unialignment.model.autoencoder",
    "WorldAutoencoder": "unialignment.model.autoencoder",
    "KLAutoencoder": "unialignment.model.autoencoder",
    "TextTokenizer": "unialignment.model.tokenizer",
}
"""Classes that ``model_index.json`` may name; nothing else is ever imported on a file's word."""


def load_folder(
    folder: str | Path, names: Iterable[str], verify: bool = True, options: LoadOptions | None = None
) -> LoadedModel:
    """Read a model folder.

    Args:
        folder: Written by :func:`save_folder`.
        names: Components that must be there.
        verify: Compare the files with their checksums first, if there are any.
        options: How large components are loaded; in float32 unless given.

    Returns:
        The components in evaluation mode, and the contents of ``model_index.json``.

    Raises:
        CheckpointError: Something is missing, damaged, of another version, or of a class that is not ours.
    """
    folder, chosen = Path(folder), options or LoadOptions()
    index = read_json(folder / INDEX_NAME)
    if verify:
        verify_checksums(folder)
    loaders: dict[str, Callable[[], Any]] = {}
    for name in names:
        entry = index.get(name)
        if not (isinstance(entry, list) and len(entry) == 2 and entry[1] in COMPONENTS):
            raise CheckpointError(
                f"{folder / INDEX_NAME} names no usable {name} (got {entry!r}); expected one of {', '.join(COMPONENTS)}"
            )
        loaders[name] = _loader(name, entry[1], folder / name, chosen)
    components = {name: load() for name, load in loaders.items() if not (chosen.lazy and name == "transformer")}
    if chosen.lazy and "transformer" in loaders:
        components["transformer"] = empty_transformer(check_transformer(folder / "transformer"), folder).eval()
    return LoadedModel(components, index, loaders=loaders)


def _loader(name: str, class_name: str, folder: Path, options: LoadOptions) -> Callable[[], Any]:
    """What loads one component; large ones straight into their type."""

    def load() -> Any:
        quantization = options.quantization(name)
        if class_name == "T5TextEmbedder":
            return load_t5_embedder(folder, options.dtype, quantization)
        cls = getattr(importlib.import_module(COMPONENTS[class_name]), class_name)
        if class_name != "UniAlignmentTransformer" or (options.dtype == torch.float32 and quantization is None):
            if quantization is not None:
                raise InputError(f"quantize: {name} is a {class_name}, too small to gain from it; leave it out")
            return load_component(cls, folder)
        check_settings(cls, folder)
        return load_transformer(folder, options.dtype, quantization)

    return load
