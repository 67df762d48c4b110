"""Commands about weights as files and as memory: merge, grow, convert, plan. Each delegates to the room in charge."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from unialignment.commands import common


def _add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder to write; a new one")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def configure_merge(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign merge``."""
    parser.add_argument("model", help="packaged name, folder, or hub id")
    parser.add_argument("lora", type=Path, nargs="?", help="LoRA file, or a folder with one")
    parser.add_argument(
        "--run",
        action="append",
        default=[],
        metavar="DIR[:X]",
        help="add what a run from this model changed, X times (1); may be repeated",
    )
    parser.add_argument("--scale", type=float, metavar="X", help="the LoRA's strength; 1, as trained, unless given")
    _add_writing(parser)


def merge(args: argparse.Namespace) -> int:
    """Write a model with a LoRA, or with what several runs changed, added to its weights."""
    from unialignment.commands.loading import path_and_scale, unmatched_lines
    from unialignment.errors import InputError
    from unialignment.model.convert import add_runs, merge_folder
    from unialignment.model.folders import resolve_model

    if (args.lora is None) == (not args.run):
        raise InputError("give either a LoRA or runs to add: unialign merge MODEL LORA, or MODEL --run DIR --run DIR")
    if args.run and args.scale is not None:
        raise InputError("--scale is a LoRA's strength; give each run its own: --run DIR:0.8")
    started = time.perf_counter()
    if args.run:
        named = [path_and_scale(text, "--run") for text in args.run]
        runs = [(resolve_model(name), scale) for name, scale in named]
        changed = add_runs(resolve_model(args.model), runs, args.out, args.max_shard_size)
        facts = {"path": str(args.out), "changed": changed, "runs": [[str(run), scale] for run, scale in runs]}
        counted = ", ".join(f"{count} of {part}" for part, count in changed.items())
        lines = [f"Added {len(runs)} run(s); changed tensors: {counted}.", str(args.out)]
        common.say(args, {**facts, "seconds": common.seconds(started)}, lines)
        return 0
    report = merge_folder(
        resolve_model(args.model), args.lora, args.out, 1.0 if args.scale is None else args.scale, args.max_shard_size
    )
    data = {"path": str(args.out), "matched": list(report.matched), "unmatched": dict(report.unmatched)}
    common.say(
        args, {**data, "seconds": common.seconds(started)}, [report.summary(), *unmatched_lines(report), str(args.out)]
    )
    return 0


def configure_grow(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign grow``."""
    parser.add_argument("model", help="packaged name, folder, or hub id")
    parser.add_argument("--layers", type=int, metavar="N", help="transformer blocks of the larger model")
    parser.add_argument(
        "--mlp-ratio", type=float, metavar="X", help="its feed-forwards' width, as a multiple of the model's"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the added units' weights (%(default)s)")
    _add_writing(parser)


def grow(args: argparse.Namespace) -> int:
    """Write a larger model with the same outputs, to train on from there."""
    from unialignment.errors import InputError
    from unialignment.model.folders import resolve_model
    from unialignment.model.growth import grow as write

    if args.layers is None and args.mlp_ratio is None:
        raise InputError("say how much larger: --layers N, --mlp-ratio X, or both")
    started = time.perf_counter()
    facts = write(resolve_model(args.model), args.out, args.layers, args.mlp_ratio, args.seed, args.max_shard_size)
    before, after = facts["parameters"]
    line = f"{after:,} parameters instead of {before:,} ({after / before:.2f} times as many), the same outputs."
    common.say(args, {"path": str(args.out), **facts, "seconds": common.seconds(started)}, [line, str(args.out)])
    return 0


def configure_convert(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign convert``."""
    parser.add_argument("model", help="packaged name, folder (of a model, or of a transformer alone), or hub id")
    parser.add_argument(
        "--to", choices=("unialignment", "published"), help="layout to write (default: the one that it isn't in)"
    )
    _add_writing(parser)


def convert(args: argparse.Namespace) -> int:
    """Write a model in another folder layout."""
    from unialignment.model.convert import convert as write
    from unialignment.model.folders import resolve_model

    started = time.perf_counter()
    path = write(resolve_model(args.model), args.out, args.to, args.max_shard_size)
    common.say(args, {"path": str(path), "seconds": common.seconds(started)}, [str(path)])
    return 0


def configure_plan(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign plan``."""
    parser.add_argument("config", help="YAML file of a transformer run")
    parser.add_argument("override", nargs="*", metavar="key=value", help="settings to change, by dotted name")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="memory to fit into, like 24GiB")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def plan(args: argparse.Namespace) -> int:
    """Predict the memory of a configuration, and say what makes it fit."""
    from unialignment.model.streaming import parse_size
    from unialignment.planning import plan as predict
    from unialignment.training.config import load_config

    started = time.perf_counter()
    budget = parse_size(args.gpu_memory) if args.gpu_memory else None
    result = predict(load_config(args.config, args.override), budget)
    common.say(args, {**result.as_dict(), "seconds": common.seconds(started)}, result.lines())
    return 0
