"""Commands whose result is a picture: generate, edit, perceive, control, compose."""

from __future__ import annotations

import argparse
import time

from unialignment.commands import common
from unialignment.errors import InputError


def configure_generate(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign generate``."""
    parser.add_argument("prompt", nargs="?", help="what to draw")
    parser.add_argument("--prompts", metavar="FILE", help="one prompt a line instead; - is standard input")
    common.add_image_sampling(parser, sources=False)
    common.add_model(parser)


def generate(args: argparse.Namespace) -> int:
    """Draw pictures from text."""
    common.check_output(args)
    if (args.prompt is None) == (args.prompts is None):
        raise InputError("give either a prompt (in quotes) or --prompts FILE")
    prompts = [args.prompt] if args.prompts is None else common.read_lines(common.Path(args.prompts))
    pipe = common.load_pipeline(args)
    started = time.perf_counter()
    result = pipe.generate(prompts, **common.image_options(args))
    return common.report_images(args, result, "generate", started)


def configure_edit(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign edit``."""
    parser.add_argument("instruction", help="what to change")
    parser.add_argument("image", help="picture to change")
    common.add_image_sampling(parser, sources=True)
    common.add_model(parser)


def edit(args: argparse.Namespace) -> int:
    """Change a picture by instruction."""
    common.check_output(args)
    pipe = common.load_pipeline(args)
    started = time.perf_counter()
    result = pipe.edit(args.instruction, args.image, **common.image_options(args))
    return common.report_images(args, result, "edit", started)


def configure_perceive(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign perceive``."""
    parser.add_argument("image", nargs="+", help="pictures to look at")
    parser.add_argument("--kind", default="depth", help="what to show: depth, segment, edges (default: %(default)s)")
    parser.add_argument("--of", metavar="WHAT", help='the object meant, for --kind segment, e.g. "the dog"')
    parser.add_argument("--prompt", metavar="TEXT", help="say it in own words instead of --kind and --of")
    common.add_image_sampling(parser, sources=True)
    common.add_model(parser)


def perceive(args: argparse.Namespace) -> int:
    """Draw a map of a picture: depth, the mask of an object, or edges."""
    common.check_output(args)
    pipe = common.load_pipeline(args)
    started = time.perf_counter()
    result = pipe.perceive(args.image, args.kind, args.of, prompt=args.prompt, **common.image_options(args))
    return common.report_images(args, result, args.kind, started)


def configure_control(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign control``."""
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument("map", help="depth map, mask or edges to follow")
    parser.add_argument("--kind", help="what the map shows: depth, segment, edges (default: the prompt says it)")
    common.add_image_sampling(parser, sources=True)
    common.add_model(parser)


def control(args: argparse.Namespace) -> int:
    """Draw a picture that follows a map."""
    common.check_output(args)
    pipe = common.load_pipeline(args)
    started = time.perf_counter()
    result = pipe.control(args.prompt, args.map, kind=args.kind, **common.image_options(args))
    return common.report_images(args, result, "control", started)


def configure_compose(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign compose``."""
    parser.add_argument("instruction", help="how to put them together, naming image 1, image 2, …")
    parser.add_argument("image", nargs="+", help="reference pictures, in that order")
    common.add_image_sampling(parser, sources=True)
    common.add_model(parser)


def compose(args: argparse.Namespace) -> int:
    """Draw a new picture from several given ones."""
    common.check_output(args)
    pipe = common.load_pipeline(args)
    started = time.perf_counter()
    result = pipe.compose(args.instruction, args.image, **common.image_options(args))
    return common.report_images(args, result, "compose", started)
