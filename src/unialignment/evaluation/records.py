"""Append-only records on disk, and who may add to them: what makes the steps of an evaluation restartable.

A :class:`RecordLog` is a JSONL file whose every line is on disk before the next piece of work starts; a line cut off by
a kill is removed when the file is opened again. An identity says under which circumstances records came about, and
records of two identities are never mixed. Knows nothing of benchmarks, models or judges.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import threading
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from unialignment.errors import InputError, StorageError
from unialignment.storage import storage_error, write_json

VERSIONED = ("torch", "diffusers", "transformers", "openai", "pillow", "numpy")
"""Packages whose version can change a picture or a judgement."""


class RecordLog:
    """One JSONL file, one record a line, at most one record for each key.

    Safe to append to from several threads. Only one process may hold it; see :func:`run_lock`.

    Args:
        path: The file; it and its folder are created by the first record.
        key: Fields that identify a record.

    Raises:
        InputError: A line other than the last is not a record.
    """

    def __init__(self, path: Path, key: tuple[str, ...]) -> None:
        self.path, self.key = path, key
        self._lock = threading.Lock()
        self._records: dict[tuple[Any, ...], dict[str, Any]] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):  # the process was killed in the middle of this line: nobody has seen its record
            with self.path.open("r+b") as file:
                file.truncate(end)
                os.fsync(file.fileno())
        for number, line in enumerate(data[:end].splitlines(), 1):
            try:
                record = json.loads(line)
                self._records[self.key_of(record)] = record
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self.path}, line {number}: not a record of ours ({error}); restore the file or use a new folder"
                ) from error

    def key_of(self, record: Mapping[str, Any]) -> tuple[Any, ...]:
        """The identifying fields of a record."""
        return tuple(record[name] for name in self.key)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(list(self._records.values()))

    def get(self, *key: Any) -> dict[str, Any] | None:
        """The record of that key, if there is one."""
        return self._records.get(key)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record and wait until it is on disk. A later record of the same key takes the place of the earlier.

        Raises:
            StorageError: It could not be written.
        """
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with self._lock:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                try:
                    start = os.fstat(handle).st_size
                    try:
                        _write_all(handle, line)
                    except OSError:
                        os.ftruncate(handle, start)  # a full disk must not leave half a line before the next record
                        raise
                    os.fsync(handle)
                finally:
                    os.close(handle)
            except OSError as error:
                raise storage_error(self.path, error) from error
            self._records[self.key_of(record)] = dict(record)


def _write_all(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process; the operating system lets go of it even after SIGKILL.

    Raises:
        StorageError: Another process holds it, or the folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise storage_error(folder, error) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StorageError(f"{folder} is in use by another evaluation; wait for it or use another --out") from error
        yield
    finally:
        os.close(handle)


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the packages in :data:`VERSIONED` that are installed."""
    from unialignment import __version__

    found = {"python": platform.python_version(), "unialignment": __version__}
    for name in VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Where two JSON values differ: ``"judge.model: 'a' there, 'b' here"``."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[str] = []
        for key in sorted({*old, *new}):
            found += differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
        return found
    return [] if old == new else [f"{name}: {old!r} there, {new!r} here"]


def claim(path: Path, identity: Mapping[str, Any], accept_versions: bool = False) -> None:
    """Write an identity, or compare with the one that is there.

    Args:
        path: JSON file of the identity.
        identity: JSON-serialisable; everything that decides what records mean. ``versions`` may differ on request.
        accept_versions: Whether records of other package versions may be added to.

    Raises:
        InputError: There is one, and it differs.
    """
    here = json.loads(json.dumps(identity))
    if not path.exists():
        write_json(path, here)
        return
    there = read_identity(path)
    if accept_versions:
        there, here = ({k: v for k, v in one.items() if k != "versions"} for one in (there, here))
    if found := differences(there, here):
        hint = "use another --out"
        if all(line.startswith("versions.") for line in found):
            hint += ", or --accept-versions if the difference does not matter"
        raise InputError(f"{path.parent} holds results of something else ({'; '.join(found[:4])}); {hint}")


def read_identity(path: Path) -> dict[str, Any]:
    """Read what :func:`claim` wrote.

    Raises:
        InputError: It is missing or damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is missing or damaged; is {path.parent} the folder of an evaluation?") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} does not hold an identity; restore it or use a new folder")
    return data


def digest(*parts: str | bytes) -> str:
    """SHA-256 over parts, each preceded by its length, in hexadecimal."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(f"{len(data)}:".encode() + data)
    return total.hexdigest()
