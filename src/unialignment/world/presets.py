"""Presets: which part of the world a model is trained on.

Names classes, styles, sizes, positions and backgrounds. Doesn't sample or draw anything.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from unialignment.errors import AssetError, InputError
from unialignment.world.sprites import SpritePack

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 242),
    "black": (26, 26, 30),
    "gray": (142, 142, 146),
    "red": (204, 52, 52),
    "orange": (240, 140, 46),
    "yellow": (246, 222, 92),
    "green": (82, 168, 78),
    "teal": (34, 158, 160),
    "blue": (62, 106, 214),
    "purple": (142, 78, 188),
    "pink": (244, 158, 192),
    "brown": (122, 82, 54),
}
"""Mean RGB of each background, 0-255."""

_NANO = """
airplane apple avocado banana bear bee book broccoli bus butterfly cactus cake camera car carrot cat
cherries clock coffee corn cow crown dice dog duck elephant fish football fox frog gift globe grapes
guitar hamburger horse house ladybug lemon magnet mushroom octopus owl panda parrot penguin pig
pizza popcorn pumpkin rainbow rocket rose sailboat scissors shirt snake snowman strawberry tractor
tree turtle watermelon whale
"""
NANO_NAMES: tuple[str, ...] = tuple(_NANO.split())
"""The 64 classes of the nano preset: common nouns that differ in shape and colour at 24 px."""


@dataclass(frozen=True)
class WorldPreset:
    """A subset of the world.

    Attributes:
        name: Preset id.
        resolution: Side of the pictures, pixels (a multiple of 64).
        names: Class names, sorted.
        styles: Style ids.
        sizes: Sides of sprites, scene units.
        lattice: Positions are multiples of this many scene units; 1 means free.
        backgrounds: Background names.
        max_objects: Most objects in a scene; the least is 1.
    """

    name: str
    resolution: int
    names: tuple[str, ...]
    styles: tuple[str, ...]
    sizes: tuple[int, ...]
    lattice: int
    backgrounds: tuple[str, ...]
    max_objects: int


PRESETS = ("nano", "small", "full")
STYLES = ("noto", "fluent", "twemoji", "openmoji")
"""Styles that scenes of a preset are drawn in. A pack may have more, to train on (``world.styles``)."""


def preset(name: str, pack: SpritePack) -> WorldPreset:
    """The preset called ``name`` on the artwork of ``pack``.

    A pack with fewer styles (the pip route has only OpenMoji) yields the styles there are.

    Raises:
        InputError: unknown preset.
        AssetError: the pack lacks classes that the preset needs.
    """
    backgrounds = tuple(BACKGROUNDS)
    drawn = tuple(style for style in STYLES if style in pack.styles) or pack.styles
    if name == "nano":
        missing = [item for item in NANO_NAMES if item not in pack.names]
        if missing:
            raise AssetError(f"the sprite pack lacks {', '.join(missing)}: rebuild it with `unialign world build`")
        styles = tuple(style for style in ("noto", "fluent") if style in pack.styles) or drawn
        return WorldPreset("nano", 64, tuple(sorted(NANO_NAMES)), styles, (24, 32), 8, backgrounds, 3)
    if name == "small":
        return WorldPreset("small", 128, _small_names(pack), drawn, (16, 24, 32), 4, backgrounds, 4)
    if name == "full":
        return WorldPreset("full", 128, pack.names, drawn, (16, 24, 32), 1, backgrounds, 5)
    raise InputError(f"unknown world preset {name!r}: expected one of {', '.join(PRESETS)}")


def _small_names(pack: SpritePack, count: int = 256) -> tuple[str, ...]:
    """The nano classes and others of few words, in a stable pseudo-random order."""
    if len(pack.names) < count:
        raise AssetError(
            f"the sprite pack has {len(pack.names)} classes, the small preset needs {count}: "
            "rebuild it with `unialign world build`"
        )
    nano = set(NANO_NAMES)

    def rank(item: str) -> tuple[bool, int, str]:
        return item not in nano, len(item.split()), hashlib.sha256(item.encode()).hexdigest()

    return tuple(sorted(sorted(pack.names, key=rank)[:count]))
