"""The benchmark's files: all of them, and everything that can be wrong with them."""

from __future__ import annotations

import json
import stat
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from unialignment.errors import AssetError, InputError
from unialignment.evaluation.benchmarks import semgen_bench
from unialignment.evaluation.benchmarks.semgen_bench import GROUPS, INDEX, clauses, load

ROW = {
    "image_id": 1,
    "image_path": "images/1.png",
    "t2i_long": "A dog.",
    "t2i_complex": "A dog.",
    "edit_multi": "Add a cat.Remove the dog.Make it red.",
    "edit_complex": "Remove it.",
}


def write(folder: Path, *rows: object) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(folder / "images" / "1.png")
    (folder / INDEX).write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return folder


def test_the_whole_benchmark(shared_dir: Path, tmp_path: Path) -> None:
    bench = load(shared_dir / "semgen-bench")
    assert len(bench.items) == 600
    assert {g: sum(i.group == g for i in bench.items) for g in GROUPS} == dict.fromkeys(GROUPS, 150)
    assert len({item.id for item in bench.items}) == len({item.offset for item in bench.items}) == 600
    three = load(shared_dir / "semgen-bench", turns="three")
    assert {len(item.turns) for item in three.items if item.group == "edit_multi"} == {3}
    assert {len(item.turns) for item in three.items if item.group != "edit_multi"} == {1}
    archive = tmp_path / "bench.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((shared_dir / "semgen-bench").rglob("*")):
            file.write(path, Path("SemGen-Bench") / path.relative_to(shared_dir / "semgen-bench"))
    assert load(archive, cache=tmp_path / "cache").fingerprint == bench.fingerprint


def test_clauses_without_spaces_between() -> None:
    assert clauses(ROW["edit_multi"]) == ("Add a cat.", "Remove the dog.", "Make it red.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "line 1: not JSON"),
        ({**ROW, "image_path": "../secret.png"}, "leads out"),
        ({**ROW, "image_path": "/etc/passwd"}, "leads out"),
        ({**ROW, "image_path": "images/2.png"}, "no picture"),
        ({**ROW, "t2i_long": " "}, "t2i_long"),
        ({**ROW, "image_id": "1"}, "image_id"),
        ("[]", "image_id"),
        ("", "holds no rows"),
    ],
)
def test_damaged_rows_are_named(row: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load(write(tmp_path, row))


def test_a_row_twice(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="twice"):
        load(write(tmp_path, ROW, ROW))


@pytest.mark.parametrize("name", ["../out.jpg", "/tmp/out.jpg", "a\\..\\out.jpg", "C:/out.jpg"])
def test_archives_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(zipfile.ZipInfo(name), b"x")
    with pytest.raises(InputError, match="leads out"):
        load(archive, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_links_in_archives_are_refused(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    link = zipfile.ZipInfo("images/1.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(link, b"/etc/passwd")
    with pytest.raises(InputError, match="is a link"):
        load(archive, cache=tmp_path / "cache")


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("images/1.jpg", bytes(20_000_000))
    with pytest.raises(InputError, match="would unpack"):
        load(archive, cache=tmp_path / "cache")
    monkeypatch.setattr(semgen_bench, "MAX_MEMBERS", 0)
    with pytest.raises(InputError, match="at most 0"):
        load(archive, cache=tmp_path / "cache")


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hub id"):
        load(tmp_path / "nothing")
    with pytest.raises(InputError, match=INDEX):
        load(tmp_path)
    with pytest.raises(AssetError, match="hub failed"):  # tests are offline
        load("someone/semgen-bench")


def test_a_hub_id_is_downloaded_as_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[tuple[str, object]] = []

    def snapshot_download(name: str, **options: object) -> str:
        asked.append((name, options["repo_type"]))
        return str(write(tmp_path / "snapshot", ROW))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    bench = load("somebody/SemGen-Bench")
    assert asked == [("somebody/SemGen-Bench", "dataset")]
    assert [item.group for item in bench.items] == list(GROUPS)
    assert bench.fingerprint == load(write(tmp_path / "folder", ROW)).fingerprint
