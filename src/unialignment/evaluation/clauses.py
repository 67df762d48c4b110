"""What of a prompt or an instruction is fulfilled, clause by clause, given what the parser saw in the picture.

Pure functions of scenes: knows nothing of pixels, models or of how clauses become a score.
"""

from __future__ import annotations

from unialignment.world import language as lang
from unialignment.world.captions import Description
from unialignment.world.edits import Clause, Edit
from unialignment.world.parser import ObjectMatch, SceneMatch, match_scenes
from unialignment.world.scene import Scene, SceneObject

POSITION_TOLERANCE = 4.0
"""How far, in scene units (of 64), an object's centre may be off for an edit to count as right."""

Fact = tuple[str, bool]
"""Kind of a clause (``"object"``, ``"style"``, ``"size"``, ``"place"``, ``"relation"``, ``"background"``), and
whether it is fulfilled."""


def stated_facts(drawn: Scene, scene: Scene, stated: Description) -> list[Fact]:
    """Every statement of a prompt about the scene, and whether it is true of what was drawn.

    One clause for each object's class, its style and its size where the prompt states them, each stated place and
    relation, and the background. What an object that was not drawn should have been like counts as not fulfilled.

    Args:
        drawn: What the parser saw.
        scene: What was asked for.
        stated: The prompt, with what it states.
    """
    matches = match_scenes(drawn, scene).objects
    at = [drawn.objects.index(match.parsed) if match.found and match.parsed is not None else None for match in matches]
    facts: list[Fact] = [("object", match.found) for match in matches]
    if stated.styles:
        facts += [("style", match.style_right) for match in matches]
    if stated.sizes:
        facts += [("size", match.size_right) for match in matches]
    facts += [("place", _in_place(drawn, at[i], scene, i)) for i in stated.places]
    facts += [("relation", _related(drawn, at[a], relation, at[b])) for a, relation, b in stated.relations]
    facts += [("relation", _between(drawn, *(at[i] for i in three))) for three in stated.between]
    facts.append(("background", drawn.background == scene.background))
    return facts


def _in_place(drawn: Scene, index: int | None, scene: Scene, expected: int) -> bool:
    return index is not None and lang.place_of(drawn.objects[index]) == lang.place_of(scene.objects[expected])


def _related(drawn: Scene, a: int | None, relation: str, b: int | None) -> bool:
    return a is not None and b is not None and relation in lang.relations(drawn, a, b)


def _between(drawn: Scene, middle: int | None, a: int | None, b: int | None) -> bool:
    return middle is not None and a is not None and b is not None and lang.is_between(drawn, middle, a, b)


def edit_clauses(drawn: Scene, source: Scene, edit: Edit) -> list[bool]:
    """Whether each clause of an instruction is carried out.

    A clause is, when everything that it changes or adds stands in the picture with the right class, style, size and
    place (within :data:`POSITION_TOLERANCE`), when what it removes or replaces is gone (no object of that class is
    left other than where one belongs), and, for the background, when that has the right colour.
    """
    match = match_scenes(drawn, edit.result)
    return [_done(clause, drawn, source, edit.result, match) for clause in edit.clauses]


def _done(clause: Clause, drawn: Scene, source: Scene, result: Scene, match: SceneMatch) -> bool:
    if clause.background is not None and drawn.background != clause.background:
        return False
    by_object = dict(zip(result.objects, match.objects, strict=True))
    if not all(_right(by_object[target]) for target in clause.targets):
        return False
    kept = {target.name for target in clause.targets}
    belonging = [entry.parsed for entry in match.objects if _right(entry)]
    for gone in (source.objects[i].name for i in clause.sources if source.objects[i].name not in kept):
        left = [item for item in drawn.objects if item.name == gone]
        for item in belonging:
            if item in left:
                left.remove(item)
        if left:
            return False
    return True


def preserved(drawn: Scene, source: Scene, edit: Edit) -> list[bool]:
    """What an instruction says nothing of, and whether it is as it was.

    One entry for each object that no clause touches (class, style, size, place), one for the background unless a
    clause changes it, and one for "nothing else was added".
    """
    match = match_scenes(drawn, edit.result)
    touched: set[SceneObject] = {target for clause in edit.clauses for target in clause.targets}
    kept = [
        _right(entry)
        for item, entry in zip(edit.result.objects, match.objects, strict=True)
        if item not in touched and item in source.objects
    ]
    if all(clause.background is None for clause in edit.clauses):
        kept.append(match.background_right)
    kept.append(match.extra == 0)
    return kept


def _right(entry: ObjectMatch) -> bool:
    return entry.found and entry.style_right and entry.size_right and entry.position_error <= POSITION_TOLERANCE
