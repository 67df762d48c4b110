"""``unialign bench``: time, memory and operations of the tasks, against the published way and a peer."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from unialignment.commands import common
from unialignment.errors import InputError


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign bench``."""
    parser.add_argument("--size", default="100M", help="random model: nano, tiny, 25M, 100M, 300M, 2B (default: 100M)")
    parser.add_argument("--pixels", type=int, default=256, metavar="N", help="side of pictures (default: 256)")
    parser.add_argument(
        "--tasks", default="generate,edit,caption,answer", help="of part 'tasks', comma-separated (default: all)"
    )
    parser.add_argument(
        "--parts", help="of tasks, peer, batches, scaling, comma-separated (default: all that the size has)"
    )
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="interleaved measurements (default: 7)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="arithmetic")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON, Markdown and plots"
    )
    common.add_output(parser)


def bench(args: argparse.Namespace) -> int:
    """Measure, write the results, print the ratios."""
    for name in ("repeats", "threads"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    import torch

    from unialignment.benchmarking.measure import Timing
    from unialignment.benchmarking.report import write
    from unialignment.benchmarking.suite import PARTS, Suite

    started = time.perf_counter()
    torch.set_num_threads(args.threads)

    def say(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr, flush=True)

    tasks = tuple(part.strip() for part in args.tasks.split(","))
    parts = None if args.parts is None else tuple(part.strip() for part in args.parts.split(","))
    suite = Suite(args.size, args.pixels, args.repeats, args.dtype, say)
    results = suite.run(tasks, parts)
    command = (
        f"unialign bench --size {args.size} --pixels {args.pixels} --tasks {','.join(tasks)} "
        f"{'' if parts is None else f'--parts {args.parts} '}--repeats {args.repeats} --dtype {args.dtype} "
        f"--threads {args.threads}"
    )
    short = {"float32": "", "bfloat16": "-bf16"}[args.dtype]
    chosen = "" if parts is None or set(parts) == set(PARTS) else "-" + "-".join(parts)
    paths = write(results, args.out, f"{args.size}-{args.pixels}px{short}{chosen}", command)
    lines = [f"{row['name']}: {Timing(**row['ratio'])}" for row in results.comparisons]
    data = {**results.to_json(), "paths": [str(path) for path in paths], "seconds": common.seconds(started)}
    common.say(args, data, [*lines, *map(str, paths)])
    return 0
