"""Results as a Markdown page and plots. Knows nothing of how they were measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unialignment.benchmarking.measure import Timing
from unialignment.benchmarking.suite import Results
from unialignment.errors import UniAlignmentError
from unialignment.storage import write_text


def write(results: Results, folder: Path, name: str, command: str) -> list[Path]:
    """``NAME.json``, ``NAME.md`` and ``NAME-scaling.png`` in a folder.

    Args:
        results: What was measured.
        folder: Created if absent.
        name: Of the files.
        command: That repeats the measurement; stands on the page.

    Raises:
        UniAlignmentError: matplotlib isn't installed, and there is something to plot.
    """
    data = folder / f"{name}.json"
    write_text(data, json.dumps({"command": command, **results.to_json()}, indent=1) + "\n")
    written = [data]
    if results.scaling:
        picture = folder / f"{name}-scaling.png"
        plot(results.scaling, picture, title=f"{results.settings['size']} model, {results.settings['dtype']}")
        written.append(picture)
    page = folder / f"{name}.md"
    write_text(page, markdown(results, name, command))
    return [*written, page]


def markdown(results: Results, name: str, command: str) -> str:
    """The page."""
    machine, settings = results.machine, results.settings
    gemm = ", ".join(f"{kind} {rate / 1e9:.0f} GFLOP/s" for kind, rate in machine["gemm"].items())
    lines = [
        f"# {settings['size']} model, {settings['pixels']} px, {settings['dtype']}",
        "",
        f"`{command}`",
        "",
        f"{machine['name']}, {machine['threads']} thread(s), torch {machine['torch']}. Measured matrix products: "
        f"{gemm}; memory: {machine['bandwidth'] / 1e9:.1f} GB/s. {settings['repeats']} interleaved repetitions "
        "of steps; median (16th–84th percentile); those of everything else stand in the JSON. Working memory is that "
        "of prefill and a step.",
        "",
    ]
    if results.comparisons:
        lines += ["## Ratios", "", "| what | ratio |", "|---|---:|"]
        lines += [f"| {row['name']} | {Timing(**row['ratio'])} |" for row in results.comparisons]
        lines.append("")
    if results.rows:
        lines += [
            "## Tasks",
            "",
            "| case | way | ms a step | s whole | GFLOP a step | share of GEMM rate | working memory, MiB |",
            "|---|---|---:|---:|---:|---:|---:|",
        ]
        for row in results.rows:
            step, whole = row["step_seconds"], row["whole_seconds"]
            shown = "–" if whole is None else f"{whole['median']:.2f} ({row['steps']} steps)"
            lines.append(
                f"| {row['case']} | {row['way']} | {1e3 * step['median']:.1f} | {shown} "
                f"| {row['step_flops'] / 1e9:.2f} | {row['gemm_share']:.0%} | {row['working_bytes'] / 2**20:.1f} |"
            )
        lines.append("")
    if results.scaling:
        lines += [
            "## Scaling",
            "",
            f"![cost against size]({name}-scaling.png)",
            "",
            "| along | way | exponent of seconds | of operations | of working memory |",
            "|---|---|---:|---:|---:|",
        ]
        for sweep in results.scaling:
            for way, fit in sweep["exponents"].items():
                lines.append(
                    f"| {sweep['along']} | {way} | {fit['seconds']:.2f} | {fit['flops']:.2f} "
                    f"| {fit['working_bytes']:.2f} |"
                )
        lines.append("")
    return "\n".join(lines)


def plot(scaling: list[dict[str, Any]], path: Path, title: str) -> None:
    """Seconds a step (above) and working memory (below) against each size, with the roofline's bound.

    Raises:
        UniAlignmentError: matplotlib isn't installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UniAlignmentError("plots need matplotlib; run: pip install 'unialignment[eval]'") from error

    figure = Figure(figsize=(4 * len(scaling), 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(scaling), squeeze=False)
    colours = {"ours": "tab:blue", "published": "tab:red"}
    for column, sweep in enumerate(scaling):
        above, below = axes[0][column], axes[1][column]
        for way, fit in sweep["exponents"].items():
            own = [point for point in sweep["points"] if point["way"] == way]
            sizes = [point["size"] for point in own]
            median = [point["seconds"]["median"] for point in own]
            spread = [
                [m - point["seconds"]["low"] for m, point in zip(median, own, strict=True)],
                [point["seconds"]["high"] - m for m, point in zip(median, own, strict=True)],
            ]
            colour = colours.get(way)
            label = f"{way}, exponent {fit['seconds']:.2f}"
            above.errorbar(sizes, median, yerr=spread, marker="o", color=colour, label=label)
            bounds = [point["bound_seconds"] for point in own]
            above.plot(sizes, bounds, linestyle=":", color=colour, label=f"{way}, roofline bound")
            memory = [point["working_bytes"] / 2**20 for point in own]
            below.plot(sizes, memory, marker="o", color=colour, label=f"{way}, exponent {fit['working_bytes']:.2f}")
        for axis, what in ((above, "seconds a step"), (below, "working memory, MiB")):
            axis.set(xscale="log", yscale="log", xlabel=sweep["along"], ylabel=what)
            sizes = sorted({point["size"] for point in sweep["points"]})
            axis.set_xticks(sizes, [_short(size) for size in sizes])
            axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            axis.legend(fontsize="x-small")
            axis.grid(visible=True, which="both", alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _short(size: float) -> str:
    return f"{size / 1e6:.0f} M" if size >= 1e6 else f"{size:g}"
