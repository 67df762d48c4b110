"""Samples scenes: which objects, which drawings, where, in front of what.

Honours the preset's lattice and the held-out split. Knows nothing of pixels or language.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from unialignment.errors import InputError
from unialignment.world.presets import WorldPreset
from unialignment.world.scene import CANVAS_UNITS, Scene, SceneObject
from unialignment.world.splits import combination_held_out

Split = Literal["train", "held_out"]

OVERLAP_PROBABILITY = 0.15
REPEAT_PROBABILITY = 0.15
MIN_OVERLAP, MAX_OVERLAP = 0.25, 0.5
"""Overlaps that are meant as such, as fractions of the smaller box: enough to see which one is in front, and what both are."""

_TRIES = 64
_RESTARTS = 200


def sample_scene(
    rng: np.random.Generator,
    preset: WorldPreset,
    split: Split = "train",
    count: int | None = None,
    overlap: bool | None = None,
    repeat: bool | None = None,
    names: tuple[str, ...] | None = None,
    background: str | None = None,
) -> Scene:
    """A random scene.

    Args:
        rng: Source of all randomness.
        preset: What the scene may contain.
        split: ``"train"``: no held-out combination; ``"held_out"``: at least one.
        count: Number of objects, 0 to ``preset.max_objects``; by default uniform from 1.
        overlap: ``True``: two objects overlap visibly (``MIN_OVERLAP`` to ``MAX_OVERLAP`` of the smaller box);
            ``False``: none do; ``None``: now and then, in scenes of at least two objects.
        repeat: Whether a class occurs twice (with the same style and size, "two dogs"); ``None``: now and then.
        names: Classes that the scene must contain, one object each, in random depth order.
        background: Background name; random by default.

    Returns:
        Objects in random depth order, all wholly inside the canvas. Boxes share area only where ``overlap`` says so,
        and then only one pair does.

    Raises:
        InputError: the arguments contradict each other or the preset, or no such scene exists in this split.
    """
    _check(preset, split, count, overlap, repeat, names, background)
    required = tuple(names) if names is not None else ()
    least = max(1, len(required), 2 if overlap or repeat else 1, len(required) + 1 if repeat and not required else 1)
    for _ in range(_RESTARTS):
        number = count if count is not None else int(rng.integers(least, preset.max_objects + 1))
        chosen = _choose(rng, preset, split, number, required, repeat)
        if chosen is None:
            if count is not None:
                break
            continue
        if background is not None:
            ground = background
        else:
            ground = preset.backgrounds[int(rng.integers(len(preset.backgrounds)))]
        overlapping = overlap if overlap is not None else bool(rng.random() < OVERLAP_PROBABILITY)
        objects = place(rng, preset, chosen, overlapping and number >= 2)
        if objects is not None:
            return Scene(ground, objects)
    raise InputError(
        f"no {split} scene with count={count}, names={names}, repeat={repeat}, overlap={overlap} found in preset "
        f"{preset.name!r}: relax one of them"
    )


def positions(preset: WorldPreset, size: int) -> range:
    """Coordinates allowed for the left or top edge of a sprite of this size, scene units."""
    return range(0, CANVAS_UNITS - size + 1, preset.lattice)


def place(
    rng: np.random.Generator,
    preset: WorldPreset,
    chosen: list[tuple[str, str, int]],
    overlapping: bool,
) -> tuple[SceneObject, ...] | None:
    """Positions for ``(name, style, size)`` objects, in random depth order, or ``None`` if they don't fit.

    Args:
        rng: Source of all randomness.
        preset: Gives the lattice.
        chosen: Objects to place.
        overlapping: Whether exactly one pair of objects overlaps (else none does).
    """
    count = len(chosen)
    for _ in range(8):
        order = rng.permutation(count).tolist()
        placed: list[SceneObject] = []
        for index in order:
            # The first two of the random order are the pair; shuffling depth afterwards keeps both ways round.
            found = _position(rng, preset, chosen[index], placed, overlapping and len(placed) == 1)
            if found is None:
                break
            placed.append(found)
        if len(placed) == count:
            return tuple(placed[index] for index in rng.permutation(count).tolist())
    return None


def _position(
    rng: np.random.Generator,
    preset: WorldPreset,
    item: tuple[str, str, int],
    placed: list[SceneObject],
    overlapping: bool,
) -> SceneObject | None:
    name, style, size = item
    allowed = positions(preset, size)
    draws = rng.integers(0, len(allowed), (_TRIES, 2)).tolist()
    for column, row in draws:
        candidate = SceneObject(name, style, size, allowed[column], allowed[row])
        if overlapping:
            if MIN_OVERLAP <= candidate.overlap(placed[0]) <= MAX_OVERLAP:
                return candidate
        elif all(candidate.overlap(other) == 0 for other in placed):
            return candidate
    return None


def _choose(
    rng: np.random.Generator,
    preset: WorldPreset,
    split: Split,
    count: int,
    required: tuple[str, ...],
    repeat: bool | None,
) -> list[tuple[str, str, int]] | None:
    """Names, styles and sizes that honour the split, or ``None`` if none were found."""
    for _ in range(_RESTARTS):
        again = repeat if repeat is not None else bool(rng.random() < REPEAT_PROBABILITY)
        again = again and count >= 2 and (count > len(required) or len(set(required)) < len(required))
        extra = count - len(required) - (1 if again and count > len(required) else 0)
        chosen_names = list(required) + _distinct(rng, preset.names, extra, required)
        styles = rng.integers(len(preset.styles), size=count).tolist()
        sizes = rng.integers(len(preset.sizes), size=count).tolist()
        objects = [(n, preset.styles[s], preset.sizes[z]) for n, s, z in zip(chosen_names, styles, sizes, strict=False)]
        if len(objects) < count:
            objects.append(objects[int(rng.integers(len(objects)))])
        if combination_held_out(tuple((n, s) for n, s, _ in objects)) == (split == "held_out"):
            return objects
    return None


def _distinct(rng: np.random.Generator, names: tuple[str, ...], count: int, taken: tuple[str, ...]) -> list[str]:
    """``count`` different names, none of them in ``taken``; rejection is cheaper than a permutation of 700."""
    result: list[str] = []
    while len(result) < count:
        name = names[int(rng.integers(len(names)))]
        if name not in result and name not in taken:
            result.append(name)
    return result


def _check(
    preset: WorldPreset,
    split: str,
    count: int | None,
    overlap: bool | None,
    repeat: bool | None,
    names: tuple[str, ...] | None,
    background: str | None,
) -> None:
    if split not in ("train", "held_out"):
        raise InputError(f"unknown split {split!r}: expected train or held_out")
    if count is not None and not 0 <= count <= preset.max_objects:
        raise InputError(f"count={count}: preset {preset.name!r} has scenes of 0 to {preset.max_objects} objects")
    if count is not None and count < 2 and (overlap or repeat):
        raise InputError(f"count={count}: an overlap or a repeated class needs at least 2 objects")
    if names is not None:
        unknown = [name for name in names if name not in preset.names]
        if unknown:
            raise InputError(f"{', '.join(map(repr, unknown))}: no such class in preset {preset.name!r}")
        most = count if count is not None else preset.max_objects
        if len(names) > most:
            raise InputError(f"{len(names)} names for at most {most} objects")
    if background is not None and background not in preset.backgrounds:
        raise InputError(f"unknown background {background!r}: expected one of {', '.join(preset.backgrounds)}")
