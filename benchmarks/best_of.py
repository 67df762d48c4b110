"""How much drawing and editing on the scene world gain when a model draws N and keeps its own choice (``best_of=N``).

    python benchmarks/best_of.py --model nano --limit 24 --samples 8

For each held-out item M pictures are drawn and judged once; what the best of n would have been is then the mean over
all subsets of n, for every n up to M (``unialignment.reranking.expected_best_of``). Beside the model's own choice stand
the judge's choice, which is the most that any reranking could gain from these pictures, and the plain mean, which is
what a ranking that knows nothing gives. Edits are ranked in two ways: by their instruction, as ``best_of`` does unless
told otherwise, and by a description of the wanted result (``best_of_text``), which here comes from the world.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import unialignment
from unialignment.data.sample import Sample
from unialignment.evaluation.judge import Judge
from unialignment.evaluation.metrics import estimate
from unialignment.evaluation.semgen_world import GROUPS, group_sample, group_scores
from unialignment.reranking import expected_best_of
from unialignment.storage import write_json
from unialignment.world.captions import describe_canonical
from unialignment.world.presets import preset
from unialignment.world.sprites import SpritePack
from unialignment.world.stream import WorldStream

PARTS = {"generate": "generate.objects", "edit": "edit.success", **{group: f"semgen.{group}" for group in GROUPS}}
"""What is drawn, and the metric by which it is judged."""


def measure(pipe: Any, part: str, samples: Sequence[Sample], judge: Judge, count: int, seed: int) -> dict[str, Any]:
    """Per-item values of ``count`` pictures and their scores, for one part."""
    options: dict[str, Any] = {"num_images_per_prompt": count, "best_of": count, "progress": False}
    rows = []
    for index, sample in enumerate(samples):
        task, sources = sample.task, list(sample.sources)
        result = pipe.run(
            task, sample.prompt, sources or None, kind=None, seed=seed + 1000 * index, batch_size=count, **options
        )
        pictures = [np.asarray(image.convert("RGB")) for image in result.images]
        found = [
            group_scores(judge, sample, picture) if part in GROUPS else judge.score(sample, picture)
            for picture in pictures
        ]
        row = {"values": [one[PARTS[part]] for one in found], "own choice": result.scores}
        if sources:
            wanted = pipe.embed_text(describe_canonical(sample.meta["scene"]).text)
            row["told the result"] = (pipe.embed_image(pictures) @ wanted.T)[:, 0].tolist()
        row["judge's choice"] = row["values"]
        rows.append(row)
        print(f"{part}: {index + 1} of {len(samples)}", file=sys.stderr, flush=True)
    return {"metric": PARTS[part], "rows": rows}


def curve(rows: Sequence[dict[str, Any]], counts: Sequence[int]) -> dict[str, dict[str, Any]]:
    """By ranking and n: mean over items with its interval, and the gain over n = 1 with the gain's own interval."""
    table: dict[str, dict[str, Any]] = {}
    for name in (name for name in rows[0] if name != "values"):
        plain = np.array([np.mean(row["values"]) for row in rows])
        table[name] = {}
        for n in counts:
            best = np.array([expected_best_of(row[name], row["values"], n) for row in rows])
            value, gain = estimate(best.tolist()), estimate((best - plain).tolist())
            table[name][str(n)] = {
                "value": [value.value, value.low, value.high],
                "gain": [gain.value, gain.low, gain.high],
            }
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--parts", default="generate,edit", help=f"comma-separated, of {', '.join(PARTS)}")
    parser.add_argument("--limit", type=int, default=24, help="items of each part")
    parser.add_argument("--samples", type=int, default=8, help="pictures drawn for each item")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--out", type=Path, help="write the JSON, every picture's value and score included")
    args = parser.parse_args(arguments)
    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"unknown parts {', '.join(unknown)}")
    pack = SpritePack.load()
    world = preset(args.preset, pack)
    stream, judge = WorldStream(pack, world, "held_out", args.seed), Judge(pack, world)
    pipe = unialignment.load(args.model)
    counts = [n for n in (1, 2, 4, 8, 16, 32) if n <= args.samples]
    data: dict[str, Any] = {"model": args.model, "limit": args.limit, "samples": args.samples, "seed": args.seed}
    for part in parts:
        started = time.perf_counter()
        make = group_sample if part in GROUPS else WorldStream.sample
        found = measure(pipe, part, [make(stream, part, i) for i in range(args.limit)], judge, args.samples, args.seed)
        found |= {"curve": curve(found["rows"], counts), "seconds": round(time.perf_counter() - started, 1)}
        data[part] = found
        print(f"\n{part} ({found['metric']}, {args.limit} items, 95 % intervals)")
        print("| ranked by | " + " | ".join(f"n = {n}" for n in counts) + " |")
        print("|---" * (len(counts) + 1) + "|")
        for name, row in found["curve"].items():
            cells = [
                f"{r['value'][0]:.3f} ({r['gain'][0]:+.3f}: {r['gain'][1]:+.3f} … {r['gain'][2]:+.3f})"
                for r in row.values()
            ]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    if args.out is not None:
        write_json(args.out, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
