"""What a judged benchmark's run found, to look at and to print: one HTML page, and a LaTeX table.

Several runs of one benchmark stand side by side. Every text, judges' answers included, is escaped. Knows nothing of how
results came about.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unialignment.errors import InputError
from unialignment.evaluation import page
from unialignment.evaluation.benchmarks import Benchmark, Item, select
from unialignment.evaluation.harness import aspects, item_scores, judge_folder
from unialignment.evaluation.radar import radar
from unialignment.evaluation.records import RecordLog

OUTSIDE = (
    "This model was trained on drawn scenes of emoji alone: photographs, and most of these texts, are outside its "
    "world. Its figures say that the benchmark runs, not how good the architecture is."
)


@dataclass(frozen=True)
class Run:
    """One run folder with its summary.

    Attributes:
        label: How the report calls it.
        folder: Holds records and pictures.
        summary: Content of ``results.json``.
    """

    label: str
    folder: Path
    summary: dict[str, Any]


def measures(runs: Sequence[Run]) -> list[str]:
    """What items of these runs were given."""
    return list(runs[0].summary.get("measures", ("ic", "pq", "o")))


def scale(runs: Sequence[Run]) -> float:
    """The best value of a measure."""
    return float(runs[0].summary.get("scale", 10.0))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders; labels are their names, made different where two are the same.

    Raises:
        InputError: One holds no results, or they are of different benchmarks or protocols.
    """
    runs: list[Run] = []
    for folder in folders:
        try:
            summary = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            summary["judges"], summary["identities"], summary["run"]["benchmark"]["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder} holds no results; run unialign eval semgen-bench --out {folder}") from error
        name = folder.resolve().name
        taken = [run.label for run in runs]
        label = next(one for one in (name, *(f"{name} ({n})" for n in range(2, 1000))) if one not in taken)
        runs.append(Run(label, folder, summary))
    for what, values in (
        ("benchmarks", {run.summary["run"]["benchmark"]["fingerprint"] for run in runs}),
        ("protocols", {one["protocol"] for run in runs for one in run.summary["identities"].values()}),
        ("numbers of items", {run.summary["items"] for run in runs}),
    ):
        if len(values) > 1:
            raise InputError(f"the runs are of different {what}; only runs of the same can stand side by side")
    return runs


def notes(run: Run) -> list[str]:
    """What has to be known before a run's figures are read."""
    found = list(run.summary.get("notes", ()))
    if run.summary["run"]["model"].get("world") == "scenes":
        found.append(OUTSIDE)
    if short := run.summary.get("shortened_prompts"):
        found.append(f"{short} prompts were longer than the model reads and were shortened to their first words.")
    for judge, tested in run.summary.get("calibration", {}).items():
        found.append(f"Judge {judge}: {tested['verdict']}")
    return found


def write_html(path: Path, runs: Sequence[Run], benchmark: Benchmark, limit: int | None = None) -> Path:
    """Write the page.

    Raises:
        StorageError: It can't be written.
    """
    main = measures(runs)[-1]
    parts = [
        page.introduction(run.label, json.dumps(run.summary["run"]["model"], ensure_ascii=False), notes(run))
        for run in runs
    ]
    parts += ["<h2>Scores</h2>", _table(runs)]
    title = f"{_title(main)} by group"
    parts += [f"<h2>{html.escape(title)}</h2>", _radar(runs, benchmark.groups)]
    parts.append(page.bars(_series(runs, benchmark.groups), benchmark.groups, scale(runs), title))
    parts += [
        _agreement(runs),
        _calibration(runs),
        "<h2>Items</h2>",
        _gallery(runs, select(benchmark.items, limit), benchmark.groups),
    ]
    return page.write(path, benchmark.name, parts)


def latex(runs: Sequence[Run]) -> str:
    """A ``booktabs`` table of IC, PQ and O (or what there is) with 95 % intervals; notes follow as comments."""
    keys = measures(runs)
    head = " & ".join(["Model", "Judge", "Group", *(tex(_title(key)) for key in keys)])
    lines = [rf"\begin{{tabular}}{{lll{'r' * len(keys)}}}", r"\toprule", head + r" \\"]
    for run, judge, rows in _rows(runs):
        lines.append(r"\midrule")
        for group, row in rows.items():
            cells = ["--" if (v := row.get(key)) is None else f"{v[0]:.2f} [{v[1]:.2f}, {v[2]:.2f}]" for key in keys]
            lines.append(" & ".join([*map(tex, (run.label, judge, group)), *cells]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    for run in runs:
        lines += [f"% {run.label!r}: {note!r}" for note in notes(run)]
    return "\n".join(lines) + "\n"


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "[": "{[}", "*": "{*}"}
"""The last two would be read as arguments of the row end before them."""


def tex(text: str) -> str:
    """Text as LaTeX prints it."""
    text = re.sub(r"\s+", " ", text)
    return re.sub(r"[\\~^&%$#_{}\[*]", lambda match: _TEX.get(match.group(), "\\" + match.group()), text)


def _rows(runs: Sequence[Run]) -> list[tuple[Run, str, dict[str, Any]]]:
    found = []
    for run in runs:
        for judge, judged in run.summary["judges"].items():
            rows = dict(judged["groups"])
            if "mean" in judged:
                rows["mean of groups"] = judged["mean"]
            found.append((run, judge, rows))
    return found


def _table(runs: Sequence[Run]) -> str:
    keys = measures(runs)
    body = []
    for run, judge, rows in _rows(runs):
        for group, row in rows.items():
            cells = [html.escape(one) for one in (run.label, judge, group)]
            for key in keys:
                v = row.get(key)
                cells.append("–" if v is None else f"<b>{v[0]:.2f}</b> <small>[{v[1]:.2f}, {v[2]:.2f}]</small>")
            cells.append(f"{row['judged']} of {row['items']}" if "items" in row else "")
            cells.append(html.escape(", ".join(f"{n} {state}" for state, n in row.get("failed", {}).items())))
            body.append(cells)
    head = ("model", "judge", "group", *map(_title, keys), "judged", "failed")
    return page.table(head, body, f"Means with bootstrap 95 % intervals; scores from 0 to {scale(runs):g}.")


def _title(key: str) -> str:
    return key.upper() if len(key) < 3 else key


def _series(runs: Sequence[Run], groups: Sequence[str]) -> list[tuple[str, dict[str, list[float]]]]:
    """Label, and mean with its interval by group, of each run and judge."""
    main = measures(runs)[-1]
    return [
        (f"{run.label}, {judge}", {group: rows[group][main] for group in groups if rows.get(group, {}).get(main)})
        for run, judge, rows in _rows(runs)
    ]


def _radar(runs: Sequence[Run], groups: Sequence[str]) -> str:
    series = [
        (label, page.COLOURS[index % len(page.COLOURS)], {group: found[0] for group, found in values.items()})
        for index, (label, values) in enumerate(_series(runs, groups))
    ]
    return radar(series, groups, scale(runs), f"{_title(measures(runs)[-1])} by group")


def _agreement(runs: Sequence[Run]) -> str:
    lines = []
    for run in runs:
        if len(run.summary["judges"]) > 1:
            alphas = run.summary["agreement"].items()
            text = ", ".join(f"{key.upper()} {'undefined' if a is None else f'{a:.2f}'}" for key, a in alphas)
            lines.append(
                f"<p>{html.escape(run.label)}: agreement of judges (Krippendorff's alpha, interval): {text}.</p>"
            )
    return "".join(lines)


def _calibration(runs: Sequence[Run]) -> str:
    """How well each judge tells right pictures from faulty ones, fault by fault."""
    rows = []
    for run in runs:
        for judge, tested in run.summary.get("calibration", {}).items():
            for fault in tested.get("faults", ()):
                what = (run.label, judge, fault["kind"], fault["fault"], fault["aspect"])
                values = ("–" if fault[key] is None else f"{fault[key]:.2f}" for key in ("auc", "right", "faulty"))
                rows.append([*map(html.escape, what), *values, str(fault["n"])])
    if not rows:
        return ""
    head = ("model", "judge", "kind", "fault", "aspect", "AUC", "right", "faulty", "n")
    caption = "AUC: how often the right picture scores higher than the faulty one, ties counting half; means of both."
    return "<h2>Calibration of judges</h2>" + page.table(head, rows, caption)


def _gallery(runs: Sequence[Run], items: Sequence[Item], groups: Sequence[str]) -> str:
    """Items that are among the worst or best of any run and judge; every run's picture of them, side by side."""
    keys, main = measures(runs), measures(runs)[-1]
    rule = "mean" if runs[0].summary.get("rule") == "mean" else "all"
    scores = {
        (run.label, judge): item_scores(run.folder, items, judge, rule, scale(runs)) for run, judge, _ in _rows(runs)
    }
    chosen: set[str] = set()
    for found in scores.values():
        for group in groups:
            good = {one: float(row[main]) for one, row in found.items() if row["status"] == "ok"}
            chosen |= set(page.extremes([item.id for item in items if item.group == group], good))
            failed = [i.id for i in items if i.group == group and found[i.id]["status"] not in ("ok", "not judged")]
            chosen |= set(failed[: page.GALLERY // 2])
    drawn = {run.label: RecordLog(run.folder / "generated.jsonl", ("item",)) for run in runs}
    said = {
        (run.label, judge): RecordLog(
            judge_folder(run.folder, judge) / "judgements.jsonl", ("item", "aspect", "sha256")
        )
        for run, judge, _ in _rows(runs)
    }
    cards = []
    for item in items:
        if item.id not in chosen:
            continue
        figures = []
        if item.photo is not None:
            figures.append(page.figure(item.photo, "source" if item.kind == "edit" else "photograph"))
        values = []
        for run in runs:
            record = drawn[run.label].get(item.id) or {}
            texts = []
            for judge in run.summary["judges"]:
                scored = scores[run.label, judge][item.id]
                line = str(scored["status"])
                if line == "ok":
                    values.append(float(scored[main]))
                    line = ", ".join(f"{key.upper()} {scored[key]:.1f}" for key in keys)
                log = said[run.label, judge]
                answers = [log.get(item.id, aspect, record.get("sha256")) for aspect in aspects(item)]
                raw = "\n".join(one["raw"][-1] for one in answers if one and one["raw"])
                texts.append(
                    f"<details><summary>{html.escape(f'{judge}: {line}')}</summary>"
                    f"<pre>{html.escape(raw[:1500])}</pre></details>"
                )
            if record.get("shortened"):
                texts.append(f"<small>read: {html.escape(' / '.join(map(str, record['read'])))}</small>")
            picture = run.folder / record["picture"] if record.get("status") == "ok" else None
            figures.append(page.figure(picture, run.label, "".join(texts) or html.escape(str(record.get("error", "")))))
        mean = sum(values) / len(values) if values else -1.0
        cards.append(page.Card(item.id, item.group, item.prompt, mean, figures))
    caption = f"The {page.GALLERY // 2} worst and best of each group, run and judge, and some that failed."
    return page.gallery(cards, groups, caption)
