"""``unialign distill``: a few-step student of a trained model."""

from __future__ import annotations

import argparse
import sys
import time

from unialignment.commands import common
from unialignment.errors import UniAlignmentError


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign distill``."""
    parser.add_argument("config", help="YAML file")
    parser.add_argument("override", nargs="*", metavar="key=value", help="settings to change, by name")
    common.add_output(parser)


def distill(args: argparse.Namespace) -> int:
    """Distil; an interrupted run continues from its last checkpoint."""
    try:
        from unialignment.training.distill import Distiller
        from unialignment.training.distill_config import load_distill, world_source
        from unialignment.training.runtime import choose_device, set_threads
    except ModuleNotFoundError as error:
        raise UniAlignmentError(
            f"this command needs the package {error.name}; run: pip install 'unialignment[train,world]'"
        ) from error
    import unialignment

    started = time.perf_counter()
    config = load_distill(args.config, args.override)
    settings = config.settings()
    set_threads(config.threads)
    pipe = unialignment.load(config.model, device=choose_device(config.device))

    def say(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr, flush=True)

    source = world_source(config, pipe.tokenizer, pipe.text_limit)
    initial = unialignment.load(config.initial, device=pipe.device).transformer if config.initial else None
    distiller = Distiller(pipe, source, settings, config.dir, say, initial)
    del initial
    folders = [str(folder) for folder in distiller.run()]
    common.say(args, {"paths": folders, "seconds": common.seconds(started)}, folders)
    return 0
