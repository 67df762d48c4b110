"""Samples scenes: which objects, which drawings, where, in front of what.

Honours the preset's lattice and the held-out split. Knows nothing of pixels or language.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from unialignment.errors import InputError
from unialignment.world.presets import WorldPreset
from unialignment.world.scene import CANVAS_UNITS, Scene, SceneObject
from unialignment.world.splits import combination_held_out, is_held_out_style

Split = Literal["train", "held_out"]

OVERLAP_PROBABILITY = 0.15
REPEAT_PROBABILITY = 0.15
MIN_OVERLAP, MAX_OVERLAP = 0.3, 0.5
"""Overlaps meant as such, as fractions of the smaller box: enough to see which is in front and what both are."""

_TRIES = 40
_PLACEMENTS = 2
_RESTARTS = 200


class _Dice:
    """Uniform integers and booleans from a generator, drawn in blocks: a single draw through numpy costs 3 us."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._draws: list[float] = []

    def unit(self) -> float:
        """A number in [0, 1)."""
        if not self._draws:
            self._draws = self._rng.random(64).tolist()
        return self._draws.pop()

    def below(self, count: int) -> int:
        """An integer in [0, count)."""
        return int(self.unit() * count)

    def order(self, count: int) -> list[int]:
        """A random permutation."""
        items = list(range(count))
        for last in range(count - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]
        return items


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
    least = max(1, len(required), 2 if overlap or repeat else 1)
    dice = _Dice(rng)
    number = count if count is not None else least + dice.below(preset.max_objects + 1 - least)
    for _ in range(_RESTARTS):
        chosen = _choose(dice, preset, split, number, required, repeat)
        if chosen is None:
            if count is None:
                # Some counts may not exist in this split, such as one held-out object where only pairs are held out.
                number = least + dice.below(preset.max_objects + 1 - least)
            continue
        overlapping = overlap if overlap is not None else dice.unit() < OVERLAP_PROBABILITY
        objects = _place(dice, preset, chosen, overlapping and number >= 2)
        if objects is not None:
            ground = background if background is not None else preset.backgrounds[dice.below(len(preset.backgrounds))]
            return Scene(ground, objects)
    raise InputError(
        f"no {split} scene with count={count}, names={names}, repeat={repeat}, overlap={overlap} found in preset "
        f"{preset.name!r}: relax one of them"
    )


def positions(preset: WorldPreset, size: int) -> range:
    """Coordinates allowed for the left or top edge of a sprite of this size, scene units."""
    return range(0, CANVAS_UNITS - size + 1, preset.lattice)


def find_position(
    rng: np.random.Generator,
    preset: WorldPreset,
    item: SceneObject,
    others: Sequence[SceneObject],
) -> SceneObject | None:
    """The object moved to a random allowed place where its box touches no other's, or ``None`` if none was found.

    Args:
        rng: Source of all randomness.
        preset: Gives the lattice.
        item: What to place; its own position is ignored.
        others: Objects to keep clear of.
    """
    return _position(_Dice(rng), preset, (item.name, item.style, item.size), list(others), False)


def _place(
    dice: _Dice, preset: WorldPreset, chosen: list[tuple[str, str, int]], overlapping: bool
) -> tuple[SceneObject, ...] | None:
    """Positions for ``(name, style, size)`` objects in random depth order, or ``None`` if they don't fit.

    If ``overlapping``, exactly one pair overlaps, else none does.
    """
    count = len(chosen)
    for _ in range(_PLACEMENTS):
        placed: list[SceneObject] = []
        order = dice.order(count)
        # The first two become the overlapping pair; of the others, large ones first, or they'd find no room.
        first = 2 if overlapping else 0
        order[first:] = sorted(order[first:], key=lambda index: -chosen[index][2])
        for index in order:
            found = _position(dice, preset, chosen[index], placed, overlapping and len(placed) == 1)
            if found is None:
                break
            placed.append(found)
        if len(placed) == count:
            # Depth is shuffled apart from the order of placing, so that either of a pair may be in front.
            return tuple(placed[index] for index in dice.order(count))
    return None


def _position(
    dice: _Dice, preset: WorldPreset, item: tuple[str, str, int], placed: list[SceneObject], overlapping: bool
) -> SceneObject | None:
    name, style, size = item
    allowed = positions(preset, size)
    for _ in range(_TRIES):
        x, y = allowed[dice.below(len(allowed))], allowed[dice.below(len(allowed))]
        if overlapping:
            candidate = SceneObject(name, style, size, x, y)
            if MIN_OVERLAP <= candidate.overlap(placed[0]) <= MAX_OVERLAP:
                return candidate
        elif not any(
            x < other.x + other.size and other.x < x + size and y < other.y + other.size and other.y < y + size
            for other in placed
        ):
            return SceneObject(name, style, size, x, y)
    return None


def _choose(
    dice: _Dice, preset: WorldPreset, split: Split, count: int, required: tuple[str, ...], repeat: bool | None
) -> list[tuple[str, str, int]] | None:
    """Names, styles and sizes that honour the split, or ``None`` if none were found."""
    for _ in range(_TRIES):
        again = count >= 2 and (repeat if repeat is not None else dice.unit() < REPEAT_PROBABILITY)
        again = again and count > len(required)
        names = list(required)
        while len(names) < count - again:
            name = preset.names[dice.below(len(preset.names))]
            if name not in names:
                names.append(name)
        objects = [
            (name, _style(dice, preset, split, name), preset.sizes[dice.below(len(preset.sizes))]) for name in names
        ]
        if again:
            objects.append(objects[dice.below(len(objects))])
        if combination_held_out(tuple((name, style) for name, style, _ in objects)) == (split == "held_out"):
            return objects
    return None


def _style(dice: _Dice, preset: WorldPreset, split: Split, name: str) -> str:
    style = preset.styles[dice.below(len(preset.styles))]
    if split == "train" and is_held_out_style(name, style):
        # Rejecting the whole scene instead would make such classes half as frequent in training as the others.
        allowed = [other for other in preset.styles if not is_held_out_style(name, other)]
        if allowed:
            style = allowed[dice.below(len(allowed))]
    return style


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
        if len(set(names)) < len(names):
            raise InputError(f"names {names} repeat a class: give each once, and repeat=True for two of one")
        most = (count if count is not None else preset.max_objects) - bool(repeat)
        if len(names) > most:
            raise InputError(f"{len(names)} names for at most {most} objects")
    if background is not None and background not in preset.backgrounds:
        raise InputError(f"unknown background {background!r}: expected one of {', '.join(preset.backgrounds)}")
