"""Models as a benchmark sees them: what this package's own read, edit and record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unialignment.errors import InputError
from unialignment.evaluation import harness
from unialignment.evaluation.benchmarks import Benchmark, Item
from unialignment.evaluation.models import Photograph, PipelineModel, build
from unialignment.evaluation.records import RecordLog

FAST = {"num_inference_steps": 2}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.effect_noise((50, 40), 60).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> PipelineModel:
    made = build(str(tiny_folder), "cpu", FAST)
    assert isinstance(made, PipelineModel)
    return made


def item(photo: Path, kind: Any, *turns: str) -> Item:
    return Item(f"{kind}/1", kind, kind, " ".join(turns), turns, photo, 5)


def same(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_pictures_follow_seed_and_prompt(model: PipelineModel, photo: Path) -> None:
    dog, cat = item(photo, "generate", "a dog"), item(photo, "generate", "a red cat")
    picture, facts = model.draw(dog, 1)
    assert facts == {} and picture.mode == "RGB"
    assert same(picture, model.draw(dog, 1)[0])
    assert not same(picture, model.draw(dog, 2)[0])
    assert not same(picture, model.draw(cat, 1)[0])
    expected = model.pipe.generate("a dog", seed=1, progress=False, **FAST)
    assert same(picture, expected.images[0])


def test_drawing_does_not_look_at_the_photograph_but_editing_does(model: PipelineModel, photo: Path) -> None:
    kinds = {kind: item(photo, kind, "a dog") for kind in ("generate", "edit")}
    before = {kind: model.draw(one, 1)[0] for kind, one in kinds.items()}
    Image.new("RGB", (50, 40), "red").save(photo)
    assert same(before["generate"], model.draw(kinds["generate"], 1)[0])
    assert not same(before["edit"], model.draw(kinds["edit"], 1)[0])


def test_three_turns_edit_what_the_last_one_made(model: PipelineModel, photo: Path) -> None:
    turns = ("replace the dog by a cat", "a red background", "the apple on the cat")
    picture, facts = model.draw(item(photo, "edit", *turns), 3)
    step = Image.open(photo).convert("RGB")
    for turn in turns:
        step = model.pipe.edit(turn, step, seed=3, progress=False, **FAST).images[0]
    assert same(picture, step) and facts == {}
    assert not same(picture, model.draw(item(photo, "edit", " ".join(turns)), 3)[0])


def test_long_prompts_are_shortened_and_said_to_be(model: PipelineModel, photo: Path) -> None:
    limit = model.pipe.text_limit - 1
    whole = "dog " * limit
    assert model.draw(item(photo, "generate", whole.strip()), 1)[1] == {}
    picture, facts = model.draw(item(photo, "generate", f"{whole}cat cat"), 1)
    assert facts == {"shortened": True, "read": [whole.strip()]}
    assert same(picture, model.draw(item(photo, "generate", whole.strip()), 1)[0])


def test_what_cannot_be_read_at_all_is_an_error_of_that_item(model: PipelineModel, photo: Path, tmp_path: Path) -> None:
    items = (item(photo, "generate", "\u200b \u200b"), Item("b", "generate", "generate", "a dog", ("a dog",), photo, 6))
    benchmark = Benchmark("two", ("generate",), items, "x")
    harness.generate(tmp_path / "run", benchmark, model)
    log = RecordLog(tmp_path / "run" / "generated.jsonl", ("item",))
    assert [record["status"] for record in log] == ["error", "ok"]
    assert log.get("b")["seed"] == 6
    scores = harness.item_scores(tmp_path / "run", items, "nobody")
    assert {one["status"] for one in scores.values()} == {"not drawn", "not judged"}


def test_identity_follows_weights_and_settings(tiny_folder: Path, make_tiny_pipeline: Any, tmp_path: Path) -> None:
    make_tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    identities = [
        build(str(tiny_folder), "cpu", FAST).identity(),
        build(str(tiny_folder), "cpu", {"num_inference_steps": 3}).identity(),
        build(str(tmp_path / "other"), "cpu", FAST).identity(),
    ]
    assert len({str(one) for one in identities}) == 3
    assert build(str(tiny_folder), "cpu", FAST).identity() == identities[0]
    assert identities[0]["world"] == "scenes"


def test_models_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photo: Path) -> None:
    code = (
        "from PIL import Image\n"
        "class Red:\n"
        "    def identity(self):\n        return {'kind': 'red'}\n"
        "    def draw(self, item, seed):\n        return Image.new('RGB', (8, 8), 'red'), {'note': seed}\n"
    )
    (tmp_path / "my_red_model.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    picture, facts = build("python:my_red_model:Red").draw(item(photo, "generate", "x"), 4)
    assert picture.getpixel((0, 0)) == (255, 0, 0) and facts == {"note": 4}
    for name in ("python:my_red_model:Blue", "python:no_such_module_here:Red", "python:my_red_model"):
        with pytest.raises(InputError, match="expected python:module:Class"):
            build(name)
    assert isinstance(build("photograph"), Photograph)
