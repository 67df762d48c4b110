"""Benchmarks as plain items. Each module reads one; none knows of models or judges."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Item:
    """One thing to make and to judge.

    Attributes:
        id: Unique within the benchmark and stable, e.g. ``"edit_multi/17"``.
        group: What results are averaged over.
        kind: Whether a picture is made from text alone or by editing a source.
        prompt: What the judge reads: the whole prompt or instruction.
        turns: What the model is told, one call for each.
        photo: The photograph that the item was written about; of editing items the source.
        offset: Added to the run's seed.
    """

    id: str
    group: str
    kind: Literal["generate", "edit"]
    prompt: str
    turns: tuple[str, ...]
    photo: Path
    offset: int


@dataclass(frozen=True)
class Benchmark:
    """Items and where they come from.

    Attributes:
        name: Name for reports.
        groups: Names of groups, in the order of reports.
        items: All items, group by group.
        fingerprint: SHA-256 over all texts and pictures.
    """

    name: str
    groups: tuple[str, ...]
    items: tuple[Item, ...]
    fingerprint: str
