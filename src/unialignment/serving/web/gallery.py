"""Pictures to start from: scenes of the world where its artwork is there, else pictures that the model makes itself.

Knows nothing of widgets.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from PIL import Image

from unialignment.errors import UniAlignmentError
from unialignment.serving.requests import TaskRequest
from unialignment.serving.web.context import EngineLike

PROMPTS = (
    "a large flat car in the center, on a yellow background",
    "a large shaded dog on the left, on a blue background",
    "a flat rocket at the top, on a purple background",
    "a large shaded apple on the right, on a teal background",
    "a large flat tree in the center, on a white background",
    "a large shaded cat on the left, on an orange background",
)
"""What the model draws where there is no artwork."""
SCENES = ((1, 11), (1, 12), (1, 23), (2, 14), (2, 25), (3, 16))
"""Number of objects and seed of each scene."""
log = logging.getLogger(__name__)


def world_pictures(size: int) -> list[tuple[Image.Image, str]]:
    """Rendered scenes with their descriptions.

    Raises:
        UniAlignmentError: There is no sprite pack.
    """
    from unialignment.world.captions import describe_canonical
    from unialignment.world.layout import sample_scene
    from unialignment.world.presets import preset
    from unialignment.world.render import Renderer
    from unialignment.world.sprites import SpritePack

    pack = SpritePack.load()
    nano = preset("nano", pack)
    renderer = Renderer(pack, max(64, size // 64 * 64))
    pictures = []
    for count, seed in SCENES:
        scene = sample_scene(np.random.default_rng(seed), nano, "held_out" if count > 1 else "train", count=count)
        pictures.append((Image.fromarray(renderer.render(scene)), describe_canonical(scene).text))
    return pictures


def model_pictures(engine: EngineLike, steps: int = 12) -> list[tuple[Image.Image, str]]:
    """Pictures drawn by the model, for machines without the artwork."""
    requests = [
        TaskRequest("generate", prompt, options={"seed": seed, "num_inference_steps": steps})
        for seed, prompt in enumerate(PROMPTS)
    ]
    handles = [engine.submit(request) for request in requests]
    return [(handle.result().images[0], prompt) for handle, prompt in zip(handles, PROMPTS, strict=True)]


def build_gallery(engine: EngineLike, size: int, folder: Path) -> list[tuple[Path, str]]:
    """Write the pictures to ``folder``; returns their paths with descriptions, none if no way works."""
    try:
        pictures = world_pictures(size)
    except UniAlignmentError as missing:
        log.info("no scenes for the page's gallery (%s); the model draws it", missing)
        try:
            pictures = model_pictures(engine)
        except UniAlignmentError as error:
            log.warning("the page has no gallery: %s", error)
            return []
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, (image, text) in enumerate(pictures, 1):
        path = folder / f"scene-{number}.png"
        image.save(path)
        entries.append((path, text))
    return entries
