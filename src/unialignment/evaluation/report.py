"""What a benchmark run found, to look at and to print: one self-contained HTML page, and a LaTeX table.

Several runs of one benchmark stand side by side. The page holds its pictures and a short script of its own and asks
nothing of any network; every text in it, judges' answers included, is escaped. Knows nothing of how results came about.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from unialignment.errors import InputError
from unialignment.evaluation.benchmarks import Benchmark, Item, select
from unialignment.evaluation.harness import aspects, item_scores, judge_folder
from unialignment.evaluation.radar import radar
from unialignment.evaluation.records import RecordLog
from unialignment.images import load_image
from unialignment.storage import atomic_file

THUMBNAIL = 160
"""Longest side of the page's pictures, in pixels."""
GALLERY = 12
"""Worst and best items that are shown, of each run, judge and group."""
OUTSIDE = (
    "This model was trained on drawn scenes of emoji alone: photographs, and most of these texts, are outside its "
    "world. Its figures say that the benchmark runs, not how good the architecture is."
)
COLOURS = ("#3b5bdb", "#e8590c", "#2f9e44", "#ae3ec9", "#c92a2a", "#0c8599", "#f08c00", "#495057")


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
    name = html.escape(benchmark.name)
    parts = [f"<h1>{name}</h1>"]
    for run in runs:
        lines = "".join(f"<li>{html.escape(note)}</li>" for note in notes(run))
        model = html.escape(json.dumps(run.summary["run"]["model"], ensure_ascii=False))
        parts.append(f"<p><b>{html.escape(run.label)}</b> <code>{model}</code></p><ul>{lines}</ul>")
    parts += ["<h2>Scores</h2>", _table(runs)]
    main = measures(runs)[-1]
    parts += [f"<h2>{html.escape(_title(main))} by group</h2>", _radar(runs, benchmark.groups)]
    parts.append(_chart(runs, benchmark.groups))
    parts += [_agreement(runs), "<h2>Items</h2>", _gallery(runs, select(benchmark.items, limit), benchmark.groups)]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{_STYLE}</style><main>{''.join(parts)}</main><script>{_SCRIPT}</script></html>\n"
    )
    with atomic_file(path) as file:
        file.write(page.encode())
    return path


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
    titles = [_title(key) for key in keys]
    head = "".join(f"<th>{name}</th>" for name in ("model", "judge", "group", *titles, "judged", "failed"))
    body = []
    for run, judge, rows in _rows(runs):
        for group, row in rows.items():
            cells = [html.escape(one) for one in (run.label, judge, group)]
            for key in keys:
                v = row.get(key)
                cells.append("–" if v is None else f"<b>{v[0]:.2f}</b> <small>[{v[1]:.2f}, {v[2]:.2f}]</small>")
            cells.append(f"{row['judged']} of {row['items']}" if "items" in row else "")
            cells.append(html.escape(", ".join(f"{n} {state}" for state, n in row.get("failed", {}).items())))
            body.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody>'
        f"</table></div><p>Means with bootstrap 95 % intervals; scores from 0 to {scale(runs):g}.</p>"
    )


def _title(key: str) -> str:
    return key.upper() if len(key) < 3 else key


def _radar(runs: Sequence[Run], groups: Sequence[str]) -> str:
    main = measures(runs)[-1]
    series = []
    for index, (run, judge, rows) in enumerate(_rows(runs)):
        values = {group: rows[group][main][0] for group in groups if rows.get(group, {}).get(main)}
        series.append((f"{run.label}, {judge}", COLOURS[index % len(COLOURS)], values))
    return radar(series, groups, scale(runs), f"{_title(main)} by group")


def _chart(runs: Sequence[Run], groups: Sequence[str]) -> str:
    """Bars of O with interval whiskers, one colour for each run and judge."""
    series, best, main = _rows(runs), scale(runs), measures(runs)[-1]
    bar, gap, height, left = 18, 26, 220, 34
    step = max(96, bar * len(series) + gap)  # a group's name has to fit under its bars
    width = left + step * len(groups)
    parts = [f'<svg viewBox="0 0 {width} {height + 50}" style="max-width:{max(width, 480)}px" role="img">']
    parts.append(f"<title>{html.escape(_title(main))} by group with 95 % intervals</title>")
    for tick in range(0, 11, 2):
        y = 10 + height * (1 - tick / 10)
        value = f"{tick * best / 10:g}"
        parts.append(f'<path d="M{left} {y:.1f}H{width}" class="grid"/><text x="4" y="{y + 4:.1f}">{value}</text>')
    for place, group in enumerate(groups):
        start = left + place * step + gap / 2
        for index, (run, judge, rows) in enumerate(series):
            found = rows.get(group, {}).get(main)
            if found is None:
                continue
            top, low, high = (10 + height * (1 - value / best) for value in found)
            x = start + index * bar
            label = html.escape(f"{run.label}, {judge}, {group}: {found[0]:.2f}")
            colour = COLOURS[index % len(COLOURS)]
            parts.append(
                f'<rect x="{x:.1f}" y="{top:.1f}" width="{bar - 3}" height="{10 + height - top:.1f}" fill="{colour}">'
                f"<title>{label}</title></rect>"
                f'<path class="whisker" d="M{x + (bar - 3) / 2:.1f} {low:.1f}V{high:.1f}"/>'
            )
        parts.append(f'<text x="{start:.1f}" y="{height + 30}">{html.escape(group)}</text>')
    keys = [
        f'<span><i style="background:{COLOURS[n % len(COLOURS)]}"></i>{html.escape(f"{run.label}, {judge}")}</span>'
        for n, (run, judge, _) in enumerate(series)
    ]
    return "".join(parts) + f'</svg><p class="keys">{"".join(keys)}</p>'


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
            ranked = [item.id for item in items if item.group == group and found[item.id]["status"] == "ok"]
            ranked.sort(key=lambda one: float(found[one][main]))
            chosen |= {*ranked[: GALLERY // 2], *ranked[-(GALLERY // 2) :]}
            failed = [i.id for i in items if i.group == group and found[i.id]["status"] not in ("ok", "not judged")]
            chosen |= set(failed[: GALLERY // 2])
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
            figures.append(_figure(item.photo, "source" if item.kind == "edit" else "photograph", ""))
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
            figures.append(_figure(picture, run.label, "".join(texts) or html.escape(str(record.get("error", "")))))
        mean = sum(values) / len(values) if values else -1.0
        cards.append(
            f'<article data-group="{html.escape(item.group)}" data-score="{mean:.4f}" data-id="{html.escape(item.id)}">'
            f"<h3>{html.escape(item.id)}</h3><p>{html.escape(item.prompt)}</p><div>{''.join(figures)}</div></article>"
        )
    choices = "".join(f'<option value="{html.escape(group)}">{html.escape(group)}</option>' for group in groups)
    return (
        f"<p>The {GALLERY // 2} worst and best of each group, run and judge, and some that failed.</p>"
        '<p><select id="order"><option value="worst">worst first</option><option value="best">best first</option>'
        '<option value="id">by name</option></select> '
        f'<select id="group"><option value="">all groups</option>{choices}</select></p>'
        f'<div id="gallery">{"".join(cards)}</div>'
    )


def _figure(path: Path | None, label: str, body: str) -> str:
    label = html.escape(label)
    picture = "<em>no picture</em>" if path is None else f'<img alt="{label}" src="{_data_uri(path)}">'
    return f"<figure>{picture}<figcaption><b>{label}</b>{body}</figcaption></figure>"


def _data_uri(path: Path) -> str:
    try:
        picture = load_image(path)
    except InputError:
        picture = Image.new("RGB", (8, 8), "gray")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
code, pre { font-size: .8rem; overflow-wrap: anywhere; white-space: pre-wrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th { cursor: pointer; text-align: left; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #8884; white-space: nowrap; }
svg { width: 100%; display: block; }
svg text { font-size: 11px; fill: currentColor; }
.grid { stroke: #8885; } .whisker { stroke: currentColor; stroke-width: 1.5; }
.keys span { margin-right: 1.2rem; } .keys i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
article { border-top: 1px solid #8884; padding: .5rem 0 1rem; }
article h3 { margin: .2rem 0; font-size: 1rem; } article > p { margin: 0 0 .6rem; max-width: 60rem; }
article > div { display: flex; flex-wrap: wrap; gap: 14px; }
figure { margin: 0; width: 180px; } figure img { max-width: 100%; display: block; }
figcaption { font-size: .8rem; } figcaption b { display: block; }
"""

_SCRIPT = """
const gallery = document.getElementById('gallery'), order = document.getElementById('order');
const group = document.getElementById('group');
function arrange() {
  const cards = [...gallery.children];
  const score = card => Number(card.dataset.score);
  const orders = { worst: (a, b) => score(a) - score(b), best: (a, b) => score(b) - score(a),
    id: (a, b) => a.dataset.id.localeCompare(b.dataset.id, undefined, { numeric: true }) };
  cards.sort(orders[order.value]).forEach(card => {
    card.hidden = group.value !== '' && card.dataset.group !== group.value;
    gallery.append(card);
  });
}
order.onchange = group.onchange = arrange;
arrange();
document.querySelectorAll('table.sortable th').forEach((head, column) => head.onclick = () => {
  const body = head.closest('table').tBodies[0], up = head.dataset.up !== '1';
  head.dataset.up = up ? '1' : '0';
  const text = row => row.cells[column].innerText;
  [...body.rows].sort((a, b) => text(a).localeCompare(text(b), undefined, { numeric: true }) * (up ? 1 : -1))
    .forEach(row => body.append(row));
});
"""
