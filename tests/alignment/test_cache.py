"""Teacher cache: each item embedded once, survives restarts, refuses other teachers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unialignment.alignment.cache import TeacherCache, image_key, text_key
from unialignment.errors import AssetError, StorageError


class CountingTeacher:
    """Embeds by simple arithmetic and counts how many items it was given."""

    image_dim, text_dim = 3, 2

    def __init__(self, fingerprint: str = "a" * 64) -> None:
        self.fingerprint = fingerprint
        self.items = 0

    def embed_images(self, images: Any) -> Tensor:
        self.items += len(images)
        return torch.stack([torch.from_numpy(np.asarray(image).mean((0, 1))).float() for image in images])

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        self.items += len(texts)
        return torch.tensor([[len(text), text.count("a")] for text in texts], dtype=torch.float32)


@pytest.fixture
def images() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8))


def test_each_item_is_embedded_once(tmp_path: Path, images: list[np.ndarray]) -> None:
    teacher = CountingTeacher()
    cache = TeacherCache(tmp_path / "cache", teacher)
    first = cache.embed_images([images[0], images[1], images[0]])
    assert teacher.items == 2 and first.dtype == torch.float32 and torch.equal(first[0], first[2])
    torch.testing.assert_close(
        first, CountingTeacher().embed_images([images[0], images[1], images[0]]), rtol=1e-3, atol=0
    )
    second = cache.embed_images(np.stack([images[1], images[2], images[0]]))
    assert teacher.items == 3
    assert torch.equal(second[0], first[1]) and torch.equal(second[2], first[0])


def test_survives_restart(tmp_path: Path, images: list[np.ndarray]) -> None:
    with TeacherCache(tmp_path, CountingTeacher()) as cache:
        before = cache.embed_images(images)
        texts = cache.embed_texts(["a cat", "aa", ""])
    with TeacherCache(tmp_path, CountingTeacher()) as cache:
        cache.embed_images([255 - images[0]])
    teacher = CountingTeacher()
    reopened = TeacherCache(tmp_path, teacher)
    assert len(reopened) == 9 and teacher.items == 0
    assert torch.equal(reopened.embed_images(images), before)
    assert torch.equal(reopened.embed_texts(["", "a cat"]), texts[[2, 0]])
    assert teacher.items == 0


def test_read_only_use_needs_no_teacher(tmp_path: Path, images: list[np.ndarray]) -> None:
    with TeacherCache(tmp_path, CountingTeacher()) as cache:
        cache.embed_images(images[:2])
    reader = TeacherCache(tmp_path)
    assert reader.embed_images(images[:2]).shape == (2, 3) and reader.embed_texts([]).shape == (0, 2)
    with pytest.raises(AssetError, match="1 of 2 images are not in"):
        reader.embed_images([images[0], images[3]])
    with pytest.raises(AssetError, match="no teacher cache"):
        TeacherCache(tmp_path / "absent")


def test_stale_fingerprint_is_refused(tmp_path: Path, images: list[np.ndarray]) -> None:
    with TeacherCache(tmp_path, CountingTeacher()) as cache:
        cache.embed_images(images)
    with pytest.raises(AssetError, match="another teacher"):
        TeacherCache(tmp_path, CountingTeacher("b" * 64))


def test_damage_is_named(tmp_path: Path, images: list[np.ndarray]) -> None:
    with TeacherCache(tmp_path, CountingTeacher()) as cache:
        cache.embed_images(images)
    (tmp_path / "image-00000.values.npy").write_bytes(b"rubbish")
    with pytest.raises(AssetError, match="damaged"):
        TeacherCache(tmp_path, CountingTeacher())
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(AssetError, match="meta.json is damaged"):
        TeacherCache(tmp_path, CountingTeacher())


def test_killed_between_the_two_files_is_recovered(tmp_path: Path, images: list[np.ndarray]) -> None:
    with TeacherCache(tmp_path, CountingTeacher()) as cache:
        cache.embed_images(images)
    (tmp_path / "image-00000.keys.npy").unlink()
    teacher = CountingTeacher()
    with TeacherCache(tmp_path, teacher) as cache:
        assert len(cache) == 0
        cache.embed_images(images)
    assert teacher.items == 5 and len(TeacherCache(tmp_path)) == 5


def test_full_disk_leaves_nothing_half_written(
    tmp_path: Path, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TeacherCache(tmp_path, CountingTeacher())
    cache.embed_images(images)

    def full(file: Any, array: np.ndarray) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(StorageError, match="No space left"):
            cache.flush()
    assert not list(tmp_path.glob("*.npy")) and not list(tmp_path.glob("*.partial"))
    cache.flush()
    assert len(TeacherCache(tmp_path)) == 5


def test_flushes_by_itself(tmp_path: Path, images: list[np.ndarray]) -> None:
    cache = TeacherCache(tmp_path, CountingTeacher(), flush_every=2)
    for image in images[:4]:
        cache.embed_images([image])
    assert len(list(tmp_path.glob("image-*.keys.npy"))) == 2
    assert torch.equal(cache.embed_images(images[:4]), TeacherCache(tmp_path).embed_images(images[:4]))


def test_keys_tell_shapes_apart() -> None:
    flat = np.zeros((2, 8, 3), np.uint8)
    assert image_key(flat) != image_key(flat.reshape(4, 4, 3))
    assert image_key(flat) == image_key(np.asfortranarray(flat)) == image_key(torch.from_numpy(flat))
    assert text_key("a") != text_key("A")
