"""Example data sets of the repository, and ways to make others."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indices and what `datasets` prepares go to the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    try:
        import datasets
    except ImportError:
        return
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture()
def examples(repo_root: Path) -> Path:
    """``examples/data``."""
    return repo_root / "examples" / "data"


def png(value: int, size: tuple[int, int] = (12, 12)) -> bytes:
    """A grey picture; its value says which it is."""
    data = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture()
def grey_manifest(tmp_path: Path) -> Callable[..., Path]:
    """Makes a manifest of ``count`` grey pictures whose value is their row; ``broken`` ones are cut short."""

    def make(count: int, broken: tuple[int, ...] = (), sizes: tuple[tuple[int, int], ...] = ((12, 12),)) -> Path:
        folder = tmp_path / "grey"
        folder.mkdir(exist_ok=True)
        lines = []
        for row in range(count):
            data = png(row, sizes[row % len(sizes)])
            (folder / f"{row}.png").write_bytes(data[:-20] if row in broken else data)
            lines.append(json.dumps({"image": f"{row}.png", "caption": f"picture {row}"}))
        path = folder / "manifest.jsonl"
        path.write_text("\n".join(lines) + "\n")
        return path

    return make


@pytest.fixture()
def grey_tars(tmp_path: Path) -> Callable[..., Path]:
    """Makes WebDataset shards of grey pictures, numbered through; returns their pattern."""

    def make(shards: int, each: int) -> Path:
        folder = tmp_path / "tars"
        folder.mkdir(exist_ok=True)
        for shard in range(shards):
            with tarfile.open(folder / f"shard-{shard:03d}.tar", "w") as tar:
                for place in range(each):
                    row = shard * each + place
                    for ending, data in (("png", png(row)), ("txt", f"picture {row}".encode())):
                        entry = tarfile.TarInfo(f"{row:04d}.{ending}")
                        entry.size = len(data)
                        tar.addfile(entry, io.BytesIO(data))
        return folder / "*.tar"

    return make
