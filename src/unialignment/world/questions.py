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

_FILLER = frozenset("a an the is are it its it's they there in at on of side corner part area edge picture image color "
                    "background style size drawn just only".split())  # fmt: skip
_SAME = {"upper": "top", "lower": "bottom", "middle": "center", "centre": "center", "no": "no", "nope": "no", "yeah": "yes",
         "yep": "yes", "true": "yes", "false": "no", "grey": "gray", "none": "zero", "0": "zero", "1": "one", "2": "two",
         "3": "three", "4": "four", "5": "five", "6": "six", "lefthand": "left", "righthand": "right"}  # fmt: skip


def normalized(answer: str) -> str:
    """Lower case, no punctuation, no filler words, one spelling per meaning."""
    text = re.sub(r"[^\w\s'-]", " ", answer.lower())
    words = [_SAME.get(word, word) for word in text.replace("-hand", "hand").split() if word not in _FILLER]
    if words[:1] in (["yes"], ["no"]):
        words = words[:1]
    if len(words) > 1 and "center" in words and {"top", "bottom", "left", "right"} & set(words):
        words = [word for word in words if word != "center"]
    return " ".join(words)


def is_correct(answer: str, question: Question) -> bool:
    """Whether an answer means one of ``question.accepted``; articles, case and common synonyms don't matter."""
    given = normalized(answer)
    return given in {normalized(option) for option in question.accepted}


# --- makers: each returns None when the scene doesn't allow the question --------------------------------------------

_Maker = Callable[[Scene, np.random.Generator, Sequence[str]], "Question | None"]


def _name_question(kind: str, question: str, name: str) -> Question:
    return Question(kind, question, name, (name, lang.plural(name)) if lang.plural(name) != name else (name,))


def _yes_no(kind: str, question: str, yes: bool) -> Question:
    answer = "yes" if yes else "no"
    return Question(kind, question, answer, (answer,))


def _what(scene: Scene, rng: np.random.Generator, names: Sequence[str]) -> Question | None:
    objects = scene.objects
    if len(objects) == 1:
        question = lang.pick(rng, ("what is in the picture?", "what does the picture show?", "what is this?", "which object is shown?"))
        return _name_question("what", question, objects[0].name)
    for _ in range(4):
        if rng.random() < 0.65:
            i, j = lang.shuffled(rng, range(len(objects)))[:2]
            found = lang.relations(scene, i, j)
            reference = lang.refer(scene, j, rng)
            if not found or reference is None:
                continue
            relation = lang.pick(rng, found)
            others = [k for k in range(len(objects)) if k not in (i, j)]
            if relation in lang.DIRECTIONS:
                clear = all(lang.offset(scene, k, j, relation) <= 0 for k in others)
            else:
                clear = all(objects[k].overlap(objects[j]) <= 0 for k in others)
            if not clear:
                continue
            phrase = lang.pick(rng, lang.RELATION_PHRASES[relation])
            question = lang.pick(rng, ("what is {} {}?", "which object is {} {}?", "what do you see {} {}?", "name the object {} {}."))
            if phrase == "higher up than" and "see" in question:
                phrase = "above"
            return _name_question("what", question.format(phrase, reference), objects[i].name)
        direction = lang.pick(rng, lang.DIRECTIONS)
        end = max(range(len(objects)), key=lambda k: _toward(scene, k, direction))
        if all(lang.offset(scene, end, k, direction) >= lang.MARGIN for k in range(len(objects)) if k != end):
            words = {"left": ("furthest to the left", "the leftmost object"), "right": ("furthest to the right", "the rightmost object"),
                     "above": ("highest up", "the topmost object"), "below": ("lowest down", "the lowest object")}[direction]  # fmt: skip
            question = lang.pick(rng, (f"which object is {words[0]}?", f"what is {words[0]} in the picture?", f"what is {words[1]}?"))
            return _name_question("what", question, objects[end].name)
    return None


def _toward(scene: Scene, index: int, direction: str) -> float:
    x, y = scene.objects[index].center
    return {"left": -x, "right": x, "above": -y, "below": y}[direction]


def _near_thirds(value: float) -> list[int]:
    cells = {min(2, max(0, int((value + d) * 3 / CANVAS_UNITS))) for d in (-PLACE_TOLERANCE, 0.0, PLACE_TOLERANCE)}
    return sorted(cells)


def _where(scene: Scene, rng: np.random.Generator, names: Sequence[str]) -> Question | None:
    index = int(rng.random() * len(scene.objects))
    item = scene.objects[index]
    if any(other.name == item.name for k, other in enumerate(scene.objects) if k != index):
        references = [text for text in lang.references(scene, index) if " on the " not in text and " at the " not in text]
    else:
        references = list(lang.references(scene, index))
    if not references:
        return None
    x, y = item.center
    answer = lang.PLACE_NAMES[lang.place_of(item)]
    accepted = dict.fromkeys([answer, *(lang.PLACE_NAMES[(row, column)] for row in _near_thirds(y) for column in _near_thirds(x))])
    verb = lang.be(item.name)
    question = lang.pick(rng, ("where {} {}?", "where in the picture {} {}?", "in which part of the picture {} {}?"))
    return Question("where", question.format(verb, references[0]), answer, tuple(accepted))


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
        number = len(scene.objects)
        question = lang.pick(rng, ("how many objects are there?", "how many objects are in the picture?", "how many things can you see?"))
    else:
        repeated = [name for name, count in counts.items() if count > 1]
        if draw < 0.4:
            absent = _absent(scene, rng, names)
            if absent is None:
                return None
            name = absent
        elif repeated and draw < 0.9:
            name = lang.pick(rng, repeated)
        else:
            name = lang.pick(rng, sorted(counts))
        number = counts.get(name, 0)
        what = lang.plural(name)
        if lang.is_plural(name):
            what = f"sets of {name}"
        elif lang.is_mass(name):
            what = f"pieces of {name}"
        question = lang.pick(rng, ("how many {} are there?", "how many {} are in the picture?", "how many {} do you see?", "count the {}."))
        question = question.format(what)
    word = lang.NUMBER_WORDS[number]
    accepted = (word, str(number), "none", "no") if number == 0 else (word, str(number))
    return Question("count", question, word, accepted)


def _exists(scene: Scene, rng: np.random.Generator, names: Sequence[str]) -> Question | None:
    yes = rng.random() < 0.5
    name: str | None = lang.pick(rng, scene.objects).name if yes else _absent(scene, rng, names)
    if name is None:
        return None
    what = lang.indefinite(name)
    verb = lang.be(name)
    some = "any " if verb == "are" else ""
    question = lang.pick(rng, (f"{verb} there {some}{what}?", f"{verb} there {some}{what} in the picture?", f"can you see {some}{what}?",
                               f"does the picture show {some}{what}?", f"do you see {some}{what} here?"))  # fmt: skip
    return _yes_no("exists", question, yes)


def _size(scene: Scene, rng: np.random.Generator, names: Sequence[str]) -> Question | None:
    objects = scene.objects
    if len(objects) > 1 and rng.random() < 0.6:
        i, j = lang.shuffled(rng, range(len(objects)))[:2]
        if objects[i].size != objects[j].size and objects[i].name != objects[j].name:
            a, b = lang.refer(scene, i), lang.refer(scene, j)
            if a and b and a == f"the {objects[i].name}" and b == f"the {objects[j].name}":
                big = rng.random() < 0.5
                word = lang.pick(rng, ("bigger", "larger") if big else ("smaller",))
                winner = i if (objects[i].size > objects[j].size) == big else j
                question = lang.pick(rng, ("which is {}, {} or {}?", "what is {}, {} or {}?", "which of the two is {}: {} or {}?"))
                return _name_question("size", question.format(word, a, b), objects[winner].name)
    index = int(rng.random() * len(objects))
    reference = _reference_without(scene, index, rng, lang.size_adjective(objects[index].size))
    if reference is None:
        return None
    verb, do = lang.be(objects[index].name), "do" if lang.is_plural(objects[index].name) else "does"
    question = lang.pick(rng, (f"what size {verb} {reference}?", f"how large {verb} {reference}?", f"which size {do} {reference} have?"))
    answer = lang.size_adjective(objects[index].size)
    return Question("size", question, answer, {"large": ("large", "big"), "small": ("small", "little", "tiny")}.get(answer, (answer,)))


def _reference_without(scene: Scene, index: int, rng: np.random.Generator, word: str) -> str | None:
    """A reference that doesn't give the answer ``word`` away."""
    start = f"the {word} "
    found = [text for text in lang.references(scene, index) if not text.startswith(start) or scene.objects[index].name.startswith(word)]
    return lang.pick(rng, found) if found else None


def _background(scene: Scene, rng: np.random.Generator, names: Sequence[str]) -> Question | None:
    question = lang.pick(rng, ("what color is the background?", "what is the color of the background?", "which color does the background have?",
                               "what color is behind everything?", "which color is the backdrop?"))  # fmt: skip
    return Question("background", question, scene.background, (scene.background,))


def _style(scene: Scene, rng: np.random.Generator, names: Sequence[str]) -> Question | None:
    objects = scene.objects
    index = int(rng.random() * len(objects))
    adjective = lang.style_adjective(objects[index].style)
    if rng.random() < 0.35 and len(objects) > 1:
        if sum(item.style == objects[index].style for item in objects) == 1:
            question = lang.pick(rng, ("which object is {}?", "which object is drawn in the {} style?", "what is drawn in the {} style?"))
            return _name_question("style", question.format(adjective), objects[index].name)
        return None
    reference = _reference_without(scene, index, rng, adjective)
    if reference is None:
        return None
    verb = lang.be(objects[index].name)
    question = lang.pick(rng, (f"in which style {verb} {reference} drawn?", f"what style {verb} {reference} in?",
                               f"how {verb} {reference} drawn?"))  # fmt: skip
    return Question("style", question, adjective, (adjective,))


def _relation(scene: Scene, rng: np.random.Generator, names: Sequence[str]) -> Question | None:
    if len(scene.objects) < 2:
        return None
    i, j = lang.shuffled(rng, range(len(scene.objects)))[:2]
    a, b = lang.refer(scene, i, rng), lang.refer(scene, j, rng)
    found = lang.relations(scene, i, j)
    if a is None or b is None or not found:
        return None
    relation = lang.pick(rng, found)
    yes = rng.random() < 0.5
    said = relation if yes else lang.OPPOSITE[relation]
    phrase = lang.pick(rng, lang.RELATION_PHRASES[said])
    question = lang.pick(rng, ("{} {} {} {}?", "would you say {} {} {} {}?", "in the picture, {} {} {} {}?"))
    verb = lang.be(scene.objects[i].name)
    text = f"would you say {a} {verb} {phrase} {b}?" if question.startswith("would") else question.format(verb, a, phrase, b)
    return _yes_no("relation", text, yes)


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
