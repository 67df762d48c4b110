"""Benchmarks that ask for texts or maps of pictures: ask a model, keep every answer, work out the figures.

Two steps over a folder, both restartable: ``run.json`` holds the identity of what was asked, ``answers.jsonl`` the
answers, one record an item. Knows nothing of any particular benchmark or model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unialignment.errors import InputError
from unialignment.evaluation.benchmarks import select
from unialignment.evaluation.records import RecordLog, claim, versions
from unialignment.images import load_image
from unialignment.metadata import save_image
from unialignment.storage import write_json

Rows = NDArray[np.float64]
"""One row of numbers for each item; ``nan`` where a number does not apply."""

Statistic = Callable[[Rows], float]
"""A figure from the rows of a group. It is worked out again for resampled rows to get its interval."""

Progress = Callable[[str, int, int], None]
RESAMPLES = 500


@dataclass(frozen=True)
class Question:
    """One picture and what is asked about it.

    Attributes:
        id: Unique within the benchmark and stable.
        group: What figures are broken down by.
        picture: The picture's file, or its bytes.
        texts: What is asked, one call for each; an empty text asks for a description. With ``map`` it is not used.
        facts: What is needed to score the answers.
        map: Kind of map that is asked for instead of a text (``"depth"``), or empty.
    """

    id: str
    group: str
    picture: Path | bytes
    texts: tuple[str, ...] = ("",)
    facts: Mapping[str, Any] = field(default_factory=dict)
    map: str = ""


@dataclass(frozen=True)
class ReadingBenchmark:
    """Questions and how answers to them are scored.

    Attributes:
        name: For reports.
        items: All questions.
        fingerprint: SHA-256 over the files that they came from.
        hint: How answers shall look, for models that take free language (``"Answer with one word."``).
        score: Rows from items and answers (for maps: pictures), all of them at once.
        statistics: Name of a figure to the statistic.
        notes: What a reader has to know.
    """

    name: str
    items: tuple[Question, ...]
    fingerprint: str
    hint: str
    score: Callable[[Sequence[Question], Sequence[Any]], Rows]
    statistics: Mapping[str, Statistic]
    notes: tuple[str, ...] = ()


class Reader(Protocol):
    """Anything that looks at pictures; a model needs only the methods that its benchmarks call."""

    def identity(self) -> dict[str, Any]:
        """Everything that decides its answers, JSON-serialisable."""
        ...

    def tell(self, picture: Image.Image, question: str, hint: str, seed: int) -> str:
        """The answer to a question, or a description if the question is empty.

        Raises :class:`InputError` for what it can't answer.
        """
        ...


def mean_of(column: int) -> Statistic:
    """The mean of one column, without what does not apply."""
    return lambda rows: float(np.nanmean(rows[:, column]))


def answer(
    folder: Path,
    benchmark: ReadingBenchmark,
    model: Any,
    *,
    seed: int = 0,
    limit: int | None = None,
    accept_versions: bool = False,
    progress: Progress = lambda step, done, total: None,
) -> None:
    """Ask what has not been asked yet. An answer is on disk before the next question is asked.

    Raises:
        InputError: The folder holds another run, or the model has no way to answer such questions.
    """
    items = select(benchmark.items, limit)
    method = "chart" if any(item.map for item in items) else "tell"
    if not hasattr(model, method):
        raise InputError(f"{benchmark.name} needs a model with a method {method!r}; {type(model).__name__} has none")
    identity = {
        "benchmark": {"name": benchmark.name, "fingerprint": benchmark.fingerprint},
        "model": model.identity(),
        "hint": benchmark.hint,
        "seed": seed,
        "versions": versions(),
    }
    claim(folder / "run.json", identity, accept_versions)
    log = RecordLog(folder / "answers.jsonl", ("item",))
    for number, item in enumerate(items):
        progress("answer", number, len(items))
        if log.get(item.id) is not None:
            continue
        started = time.perf_counter()
        record: dict[str, Any] = {"item": item.id, "group": item.group, "seed": seed}
        try:
            picture = load_image(item.picture)
            if item.map:
                path = folder / "maps" / f"{number:06d}.png"
                save_image(model.chart(picture, item.map, seed), path)
                record |= {"status": "ok", "map": str(path.relative_to(folder))}
            else:
                told = [model.tell(picture, text, benchmark.hint, seed) for text in item.texts]
                record |= {"status": "ok", "questions": list(item.texts), "answers": told}
        except InputError as error:
            record |= {"status": "error", "error": str(error)[:300]}
        log.append({**record, "seconds": round(time.perf_counter() - started, 4)})
    progress("answer", len(items), len(items))


@dataclass(frozen=True)
class Scored:
    """The answers of a run, and what they are worth.

    Attributes:
        items: Items that were answered.
        rows: A row of numbers for each of them.
        given: Their answers (for maps: pictures) by id.
        records: The records of all items, ``None`` for those that were not asked.
    """

    items: list[Question]
    rows: Rows
    given: dict[str, Any]
    records: list[dict[str, Any] | None]


def scored(folder: Path, benchmark: ReadingBenchmark, limit: int | None = None) -> Scored:
    """Read the answers of a run and score them.

    Raises:
        InputError: Nothing was answered.
    """
    log = RecordLog(folder / "answers.jsonl", ("item",))
    items = select(benchmark.items, limit)
    records = [log.get(item.id) for item in items]
    done = [(item, one) for item, one in zip(items, records) if one is not None and one["status"] == "ok"]
    if not done:
        raise InputError(f"nothing is answered in {folder}; run the generate step first")
    given = [load_image(folder / one["map"]) if item.map else one["answers"] for item, one in done]
    answered = [item for item, _ in done]
    named = {item.id: one for item, one in zip(answered, given, strict=True)}
    return Scored(answered, benchmark.score(answered, given), named, records)


def groups_of(run: Scored, statistics: Mapping[str, Statistic]) -> dict[str, dict[str, list[float]]]:
    """Figures over all items and, if there are several, by group: value, ends of the interval, number of items."""
    found = {"all": _figures(run.rows, statistics)}
    groups = np.asarray([item.group for item in run.items])
    names = list(dict.fromkeys(groups.tolist()))
    if len(names) > 1:
        found |= {name: _figures(run.rows[groups == name], statistics) for name in names}
    return found


def summarise(folder: Path, benchmark: ReadingBenchmark, limit: int | None = None) -> dict[str, Any]:
    """Figures with bootstrap 95 % intervals, over all items and by group; what failed is counted and left out.

    Raises:
        InputError: Nothing was answered.
    """
    run = scored(folder, benchmark, limit)
    figures = groups_of(run, benchmark.statistics)
    result: dict[str, Any] = {
        "benchmark": benchmark.name,
        "items": len(run.records),
        "answered": len(run.items),
        "failed": sum(one is not None and one["status"] != "ok" for one in run.records),
        "missing": sum(one is None for one in run.records),
        "notes": list(benchmark.notes),
        "figures": figures.pop("all"),
    }
    if figures:
        result["groups"] = figures
    write_json(folder / "results.json", result)
    return result


def _figures(rows: Rows, statistics: Mapping[str, Statistic]) -> dict[str, list[float]]:
    """Name to value, lower and upper end of the interval, and number of items."""
    rng = np.random.default_rng(0)
    draws = [rows[rng.integers(0, len(rows), len(rows))] for _ in range(RESAMPLES)]
    found = {}
    for name, statistic in statistics.items():
        low, high = np.nanquantile([statistic(draw) for draw in draws], [0.025, 0.975])
        found[name] = [statistic(rows), float(low), float(high), len(rows)]
    return found


def table(summary: Mapping[str, Any]) -> str:
    """Markdown: every figure with its interval, over all and by group."""
    lines = ["| group | figure | value | 95 % interval | n |", "|---|---|---:|---:|---:|"]
    for group, figures in {"all": summary["figures"], **summary.get("groups", {})}.items():
        for name, (value, low, high, count) in figures.items():
            lines.append(f"| {group} | {name} | **{value:.4g}** | {low:.4g} – {high:.4g} | {count:.0f} |")
    missing = f"{summary['failed']} failed, {summary['missing']} were not asked"
    lines += ["", f"{summary['answered']} of {summary['items']} answered; {missing}.", *summary["notes"]]
    return "\n".join(lines)


def latex(summary: Mapping[str, Any]) -> str:
    """The same as a ``booktabs`` table."""
    from unialignment.evaluation.report import tex

    lines = [r"\begin{tabular}{llrr}", r"\toprule", r"Group & Figure & Value & 95\,\% interval \\", r"\midrule"]
    for group, figures in {"all": summary["figures"], **summary.get("groups", {})}.items():
        for name, (value, low, high, _) in figures.items():
            lines.append(f"{tex(group)} & {tex(name)} & {value:.4g} & {low:.4g}--{high:.4g} " + r"\\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"
