"""Commands whose result is a text or a vector: caption, answer, infill, rewrite, embed."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from unialignment.commands import common
from unialignment.errors import InputError


def configure_caption(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign caption``."""
    parser.add_argument("image", nargs="+", help="pictures to describe")
    common.add_text_sampling(parser)
    common.add_model(parser)


def caption(args: argparse.Namespace) -> int:
    """Describe pictures."""
    pipe = common.load_pipeline(args)
    started = time.perf_counter()
    result = pipe.caption(args.image, **common.text_options(args))
    return common.report_texts(args, result, started, args.image)


def configure_answer(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign answer``."""
    parser.add_argument("image", help="picture the question is about")
    parser.add_argument("question", nargs="+", help="questions, each in quotes")
    common.add_text_sampling(parser)
    common.add_model(parser)


def answer(args: argparse.Namespace) -> int:
    """Answer questions about a picture."""
    pipe = common.load_pipeline(args)
    started = time.perf_counter()
    result = pipe.answer([args.image] * len(args.question), args.question, **common.text_options(args))
    return common.report_texts(args, result, started)


def configure_infill(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign infill``."""
    parser.add_argument("image", help="picture the text is about")
    parser.add_argument("text", help="a text with [MASK] for each missing word piece")
    common.add_text_sampling(parser)
    common.add_model(parser)


def infill(args: argparse.Namespace) -> int:
    """Fill the gaps of a text about a picture."""
    pipe = common.load_pipeline(args)
    started = time.perf_counter()
    result = pipe.infill(args.image, args.text, **common.text_options(args))
    return common.report_texts(args, result, started)


def configure_rewrite(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign rewrite``."""
    parser.add_argument("prompt", nargs="+", help="prompts, each in quotes")
    common.add_text_sampling(parser)
    common.add_model(parser)


def rewrite(args: argparse.Namespace) -> int:
    """Say prompts as the model's own captions do."""
    pipe = common.load_pipeline(args)
    started = time.perf_counter()
    result = pipe.rewrite(args.prompt, **common.text_options(args))
    return common.report_texts(args, result, started)


def configure_embed(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign embed``."""
    parser.add_argument("--image", nargs="+", default=[], help="pictures")
    parser.add_argument("--text", nargs="+", default=[], help="texts, each in quotes")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the vectors as .npy, pictures first")
    common.add_model(parser)


def embed(args: argparse.Namespace) -> int:
    """Map pictures and texts to vectors of one space; with both, also show how well each pair matches."""
    if not args.image and not args.text:
        raise InputError("give --image, --text, or both")
    if args.output is not None and args.output.suffix != ".npy":
        raise InputError(f"can't save vectors as {args.output.name!r}: use a name ending in .npy")
    pipe = common.load_pipeline(args)
    started = time.perf_counter()
    images = pipe.embed_image(args.image) if args.image else None
    texts = pipe.embed_text(args.text) if args.text else None
    vectors = [vector for group in (images, texts) if group is not None for vector in group.tolist()]
    names = [*args.image, *args.text]
    data: dict[str, Any] = {
        "embeddings": [{"input": name, "vector": vector} for name, vector in zip(names, vectors, strict=True)]
    }
    lines = []
    if images is not None and texts is not None:
        similarity = (images @ texts.T).tolist()
        data["similarity"] = similarity
        lines = [
            f"{value:+.3f}\t{image}\t{text}"
            for image, row in zip(args.image, similarity, strict=True)
            for text, value in zip(args.text, row, strict=True)
        ]
    if args.output is not None:
        import numpy as np

        from unialignment.storage import atomic_file

        with atomic_file(args.output) as file:
            np.save(file, np.asarray(vectors, dtype=np.float32))
        data["path"] = str(args.output)
        lines.append(str(args.output))
    elif not lines:
        lines = [" ".join(f"{value:.5f}" for value in vector) for vector in vectors]
    common.say(args, {**data, "seconds": common.seconds(started)}, lines)
    return 0
