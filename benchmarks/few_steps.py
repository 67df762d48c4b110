"""Few-step students beside their teacher: seconds, and SemGen-World's four groups on the same items and seeds.

    unialign distill configs/distill-nano.yaml
    python benchmarks/few_steps.py runs/distill-nano/model-20 --limit 25

Contestants draw the same batches in turns. Seconds are of drawing alone: the processor's with one thread, else of the
clock. `--limit 0 --batch-size 1 --threads 2` tells the seconds of one picture on two cores, without judging any. Scores
are those of `unialign eval semgen-world` (key semgen.overall); a contestant's over the teacher's is resampled over
items, since both drew the same ones. Judging a picture takes a few seconds: with 25 items a group, about as many
minutes in all as there are contestants times four.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import unialignment
from unialignment.benchmarking.measure import Timing, clock, ratio
from unialignment.evaluation import semgen_world
from unialignment.evaluation.contestants import ModelContestant
from unialignment.evaluation.judge import Judge
from unialignment.evaluation.metrics import mean_of_groups
from unialignment.evaluation.semgen_world import GROUPS
from unialignment.storage import write_json
from unialignment.world.presets import preset
from unialignment.world.sprites import SpritePack
from unialignment.world.stream import WorldStream

TEACHER = "teacher, default"
SAMPLERS: dict[str, dict[str, Any]] = {
    TEACHER: {},
    "teacher, DPM-Solver++ 6": {"num_inference_steps": 6, "solver": "dpmpp"},
}
"""What the teacher does without any student: its default, and the cheapest sampler of three times its speed."""


def paired_ratio(
    above: Sequence[Sequence[float]], below: Sequence[Sequence[float]], seed: int = 0, resamples: int = 2000
) -> tuple[float, float, float]:
    """Ratio of two contestants' mean of group means on the same items, with its 95 % bootstrap interval.

    Args:
        above: Scores of one, a list for each group.
        below: The other's, item for item.
        seed: Of the resampling.
        resamples: How many.
    """
    rng = np.random.default_rng(seed)
    tops, bottoms = np.zeros(resamples), np.zeros(resamples)
    for one, other in zip(above, below, strict=True):
        first, second = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
        chosen = rng.integers(0, len(first), size=(resamples, len(first)))
        tops += first[chosen].mean(axis=1)
        bottoms += second[chosen].mean(axis=1)
    value = sum(np.mean(group) for group in above) / max(1e-9, sum(np.mean(group) for group in below))
    low, high = np.quantile(tops / np.maximum(bottoms, 1e-9), [0.025, 0.975])
    return float(value), float(low), float(high)


def measure(
    contestants: dict[str, ModelContestant], stream: WorldStream, judge: Judge, limit: int, batch: int, seed: int
) -> dict[str, Any]:
    """Seconds and scores of every contestant; they take turns over batches of items."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    scores: dict[str, dict[str, list[float]]] = {name: {group: [] for group in GROUPS} for name in contestants}
    for group in GROUPS if limit else GROUPS[:1]:
        samples = [semgen_world.group_sample(stream, group, index) for index in range(limit or 5 * batch)]
        for turn, start in enumerate(range(0, len(samples), batch)):
            part = samples[start : start + batch]
            for name in list(contestants) if turn % 2 == 0 else reversed(list(contestants)):
                began = clock()
                outputs = contestants[name].outputs(part, seed + start)
                if len(part) == batch:  # smaller batches cost more an item
                    seconds[name].append((clock() - began) / batch)
                if limit:
                    marks = [semgen_world.marks(judge, *pair) for pair in zip(part, map(np.asarray, outputs))]
                    scores[name][group] += [mark.o for mark in marks]
        if limit:
            print(f"{group}: " + ", ".join(f"{n} {np.mean(s[group]):.2f}" for n, s in scores.items()), flush=True)
    first = next(iter(contestants))
    rows: dict[str, Any] = {}
    for name, own in scores.items():
        rows[name] = {
            "seconds_a_picture": vars(Timing.of(seconds[name])),
            "teacher_over_this": vars(ratio(seconds[first], seconds[name])),
        }
        if not limit:
            continue
        overall = mean_of_groups(list(own.values()), seed)
        value, low, high = paired_ratio(list(own.values()), list(scores[first].values()), seed)
        rows[name] |= {
            "groups": {group: float(np.mean(values)) for group, values in own.items()},
            "overall": {"value": overall.value, "low": overall.low, "high": overall.high},
            "of_the_teachers": {"value": value, "low": low, "high": high},
        }
    return rows


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="*", type=Path, help="model folders")
    parser.add_argument("--model", default="nano", help="the teacher")
    parser.add_argument("--limit", type=int, default=25, help="items a group; 0: nothing is judged, five batches timed")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    if args.batch_size < 1 or args.threads < 1 or 0 < args.limit < args.batch_size or args.limit < 0:
        parser.error(f"--limit {args.limit} must be 0 or hold a batch of {args.batch_size}; threads at least 1")
    torch.set_num_threads(args.threads)
    teacher = unialignment.load(args.model, device="cpu")
    pipes = {str(path): unialignment.load(path, device="cpu") for path in args.students}
    for pipe in (teacher, *pipes.values()):
        pipe.set_progress_bar_config(disable=True)
        pipe.generate(None, num_inference_steps=1, num_images_per_prompt=args.batch_size)  # pages, plans, imports
    contestants = {
        name: ModelContestant(teacher, args.batch_size, dict.fromkeys(("generate", "edit"), options))
        for name, options in SAMPLERS.items()
    }
    contestants |= {name: ModelContestant(pipe, args.batch_size) for name, pipe in pipes.items()}
    pack = SpritePack.load()
    stream = WorldStream(pack, preset("nano", pack), "held_out", args.seed)
    rows = measure(contestants, stream, Judge(pack, stream.preset), args.limit, args.batch_size, args.seed)
    print(f"\n{'':<40}{'ms':>7}{'faster':>8}  semgen.overall        of the teacher's")
    for name, row in rows.items():
        line = f"{name:<40}{1e3 * row['seconds_a_picture']['median']:7.0f}{row['teacher_over_this']['median']:8.2f}"
        if args.limit:
            own, of = row["overall"], row["of_the_teachers"]
            line += f"  {own['value']:.2f} ({own['low']:.2f}–{own['high']:.2f})   {100 * of['value']:.1f} % "
            line += f"({100 * of['low']:.1f}–{100 * of['high']:.1f})"
        print(line, flush=True)
    settings = {name: getattr(args, name) for name in ("model", "limit", "batch_size", "seed", "threads")}
    result = {**settings, "rows": rows}
    if args.json:
        write_json(args.json, result)
    return result


if __name__ == "__main__":
    main()
