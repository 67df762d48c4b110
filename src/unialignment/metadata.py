"""Saving pictures together with how they were made, and reading that back.

A PNG carries one iTXt chunk ``unialignment`` with JSON (prompt, seed, model, settings) and the plain chunks
``Description`` and ``Software`` that picture viewers show; JPEG and WebP carry the same JSON in the EXIF field
ImageDescription. Knows nothing of how pictures are made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from unialignment.errors import InputError
from unialignment.storage import atomic_file

KEY = "unialignment"
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def save_image(image: Image.Image, path: str | Path, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write one picture atomically, with its metadata inside.

    Args:
        image: RGB picture.
        path: Destination ending in .png, .jpg, .jpeg or .webp; parent folders are created.
        metadata: JSON-serialisable facts, by convention ``prompt``, ``seed``, ``model``, ``task``, ``settings``.

    Returns:
        The path written.

    Raises:
        InputError: The ending names another format.
        StorageError: It can't be written, e.g. because the disk is full; then nothing is left behind.
    """
    path = Path(path)
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"can't save a picture as {path.name!r}: use a name ending in {', '.join(_FORMATS)}")
    options: dict[str, Any] = {}
    if metadata is not None:
        if kind == "PNG":
            options["pnginfo"] = _png_info(metadata)
        else:
            exif = Image.Exif()
            exif[ExifTags.Base.ImageDescription] = json.dumps({KEY: dict(metadata)})
            options["exif"] = exif.tobytes()
    if kind != "PNG":
        options["quality"] = 95
    with atomic_file(path) as file:
        image.save(file, format=kind, **options)
    return path


def _png_info(metadata: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, json.dumps(dict(metadata), ensure_ascii=False))
    info.add_text("Software", "UniAlignment")
    prompt = metadata.get("prompt")
    if isinstance(prompt, str) and prompt:
        info.add_itxt("Description", prompt)
    return info


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """Read what :func:`save_image` stored.

    Args:
        path: A PNG, JPEG or WebP file.

    Returns:
        The metadata, or ``None`` when the picture carries none of ours.

    Raises:
        InputError: The file is missing or not a picture.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            if image.format == "PNG":
                text = getattr(image, "text", {}).get(KEY)
                data = {KEY: json.loads(text)} if text else None
            else:
                description = image.getexif().get(ExifTags.Base.ImageDescription)
                data = json.loads(description) if description else None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise InputError(
            f"could not read the metadata of {path}: missing, or not a PNG, JPEG or WebP picture"
        ) from error
    except ValueError:
        return None  # some other program's text
    found = data.get(KEY) if isinstance(data, dict) else None
    return dict(found) if isinstance(found, dict) else None
