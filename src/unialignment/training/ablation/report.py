"""From the records of runs to a table, a figure and raw data. Rebuilt from records alone; knows nothing of training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from unialignment.errors import InputError, UniAlignmentError
from unialignment.storage import atomic_file, write_json, write_text
from unialignment.training.ablation.config import AblationConfig, plan
from unialignment.training.ablation.statistics import holm, paired, spread
from unialignment.training.ablation.worker import finished
from unialignment.training.logging import duration, table

CURVES: tuple[tuple[str, str], ...] = (
    ("validation/task/generate", "held-out loss of generate"),
    ("validation/gap/generate/0.99/gap", "prompt gap of generate at σ = 0.99"),
    ("validation/task/caption", "held-out loss of caption"),
    ("validation/retrieval/r1", "retrieval R@1 among held-out pairs"),
)


def collect(config: AblationConfig) -> tuple[list[dict[str, Any]], int]:
    """Records of the finished runs in the ablation's order, and how many runs there are to be."""
    runs = list(plan(config))
    found = [finished(run, config.measure) for run in runs]
    return [record for record in found if record is not None], len(runs)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Raw records that an earlier report wrote.

    Raises:
        InputError: there are none, or a line is damaged.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except FileNotFoundError:
        raise InputError(f"no records at {path}; run the ablation first") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); restore it or run the ablation again") from error


def summarise(config: AblationConfig, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Spread of every metric in every arm, and paired comparisons, over whatever seeds are there.

    Returns:
        ``arms``: arm → metric → spread; ``comparisons``: one entry for each arm with a baseline and each tested metric.
    """
    by_arm = {arm: {r["seed"]: r for r in records if r["arm"] == arm} for arm in config.arms}
    arms: dict[str, Any] = {}
    for arm, runs in by_arm.items():
        names = sorted({name for record in runs.values() for name in record["metrics"]})
        arms[arm] = {
            "seeds": sorted(runs),
            "metrics": {
                name: asdict(spread([r["metrics"][name] for r in runs.values() if name in r["metrics"]]))
                for name in names
            },
            "cost": {
                key: asdict(spread([float(r["trained"][key]) for r in runs.values()]))
                for key in ("steps", "seconds", "cpu_seconds", "samples", "parameters")
            }
            if runs
            else {},
        }
    comparisons: list[dict[str, Any]] = []
    for arm, section in config.arms.items():
        if section.baseline is None:
            continue
        for metric in config.metrics:
            shared = [
                seed
                for seed in config.seeds
                if all(metric in by_arm[one].get(seed, {}).get("metrics", {}) for one in (arm, section.baseline))
            ]
            if shared:
                values, base = (
                    [by_arm[one][seed]["metrics"][metric] for seed in shared] for one in (arm, section.baseline)
                )
                comparisons.append(
                    {"arm": arm, "baseline": section.baseline, "metric": metric, "seeds": shared}
                    | asdict(paired(values, base))
                )
    tested = {str(i): c["p_t"] for i, c in enumerate(comparisons) if c["p_t"] is not None}
    for index, value in holm(tested).items():
        comparisons[int(index)]["p_t_holm"] = value
    return {"arms": arms, "comparisons": comparisons}


def write_report(config: AblationConfig, records: list[dict[str, Any]], planned: int, folder: Path) -> list[Path]:
    """Write ``records.jsonl``, ``summary.json``, ``table.md``, ``figure.json`` and ``figure.png``.

    Raises:
        InputError: no run has finished.
        UniAlignmentError: matplotlib is missing; everything but the picture is written.
    """
    if not records:
        raise InputError(f"no run of {config.name} has finished; run `unialign ablate` without --report-only first")
    summary = summarise(config, records)
    data = figure_data(config, records, summary)
    lines = [json.dumps(record, sort_keys=True, allow_nan=False) for record in records]
    write_text(folder / "records.jsonl", "\n".join(lines) + "\n")
    write_json(folder / "summary.json", summary)
    write_json(folder / "figure.json", data)
    write_text(folder / "table.md", markdown(config, records, summary, planned))
    draw_figure(data, folder / "figure.png")
    return [folder / name for name in ("table.md", "figure.png", "figure.json", "summary.json", "records.jsonl")]


# ---------------------------------------------------------------------------------------------------------------- table


def markdown(config: AblationConfig, records: list[dict[str, Any]], summary: dict[str, Any], planned: int) -> str:
    """The whole report as Markdown."""
    from unialignment.evaluation.results import METRICS

    def title(metric: str) -> str:
        return METRICS[metric].title if metric in METRICS else metric

    compute = config.compute
    spent = f"{compute.steps:,} steps" if compute.steps else duration(compute.seconds)
    parts = [
        f"# {config.name}",
        f"{len(records)} of {planned} runs finished; every run had {spent}. Written by `unialign ablate`; "
        "method and reading: docs/ablation.md.",
        "![curves and final differences](figure.png)",
        "## Arms",
        table(
            ("arm", "what it is", "seeds", "steps", "wall s", "CPU s", "parameters"),
            [
                (
                    arm,
                    section.title,
                    ", ".join(map(str, summary["arms"][arm]["seeds"])) or "–",
                    *(
                        _number(summary["arms"][arm]["cost"].get(key), 0)
                        for key in ("steps", "seconds", "cpu_seconds", "parameters")
                    ),
                )
                for arm, section in config.arms.items()
            ],
        ),
        "## Metrics: mean ± standard deviation over seeds",
    ]
    names = [name for name in config.metrics if any(name in one["metrics"] for one in summary["arms"].values())]
    names += sorted({n for one in summary["arms"].values() for n in one["metrics"]} - set(names))
    parts.append(
        table(
            ("metric", *config.arms),
            [
                (
                    f"{title(name)} (`{name}`)" if title(name) != name else f"`{name}`",
                    *(_number(summary["arms"][arm]["metrics"].get(name), 3) for arm in config.arms),
                )
                for name in names
            ],
        )
    )
    if summary["comparisons"]:
        least = max(c["p_least"] for c in summary["comparisons"])
        parts += [
            "## Paired by seed",
            "Difference: arm minus baseline, mean and 95 % t interval over seeds. `validation.*` are losses: lower is "
            "better. *p (t)*: Student's paired t; *Holm*: the same corrected for all rows of this table; *p (exact)*: "
            f"sign-flip permutation test, which with these seeds can't fall below {least:.3g}.",
            table(
                ("arm", "against", "metric", "n", "difference", "95 % interval", "p (t)", "Holm", "p (exact)"),
                [_comparison(entry) for entry in summary["comparisons"]],
            ),
        ]
    leaks = [record for record in records if record["leak"]]
    if leaks:
        parts += ["## Does the contrastive loss leak?", _leak_table(config, leaks)]
    return "\n\n".join(parts) + "\n"


def _number(value: Mapping[str, Any] | None, digits: int) -> str:
    if value is None:
        return "–"
    mean = f"{value['mean']:,.{digits}f}"
    return mean if value["deviation"] is None or digits == 0 else f"{mean} ± {value['deviation']:.{digits}f}"


def _comparison(entry: Mapping[str, Any]) -> tuple[str, ...]:
    difference = entry["difference"]
    interval = "–" if difference["low"] is None else f"{difference['low']:+.3f} … {difference['high']:+.3f}"
    p = ["–" if entry.get(key) is None else f"{entry[key]:.3f}" for key in ("p_t", "p_t_holm")]
    return (
        entry["arm"],
        entry["baseline"],
        f"`{entry['metric']}`",
        str(difference["count"]),
        f"{difference['mean']:+.3f}",
        interval,
        *p,
        f"{entry['p_exact']:.3f}",
    )


def _leak_table(config: AblationConfig, records: list[dict[str, Any]]) -> str:
    """One row for each arm with a contrastive loss and each split, means over seeds."""
    pool = records[0]["leak"]["held_out"]["pool"]
    rows = []
    for arm in config.arms:
        own = [record["leak"] for record in records if record["arm"] == arm]
        for split in ("train", "held_out") if own else ():
            entries = [leak[split] for leak in own]
            levels = list(entries[0]["as_trained"])
            middle = levels[len(levels) // 2]
            cells = [
                f"{np.mean([entry['as_trained'][middle] for entry in entries]):.2f}"
                + ("" if middle == "clean" else f" (σ = {middle})")
            ]
            cells.append(f"{np.mean([entry['blind'] for entry in entries]):.2f}")
            cells += [
                f"{np.mean([entry[key][middle] for entry in entries]):.2f}" for key in ("swapped_pass", "swapped_own")
            ]
            cells.append(f"{np.mean([entry['separate'] for entry in entries]):.2f}")
            rows.append((arm, entries[0]["form"], split.replace("_", " "), str(len(own)), *cells))
    words = (
        f"Recall at 1 among {pool} pairs (chance {1 / pool:.2f}), means over seeds. *As trained*: features computed as "
        "the loss computes them. *Blind*: pure noise in the picture's place, so that anything above chance is the text "
        "itself. *Swapped*: passed with another picture's caption; share of pictures nearest the caption of the pass, "
        "and nearest their own; at the same noise level as *as trained*, others in "
        "`records.jsonl`. *Separate*: each side embedded alone, as a dual encoder is used."
    )
    head = ("arm", "form", "scenes", "n", "as trained", "blind", "swapped: pass's", "swapped: own", "separate")
    return f"{words}\n\n{table(head, rows)}"


# --------------------------------------------------------------------------------------------------------------- figure


def figure_data(config: AblationConfig, records: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    """Everything that the figure shows: mean and deviation over seeds by step, and final differences."""
    panels = []
    for name, words in CURVES:
        series = {}
        for arm in config.arms:
            runs = [dict(map(tuple, r["curves"].get(name, []))) for r in records if r["arm"] == arm]
            runs = [run for run in runs if run]
            # Steps at which every seed was measured; by seconds, runs are validated at steps of their own.
            steps = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
            if steps:
                values = np.array([[run[step] for step in steps] for run in runs])
                series[arm] = {
                    "steps": steps,
                    "mean": values.mean(axis=0).tolist(),
                    "deviation": (values.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(len(steps))).tolist(),
                    "seeds": len(runs),
                }
        panels.append({"name": name, "title": words, "series": series})
    return {
        "title": config.name,
        "arms": {arm: section.title for arm, section in config.arms.items()},
        "panels": panels,
        "comparisons": summary["comparisons"],
    }


def draw_figure(data: Mapping[str, Any], path: Path) -> None:
    """The figure as PNG: curves against steps, then final differences with their intervals.

    Raises:
        UniAlignmentError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UniAlignmentError("the figure needs matplotlib; run: pip install 'unialignment[eval]'") from error
    colours = dict(zip(data["arms"], ("#777777", "#0072b2", "#d55e00", "#cc79a7", "#009e73", "#000000"), strict=False))
    metrics = list(dict.fromkeys(entry["metric"] for entry in data["comparisons"]))
    panels = data["panels"]
    columns = max(len(panels), len(metrics), 1)
    figure = Figure(figsize=(3.6 * columns, 6.4 if metrics else 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 if metrics else 1, columns, squeeze=False)
    for column in range(columns):
        axis = axes[0][column]
        if column >= len(panels):
            axis.set_axis_off()
            continue
        axis.set_title(panels[column]["title"], fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        for arm, series in panels[column]["series"].items():
            steps, mean, deviation = (np.array(series[key]) for key in ("steps", "mean", "deviation"))
            axis.plot(steps, mean, color=colours.get(arm), label=f"{arm} (n = {series['seeds']})", linewidth=1.3)
            axis.fill_between(
                steps, mean - deviation, mean + deviation, color=colours.get(arm), alpha=0.15, linewidth=0
            )
        axis.tick_params(labelsize=7)
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        axes[0][0].legend(handles, labels, fontsize=6.5)
    for column in range(columns if metrics else 0):
        axis = axes[1][column]
        if column >= len(metrics):
            axis.set_axis_off()
            continue
        rows = [entry for entry in data["comparisons"] if entry["metric"] == metrics[column]]
        axis.axvline(0, color="#bbbbbb", linewidth=0.8)
        for row, entry in enumerate(rows):
            found = entry["difference"]
            if found["low"] is not None:
                axis.plot([found["low"], found["high"]], [row, row], color=colours.get(entry["arm"]), linewidth=1.6)
            axis.plot([found["mean"]], [row], "o", color=colours.get(entry["arm"]), markersize=4)
        axis.set_yticks(range(len(rows)), [f"{e['arm']} − {e['baseline']}" for e in rows], fontsize=6.5)
        axis.invert_yaxis()
        axis.set_title(f"{metrics[column]}: difference, 95 %", fontsize=9)
        axis.tick_params(axis="x", labelsize=7)
        axis.locator_params(axis="x", nbins=4)  # more labels of small differences would overlap
    figure.suptitle(data["title"], fontsize=10)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
