"""What a benchmark of texts or maps found, as an HTML page: figures, bars, and the items that went worst and best.

Several runs of one benchmark stand side by side. Knows nothing of how answers came about.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from unialignment.errors import InputError
from unialignment.evaluation import page
from unialignment.evaluation.radar import radar
from unialignment.evaluation.reading import Question, ReadingBenchmark, Scored, groups_of, scored
from unialignment.evaluation.records import read_identity

LONGEST = 600
"""Characters of a text that are shown."""


def write_html(folder: Path, others: Sequence[Path], benchmark: ReadingBenchmark, limit: int | None = None) -> Path:
    """Write ``report.html`` into a run's folder, with other runs of the same items beside it.

    Raises:
        InputError: A folder holds no answers, or answers to something else.
        StorageError: It can't be written.
    """
    runs = {_label(one, (folder, *others)): one for one in (folder, *others)}
    found: dict[str, Scored] = {}
    parts = []
    for label, one in runs.items():
        identity = read_identity(one / "run.json")
        if identity.get("benchmark", {}).get("fingerprint") != benchmark.fingerprint:
            raise InputError(
                f"{one} holds answers to another benchmark than {benchmark.name}; compare runs of the same"
            )
        found[label] = scored(one, benchmark, limit)
        failed = len(found[label].records) - len(found[label].items)
        missing = [f"{failed} of {len(found[label].records)} items failed or were not asked."] if failed else []
        model = json.dumps(identity["model"], ensure_ascii=False)
        parts.append(page.introduction(label, model, [*benchmark.notes, *missing]))
    figures = {label: groups_of(run, benchmark.statistics) for label, run in found.items()}
    parts += ["<h2>Figures</h2>", _table(figures)]
    main = next(iter(benchmark.statistics))
    groups = list(dict.fromkeys(group for run in figures.values() for group in run))
    series = [(label, {group: run[group][main][:3] for group in run}) for label, run in figures.items()]
    best = max(1.0, *(values[group][2] for _, values in series for group in values))
    parts.append(f"<h2>{html.escape(main)} by group</h2>")
    coloured = [
        (label, page.COLOURS[index % len(page.COLOURS)], {group: value[0] for group, value in values.items()})
        for index, (label, values) in enumerate(series)
    ]
    parts += [radar(coloured, groups[1:], best, f"{main} by group"), page.bars(series, groups, best, main)]
    parts += ["<h2>Items</h2>", _gallery(found, benchmark, groups)]
    return page.write(folder / "report.html", benchmark.name, parts)


def _label(folder: Path, folders: Sequence[Path]) -> str:
    name = folder.resolve().name
    alike = [one for one in folders if one.resolve().name == name]
    return name if len(alike) == 1 else f"{name} ({alike.index(folder) + 1})"


def _table(figures: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> str:
    rows = [
        [*map(html.escape, (label, group, name)), f"<b>{value:.4g}</b>", f"{low:.4g} – {high:.4g}", f"{count:.0f}"]
        for label, groups in figures.items()
        for group, values in groups.items()
        for name, (value, low, high, count) in values.items()
    ]
    head = ("model", "group", "figure", "value", "95 % interval", "n")
    return page.table(head, rows, "Bootstrap intervals over items.")


def _gallery(found: Mapping[str, Scored], benchmark: ReadingBenchmark, groups: Sequence[str]) -> str:
    """Items among the worst and best of any run, with every run's answer; the first figure decides."""
    statistic = next(iter(benchmark.statistics.values()))
    scores: dict[str, dict[str, float]] = {}
    for label, run in found.items():
        values = ((item.id, statistic(run.rows[index : index + 1])) for index, item in enumerate(run.items))
        scores[label] = {name: value for name, value in values if np.isfinite(value)}
    items = {item.id: item for run in found.values() for item in run.items}
    chosen: set[str] = set()
    for own in scores.values():
        for group in dict.fromkeys(item.group for item in items.values()):
            chosen |= set(page.extremes([name for name, item in items.items() if item.group == group], own))
    cards = []
    for name, item in items.items():
        if name not in chosen:
            continue
        figures = [page.figure(item.picture, "picture")]
        if not item.map:
            figures.append(page.statement("accepted", _short(_expected(item))))
        for label, run in found.items():
            given = run.given.get(name)
            value = f"{scores[label][name]:.3g}" if name in scores[label] else "no figure"
            if item.map:
                figures.append(page.figure(None if given is None else np.asarray(given), label, value))
            else:
                told = "no answer" if given is None else " / ".join(map(str, given))
                figures.append(page.statement(f"{label}: {value}", _short(told)))
        mine = [own[name] for own in scores.values() if name in own]
        text = _short(" / ".join(item.texts)) or "(a description)"
        cards.append(page.Card(name, item.group, text, sum(mine) / len(mine), figures))
    caption = f"The {page.GALLERY // 2} worst and best of each group and run, by {next(iter(benchmark.statistics))}."
    return page.gallery(cards, groups[1:], caption)


def _expected(item: Question) -> str:
    said: list[str] = []
    for value in item.facts.values():
        said += [str(one) for one in value] if isinstance(value, (list, tuple)) else [str(value)]
    return " / ".join(dict.fromkeys(said))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"
