"""What runs of SemGen-World found, to look at and to print: an HTML page with a gallery, and a LaTeX table.

Ceilings and floors stand in every table. Several runs over the same items stand side by side. Knows nothing of how
outputs are made or judged.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unialignment.data.sample import Sample
from unialignment.errors import InputError
from unialignment.evaluation import page
from unialignment.evaluation.radar import radar
from unialignment.evaluation.report import tex
from unialignment.evaluation.results import BY_KIND, METRICS, Metric, Results, number
from unialignment.evaluation.semgen_world import GROUPS
from unialignment.evaluation.world import PARTS, part_samples
from unialignment.evaluation.world_run import NAME, read_judgements, read_run
from unialignment.world.stream import WorldStream

MAIN = {
    "caption": "caption.cider",
    "answer": "vqa.accuracy",
    "infill": "infill.accuracy",
    "generate": "generate.objects",
    "edit": "edit.success",
    "control": "control.objects",
    "compose": "compose.subjects",
    "turns": "semgen.edit_multi_turns",
    **{group: f"semgen.{group}" for group in GROUPS},
}
"""Part to the score by which its items are sorted; maps have one score, or one that comes first."""
REFERENCES = "truth", "random"
"""Ceiling and floor that are drawn into the charts."""
WIDTH = 6
"""Metrics in one row of bars."""
LONGEST = 600
"""Characters of an answer that are shown."""


@dataclass(frozen=True)
class WorldRun:
    """One run folder.

    Attributes:
        label: How the report calls it.
        folder: Holds its records.
        identity: Content of ``run.json``.
        results: Content of ``results.json``.
    """

    label: str
    folder: Path
    identity: dict[str, Any]
    results: Results


def read_runs(folders: Sequence[Path]) -> list[WorldRun]:
    """Read run folders; labels are their names, numbered where two are the same.

    Raises:
        InputError: One holds no results, or they are over different items.
    """
    names = [folder.resolve().name for folder in folders]
    runs = []
    for index, (folder, name) in enumerate(zip(folders, names)):
        label = name if names.count(name) == 1 else f"{name} ({names[: index + 1].count(name)})"
        runs.append(WorldRun(label, folder, read_run(folder), Results.load(folder / "results.json")))
    first = runs[0].identity["benchmark"]
    for run in runs[1:]:
        if (other := run.identity["benchmark"]) != first:
            differing = ", ".join(key for key in first if first[key] != other.get(key))
            raise InputError(f"{run.folder} differs in {differing}; only runs over the same items stand side by side")
    return runs


def notes(run: WorldRun) -> list[str]:
    """What has to be known before a run's figures are read."""
    world = run.identity["benchmark"]
    found = [
        f"{run.results.limit} items in each part, split {world['split']}, seed {run.results.seed}. Pictures are judged "
        "by the world's parser, texts by exact answers; no network judges."
    ]
    if short := run.results.settings.get("shortened_prompts"):
        found.append(f"{short} prompts were longer than the model reads and were shortened to their first words.")
    if missing := [name for name in PARTS if name not in run.results.seconds]:
        found.append(f"Not evaluated: {', '.join(missing)}.")
    return found


def write_html(path: Path, runs: Sequence[WorldRun], stream: WorldStream) -> Path:
    """Write the page.

    Raises:
        StorageError: It can't be written.
    """
    parts = [page.introduction(run.label, _model(run), notes(run)) for run in runs]
    parts += ["<h2>Figures</h2>", _table(runs), "<h2>The four groups</h2>"]
    series = _series(runs, {group: f"semgen.{group}" for group in GROUPS})
    coloured = [
        (label, page.COLOURS[index % len(page.COLOURS)], {group: found[0] for group, found in values.items()})
        for index, (label, values) in enumerate(series)
    ]
    parts += [radar(coloured, GROUPS, 10.0, "O by group"), page.bars(series, GROUPS, 10.0, "O by group")]
    shares = [key for key, metric in METRICS.items() if metric.unit == "share" and _somewhere(runs, key)]
    parts += ["<h2>Tasks</h2>"] if shares else []
    for start in range(0, len(shares), WIDTH):
        keys = shares[start : start + WIDTH]
        parts.append(page.bars(_series(runs, {key: key for key in keys}), keys, 1.0, "shares"))
    parts += [_kinds(runs), "<h2>Items</h2>", _gallery(runs, stream)]
    return page.write(path, NAME, parts)


def _model(run: WorldRun) -> str:
    return json.dumps({"model": run.results.model, **run.identity["model"]}, ensure_ascii=False)


def latex(runs: Sequence[WorldRun]) -> str:
    """A ``booktabs`` table of every metric with its interval, floors and ceilings; notes follow as comments."""
    lines = [r"\begin{tabular}{lllrrr}", r"\toprule"]
    lines += [r"Model & Task & Metric & Value & Floor & Ceiling \\"]
    for run in runs:
        lines.append(r"\midrule")
        for key, metric in METRICS.items():
            if (found := run.results.metrics.get(key)) is None:
                continue
            value = f"{number(found.value, metric)} ({number(found.low, metric)}--{number(found.high, metric)})"
            floor, ceiling = _references(run.results, key, metric)
            cells = (run.label, metric.task, key, value, floor or "–", ceiling or "–")
            lines.append(" & ".join(tex(cell).replace("–", "--") for cell in cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    for run in runs:
        lines += [f"% {run.label!r}: {note!r}" for note in notes(run)]
    return "\n".join(lines) + "\n"


def _references(results: Results, key: str, metric: Metric) -> tuple[str, str]:
    """Floors and ceilings of a metric, in words."""
    floors, ceilings = (
        ", ".join(f"{number(table[key], metric)} ({name})" for name, table in tables.items() if key in table)
        for tables in (results.floors, results.ceilings)
    )
    return floors, ceilings


def _table(runs: Sequence[WorldRun]) -> str:
    rows = []
    for key, metric in METRICS.items():
        for run in runs:
            if (found := run.results.metrics.get(key)) is None:
                continue
            floor, ceiling = _references(run.results, key, metric)
            value = f"<b>{number(found.value, metric)}</b> <small>[{number(found.low, metric)}, "
            texts = (metric.task, f"{metric.title} ({key})", run.label)
            cells = [*map(html.escape, texts), f"{value}{number(found.high, metric)}]</small>"]
            rows.append([*cells, *map(html.escape, (floor or "–", ceiling or "–")), str(found.count)])
    head = ("task", "metric", "model", "value", "floor", "ceiling", "n")
    return page.table(head, rows, "Means with bootstrap 95 % intervals over items.")


def _kinds(runs: Sequence[WorldRun]) -> str:
    rows = []
    broken_down = [
        (run, key, kind) for key in BY_KIND for run in runs for kind in sorted(run.results.by_kind.get(key, ()))
    ]
    for run, key, kind in broken_down:
        found, metric = run.results.by_kind[key][kind], METRICS[BY_KIND[key]]
        floor, ceiling = _references(run.results, f"{key}.{kind}", metric)
        interval = f"[{number(found.low, metric)}, {number(found.high, metric)}]"
        texts = (metric.task, kind, run.label)
        cells = [*map(html.escape, texts), f"<b>{number(found.value, metric)}</b> {interval}"]
        rows.append([*cells, *map(html.escape, (floor or "–", ceiling or "–")), str(found.count)])
    head = ("task", "kind", "model", "right", "floor", "ceiling", "n")
    return "<h2>Questions and edits by kind</h2>" + page.table(head, rows) if rows else ""


def _somewhere(runs: Sequence[WorldRun], key: str) -> bool:
    return any(key in run.results.metrics for run in runs)


def _series(runs: Sequence[WorldRun], keys: Mapping[str, str]) -> list[tuple[str, dict[str, list[float]]]]:
    """Label and, by name, value and interval of every run; then of ceiling and floor, as the first run has them."""
    found = []
    for run in runs:
        there = {name: run.results.metrics[key] for name, key in keys.items() if key in run.results.metrics}
        found.append((run.label, {name: [one.value, one.low, one.high] for name, one in there.items()}))
    for reference in REFERENCES:
        table = {**runs[0].results.floors, **runs[0].results.ceilings}.get(reference, {})
        if values := {name: [table[key]] * 3 for name, key in keys.items() if key in table}:
            found.append((reference, values))
    return found


def _gallery(runs: Sequence[WorldRun], stream: WorldStream) -> str:
    cards, shown = [], []
    for name in PARTS:
        judged = {run.label: read_judgements(run.folder, name) for run in runs}
        if not any(judged.values()):
            continue
        shown.append(name)
        samples = part_samples(stream, name, runs[0].results.limit)
        scores = {
            label: {str(row): _main(name, record["scores"]) for row, record in records.items()}
            for label, records in judged.items()
        }
        ids = [str(row) for row in range(len(samples))]
        chosen = {one for values in scores.values() for one in page.extremes(ids, values)}
        for row, sample in enumerate(samples):
            if str(row) not in chosen:
                continue
            mine = [values[str(row)] for values in scores.values() if str(row) in values]
            figures = _context(sample)
            figures += [
                _given(run, name, records[row])
                for run, records in zip(runs, judged.values(), strict=True)
                if row in records
            ]
            text = sample.prompt or sample.kind or name
            cards.append(page.Card(f"{name}/{row}", name, text, sum(mine) / len(mine), figures))
    return page.gallery(cards, shown, f"The {page.GALLERY // 2} worst and best of each part and run.")


def _main(name: str, scores: Mapping[str, float]) -> float:
    key = MAIN.get(name, next(iter(scores), ""))
    value = scores.get(key, 0.0)
    return value / 10 if METRICS[key].unit != "share" else value


def _context(sample: Sample) -> list[str]:
    """What was given, and what would have been right."""
    figures = [
        page.figure(source, "source" if len(sample.sources) == 1 else f"source {index}")
        for index, source in enumerate(sample.sources, 1)
    ]
    if sample.target_image is not None:
        return [*figures, page.figure(sample.target_image, "right")]
    return [*figures, page.statement("right", sample.target_text or "")]


def _given(run: WorldRun, name: str, record: Mapping[str, Any]) -> str:
    scores = ", ".join(f"{key.removeprefix('semgen.')} {value:.3g}" for key, value in record["scores"].items())
    if "text" in record:
        return page.statement(run.label, f"{record['text'][:LONGEST]} ({scores})")
    body = html.escape(scores)
    if (seen := record.get("seen")) is not None:
        items = [f"{one['style']} {one['name']}, {one['size']} ({one['score']:.2f})" for one in seen["objects"]]
        told = "\n".join([f"background: {seen['background']}", *items])
        body = f"<details><summary>{body}</summary><pre>{html.escape(told)}</pre></details>"
    return page.figure(run.folder / "parts" / name / str(record["picture"]), run.label, body)
