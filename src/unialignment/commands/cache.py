"""``unialign cache``: encoders run once over a run's training data, so that its steps don't run them. See training/."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from unialignment.commands import common
from unialignment.commands.system import _need
from unialignment.errors import ConfigError, InputError


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign cache``."""
    parser.add_argument("config", help="YAML file of the run that will use the cache")
    parser.add_argument("override", nargs="*", metavar="key=value", help="settings to change, by dotted name")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="the cache (default: data.cache of the configuration)"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="scenes of the sprite world (default: teacher.pool)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="workers, or actors with --ray")
    parser.add_argument("--ray", metavar="ADDRESS", help="use a Ray cluster: auto, local, ray://host:10001")
    parser.add_argument("--shard-size", type=int, default=512, metavar="N", help="rows or scenes in a shard")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="pictures or texts encoded at once")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="type on disk")
    parser.add_argument("--device", default="auto", help="where the encoders run")
    parser.add_argument("--verify", action="store_true", help="only compare every shard with its checksum")
    common.add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Fill a feature cache, or verify one."""
    caching = _need("training.caching", "train")
    from unialignment.training.config import load_config
    from unialignment.training.features import FeatureStore

    started = time.perf_counter()
    for name in ("samples", "processes", "shard_size", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(args, name)}")
    config = load_config(args.config, args.override)
    if config.kind != "transformer":
        raise ConfigError(f"{args.config} is a run of kind {config.kind}; features are cached for kind: transformer")
    folder = args.out or config.data.cache
    if folder is None:
        raise ConfigError("name the cache's folder: --out FOLDER, or data.cache=FOLDER")
    if args.verify:
        store = FeatureStore(folder)
        for shard in range(store.meta["units"]):
            store.verify(shard)
    else:
        # The run that is described may itself name the cache that is about to be made.
        config = config.model_copy(update={"data": config.data.model_copy(update={"cache": None})})
        plan = caching.make_plan(
            config,
            folder,
            args.samples or config.teacher.pool,
            args.shard_size,
            dtype=args.dtype,
            batch_size=args.batch_size,
            device=args.device,
        )
        quiet = args.quiet or args.json
        store = caching.build_cache(
            plan,
            args.processes,
            args.ray,
            report=lambda text: None if quiet else print(text, file=sys.stderr),
            progress=None if quiet or not sys.stderr.isatty() else _progress,
        )
    kinds = ("latent", "prompt", "teacher_image", "teacher_text")
    counts = {kind: store.count(kind) for kind in kinds if store.count(kind)}
    size = sum(file.stat().st_size for file in (folder / "shards").glob("*.safetensors"))
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    state = "verified" if args.verify else f"use it with data.cache={folder}"
    common.say(
        args,
        {"path": str(folder), "features": counts, "bytes": size, "seconds": common.seconds(started)},
        [f"{folder}: {store.meta['units']} shards, {size / 2**20:.1f} MiB ({listed}); {state}"],
    )
    return 0


def _progress(done: int, total: int) -> None:
    print(f"\r{done} of {total} shards", end="\n" if done == total else "", file=sys.stderr)
