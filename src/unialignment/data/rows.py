"""Rows of local data at random access: JSON Lines by byte offset, everything else through the ``datasets`` library.

JSON Lines are read here rather than by ``datasets`` for two reasons: rows of one manifest may differ in shape (a
picture or a list of them), which a column format refuses, and a damaged line must cost one row, not the file. Knows
nothing of tasks, of what columns mean, or of pictures.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from unialignment.data.quarantine import BadRow
from unialignment.errors import AssetError

FORMATS = ("jsonl", "parquet", "webdataset", "dataset")
"""Formats of files; ``world`` is the sprite world."""

_ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".tar": "webdataset", ".tgz": "webdataset"}


class Rows(Protocol):
    """A local source: rows by number."""

    name: str
    fingerprint: str
    root: Path
    problems: list[BadRow]

    def __len__(self) -> int: ...

    def row(self, number: int) -> Mapping[str, Any]: ...

    def label(self, number: int) -> str: ...


def source_name(path: str) -> str:
    """What a source is called in messages and quarantine lists: its last two parts, on every machine the same."""
    whole = Path(path).expanduser().absolute()
    return f"{whole.parent.name}/{whole.name}"


def find_files(path: str) -> list[Path]:
    """Files that a path, folder or pattern names, sorted.

    Raises:
        AssetError: there is none.
    """
    found = Path(path).expanduser()
    if found.is_dir():
        files = sorted(item for item in found.iterdir() if item.suffix.lower() in _ENDINGS)
    elif found.is_file():
        files = [found]
    else:
        files = sorted(Path(item) for item in glob.glob(str(found), recursive=True) if os.path.isfile(item))
    if not files:
        raise AssetError(f"no data at {path}: expected a file, a folder of files, or a pattern such as 'shards/*.tar'")
    return files


def guess_format(path: str) -> str:
    """The format that a path's files have.

    Raises:
        AssetError: nothing is there, formats are mixed, or the ending is unknown.
    """
    found = Path(path).expanduser()
    if any((found / name).is_file() for name in ("dataset_info.json", "state.json", "dataset_dict.json")):
        return "dataset"
    formats = {_ENDINGS.get(file.suffix.lower(), "") for file in find_files(path)}
    if len(formats) != 1 or "" in formats:
        raise AssetError(f"cannot tell the format of {path}; give it: one of {', '.join(FORMATS)}")
    return formats.pop()


def _file_fingerprint(path: Path) -> str:
    """Name, size and a sample of the content: quick for terabytes, and the same on every machine."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name}:{size}".encode())
    with path.open("rb") as file:
        for part in range(17):
            file.seek(size * part // 17)
            digest.update(file.read(65536))
    return digest.hexdigest()


def _joined(parts: list[str]) -> str:
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


class JsonlRows:
    """Lines of one or several JSON Lines files.

    Args:
        path: File, folder or pattern.
        root: Folder that pictures' relative paths start from; by default the manifest's own.

    Raises:
        AssetError: there is no file, or it can't be read.
    """

    def __init__(self, path: str, root: Path | None = None) -> None:
        self.files = find_files(path)
        self.name = source_name(path)
        self.root = root if root is not None else self.files[0].parent
        self.problems: list[BadRow] = []
        self._handles: dict[int, Any] = {}
        try:
            self.fingerprint = _joined([_file_fingerprint(file) for file in self.files])
            self._offsets = [_line_offsets(file) for file in self.files]
        except OSError as error:
            raise AssetError(f"cannot read {error.filename or path}: {error.strerror or error}") from None
        self._starts = np.cumsum([0] + [len(offsets) for offsets in self._offsets])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}

    def _place(self, number: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._starts, number, side="right")) - 1
        return file, number - int(self._starts[file])

    def label(self, number: int) -> str:
        """``file:line``."""
        file, line = self._place(number)
        return f"{self.files[file].name}:{line + 1}"

    def row(self, number: int) -> Mapping[str, Any]:
        """The object on a line.

        Raises:
            BadRow: the line is not a JSON object.
        """
        file, line = self._place(number)
        try:
            if file not in self._handles:
                self._handles[file] = self.files[file].open("rb")
            handle = self._handles[file]
            handle.seek(int(self._offsets[file][line]))
            value = json.loads(handle.readline().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise BadRow(self.name, self.label(number), f"not a JSON object ({str(error)[:120]})") from None
        except OSError as error:
            raise BadRow(self.name, self.label(number), f"cannot be read ({error.strerror or error})") from None
        if not isinstance(value, dict):
            raise BadRow(self.name, self.label(number), f"not a JSON object but {type(value).__name__}")
        return value


def _line_offsets(path: Path) -> NDArray[np.int64]:
    """Where lines begin; empty ones at the end of the file are left out."""
    parts = [np.zeros(1, dtype=np.int64)]
    with path.open("rb") as file:
        position = 0
        while block := file.read(1 << 22):
            parts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + position + 1)
            position += len(block)
        starts = np.concatenate(parts).astype(np.int64)
        count = len(starts)
        while count > 1:
            file.seek(int(starts[count - 1]))
            if file.read(1 << 16).strip():
                break
            count -= 1
        if count == 1:
            file.seek(0)
            if not file.read(1 << 16).strip():
                raise AssetError(f"{path} is empty; expected one JSON object a line")
    return starts[:count]


class DatasetRows:
    """Rows that the ``datasets`` library reads: Parquet, WebDataset tars, saved or named data sets.

    Files are opened one by one, so that an unreadable shard costs its own rows only; it is listed in ``problems``.

    Args:
        path: File, folder or pattern; for ``dataset`` a folder of ``save_to_disk`` or a name on the hub.
        format: ``parquet``, ``webdataset`` or ``dataset``.
        split: Of a named data set.
        root: Folder that relative paths start from.

    Raises:
        AssetError: nothing can be read at all.
    """

    def __init__(self, path: str, format: str, split: str = "train", root: Path | None = None) -> None:
        self.name = source_name(path)
        self.problems: list[BadRow] = []
        parts, self._labels, prints = [], [], []
        if format == "dataset":
            parts.append(_open_dataset(path, split))
            self._labels.append("row")
            prints.append(f"{path}:{split}:{len(parts[0])}:{getattr(parts[0], '_fingerprint', '')}")
            self.root = root or (Path(path).expanduser() if Path(path).expanduser().is_dir() else Path())
        else:
            load_library()  # its absence is no fault of a file
            files = find_files(path)
            self.root = root or files[0].parent
            for file in files:
                try:
                    parts.append(_open_files(format, file))
                except Exception as error:  # pyarrow, tarfile and datasets each raise their own
                    self.problems.append(BadRow(self.name, file.name, f"unreadable shard ({_reason(error)})"))
                    continue
                self._labels.append(file.name)
                prints.append(_file_fingerprint(file))
            if not parts:
                raise AssetError(f"none of the {len(files)} files at {path} can be read. The first: {self.problems[0]}")
        self._parts = [_undecoded(part) for part in parts]
        self.fingerprint = _joined(prints)
        self._starts = np.cumsum([0] + [len(part) for part in self._parts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _place(self, number: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        return part, number - int(self._starts[part])

    def label(self, number: int) -> str:
        """``file:row``."""
        part, row = self._place(number)
        return f"{self._labels[part]}:{row + 1}"

    def row(self, number: int) -> Mapping[str, Any]:
        """Columns of a row; pictures as ``{"bytes": ..., "path": ...}``.

        Raises:
            BadRow: it can't be read.
        """
        part, row = self._place(number)
        try:
            value: Mapping[str, Any] = self._parts[part][row]
        except Exception as error:  # whatever Arrow stumbles over in one row
            raise BadRow(self.name, self.label(number), f"cannot be read ({_reason(error)})") from None
        return value


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def load_library() -> Any:
    """The ``datasets`` module, quiet.

    Raises:
        AssetError: it isn't installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise AssetError(
            f"this format needs the package {error.name}; run: pip install 'unialignment[train]'"
        ) from error
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    return datasets


def _open_files(format: str, file: Path) -> Any:
    library = load_library()
    return library.load_dataset(format, data_files=[str(file)], split="train")


def _open_dataset(path: str, split: str) -> Any:
    library = load_library()
    folder = Path(path).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file():
            return library.load_from_disk(str(folder))[split]
        if (folder / "state.json").is_file():
            return library.load_from_disk(str(folder))
        return library.load_dataset(str(path), split=split)
    except Exception as error:  # the library raises many kinds, network ones included
        raise AssetError(f"cannot open the data set {path} (split {split}): {_reason(error)}") from None


def _undecoded(dataset: Any) -> Any:
    """The data set with pictures left encoded: decoding is ours, with its limits, and a bad one costs one row."""
    library = load_library()
    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, library.Image):
            dataset = dataset.cast_column(column, library.Image(decode=False))
        elif isinstance(feature, library.List | library.Sequence) and isinstance(feature.feature, library.Image):
            dataset = dataset.cast_column(column, library.List(library.Image(decode=False)))
    return dataset


def open_rows(path: str, format: str = "auto", split: str = "train", root: Path | None = None) -> Rows:
    """A local source.

    Args:
        path: File, folder, pattern, or a data set's name.
        format: One of :data:`FORMATS`, or ``auto``: by the files' ending.
        split: Of a named data set.
        root: Folder that relative paths of pictures start from.

    Raises:
        AssetError: it can't be opened.
    """
    chosen = guess_format(path) if format == "auto" else format
    return JsonlRows(path, root) if chosen == "jsonl" else DatasetRows(path, chosen, split, root)
