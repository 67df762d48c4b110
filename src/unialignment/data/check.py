"""Looks at every row and every picture of a data set before a run does, and says what is there and what is wrong.

Knows nothing of models; prints nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from unialignment.data.index import renamed
from unialignment.data.layouts import Recipe, read_row
from unialignment.data.mixture import DataSettings, SourceSpec
from unialignment.data.pictures import PictureLoader, Size
from unialignment.data.quarantine import BadRow
from unialignment.data.rows import open_rows
from unialignment.errors import InputError
from unialignment.images import load_image
from unialignment.tasks import TASKS

_STEPS = (64, 128, 256, 512, 1024, 2048)


@dataclass
class Findings:
    """What is in a data set.

    Attributes:
        rows: Rows looked at.
        usable: Rows that serve at least one task with pictures that open.
        tasks: Usable samples by task.
        kinds: Usable samples by ``task/kind``.
        sizes: Pictures by shape and length of their shorter side in pixels, e.g. ``"wide, 256-511"``.
        longest: Longest prompt and target text in characters, by task.
        problems: Unusable rows and shards.
        examples: A few samples per task, as plain values.
        duplicates: Rows whose texts and pictures an earlier row has too.
    """

    rows: int = 0
    usable: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    longest: dict[str, int] = field(default_factory=dict)
    problems: list[BadRow] = field(default_factory=list)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    duplicates: int = 0

    @property
    def bad_share(self) -> float:
        """Unusable rows over all; an unreadable shard counts as one row."""
        seen = self.rows + sum(problem.reason.startswith("unreadable shard") for problem in self.problems)
        return len(self.problems) / max(1, seen)

    @property
    def reasons(self) -> Counter[str]:
        """Problems by reason, names of files left out."""
        return Counter(_without_names(problem.reason) for problem in self.problems)

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "rows": self.rows,
            "usable": self.usable,
            "bad_share": round(self.bad_share, 6),
            "duplicates": self.duplicates,
            "tasks": dict(self.tasks),
            "kinds": dict(self.kinds),
            "sizes": {name: self.sizes[name] for name in sorted(self.sizes, key=_size_order)},
            "longest_text": self.longest,
            "reasons": dict(self.reasons),
            "examples": self.examples,
        }


def check(
    spec: SourceSpec,
    settings: DataSettings,
    *,
    quick: bool = False,
    limit: int | None = None,
    examples: int = 2,
    problem: Callable[[BadRow], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Findings:
    """Check one source.

    Args:
        spec: The source.
        settings: Limits on pictures.
        quick: Only read pictures' headers; finds missing files, not truncated ones.
        limit: Look at this many rows only.
        examples: Examples per task to keep.
        problem: Told of each unusable row as it is found.
        progress: Told of the row that is looked at and rows in all.

    Raises:
        AssetError: nothing can be read at all.
    """
    rows = open_rows(spec.path, spec.format, spec.split, spec.root)
    loader = PictureLoader(rows.root, settings.max_pixels, settings.fit)
    found = Findings()
    seen: set[int] = set()
    for shard in rows.problems:
        _add(found, shard, problem)
    total = len(rows) if limit is None else min(limit, len(rows))
    for number in range(total):
        found.rows += 1
        if progress is not None:
            progress(found.rows, total)
        try:
            recipes = read_row(renamed(rows.row(number), spec.columns), spec.tasks)
            sizes = [_open(loader, reference, quick) for reference in _references(recipes)]
        except BadRow as error:
            _add(found, error, problem)
            continue
        except InputError as error:
            _add(found, BadRow(rows.name, rows.label(number), str(error)), problem)
            continue
        found.usable += 1
        for size in sizes:
            found.sizes[_size_class(size)] += 1
        # A hash of everything: comparing texts alone would call every question of one kind a duplicate.
        identity = hash(
            tuple((r.task, r.prompt, r.target_text, str(r.sources)[:500], str(r.target)[:500]) for r in recipes)
        )
        found.duplicates += identity in seen
        seen.add(identity)
        for recipe in recipes:
            _count(found, recipe, rows.label(number), examples)
    return found


def _add(found: Findings, bad: BadRow, told: Callable[[BadRow], None] | None) -> None:
    found.problems.append(bad)
    if told is not None:
        told(bad)


def _references(recipes: Iterable[Recipe]) -> list[Any]:
    unique: dict[int | str, Any] = {}
    for recipe in recipes:
        for reference in (*recipe.sources, *(() if recipe.target is None else (recipe.target,))):
            unique[reference if isinstance(reference, str) else id(reference)] = reference
    return list(unique.values())


def _open(loader: PictureLoader, reference: Any, quick: bool) -> Size:
    if quick:
        return loader.size(reference)
    return load_image(loader.data(reference), max_pixels=loader.max_pixels).size


def _count(found: Findings, recipe: Recipe, label: str, examples: int) -> None:
    found.tasks[recipe.task] += 1
    if recipe.kind:
        found.kinds[f"{recipe.task}/{recipe.kind}"] += 1
    longest = max(len(recipe.prompt), len(recipe.target_text or ""))
    found.longest[recipe.task] = max(found.longest.get(recipe.task, 0), longest)
    kept = found.examples.setdefault(recipe.task, [])
    if len(kept) < examples:
        shown = {"row": label, "prompt": recipe.prompt, "sources": [_shown(s) for s in recipe.sources]}
        if TASKS.get(recipe.task).target == "image":
            shown["target"] = _shown(recipe.target)
        else:
            shown["target_text"] = recipe.target_text or ""
        kept.append(shown)


def _shown(reference: Any) -> str:
    if isinstance(reference, str):
        return reference
    path = reference.get("path") if not isinstance(reference, bytes) else None
    return str(path) if path else "(encoded)"


def _size_class(size: Size) -> str:
    width, height = size
    shape = "square" if max(size) <= 1.1 * min(size) else "wide" if width > height else "tall"
    shorter = min(size)
    for low, high in zip((0, *_STEPS), _STEPS, strict=False):
        if shorter < high:
            return f"{shape}, {low}-{high - 1}" if low else f"{shape}, below {high}"
    return f"{shape}, {_STEPS[-1]} and more"


def _size_order(name: str) -> tuple[int, str]:
    shape, _, rest = name.partition(", ")
    digits = "".join(c for c in rest.partition("-")[0] if c.isdigit())
    return (0 if rest.startswith("below") else int(digits or 0)), shape


def _without_names(reason: str) -> str:
    """A reason's first words, without what differs from file to file."""
    for known in ("no picture at", "is damaged", "can't be opened", "not a picture", "is a URL", "more than the limit",
                  "not a JSON object", "unreadable shard", "is empty"):  # fmt: skip
        if known in reason:
            return known
    return reason[:60]
