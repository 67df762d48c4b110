"""Benchmarks as plain items. Each module reads one; none knows of models or judges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from unialignment.errors import InputError


@dataclass(frozen=True)
class Check:
    """A question about the drawn picture that is to be answered with yes.

    Attributes:
        id: Unique within the item.
        text: The question.
        parents: Checks that have to hold for this one to count.
    """

    id: str
    text: str
    parents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """One thing to make and to judge.

    Attributes:
        id: Unique within the benchmark and stable, e.g. ``"edit_multi/17"``.
        group: What results are averaged over.
        kind: Whether a picture is made from text alone or by editing a source.
        prompt: What the judge reads: the whole prompt or instruction.
        turns: What the model is told, one call for each.
        photo: The photograph that the item was written about, if there is one; of editing items the source.
        offset: Added to the run's seed.
        checks: Questions that the judge is asked about the picture, in place of marks.
    """

    id: str
    group: str
    kind: Literal["generate", "edit"]
    prompt: str
    turns: tuple[str, ...]
    photo: Path | None
    offset: int
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """Items and where they come from.

    Attributes:
        name: Name for reports.
        groups: Names of groups, in the order of reports.
        items: All items, group by group.
        fingerprint: SHA-256 over all texts and pictures.
        measures: What each item gets: IC, PQ and O, or one score from its checks.
        scale: The best value of a measure.
        rule: How checks make a score: ``"all"`` have to hold, or their ``"mean"``.
        notes: What a reader has to know.
    """

    name: str
    groups: tuple[str, ...]
    items: tuple[Item, ...]
    fingerprint: str
    measures: tuple[str, ...] = ("ic", "pq", "o")
    scale: float = 10.0
    rule: Literal["all", "mean"] = "all"
    notes: tuple[str, ...] = ()

    @property
    def main(self) -> str:
        """The measure that counts."""
        return self.measures[-1]


class _Grouped(Protocol):
    @property
    def group(self) -> str: ...


AnyItem = TypeVar("AnyItem", bound=_Grouped)


def select(items: Iterable[AnyItem], limit: int | None) -> tuple[AnyItem, ...]:
    """The first ``limit`` items of every group, in their order; all without a limit."""
    if limit is None:
        return tuple(items)
    if limit < 1:
        raise InputError(f"a limit of {limit} items in each group; expected 1 or more")
    taken: Counter[str] = Counter()
    chosen = []
    for item in items:
        taken[item.group] += 1
        if taken[item.group] <= limit:
            chosen.append(item)
    return tuple(chosen)
