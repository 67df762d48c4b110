"""The sprite pack: one checksummed file of object pictures, decoded lazily.

Reads and writes the file format and scales sprites to the size asked for. Doesn't know where artwork comes from
(:mod:`unialignment.world.assets`) or how scenes are put together.

Format: an uncompressed zip archive of ``manifest.json`` and ``sprites.bin``, the latter being the concatenated
lossless WebP pictures that the manifest's index points into.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image

from unialignment.errors import AssetError, InputError, StorageError
from unialignment.world.classes import table_digest

FORMAT = "unialignment-sprite-pack"
FORMAT_VERSION = 1
MASTER_PX = 128
"""Side, in pixels, of the stored pictures."""

SCALED_BYTES = 64 << 20
"""Memory that a pack may hold scaled sprites in; every sprite of the nano preset takes 1 MB, of the full one 300."""

Key = TypeVar("Key")

BUILD_HINT = "run `unialign world build` to (re)build it"


def cache_dir() -> Path:
    """The user's cache folder for this package: ``$XDG_CACHE_HOME/unialignment`` or ``~/.cache/unialignment``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "unialignment"


def default_pack_path() -> Path:
    """Where the sprite pack lives unless a path is given."""
    return cache_dir() / f"sprites-v{FORMAT_VERSION}.pack"


def area_weights(source: int, target: int) -> np.ndarray:
    """Weights of exact area averaging, float32 ``[target, source]``; each row sums to one."""
    edges = np.arange(target + 1) * (source / target)
    pixel = np.arange(source)
    low = np.maximum(edges[:-1, None], pixel[None])
    high = np.minimum(edges[1:, None], pixel[None] + 1)
    overlap = np.clip(high - low, 0, None)
    return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)


class ArrayCache(Generic[Key]):
    """Arrays by key within a budget of memory; the oldest leave first.

    Args:
        limit: Most bytes to hold.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._arrays: dict[Key, tuple[np.ndarray, ...]] = {}
        self.get = self._arrays.get

    def put(self, key: Key, *arrays: np.ndarray) -> None:
        """Keep arrays under a new key."""
        self._arrays[key] = arrays
        self._held += sum(array.nbytes for array in arrays)
        while self._held > self._limit and len(self._arrays) > 1:
            oldest = self._arrays.pop(next(iter(self._arrays)))
            self._held -= sum(array.nbytes for array in oldest)


class SpritePack:
    """Pictures of every class in every style.

    Use :meth:`load`; the constructor takes the parts of an already verified file.

    Attributes:
        names: Class names, sorted, lower case (``"dog"``, ``"green apple"``).
        styles: Style ids, e.g. ``("noto", "fluent", "twemoji", "openmoji")``.
        manifest: Everything recorded at build time: versions, licences, checksums.
        path: The file it came from, or ``None``.
    """

    def __init__(self, manifest: Mapping[str, Any], sprites: bytes, path: Path | None = None) -> None:
        self.manifest = dict(manifest)
        self.path = path
        self.names: tuple[str, ...] = tuple(manifest["names"])
        self.styles: tuple[str, ...] = tuple(manifest["styles"])
        self._index: dict[str, list[list[int]]] = manifest["index"]
        self._position = {name: index for index, name in enumerate(self.names)}
        self._sprites = sprites
        self._scaled = ArrayCache[tuple[str, str, int]](SCALED_BYTES)
        self._weights: dict[int, np.ndarray] = {}

    @property
    def licenses(self) -> dict[str, str]:
        """SPDX licence id of each style's artwork."""
        return {style: self.manifest["artwork"][style]["license"] for style in self.styles}

    @property
    def digest(self) -> str:
        """sha256 (hex) of the pictures; two packs with the same digest draw the same scenes."""
        return str(self.manifest["sprites_sha256"])

    def master(self, name: str, style: str) -> np.ndarray:
        """The stored picture, uint8 ``[MASTER_PX, MASTER_PX, 4]``, straight (not premultiplied) alpha.

        Raises:
            InputError: the class or style isn't in the pack.
        """
        if name not in self._position:
            raise InputError(f"unknown class {name!r}: the sprite pack has {len(self.names)} classes, see `pack.names`")
        if style not in self._index:
            raise InputError(f"unknown style {style!r}: the sprite pack has {', '.join(self.styles)}")
        start, length = self._index[style][self._position[name]]
        with Image.open(io.BytesIO(self._sprites[start : start + length])) as image:
            return np.asarray(image.convert("RGBA"))

    def rgba(self, name: str, style: str, px: int) -> np.ndarray:
        """A sprite scaled by area averaging.

        Args:
            name: Class name.
            style: Style id.
            px: Side in pixels, at least 1.

        Returns:
            Read-only float32 ``[px, px, 4]``, 0-1, colour premultiplied by alpha. Kept for the next call, within
            ``SCALED_BYTES`` in all.

        Raises:
            InputError: the class or style isn't in the pack, or ``px`` is less than 1.
        """
        key = (name, style, px)
        found = self._scaled.get(key)
        if found is not None:
            return found[0]
        if px < 1:
            raise InputError(f"sprite size {px} px: expected at least 1")
        premultiplied = self.master(name, style).astype(np.float32)
        premultiplied *= np.float32(1 / 255)
        premultiplied[..., :3] *= premultiplied[..., 3:]
        if px != MASTER_PX:
            weights = self._weights.get(px)
            if weights is None:
                weights = self._weights[px] = area_weights(MASTER_PX, px)
            rows = (weights @ premultiplied.reshape(MASTER_PX, -1)).reshape(px, MASTER_PX, 4)
            premultiplied = weights @ rows
        result = np.ascontiguousarray(np.clip(premultiplied, 0, 1), dtype=np.float32)
        result.flags.writeable = False
        self._scaled.put(key, result)
        return result

    @classmethod
    def load(cls, path: Path | str | None = None) -> SpritePack:
        """Open and verify a pack.

        Args:
            path: The file; the user's cache by default.

        Raises:
            AssetError: the file is absent, damaged, of another format version, or made for another list of classes.
        """
        path = Path(path) if path is not None else default_pack_path()
        if not path.is_file():
            raise AssetError(f"no sprite pack at {path}: run `unialign world build` to make one")
        try:
            with zipfile.ZipFile(path) as archive:
                manifest = json.loads(archive.read("manifest.json"))
                sprites = archive.read("sprites.bin")
            found = (manifest["format"], manifest["format_version"])
            expected_digest, classes_digest = manifest["sprites_sha256"], manifest["classes_sha256"]
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError, TypeError, NotImplementedError) as error:
            raise AssetError(f"sprite pack {path} is damaged ({error}): {BUILD_HINT}") from error
        except OSError as error:
            raise AssetError(f"can't read the sprite pack {path} ({error.strerror or error}): {BUILD_HINT}") from error
        if found != (FORMAT, FORMAT_VERSION):
            raise AssetError(
                f"sprite pack {path} has format {found[0]!r} version {found[1]!r}, "
                f"expected {FORMAT!r} version {FORMAT_VERSION}: {BUILD_HINT}"
            )
        if hashlib.sha256(sprites).hexdigest() != expected_digest:
            raise AssetError(f"sprite pack {path} is damaged (checksum of the pictures differs): {BUILD_HINT}")
        if classes_digest != table_digest():
            raise AssetError(f"sprite pack {path} is stale (made for another list of classes): {BUILD_HINT}")
        return cls(manifest, sprites, path)


def write_pack(
    path: Path,
    pictures: Mapping[str, Mapping[str, bytes]],
    artwork: Mapping[str, Mapping[str, str]],
    provenance: Mapping[str, Any],
) -> None:
    """Write a pack atomically: it is complete or not there.

    Args:
        path: Destination file; its folder is created.
        pictures: Lossless WebP bytes by style, then class name; every style has the same classes.
        artwork: By style, at least ``license``, ``source`` and ``version``.
        provenance: Further facts for the manifest.

    Raises:
        StorageError: the file can't be written.
    """
    styles = list(pictures)
    names = sorted(pictures[styles[0]])
    index: dict[str, list[list[int]]] = {}
    blob = bytearray()
    for style in styles:
        index[style] = []
        for name in names:
            picture = pictures[style][name]
            index[style].append([len(blob), len(picture)])
            blob += picture
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "master_px": MASTER_PX,
        "names": names,
        "styles": styles,
        "artwork": {style: dict(artwork[style]) for style in styles},
        "classes_sha256": table_digest(),
        "sprites_sha256": hashlib.sha256(blob).hexdigest(),
        **provenance,
        "index": index,
    }
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as stream:
            with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
                # A fixed date keeps the file identical from build to build.
                for member, data in (("manifest.json", json.dumps(manifest, indent=1)), ("sprites.bin", bytes(blob))):
                    archive.writestr(zipfile.ZipInfo(member, (1980, 1, 1, 0, 0, 0)), data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(
            f"can't write the sprite pack to {path} ({error.strerror or error}): "
            "free some space or give another destination"
        ) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
