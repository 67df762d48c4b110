"""Editing instructions with their exact result: replace, remove, add, move, resize, restyle, background, and several at once.

Conventions that make a result exact (positions are snapped down to the preset's lattice):

* What an instruction doesn't mention stays: a replaced object keeps size, position and depth, and its style unless one
  is named; a moved, restyled or resized object keeps everything else.
* A *place* ("in the top left corner", "at the bottom", "in the center") is flush with the sides it names and centred
  along the others. An *edge* ("to the left edge") moves only across: the other coordinate is kept.
* "to the left of X" (right of, above, below) touches X's box, with the centres level, pushed into the canvas if needed.
* A new object is the frontmost; without a size adjective it is medium, and its style is always said ("another dog"
  copies the dog there is).
* A resized object keeps its centre, pushed into the canvas if needed.
* Several clauses act on different objects, and objects named as landmarks are left alone, so their order doesn't matter.

Knows nothing of pixels and of models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from unialignment.errors import InputError
from unialignment.world import language as lang
from unialignment.world.scene import CANVAS_UNITS, Scene, SceneObject
from unialignment.world.splits import is_held_out

MIN_MOVE = 8
"""Least distance, in scene units, that an object is moved."""

RESIZE_OVERLAP = 0.3
"""Most overlap (fraction of the smaller box) that growing an object may cause."""

_ATTEMPTS = 60

_INTO_PLACE: dict[lang.Place, tuple[str, ...]] = {
    (0, 0): ("to the top left corner", "to the top left", "into the upper left corner"),
    (0, 1): ("to the top center", "to the middle of the top edge"),
    (0, 2): ("to the top right corner", "to the top right", "into the upper right corner"),
    (1, 0): ("to the middle of the left side", "to the left side, halfway up"),
    (1, 1): ("to the center", "to the middle of the picture", "into the center"),
    (1, 2): ("to the middle of the right side", "to the right side, halfway up"),
    (2, 0): ("to the bottom left corner", "to the bottom left", "into the lower left corner"),
    (2, 1): ("to the bottom center", "to the middle of the bottom edge"),
    (2, 2): ("to the bottom right corner", "to the bottom right", "into the lower right corner"),
}
_EDGES = {"left": "to the left edge", "right": "to the right edge", "above": "to the top edge", "below": "to the bottom edge"}
_BESIDE = {"left": ("to the left of",), "right": ("to the right of",), "above": ("above", "right above"),
           "below": ("below", "right below")}  # fmt: skip


@dataclass(frozen=True)
class Edit:
    """An instruction and what it makes of a scene.

    Attributes:
        instruction: The whole instruction.
        result: The exact result.
        kinds: Kind of each clause, in order; each one of :data:`KINDS`.
        clauses: The clauses one by one, as they read before being joined.
    """

    instruction: str
    result: Scene
    kinds: tuple[str, ...]
    clauses: tuple[str, ...] = ()


# --- geometry -------------------------------------------------------------------------------------------------------


def snapped(value: float, size: int, lattice: int) -> int:
    """The largest lattice coordinate not above ``value``, pushed into the canvas for an object of this size."""
    top = (CANVAS_UNITS - size) // lattice * lattice
    return int(min(max(value // lattice * lattice, 0), top))


def at_place(place: lang.Place, size: int, lattice: int) -> tuple[int, int]:
    """``(x, y)`` of an object put at a place: flush with the sides that the place names, centred along the others."""
    coordinates = [snapped((CANVAS_UNITS - size) * third / 2, size, lattice) for third in place]
    return coordinates[1], coordinates[0]


def at_edge(item: SceneObject, direction: str, lattice: int) -> tuple[int, int]:
    """``(x, y)`` of an object pushed to an edge; the other coordinate is kept."""
    end = snapped(CANVAS_UNITS, item.size, lattice)
    return {"left": (0, item.y), "right": (end, item.y), "above": (item.x, 0), "below": (item.x, end)}[direction]


def beside(anchor: SceneObject, direction: str, size: int, lattice: int) -> tuple[int, int] | None:
    """``(x, y)`` of an object touching ``anchor`` on one side, centres level; ``None`` when there is no room."""
    level = (anchor.size - size) / 2
    x, y = anchor.x + level, anchor.y + level
    if direction == "left":
        x = anchor.x - size
    elif direction == "right":
        x = anchor.x + anchor.size
    elif direction == "above":
        y = anchor.y - size
    else:
        y = anchor.y + anchor.size
    along, across = (x, y) if direction in ("left", "right") else (y, x)
    if not 0 <= along <= CANVAS_UNITS - size or along % lattice:
        return None
    across = snapped(across, size, lattice)
    return (int(along), across) if direction in ("left", "right") else (across, int(along))


def resized(item: SceneObject, size: int, lattice: int) -> SceneObject:
    """The object at another size, around the same centre."""
    shift = (item.size - size) / 2
    return replace(
        item, size=size, x=snapped(item.x + shift, size, lattice), y=snapped(item.y + shift, size, lattice)
    )


# --- clauses --------------------------------------------------------------------------------------------------------


class _Draft:
    """A scene on its way from source to result, and what the clauses so far have touched."""

    def __init__(self, source: Scene, preset: lang.PresetLike) -> None:
        self.source = source
        self.preset = preset
        self.background = source.background
        self.items: list[SceneObject | None] = list(source.objects)
        self.added: list[SceneObject] = []
        self.touched: set[int] = set()
        self.pinned: set[int] = set()
        self.new_names: set[str] = set()

    def result(self) -> Scene:
        return Scene(self.background, tuple(item for item in [*self.items, *self.added] if item is not None))

    def count(self) -> int:
        return sum(item is not None for item in self.items) + len(self.added)

    def others(self, *indices: int) -> list[SceneObject]:
        kept = [item for i, item in enumerate(self.items) if item is not None and i not in indices]
        return kept + self.added

    def free(self, item: SceneObject, *indices: int, limit: float = 0.0) -> bool:
        """Whether an object overlaps nothing (but the objects ``indices`` that it replaces) by more than ``limit``."""
        return all(item.overlap(other) <= limit for other in self.others(*indices))

    def equals(self, index: int) -> list[int]:
        name = self.source.objects[index].name
        return [i for i, item in enumerate(self.source.objects) if item.name == name]

    def available(self, index: int) -> bool:
        """Whether a clause may act on an object: nothing else was said of it or of another of its class."""
        return not any(i in self.touched or i in self.pinned for i in self.equals(index))

    def choose(self, rng: np.random.Generator) -> tuple[int, str] | None:
        """An object to act on, with an unambiguous reference to it."""
        options = [i for i in range(len(self.items)) if self.available(i)]
        if not options:
            return None
        index = lang.pick(rng, options)
        reference = lang.refer(self.source, index, rng)
        return None if reference is None else (index, reference)

    def anchors(self, *excluded: int) -> list[int]:
        """Objects that can serve as landmarks."""
        return [
            i
            for i in range(len(self.items))
            if i not in excluded
            and (self.available(i) or (i in self.pinned and not any(j in self.touched for j in self.equals(i))))
            and not any(j in excluded for j in self.equals(i))
            and lang.references(self.source, i)
        ]

    def fresh_name(self, rng: np.random.Generator) -> str | None:
        taken = {item.name for item in self.source.objects} | self.new_names
        for _ in range(8):
            name = lang.pick(rng, self.preset.names)
            if name not in taken:
                return name
        return None


_Clause = Callable[[_Draft, np.random.Generator], "str | None"]
"""Applies itself to the draft and returns its text; ``None`` (and an unchanged draft) when it doesn't fit."""


def _replace(draft: _Draft, rng: np.random.Generator) -> str | None:
    chosen, name = draft.choose(rng), draft.fresh_name(rng)
    if chosen is None or name is None:
        return None
    index, reference = chosen
    item = draft.source.objects[index]
    style, adjective = item.style, ""
    if rng.random() < 0.35:
        style = lang.pick(rng, draft.preset.styles)
        adjective = lang.style_adjective(style)
    draft.items[index] = replace(item, name=name, style=style)
    draft.touched.add(index)
    draft.new_names.add(name)
    noun = lang.indefinite(name, adjective)
    return lang.pick(rng, (f"replace {reference} with {noun}", f"turn {reference} into {noun}", f"swap {reference} for {noun}",
                           f"change {reference} to {noun}", f"put {noun} where {reference} {lang.be(item.name)}",
                           f"instead of {reference}, show {noun}"))  # fmt: skip


def _remove(draft: _Draft, rng: np.random.Generator) -> str | None:
    chosen = draft.choose(rng)
    if chosen is None:
        index = int(rng.random() * len(draft.items))
        if not draft.available(index):
            return None
        gone, reference = draft.equals(index), ""
    else:
        index, reference = chosen
        gone = [index]
    equals = draft.equals(index)
    if len(equals) > 1 and (not reference or rng.random() < 0.4):
        name = draft.source.objects[index].name
        gone, reference = equals, f"all the {lang.plural(name)}"
        if len(equals) == 2 and lang.plural(name) != name:
            reference = lang.pick(rng, (f"both {lang.plural(name)}", f"the two {lang.plural(name)}"))
    if not reference or draft.count() <= len(gone):
        return None
    for i in gone:
        draft.items[i] = None
    draft.touched.update(gone)
    return lang.pick(rng, ("remove {}", "delete {}", "take away {}", "erase {}", "get rid of {}")).format(reference)


def _spots(
    draft: _Draft, item: SceneObject, rng: np.random.Generator, index: int | None = None
) -> tuple[SceneObject, str, int | None] | None:
    """A free spot for a new object (``index=None``) or for a moved one: the object there, the words, the landmark."""
    lattice = draft.preset.lattice
    skip = () if index is None else (index,)
    anchors = draft.anchors(*skip)
    for _ in range(6):
        anchor: int | None = None
        draw = rng.random()
        if anchors and draw < 0.45:
            anchor = lang.pick(rng, anchors)
            direction = lang.pick(rng, lang.DIRECTIONS)
            spot = beside(draft.source.objects[anchor], direction, item.size, lattice)
            if spot is None:
                continue
            words = f"{lang.pick(rng, _BESIDE[direction])} {lang.refer(draft.source, anchor, rng)}"
        elif index is not None and draw < 0.65:
            direction = lang.pick(rng, lang.DIRECTIONS)
            spot, words = at_edge(item, direction, lattice), _EDGES[direction]
        else:
            place = lang.pick(rng, tuple(lang.PLACE_NAMES))
            spot = at_place(place, item.size, lattice)
            words = lang.pick(rng, (lang.PLACE_PHRASES if index is None else _INTO_PLACE)[place])
        candidate = replace(item, x=spot[0], y=spot[1])
        if index is not None and max(abs(candidate.x - item.x), abs(candidate.y - item.y)) < MIN_MOVE:
            continue
        if draft.free(candidate, *skip):
            return candidate, words, anchor
    return None


def _add(draft: _Draft, rng: np.random.Generator) -> str | None:
    if draft.count() >= draft.preset.max_objects:
        return None
    copies = [i for i in range(len(draft.items)) if len(draft.equals(i)) == 1 and draft.available(i)]
    another: int | None = None
    if copies and rng.random() < 0.15:
        another = lang.pick(rng, copies)
        model = draft.source.objects[another]
        item = replace(model, x=0, y=0)
        noun = f"another {item.name}"
        if lang.is_plural(item.name) or lang.is_mass(item.name):
            noun = f"more {item.name}"
    else:
        name = draft.fresh_name(rng)
        if name is None:
            return None
        item = SceneObject(name, lang.pick(rng, draft.preset.styles), lang.pick(rng, draft.preset.sizes), 0, 0)
        noun = lang.indefinite(name, lang.adjectives(item))
    found = _spots(draft, item, rng)
    if found is None:
        return None
    placed, words, anchor = found
    draft.added.append(placed)
    draft.new_names.add(placed.name)
    if anchor is not None:
        draft.pinned.add(anchor)
    if another is not None:
        draft.touched.add(another)
    return lang.pick(rng, ("add {0} {1}", "put {0} {1}", "place {0} {1}", "insert {0} {1}", "draw {0} {1}")).format(noun, words)


def _swap(draft: _Draft, rng: np.random.Generator) -> str | None:
    free = [i for i in range(len(draft.items)) if draft.available(i) and len(draft.equals(i)) == 1]
    pairs = [(i, j) for i in free for j in free if i < j and draft.source.objects[i].size == draft.source.objects[j].size]
    if not pairs:
        return None
    i, j = lang.pick(rng, pairs)
    first, second = draft.source.objects[i], draft.source.objects[j]
    if max(abs(first.x - second.x), abs(first.y - second.y)) < MIN_MOVE:
        return None
    draft.items[i] = replace(first, x=second.x, y=second.y)
    draft.items[j] = replace(second, x=first.x, y=first.y)
    draft.touched.update((i, j))
    a, b = lang.shuffled(rng, (f"the {first.name}", f"the {second.name}"))
    return lang.pick(rng, (f"swap the positions of {a} and {b}", f"let {a} and {b} trade places", f"exchange {a} and {b}"))


def _move(draft: _Draft, rng: np.random.Generator) -> str | None:
    if rng.random() < 0.15:
        return _swap(draft, rng)
    chosen = draft.choose(rng)
    if chosen is None:
        return None
    index, reference = chosen
    found = _spots(draft, draft.source.objects[index], rng, index)
    if found is None:
        return None
    placed, words, anchor = found
    draft.items[index] = placed
    draft.touched.add(index)
    if anchor is not None:
        draft.pinned.add(anchor)
    return lang.pick(rng, ("move {0} {1}", "shift {0} {1}", "move {0} {1}", "put {0} {1}" if anchor is not None else "bring {0} {1}")).format(
        reference, words
    )


def _resize(draft: _Draft, rng: np.random.Generator) -> str | None:
    chosen = draft.choose(rng)
    if chosen is None:
        return None
    index, reference = chosen
    item = draft.source.objects[index]
    sizes = sorted(draft.preset.sizes)
    options = [size for size in sizes if size != item.size]
    if not options:
        return None
    size = lang.pick(rng, options)
    changed = resized(item, size, draft.preset.lattice)
    before = max((item.overlap(other) for other in draft.others(index)), default=0.0)
    if not draft.free(changed, index, limit=max(RESIZE_OVERLAP, before)):
        return None
    draft.items[index] = changed
    draft.touched.add(index)
    adjective = lang.size_adjective(size)
    absolute = (f"make {reference} {adjective}", f"resize {reference} to {adjective}", f"change the size of {reference} to {adjective}")
    step = sizes.index(size) - sizes.index(item.size) if item.size in sizes else 0
    if abs(step) == 1 and rng.random() < 0.6:
        comparative = (f"make {reference} bigger", f"make {reference} larger", f"enlarge {reference}")
        if step < 0:
            comparative = (f"make {reference} smaller", f"shrink {reference}", f"reduce the size of {reference}")
        return lang.pick(rng, comparative)
    return lang.pick(rng, absolute)


def _restyle(draft: _Draft, rng: np.random.Generator) -> str | None:
    style = lang.pick(rng, draft.preset.styles)
    adjective = lang.style_adjective(style)
    if not draft.touched and not draft.added and len(draft.items) > 1 and rng.random() < 0.25:
        present = [item for item in draft.items if item is not None]
        if all(item.style == style for item in present):
            return None
        draft.items = [None if item is None else replace(item, style=style) for item in draft.items]
        draft.touched.update(range(len(draft.items)))
        return lang.pick(rng, ("redraw everything in the {} style", "make all objects {}", "draw all objects in the {} style")).format(adjective)
    chosen = draft.choose(rng)
    if chosen is None:
        return None
    index, reference = chosen
    item = draft.source.objects[index]
    if item.style == style:
        return None
    draft.items[index] = replace(item, style=style)
    draft.touched.add(index)
    return lang.pick(rng, (f"draw {reference} in the {adjective} style", f"make {reference} {adjective}", f"restyle {reference} as {adjective}",
                           f"change the style of {reference} to {adjective}", f"redraw {reference} in the {adjective} style"))  # fmt: skip


def _background(draft: _Draft, rng: np.random.Generator) -> str | None:
    if draft.background != draft.source.background:
        return None
    color = lang.pick(rng, draft.preset.backgrounds)
    if color == draft.background:
        return None
    draft.background = color
    return lang.pick(rng, (f"make the background {color}", f"change the background to {color}", f"recolor the background {color}",
                           f"put everything on {lang.indefinite(color)} background", f"use {lang.indefinite(color)} background",
                           f"turn the background {color}", f"set the background color to {color}"))  # fmt: skip


_CLAUSES: dict[str, _Clause] = {
    "replace": _replace,
    "remove": _remove,
    "add": _add,
    "move": _move,
    "resize": _resize,
    "restyle": _restyle,
    "background": _background,
}

KINDS = tuple(_CLAUSES)
"""Kinds of clause."""

_JOINERS_TWO = ("{0} and {1}", "{0}, and {1}", "{0}, then {1}", "{0}. also, {1}", "{0} and also {1}")
_JOINERS_THREE = ("{0}, {1} and {2}", "{0}, then {1} and {2}", "{0}, {1}, and {2}", "{0}. also, {1}, and {2}")


def try_edit(
    scene: Scene,
    rng: np.random.Generator,
    preset: lang.PresetLike,
    split: str,
    clauses: int = 1,
    kind: str | None = None,
) -> Edit | None:
    """Like :func:`sample_edit`, but ``None`` where that raises because the scene allows no such edit."""
    if not 1 <= clauses <= 3:
        raise InputError(f"clauses={clauses}; expected 1, 2 or 3")
    if kind is not None and kind not in _CLAUSES:
        raise InputError(f"unknown edit kind {kind!r}; expected one of {', '.join(KINDS)}")
    for _ in range(_ATTEMPTS):
        draft = _Draft(scene, preset)
        kinds: list[str] = []
        texts: list[str] = []
        for number in range(clauses):
            chosen = kind if kind is not None and number == 0 else lang.pick(rng, KINDS)
            text = _CLAUSES[chosen](draft, rng)
            if text is None:
                break
            kinds.append(chosen)
            texts.append(text)
        if len(texts) < clauses:
            continue
        result = draft.result()
        if result == scene or is_held_out(result) != (split == "held_out"):
            continue
        if clauses > 1 and rng.random() < 0.5:
            order = lang.shuffled(rng, range(clauses))
            kinds, texts = [kinds[i] for i in order], [texts[i] for i in order]
        instruction = texts[0]
        if clauses == 2:
            instruction = lang.pick(rng, _JOINERS_TWO).format(*texts)
        elif clauses == 3:
            instruction = lang.pick(rng, _JOINERS_THREE).format(*texts)
        return Edit(instruction, result, tuple(kinds), tuple(texts))
    return None


def sample_edit(
    scene: Scene,
    rng: np.random.Generator,
    preset: lang.PresetLike,
    split: str,
    clauses: int = 1,
    kind: str | None = None,
) -> Edit:
    """An instruction of one to three clauses for a scene, with its exact result.

    Args:
        scene: The source.
        rng: Source of the variety.
        preset: Gives classes, styles, sizes, lattice and backgrounds.
        split: ``"train"``: the result holds no held-out combination; ``"held_out"``: it holds at least one.
        clauses: Number of clauses.
        kind: Kind of one of the clauses; ``None``: any.

    Raises:
        InputError: unknown ``kind``, ``clauses`` out of range, or no such edit was found for this scene.
    """
    edit = try_edit(scene, rng, preset, split, clauses, kind)
    if edit is None:
        raise InputError(
            f"found no {kind or 'edit'} of {clauses} clause(s) with a result in split {split!r} for a scene of "
            f"{len(scene.objects)} object(s); try another scene"
        )
    return edit
