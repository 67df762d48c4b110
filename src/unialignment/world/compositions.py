"""Compositions: an instruction that puts the subjects of two or three pictures together, with the exact result.

Layout conventions: sizes and styles are kept. Of two subjects, *next to*, *left of* and *right of* put one in the left
half and one in the right half, halfway up; *above* and *below* put one in the upper and one in the lower half, halfway
across. The first named is on the left for *next to*. Of three, the third is centred in the lower half, below the other
two, which are in the upper corners' halves. The background is that of image 1 unless another is named.
Knows nothing of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from unialignment.errors import InputError
from unialignment.world import language as lang
from unialignment.world.edits import snapped
from unialignment.world.scene import CANVAS_UNITS, Scene, SceneObject
from unialignment.world.splits import is_held_out, is_held_out_style

_HALF = CANVAS_UNITS // 2
_ATTEMPTS = 400


@dataclass(frozen=True)
class Composition:
    """References, instruction and result.

    Attributes:
        instruction: What to make; pictures are called "image 1" and so on, in the order of ``sources``.
        sources: The reference scenes, one object each.
        result: The exact result.
        kind: ``"pair"`` (two subjects), ``"background"`` (a background from a reference too) or ``"three"`` (three subjects).
    """

    instruction: str
    sources: tuple[Scene, ...]
    result: Scene
    kind: str


def half(side: int, size: int, lattice: int) -> int:
    """Coordinate of an object centred in the first (0) or second (1) half of the canvas; mirror images of each other."""
    first = snapped((_HALF - size) / 2, size, lattice)
    return first if side == 0 else CANVAS_UNITS - size - first


def _middle(size: int, lattice: int) -> int:
    return snapped((CANVAS_UNITS - size) / 2, size, lattice)


def pair_layout(first: SceneObject, second: SceneObject, relation: str, lattice: int) -> tuple[SceneObject, SceneObject]:
    """Two objects placed so that ``first`` is in ``relation`` (left, right, above, below) to ``second``."""
    placed = []
    for item, side in ((first, 0), (second, 1)) if relation in ("left", "above") else ((first, 1), (second, 0)):
        along, across = half(side, item.size, lattice), _middle(item.size, lattice)
        x, y = (along, across) if relation in ("left", "right") else (across, along)
        placed.append(replace(item, x=x, y=y))
    return placed[0], placed[1]


def triangle_layout(items: tuple[SceneObject, SceneObject, SceneObject], lattice: int) -> tuple[SceneObject, ...]:
    """Two objects in the upper half, left and right, and the third below them in the middle."""
    a, b, c = items
    return (
        replace(a, x=half(0, a.size, lattice), y=half(0, a.size, lattice)),
        replace(b, x=half(1, b.size, lattice), y=half(0, b.size, lattice)),
        replace(c, x=_middle(c.size, lattice), y=half(1, c.size, lattice)),
    )


def _single(rng: np.random.Generator, preset: lang.PresetLike, split: str) -> Scene:
    """A one-object scene on the lattice."""
    while True:
        name, style, size = lang.pick(rng, preset.names), lang.pick(rng, preset.styles), lang.pick(rng, preset.sizes)
        if split == "train" and is_held_out_style(name, style):
            continue
        steps = (CANVAS_UNITS - size) // preset.lattice + 1
        x, y = int(rng.random() * steps) * preset.lattice, int(rng.random() * steps) * preset.lattice
        return Scene(lang.pick(rng, preset.backgrounds), (SceneObject(name, style, size, x, y),))


_NEXT = ("next to", "beside", "to the left of", "to the right of", "above", "below")
_RELATION_OF = {"next to": "left", "beside": "left", "to the left of": "left", "to the right of": "right", "above": "above",
                "below": "below"}  # fmt: skip


def _subject(rng: np.random.Generator, scene: Scene, number: int) -> str:
    item = scene.objects[0]
    draw = rng.random()
    if draw < 0.35:
        return lang.pick(rng, (f"the subject of image {number}", f"the object from image {number}", f"what image {number} shows"))
    if draw < 0.5:
        return f"the {lang.style_adjective(item.style)} {item.name} from image {number}"
    return lang.pick(rng, (f"the {item.name} from image {number}", f"the {item.name} of image {number}", f"the {item.name} in image {number}"))


def _ground(rng: np.random.Generator, background: str, number: int | None) -> str:
    if number is None:
        return lang.pick(rng, ("on {} background", "with {} background")).format(lang.indefinite(background))
    return lang.pick(rng, ("on the background of image {}", "with the background of image {}", "against the background from image {}")).format(number)


def _two_subjects(rng: np.random.Generator, a: str, b: str) -> tuple[str, str]:
    """A phrase that puts two subjects together and the relation of the first to the second."""
    if rng.random() < 0.3:
        return lang.pick(rng, (f"put {a} and {b} side by side", f"show {a} and {b} next to each other", f"combine {a} and {b}",
                               f"make a picture of {a} and {b}")), "left"  # fmt: skip
    words = lang.pick(rng, _NEXT)
    return lang.pick(rng, (f"put {a} {words} {b}", f"place {a} {words} {b}", f"show {a} {words} {b}")), _RELATION_OF[words]


def sample_composition(rng: np.random.Generator, preset: lang.PresetLike, split: str, references: int = 2) -> Composition:
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
    for _ in range(_ATTEMPTS):
        sources = tuple(_single(rng, preset, split) for _ in range(references))
        subjects = tuple(scene.objects[0] for scene in sources)
        if len({item.name for item in subjects}) < references:
            continue
        three = references == 3 and preset.max_objects >= 3 and rng.random() < 0.4
        used = subjects if three else subjects[:2]
        background, ground, kind = sources[0].background, "", "three" if three else "pair"
        order = [0, 1] if references == 2 or rng.random() < 0.7 else [1, 0]
        phrase, relation = _two_subjects(
            rng, _subject(rng, sources[order[0]], order[0] + 1), _subject(rng, sources[order[1]], order[1] + 1)
        )
        if three:
            result_objects = triangle_layout((subjects[0], subjects[1], subjects[2]), preset.lattice)
            names = [_subject(rng, scene, n + 1) for n, scene in enumerate(sources)]
            phrase = lang.pick(rng, (
                f"put {names[0]} next to {names[1]}, with {names[2]} below them",
                f"show {names[0]} and {names[1]} side by side and {names[2]} below",
                f"combine {names[0]}, {names[1]} and {names[2]}",
            ))  # fmt: skip
        else:
            result_objects = pair_layout(subjects[order[0]], subjects[order[1]], relation, preset.lattice)
        if references == 3 and not three:
            background, ground, kind = sources[2].background, _ground(rng, "", 3), "background"
        elif rng.random() < 0.4:
            if rng.random() < 0.5:
                background = lang.pick(rng, preset.backgrounds)
                ground = _ground(rng, background, None)
            else:
                number = 1 + int(rng.random() * references)
                background, ground = sources[number - 1].background, _ground(rng, "", number)
        result = Scene(background, result_objects)
        if is_held_out(Scene(background, used)) != (split == "held_out"):
            continue
        instruction = phrase
        if ground:
            instruction = f"{ground}, {phrase}" if rng.random() < 0.15 else f"{phrase}{',' if three else ''} {ground}"
        return Composition(instruction, sources, result, kind)
    raise InputError(f"found no composition of {references} references in split {split!r}; the preset has too few classes or styles")
