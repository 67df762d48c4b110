"""Scenes as plain data: what is where, in which style, size and depth order, on which background.

Knows nothing of pixels, language or sampling. Everything else in the world (pictures, captions, questions,
edits, maps, compositions) is derived from the two dataclasses here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

CANVAS_UNITS = 64
"""Side of the square canvas in scene units. At a resolution of ``r`` pixels one unit is ``r / 64`` pixels."""


@dataclass(frozen=True, order=True)
class SceneObject:
    """One sprite on the canvas.

    Attributes:
        name: Class name, e.g. ``"dog"`` or ``"red apple"``.
        style: Drawing style id, e.g. ``"noto"``.
        size: Side of the square sprite, in scene units.
        x: Left edge, in scene units from the left of the canvas.
        y: Top edge, in scene units from the top of the canvas.
    """

    name: str
    style: str
    size: int
    x: int
    y: int

    @property
    def center(self) -> tuple[float, float]:
        """Centre ``(x, y)`` in scene units."""
        return self.x + self.size / 2, self.y + self.size / 2

    @property
    def box(self) -> tuple[int, int, int, int]:
        """``(left, top, right, bottom)`` in scene units, right and bottom exclusive."""
        return self.x, self.y, self.x + self.size, self.y + self.size

    def overlap(self, other: SceneObject) -> float:
        """Area shared by the two boxes as a fraction (0-1) of the smaller one."""
        width = min(self.x + self.size, other.x + other.size) - max(self.x, other.x)
        height = min(self.y + self.size, other.y + other.size) - max(self.y, other.y)
        if width <= 0 or height <= 0:
            return 0.0
        return width * height / min(self.size, other.size) ** 2


@dataclass(frozen=True)
class Scene:
    """A picture's content.

    Attributes:
        background: Background name, e.g. ``"blue"``.
        objects: Objects from far to near: a later one is drawn over (is *in front of*) an earlier one.
    """

    background: str
    objects: tuple[SceneObject, ...] = field(default_factory=tuple)

    def with_object(self, index: int, **changes: Any) -> Scene:
        """A copy whose object ``index`` has the given fields changed."""
        objects = list(self.objects)
        objects[index] = replace(objects[index], **changes)
        return replace(self, objects=tuple(objects))

    def without_object(self, index: int) -> Scene:
        """A copy lacking object ``index``."""
        return replace(self, objects=self.objects[:index] + self.objects[index + 1 :])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-serialisable form; inverse of :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scene:
        """Inverse of :meth:`to_dict`.

        Raises:
            KeyError: a field is missing.
            TypeError: a field is unknown.
        """
        return cls(
            background=data["background"],
            objects=tuple(SceneObject(**item) for item in data["objects"]),
        )
