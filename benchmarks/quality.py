"""What faster samplers cost in quality: settings of the bundled model side by side on SemGen-World's held-out scenes.

For each task several settings draw or write the same items with the same seeds, in turns of one batch; seconds are the
processor's (with one thread), quality is the judge's.

    python benchmarks/quality.py --tasks caption,answer --limit 48 --json benchmarks/results/quality-nano-texts.json

The published procedure for texts is what the released pipeline does (`unialignment.benchmarking.published_text`): 64
steps of ancestral sampling and a last pass, one picture at a time, everything computed at every pass, with the same
weights on the same canvas of 40 positions for captions and 8 for answers. The text encoder, which it runs at every
pass, too, is a table here and costs nothing. Both guidance branches of pictures are as the pipeline's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import unialignment
from unialignment.benchmarking.measure import Timing, clock, ratio
from unialignment.benchmarking.published_text import write_published
from unialignment.evaluation.contestants import ModelContestant
from unialignment.evaluation.judge import Judge
from unialignment.evaluation.results import summarise
from unialignment.evaluation.world import held_out_samples, score_all
from unialignment.images import fit_image, load_image
from unialignment.storage import write_json
from unialignment.tasks import TASKS
from unialignment.world.presets import preset
from unialignment.world.sprites import SpritePack
from unialignment.world.stream import WorldStream

PUBLISHED = "published procedure"
SINGLY = {"use_cache": False, "batch_size": 1}
OFF = {"confidence_threshold": 1.0}
DRAWING: dict[str, dict[str, Any]] = {
    "default (nano: stochastic 20)": {},
    "stochastic 10": {"num_inference_steps": 10, "solver": "stochastic"},
    "stochastic 6": {"num_inference_steps": 6, "solver": "stochastic"},
    "euler 20": {"solver": "euler"},
    "euler 10": {"num_inference_steps": 10, "solver": "euler"},
    "heun 5": {"num_inference_steps": 5, "solver": "heun"},
    "dpmpp 10": {"num_inference_steps": 10, "solver": "dpmpp"},
    "dpmpp 6": {"num_inference_steps": 6, "solver": "dpmpp"},
    "default, guided below 0.8": {"guidance_interval": (0.0, 0.8)},
    "default, guided above 0.4": {"guidance_interval": (0.4, 1.0)},
    "default, bfloat16": {"dtype": "bfloat16"},
    "default, no cache, one by one": {"use_cache": False, "batch_size": 1},
}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "caption": {
        "default: up to 16 passes, threshold 0.9": {},
        "threshold 0.8": {"confidence_threshold": 0.8},
        "threshold 0.7": {"confidence_threshold": 0.7},
        "16 passes": OFF,
        "8 passes": {**OFF, "num_inference_steps": 8},
        "default, one by one": {"batch_size": 1},
        "16 passes, no cache, one by one": {**OFF, **SINGLY},
        "default, bfloat16": {"dtype": "bfloat16"},
        PUBLISHED: {},
        f"{PUBLISHED}, bfloat16": {"dtype": "bfloat16"},
    },
    "answer": {
        "default: up to 4 passes, threshold 0.9": {},
        "threshold 0.7": {"confidence_threshold": 0.7},
        "4 passes": {**OFF, "num_inference_steps": 4},
        "1 pass": {**OFF, "num_inference_steps": 1},
        "default, one by one": {"batch_size": 1},
        "4 passes, no cache, one by one": {**OFF, "num_inference_steps": 4, **SINGLY},
        "default, bfloat16": {"dtype": "bfloat16"},
        PUBLISHED: {},
        f"{PUBLISHED}, bfloat16": {"dtype": "bfloat16"},
    },
    "generate": DRAWING,
    "edit": DRAWING,
}
SHOWN = {
    "caption": "caption.objects",
    "answer": "vqa.accuracy",
    "generate": "generate.objects",
    "edit": "edit.success",
}
"""The metric in the printed table; all of them are in the JSON."""


class Published:
    """The published procedure for texts.

    Attributes:
        passes: Network evaluations of every text so far.
    """

    def __init__(self, pipe: Any, length: int) -> None:
        self.pipe, self.length = pipe, length
        self.passes: list[int] = []

    def outputs(self, samples: list[Any], seed: int) -> list[Any]:
        side = self.pipe.default_size
        pictures = [fit_image(load_image(sample.sources[0]), side, side) for sample in samples]
        questions = [sample.prompt or "" for sample in samples]
        written = write_published(self.pipe, pictures, questions, self.length, range(seed, seed + len(samples)))
        self.passes += written.passes
        return list(written.texts)


class Said:
    """Outputs that were computed, and timed, before they are judged."""

    def __init__(self, said: list[Any]) -> None:
        self.said = said

    def outputs(self, *_: Any) -> list[Any]:
        return self.said


def measure(
    pipes: dict[str, Any], stream: Any, judge: Any, task: str, limit: int, batch: int, seed: int
) -> dict[str, Any]:
    """Seconds and quality of every setting of a task; settings take turns over batches of items."""
    samples = held_out_samples(stream, task, limit)
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS[task]}
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS[task]}
    contestants: dict[str, Any] = {}
    for name, options in SETTINGS[task].items():
        own = {key: value for key, value in options.items() if key not in ("batch_size", "dtype")}
        pipe = pipes[options.get("dtype", "float32")]
        if name.startswith(PUBLISHED):
            contestants[name] = Published(pipe, TASKS.get(task).target_length)
        else:
            contestants[name] = ModelContestant(pipe, options.get("batch_size", batch), {task: own})
    for pipe in pipes.values():
        pipe.run(task, **_warm_up(samples[0]), num_inference_steps=1)
    for turn, start in enumerate(range(0, len(samples), batch)):
        part = samples[start : start + batch]
        names = list(contestants)
        for name in names if turn % 2 == 0 else names[::-1]:
            began = clock()
            outputs = contestants[name].outputs(part, seed + start)
            seconds[name].append((clock() - began) / len(part))
            scores[name] += score_all(judge, Said(outputs), part, seed + start)
    first = next(iter(seconds))
    return {
        name: {
            "options": {key: list(v) if isinstance(v, tuple) else v for key, v in SETTINGS[task][name].items()},
            "seconds_an_item": vars(Timing.of(seconds[name])),
            "default_over_this": vars(ratio(seconds[first], seconds[name])),
            **_published_passes(contestants[name]),
            "metrics": {
                key: {"value": value.value, "low": value.low, "high": value.high}
                for key, value in summarise(scores[name], seed).items()
            },
        }
        for name in seconds
    }


def _published_passes(contestant: Any) -> dict[str, float]:
    if not isinstance(contestant, Published):
        return {}
    return {"passes_a_text": sum(contestant.passes) / len(contestant.passes)}


def _warm_up(sample: Any) -> dict[str, Any]:
    return {"prompt": sample.prompt or None, "images": list(sample.sources) or None}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--tasks", default=",".join(SETTINGS))
    parser.add_argument("--limit", type=int, default=48, help="items a task")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    pack = SpritePack.load()
    stream = WorldStream(pack, preset("nano", pack), "held_out", args.seed)
    judge = Judge(pack, stream.preset)
    pipes = {dtype: unialignment.load(args.model, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16")}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    results: dict[str, Any] = {"model": args.model, "limit": args.limit, "batch_size": args.batch_size, "tasks": {}}
    for task in args.tasks.split(","):
        rows = measure(pipes, stream, judge, task, args.limit, args.batch_size, args.seed)
        results["tasks"][task] = rows
        print(f"\n{task}, {args.limit} items: ms an item, default / this, quality", flush=True)
        for name, row in rows.items():
            found = row["metrics"]
            metric = SHOWN[task]
            value = found[metric]
            print(
                f"  {name:<36}{1e3 * row['seconds_an_item']['median']:9.1f}"
                f"{row['default_over_this']['median']:8.2f}   {metric} {value['value']:.3f} "
                f"({value['low']:.3f}–{value['high']:.3f})",
                flush=True,
            )
        if args.json:
            write_json(args.json, results)
    return results


if __name__ == "__main__":
    main()
