"""Which layout a model folder has, and how it is loaded: ours, the published one, or Stable Diffusion 3's.

Knows nothing of what components compute.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from unialignment.errors import CheckpointError
from unialignment.model.checkpoints import read_json
from unialignment.model.folders import INDEX_NAME, load_folder, verify_checksums
from unialignment.model.initialise import SD3_CLASS, load_sd3
from unialignment.model.published import (
    PUBLISHED_CLASS,
    LoadedModel,
    LoadOptions,
    load_published,
    load_t5_tokenizer,
    transformer_settings,
)
from unialignment.model.tokenizer import TextTokenizer

Layout = Literal["unialignment", "published", "sd3"]
_LAYOUTS: dict[str, Layout] = {
    "UniAlignmentTransformer": "unialignment",
    PUBLISHED_CLASS: "published",
    SD3_CLASS: "sd3",
}


def folder_layout(folder: str | Path) -> Layout:
    """The layout of a model folder, by the class of transformer that ``model_index.json`` names.

    Without an index the transformer's own config is asked.

    Raises:
        CheckpointError: There is neither, or the class isn't known.
    """
    folder = Path(folder)
    path, config = folder / INDEX_NAME, folder / "transformer" / "config.json"
    alone = _transformer_alone(folder)
    if alone is not None:
        raise CheckpointError(
            f"{alone} is a transformer alone, and a model has a text encoder, tokenizer and autoencoder beside it; "
            f"give the folder that holds them all, or use UniAlignmentTransformer.from_pretrained({str(alone)!r})"
        )
    if not path.is_file() and config.is_file():
        path = config
    entry = read_json(path).get("transformer" if path.name == INDEX_NAME else "_class_name")
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
    if name not in _LAYOUTS:
        raise CheckpointError(f"{path} names no usable transformer (got {entry!r}); expected {' or '.join(_LAYOUTS)}")
    return _LAYOUTS[name]


def _transformer_alone(folder: Path) -> Path | None:
    """The transformer's folder, if that is all that a folder is or holds."""
    if (folder / INDEX_NAME).is_file():
        return None
    if (folder / "config.json").is_file() and read_json(folder / "config.json").get("_class_name") in _LAYOUTS:
        return folder
    others = ("vae", "autoencoder", "tokenizer", "tokenizer_3")
    inside = folder / "transformer"
    return inside if (inside / "config.json").is_file() and not any((folder / n).is_dir() for n in others) else None


def load_model_tokenizer(folder: str | Path) -> TextTokenizer:
    """The tokenizer of a model folder of any layout, as :func:`load_model` would give it.

    Raises:
        CheckpointError: It is missing or damaged, or the folder's layout isn't known.
    """
    folder = Path(folder)
    layout = folder_layout(folder)
    if layout == "unialignment":
        return TextTokenizer.from_pretrained(folder / "tokenizer")
    if layout == "sd3":
        return load_t5_tokenizer(folder / "tokenizer_3")
    return load_t5_tokenizer(folder / "tokenizer", transformer_settings(folder / "transformer").get("vocab_size"))


def load_model(folder: str | Path, names: Iterable[str], options: LoadOptions | None = None) -> LoadedModel:
    """Load a model folder of any layout.

    Args:
        folder: On disk.
        names: Components that a folder of ours must have.
        options: How large components are loaded, which are then never in memory in another type; in float32 unless
            given.

    Raises:
        CheckpointError: Something is missing, damaged, unsafe or of a class that isn't known; nothing is returned.
        InputError: The options can't be had here.
    """
    folder = Path(folder)
    layout = folder_layout(folder)
    if layout == "unialignment":
        return load_folder(folder, names, options=options)
    verify_checksums(folder)
    return load_published(folder, options) if layout == "published" else load_sd3(folder, options)
