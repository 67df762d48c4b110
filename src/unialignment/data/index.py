"""What each row of a local source is good for: its tasks and, for buckets, its picture's size; found once and kept.

The index lies in the user's cache, keyed by the data's fingerprint and by what was asked, so that a second run and
every worker begin at once. Knows nothing of orders or mixtures.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unialignment.data.layouts import Recipe, read_row
from unialignment.data.pictures import PictureLoader
from unialignment.data.quarantine import BadRow
from unialignment.data.rows import Rows
from unialignment.errors import InputError, StorageError
from unialignment.storage import atomic_file
from unialignment.tasks import TASKS

_VERSION = 1


def index_folder() -> Path:
    """Where indices are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "unialignment" / "data-index"


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row with its columns under our names; ``columns`` is ours to theirs."""
    if not columns:
        return dict(row)
    theirs = set(columns.values())
    result = {name: value for name, value in row.items() if name not in theirs}
    for ours, name in columns.items():
        if name in row:
            result[ours] = row[name]
    return result


@dataclass(frozen=True)
class RowIndex:
    """The tasks and sizes of all rows.

    Attributes:
        tasks: Bits ``[N]``, one per name in ``names``; 0: the row is unusable.
        names: Task names, in the order of their bits.
        sizes: Width and height ``[N, 2]`` of the deciding picture, 0 where unknown; ``None`` if they weren't asked for.
        problems: Rows that no task can use, and why.
    """

    tasks: NDArray[np.uint16]
    names: tuple[str, ...]
    sizes: NDArray[np.int32] | None
    problems: tuple[BadRow, ...]

    def rows(self, task: str) -> NDArray[np.int64]:
        """Numbers of the rows that serve a task."""
        if task not in self.names:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(self.tasks & np.uint16(1 << self.names.index(task))).astype(np.int64)

    def count(self) -> dict[str, int]:
        """Rows by task, tasks without any left out."""
        counts = {name: len(self.rows(name)) for name in self.names}
        return {name: count for name, count in counts.items() if count}


def build_index(
    rows: Rows,
    loader: PictureLoader,
    tasks: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    sizes: bool = False,
    progress: Callable[[int], None] | None = None,
) -> RowIndex:
    """Read every row once, pictures' headers only if sizes are wanted and the row doesn't say.

    Args:
        rows: The source.
        loader: Opens pictures for their size.
        tasks: Only these; see :func:`~unialignment.data.layouts.read_row`.
        columns: Our column names to theirs.
        sizes: Whether sizes are wanted.
        progress: Called with the number of rows read.
    """
    names = TASKS.names[:16]
    bits = np.zeros(len(rows), dtype=np.uint16)
    shapes = np.zeros((len(rows), 2), dtype=np.int32) if sizes else None
    problems = list(rows.problems)
    for number in range(len(rows)):
        if progress is not None:
            progress(number)
        try:
            found = read_row(renamed(rows.row(number), columns or {}), tasks)
            if shapes is not None:
                shapes[number] = _size(found[0], loader)
        except BadRow as error:
            problems.append(error)
            continue
        except InputError as error:
            problems.append(BadRow(rows.name, rows.label(number), str(error)))
            continue
        for recipe in found:
            if recipe.task in names:
                bits[number] |= np.uint16(1 << names.index(recipe.task))
    return RowIndex(bits, names, shapes, tuple(problems))


def _size(recipe: Recipe, loader: PictureLoader) -> tuple[int, int]:
    return recipe.size if recipe.size is not None else loader.size(recipe.deciding_picture)


def cached_index(
    rows: Rows,
    loader: PictureLoader,
    tasks: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    sizes: bool = False,
    folder: Path | None = None,
) -> RowIndex:
    """:func:`build_index`, kept in ``folder`` (by default the user's cache); a damaged entry is made anew."""
    asked = [_VERSION, rows.fingerprint, rows.name, TASKS.names, tasks, sorted((columns or {}).items()), sizes]
    asked.append(str(rows.root.resolve()) if sizes else "")
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:40]
    path = (folder or index_folder()) / f"{key}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            facts = json.loads(bytes(stored["facts"]).decode())
            shapes = stored["sizes"] if sizes else None
            if len(stored["tasks"]) == len(rows):
                problems = tuple(BadRow(*entry) for entry in facts["problems"])
                return RowIndex(stored["tasks"], tuple(facts["names"]), shapes, problems)
    except Exception:  # absent or damaged, in any of the ways that zip and JSON have
        pass
    index = build_index(rows, loader, tasks, columns, sizes)
    facts = {"names": index.names, "problems": [(p.source, p.row, p.reason) for p in index.problems]}
    arrays: dict[str, Any] = {"tasks": index.tasks, "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
    if index.sizes is not None:
        arrays["sizes"] = index.sizes
    try:
        with atomic_file(path) as file:
            np.savez(file, **arrays)
    except StorageError:
        pass  # a cache that can't be written costs time, nothing else
    return index
