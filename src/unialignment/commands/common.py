"""What several commands share: arguments, loading the model, naming and reporting results. Knows nothing of tasks."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unialignment.commands import loading
from unialignment.errors import InputError

if TYPE_CHECKING:
    from unialignment.pipeline import ImageResult, TextResult, UniAlignmentPipeline

DEFAULT_MODEL = "nano"
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Arguments of every command that loads a model."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=DEFAULT_MODEL, help="packaged name, folder, or hub id (default: %(default)s)")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="arithmetic (default: float32)")
    group.add_argument("--batch-size", type=int, metavar="N", help="samples computed at once (default: by device)")
    group.add_argument("--allow-urls", action="store_true", help="fetch pictures named by http(s) URLs")
    loading.add_memory(parser)
    add_output(parser)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Arguments of every command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress bar")


def add_image_sampling(parser: argparse.ArgumentParser, sources: bool) -> None:
    """Arguments of the commands that draw a picture."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--seed", type=int, help="repeatable result (default: a new one, which is reported)")
    group.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the model's)")
    group.add_argument("--guidance-scale", type=float, metavar="X", help="pull towards the text; 1 is none")
    if not sources:
        group.add_argument(
            "--rewrite",
            action=argparse.BooleanOptionalAction,
            help="have the model word the prompt first, places and all (default: the model's)",
        )
    if sources:
        group.add_argument("--image-guidance-scale", type=float, metavar="X", help="pull towards the pictures given")
    group.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels 0–1")
    group.add_argument("--negative-prompt", help="what to move away from")
    group.add_argument("--solver", choices=("euler", "heun", "dpmpp", "stochastic"), help="(default: the model's)")
    group.add_argument("-n", "--num-images", type=int, default=1, metavar="N", help="pictures for each prompt")
    group.add_argument("--best-of", type=int, default=1, metavar="N", help="draw N for each, keep the best match")
    group.add_argument("--best-of-text", metavar="TEXT", help="match with this instead of the prompt")
    group.add_argument(
        "-o", "--output", type=Path, default=Path("out"), metavar="PATH", help="a .png/.jpg/.webp file, or a folder"
    )


def add_text_sampling(parser: argparse.ArgumentParser) -> None:
    """Arguments of the commands that write a text."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--seed", type=int, help="repeatable result; matters with --temperature or ancestral decoding")
    group.add_argument(
        "--steps", type=int, metavar="N", help="at most this many denoising steps (default: the model's)"
    )
    group.add_argument("--max-length", type=int, metavar="N", help="tokens (default: the model's)")
    group.add_argument(
        "--temperature", type=float, metavar="X", help="0 takes the likeliest words (default: the model's)"
    )
    group.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the likeliest words of total probability P"
    )
    group.add_argument(
        "--confidence-threshold", type=float, metavar="P", help="write words of at least this probability at once"
    )
    group.add_argument("--decoding", choices=("confidence", "ancestral"), help="order in which words appear")


def given(**options: Any) -> dict[str, Any]:
    """Only the options that were given, so that the task's own defaults apply to the others."""
    return {name: value for name, value in options.items() if value is not None}


def image_options(args: argparse.Namespace) -> dict[str, Any]:
    """Pipeline arguments from :func:`add_image_sampling`."""
    interval = args.guidance_interval
    return given(
        seed=args.seed,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        image_guidance_scale=getattr(args, "image_guidance_scale", None),
        guidance_interval=tuple(interval) if interval else None,
        negative_prompt=args.negative_prompt,
        solver=args.solver,
        rewrite=getattr(args, "rewrite", None),
        num_images_per_prompt=args.num_images,
        best_of=args.best_of,
        best_of_text=args.best_of_text,
        batch_size=args.batch_size,
        progress=False if args.quiet else None,
    )


def text_options(args: argparse.Namespace) -> dict[str, Any]:
    """Pipeline arguments from :func:`add_text_sampling`."""
    return given(
        seed=args.seed,
        num_inference_steps=args.steps,
        max_length=args.max_length,
        temperature=args.temperature,
        top_p=args.top_p,
        decoding=args.decoding,
        confidence_threshold=args.confidence_threshold,
        batch_size=args.batch_size,
        progress=False if args.quiet else None,
    )


def load_pipeline(args: argparse.Namespace) -> UniAlignmentPipeline:
    """The model that :func:`add_model`'s arguments name."""
    return loading.load_pipeline(args)


def read_lines(path: Path) -> list[str]:
    """Non-empty lines of a text file, or of standard input for ``-``.

    Raises:
        InputError: The file can't be read or has none.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"could not read {path}: {getattr(error, 'strerror', None) or error}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path} holds no text; expected one prompt a line")
    return lines


def output_paths(output: Path, stem: str, seeds: Sequence[int]) -> list[Path]:
    """One path for each picture: ``output`` itself, numbered variants of it, or free names in that folder.

    Raises:
        InputError: ``output`` ends in an unknown format.
    """
    if output.suffix and not output.is_dir():
        if output.suffix.lower() not in PICTURE_ENDINGS:
            raise InputError(f"can't save pictures as {output.name!r}: use {', '.join(PICTURE_ENDINGS)} or a folder")
        if len(seeds) == 1:
            return [output]
        return [output.with_stem(f"{output.stem}-{index}") for index in range(1, len(seeds) + 1)]
    paths: list[Path] = []
    for seed in seeds:
        path = output / f"{stem}-{seed}.png"
        number = 2
        while path in paths or path.exists():  # never overwrite what an earlier command made
            path = output / f"{stem}-{seed}-{number}.png"
            number += 1
        paths.append(path)
    return paths


def check_output(args: argparse.Namespace) -> None:
    """Refuse an impossible ``--output`` before any work is done."""
    output_paths(args.output, "picture", [0])


def report_images(args: argparse.Namespace, result: ImageResult, stem: str, started: float) -> int:
    """Save pictures with their metadata and say where."""
    paths = result.save(output_paths(args.output, stem, result.seeds))
    entries = [{"path": str(path), **metadata} for path, metadata in zip(paths, result.metadata(), strict=True)]
    say(args, {"images": entries, "seconds": seconds(started)}, [str(path) for path in paths])
    return 0


def report_texts(args: argparse.Namespace, result: TextResult, started: float, names: Sequence[str] = ()) -> int:
    """Print texts, each with its picture's name when there are several."""
    entries: list[dict[str, Any]] = [{"text": text} for text in result.texts]
    if names:
        for entry, name in zip(entries, names, strict=True):
            entry["image"] = name
    lines = result.texts
    if len(names) > 1:
        lines = [f"{name}\t{text}" for name, text in zip(names, lines, strict=True)]
    say(args, {"texts": entries, "seconds": seconds(started)}, lines)
    return 0


def seconds(started: float) -> float:
    """Seconds since ``started`` (``time.perf_counter``), to the millisecond."""
    return round(time.perf_counter() - started, 3)


def say(args: argparse.Namespace, data: dict[str, Any], lines: Sequence[str]) -> None:
    """Print the result: one JSON object with ``--json``, else lines."""
    if args.json:
        notes = getattr(args, "notes", None)
        data = {**data, **({"notes": notes} if notes else {})}
        print(json.dumps({"command": args.command, **data}, ensure_ascii=False))
    else:
        for line in lines:
            print(line)
