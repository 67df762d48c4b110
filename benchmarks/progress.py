"""The bundled model's held-out metrics against the hours of training behind it, beside their floors: a picture.

    python benchmarks/progress.py

Reads `docs/training/curve.json`, one entry for each set of weights that was bundled, with the metrics of the evaluation
that was committed with it; writes `docs/training/curve.png`. `--add EVALUATION --run NAME --hours H` appends one first.
Hours are of one processor core: of every run that the weights descend from, the autoencoder's included.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from unialignment.storage import write_json

FOLDER = Path(__file__).parents[1] / "docs" / "training"
FLOORS = {
    "caption.objects": 0.85,
    "vqa.accuracy": 0.88,
    "generate.objects": 0.45,
    "generate.relations": 0.40,
    "edit.success": 0.35,
    "edit.psnr_outside": 23.0,
    "segment.iou": 0.65,
    "depth.delta1": 0.75,
    "edges.f": 0.50,
    "compose.subjects": 0.25,
    "retrieval.r1": 0.60,
    "semgen.overall": 4.5,
}
"""What the project asks of the bundled model at least."""


def entry(evaluation: dict[str, Any], run: str, hours: float) -> dict[str, Any]:
    """One point of the curve: value, low and high of each metric that has a floor."""
    intervals = evaluation["intervals"]
    metrics = {key: [round(each, 4) for each in (evaluation[key], *intervals[key])] for key in FLOORS}
    return {"run": run, "core_hours": hours, "metrics": metrics}


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """A panel for each metric: values with their intervals, and the floor as a line."""
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (key, floor) in zip(figure.subplots(3, 4).flat, FLOORS.items(), strict=True):
        known = [point for point in points if key in point["metrics"]]
        hours = [point["core_hours"] for point in known]
        values, lows, highs = zip(*(point["metrics"][key] for point in known), strict=True)
        below = [value - low for value, low in zip(values, lows, strict=True)]
        above = [high - value for value, high in zip(values, highs, strict=True)]
        axis.errorbar(hours, values, yerr=(below, above), marker="o", capsize=3)
        axis.axhline(floor, linestyle="--", color="tab:red", label="floor")
        axis.set(title=key, ylim=(0, max(*highs, floor) * 1.05))
        axis.set_xlabel("core-hours")
    figure.savefig(path, dpi=90, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, metavar="EVALUATION", help="evaluation.json of new weights")
    parser.add_argument("--run", help="name of the run that they come from")
    parser.add_argument("--hours", type=float, help="core-hours behind them")
    given = parser.parse_args()
    record = json.loads((FOLDER / "curve.json").read_text())
    if given.add is not None:
        if given.run is None or given.hours is None:
            parser.error("--add needs --run and --hours")
        record["points"].append(entry(json.loads(given.add.read_text()), given.run, given.hours))
        write_json(FOLDER / "curve.json", record)
    plot(record["points"], FOLDER / "curve.png")


if __name__ == "__main__":
    main()
