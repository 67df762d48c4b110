"""Rows that can't be used: skipped, counted, listed, and past a limit a reason to stop. Knows nothing of rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from unialignment.errors import AssetError, InputError, StorageError

GRACE = 200
"""Rows that are read before a rate is judged: one bad row among the first three is no rate."""


class BadRow(InputError):
    """One row is unusable; others may be fine.

    Attributes:
        source: Name of the source.
        row: Where in it: a line, a key, or a row's number.
        reason: What is wrong.
    """

    def __init__(self, source: str, row: str, reason: str) -> None:
        super().__init__(f"{source}, {row}: {reason}")
        self.source, self.row, self.reason = source, row, reason

    def __reduce__(self) -> tuple[Any, ...]:  # workers send errors to the training process
        return BadRow, (self.source, self.row, self.reason)


class Quarantine:
    """Counts rows read and rows refused.

    Args:
        path: JSON Lines file that refused rows are appended to, each once per process; ``None``: only counted.
        limit: Largest share of refused rows, 0 to 1.
        grace: Rows read before the share is judged.
    """

    def __init__(self, path: Path | None = None, limit: float = 1.0, grace: int = GRACE) -> None:
        self.path, self.limit, self.grace = path, limit, grace
        self.read = 0
        self.refused = 0
        self._listed: set[tuple[str, str]] = set()

    def good(self) -> None:
        """A row was read."""
        self.read += 1

    def note(self, problem: BadRow) -> None:
        """List a problem without counting it: a row that is never drawn.

        Raises:
            StorageError: the list can't be written.
        """
        key = (problem.source, problem.row)
        if key not in self._listed:
            self._listed.add(key)
            if self.path is not None:
                append(self.path, problem)

    def bad(self, problem: BadRow) -> None:
        """A row was refused.

        Raises:
            AssetError: more than the limit were.
            StorageError: the list can't be written.
        """
        self.read += 1
        self.refused += 1
        self.note(problem)
        if self.read >= self.grace and self.refused > self.limit * self.read:
            listed = f"; they are listed in {self.path}" if self.path else ""
            raise AssetError(
                f"{self.refused} of {self.read} rows could not be used, more than data.max_bad={self.limit:g} allows"
                f"{listed}. The last: {problem}. Repair or exclude them (data.exclude), or raise data.max_bad."
            )


def append(path: Path, problem: BadRow) -> None:
    """Add one line to a quarantine list; several processes may do so at once.

    Raises:
        StorageError: it can't be written.
    """
    entry = {"source": problem.source, "row": problem.row, "reason": problem.reason[:500]}
    line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One write in append mode: lines of several workers don't mix.
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, line)
        finally:
            os.close(handle)
    except OSError as error:
        raise StorageError(f"could not write the quarantine list {path}: {error.strerror or error}") from error


def read_list(path: Path) -> set[tuple[str, str]]:
    """``(source, row)`` of a quarantine list.

    Raises:
        AssetError: the file is missing or isn't such a list.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
        entries = [json.loads(line) for line in lines if line.strip()]
        return {(str(entry["source"]), str(entry["row"])) for entry in entries}
    except OSError as error:
        raise AssetError(f"data.exclude: cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise AssetError(f"data.exclude: {path} is no quarantine list (lines with source and row): {error}") from None
