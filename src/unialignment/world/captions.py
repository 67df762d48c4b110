"""Captions of a scene: canonical (one text per scene), short and varied, or long. Every statement is true of the scene.

Knows nothing of pictures, tasks or splits.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from unialignment.errors import InputError
from unialignment.world import language as lang
from unialignment.world.scene import Scene

MAX_SHORT_WORDS = 32
"""A short caption with more words than this is replaced by a plainer one."""

_INTROS = (
    ("", 8),
    ("a picture of ", 2),
    ("an image of ", 2),
    ("a picture showing ", 1),
    ("an illustration of ", 1),
    ("a drawing of ", 1),
    ("draw ", 1),
    ("a scene with ", 1),
)
_INTRO_CHOICES = tuple(text for text, weight in _INTROS for _ in range(weight))
_BACKGROUND_AFTER = (", on a {} background", " on a {} background", ", against a {} background", ", with a {} background",
                     ", {} background", ". the background is {}")  # fmt: skip
_BACKGROUND_BEFORE = ("on a {} background, ", "{} background: ", "against a {} background: ")


def background_phrase(template: str, background: str) -> str:
    """Fill a background name into a template, with the right article (``"an orange background"``)."""
    text = template.format(background)
    return text.replace(f" a {background}", f" {lang.indefinite(background)}")


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
    phrases = {}
    for i in group:
        place = lang.place_of(scene.objects[i])
        if place not in phrases:
            options = lang.PLACE_PHRASES[place]
            phrases[place] = options[0] if rng is None else lang.pick(rng, options)
    places = [phrases[lang.place_of(scene.objects[i])] for i in group]
    if len(phrases) == 1:
        return f"{noun} {places[0]}"
    if len(group) == 2:
        return f"{noun}, one {places[0]} and one {places[1]}"
    return f"{noun}, {lang.join(list(dict.fromkeys(places)))}"


def _listed(parts: list[str], groups: list[list[int]]) -> str:
    """Join the parts; a comma closes a part that holds commas itself."""
    if len(parts) == 1:
        return parts[0]
    nested = any(len(group) > 1 for group in groups)
    return f"{', '.join(parts[:-1])}{',' if nested else ''} and {parts[-1]}"


def canonical_caption(scene: Scene) -> str:
    """The one short text of a scene that serves as caption target: no randomness, objects from left to right.

    Each object is named with its size (unless medium), style and place, then the background; where two objects
    overlap, the text ends by saying which one is in front, as long as it stays short.
    """
    if not scene.objects:
        return background_phrase("an empty {} background", scene.background)
    groups = _groups(scene, left_to_right(scene), True, True)
    text = _listed([_placed(scene, group, True, True, None) for group in groups], groups)
    text += background_phrase(", on a {} background", scene.background)
    for b in range(len(scene.objects)):
        for a in range(b + 1, len(scene.objects)):
            if "front" in lang.relations(scene, a, b):
                front, back = lang.refer(scene, a), lang.refer(scene, b)
                if front and back:
                    longer = f"{text}, {front} in front of {back}"
                    if len(longer.split()) <= MAX_SHORT_WORDS:
                        text = longer
    return text


def _related(scene: Scene, rng: np.random.Generator, order: list[int], style: bool, size: bool, intro: str) -> str | None:
    """Objects introduced one after another, each related to an earlier one. ``None`` when a relation is missing."""

    def noun(i: int) -> str:
        return lang.indefinite(scene.objects[i].name, lang.adjectives(scene.objects[i], style, size))

    def name(i: int) -> str:
        return f"the {scene.objects[i].name}"

    first, rest = order[0], order[1:]
    nested = rng.random() < 0.4
    anchor = "" if nested or rng.random() < 0.4 else " " + lang.pick(rng, lang.PLACE_PHRASES[lang.place_of(scene.objects[first])])
    parts = [noun(first) + anchor]
    done = [first]
    for i in rest:
        if len(done) == 2 and lang.is_between(scene, i, done[0], done[1]) and rng.random() < 0.8:
            parts.append(f"{noun(i)} between {name(done[0])} and {name(done[1])}")
            done.append(i)
            continue
        options = [(j, relation) for j in done for relation in lang.relations(scene, i, j)]
        if not options:
            return None
        j, relation = lang.pick(rng, options)
        if nested and len(done) == 1:
            phrase = lang.pick(rng, lang.RELATION_PHRASES[lang.OPPOSITE[relation]])
            parts = [f"{parts[0]} {phrase} {noun(i)}"]
        else:
            parts.append(f"{noun(i)} {lang.pick(rng, lang.RELATION_PHRASES[relation])} {name(j)}")
        done.append(i)
    if len(parts) == 1:
        return intro + parts[0]
    joiner = lang.pick(rng, (", and ", " and ", ", with ", "; ", ". there is also "))
    if joiner.startswith(". ") and lang.is_plural(scene.objects[done[-1]].name):
        joiner = ". there are also "
    return f"{intro}{', '.join(parts[:-1])}{joiner}{parts[-1]}"


def _varied_caption(scene: Scene, rng: np.random.Generator) -> str:
    style = rng.random() < 0.87
    size = style or rng.random() < 0.7
    order = left_to_right(scene) if rng.random() < 0.4 else lang.shuffled(rng, range(len(scene.objects)))
    intro = lang.pick(rng, _INTRO_CHOICES)
    before = rng.random() < 0.25
    text: str | None = None
    names = {item.name for item in scene.objects}
    if len(names) == len(scene.objects) > 1 and rng.random() < 0.65:
        text = _related(scene, rng, order, style, size, "" if before else intro)
    if text is None:
        groups = _groups(scene, order, style, size)
        listed = _listed([_placed(scene, group, style, size, rng) for group in groups], groups)
        text = ("" if before else intro) + listed
    if before:
        return background_phrase(lang.pick(rng, _BACKGROUND_BEFORE), scene.background) + text
    return text + background_phrase(lang.pick(rng, _BACKGROUND_AFTER), scene.background)


_LONG_OPENINGS = ("This picture shows {}", "The image contains {}", "In this illustration there is {}", "We see {}")
_SIZE_NOTES = {16: "taking up only a sixteenth of the picture", 24: "taking up about a seventh of the picture",
               32: "taking up a quarter of the picture"}  # fmt: skip


def _long_caption(scene: Scene, rng: np.random.Generator) -> str:
    order = left_to_right(scene) if rng.random() < 0.5 else lang.shuffled(rng, range(len(scene.objects)))
    groups = _groups(scene, order, False, False)
    inventory = lang.join([lang.counted(len(g), scene.objects[g[0]].name) for g in groups])
    total = len(scene.objects)
    amount = "a single object" if total == 1 else f"{lang.NUMBER_WORDS[total]} objects"
    sentences = [lang.pick(rng, ("This picture shows {}: {}", "The image contains {}: {}", "Here we see {}: {}",
                                 "This illustration is made of {}: {}")).format(amount, inventory)]  # fmt: skip
    back = background_phrase(
        lang.pick(rng, ("Everything is set on a {} background that changes gently from top to bottom",
                        "The whole scene stands on a {} background, a soft vertical gradient",
                        "Behind it all lies a {} background with a gentle gradient and nothing else in it")),
        scene.background,
    )  # fmt: skip
    first = rng.random() < 0.5
    if first:
        sentences.append(back)
    for i in order:
        item = scene.objects[i]
        place = lang.pick(rng, lang.PLACE_PHRASES[lang.place_of(item)])
        who = lang.refer(scene, i, rng) or f"one {item.name}"
        style, size = lang.style_adjective(item.style), lang.size_adjective(item.size)
        verb = lang.be(item.name)
        sentences.append(
            lang.pick(rng, (
                f"{who} {verb} {size} and drawn in the {style} style, {place} of the picture, {_SIZE_NOTES[item.size]}",
                f"{place} {verb} {who}, {size} in size, {_SIZE_NOTES[item.size]}, and {style} in style",
                f"{who}, rendered in the {style} style, {verb} {size} and sits {place}, {_SIZE_NOTES[item.size]}"
                if verb == "is" else f"{who}, rendered in the {style} style, {verb} {size} and sit {place}, {_SIZE_NOTES[item.size]}",
            ))
        )  # fmt: skip
    for n, i in enumerate(order):
        for j in order[:n]:
            found = lang.relations(scene, i, j)
            subject, other = lang.refer(scene, i), lang.refer(scene, j)
            if found and subject and other:
                phrases = [lang.pick(rng, lang.RELATION_PHRASES[relation]) for relation in found]
                sentences.append(f"{subject} {lang.be(scene.objects[i].name)} {lang.join(phrases)} {other}")
    if not first:
        sentences.append(back)
    fillers = lang.shuffled(rng, (
        "nothing else is in the picture, and there is no text, no frame and no shadow on the ground",
        "the rest of the canvas is left empty, so that the eye rests on what has been named",
        "the outlines are clean and the colors are clear, as in an icon or a sticker",
        "the picture is square and simple, and all of it is seen straight from the front",
    ))  # fmt: skip
    text = " ".join(lang.sentence(s) for s in sentences)
    while len(text.split()) < 60:
        text += " " + lang.sentence(fillers.pop())
    return text


def caption(
    scene: Scene,
    rng: np.random.Generator,
    length: Literal["short", "long"] = "short",
    canonical: bool = False,
) -> str:
    """Describe a scene truthfully.

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
    if canonical:
        if length == "long":
            raise InputError("only short captions have a canonical form; pass length='short' or canonical=False")
        return canonical_caption(scene)
    if not scene.objects:
        return canonical_caption(scene)
    if length == "long":
        return _long_caption(scene, rng)
    for _ in range(3):
        text = _varied_caption(scene, rng)
        if len(text.split()) <= MAX_SHORT_WORDS:
            return text
    return canonical_caption(scene)
