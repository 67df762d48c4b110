"""A feature cache on disk: latents, prompt embeddings and teacher embeddings by key, in checksummed safetensors shards.

A shard is complete or absent: its tensors are written under a temporary name and renamed, its certificate (size and
SHA-256) last. Knows nothing of where features come from or of how they are used.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from unialignment.errors import AssetError
from unialignment.model.folders import file_checksum
from unialignment.storage import atomic_file, write_json

META = "meta.json"
SHARDS = "shards"
VERSION = 1


def key_bytes(key: str) -> bytes:
    """16 bytes that stand for a key."""
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def prompt_key(ids: Tensor, mask: Tensor) -> str:
    """Key of a prompt: its visible token ids ``[L]`` (``mask`` bool ``[L]``)."""
    return ",".join(map(str, ids[mask].tolist()))


class ShardWriter:
    """Collects features of one shard; equal keys are kept once."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, tuple[int, ...], str], dict[bytes, Tensor]] = defaultdict(dict)

    def add(self, kind: str, key: str, value: Tensor) -> None:
        """Take a feature of any shape.

        Raises:
            AssetError: it holds values that aren't finite.
        """
        if not bool(torch.isfinite(value).all()):
            raise AssetError(f"a {kind} holds values that are not finite; --dtype may be too narrow for it")
        plain = value.detach().to("cpu").contiguous()
        self._values[kind, tuple(plain.shape), str(plain.dtype)][key_bytes(key)] = plain

    @property
    def counts(self) -> dict[str, int]:
        """Features by kind."""
        result: dict[str, int] = defaultdict(int)
        for (kind, _, _), values in self._values.items():
            result[kind] += len(values)
        return dict(result)

    def write(self, folder: Path, number: int) -> None:
        """Write the shard, then its certificate.

        Raises:
            StorageError: the disk is full or read-only; nothing is left half-written.
        """
        tensors: dict[str, Tensor] = {}
        for group, ((kind, _, _), values) in enumerate(sorted(self._values.items(), key=lambda item: item[0])):
            tensors[f"{kind}.{group}"] = torch.stack(list(values.values()))
            tensors[f"{kind}.{group}.keys"] = torch.frombuffer(bytearray(b"".join(values)), dtype=torch.uint8).view(
                -1, 16
            )
        data = save(tensors)
        path = folder / SHARDS / f"{number:06d}.safetensors"
        with atomic_file(path) as file:
            file.write(data)
        certificate = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "counts": self.counts}
        write_json(path.with_suffix(".json"), certificate)


def shard_done(folder: Path, number: int) -> bool:
    """Whether a shard and its certificate are there and the size agrees."""
    path = folder / SHARDS / f"{number:06d}.safetensors"
    try:
        return bool(json.loads(path.with_suffix(".json").read_text("utf-8"))["bytes"] == path.stat().st_size)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_meta(folder: Path) -> dict[str, Any]:
    """What a cache says of itself.

    Raises:
        AssetError: there is none, or it is damaged.
    """
    try:
        meta = json.loads((folder / META).read_text("utf-8"))
        if meta["version"] != VERSION:
            raise AssetError(f"{folder} was made by another version of this program; make it again")
        return {**meta, "identity": dict(meta["identity"]), "units": int(meta["units"])}
    except FileNotFoundError:
        raise AssetError(f"no feature cache at {folder}; make one with `unialign cache`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AssetError(f"{folder / META} is damaged ({error}); delete {folder} and make the cache again") from None


def compare(folder: Path, made_for: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a cache of something else.

    Raises:
        AssetError: naming what differs.
    """
    differs = [name for name in sorted({*made_for, *wanted}) if made_for.get(name) != wanted.get(name)]
    if differs:
        raise AssetError(
            f"the feature cache {folder} was made with another {' and '.join(differs)}; make it again with "
            "`unialign cache` in a new folder, or leave data.cache out"
        )


class _Places(NamedTuple):
    """Where the features of a kind lie: both halves of their keys, sorted, and shard, group and row of each."""

    first: NDArray[np.uint64]
    second: NDArray[np.uint64]
    places: NDArray[np.int32]
    names: list[str]


class FeatureStore:
    """Reads a complete cache. Each shard's checksum is verified when it is first touched.

    Args:
        folder: The cache.
        verify: Whether to verify checksums.

    Raises:
        AssetError: missing, incomplete or damaged.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.folder = folder
        self.meta = read_meta(folder)
        missing = [unit for unit in range(self.meta["units"]) if not shard_done(folder, unit)]
        if missing:
            raise AssetError(
                f"the feature cache {folder} lacks {len(missing)} of its {self.meta['units']} shards; "
                "run `unialign cache` again, it goes on where it stopped"
            )
        self._unverified = set(range(self.meta["units"])) if verify else set()
        self._handles: dict[int, Any] = {}
        self._index = self._read_keys()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}

    def _path(self, shard: int) -> Path:
        return self.folder / SHARDS / f"{shard:06d}.safetensors"

    def _open(self, shard: int) -> Any:
        try:
            if shard not in self._handles:
                self._handles[shard] = safe_open(str(self._path(shard)), framework="pt")
            return self._handles[shard]
        except (OSError, SafetensorError) as error:
            raise self._damaged(shard, str(error)) from None

    def _damaged(self, shard: int, why: str) -> AssetError:
        path = self._path(shard)
        return AssetError(
            f"{path} is damaged ({why}); delete it and run `unialign cache` again: it makes only this shard"
        )

    def _read_keys(self) -> dict[str, _Places]:
        found: dict[str, list[tuple[NDArray[np.uint8], int, str]]] = defaultdict(list)
        for shard in range(self.meta["units"]):
            handle = self._open(shard)
            for name in handle.keys():  # noqa: SIM118 - not a dictionary
                if name.endswith(".keys"):
                    found[name.partition(".")[0]].append((handle.get_tensor(name).numpy(), shard, name[:-5]))
        index = {}
        for kind, parts in found.items():
            names = [name for _, _, name in parts]
            keys = np.ascontiguousarray(np.concatenate([keys for keys, _, _ in parts])).view(np.uint64)
            places = np.concatenate(
                [
                    np.stack([np.full(len(k), shard), np.full(len(k), part), np.arange(len(k))], axis=1)
                    for part, (k, shard, _) in enumerate(parts)
                ]
            ).astype(np.int32)
            order = np.lexsort((keys[:, 1], keys[:, 0]))
            first, second = (np.ascontiguousarray(keys[order, half]) for half in (0, 1))
            index[kind] = _Places(first, second, places[order], names)
        return index

    def count(self, kind: str) -> int:
        """Features of a kind, those of several shards counted once for each."""
        return len(self._index[kind].first) if kind in self._index else 0

    def width(self, kind: str) -> int:
        """Length of the last axis of a kind's features; 0 where there are none."""
        if not self.count(kind):
            return 0
        index = self._index[kind]
        shard, part, _ = (int(value) for value in index.places[0])
        return int(self._open(shard).get_slice(index.names[part]).get_shape()[-1])

    def _find(self, kind: str, key: str) -> tuple[int, str, int] | None:
        if kind not in self._index:
            return None
        index = self._index[kind]
        wanted = np.frombuffer(key_bytes(key), np.uint64)
        start = int(np.searchsorted(index.first, wanted[0]))
        while start < len(index.first) and index.first[start] == wanted[0]:
            if index.second[start] == wanted[1]:
                shard, part, row = (int(value) for value in index.places[start])
                return shard, index.names[part], row
            start += 1
        return None

    def has(self, kind: str, key: str) -> bool:
        """Whether a feature is there."""
        return self._find(kind, key) is not None

    def get(self, kind: str, key: str) -> Tensor:
        """A feature, as float32.

        Raises:
            AssetError: it isn't there, or its shard is damaged.
        """
        place = self._find(kind, key)
        if place is None:
            raise AssetError(f"the feature cache {self.folder} has no {kind} for {key[:80]!r}")
        shard, name, row = place
        if shard in self._unverified:
            self.verify(shard)
        try:
            value: Tensor = self._open(shard).get_slice(name)[row]
        except (OSError, SafetensorError) as error:
            raise self._damaged(shard, str(error)) from None
        return value.float()

    def verify(self, shard: int) -> None:
        """Compare a shard with its certificate.

        Raises:
            AssetError: they differ.
        """
        path = self._path(shard)
        try:
            expected = json.loads(path.with_suffix(".json").read_text("utf-8"))["sha256"]
            if file_checksum(path) != expected:
                raise self._damaged(shard, "its checksum differs")
        except OSError as error:
            raise self._damaged(shard, str(error)) from None
        self._unverified.discard(shard)
