"""Reads back what a caption of the scene world states: which relations between which objects.

The inverse of ``world/captions.py`` for relations, so that a drawn scene can be held to exactly what its prompt asked for
and to nothing else. Knows the world's words, nothing of pictures or models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from unialignment.world import language as lang
from unialignment.world.scene import Scene


@dataclass(frozen=True)
class Relation:
    """One statement: object ``subject`` (a class name) stands in ``kind`` (of ``lang.RELATIONS``) to object ``other``."""

    subject: str
    kind: str
    other: str


@lru_cache(maxsize=1)
def _phrases() -> tuple[re.Pattern[str], dict[str, str]]:
    kinds = {phrase: kind for kind, phrases in lang.RELATION_PHRASES.items() for phrase in phrases}
    longest_first = sorted(kinds, key=len, reverse=True)
    # A relation is followed by its object: "on the left of the dog" and not "on the left side".
    return re.compile(r"\b(" + "|".join(map(re.escape, longest_first)) + r")\s+(?=(?:the|a|an|\w+)\b)"), kinds


def stated_relations(text: str, names: tuple[str, ...]) -> tuple[Relation, ...]:
    """Relations that a caption states, where each class occurs once.

    A relation joins the two classes named right before and right after its phrase.

    Args:
        text: Caption of the scene world.
        names: Class names that occur in the scene, each once.
    """
    text = text.lower()
    longest_first = sorted(names, key=len, reverse=True)
    spots = [
        (hit.start(), hit.end(), hit.group(1))
        for hit in re.finditer(r"(?<![\w-])(" + "|".join(map(re.escape, longest_first)) + r")(?![\w-])", text)
    ]
    pattern, kinds = _phrases()
    found = []
    for phrase in pattern.finditer(text):
        before = [spot for spot in spots if spot[1] <= phrase.start()]
        after = [spot for spot in spots if spot[0] >= phrase.end()]
        if not before or not after:
            continue
        subject, other = before[-1], after[0]
        # Between the phrase and its object there is room for an article and adjectives only.
        if re.search(r"[,.;]|\b(and|on|in|at|with|there)\b", text[phrase.end() : other[0]]):
            continue
        if re.search(r"[.;]", text[subject[1] : phrase.start()]):
            continue
        found.append(Relation(subject[2], kinds[phrase.group(1)], other[2]))
    return tuple(dict.fromkeys(found))


def holds(relation: Relation, scene: Scene) -> bool:
    """Whether some pair of objects of those classes stands in that relation in ``scene``.

    Directions need the margin that the language asks for (``lang.MARGIN``), across as well as along.
    """
    indices = range(len(scene.objects))
    return any(
        relation.kind in lang.relations(scene, a, b)
        for a in indices
        for b in indices
        if a != b and scene.objects[a].name == relation.subject and scene.objects[b].name == relation.other
    )
