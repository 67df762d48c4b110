"""The held-out split by combination: which scenes a model must never see in training.

A scene is held out when two of its classes form a held-out pair (about one pair in ten) or when an object has a
held-out class and style (about one in ten). Pure functions of names through sha256, hence the same on every machine,
in every preset, for ever. Every class is seen in training: at most one of its ``noto`` and ``fluent`` drawings is held
out, and ``openmoji`` never is, so that a pack with that style alone works too. A redrawing by the same hand
(``fluent3d``, ``noto-v1``) is held out with its original: shape for shape it is mostly the same picture.
"""

from __future__ import annotations

import hashlib
from functools import cache

from unialignment.world.scene import Scene

PAIR_FRACTION = 0.10
STYLE_FRACTION = 0.10


def _unit(*parts: str) -> float:
    """A number in [0, 1) fixed by the strings."""
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


_REDRAWN = {"fluent3d": "fluent", "noto-v1": "noto"}


@cache
def is_held_out_pair(first: str, second: str) -> bool:
    """Whether two classes may not share a training scene. Symmetric; a class with itself never is held out."""
    if first == second:
        return False
    low, high = sorted((first, second))
    return _unit("pair", low, high) < PAIR_FRACTION


@cache
def is_held_out_style(name: str, style: str) -> bool:
    """Whether a class may not appear in this style in training."""
    style = _REDRAWN.get(style, style)
    if style in ("noto", "fluent"):
        draw = _unit("style 6", name)  # this salt spares neither style of the 64 nano classes
        low = 0.0 if style == "noto" else STYLE_FRACTION
        return low <= draw < low + STYLE_FRACTION
    if style == "twemoji":
        # Twice as often, since openmoji is never held out.
        return _unit("twemoji", name) < 2 * STYLE_FRACTION
    return False


def is_held_out(scene: Scene) -> bool:
    """Whether a scene contains any held-out combination: a pair of classes, or a class in a style."""
    return combination_held_out(tuple((item.name, item.style) for item in scene.objects))


def combination_held_out(objects: tuple[tuple[str, str], ...]) -> bool:
    """:func:`is_held_out` for ``(name, style)`` pairs, before positions are chosen."""
    for index, (name, style) in enumerate(objects):
        if is_held_out_style(name, style):
            return True
        for other, _ in objects[:index]:
            if is_held_out_pair(name, other):
                return True
    return False
