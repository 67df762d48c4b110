"""``unialign eval`` and ``unialign card`` from the command line to the files, with a contestant of known scores."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import unialignment
from unialignment.cli import main
from unialignment.evaluation import workers
from unialignment.world.stream import WorldStream


class Oracle:
    """Finds each item by its prompt and sources, and gives its true result."""

    def __init__(self, stream: WorldStream) -> None:
        self.stream = stream
        self.autoencoder = SimpleNamespace(encode=lambda x: x, decode=lambda z: z)

    def run(self, task, prompts, images, *, kind, seed, **options):
        items = [self.stream.sample(task, index) for index in range(20)]
        found = []
        for row, prompt in enumerate(prompts):
            sources = images[row] if images is not None else []
            found += [
                item
                for item in items
                if (item.prompt or None) == prompt
                and all((a == b).all() for a, b in zip(item.sources, sources, strict=True))
            ][:1]
        if found[0].target_image is None:
            return SimpleNamespace(texts=[item.target_text for item in found])
        return SimpleNamespace(images=[Image.fromarray(item.target_image) for item in found])

    def embed_image(self, images):
        return torch.eye(len(images))

    embed_text = embed_image


@pytest.fixture
def oracle(pack, nano, monkeypatch: pytest.MonkeyPatch) -> None:
    if len(nano.styles) < 2:
        pytest.skip("held-out edits need two styles: the artwork of `unialign world build --source npm`")
    stream = WorldStream(pack, nano, "held_out", 0)
    monkeypatch.setattr(unialignment, "load", lambda model, device=None: Oracle(stream), raising=False)
    monkeypatch.setattr(workers, "cores", lambda: 1)  # other processes know no oracle


def test_eval_prints_and_writes_the_same_json(oracle: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "evaluation.json"
    tasks = ["--tasks", "caption,answer,edit", "--no-references"]
    assert main(["eval", "semgen-world", "--limit", "2", "--json", "--out", str(out), *tasks]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert printed["caption.objects"] == printed["vqa.accuracy"] == printed["edit.success"] == 1
    assert "retrieval.r1" not in printed
    assert printed["ceilings"] == {}


def test_eval_prints_tables(oracle: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--limit", "2", "--tasks", "answer"]) == 0
    printed = capsys.readouterr().out
    assert "`vqa.accuracy`" in printed
    assert "kind (`vqa.by_kind`)" in printed


def test_card_from_evaluation_to_files(
    oracle: None, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "evaluation.json"
    main(["eval", "--limit", "1", "--tasks", "caption", "--no-references", "--out", str(results)])
    out = tmp_path / "card"
    arguments = ["--model", str(tiny_folder), "--results", str(results), "--out", str(out), "--per-task", "1", "--json"]
    capsys.readouterr()
    assert main(["card", *arguments]) == 0
    assert json.loads(capsys.readouterr().out) == {"card": str(out / "card.md")}
    text = (out / "card.md").read_text()
    assert "100.0 %" in text
    assert "M parameters" in text
    with Image.open(out / "samples.png") as sheet:
        assert sheet.width > 500


def test_a_card_without_evaluation_says_how_to_get_one(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", "--model", str(tiny_folder)]) == 2
    assert "unialign eval" in capsys.readouterr().err


def test_a_run_in_a_folder_keeps_everything_and_asks_nothing_twice(
    oracle: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shared = ["eval", "semgen-world", "--limit", "3", "--json", "--tasks", "caption,answer,edit,perceive,retrieval"]
    assert main([*shared, "--out", str(tmp_path / "plain.json")]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main([*shared, "--out", str(out), "--step", "generate"]) == 0
    assert capsys.readouterr().out == "" and not (out / "results.json").exists()
    monkeypatch.setattr(Oracle, "run", lambda *args, **options: pytest.fail("asked again"))
    assert main([*shared, "--out", str(out)]) == 0
    kept = json.loads(capsys.readouterr().out)
    assert (
        {**kept, "seconds": 0}
        == {**plain, "seconds": 0}
        == {**json.loads((out / "results.json").read_text()), "seconds": 0}
    )
    edit, caption = (
        [json.loads(line) for line in (out / "parts" / name / "judgements.jsonl").read_text().splitlines()]
        for name in ("edit", "caption")
    )
    assert [record["item"] for record in edit] == [0, 1, 2] and [record["seed"] for record in edit] == [0, 1, 2]
    assert all(record["scores"]["edit.success"] == 1 and record["seen"]["objects"] for record in edit)
    assert all((out / "parts" / "edit" / record["picture"]).is_file() for record in edit)
    assert all(record["text"] == record["expected"] and record["seconds"] >= 0 for record in caption)
    page = (out / "report.html").read_text()
    assert page.count("<article") == 3 * 4 and "100.0 % (truth)" in page
    assert page.count("<script") == 1
    assert r"\toprule" in (out / "table.tex").read_text() and r"100.0 \% (truth)" in (out / "table.tex").read_text()


def test_runs_in_folders_are_not_mixed_and_stand_side_by_side(
    oracle: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ["eval", "--tasks", "caption", "--no-references", "--limit", "2"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*shared, "--out", str(one)]) == 0
    assert main([*shared, "--out", str(one), "--seed", "1"]) == 2
    assert "seed: 0 there, 1 here" in capsys.readouterr().err
    assert main(["eval", "--no-references", "--out", str(one), "--step", "report"]) == 2
    assert "limit: 2 there, 100 here" in capsys.readouterr().err
    assert main([*shared, "--out", str(two), "--compare", str(one)]) == 0
    assert str(two / "report.html") in capsys.readouterr().out
    page = (two / "report.html").read_text()
    assert "two, caption.objects: 1.00" in page and "one, caption.objects: 1.00" in page
    third = ["eval", "--tasks", "caption", "--no-references", "--limit", "1", "--out", str(tmp_path / "three")]
    assert main([*third, "--compare", str(one)]) == 2
    assert "differs in limit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--step", "report"], "need the folder of a run"),
        (["--judge", "openai:x"], "takes neither files nor judges"),
        (["--out", "OUT", "--step", "report"], "nothing is judged"),
        (["--out", "OUT", "--step", "judge"], "run the generate step first"),
        (["--out", "OUT", "--compare", "OUT"], "runs other than --out"),
    ],
)
def test_what_makes_no_sense_is_refused(
    oracle: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    more = [str(tmp_path / "run") if word == "OUT" else word for word in more]
    assert main(["eval", "semgen-world", "--tasks", "caption", "--limit", "1", *more]) == 2
    assert said in capsys.readouterr().err
