"""Where an instruction puts an object, exactly: places, edges, beside another, around the same centre, halves.

All coordinates are scene units, snapped down to the preset's lattice and pushed into the canvas. Knows nothing of
words.
"""

from __future__ import annotations

from dataclasses import replace

from unialignment.world.scene import CANVAS_UNITS, SceneObject


def snapped(value: float, size: int, lattice: int) -> int:
    """The largest lattice coordinate not above ``value``, pushed into the canvas for an object of this size."""
    last = (CANVAS_UNITS - size) // lattice * lattice
    return int(min(max(value // lattice * lattice, 0), last))


def middle(size: int, lattice: int) -> int:
    """Coordinate of an object centred on the canvas."""
    return snapped((CANVAS_UNITS - size) / 2, size, lattice)


def at_place(place: tuple[int, int], size: int, lattice: int) -> tuple[int, int]:
    """``(x, y)`` at a place ``(row, column)`` of the 3 x 3 grid: flush with the sides it names, else centred."""
    row, column = (snapped((CANVAS_UNITS - size) * third / 2, size, lattice) for third in place)
    return column, row


def at_edge(item: SceneObject, direction: str, lattice: int) -> tuple[int, int]:
    """``(x, y)`` of an object pushed to the left, right, top (above) or bottom (below) edge; the other one is kept."""
    end = snapped(CANVAS_UNITS, item.size, lattice)
    return {"left": (0, item.y), "right": (end, item.y), "above": (item.x, 0), "below": (item.x, end)}[direction]


def beside(anchor: SceneObject, direction: str, size: int, lattice: int) -> tuple[int, int] | None:
    """``(x, y)`` of an object touching ``anchor`` on one side, centres level; ``None`` when there is no room."""
    level = (anchor.size - size) / 2
    ahead = {
        "left": anchor.x - size,
        "right": anchor.x + anchor.size,
        "above": anchor.y - size,
        "below": anchor.y + anchor.size,
    }[direction]
    if not 0 <= ahead <= CANVAS_UNITS - size or ahead % lattice:
        return None
    if direction in ("left", "right"):
        return ahead, snapped(anchor.y + level, size, lattice)
    return snapped(anchor.x + level, size, lattice), ahead


def resized(item: SceneObject, size: int, lattice: int) -> SceneObject:
    """The object at another size, around the same centre."""
    shift = (item.size - size) / 2
    return replace(item, size=size, x=snapped(item.x + shift, size, lattice), y=snapped(item.y + shift, size, lattice))


def half(side: int, size: int, lattice: int) -> int:
    """Coordinate of an object centred in the first (0) or second (1) half of the canvas, mirrored."""
    first = snapped((CANVAS_UNITS // 2 - size) / 2, size, lattice)
    return first if side == 0 else CANVAS_UNITS - size - first


def pair_layout(
    first: SceneObject, second: SceneObject, relation: str, lattice: int
) -> tuple[SceneObject, SceneObject]:
    """Two objects, one in each half, so that ``first`` is ``relation`` (left, right, above, below) of ``second``."""
    placed = []
    sides = (0, 1) if relation in ("left", "above") else (1, 0)
    for item, side in zip((first, second), sides, strict=True):
        along, across = half(side, item.size, lattice), middle(item.size, lattice)
        x, y = (along, across) if relation in ("left", "right") else (across, along)
        placed.append(replace(item, x=x, y=y))
    return placed[0], placed[1]


def triangle_layout(a: SceneObject, b: SceneObject, c: SceneObject, lattice: int) -> tuple[SceneObject, ...]:
    """``a`` and ``b`` in the upper half, left and right, and ``c`` below them, in the middle."""
    return (
        replace(a, x=half(0, a.size, lattice), y=half(0, a.size, lattice)),
        replace(b, x=half(1, b.size, lattice), y=half(0, b.size, lattice)),
        replace(c, x=middle(c.size, lattice), y=half(1, c.size, lattice)),
    )
