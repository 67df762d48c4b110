"""The sprite pack for tests of the world: the user's cached one, built once if there is none."""

from __future__ import annotations

import pytest

from unialignment.errors import AssetError
from unialignment.world.assets import DownloadError, build_pack
from unialignment.world.presets import WorldPreset, preset
from unialignment.world.render import Renderer
from unialignment.world.sprites import SpritePack


@pytest.fixture(scope="session")
def pack() -> SpritePack:
    """The real sprite pack. A missing tool is an error, a registry out of reach a skip."""
    try:
        return SpritePack.load()
    except AssetError:
        try:
            return SpritePack.load(build_pack())
        except DownloadError as error:
            pytest.skip(f"no sprite pack, and none can be built here: {error}")


@pytest.fixture(scope="session")
def nano(pack: SpritePack) -> WorldPreset:
    """The nano preset."""
    return preset("nano", pack)


@pytest.fixture(scope="session")
def renderer(pack: SpritePack) -> Renderer:
    """A renderer at the nano preset's 64 px."""
    return Renderer(pack, 64)
