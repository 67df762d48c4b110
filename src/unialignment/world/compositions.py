"""Compositions: an instruction that puts the subjects of two or three pictures together, with the exact result.

Layout conventions: sizes and styles are kept. Of two subjects, *next to*, *left of* and *right of* put one in the left
half and one in the right half, halfway up; *above* and *below* put one in the upper and one in the lower half, halfway
across. Without a direction the first named is on the left. Of three, the subjects of image 1 and 2 are in the upper
half, left and right, and that of image 3 is centred in the lower half. The background is that of image 1 unless
another one is named. Knows nothing of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unialignment.errors import InputError
from unialignment.world import language as lang
from unialignment.world.placement import pair_layout, triangle_layout
from unialignment.world.scene import CANVAS_UNITS, Scene, SceneObject
from unialignment.world.splits import is_held_out, is_held_out_style

_ATTEMPTS = 400

_ANONYMOUS = ("the subject of image {n}", "the object from image {n}", "what is in image {n}", "the thing in image {n}")
_NAMED = ("the {name} from image {n}", "the {name} of image {n}", "the {name} in image {n}")
_STYLED = ("the {style} {name} from image {n}", "the {style} {name} in image {n}")
_TOGETHER = (
    "put {a} and {b} side by side",
    "show {a} and {b} next to each other",
    "combine {a} and {b}",
    "make a picture of {a} and {b}",
    "bring {a} and {b} together",
)
_RELATED = ("put {a} {relation} {b}", "place {a} {relation} {b}", "show {a} {relation} {b}")
_RELATIONS = {
    "next to": "left",
    "beside": "left",
    "to the left of": "left",
    "to the right of": "right",
    "above": "above",
    "below": "below",
}
_THREE = (
    "put {a} next to {b}, with {c} below them",
    "show {a} and {b} side by side and {c} below",
    "combine {a}, {b} and {c}",
    "bring together {a}, {b} and {c}",
)
_NAMED_GROUND = ("on {} background", "with {} background")
_IMAGE_GROUND = (
    "on the background of image {}",
    "with the background of image {}",
    "against the background from image {}",
)


@dataclass(frozen=True)
class Composition:
    """References, instruction and result.

    Attributes:
        instruction: What to make; pictures are called "image 1" and so on, in the order of ``sources``.
        sources: The reference scenes, one object each.
        result: The exact result.
        kind: ``"pair"`` (two subjects), ``"background"`` (and the background of image 3) or ``"three"`` (subjects).
    """

    instruction: str
    sources: tuple[Scene, ...]
    result: Scene
    kind: str


def _single(rng: np.random.Generator, preset: lang.PresetLike, split: str) -> Scene:
    """A one-object scene on the lattice."""
    while True:
        name, style, size = lang.pick(rng, preset.names), lang.pick(rng, preset.styles), lang.pick(rng, preset.sizes)
        if split == "train" and is_held_out_style(name, style):
            continue
        steps = (CANVAS_UNITS - size) // preset.lattice + 1
        x, y = int(rng.random() * steps) * preset.lattice, int(rng.random() * steps) * preset.lattice
        return Scene(lang.pick(rng, preset.backgrounds), (SceneObject(name, style, size, x, y),))


def _subject(rng: np.random.Generator, scene: Scene, number: int) -> str:
    item = scene.objects[0]
    draw = rng.random()
    templates = _ANONYMOUS if draw < 0.35 else _STYLED if draw < 0.5 else _NAMED
    return lang.pick(rng, templates).format(n=number, name=item.name, style=lang.style_adjective(item.style))


def _two(rng: np.random.Generator, sources: tuple[Scene, ...], lattice: int) -> tuple[str, tuple[SceneObject, ...]]:
    """Instruction and layout for the subjects of the first two pictures, either of them named first."""
    order = (0, 1) if rng.random() < 0.7 else (1, 0)
    a, b = (_subject(rng, sources[i], i + 1) for i in order)
    relation = "left"
    if rng.random() < 0.3:
        phrase = lang.pick(rng, _TOGETHER).format(a=a, b=b)
    else:
        words = lang.pick(rng, tuple(_RELATIONS))
        relation = _RELATIONS[words]
        phrase = lang.pick(rng, _RELATED).format(a=a, b=b, relation=words)
    first, second = (sources[i].objects[0] for i in order)
    return phrase, pair_layout(first, second, relation, lattice)


def _three(rng: np.random.Generator, sources: tuple[Scene, ...], lattice: int) -> tuple[str, tuple[SceneObject, ...]]:
    """Instruction and layout for the subjects of three pictures."""
    a, b, c = (_subject(rng, scene, n + 1) for n, scene in enumerate(sources))
    first, second, third = (scene.objects[0] for scene in sources)
    return lang.pick(rng, _THREE).format(a=a, b=b, c=c), triangle_layout(first, second, third, lattice)


def sample_composition(
    rng: np.random.Generator, preset: lang.PresetLike, split: str, references: int = 2
) -> Composition:
    """A composition of single-object scenes.

    Args:
        rng: Source of the variety.
        preset: Gives classes, styles, sizes, lattice and backgrounds.
        split: ``"train"``: neither sources nor result hold a held-out combination; ``"held_out"``: the result does.
        references: 2 or 3 reference pictures.

    Raises:
        InputError: ``references`` is neither 2 nor 3, or the preset allows no such composition.
    """
    if references not in (2, 3):
        raise InputError(f"references={references}; expected 2 or 3")
    three = references == 3 and preset.max_objects >= 3 and rng.random() < 0.4
    for _ in range(_ATTEMPTS):
        sources = tuple(_single(rng, preset, split) for _ in range(references))
        subjects = tuple(scene.objects[0] for scene in sources)
        used = Scene("", subjects if three else subjects[:2])
        if len({item.name for item in subjects}) == references and is_held_out(used) == (split == "held_out"):
            break
    else:
        raise InputError(
            f"found no composition of {references} references in split {split!r}; the preset has too few classes"
        )
    phrase, placed = (_three if three else _two)(rng, sources, preset.lattice)
    background, ground = sources[0].background, ""
    if references == 3 and not three:
        background, ground = sources[2].background, lang.pick(rng, _IMAGE_GROUND).format(3)
    elif rng.random() < 0.2:
        background = lang.pick(rng, preset.backgrounds)
        ground = lang.pick(rng, _NAMED_GROUND).format(lang.indefinite(background))
    elif rng.random() < 0.25:
        number = 1 + int(rng.random() * references)
        background, ground = sources[number - 1].background, lang.pick(rng, _IMAGE_GROUND).format(number)
    if ground:
        phrase = f"{ground}, {phrase}" if rng.random() < 0.15 else f"{phrase}, {ground}"
    kind = "three" if three else "background" if references == 3 else "pair"
    return Composition(phrase, sources, Scene(background, placed), kind)
