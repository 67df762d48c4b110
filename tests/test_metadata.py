from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unialignment.errors import InputError, StorageError
from unialignment.metadata import read_metadata, save_image
from unialignment.storage import atomic_file, atomic_folder

FACTS = {"prompt": "ein grüner Hund 犬\nzweite Zeile", "seed": 7, "model": "nano", "settings": {"guidance_scale": 2.5}}


def picture(size: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_metadata_survives_the_file(tmp_path: Path, ending: str):
    path = save_image(picture(), tmp_path / "new" / f"a.{ending}", FACTS)
    assert read_metadata(path) == FACTS
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_pngs_are_lossless_and_show_their_prompt_to_viewers(tmp_path: Path):
    path = save_image(picture(), tmp_path / "a.png", FACTS)
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture()))
        assert image.text["Description"] == FACTS["prompt"]


def test_other_pictures_have_none(tmp_path: Path):
    for ending in ("png", "jpg"):
        path = tmp_path / f"a.{ending}"
        picture().save(path)
        assert read_metadata(path) is None
    (tmp_path / "text.png").write_text("no")
    for name in ("text.png", "absent.png"):
        with pytest.raises(InputError, match=name):
            read_metadata(tmp_path / name)


def test_an_unknown_ending_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(InputError, match=r"\.png"):
        save_image(picture(), tmp_path / "a.tiff", FACTS)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk():
    """Let files grow to 4 KiB only, so that writing really fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_picture_and_nothing_else(tmp_path: Path, small_disk: None):
    path = save_image(picture(), tmp_path / "a.png", FACTS)
    before = path.read_bytes()
    with pytest.raises(StorageError, match="full") as caught:
        save_image(picture(200), path, FACTS)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path):
    def write_file() -> None:
        with atomic_file(tmp_path / "a") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    def write_folder() -> None:
        with atomic_folder(tmp_path / "b") as folder:
            (folder / "x").write_text("half")
            raise KeyboardInterrupt

    for write in (write_file, write_folder):
        with pytest.raises(KeyboardInterrupt):
            write()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path):
    for name in ("first", "second"):
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / name).write_text(name)
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["second"]
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_places_that_cannot_be_written_are_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="folder"), atomic_file(tmp_path / "folder"):
        pass
    with pytest.raises(StorageError, match="file"), atomic_folder(tmp_path / "file"):
        pass
    with pytest.raises(StorageError, match="could not write"), atomic_file(tmp_path / "file" / "inside"):
        pass
