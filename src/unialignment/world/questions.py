"""Questions about a scene with short exact answers, and the check of an answer.

Only questions with one defensible answer are asked: relations hold with a margin, references are unambiguous, and
yes/no questions are balanced. Knows nothing of pictures or of how an answer is produced.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from unialignment.errors import InputError
from unialignment.world import language as lang
from unialignment.world.scene import CANVAS_UNITS, Scene

PLACE_TOLERANCE = 1.5
"""A centre closer than this (in units) to a border between thirds may be said to lie on either side of it."""


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        kind: One of :data:`KINDS`.
        question: The question as asked.
        answer: The answer to teach, one to four words.
        accepted: Every answer that counts as right, ``answer`` first.
    """

    kind: str
    question: str
    answer: str
    accepted: tuple[str, ...]


# --- judging --------------------------------------------------------------------------------------------------------

_FILLER = lang.words(
    """
    a an the is are it its it's they there in at on of side corner part area edge picture image color background style
    size drawn just only
    """
)
_SAME = {
    "upper": "top",
    "lower": "bottom",
    "middle": "center",
    "centre": "center",
    "nope": "no",
    "yeah": "yes",
    "yep": "yes",
    "true": "yes",
    "false": "no",
    "grey": "gray",
    "none": "zero",
    **{str(number): word for number, word in enumerate(lang.NUMBER_WORDS)},
}


def normalized(answer: str) -> str:
    """Lower case, no punctuation, no filler words, one spelling per meaning."""
    text = re.sub(r"[^\w\s'-]", " ", answer.lower())
    words = [_SAME.get(word, word) for word in text.split() if word not in _FILLER]
    if words[:1] in (["yes"], ["no"]):
        return words[0]
    if len(words) > 1 and {"top", "bottom", "left", "right"} & set(words):
        words = [word for word in words if word != "center"]
    return " ".join(words)


def is_correct(answer: str, question: Question) -> bool:
    """Whether an answer means one of ``question.accepted``; articles, case and common synonyms don't matter."""
    return normalized(answer) in {normalized(option) for option in question.accepted}


# --- words ----------------------------------------------------------------------------------------------------------

_WHAT_ALONE = ("what is in the picture?", "what does the picture show?", "what is this?", "which object is shown?")
_WHAT_RELATED = ("what is {} {}?", "which object is {} {}?", "what can be seen {} {}?", "name the object {} {}.")
_WHAT_EXTREME = {
    "left": ("which object is furthest to the left?", "what is the leftmost object?", "what is furthest left?"),
    "right": ("which object is furthest to the right?", "what is the rightmost object?", "what is furthest right?"),
    "above": ("which object is highest up?", "what is the topmost object?", "what is at the very top?"),
    "below": ("which object is lowest down?", "what is the lowest object?", "what is at the very bottom?"),
}
_WHERE = ("where {be} {who}?", "where in the picture {be} {who}?", "in which part of the picture {be} {who}?")
_COUNT_ALL = (
    "how many objects are there?",
    "how many objects are in the picture?",
    "how many things can you see?",
)
_COUNT = ("how many {} are there?", "how many {} are in the picture?", "how many {} do you see?", "count the {}.")
_EXISTS = (
    "{be} there {what}?",
    "{be} there {what} in the picture?",
    "can you see {what}?",
    "does the picture show {what}?",
    "do you see {what} here?",
)
_COMPARE = ("which is {}, {} or {}?", "which one is {}, {} or {}?", "which of the two is {}: {} or {}?")
_SIZE = ("what size {be} {who}?", "how large {be} {who}?", "which size {do} {who} have?")
_BACKGROUND = (
    "what color is the background?",
    "what is the color of the background?",
    "which color does the background have?",
    "what color is behind everything?",
    "which color is the backdrop?",
)
_STYLE = ("in which style {be} {who} drawn?", "what style {be} {who} in?", "which style {do} {who} have?")
_STYLE_WHICH = ("which object is {}?", "which object is drawn in the {} style?", "what is drawn in the {} style?")
_RELATION = (
    "{be} {a} {relation} {b}?",
    "would you say {a} {be} {relation} {b}?",
    "in the picture, {be} {a} {relation} {b}?",
)
_SIZE_SYNONYMS = {"large": ("large", "big"), "small": ("small", "little")}

# --- makers: each returns None when the scene doesn't allow the question --------------------------------------------

_Maker = Callable[[Scene, np.random.Generator, Sequence[str]], "Question | None"]


def _name_question(kind: str, question: str, name: str) -> Question:
    return Question(kind, question, name, tuple(dict.fromkeys((name, lang.plural(name)))))


def _yes_no(kind: str, question: str, yes: bool) -> Question:
    answer = "yes" if yes else "no"
    return Question(kind, question, answer, (answer,))


def _about(templates: Sequence[str], scene: Scene, index: int, who: str, rng: np.random.Generator) -> str:
    """A question about one object, its verb agreeing with it."""
    name = scene.objects[index].name
    return lang.pick(rng, templates).format(be=lang.be(name), do="do" if lang.is_plural(name) else "does", who=who)


def _what(scene: Scene, rng: np.random.Generator, names: Sequence[str]) -> Question | None:
    objects = scene.objects
    everyone = range(len(objects))
    if len(objects) == 1:
        return _name_question("what", lang.pick(rng, _WHAT_ALONE), objects[0].name)
    if rng.random() < 0.35:
        direction = lang.pick(rng, lang.DIRECTIONS)
        for end in everyone:
            if all(lang.offset(scene, end, k, direction) >= lang.MARGIN for k in everyone if k != end):
                return _name_question("what", lang.pick(rng, _WHAT_EXTREME[direction]), objects[end].name)
        return None
    i, j = lang.shuffled(rng, everyone)[:2]
    found = lang.relations(scene, i, j)
    reference = lang.refer(scene, j, rng)
    if not found or reference is None or objects[i].name == objects[j].name:
        return None
    relation = lang.pick(rng, found)
    # Nothing else may answer the question, not even by a hair's breadth.
    for k in everyone:
        if k in (i, j):
            continue
        if (
            lang.offset(scene, k, j, relation) > 0
            if relation in lang.DIRECTIONS
            else objects[k].overlap(objects[j]) > 0
        ):
            return None
    phrase = lang.pick(rng, lang.RELATION_PHRASES[relation])
    template = lang.pick(rng, _WHAT_RELATED)
    if phrase not in lang.PREPOSITIONS:
        template = _WHAT_RELATED[0]
    return _name_question("what", template.format(phrase, reference), objects[i].name)


def _near_thirds(value: float) -> list[int]:
    """Rows or columns that a coordinate may be said to lie in."""
    shifts = (-PLACE_TOLERANCE, 0.0, PLACE_TOLERANCE)
    return sorted({min(2, max(0, int((value + shift) * 3 / CANVAS_UNITS))) for shift in shifts})


def _where(scene: Scene, rng: np.random.Generator, names: Sequence[str]) -> Question | None:
    index = int(rng.random() * len(scene.objects))
    item = scene.objects[index]
    # "where is the dog on the left?" would give the answer away
    references = [text for text in lang.references(scene, index) if text.endswith(item.name)]
    if not references:
        return None
    x, y = item.center
    answer = lang.PLACE_NAMES[lang.place_of(item)]
    near = (lang.PLACE_NAMES[(row, column)] for row in _near_thirds(y) for column in _near_thirds(x))
    question = _about(_WHERE, scene, index, references[0], rng)
    return Question("where", question, answer, tuple(dict.fromkeys([answer, *near])))


def _absent(scene: Scene, rng: np.random.Generator, names: Sequence[str]) -> str | None:
    """A class that is not in the scene; a third of the time one that shares a word with a class that is."""
    present = {item.name for item in scene.objects}
    if rng.random() < 0.33:
        words = {word for name in present for word in name.split()}
        similar = [name for name in names if name not in present and not words.isdisjoint(name.split())]
        if similar:
            return lang.pick(rng, similar)
    for _ in range(8):
        name = lang.pick(rng, names)
        if name not in present:
            return name
    return next((name for name in names if name not in present), None)


def _count(scene: Scene, rng: np.random.Generator, names: Sequence[str]) -> Question | None:
    counts = Counter(item.name for item in scene.objects)
    draw = rng.random()
    if draw < 0.25:
        number, question = len(scene.objects), lang.pick(rng, _COUNT_ALL)
    else:
        repeated = [name for name, count in counts.items() if count > 1]
        name: str | None = lang.pick(rng, repeated if repeated and draw < 0.9 else sorted(counts))
        if draw < 0.45 and names:
            name = _absent(scene, rng, names)
        if name is None:
            return None
        number, question = counts[name], lang.pick(rng, _COUNT).format(lang.countable(name))
    word = lang.NUMBER_WORDS[number]
    return Question("count", question, word, (word, str(number), "no") if number == 0 else (word, str(number)))


def _exists(scene: Scene, rng: np.random.Generator, names: Sequence[str]) -> Question | None:
    yes = rng.random() < 0.5
    name: str | None = lang.pick(rng, scene.objects).name if yes else _absent(scene, rng, names)
    if name is None:
        return None
    what = lang.indefinite(name)
    if what == name:
        what = f"any {name}"
    return _yes_no("exists", lang.pick(rng, _EXISTS).format(be=lang.be(name), what=what), yes)


def _reference_without(scene: Scene, index: int, rng: np.random.Generator, word: str) -> str | None:
    """A reference that doesn't give the answer ``word`` away."""
    found = [text for text in lang.references(scene, index) if text != f"the {word} {scene.objects[index].name}"]
    return lang.pick(rng, found) if found else None


def _size(scene: Scene, rng: np.random.Generator, names: Sequence[str]) -> Question | None:
    objects = scene.objects
    if len(objects) > 1 and rng.random() < 0.6:
        i, j = lang.shuffled(rng, range(len(objects)))[:2]
        a, b = f"the {objects[i].name}", f"the {objects[j].name}"
        if objects[i].size == objects[j].size or (a,) != lang.references(scene, i) or (b,) != lang.references(scene, j):
            return None
        bigger = rng.random() < 0.5
        word = lang.pick(rng, ("bigger", "larger")) if bigger else "smaller"
        winner = i if (objects[i].size > objects[j].size) == bigger else j
        return _name_question("size", lang.pick(rng, _COMPARE).format(word, a, b), objects[winner].name)
    index = int(rng.random() * len(objects))
    answer = lang.size_adjective(objects[index].size)
    reference = _reference_without(scene, index, rng, answer)
    if reference is None:
        return None
    question = _about(_SIZE, scene, index, reference, rng)
    return Question("size", question, answer, _SIZE_SYNONYMS.get(answer, (answer,)))


def _background(scene: Scene, rng: np.random.Generator, names: Sequence[str]) -> Question | None:
    return Question("background", lang.pick(rng, _BACKGROUND), scene.background, (scene.background,))


def _style(scene: Scene, rng: np.random.Generator, names: Sequence[str]) -> Question | None:
    objects = scene.objects
    index = int(rng.random() * len(objects))
    adjective = lang.style_adjective(objects[index].style)
    if len(objects) > 1 and rng.random() < 0.35:
        if sum(item.style == objects[index].style for item in objects) > 1:
            return None
        return _name_question("style", lang.pick(rng, _STYLE_WHICH).format(adjective), objects[index].name)
    reference = _reference_without(scene, index, rng, adjective)
    if reference is None:
        return None
    return Question("style", _about(_STYLE, scene, index, reference, rng), adjective, (adjective,))


def _relation(scene: Scene, rng: np.random.Generator, names: Sequence[str]) -> Question | None:
    if len(scene.objects) < 2:
        return None
    i, j = lang.shuffled(rng, range(len(scene.objects)))[:2]
    first, second = scene.objects[i], scene.objects[j]
    a, b = lang.refer(scene, i, rng), lang.refer(scene, j, rng)
    found = lang.relations(scene, i, j)
    if a is None or b is None or not found or first.name == second.name:
        return None
    relation = lang.pick(rng, found)
    yes = rng.random() < 0.5
    phrase = lang.pick(rng, lang.RELATION_PHRASES[relation if yes else lang.OPPOSITE[relation]])
    question = lang.pick(rng, _RELATION).format(be=lang.be(first.name), a=a, b=b, relation=phrase)
    return _yes_no("relation", question, yes)


_MAKERS: dict[str, _Maker] = {
    "what": _what,
    "where": _where,
    "count": _count,
    "exists": _exists,
    "size": _size,
    "background": _background,
    "style": _style,
    "relation": _relation,
}

KINDS = tuple(_MAKERS)
"""Kinds of question."""


def ask(
    scene: Scene,
    rng: np.random.Generator,
    kind: str | None = None,
    *,
    names: Sequence[str] | None = None,
) -> Question | None:
    """A question about a scene that has at least one object.

    Args:
        scene: What is asked about.
        rng: Source of the variety.
        kind: One of :data:`KINDS`; ``None``: any that the scene allows, evenly.
        names: Class names from which absent objects are drawn ("is there a cat?"). Without them only classes of the
            scene itself are asked for, and so ``exists`` is not chosen (its answer would always be yes).

    Returns:
        The question; ``None`` only when ``kind`` is given and the scene allows no such question.

    Raises:
        InputError: unknown ``kind``, an empty scene, or ``kind="exists"`` without ``names``.
    """
    if not scene.objects:
        raise InputError("a scene without objects can't be asked about; give one with at least one object")
    if kind is not None and kind not in _MAKERS:
        raise InputError(f"unknown question kind {kind!r}; expected one of {', '.join(KINDS)}")
    if kind == "exists" and names is None:
        raise InputError("questions of kind 'exists' need names= (the preset's class names) to ask for absent objects")
    pool = tuple(names) if names is not None else ()
    if kind is not None:
        for _ in range(8):
            question = _MAKERS[kind](scene, rng, pool)
            if question is not None:
                return question
        return None
    while True:
        chosen = lang.pick(rng, KINDS)
        if chosen == "exists" and names is None:
            continue
        for _ in range(3):
            question = _MAKERS[chosen](scene, rng, pool)
            if question is not None:
                return question
