"""Other people's models on SemGen-World: asked as their adapters are, and judged like everybody else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unialignment.cli import main
from unialignment.errors import InputError
from unialignment.evaluation import workers
from unialignment.evaluation.guests import Guest


class Painter:
    def draw(self, item: Any, seed: int) -> tuple[Image.Image, dict[str, Any]]:
        if item.prompt == "no":
            raise InputError("not this one")
        if item.kind == "edit":
            return Image.open(item.photo).resize((128, 96)), {}
        return Image.new("L", (10, 20), seed), {}


class Talker:
    def tell(self, picture: Image.Image, question: str, hint: str, seed: int) -> str:
        return f"{picture.size} {question} {hint} {seed}"


def test_a_guest_is_asked_as_its_adapter_wants() -> None:
    guest = Guest(Painter(), 64)
    source = np.full((64, 64, 3), (10, 20, 30), np.uint8)
    drawn = guest.run("generate", ["a dog", "no"], None, seed=[7, 8], batch_size=4).images
    assert [np.asarray(one)[0, 0].tolist() for one in drawn] == [[7, 7, 7], [128, 128, 128]]
    edited = guest.run("edit", ["x"], [[source]], seed=[1], kind=None).images[0]
    assert edited.size == (64, 64) and (np.asarray(edited) == source).all()
    assert "caption" not in guest.parts and "turns" in guest.parts
    talker = Guest(Talker(), 64)
    assert talker.parts == ("caption", "answer")
    told = talker.run("answer", ["how many?"], [[source]], seed=[3]).texts
    assert told == ["(64, 64) how many? Answer the question with a single word or a short phrase. 3"]
    assert talker.run("caption", [None], [[source]], seed=[3]).texts[0].startswith("(64, 64)  Describe")
    with pytest.raises(InputError, match="draw or tell"):
        Guest(object(), 64)


def test_the_documented_adapter_on_semgen_world(
    pack, nano, repo_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(nano.styles) < 2:
        pytest.skip("held-out edits need two styles: the artwork of `unialign world build --source npm`")
    monkeypatch.setattr(workers, "cores", lambda: 1)
    shared = ["eval", "--model", f"python:{repo_root / 'examples/evaluation/my_model.py'}:MyModel", "--limit", "2"]
    assert main([*shared, "--out", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"semgen.overall", "vqa.accuracy", "caption.objects", "drift.psnr_3"} <= set(found)
    assert "control.objects" not in found and "retrieval.r1" not in found
    assert set(found["ceilings"]["truth"]) >= {"semgen.overall"} and found["ceilings"]["reconstruction"] == {}
    identity = json.loads((tmp_path / "run" / "run.json").read_text())
    assert identity["model"] == {"kind": "my model", "version": 1}
    assert main([*shared, "--tasks", "caption,control"]) == 2
    assert "can take part in" in capsys.readouterr().err
