"""``unialign runs``: finds runs, says how they went, where they differ, and draws them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from unialignment.cli import main
from unialignment.errors import InputError
from unialignment.training.checkpoint import CheckpointStore
from unialignment.training.runs import differences, find_runs, plot


def a_run(folder: Path, lr: float, losses: list[float], finished: bool = True) -> Path:
    folder.mkdir(parents=True)
    config = {"run": {"name": folder.name, "max_steps": 30}, "optimizer": {"lr": lr, "name": "adamw"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {"step": 10 * i, "train/loss/total": loss, "train/samples_per_second": 8.0, "train/gradient_norm": None}
        for i, loss in enumerate(losses, 1)
    ]
    lines.append({"step": 10 * len(losses), "validation/task/edit": 1.0, "validation/task/caption": 3.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99, "tr')
    if finished:
        (folder / "summary.md").write_text("done")
        state = {"progress": {"step": 10 * len(losses), "elapsed": 61.0}, "guard": {"skipped": 2}, "processes": 4}
        CheckpointStore(folder / "checkpoints").save(10 * len(losses), {}, state)
    return folder


def test_runs_are_found_summed_up_and_compared(tmp_path: Path) -> None:
    a_run(tmp_path / "first", 1e-3, [3.0, 2.0, 1.0])
    a_run(tmp_path / "group" / "second", 5e-4, [4.0], finished=False)
    one, two = find_runs([tmp_path])
    facts = one.facts()
    assert facts["status"] == "finished" and facts["step"] == facts["max_steps"] == 30 and facts["seconds"] == 61.0
    assert facts["loss"] == pytest.approx(2.0) and facts["held_out"] == 2.0 and facts["samples_per_second"] == 8.0
    assert facts["skipped"] == 2 and facts["processes"] == 4 and facts["model_flops_utilisation"] is None
    assert two.facts()["status"] == "unfinished" and two.facts()["seconds"] is None
    assert one.series("train/gradient_norm") == ([], [])
    assert differences([one, two]) == {"run.name": ["first", "second"], "optimizer.lr": [1e-3, 5e-4]}


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_run(tmp_path / "only", 1e-3, [3.0, 2.0])
    assert main(["runs", str(folder), "--plot", str(tmp_path / "runs.png")]) == 0
    said = capsys.readouterr().out
    assert "only" in said and "20/30" in said and "1 min 01 s" in said
    with Image.open(tmp_path / "runs.png") as picture:
        assert picture.size[0] > 600 and len(picture.convert("RGB").getcolors(1 << 24) or []) > 20
    assert main(["runs", str(folder), "--json", "--compare"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["runs"][0]["step"] == 20 and data["differences"] == {}


def test_the_page_stands_alone_and_escapes(tmp_path: Path) -> None:
    runs = find_runs([a_run(tmp_path / "a<b>", 1e-3, [1.0]), a_run(tmp_path / "c", 2e-3, [2.0])])
    page = plot(runs, tmp_path / "runs.html").read_text()
    assert "a&lt;b&gt;" in page and "<b>" not in page and "data:image/png;base64," in page
    assert "optimizer.lr" in page and "http" not in page
    with pytest.raises(InputError, match=r"must end in \.png"):
        plot(runs, tmp_path / "runs.gif")


def test_folders_without_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="holds no runs"):
        find_runs([tmp_path])
