"""Finds training runs on disk, says how each went, sets several side by side, and plots them.

Reads what every run writes (``config.yaml``, ``metrics.jsonl``, ``checkpoints/``, ``summary.md``), nothing else.
Knows nothing of models.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from unialignment.errors import InputError, UniAlignmentError
from unialignment.storage import atomic_file, write_text
from unialignment.training.checkpoint import CheckpointStore, read_state
from unialignment.training.logging import duration, read_metrics

PLOTTED = ("train/loss/total", "validation/mean", "train/gradient_norm", "train/samples_per_second")
"""Curves of a figure, by metric; ``validation/mean`` is the mean of the tasks' held-out losses."""

TITLES = {
    "train/loss/total": "training loss",
    "validation/mean": "held-out loss, mean over tasks",
    "train/gradient_norm": "gradient norm",
    "train/samples_per_second": "samples a second",
}


@dataclass(frozen=True)
class RunRecord:
    """One run as found on disk.

    Attributes:
        path: Its folder.
        config: Its resolved configuration.
        metrics: Records of ``metrics.jsonl``.
        finished: Whether it wrote its summary.
        state: Plain part of its latest checkpoint; empty without one.
    """

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    finished: bool
    state: dict[str, Any]

    @property
    def name(self) -> str:
        """Its name, with its folder where that differs."""
        name = str(self.config.get("run", {}).get("name", self.path.name))
        return name if name == self.path.name else f"{name} ({self.path.name})"

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it was recorded and finite."""
        steps, values = [], []
        for record in self.metrics:
            value = record.get(metric)
            if metric == "validation/mean":
                tasks = [v for k, v in record.items() if k.startswith("validation/task/") and v is not None]
                value = sum(tasks) / len(tasks) if tasks else None
            if value is not None:
                steps.append(int(record["step"]))
                values.append(float(value))
        return steps, values

    def facts(self) -> dict[str, Any]:
        """What the table shows; ``None`` where unknown."""
        losses, scores = self.series("train/loss/total")[1], self.series("validation/mean")[1]
        rates = self.series("train/samples_per_second")[1]
        used = self.series("train/model_flops_utilisation")[1]
        progress = self.state.get("progress", {})
        recent = losses[-10:]
        return {
            "run": self.name,
            "path": str(self.path),
            "status": "finished" if self.finished else "unfinished",
            "step": max([int(r["step"]) for r in self.metrics] + [int(progress.get("step", 0))], default=0),
            "max_steps": self.config.get("run", {}).get("max_steps"),
            "seconds": progress.get("elapsed"),
            "loss": sum(recent) / len(recent) if recent else None,
            "held_out": scores[-1] if scores else None,
            "best_held_out": min(scores) if scores else None,
            "samples_per_second": sum(rates) / len(rates) if rates else None,
            "model_flops_utilisation": sum(used) / len(used) if used else None,
            "processes": self.state.get("processes", 1),
            "skipped": self.state.get("guard", {}).get("skipped", self.state.get("skipped", 0)),
        }


def read_run(path: Path) -> RunRecord:
    """One run's records.

    Raises:
        InputError: the folder holds no run.
    """
    if not (path / "config.yaml").is_file() or not (path / "metrics.jsonl").is_file():
        raise InputError(f"{path} holds no run: a run's folder has config.yaml and metrics.jsonl.")
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path / 'config.yaml'} is not YAML: {' '.join(str(error).split())}.") from None
    latest = CheckpointStore(path / "checkpoints").newest()
    return RunRecord(
        path,
        config if isinstance(config, dict) else {},
        read_metrics(path / "metrics.jsonl"),
        (path / "summary.md").is_file(),
        {} if latest is None else read_state(latest),
    )


def find_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs that some folders are, or hold (two levels deep), by name of folder.

    Raises:
        InputError: a folder is missing or has none.
    """
    found: dict[Path, RunRecord] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"no folder {folder}; name a run's folder, or one that holds runs (default: runs).")
        candidates = [folder, *sorted(folder.glob("*")), *sorted(folder.glob("*/*"))]
        own = [c for c in candidates if (c / "config.yaml").is_file() and (c / "metrics.jsonl").is_file()]
        if not own:
            raise InputError(f"{folder} holds no runs: a run's folder has config.yaml and metrics.jsonl.")
        found |= {path.resolve(): read_run(path) for path in own}
    return list(found.values())


def differences(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Settings in which runs differ, by dotted key: the value of each run."""
    flat = [dict(_flatten(run.config)) for run in runs]
    keys = dict.fromkeys(key for each in flat for key in each)
    values = {key: [each.get(key) for each in flat] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row[1:])}


def _flatten(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    result: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, dict) and value:
            result += _flatten(value, f"{prefix}{key}.")
        else:
            result.append((prefix + key, value))
    return result


COLUMNS = {
    "run": "run",
    "status": "status",
    "step": "step",
    "seconds": "time",
    "loss": "loss",
    "held_out": "held out",
    "best_held_out": "best",
    "samples_per_second": "samples/s",
    "model_flops_utilisation": "MFU",
    "processes": "processes",
    "skipped": "skipped",
}
"""Heading of each column of the table, by fact."""


def cells(facts: dict[str, Any]) -> list[str]:
    """A row of the table."""
    row = []
    for name in COLUMNS:
        value = facts[name]
        if value is None:
            row.append("–")
        elif name == "seconds":
            row.append(duration(value))
        elif name == "model_flops_utilisation":
            row.append(f"{100 * value:.0f} %")
        elif name == "step" and facts["max_steps"]:
            row.append(f"{value}/{facts['max_steps']}")
        elif isinstance(value, float):
            row.append(f"{value:.1f}" if name == "samples_per_second" else f"{value:.4f}")
        else:
            row.append(str(value))
    return row


def table_lines(rows: Sequence[Sequence[str]], heading: Sequence[str]) -> list[str]:
    """Rows as text in columns."""
    every = [list(heading), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in every) for i in range(len(heading))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in every]


def plot(runs: Sequence[RunRecord], path: Path) -> Path:
    """Curves of the runs, as ``.png`` or ``.svg``, or as an ``.html`` page with the table and the differing settings.

    Raises:
        InputError: another ending.
        UniAlignmentError: matplotlib isn't installed.
        StorageError: the file could not be written.
    """
    if path.suffix not in (".png", ".svg", ".html"):
        raise InputError(f"--plot {path}: the name must end in .png, .svg or .html.")
    picture = _figure(runs, "svg" if path.suffix == ".svg" else "png")
    if path.suffix != ".html":
        with atomic_file(path) as file:
            file.write(picture)
        return path
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in COLUMNS.values())
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(run.facts())) + "</tr>" for run in runs
    )
    differing = "".join(
        f"<tr><td>{html.escape(key)}</td>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in values) + "</tr>"
        for key, values in differences(runs).items()
    )
    names = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    image = base64.b64encode(picture).decode()
    write_text(
        path,
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Training runs</title><style>"
        "body{font:15px/1.4 system-ui,sans-serif;margin:2rem;max-width:75rem}table{border-collapse:collapse;"
        "margin:1rem 0}td,th{padding:.25rem .7rem;border-bottom:1px solid #ccc;text-align:left}img{max-width:100%}"
        "</style><h1>Training runs</h1>"
        f"<table><tr>{heads}</tr>{rows}</table>"
        f"<img alt='Curves of the runs over optimizer steps' src='data:image/png;base64,{image}'>"
        + (f"<h2>Settings that differ</h2><table><tr><th>key</th>{names}</tr>{differing}</table>" if differing else "")
        + "</html>\n",
    )
    return path


def _figure(runs: Sequence[RunRecord], form: str) -> bytes:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UniAlignmentError("plots need matplotlib; run: pip install 'unialignment[train]'.") from error
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, metric in zip(axes.flat, PLOTTED, strict=True):
        drawn = False
        for run in runs:
            steps, values = run.series(metric)
            if steps:
                drawn = True
                axis.plot(steps, values, label=run.name, linewidth=1.2, marker="." if len(steps) < 20 else None)
        axis.set_title(TITLES[metric], fontsize=10)
        axis.set_xlabel("optimizer step", fontsize=9)
        axis.grid(alpha=0.3)
        if drawn:
            axis.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, dpi=110)
    return buffer.getvalue()
