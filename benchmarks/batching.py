"""What the engine's batching saves: requests handed over together, against the same ones one after the other.

Counts processor time rather than elapsed time, so that a busy machine tells nearly the same. One thread.

    python benchmarks/batching.py --requests 6

With ``--passes`` what one row (a sample under one guidance branch) costs in passes of so many: how much there is to be
gained at all, and where it ends. With ``--threads 2`` elapsed time on that many threads, which needs an idle machine.

    python benchmarks/batching.py --passes
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from PIL import Image

import unialignment
from unialignment.serving.batches import Batcher, Row
from unialignment.serving.engine import Engine, TaskRequest

PASSES = (1, 2, 4, 8, 16, 32)


def requests_of(kind: str, count: int, picture: object) -> list[TaskRequest]:
    prompt = "a large flat car in the center, on a yellow background"
    make = {
        "generate": lambda seed: TaskRequest("generate", prompt, options={"seed": seed}),
        "edit": lambda seed: TaskRequest("edit", "make the background green", (picture,), options={"seed": seed}),
        "perceive": lambda seed: TaskRequest("perceive", None, (picture,), kind="depth", options={"seed": seed}),
        "caption": lambda seed: TaskRequest("caption", None, (picture,)),
        "answer": lambda seed: TaskRequest("answer", "what color is the background?", (picture,)),
    }
    if kind == "mixed":
        return [make[name](seed) for seed in range(count) for name in make]
    return [make[kind](seed) for seed in range(count)]


def seconds(pipe: object, requests: list[TaskRequest], together: bool) -> tuple[float, float]:
    """Processor seconds, and mean rows of a pass."""
    with Engine(pipe) as engine:
        started = time.process_time()
        if together:
            for handle in [engine.submit(request) for request in requests]:
                handle.result()
        else:
            for request in requests:
                engine.submit(request).result()
        stats = engine.stats()
        return time.process_time() - started, stats.rows / stats.passes


def milliseconds_a_row(pipe: unialignment.UniAlignmentPipeline, threads: int, repeats: int = 7) -> dict[str, dict]:
    """Least time of a pass, divided by its rows: kind of target → rows → milliseconds."""
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    batcher, mask = Batcher(pipe, max(PASSES)), pipe.tokenizer.mask_token_id
    found: dict[str, dict] = {}
    with torch.no_grad():
        latents = pipe.encode_images([Image.new("RGB", (pipe.default_size,) * 2, "red")])
        words = "a large flat car in the center, on a yellow background"
        conditions = {
            "generate": batcher.encode([words, ""], [(), ()]),
            "edit": batcher.encode(["make the background green", ""], [(latents,), (latents,)]),
            "caption": batcher.encode([""], [(latents,)]),
        }
        text = torch.full((1, pipe.tasks.get("caption").target_length), mask, device=pipe.device)
        for kind, known in conditions.items():
            if kind == "caption":
                rows = [Row(known[0], text, 0.0, torch.ones_like(text, dtype=torch.bool)) for _ in range(max(PASSES))]
            else:
                rows = [Row(known[n % 2], torch.randn_like(latents), 0.5) for n in range(max(PASSES))]
            best = dict.fromkeys(PASSES, float("inf"))
            for _ in range(repeats):
                for count in PASSES:  # in turn, so that a busy moment hits all
                    batcher.predict(rows[:count])
                    started = clock()
                    batcher.predict(rows[:count])
                    best[count] = min(best[count], clock() - started)
            found[kind] = {count: round(1000 * value / count, 2) for count, value in best.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--requests", type=int, default=6, help="of each kind")
    parser.add_argument("--passes", action="store_true", help="milliseconds a row by rows of a pass instead")
    parser.add_argument("--threads", type=int, default=1, help="with --passes: more than 1 counts elapsed time")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = unialignment.load(args.model, device="cpu")
    if args.passes:
        table = milliseconds_a_row(pipe, args.threads)
        if args.json:
            print(json.dumps(table))
        for kind, row in table.items() if not args.json else ():
            print(f"{kind:<9}" + ", ".join(f"{count} rows {value:.2f}" for count, value in row.items()) + " ms a row")
        return
    picture = pipe.generate("a car", seed=1, progress=False).images[0]
    results = {}
    for kind in ("generate", "edit", "perceive", "caption", "answer", "mixed"):
        requests = requests_of(kind, args.requests, picture)
        seconds(pipe, requests[:2], True)  # warm
        alone, together = (min(seconds(pipe, requests, how) for _ in range(2)) for how in (False, True))
        results[kind] = {
            "one_by_one": round(alone[0], 2),
            "together": round(together[0], 2),
            "ratio": round(alone[0] / together[0], 2),
            "rows_a_pass": round(together[1], 1),
        }
        if not args.json:
            print(
                f"{kind:<9} {alone[0]:6.2f} s one by one, {together[0]:6.2f} s together: {alone[0] / together[0]:.2f} x"
            )
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
