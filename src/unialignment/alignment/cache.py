"""Teacher embeddings computed once per picture and text ever, kept on disk in half precision.

Entries are keyed by the content itself (SHA-256 of the pixels or of the text), so that order, batch and task do not
matter and a restart goes on where it stopped. The scene world is endless, and an endless stream would never hit: draw
the training scenes of an aligned run from a fixed pool (``index % pool_size``), whose embeddings then cost one pass
(about 3 ms a picture and 2 ms a text on one core, 3.3 KB each on disk). Knows nothing of training.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unialignment.alignment.teachers import Pictures, Teacher
from unialignment.errors import AssetError, StorageError

_KINDS = ("image", "text")


def image_key(image: NDArray[np.uint8] | Tensor) -> bytes:
    """SHA-256 of a picture's shape and pixels."""
    array = np.ascontiguousarray(image)
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).digest()


def text_key(text: str) -> bytes:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class TeacherCache:
    """A teacher that remembers. Gives what the teacher gives, rounded to half precision, and calls it once per entry.

    New entries stay in memory until ``flush``, which appends one memory-mapped shard per kind; the shard's keys are
    written last, so that a killed run loses at most what it had not flushed.

    Args:
        folder: Where the cache lives; made when absent.
        teacher: Whose embeddings these are. ``None`` reads an existing cache without loading any teacher; then an
            unknown picture or text is an error.
        flush_every: Write a shard after this many new entries of a kind.

    Raises:
        AssetError: The folder holds the embeddings of another teacher, or is damaged.
    """

    def __init__(self, folder: str | Path, teacher: Teacher | None = None, flush_every: int = 4096) -> None:
        self._folder = Path(folder)
        self._teacher = teacher
        self._flush_every = flush_every
        self._shards: list[NDArray[np.float16]] = []
        self._index: dict[str, dict[bytes, tuple[int, int]]] = {kind: {} for kind in _KINDS}
        self._pending: dict[str, dict[bytes, NDArray[np.float16]]] = {kind: {} for kind in _KINDS}
        self._counts = dict.fromkeys(_KINDS, 0)
        self._check_meta()
        for kind in _KINDS:
            self._read_shards(kind)

    def __len__(self) -> int:
        return sum(len(self._index[kind]) + len(self._pending[kind]) for kind in _KINDS)

    @property
    def image_dim(self) -> int:
        """Width of picture embeddings."""
        return int(self._meta["image_dim"])

    @property
    def text_dim(self) -> int:
        """Width of text embeddings."""
        return int(self._meta["text_dim"])

    @property
    def fingerprint(self) -> str:
        """The teacher's."""
        return str(self._meta["fingerprint"])

    def embed_images(self, images: Pictures) -> Tensor:
        """Pictures to ``[B, image_dim]`` float32, from the cache where known."""
        rows = [np.asarray(image) for image in images]
        embed = self._teacher.embed_images if self._teacher else None
        return self._embed("image", rows, [image_key(row) for row in rows], embed)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to ``[B, text_dim]`` float32, from the cache where known."""
        embed = self._teacher.embed_texts if self._teacher else None
        return self._embed("text", list(texts), [text_key(text) for text in texts], embed)

    def _embed(self, kind: str, items: list[Any], keys: list[bytes], embed: Callable[[Any], Tensor] | None) -> Tensor:
        index, pending = self._index[kind], self._pending[kind]
        missing = {key: item for key, item in zip(keys, items, strict=True) if key not in index and key not in pending}
        if missing:
            if embed is None:
                raise AssetError(
                    f"{len(missing)} of {len(items)} {kind}s are not in the teacher cache {self._folder}; "
                    "fill it first or open it with its teacher"
                )
            values = embed(list(missing.values())).detach().float().cpu().numpy().astype(np.float16)
            if not np.isfinite(values).all():
                raise AssetError(f"the teacher gave {kind} embeddings beyond half precision; scale them down")
            pending.update(zip(missing, values, strict=True))
        found = [self._shards[index[key][0]][index[key][1]] if key in index else pending[key] for key in keys]
        if len(pending) >= self._flush_every:
            self.flush()
        width = self.image_dim if kind == "image" else self.text_dim
        return torch.from_numpy(np.stack(found).astype(np.float32)) if found else torch.empty(0, width)

    def flush(self) -> None:
        """Write new entries to disk.

        Raises:
            StorageError: The disk is full or read-only; entries stay in memory and nothing is left half-written.
        """
        for kind in _KINDS:
            pending = self._pending[kind]
            if not pending:
                continue
            stem = self._folder / f"{kind}-{self._counts[kind]:05d}"
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._write_meta()
                _save(stem.with_suffix(".values.npy"), np.stack(list(pending.values())))
                _save(stem.with_suffix(".keys.npy"), np.frombuffer(b"".join(pending), np.uint8).reshape(-1, 32))
            except OSError as error:
                raise StorageError(f"cannot write the teacher cache to {self._folder}: {error}") from error
            self._open_shard(kind, stem)
            pending.clear()

    def __enter__(self) -> TeacherCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def _check_meta(self) -> None:
        path = self._folder / "meta.json"
        teacher = self._teacher
        if not path.exists():
            if teacher is None:
                raise AssetError(f"no teacher cache at {self._folder}; open it with a teacher to make one")
            dims = {"image_dim": teacher.image_dim, "text_dim": teacher.text_dim}
            self._meta: dict[str, Any] = {"fingerprint": teacher.fingerprint, **dims}
            return
        try:
            self._meta = json.loads(path.read_text("utf-8"))
            recorded = str(self._meta["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AssetError(f"{path} is damaged ({error}); delete {self._folder} to start anew") from error
        if teacher is not None and teacher.fingerprint != recorded:
            raise AssetError(
                f"{self._folder} holds the embeddings of another teacher ({recorded[:12]}…, this one is "
                f"{teacher.fingerprint[:12]}…); use another folder or delete this one"
            )

    def _write_meta(self) -> None:
        path = self._folder / "meta.json"
        if not path.exists():
            partial = path.with_name(f"meta.json.{os.getpid()}.partial")
            partial.write_text(json.dumps(self._meta, indent=2) + "\n", "utf-8")
            os.replace(partial, path)

    def _read_shards(self, kind: str) -> None:
        for keys in sorted(self._folder.glob(f"{kind}-*.keys.npy")):
            self._open_shard(kind, keys.with_name(keys.name.removesuffix(".keys.npy")))

    def _open_shard(self, kind: str, stem: Path) -> None:
        try:
            keys = np.load(stem.with_suffix(".keys.npy"))
            values = np.load(stem.with_suffix(".values.npy"), mmap_mode="r")
        except (OSError, ValueError) as error:
            raise AssetError(f"teacher cache shard {stem} is damaged ({error}); delete its two files") from error
        if len(keys) != len(values):
            raise AssetError(f"teacher cache shard {stem} has {len(keys)} keys, {len(values)} values; delete its files")
        number = len(self._shards)
        self._shards.append(values)
        self._index[kind].update((key.tobytes(), (number, row)) for row, key in enumerate(keys))
        self._counts[kind] = max(self._counts[kind], int(stem.name.rsplit("-", 1)[1]) + 1)


def _save(path: Path, array: NDArray[Any]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.save(file, array)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
