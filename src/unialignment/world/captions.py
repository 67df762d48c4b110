"""Captions of a scene: canonical (one text per scene), short and varied, or long. Every statement is true of the scene.

A caption comes with the facts that it states, so that a picture made from it can be judged by exactly those.
Knows nothing of pictures, tasks or splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from unialignment.errors import InputError
from unialignment.world import language as lang
from unialignment.world.scene import Scene

MAX_SHORT_WORDS = 32
"""A short caption with more words than this is replaced by a plainer one."""

MIN_LONG_WORDS = 60
"""Every long caption of a scene with objects has at least this many words."""

_INTROS = (
    *[""] * 8,
    "a picture of ",
    "a picture of ",
    "an image of ",
    "an image of ",
    "a picture showing ",
    "an illustration of ",
    "a drawing of ",
    "a scene with ",
    "draw ",
)
_BACKGROUND_AFTER = (
    ", on a {} background",
    " on a {} background",
    ", against a {} background",
    ", with a {} background",
    ", {} background",
    ". the background is {}",
)
_BACKGROUND_BEFORE = ("on a {} background, ", "{} background: ", "against a {} background: ")

_LONG_OPENINGS = (
    "this picture shows {}: {}",
    "the image contains {}: {}",
    "here we see {}: {}",
    "this illustration is made of {}: {}",
)
_LONG_BACKGROUNDS = (
    "everything is set on a {} background that changes gently from top to bottom",
    "the whole scene stands on a {} background, a soft vertical gradient",
    "behind it all lies a {} background with a gentle gradient and nothing else in it",
)
_LONG_OBJECTS = (
    "{who} {be} {size} and drawn in the {style} style, {place} of the picture, {note}",
    "{place} {be} {who}, {size} in size, {note}, and {style} in style",
    "{who}, rendered in the {style} style, {be} {size} and {sit} {place}, {note}",
)
_LONG_FILLERS = (
    "nothing else is in the picture, and there is no text, no frame and no shadow on the ground",
    "the rest of the canvas is left empty, so that the eye rests on what has been named",
    "the outlines are clean and the colors are clear, as in an icon or a sticker",
    "the picture is square and simple, and all of it is seen straight from the front",
)
_SIZE_NOTES = {
    16: "taking up only a sixteenth of the picture",
    24: "taking up about a seventh of the picture",
    32: "taking up a quarter of the picture",
}


@dataclass(frozen=True)
class Description:
    """A caption and what it states besides the classes, their numbers and the background, which it always states.

    Attributes:
        text: The caption.
        kind: ``"canonical"``, ``"short"`` or ``"long"``.
        styles: Whether the style of every object is stated.
        sizes: Whether sizes are stated (an object without a size adjective is then medium).
        places: Objects (indices into ``scene.objects``) whose place, :func:`language.place_of`, is stated.
        relations: Stated relations ``(a, relation, b)``: object ``a`` is in ``relation`` to object ``b``.
        between: Stated ``(middle, a, b)``.
    """

    text: str
    kind: str
    styles: bool = True
    sizes: bool = True
    places: tuple[int, ...] = ()
    relations: tuple[tuple[int, str, int], ...] = ()
    between: tuple[tuple[int, int, int], ...] = ()


def background_phrase(template: str, background: str) -> str:
    """Fill a background name into a template, with the right article (``"an orange background"``)."""
    return template.format(background).replace(f" a {background}", f" {lang.indefinite(background)}")


def left_to_right(scene: Scene) -> list[int]:
    """Indices of the objects in the canonical order: by centre from left to right, then top to bottom."""
    return sorted(range(len(scene.objects)), key=lambda i: (*scene.objects[i].center, i))


def _groups(scene: Scene, order: list[int], style: bool, size: bool) -> list[list[int]]:
    """Indices grouped by what would be said of them, in the order of each group's first member."""
    groups: dict[tuple[str, str], list[int]] = {}
    for i in order:
        item = scene.objects[i]
        groups.setdefault((item.name, lang.adjectives(item, style, size)), []).append(i)
    return list(groups.values())


def _placed(scene: Scene, group: list[int], style: bool, size: bool, rng: np.random.Generator | None) -> str:
    """Noun phrase with places: ``"a flat dog at the top"``, ``"two dogs, one on the left and one at the top"``."""
    item = scene.objects[group[0]]
    noun = lang.counted(len(group), item.name, lang.adjectives(item, style, size))
    cells = [lang.place_of(scene.objects[i]) for i in group]
    phrases: dict[lang.Place, str] = {}
    for cell in cells:
        if cell not in phrases:
            options = lang.PLACE_PHRASES[cell]
            phrases[cell] = options[0] if rng is None else lang.pick(rng, options)
    if len(phrases) == 1:
        return f"{noun} {phrases[cells[0]]}"
    if len(group) == 2:
        return f"{noun}, one {phrases[cells[0]]} and one {phrases[cells[1]]}"
    parts = [f"{lang.NUMBER_WORDS[cells.count(cell)]} {phrase}" for cell, phrase in phrases.items()]
    return f"{noun}, {lang.join(parts)}"


def _listed(parts: list[str], groups: list[list[int]]) -> str:
    """Join the parts; a comma closes a part that holds commas itself."""
    if len(parts) == 1:
        return parts[0]
    nested = any(len(group) > 1 for group in groups)
    return f"{', '.join(parts[:-1])}{',' if nested else ''} and {parts[-1]}"


def describe_canonical(scene: Scene) -> Description:
    """The one short text of a scene that serves as caption target: no randomness, objects from left to right.

    Each object is named with its size (unless medium), style and place, then the background; where two objects
    overlap, the text ends by saying which one is in front, as long as it stays short.
    """
    if not scene.objects:
        return Description(background_phrase("an empty picture with a {} background", scene.background), "canonical")
    groups = _groups(scene, left_to_right(scene), True, True)
    text = _listed([_placed(scene, group, True, True, None) for group in groups], groups)
    text += background_phrase(", on a {} background", scene.background)
    stated = []
    for b in range(len(scene.objects)):
        for a in range(b + 1, len(scene.objects)):
            if "front" in lang.relations(scene, a, b):
                front, back = lang.refer(scene, a), lang.refer(scene, b)
                longer = f"{text}, {front} in front of {back}"
                if front and back and len(longer.split()) <= MAX_SHORT_WORDS:
                    text = longer
                    stated.append((a, "front", b))
    return Description(text, "canonical", places=tuple(range(len(scene.objects))), relations=tuple(stated))


def _related(
    scene: Scene, rng: np.random.Generator, order: list[int], style: bool, size: bool, intro: str
) -> Description | None:
    """Objects introduced one after another, each related to an earlier one. ``None`` when a relation is missing."""

    def noun(i: int) -> str:
        return lang.indefinite(scene.objects[i].name, lang.adjectives(scene.objects[i], style, size))

    def name(i: int) -> str:
        return f"the {scene.objects[i].name}"

    first, rest = order[0], order[1:]
    nested = rng.random() < 0.4
    anchored = not nested and rng.random() < 0.6
    anchor = f" {lang.pick(rng, lang.PLACE_PHRASES[lang.place_of(scene.objects[first])])}" if anchored else ""
    parts = [noun(first) + anchor]
    done = [first]
    stated: list[tuple[int, str, int]] = []
    between: list[tuple[int, int, int]] = []
    for i in rest:
        if len(done) == 2 and lang.is_between(scene, i, done[0], done[1]) and rng.random() < 0.8:
            parts.append(f"{noun(i)} between {name(done[0])} and {name(done[1])}")
            between.append((i, done[0], done[1]))
            done.append(i)
            continue
        options = [(j, relation) for j in done for relation in lang.relations(scene, i, j)]
        if not options:
            return None
        j, relation = lang.pick(rng, options)
        stated.append((i, relation, j))
        if nested and len(done) == 1:
            phrase = lang.pick(rng, lang.RELATION_PHRASES[lang.OPPOSITE[relation]])
            parts = [f"{parts[0]} {phrase} {noun(i)}"]
        else:
            parts.append(f"{noun(i)} {lang.pick(rng, lang.RELATION_PHRASES[relation])} {name(j)}")
        done.append(i)
    text = intro + parts[0]
    if len(parts) > 1:
        joiner = lang.pick(rng, (", and ", " and ", ", with ", "; ", ". there is also "))
        if joiner.startswith(".") and lang.is_plural(scene.objects[done[-1]].name):
            joiner = ". there are also "
        text = f"{intro}{', '.join(parts[:-1])}{joiner}{parts[-1]}"
    return Description(
        text, "short", style, size, (first,) if anchored else (), relations=tuple(stated), between=tuple(between)
    )


def _describe_varied(scene: Scene, rng: np.random.Generator) -> Description:
    style = rng.random() < 0.87
    size = style or rng.random() < 0.7
    order = left_to_right(scene) if rng.random() < 0.4 else lang.shuffled(rng, range(len(scene.objects)))
    before = rng.random() < 0.25
    intro = "" if before else lang.pick(rng, _INTROS)
    made: Description | None = None
    names = {item.name for item in scene.objects}
    if len(names) == len(scene.objects) > 1 and rng.random() < 0.65:
        made = _related(scene, rng, order, style, size, intro)
    if made is None:
        groups = _groups(scene, order, style, size)
        text = intro + _listed([_placed(scene, group, style, size, rng) for group in groups], groups)
        made = Description(text, "short", style, size, tuple(sorted(order)))
    if before:
        text = background_phrase(lang.pick(rng, _BACKGROUND_BEFORE), scene.background) + made.text
    else:
        text = made.text + background_phrase(lang.pick(rng, _BACKGROUND_AFTER), scene.background)
    return Description(text, "short", style, size, made.places, made.relations, made.between)


def describe_short(scene: Scene, rng: np.random.Generator) -> Description:
    """A freely worded caption of at most :data:`MAX_SHORT_WORDS` words; the canonical one when none comes out."""
    if scene.objects:
        for _ in range(3):
            made = _describe_varied(scene, rng)
            if len(made.text.split()) <= MAX_SHORT_WORDS:
                return made
    return describe_canonical(scene)


def describe_long(scene: Scene, rng: np.random.Generator) -> Description:
    """Several sentences: what there is, then place, size and style of each object, their relations, the background."""
    if not scene.objects:
        return describe_canonical(scene)
    order = left_to_right(scene) if rng.random() < 0.5 else lang.shuffled(rng, range(len(scene.objects)))
    groups = _groups(scene, order, False, False)
    inventory = lang.join([lang.counted(len(g), scene.objects[g[0]].name) for g in groups])
    total = len(scene.objects)
    amount = "a single object" if total == 1 else f"{lang.NUMBER_WORDS[total]} objects"
    sentences = [lang.pick(rng, _LONG_OPENINGS).format(amount, inventory)]
    ground = background_phrase(lang.pick(rng, _LONG_BACKGROUNDS), scene.background)
    early = rng.random() < 0.5
    if early:
        sentences.append(ground)
    for i in order:
        item = scene.objects[i]
        sentences.append(
            lang.pick(rng, _LONG_OBJECTS).format(
                who=lang.refer(scene, i, rng) or f"one {item.name}",
                be=lang.be(item.name),
                sit="sit" if lang.is_plural(item.name) else "sits",
                size=lang.size_adjective(item.size),
                style=lang.style_adjective(item.style),
                place=lang.pick(rng, lang.PLACE_PHRASES[lang.place_of(item)]),
                note=_SIZE_NOTES[item.size],
            )
        )
    stated = []
    for n, i in enumerate(order):
        for j in order[:n]:
            found = lang.relations(scene, i, j)
            subject, other = lang.refer(scene, i), lang.refer(scene, j)
            if found and subject and other:
                phrases = [lang.pick(rng, lang.RELATION_PHRASES[relation]) for relation in found]
                sentences.append(f"{subject} {lang.be(scene.objects[i].name)} {lang.join(phrases)} {other}")
                stated += [(i, relation, j) for relation in found]
    if not early:
        sentences.append(ground)
    fillers = lang.shuffled(rng, _LONG_FILLERS)
    text = " ".join(map(lang.sentence, sentences))
    while len(text.split()) < MIN_LONG_WORDS:
        text += " " + lang.sentence(fillers.pop())
    return Description(text, "long", places=tuple(range(total)), relations=tuple(stated))


def caption(
    scene: Scene,
    rng: np.random.Generator,
    length: Literal["short", "long"] = "short",
    canonical: bool = False,
) -> str:
    """Describe a scene truthfully; the text alone of :func:`describe_short` and its siblings.

    Args:
        scene: What to describe.
        rng: Source of the variety; untouched when ``canonical``.
        length: ``"short"`` (about 30 words at most for three objects) or ``"long"`` (at least 60 words).
        canonical: The one fixed short text of the scene, for caption targets; only with ``length="short"``.

    Raises:
        InputError: unknown ``length``, or ``canonical`` with a long caption.
    """
    if length not in ("short", "long"):
        raise InputError(f"unknown caption length {length!r}; expected 'short' or 'long'")
    if canonical and length == "long":
        raise InputError("only short captions have a canonical form; pass length='short' or canonical=False")
    if canonical:
        return describe_canonical(scene).text
    return (describe_long if length == "long" else describe_short)(scene, rng).text
