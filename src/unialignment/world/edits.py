"""Editing instructions with exact results: replace, remove, add, move, resize, restyle, background, several at once.

Conventions that make a result exact (positions are snapped down to the preset's lattice):

* What an instruction doesn't mention stays: a replaced object keeps size, position and depth, and its style unless one
  is named; a moved, restyled or resized object keeps everything else.
* A *place* ("in the top left corner", "at the bottom", "in the center") is flush with the sides it names and centred
  along the others. An *edge* ("to the left edge") moves only across: the other coordinate is kept.
* "to the left of X" (right of, above, below) touches X's box, centres level, pushed into the canvas if needed.
* A new object is the frontmost; without a size adjective it is medium, and its style is always said ("another dog"
  copies the dog there is).
* A resized object keeps its centre, pushed into the canvas if needed.
* Several clauses act on different objects, and objects named as landmarks are left alone: their order doesn't matter.

Knows nothing of pixels and of models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from unialignment.errors import InputError
from unialignment.world import language as lang
from unialignment.world import placement
from unialignment.world.scene import Scene, SceneObject
from unialignment.world.splits import is_held_out

MIN_MOVE = 8
"""Least distance, in scene units, that an object is moved."""

RESIZE_OVERLAP = 0.3
"""Most overlap (fraction of the smaller box) that growing an object may cause."""

MAX_CLAUSES = 3

_ATTEMPTS = 60

_REPLACE = (
    "replace {old} with {new}",
    "turn {old} into {new}",
    "swap {old} for {new}",
    "change {old} to {new}",
    "put {new} where {old} {be}",
    "instead of {old}, show {new}",
)
_REMOVE = ("remove {}", "delete {}", "take away {}", "erase {}", "get rid of {}")
_ADD = ("add {} {}", "put {} {}", "place {} {}", "insert {} {}", "draw {} {}")
_MOVE = ("move {} {}", "shift {} {}", "place {} {}", "put {} {}")
_SWAP = ("swap the positions of {} and {}", "let {} and {} trade places", "make {} and {} change places")
_RESIZE = ("make {0} {1}", "resize {0} to {1}", "change the size of {0} to {1}")
_GROW = ("make {} bigger", "make {} larger", "enlarge {}")
_SHRINK = ("make {} smaller", "shrink {}", "reduce the size of {}")
_RESTYLE = (
    "draw {0} in the {1} style",
    "make {0} {1}",
    "give {0} the {1} style",
    "change the style of {0} to {1}",
    "redraw {0} in the {1} style",
)
_RESTYLE_ALL = ("redraw everything in the {} style", "make all objects {}", "draw all objects in the {} style")
_BACKGROUND = (
    "make the background {0}",
    "change the background to {0}",
    "recolor the background {0}",
    "put everything on {1} background",
    "use {1} background",
    "turn the background {0}",
    "set the background color to {0}",
)
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
_EDGES = {
    "left": "to the left edge",
    "right": "to the right edge",
    "above": "to the top edge",
    "below": "to the bottom edge",
}
_BESIDE = {
    "left": ("to the left of", "directly left of"),
    "right": ("to the right of", "directly right of"),
    "above": ("above", "directly above"),
    "below": ("below", "directly below"),
}
_JOINERS = {
    1: ("{0}",),
    2: ("{0} and {1}", "{0}, and {1}", "{0}, then {1}", "{0}. also, {1}", "{0} and also {1}"),
    3: ("{0}, {1} and {2}", "{0}, then {1} and {2}", "{0}, {1}, and {2}", "{0}. also, {1}, and {2}"),
}


@dataclass(frozen=True)
class Clause:
    """One part of an instruction and exactly what it does.

    Attributes:
        kind: One of :data:`KINDS`.
        text: How it reads.
        sources: Objects of the source (indices) that it changes or removes.
        targets: What those become, or what is new, as it must be in the result; empty for ``remove``.
        background: The new background, for ``kind="background"``.
    """

    kind: str
    text: str
    sources: tuple[int, ...] = ()
    targets: tuple[SceneObject, ...] = ()
    background: str | None = None


@dataclass(frozen=True)
class Edit:
    """An instruction and what it makes of a scene.

    Attributes:
        instruction: The whole instruction.
        result: The exact result.
        kinds: Kind of each clause, in order; each one of :data:`KINDS`.
        clauses: The clauses one by one, each acting on other objects than the rest.
    """

    instruction: str
    result: Scene
    kinds: tuple[str, ...]
    clauses: tuple[Clause, ...] = ()


class _Draft:
    """A scene on its way from source to result, and which objects the clauses so far have spoken of."""

    def __init__(self, source: Scene, preset: lang.PresetLike) -> None:
        self.source = source
        self.preset = preset
        self.background = source.background
        self.items: list[SceneObject | None] = list(source.objects)
        self.added: list[SceneObject] = []
        self.touched: set[int] = set()
        self.pinned: set[int] = set()
        self.taken = {item.name for item in source.objects}
        self.equals = [
            [i for i, other in enumerate(source.objects) if other.name == item.name] for item in source.objects
        ]

    def result(self) -> Scene:
        return Scene(self.background, tuple(item for item in [*self.items, *self.added] if item is not None))

    def count(self) -> int:
        return len(self.items) - self.items.count(None) + len(self.added)

    def free(self, item: SceneObject, but: int | None = None, limit: float = 0.0) -> bool:
        """Whether an object overlaps nothing, apart from object ``but``, by more than ``limit``."""
        others = [other for i, other in enumerate(self.items) if other is not None and i != but]
        return all(item.overlap(other) <= limit for other in others + self.added)

    def available(self, index: int) -> bool:
        """Whether a clause may act on an object: nothing was said yet of it or of another of its class."""
        return not any(i in self.touched or i in self.pinned for i in self.equals[index])

    def choose(self, rng: np.random.Generator) -> tuple[int, str] | None:
        """An object to act on, with an unambiguous reference to it."""
        options = [i for i in range(len(self.items)) if self.available(i)]
        if not options:
            return None
        index = lang.pick(rng, options)
        reference = lang.refer(self.source, index, rng)
        return None if reference is None else (index, reference)

    def landmarks(self, index: int | None) -> list[int]:
        """Objects that the placing of object ``index`` (``None``: of a new one) can refer to."""
        return [
            i
            for i in range(len(self.items))
            if (index is None or index not in self.equals[i])
            and not any(j in self.touched for j in self.equals[i])
            and lang.references(self.source, i)
        ]

    def fresh_name(self, rng: np.random.Generator) -> str | None:
        """A class that neither the source nor another clause has."""
        for _ in range(8):
            name = lang.pick(rng, self.preset.names)
            if name not in self.taken:
                return name
        return None


# --- clauses: each applies itself to the draft, or returns None and leaves the draft alone ---------------------------

_Maker = Callable[[_Draft, np.random.Generator], "Clause | None"]


def _replace(draft: _Draft, rng: np.random.Generator) -> Clause | None:
    chosen, name = draft.choose(rng), draft.fresh_name(rng)
    if chosen is None or name is None:
        return None
    index, reference = chosen
    item = draft.source.objects[index]
    style, adjective = item.style, ""
    if rng.random() < 0.35:
        style = lang.pick(rng, draft.preset.styles)
        adjective = lang.style_adjective(style)
    new = replace(item, name=name, style=style)
    draft.items[index] = new
    draft.touched.add(index)
    draft.taken.add(name)
    text = lang.pick(rng, _REPLACE).format(old=reference, new=lang.indefinite(name, adjective), be=lang.be(item.name))
    return Clause("replace", text, (index,), (new,))


def _remove(draft: _Draft, rng: np.random.Generator) -> Clause | None:
    index = int(rng.random() * len(draft.items))
    if not draft.available(index):
        return None
    reference, gone = lang.refer(draft.source, index, rng), [index]
    equals = draft.equals[index]
    if len(equals) > 1 and (reference is None or rng.random() < 0.4):
        reference, gone = lang.all_of(draft.source.objects[index].name, len(equals), rng), equals
    if reference is None or draft.count() <= len(gone):
        return None
    for i in gone:
        draft.items[i] = None
    draft.touched.update(gone)
    return Clause("remove", lang.pick(rng, _REMOVE).format(reference), tuple(gone))


def _spot(
    draft: _Draft, item: SceneObject, rng: np.random.Generator, index: int | None = None
) -> tuple[SceneObject, str] | None:
    """A free spot for a new object (``index=None``) or for a moved one: the object there, and the words for it."""
    lattice = draft.preset.lattice
    landmarks = draft.landmarks(index)
    for _ in range(6):
        landmark: int | None = None
        draw = rng.random()
        if landmarks and draw < 0.45:
            landmark = lang.pick(rng, landmarks)
            direction = lang.pick(rng, lang.DIRECTIONS)
            spot = placement.beside(draft.source.objects[landmark], direction, item.size, lattice)
            words = f"{lang.pick(rng, _BESIDE[direction])} {lang.refer(draft.source, landmark, rng)}"
        elif index is not None and draw < 0.65:
            direction = lang.pick(rng, lang.DIRECTIONS)
            spot, words = placement.at_edge(item, direction, lattice), _EDGES[direction]
        else:
            place = lang.pick(rng, lang.PLACES)
            spot = placement.at_place(place, item.size, lattice)
            words = lang.pick(rng, (lang.PLACE_PHRASES if index is None else _INTO_PLACE)[place])
        if spot is None:
            continue
        candidate = replace(item, x=spot[0], y=spot[1])
        if index is not None and max(abs(candidate.x - item.x), abs(candidate.y - item.y)) < MIN_MOVE:
            continue
        if draft.free(candidate, index):
            if landmark is not None:
                draft.pinned.add(landmark)
            return candidate, words
    return None


def _add(draft: _Draft, rng: np.random.Generator) -> Clause | None:
    if draft.count() >= draft.preset.max_objects:
        return None
    copies = [i for i in range(len(draft.items)) if len(draft.equals[i]) == 1 and draft.available(i)]
    another: int | None = None
    if copies and rng.random() < 0.15:
        another = lang.pick(rng, copies)
        item = draft.source.objects[another]
        noun = f"{'more' if lang.is_plural(item.name) or lang.is_mass(item.name) else 'another'} {item.name}"
        draft.touched.add(another)  # "the dog" would be ambiguous from here on
    else:
        name = draft.fresh_name(rng)
        if name is None:
            return None
        item = SceneObject(name, lang.pick(rng, draft.preset.styles), lang.pick(rng, draft.preset.sizes), 0, 0)
        noun = lang.indefinite(name, lang.adjectives(item))
    found = _spot(draft, item, rng)
    if found is None:
        draft.touched.discard(-1 if another is None else another)
        return None
    placed, words = found
    draft.added.append(placed)
    draft.taken.add(placed.name)
    return Clause("add", lang.pick(rng, _ADD).format(noun, words), (), (placed,))


def _swap(draft: _Draft, rng: np.random.Generator) -> Clause | None:
    objects = draft.source.objects
    single = [i for i in range(len(objects)) if draft.available(i) and len(draft.equals[i]) == 1]
    pairs = [(i, j) for i in single for j in single if i < j and objects[i].size == objects[j].size]
    if not pairs:
        return None
    i, j = lang.pick(rng, pairs)
    first, second = objects[i], objects[j]
    if max(abs(first.x - second.x), abs(first.y - second.y)) < MIN_MOVE:
        return None
    targets = replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y)
    draft.items[i], draft.items[j] = targets
    draft.touched.update((i, j))
    text = lang.pick(rng, _SWAP).format(*lang.shuffled(rng, (f"the {first.name}", f"the {second.name}")))
    return Clause("move", text, (i, j), targets)


def _move(draft: _Draft, rng: np.random.Generator) -> Clause | None:
    if rng.random() < 0.15:
        return _swap(draft, rng)
    chosen = draft.choose(rng)
    if chosen is None:
        return None
    index, reference = chosen
    found = _spot(draft, draft.source.objects[index], rng, index)
    if found is None:
        return None
    placed, words = found
    draft.items[index] = placed
    draft.touched.add(index)
    verbs = _MOVE if words.startswith(tuple(phrase for some in _BESIDE.values() for phrase in some)) else _MOVE[:2]
    return Clause("move", lang.pick(rng, verbs).format(reference, words), (index,), (placed,))


def _resize(draft: _Draft, rng: np.random.Generator) -> Clause | None:
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
    changed = placement.resized(item, size, draft.preset.lattice)
    before = max((item.overlap(other) for other in draft.result().objects if other != item), default=0.0)
    if not draft.free(changed, index, max(RESIZE_OVERLAP, before)):
        return None
    draft.items[index] = changed
    draft.touched.add(index)
    # "bigger" is exact only for the next size up.
    step = sizes.index(size) - sizes.index(item.size) if item.size in sizes else 0
    if abs(step) == 1 and rng.random() < 0.6:
        text = lang.pick(rng, _GROW if step > 0 else _SHRINK).format(reference)
    else:
        text = lang.pick(rng, _RESIZE).format(reference, lang.size_adjective(size))
    return Clause("resize", text, (index,), (changed,))


def _restyle(draft: _Draft, rng: np.random.Generator) -> Clause | None:
    style = lang.pick(rng, draft.preset.styles)
    adjective = lang.style_adjective(style)
    objects = draft.source.objects
    if len(objects) > 1 and not (draft.touched or draft.pinned or draft.added) and rng.random() < 0.25:
        if all(item.style == style for item in objects):
            return None
        changed = tuple(i for i, item in enumerate(objects) if item.style != style)
        draft.items = [replace(item, style=style) for item in objects]
        draft.touched.update(range(len(objects)))
        targets = tuple(replace(objects[i], style=style) for i in changed)
        return Clause("restyle", lang.pick(rng, _RESTYLE_ALL).format(adjective), changed, targets)
    chosen = draft.choose(rng)
    if chosen is None:
        return None
    index, reference = chosen
    if objects[index].style == style:
        return None
    new = replace(objects[index], style=style)
    draft.items[index] = new
    draft.touched.add(index)
    return Clause("restyle", lang.pick(rng, _RESTYLE).format(reference, adjective), (index,), (new,))


def _background(draft: _Draft, rng: np.random.Generator) -> Clause | None:
    color = lang.pick(rng, draft.preset.backgrounds)
    if color == draft.background or draft.background != draft.source.background:
        return None
    draft.background = color
    text = lang.pick(rng, _BACKGROUND).format(color, lang.indefinite(color))
    return Clause("background", text, background=color)


_MAKERS: dict[str, _Maker] = {
    "replace": _replace,
    "remove": _remove,
    "add": _add,
    "move": _move,
    "resize": _resize,
    "restyle": _restyle,
    "background": _background,
}

KINDS = tuple(_MAKERS)
"""Kinds of clause."""


def _attempt(scene: Scene, rng: np.random.Generator, preset: lang.PresetLike, kinds: list[str]) -> Edit | None:
    draft = _Draft(scene, preset)
    clauses: list[Clause] = []
    for kind in kinds:
        clause = _MAKERS[kind](draft, rng)
        if clause is None:
            return None
        clauses.append(clause)
    instruction = lang.pick(rng, _JOINERS[len(kinds)]).format(*(clause.text for clause in clauses))
    return Edit(instruction, draft.result(), tuple(kinds), tuple(clauses))


def try_edit(
    scene: Scene,
    rng: np.random.Generator,
    preset: lang.PresetLike,
    split: str,
    clauses: int = 1,
    kind: str | None = None,
) -> Edit | None:
    """Like :func:`sample_edit`, but ``None`` where that raises because the scene allows no such edit."""
    if not 1 <= clauses <= MAX_CLAUSES:
        raise InputError(f"clauses={clauses}; expected 1 to {MAX_CLAUSES}")
    if kind is not None and kind not in _MAKERS:
        raise InputError(f"unknown edit kind {kind!r}; expected one of {', '.join(KINDS)}")
    if not scene.objects:
        raise InputError("a scene without objects can't be edited; give one with at least one object")
    for _ in range(_ATTEMPTS):
        kinds = [kind if kind is not None else lang.pick(rng, KINDS)]
        kinds += [lang.pick(rng, KINDS) for _ in range(clauses - 1)]
        if clauses > 1:
            kinds = lang.shuffled(rng, kinds)
        edit = _attempt(scene, rng, preset, kinds)
        if edit is not None and edit.result != scene and is_held_out(edit.result) == (split == "held_out"):
            return edit
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
        InputError: an empty scene, unknown ``kind``, ``clauses`` out of range, or no such edit found for this scene.
    """
    edit = try_edit(scene, rng, preset, split, clauses, kind)
    if edit is None:
        raise InputError(
            f"found no {kind or 'edit'} of {clauses} clause(s) with a result in split {split!r} for a scene of "
            f"{len(scene.objects)} object(s); try another scene"
        )
    return edit
