"""NYUv2 depth: maps against a depth camera, up to scale and shift.

Files: ``rgb/NAME.png`` (or .jpg) and ``depth/NAME.png`` with 16-bit depth in millimetres (0: not measured), both of
the 654 test pictures; ``depth/NAME.npy`` in metres is read as well. A map is bright where near: its values stand for
inverse depth, and are brought to the camera's by least squares for every picture, as in MiDaS (arXiv 1907.01341).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unialignment.errors import InputError
from unialignment.evaluation.benchmarks.files import need
from unialignment.evaluation.metrics import grey
from unialignment.evaluation.reading import Question, ReadingBenchmark, Rows, mean_of
from unialignment.evaluation.records import digest
from unialignment.model.folders import file_checksum

NEAR, FAR = 1e-3, 10.0
"""Metres between which depth is evaluated."""

CROP = (45 / 480, 471 / 480, 41 / 640, 601 / 640)
"""Top, bottom, left and right of the part that is evaluated (Eigen et al. 2014), as shares of height and width."""


def load(root: Path) -> ReadingBenchmark:
    """Read NYUv2.

    Raises:
        InputError: A file is missing.
    """
    get = (
        "get NYUv2's labelled pictures (cs.nyu.edu/~silberman/datasets/nyu_depth_v2.html) and write the test pictures "
        "as rgb/NAME.png and depth/NAME.png, 16 bits, millimetres"
    )
    pictures, depths = need(root, "rgb", get), need(root, "depth", get)
    items = []
    for path in sorted(path for path in pictures.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg")):
        depth = need(depths, f"{path.stem}.png|{path.stem}.npy", get)
        items.append(Question(path.stem, "all", path, facts={"depth": depth}, map="depth"))
    if not items:
        raise InputError(f"{pictures} holds no pictures; {get}")
    fingerprint = digest(*(part for item in items for part in (item.id, file_checksum(item.facts["depth"]))))
    statistics = {"delta1": mean_of(0), "AbsRel": mean_of(1), "RMSE (m)": mean_of(2)}
    notes = ("Scale and shift of the inverse depth are fitted to every picture; Eigen's crop, 10 m at most.",)
    return ReadingBenchmark("NYUv2 depth", tuple(items), fingerprint, "", _score, statistics, notes)


def read_depth(path: Path) -> NDArray[np.float64]:
    """Depth in metres ``[H, W]``; 0 where it was not measured.

    Raises:
        InputError: It is no depth map.
    """
    if path.suffix == ".npy":
        depth = np.load(path, allow_pickle=False).astype(np.float64)
    else:
        with Image.open(path) as image:
            if image.mode not in ("I;16", "I", "I;16B"):
                raise InputError(f"{path}: expected 16-bit depth in millimetres, got a picture of mode {image.mode}")
            depth = np.asarray(image, dtype=np.float64) / 1000
    if depth.ndim != 2:
        raise InputError(f"{path}: expected depth of shape [H, W], got {depth.shape}")
    return depth


def compare(map_: NDArray[Any], depth: NDArray[np.float64]) -> list[float]:
    """Delta-1 (share within a factor 1.25), AbsRel and RMSE in metres of a map of inverse depth, after the best fit.

    Args:
        map_: ``[H, W]``, larger is nearer; any scale.
        depth: ``[H, W]`` in metres; 0: not measured.

    Raises:
        InputError: Nothing was measured.
    """
    rows, columns = depth.shape
    where = np.zeros_like(depth, dtype=bool)
    top, bottom, left, right = CROP
    where[round(top * rows) : round(bottom * rows), round(left * columns) : round(right * columns)] = True
    where &= (depth > NEAR) & (depth < FAR)
    if where.sum() < 2:
        raise InputError("a depth map without measured pixels; is it in millimetres (PNG) or metres (NPY)?")
    values, true = map_[where].astype(np.float64), depth[where]
    design = np.stack([values, np.ones_like(values)], axis=1)
    fitted = design @ np.linalg.lstsq(design, 1 / true, rcond=None)[0]
    given = 1 / np.clip(fitted, 1 / FAR, 1 / NEAR)
    ratio = np.maximum(given / true, true / given)
    return [
        float((ratio < 1.25).mean()),
        float((abs(given - true) / true).mean()),
        float(((given - true) ** 2).mean() ** 0.5),
    ]


def _score(items: Sequence[Question], maps: Sequence[Any]) -> Rows:
    rows = []
    for item, map_ in zip(items, maps, strict=True):
        depth = read_depth(item.facts["depth"])
        sized = map_.resize((depth.shape[1], depth.shape[0]), Image.Resampling.BILINEAR)
        rows.append(compare(grey(np.asarray(sized)), depth))
    return np.array(rows)
