"""The model card: tables from an evaluation's results, and a contact sheet of samples that nobody chose.

Renders what it is given and measures nothing. Every figure in the card comes from the results' JSON, and the card says
which command wrote that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unialignment.data.sample import Sample
from unialignment.evaluation.contestants import ModelContestant
from unialignment.evaluation.judge import Output
from unialignment.evaluation.results import BY_KIND, METRICS, Metric, Results, number
from unialignment.evaluation.sheet import Panel, Row, contact_sheet

RESULTS_FILE, SHEET_FILE, CARD_FILE = "evaluation.json", "samples.png", "card.md"
"""Names beside the weights."""

SHEET_TASKS = ("generate", "caption", "answer", "edit", "perceive", "control", "compose")


def _reference(tables: dict[str, dict[str, float]], key: str, metric: Metric) -> str:
    found = [(name, table[key]) for name, table in tables.items() if key in table]
    return ", ".join(f"{number(value, metric)} ({name})" for name, value in found) or "–"


def metric_table(results: Results) -> str:
    """Markdown table of every metric with interval, ceilings, floors and number of items."""
    lines = [
        "| task | metric | value | 95 % interval | floor | ceiling | n |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for key, metric in METRICS.items():
        if key not in results.metrics:
            continue
        item = results.metrics[key]
        lines.append(
            f"| {metric.task} | {metric.title} (`{key}`) | **{number(item.value, metric)}** "
            f"| {number(item.low, metric)} – {number(item.high, metric)} | {_reference(results.floors, key, metric)} "
            f"| {_reference(results.ceilings, key, metric)} | {item.count} |"
        )
    return "\n".join(lines)


def kind_table(results: Results, key: str) -> str:
    """Markdown table of a metric by kind of item; ``key`` is one of ``results.BY_KIND``."""
    share = METRICS[BY_KIND[key]]
    lines = [
        f"| kind (`{key}`) | {share.title} | 95 % interval | floor | ceiling | n |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for kind, item in sorted(results.by_kind[key].items()):
        interval = f"{number(item.low, share)} – {number(item.high, share)}"
        low, high = (_reference(table, f"{key}.{kind}", share) for table in (results.floors, results.ceilings))
        lines.append(f"| {kind} | {number(item.value, share)} | {interval} | {low} | {high} | {item.count} |")
    return "\n".join(lines)


def render_card(results: Results, facts: dict[str, Any] | None = None) -> str:
    """The card as Markdown.

    Args:
        results: An evaluation.
        facts: Further lines for the table at the top, e.g. parameters, classes, training.
    """
    meanings = "\n".join(f"- `{key}`: {metric.meaning}." for key, metric in METRICS.items() if key in results.metrics)
    rows = "\n".join(f"| {name} | {value} |" for name, value in (facts or {}).items())
    top = f"| | |\n|---|---|\n{rows}\n\n" if rows else ""
    tables = "\n\n".join(kind_table(results, key) for key in results.by_kind)
    by_kind = f"### Questions and edits by kind\n\n{tables}\n\n" if tables else ""
    sampler = {key: value for key, value in results.settings.items() if key != "shortened_prompts"}
    settings = f" Sampler settings other than the defaults: `{sampler}`." if sampler else ""
    if shortened := results.settings.get("shortened_prompts"):
        settings += f" {shortened} prompts were longer than the model reads and were cut."
    return f"""# Model card: {results.model}

{top}One diffusion transformer for every task below, trained on rendered scenes of the scene world's
`{results.preset}` preset. It knows that world's objects, styles and backgrounds, and nothing else: photographs, faces,
written words and anything outside the world's vocabulary are beyond it.

## Evaluation

`unialign eval semgen-world --model {results.model} --seed {results.seed} --limit {results.limit}`

Scenes are of the `{results.split}` split: each holds a combination (two classes together, or a class in a drawing
style) that occurs in no training scene. What is drawn is judged by the world's parser, texts by exact answers; no
network judges. Intervals are 95 % bootstrap intervals over items.{settings}

{metric_table(results)}

{meanings}

Ceilings: *truth* is the true picture or text, *reconstruction* the true picture after this model's image autoencoder.
Floors: *copy* gives the source back unchanged, *random* gives the target of another item (a random scene, a random
answer), *commonest* the most frequent answer to questions of the same kind.

`generate.objects` counts prompted objects one by one; `generate.scenes` counts prompts of which all objects were drawn.
Marks (`semgen.*`) go from 0 to 10 and are defined in `docs/evaluation.md`.

{by_kind}## Samples

![samples]({SHEET_FILE})

The first items of the held-out stream, with fixed seeds; none was chosen. The true result stands beside each picture.

## Intended use

Research, teaching and tests: a complete unified model that runs and trains on an ordinary processor. It is not meant
for making decisions, nor for making pictures of the real world.

## Licence

Weights: Apache-2.0. The artwork that the training pictures were composed of is listed with its licences in `NOTICE`.
"""


def sheet_rows(pipe: Any, samples: Mapping[str, Sequence[Sample]], seed: int) -> list[Row]:
    """Rows of the contact sheet: for each item its sources, what the model made or said, and the true result.

    Args:
        pipe: A loaded pipeline.
        samples: Items by task.
        seed: Item ``i`` is sampled with seed ``seed + i``.
    """
    contestant = ModelContestant(pipe)
    rows = []
    for task, items in samples.items():
        panels: list[Panel] = []
        groups = []
        for item, output in zip(items, contestant.outputs(items, seed), strict=True):
            group = _item(item, output)
            panels += group
            groups.append(len(group))
        rows.append(Row(task, tuple(panels), groups=tuple(groups)))
    return rows


def _item(item: Sample, output: Output | None) -> list[Panel]:
    if isinstance(output, str):
        asked = f"{item.prompt}\n" if item.prompt else ""
        return [Panel(item.sources[0], "", f"{asked}model: {output}\ntrue: {item.target_text}")]
    names = ["source"] if len(item.sources) == 1 else [f"image {i + 1}" for i in range(len(item.sources))]
    given = [Panel(source, name) for source, name in zip(item.sources, names, strict=True)]
    return [*given, Panel(output, "model", item.prompt), Panel(item.target_image, "true result")]


def sample_sheet(pipe: Any, stream: Any, per_task: int = 6, seed: int = 0) -> Image.Image:
    """Contact sheet of the first items of each task; nothing is chosen."""
    samples = {task: [stream.sample(task, index) for index in range(per_task)] for task in SHEET_TASKS}
    rows = sheet_rows(pipe, samples, seed)
    subtitle = f"first {per_task} items of each task, split {stream.split}, seed {seed}: not chosen"
    return contact_sheet(rows, "Samples", subtitle, columns=9, side=120)


def write_card(folder: Path, results: Results, sheet: Image.Image | None, facts: dict[str, Any] | None = None) -> Path:
    """Write card, results and contact sheet into a model's folder and return the card's path."""
    results.save(folder / RESULTS_FILE)
    if sheet is not None:
        sheet.save(folder / SHEET_FILE, optimize=True)
    path = folder / CARD_FILE
    path.write_text(render_card(results, facts), encoding="utf-8")
    return path
