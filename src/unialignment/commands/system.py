"""Commands around the model: train, eval, card, world build, info, demo. Each delegates to the room that does it."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
import time
from pathlib import Path
from typing import Any

from unialignment.commands import common
from unialignment.errors import UniAlignmentError


def _need(module: str, extra: str) -> Any:
    """Import a module of ours, or say which optional packages are missing."""
    try:
        return importlib.import_module(f"unialignment.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("unialignment"):
            raise UniAlignmentError(
                f"this installation has no unialignment.{module}; install the package again"
            ) from error
        raise UniAlignmentError(
            f"this command needs the package {error.name}; run: pip install 'unialignment[{extra}]'"
        ) from error


def configure_train(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign train``."""
    parser.add_argument("config", help="YAML file")
    parser.add_argument("override", nargs="*", metavar="key=value", help="settings to change, by dotted name")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end, progress on stderr")


def train(args: argparse.Namespace) -> int:
    """Train a model from a configuration; an interrupted run continues where it was."""
    loop = _need("training.loop", "train")
    started = time.perf_counter()
    console = None
    if args.json:  # standard output is for the result alone
        from rich.console import Console

        console = Console(stderr=True)
    folder = loop.run(args.config, args.override, console)
    if args.json:
        common.say(args, {"path": str(folder), "seconds": common.seconds(started)}, [])
    return 0


def configure_evaluate(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign eval``."""
    _need("evaluation.cli", "eval").add_arguments(parser)


def evaluate(args: argparse.Namespace) -> int:
    """Measure a model on the scene world."""
    return int(_need("evaluation.cli", "eval").run(args))


def configure_card(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign card``."""
    _need("evaluation.cli", "eval").add_card_arguments(parser)


def card(args: argparse.Namespace) -> int:
    """Write a model's card from its evaluation."""
    return int(_need("evaluation.cli", "eval").run_card(args))


def demo(arguments: list[str]) -> int:
    """Run the main job once and write a contact sheet and a page."""
    return int(_need("demo", "world").main(arguments) or 0)


def configure_world(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign world``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser(
        "build",
        help="fetch artwork and build the sprite pack",
        description="Fetch emoji artwork from the package registry and build the sprite pack of the scene world.",
        epilog="example: unialign world build --source npm",
    )
    build.add_argument("--source", choices=("auto", "npm", "pip"), default="auto", help="where artwork comes from")
    build.add_argument(
        "--extra",
        action="store_true",
        help="add three styles to train on (configs/nano.yaml); takes npm, and a minute more",
    )
    build.add_argument("-o", "--output", type=Path, metavar="FILE", help="sprite pack (default: the user's cache)")
    common.add_output(build)


def world(args: argparse.Namespace) -> int:
    """Build the sprite pack."""
    from unialignment.world.assets import build_pack

    started = time.perf_counter()
    options: dict[str, Any] = {}
    if not args.quiet and not args.json:
        options["progress"] = lambda *message: print(*message, file=sys.stderr)
    path = build_pack(source=args.source, destination=args.output, extra=args.extra, **options)
    common.say(args, {"path": str(path), "seconds": common.seconds(started)}, [str(path)])
    return 0


def configure_info(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign info``."""
    parser.add_argument("subject", nargs="?", help="a model (name, folder, hub id), or a picture made by this program")
    common.add_output(parser)


def info(args: argparse.Namespace) -> int:
    """Say what is installed, what a model consists of, or how a picture was made."""
    subject = args.subject
    if subject is None:
        data = _installation()
    elif Path(subject).suffix.lower() in common.PICTURE_ENDINGS:
        from unialignment.metadata import read_metadata

        found = read_metadata(subject)
        data = {"picture": subject, "metadata": found}
        if found is None:
            data["note"] = "carries no metadata of ours"
    else:
        data = _model(subject)
    common.say(args, data, list(_flatten(data)))
    return 0


def _installation() -> dict[str, Any]:
    import torch

    from unialignment import __version__
    from unialignment.model.folders import packaged_models

    return {
        "unialignment": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "packaged_models": packaged_models(),
    }


def _model(name: str) -> dict[str, Any]:
    from unialignment.model.checkpoints import describe_weights, read_json
    from unialignment.model.folders import INDEX_NAME, resolve_model, verify_checksums

    folder = resolve_model(name)
    index = read_json(folder / INDEX_NAME)
    components: dict[str, Any] = {}
    for component, entry in index.items():
        if isinstance(entry, list) and (folder / component).is_dir():
            components[component] = {"class": entry[-1], **describe_weights(folder / component)}
    return {
        "model": name,
        "folder": str(folder),
        "checksums": "verified" if verify_checksums(folder) else "none",
        "components": components,
    }


def _flatten(data: dict[str, Any], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for key, value in data.items():
        if isinstance(value, dict):
            lines += _flatten(value, f"{prefix}{key}.")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"{prefix}{key}: {shown}")
    return lines
