"""Words for scenes: nouns, articles, plurals, places, references and relations that are true with a margin.

Class names, style adjectives and size adjectives are always spelled the same, so that a text can be checked exactly;
everything around them (word order, verbs, relation words, ways to name a place) varies. Knows nothing of pixels and
of tasks: captions, questions and instructions are put together elsewhere from what is here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Protocol, TypeVar

import numpy as np

from unialignment.errors import InputError
from unialignment.world.scene import CANVAS_UNITS, Scene, SceneObject

T = TypeVar("T")

STYLE_ADJECTIVES: dict[str, str] = {
    "noto": "shaded",
    "fluent": "flat",
    "twemoji": "simple",
    "openmoji": "outlined",
    "fluent3d": "glossy",
    "emojione": "classic",
    "noto-v1": "soft",
    "emojione-v1": "retro",
    "fxemoji": "smooth",
    "streamline": "cartoon",
}
"""Style id to the one adjective that names it in every text."""

SIZE_ADJECTIVES: dict[int, str] = {16: "small", 24: "medium", 32: "large"}
"""Size in scene units to its adjective. A noun without a size adjective means ``medium``."""

MEDIUM = 24
"""The size, in scene units, that needs no adjective."""

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

MARGIN = 8.0
"""Smallest centre difference, in scene units, for a directional relation to be stated."""

OVERLAP_MARGIN = 0.1
"""Smallest box overlap (fraction of the smaller box) for *in front of* and *behind* to be stated."""

DIRECTIONS = ("left", "right", "above", "below")
RELATIONS = (*DIRECTIONS, "front", "behind")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above", "front": "behind", "behind": "front"}

RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "higher up than", "over"),
    "below": ("below", "under", "beneath", "underneath"),
    "front": ("in front of", "partly covering"),
    "behind": ("behind", "partly hidden by"),
}
"""Ways to say each relation; the first one is canonical."""

PREPOSITIONS = frozenset(
    phrase
    for phrases in RELATION_PHRASES.values()
    for phrase in phrases
    if phrase.split()[0] not in ("partly", "higher")
)
"""Relation phrases that can follow a noun or "what can be seen" directly."""

Place = tuple[int, int]
"""Cell of the 3 x 3 grid of thirds: ``(row, column)``, 0 = top or left, 2 = bottom or right."""

PLACE_NAMES: dict[Place, str] = {
    (0, 0): "top left",
    (0, 1): "top",
    (0, 2): "top right",
    (1, 0): "left",
    (1, 1): "center",
    (1, 2): "right",
    (2, 0): "bottom left",
    (2, 1): "bottom",
    (2, 2): "bottom right",
}

PLACES = tuple(PLACE_NAMES)

PLACE_PHRASES: dict[Place, tuple[str, ...]] = {
    (0, 0): ("at the top left", "in the top left corner", "in the upper left", "in the top left"),
    (0, 1): ("at the top", "at the top center", "in the upper middle"),
    (0, 2): ("at the top right", "in the top right corner", "in the upper right", "in the top right"),
    (1, 0): ("on the left", "at the left", "on the left side", "at the middle left"),
    (1, 1): ("in the center", "in the middle", "at the center"),
    (1, 2): ("on the right", "at the right", "on the right side", "at the middle right"),
    (2, 0): ("at the bottom left", "in the bottom left corner", "in the lower left", "in the bottom left"),
    (2, 1): ("at the bottom", "at the bottom center", "in the lower middle"),
    (2, 2): ("at the bottom right", "in the bottom right corner", "in the lower right", "in the bottom right"),
}
"""Ways to say each place; the first one is canonical."""


class PresetLike(Protocol):
    """What the language needs to know of a ``WorldPreset``."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def styles(self) -> tuple[str, ...]: ...
    @property
    def sizes(self) -> tuple[int, ...]: ...
    @property
    def lattice(self) -> int: ...
    @property
    def backgrounds(self) -> tuple[str, ...]: ...
    @property
    def max_objects(self) -> int: ...


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of ``options``, uniformly. Several times faster than ``rng.choice`` and keeps the element's type."""
    return options[int(rng.random() * len(options))]


def shuffled(rng: np.random.Generator, options: Iterable[T]) -> list[T]:
    """A new list in random order (fast for short lists)."""
    result = list(options)
    for i in range(len(result) - 1, 0, -1):
        j = int(rng.random() * (i + 1))
        result[i], result[j] = result[j], result[i]
    return result


def words(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


# --- nouns ----------------------------------------------------------------------------------------------------------
_PLURAL_NAMES = words("skis dominoes")
"""Head nouns that are plural although the rule in :func:`is_plural` doesn't find them."""

_SINGULAR_IN_S = words("gas canvas atlas lens")
_MASS_NAMES = words(
    """
    bacon badminton bowling bread broccoli butter camping cheese coral corn custard cutlery dna food garlic ginger
    hockey honey ice jewelry lacrosse lettuce lightning luggage meat milk money pasta pong popcorn rice sake salt soap
    spaghetti sushi tennis thread tofu water wood yarn
    """
)
_IRREGULAR = {
    "mouse": "mice", "sheep": "sheep", "fish": "fish", "goose": "geese", "knife": "knives", "leaf": "leaves",
    "wolf": "wolves", "calf": "calves", "loaf": "loaves", "tooth": "teeth", "foot": "feet", "person": "people",
    "man": "men", "woman": "women", "child": "children", "ox": "oxen", "deer": "deer", "moose": "moose",
    "shrimp": "shrimp", "squid": "squid", "tomato": "tomatoes", "potato": "potatoes", "mango": "mangoes",
    "cactus": "cactuses", "octopus": "octopuses", "scarf": "scarves", "shelf": "shelves", "bison": "bison",
    "dice": "dice", "tornado": "tornadoes", "buffalo": "buffaloes",
    "jellyfish": "jellyfish", "pufferfish": "pufferfish", "volcano": "volcanoes", "torpedo": "torpedoes",
    "snowman": "snowmen", "aircraft": "aircraft",
}  # fmt: skip
_AN_EXCEPTIONS = ("hour", "honest", "heir")
_A_EXCEPTIONS = ("uni", "use", "euro", "one", "ukulele", "ufo", "u-")


@lru_cache(maxsize=8192)
def _head(name: str) -> tuple[str, str, str]:
    """Split a class name into words before the head noun, the head noun, and a tail such as ``" of food"``."""
    tail = ""
    cut = re.search(r" (?:of|with|in|on|and|at|for|without) ", name)
    if cut:
        name, tail = name[: cut.start()], name[cut.start() :]
    before, _, head = name.rpartition(" ")
    return before + " " if before else "", head, tail


@lru_cache(maxsize=8192)
def is_plural(name: str) -> bool:
    """Whether a class name is grammatically plural (``"grapes"``)."""
    head = _head(name)[1]
    if head in _PLURAL_NAMES:
        return True
    return head.endswith("s") and not head.endswith(("ss", "us", "is")) and head not in _SINGULAR_IN_S


@lru_cache(maxsize=8192)
def is_mass(name: str) -> bool:
    """Whether a class name is a mass noun (``"bread"``), which takes no article."""
    return _head(name)[1] in _MASS_NAMES


@lru_cache(maxsize=8192)
def _pluralized(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and len(word) > 1 and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


@lru_cache(maxsize=8192)
def plural(name: str) -> str:
    """Plural of a class name: ``"pot of food"`` -> ``"pots of food"``; plural and mass names stay as they are."""
    if is_plural(name) or is_mass(name):
        return name
    if " and " in name:
        return " and ".join(map(plural, name.split(" and ")))
    before, head, tail = _head(name)
    return f"{before}{_pluralized(head)}{tail}"


@lru_cache(maxsize=32768)
def indefinite(name: str, adjectives: str = "") -> str:
    """Noun phrase with its indefinite article: ``indefinite("apple", "large")`` -> ``"a large apple"``."""
    phrase = f"{adjectives} {name}" if adjectives else name
    if is_plural(name) or is_mass(name):
        return phrase
    vowel = phrase[0] in "aeiou" and not phrase.startswith(_A_EXCEPTIONS)
    return f"{'an' if vowel or phrase.startswith(_AN_EXCEPTIONS) else 'a'} {phrase}"


def countable(name: str) -> str:
    """What is counted in ``"how many ... are there"``: ``"dogs"``, ``"sets of grapes"``, ``"pieces of bread"``."""
    if is_plural(name):
        return f"sets of {name}"
    return f"pieces of {name}" if is_mass(name) else plural(name)


def counted(count: int, name: str, adjectives: str = "") -> str:
    """Counted noun phrase: ``"two large dogs"``, ``"two sets of grapes"``, ``"two pieces of bread"``."""
    if count == 1:
        return indefinite(name, adjectives)
    return f"{NUMBER_WORDS[count]} {adjectives}".rstrip() + f" {countable(name)}"


def be(name: str) -> str:
    """``"are"`` for plural class names, else ``"is"``."""
    return "are" if is_plural(name) else "is"


def style_adjective(style: str) -> str:
    """Adjective of a style id.

    Raises:
        InputError: the style has no adjective.
    """
    try:
        return STYLE_ADJECTIVES[style]
    except KeyError:
        known = ", ".join(STYLE_ADJECTIVES)
        raise InputError(f"unknown style {style!r}; known styles are {known}") from None


def size_adjective(size: int) -> str:
    """Adjective of a size in scene units.

    Raises:
        InputError: the size has no adjective.
    """
    try:
        return SIZE_ADJECTIVES[size]
    except KeyError:
        known = ", ".join(map(str, SIZE_ADJECTIVES))
        raise InputError(f"no adjective for size {size}; sizes with one are {known}") from None


def adjectives(item: SceneObject, style: bool = True, size: bool = True, medium: bool = False) -> str:
    """Size and style adjectives of an object, in that order; ``medium`` is said only when asked for."""
    words = []
    if size and (medium or item.size != MEDIUM):
        words.append(size_adjective(item.size))
    if style:
        words.append(style_adjective(item.style))
    return " ".join(words)


def join(parts: Sequence[str], word: str = "and") -> str:
    """``"a"``, ``"a and b"``, ``"a, b and c"``."""
    if len(parts) == 1:
        return parts[0]
    return f"{', '.join(parts[:-1])} {word} {parts[-1]}"


def sentence(text: str) -> str:
    """Text with a capital first letter and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) else ".")


# --- places and relations -------------------------------------------------------------------------------------------


def _third(value: float) -> int:
    return min(2, max(0, int(value * 3 / CANVAS_UNITS)))


def place_of(item: SceneObject) -> Place:
    """The cell of the 3 x 3 grid of thirds in which the object's centre lies."""
    x, y = item.center
    return _third(y), _third(x)


def relations(scene: Scene, a: int, b: int) -> tuple[str, ...]:
    """Relations that hold with a margin from object ``a`` to object ``b``, as keys of :data:`RELATION_PHRASES`.

    A direction holds when the centres differ by at least :data:`MARGIN` units along it and by less across it, so at
    most one does; *front* or *behind* holds when the boxes overlap by at least :data:`OVERLAP_MARGIN`.
    """
    first, second = scene.objects[a], scene.objects[b]
    (ax, ay), (bx, by) = first.center, second.center
    dx, dy = bx - ax, by - ay
    found: list[str] = []
    if abs(dx) > abs(dy):
        if abs(dx) >= MARGIN:
            found.append("left" if dx > 0 else "right")
    elif abs(dy) > abs(dx) and abs(dy) >= MARGIN:
        found.append("above" if dy > 0 else "below")
    if first.overlap(second) >= OVERLAP_MARGIN:
        found.append("front" if a > b else "behind")
    return tuple(found)


def offset(scene: Scene, a: int, b: int, direction: str) -> float:
    """How far object ``a`` lies in ``direction`` of object ``b``, in units between centres; negative: the other way."""
    (ax, ay), (bx, by) = scene.objects[a].center, scene.objects[b].center
    return {"left": bx - ax, "right": ax - bx, "above": by - ay, "below": ay - by}[direction]


def is_between(scene: Scene, middle: int, a: int, b: int) -> bool:
    """Whether object ``middle`` lies between ``a`` and ``b``: near the inner part of the line between their centres."""
    (mx, my), (ax, ay), (bx, by) = (scene.objects[i].center for i in (middle, a, b))
    length = float(np.hypot(bx - ax, by - ay))
    if length < 2 * MARGIN:
        return False
    along = ((mx - ax) * (bx - ax) + (my - ay) * (by - ay)) / length
    across = abs((mx - ax) * (by - ay) - (my - ay) * (bx - ax)) / length
    return MARGIN <= along <= length - MARGIN and across < MARGIN


def references(scene: Scene, index: int) -> tuple[str, ...]:
    """Unambiguous definite references to an object, plainest first; empty when there is none.

    ``("the dog",)`` when the class occurs once; otherwise by style, size or position among its equals
    (``"the flat dog"``, ``"the dog on the left"``), each of which only one object fits.
    """
    item = scene.objects[index]
    equals = [i for i, other in enumerate(scene.objects) if other.name == item.name and i != index]
    if not equals:
        return (f"the {item.name}",)
    found: list[str] = []
    ways = (
        ("left", f"the {item.name} on the left"),
        ("right", f"the {item.name} on the right"),
        ("above", f"the {item.name} at the top"),
        ("below", f"the {item.name} at the bottom"),
    )
    for direction, phrase in ways:
        if all(direction in relations(scene, index, i) for i in equals):
            found.append(phrase)
    if all(scene.objects[i].style != item.style for i in equals):
        found.append(f"the {style_adjective(item.style)} {item.name}")
    if all(scene.objects[i].size != item.size for i in equals):
        found.append(f"the {size_adjective(item.size)} {item.name}")
    return tuple(found)


def refer(scene: Scene, index: int, rng: np.random.Generator | None = None) -> str | None:
    """One of :func:`references` (the first without ``rng``), or ``None`` when the object can't be singled out."""
    found = references(scene, index)
    if not found:
        return None
    return found[0] if rng is None else pick(rng, found)


def all_of(name: str, count: int, rng: np.random.Generator) -> str:
    """Reference to all ``count`` (at least two) objects of a class: ``"both dogs"``, ``"all the dogs"``."""
    many = plural(name)
    if is_plural(name) or is_mass(name):
        return f"all the {many}"
    return pick(rng, (f"both {many}", f"the two {many}") if count == 2 else (f"all the {many}", f"all {many}"))


# --- reading --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _mention_pattern(names: tuple[str, ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    forms: dict[str, str] = {}
    for name in names:
        forms.setdefault(plural(name), name)
    forms.update({name: name for name in names})
    longest_first = sorted(forms, key=len, reverse=True)
    return re.compile(r"(?<![\w-])(" + "|".join(map(re.escape, longest_first)) + r")(?![\w-])"), forms


def mentioned(text: str, names: Sequence[str]) -> list[str]:
    """Class names found in a text (singular or plural), each once, in order of first mention.

    The longest name wins, so that ``"red apple"`` is not also an ``"apple"``.
    """
    pattern, forms = _mention_pattern(tuple(names))
    return list(dict.fromkeys(forms[hit] for hit in pattern.findall(text.lower())))
