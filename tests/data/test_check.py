"""``unialign data check``: counts what is there, names what is wrong, and its list makes a run pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from unialignment.cli import main
from unialignment.data.quarantine import read_list

Manifest = Callable[..., Path]


def report(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, list[dict]]:
    code = main(["data", "check", "--json", *map(str, arguments)])
    return code, json.loads(capsys.readouterr().out)["data"]


def test_the_examples_are_sound(examples: Path, capsys: pytest.CaptureFixture) -> None:
    code, data = report(capsys, *sorted(examples.glob("*/manifest.jsonl")))
    assert code == 0
    found = {Path(entry["path"]).parent.name: entry for entry in data}
    assert found["text-image"]["tasks"] == {"generate": 12, "caption": 12, "infill": 12}
    assert found["text-image"]["sizes"] == {"square, below 64": 4, "tall, below 64": 4, "wide, below 64": 4}
    assert found["questions"]["tasks"] == {"answer": 12}
    assert found["perception"]["kinds"] == {"perceive/segment": 6}
    assert found["personalization"]["examples"]["compose"][0]["sources"] == ["images/0-1.png", "images/0-2.png"]
    assert not any(entry["problems"] for entry in data)


def test_every_kind_of_damage_is_counted_and_listed(
    grey_manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = grey_manifest(20, broken=(4,))
    lines = path.read_text().splitlines()
    lines[1], lines[2], lines[3] = "{", json.dumps({"image": "gone.png", "caption": "x"}), json.dumps({"caption": "x"})
    lines[6] = lines[5]
    path.write_text("\n".join(lines) + "\n")
    listed = tmp_path / "bad.jsonl"
    code, (found,) = report(capsys, path, "--quarantine", listed)
    assert code == 2  # 20 % is more than the 10 % that are allowed
    assert (found["rows"], found["usable"], found["bad_share"], found["duplicates"]) == (20, 16, 0.2, 1)
    assert found["reasons"]["not a JSON object"] == found["reasons"]["no picture at"] == 1
    assert found["reasons"]["is damaged"] == 1
    assert read_list(listed) == {("grey/manifest.jsonl", f"manifest.jsonl:{line}") for line in (2, 3, 4, 5)}
    assert report(capsys, path, "--max-bad", "0.3")[0] == 0
    code, (quick,) = report(capsys, path, "--quick", "--max-bad", "1")
    assert quick["usable"] == 17  # the header of the picture that was cut short is whole
    assert report(capsys, path, "--limit", "1")[1][0]["rows"] == 1


def test_tasks_and_columns_can_be_said(examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, (found,) = report(capsys, examples / "editing" / "manifest.jsonl", "--tasks", "control")
    assert code == 0 and found["tasks"] == {"control": 6}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"file": "red-circle.png", "alt": "a circle"}) + "\n")
    root = examples / "text-image" / "images"
    code, (found,) = report(capsys, rows, "--root", root, "--columns", "image=file", "caption=alt")
    assert code == 0 and found["tasks"]["generate"] == 1
    assert main(["data", "check", str(rows), "--columns", "image"]) == 2
    assert "ours=theirs" in capsys.readouterr().err
    assert main(["data", "check", str(rows), "--tasks", "painting"]) == 2
    assert "unknown task 'painting'" in capsys.readouterr().err
    assert main(["data", "check", str(rows), "--limit", "0"]) == 2
    assert "--limit must be 1 or more" in capsys.readouterr().err


def test_large_pictures_are_refused(examples: Path, capsys: pytest.CaptureFixture) -> None:
    code, (found,) = report(capsys, examples / "editing" / "manifest.jsonl", "--max-pixels", "100")
    assert code == 2 and found["usable"] == 0 and found["reasons"] == {"more than the limit": 6}


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_manifest_says_so(tmp_path: Path, capsys: pytest.CaptureFixture, content: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(content)
    assert main(["data", "check", str(path)]) == 2
    assert "is empty" in capsys.readouterr().err


def test_plain_output_names_rows(grey_manifest: Manifest, capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "check", str(grey_manifest(10, broken=(9,))), "-q"]) == 0
    out = capsys.readouterr().out
    assert "10 rows, 9 usable, 10.0% unusable" in out and "manifest.jsonl:10: " in out and "1 x is damaged" in out
