"""Weights from files to files without ever holding a model: read tensor by tensor, written as sharded safetensors.

Bytes are copied as they are, whatever their type, unless a tensor is replaced. Knows nothing of what tensors mean.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unialignment.errors import CheckpointError, InputError, StorageError
from unialignment.model.checkpoints import find_weights, open_weights
from unialignment.storage import storage_error

CHUNK = 16 * 2**20
"""Bytes copied at once."""
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "K": 2**10, "M": 2**20, "G": 2**30}
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def parse_size(text: str | int) -> int:
    """``"24GiB"``, ``"500MB"`` or a number of bytes as bytes.

    Raises:
        InputError: It isn't a positive size.
    """
    compact = str(text).strip().replace(" ", "")
    digits = compact.rstrip("BKMGTIbkmgti")
    unit = compact[len(digits) :].upper()
    try:
        size = round(float(digits) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise InputError(f"{text!r} is not a size; write it like 24GiB, 500MB or a number of bytes")
    return size


def format_size(size: float) -> str:
    """Bytes for people: ``"1.5 GiB"``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


@dataclass(frozen=True)
class Entry:
    """One tensor to be written.

    Attributes:
        dtype: safetensors' name of its type.
        shape: Its shape.
        size: Bytes.
        read: Yields its bytes in order.
    """

    dtype: str
    shape: tuple[int, ...]
    size: int
    read: Callable[[], Iterator[bytes]]


def read_entries(path: str | Path) -> dict[str, Entry]:
    """Tensors of a safetensors file, a component folder, or a sharded one, as entries that copy their bytes.

    Raises:
        CheckpointError: Something is missing, damaged or a pickle.
    """
    where = find_weights(path)
    entries: dict[str, Entry] = {}
    for file in sorted(set(where.values())):
        with open_weights(file):  # safetensors checks the header: offsets without gaps, within the file
            pass
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
        for name, facts in header.items():
            if name != "__metadata__" and where.get(name) == file:
                begin, end = facts["data_offsets"]
                copy = _copier(file, 8 + length + begin, end - begin)
                entries[name] = Entry(facts["dtype"], tuple(facts["shape"]), end - begin, copy)
    return entries


def _copier(file: Path, offset: int, size: int) -> Callable[[], Iterator[bytes]]:
    def read() -> Iterator[bytes]:
        left = size
        with file.open("rb") as raw:
            raw.seek(offset)
            while left:
                chunk = raw.read(min(CHUNK, left))
                if not chunk:
                    raise CheckpointError(f"{file} became shorter while it was read; start again")
                left -= len(chunk)
                yield chunk

    return read


def replaced(entry: Entry, change: Callable[[Tensor], Tensor]) -> Entry:
    """An entry whose tensor is passed through ``change`` when it is written; type and shape stay.

    Raises:
        CheckpointError: It isn't of a floating-point type.
    """
    _floating(entry)

    def read() -> Iterator[bytes]:
        old = entry_tensor(entry)
        new = change(old).to(old.dtype).contiguous()
        assert new.shape == old.shape
        yield new.flatten().view(torch.uint8).numpy().tobytes()

    return Entry(entry.dtype, entry.shape, entry.size, read)


def entry_tensor(entry: Entry) -> Tensor:
    """The tensor of an entry, read into memory.

    Raises:
        CheckpointError: It isn't of a floating-point type.
    """
    dtype = _floating(entry)
    return torch.frombuffer(bytearray(b"".join(entry.read())), dtype=dtype).view(entry.shape)


def _floating(entry: Entry) -> torch.dtype:
    if entry.dtype not in _TYPES:
        raise CheckpointError(f"a tensor of type {entry.dtype} can't be changed; convert the model to float first")
    return _TYPES[entry.dtype]


def tensor_entry(tensor: Tensor) -> Entry:
    """An entry that writes a tensor held in memory.

    Raises:
        CheckpointError: It isn't of a floating-point type.
    """
    name = next((name for name, dtype in _TYPES.items() if dtype == tensor.dtype), None)
    if name is None:
        raise CheckpointError(f"tensors of type {tensor.dtype} aren't written here; expected floating point")
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return Entry(name, tuple(tensor.shape), len(data), lambda: iter([data]))


class FolderWriter:
    """Writes files into a folder and remembers their sizes and checksums.

    Args:
        folder: Where to write; usually a temporary one that is renamed at the end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {}

    def stream(self, name: str, chunks: Iterator[bytes]) -> None:
        """Write one file from chunks.

        Raises:
            StorageError: It can't be written.
        """
        path = self.folder / name
        digest, size = hashlib.sha256(), 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
        except OSError as error:
            raise storage_error(path, error) from error
        self.files[name] = {"bytes": size, "sha256": digest.hexdigest()}

    def copy(self, source: Path, name: str) -> None:
        """Copy one file as it is."""

        def chunks() -> Iterator[bytes]:
            with source.open("rb") as file:
                while chunk := file.read(CHUNK):
                    yield chunk

        self.stream(name, chunks())

    def json(self, name: str, data: Any) -> None:
        """Write indented JSON."""
        self.stream(name, iter([(json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()]))

    def remember(self, name: str) -> None:
        """Note a file that something else has written into the folder."""
        data = (self.folder / name).read_bytes()
        self.files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def tensors(
        self,
        folder: str,
        stem: str,
        entries: Mapping[str, Entry],
        max_shard_size: int,
        metadata: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Write tensors as ``<stem>.safetensors``, or as shards with an index when they are larger than one shard.

        Args:
            folder: Subfolder, ``""`` for none.
            stem: ``"diffusion_pytorch_model"`` or ``"model"``.
            entries: Name → tensor.
            max_shard_size: Bytes of a shard; a larger tensor has a shard of its own.
            metadata: Further metadata of each file.

        Returns:
            Names of the weight files.
        """
        prefix = f"{folder}/" if folder else ""
        shards: list[dict[str, Entry]] = [{}]
        for name, entry in sorted(entries.items()):
            if shards[-1] and sum(e.size for e in shards[-1].values()) + entry.size > max_shard_size:
                shards.append({})
            shards[-1][name] = entry
        if len(shards) == 1:
            names = [f"{stem}.safetensors"]
        else:
            names = [f"{stem}-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
        for name, shard in zip(names, shards, strict=True):
            self.stream(prefix + name, _file(shard, metadata or {}))
        if len(shards) > 1:
            total = sum(entry.size for entry in entries.values())
            weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            self.json(f"{prefix}{stem}.safetensors.index.json", index)
        return [prefix + name for name in names]


def _file(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """A safetensors file, chunk by chunk. Wide types come first, so that every tensor is aligned."""
    order = sorted(entries, key=lambda name: (-_width(entries[name]), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name in order:
        entry = entries[name]
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.size],
        }
        offset += entry.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield from entries[name].read()


def _width(entry: Entry) -> float:
    count = 1
    for length in entry.shape:
        count *= length
    return entry.size / max(count, 1)


def need_space(folder: Path, size: int) -> None:
    """Refuse to begin what can't end.

    Raises:
        StorageError: The disk has less room than ``size`` bytes.
    """
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < size:
        raise StorageError(
            f"could not write {folder}: it needs {format_size(size)}, {format_size(free)} are free; free some space"
        )
