"""What the engine's batching saves: requests handed over together, against the same ones one after the other.

Counts processor time rather than elapsed time, so that a busy machine tells nearly the same. One thread.

    python benchmarks/batching.py --requests 6
"""

from __future__ import annotations

import argparse
import json
import time

import torch

import unialignment
from unialignment.serving.engine import Engine, TaskRequest


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--requests", type=int, default=6, help="of each kind")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = unialignment.load(args.model, device="cpu")
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
