"""The demo: every step in order, both files written, the page self-contained, mistakes on one line."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from PIL import Image

import unialignment
from unialignment import demo
from unialignment.errors import StorageError
from unialignment.world.language import mentioned
from unialignment.world.presets import BACKGROUNDS, NANO_NAMES


class FakePipe:
    """Notes its calls and answers with plain pictures and texts."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str):
        def call(first, *rest, **options):
            self.calls.append(name)
            count = len(first) if isinstance(first, list) else 1
            return SimpleNamespace(
                images=[Image.new("RGB", (64, 64), (40 * i, 90, 120)) for i in range(count)],
                texts=[f"<{name} {i}>" for i in range(count)],
            )

        return call


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> FakePipe:
    fake = FakePipe()
    monkeypatch.setattr(unialignment, "load", lambda model: fake, raising=False)
    return fake


def test_every_step_runs_and_is_timed(pipe: FakePipe, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--out", str(tmp_path / "demo"), "--json"]) == 0
    assert pipe.calls == ["generate", "caption", "answer", "edit", "perceive", "perceive", "perceive", "compose"]
    report = json.loads(capsys.readouterr().out)
    assert len(report["seconds"]) == 10
    with Image.open(report["contact_sheet"]) as sheet:
        assert min(sheet.size) > 800


def test_the_page_holds_everything_itself(pipe: FakePipe, tmp_path) -> None:
    demo.main(["--out", str(tmp_path)])
    page = (tmp_path / "index.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 14
    assert "&lt;caption 0&gt;" in page


def test_an_unwritable_folder_is_one_clear_error(pipe: FakePipe, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose another folder"):
        demo.main(["--out", str(tmp_path / "file" / "demo")])


@pytest.mark.parametrize("prompt", demo.PROMPTS)
def test_prompts_speak_of_things_that_the_bundled_model_knows(prompt: str) -> None:
    objects, _, background = prompt.partition(", on a")
    nouns = re.findall(r"(?:shaded|flat) (\w+)", objects)
    assert nouns
    assert mentioned(objects, NANO_NAMES) == nouns
    assert any(name in background for name in BACKGROUNDS)


def test_the_subject_is_in_the_picture_that_is_asked_about() -> None:
    assert demo.SUBJECT in demo.PROMPTS[demo.MAIN]
