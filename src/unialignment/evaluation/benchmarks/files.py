"""Reading the files of other people's benchmarks: what is missing or damaged is said with where to get it.

Nothing is downloaded. Knows nothing of any one benchmark.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unialignment.errors import InputError


def need(root: Path, name: str, get: str) -> Path:
    """A file or folder that a benchmark needs.

    Args:
        root: The benchmark's folder, as given by the user.
        name: Path below it; ``"A|B"``: either.
        get: What to get, and from where.

    Raises:
        InputError: It is not there.
    """
    for choice in name.split("|"):
        if (root / choice).exists():
            return root / choice
    wanted = " or ".join(str(root / choice) for choice in name.split("|"))
    raise InputError(f"there is no {wanted}; {get} (nothing is downloaded by itself)")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: It can't be read or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read as JSON: {error}; get the file again") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object on each line.

    Raises:
        InputError: A line is something else.
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read: {error}; get the file again") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error}); get the file again") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
        rows.append(row)
    return rows


def read_table(path: Path, columns: tuple[str, ...], delimiter: str = ",") -> Iterator[dict[str, str]]:
    """The rows of a table with a header.

    Raises:
        InputError: It lacks a column or can't be read.
    """
    csv.field_size_limit(2**27)  # pictures stand in some cells
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
                raise InputError(f"{path} has no column {', '.join(map(repr, missing))}; is it the right file?")
            yield from reader
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} can't be read as a table: {error}; get the file again") from error


def fields(row: Any, where: str, *names: str) -> list[Any]:
    """Values of a row by name.

    Raises:
        InputError: One is missing.
    """
    if not isinstance(row, dict) or not row.keys() >= set(names):
        shown = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise InputError(f"{where}: expected the fields {', '.join(names)}, got {shown}")
    return [row[name] for name in names]


def picture(folder: Path, name: str, where: str) -> Path:
    """A picture that a row names, which must lie in the folder.

    Raises:
        InputError: It leads out, or is not there.
    """
    path = (folder / name).resolve()
    if "\\" in name or not path.is_relative_to(folder.resolve()):
        raise InputError(f"{where}: {name!r} leads out of {folder}")
    if not path.is_file():
        raise InputError(f"{where}: there is no picture {folder / name}; get the benchmark's pictures too")
    return path
