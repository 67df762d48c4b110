"""How long the parser takes on what a model drew: ``python benchmarks/parsing.py RUN`` over a run of SemGen-World.

RUN is the folder of ``unialign eval semgen-world --out RUN``. For comparison true scenes are parsed too. Prints a
table of processor seconds a picture; run it on one thread (``OMP_NUM_THREADS=1``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from unialignment.errors import InputError
from unialignment.evaluation.world_run import read_run
from unialignment.world.layout import sample_scene
from unialignment.world.parser import SceneParser
from unialignment.world.presets import preset
from unialignment.world.render import Renderer
from unialignment.world.sprites import SpritePack


def seconds(parser: SceneParser, pictures: Sequence[np.ndarray]) -> float:
    """Processor seconds a picture."""
    started = time.process_time()
    for picture in pictures:
        parser.parse(picture)
    return (time.process_time() - started) / len(pictures)


def main() -> None:
    """Parse and print."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("run", type=Path, help="folder of a run of semgen-world")
    command.add_argument("--limit", type=int, default=20, help="pictures of each part (default: 20)")
    args = command.parse_args()
    pack = SpritePack.load()
    world = preset(read_run(args.run)["benchmark"]["preset"], pack)
    parser, renderer = SceneParser(pack, world), Renderer(pack, world.resolution)
    rng = np.random.default_rng(0)
    scenes = [renderer.render(sample_scene(rng, world, "held_out")) for _ in range(args.limit)]
    seconds(parser, scenes)  # the first pictures load artwork
    print(
        f"| part | pictures | seconds a picture |\n|---|---:|---:|\n| true scenes | {len(scenes)} | "
        f"{seconds(parser, scenes):.3f} |"
    )
    found = sorted(args.run.glob("parts/*/pictures"))
    if not found:
        raise InputError(f"{args.run} holds no pictures; write some with unialign eval semgen-world --out {args.run}")
    for folder in found:
        if folder.parent.name == "perceive":
            continue  # maps are not parsed
        pictures = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))[: args.limit]]
        print(f"| {folder.parent.name} | {len(pictures)} | {seconds(parser, pictures):.3f} |", flush=True)


if __name__ == "__main__":
    main()
