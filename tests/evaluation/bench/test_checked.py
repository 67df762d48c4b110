"""GenEval, DPG-Bench, GEdit-Bench and ImgEdit from tiny files in their authors' layouts, drawn and judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unialignment.errors import InputError
from unialignment.evaluation import harness
from unialignment.evaluation.benchmarks import Benchmark, Check, Item
from unialignment.evaluation.benchmarks.checked import export_geneval, load_geneval
from unialignment.evaluation.benchmarks.registry import DRAWING
from unialignment.evaluation.judges import Answer
from unialignment.evaluation.judges.prompts import PromptSet
from unialignment.evaluation.report import latex, read_runs, write_html
from unialignment.evaluation.scoring import PROTOCOLS, Refusal, UnparsableAnswer, parse_yes_no

META = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "cup", "count": 3}],
        "exclude": [{"class": "cup", "count": 4}],
        "prompt": "a photo of three cups",
    },
    {
        "tag": "position",
        "include": [
            {"class": "chair", "count": 1},
            {"class": "dog", "count": 1, "position": ["right of", 0]},
        ],
        "prompt": "a photo of a dog right of a chair",
    },
    {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a photo of a red car"},
]


class Painter:
    def identity(self) -> dict[str, Any]:
        return {"kind": "painter"}

    def draw(self, item: Item, seed: int) -> tuple[Image.Image, dict[str, Any]]:
        return Image.new("RGB", (24, 16), (seed, 0, 0)), {}


class Oracle:
    """Says yes, except to questions that hold a given text."""

    name, in_flight = "oracle", 1

    def __init__(self, *no: str) -> None:
        self.no, self.asked = no, []

    def identity(self) -> dict[str, Any]:
        return {"kind": "oracle"}

    def ask(self, prompt: str, images: Any, attempt: int) -> Answer:
        self.asked.append(prompt)
        return Answer("No." if any(text in prompt for text in self.no) else "Yes, it is.")


def geneval(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, META)))
    return folder


def judged(folder: Path, benchmark: Benchmark, judge: Any) -> dict[str, Any]:
    harness.generate(folder, benchmark, Painter())
    harness.judge(folder, benchmark, judge, PromptSet(), PROTOCOLS["corrected"])
    return harness.summarise(folder, benchmark, [judge.name])


def test_geneval_asks_about_every_statement(tmp_path: Path) -> None:
    benchmark = load_geneval(geneval(tmp_path / "data"))
    texts = {item.group: [check.text for check in item.checks] for item in benchmark.items}
    assert texts["counting"] == ["Are there exactly 3 cups in the picture?"]
    there = [f"Is there at least one {name} in the picture?" for name in ("chair", "dog")]
    assert texts["position"] == [*there, "Is the dog to the right of the chair in the picture?"]
    assert texts["colors"][1:] == ["Is the car in the picture red?"]
    judge = Oracle("dog to the right", "exactly 3")
    found = judged(tmp_path / "run", benchmark, judge)["judges"]["oracle"]
    assert {group: row["score"][0] for group, row in found["groups"].items()} == {
        "single_object": 1,
        "counting": 0,
        "position": 0,
        "colors": 1,
    }
    assert found["mean"]["score"][0] == 0.5
    assert all("yes or no" in prompt for prompt in judge.asked)
    asked = len(judge.asked)
    judged(tmp_path / "run", benchmark, judge)
    assert len(judge.asked) == asked == 1 + 1 + 3 + 2


def test_geneval_pictures_in_the_authors_layout(tmp_path: Path) -> None:
    root = geneval(tmp_path / "data")
    benchmark = load_geneval(root)
    harness.generate(tmp_path / "run", benchmark, Painter())
    home = export_geneval(tmp_path / "run", root, benchmark)
    for number, row in enumerate(META):
        assert json.loads((home / f"{number:05d}" / "metadata.jsonl").read_text()) == row
        with Image.open(home / f"{number:05d}" / "samples" / "0000.png") as picture:
            assert picture.size == (24, 16)


def test_unknown_positions_are_named(tmp_path: Path) -> None:
    bad = {**META[2], "include": [{"class": "dog", "count": 1, "position": ["inside", 0]}]}
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(bad))
    with pytest.raises(InputError, match="line 1: the position"):
        load_geneval(tmp_path)


def test_dpg_counts_a_question_only_where_its_parents_hold(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "x1.txt").write_text("A red car and a cat.")
    (tmp_path / "dpg_bench.csv").write_text(
        "item_id,text,keywords,proposition_id,dependency,category_broad,question_natural_language\n"
        'x1,"A red car and a cat.",k,1,0,entity,Is there a car?\n'
        "x1,,k,2,1,attribute,Is the car red?\nx1,,k,3,0,entity,Is there a cat?\n"
        'x1,,k,4,"1,3",relation,Is the cat on the car?\n'
    )
    benchmark = DRAWING["dpg-bench"](tmp_path)
    assert [item.prompt for item in benchmark.items] == ["A red car and a cat."]
    assert benchmark.items[0].checks[3].parents == ("1", "3")
    found = judged(tmp_path / "run", benchmark, Oracle("Is there a car?"))["judges"]["oracle"]
    # No car: whether it is red, and whether a cat is on it, doesn't count. The cat alone holds.
    assert found["groups"]["dpg"]["score"][0] == 25


def test_circular_parents_end() -> None:
    checks = (Check("a", "?", ("b",)), Check("b", "?", ("a",)))
    assert harness.check_score(checks, {"a": True, "b": True}, "mean") == 1


def edits(root: Path) -> tuple[Path, Path]:
    gedit, img = root / "gedit", root / "imgedit"
    for path in (gedit / "images" / "1.png", img / "singleturn" / "animal" / "1.jpg"):
        path.parent.mkdir(parents=True)
        Image.new("RGB", (24, 16), "blue").save(path)
    row = {"key": "k1", "task_type": "color_alter", "instruction": "make it red", "image": "images/1.png"}
    rows = [{**row, "instruction_language": "en"}, {**row, "key": "k2", "instruction_language": "cn"}]
    (gedit / "gedit.jsonl").write_text("\n".join(map(json.dumps, rows)))
    basic = {"10": {"id": "animal/1.jpg", "prompt": "make it red", "edit_type": "adjust"}}
    (img / "basic_edit.json").write_text(json.dumps(basic))
    return gedit, img


class Marker(Oracle):
    def ask(self, prompt: str, images: Any, attempt: int) -> Answer:
        return Answer('{"score": [8, 4]}')


def test_edits_are_marked_like_semgen_bench(tmp_path: Path) -> None:
    for name, root in zip(("gedit-bench", "imgedit"), edits(tmp_path)):
        benchmark = DRAWING[name](root)
        assert len(benchmark.items) == 1 and benchmark.items[0].kind == "edit"
        folder = tmp_path / "run" / name
        found = judged(folder, benchmark, Marker())["judges"]["oracle"]
        row = next(iter(found["groups"].values()))
        assert (row["ic"][0], row["pq"][0], row["o"][0]) == (4, 4, 4)


@pytest.mark.parametrize("name", DRAWING)
def test_missing_files_say_what_to_get_and_where(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no .*; (get|write) .*nothing is downloaded"):
        DRAWING[name](tmp_path)


def test_reports_of_checked_benchmarks(tmp_path: Path) -> None:
    root = geneval(tmp_path / "data")
    benchmark = load_geneval(root)
    summary = judged(tmp_path / "run", benchmark, Oracle("red"))
    identity = json.loads((tmp_path / "run" / "judges" / "oracle" / "judge.json").read_text())
    summary |= {"run": json.loads((tmp_path / "run" / "run.json").read_text()), "identities": {"oracle": identity}}
    harness.save_summary(tmp_path / "run", summary)
    runs = read_runs([tmp_path / "run"])
    page = write_html(tmp_path / "report.html", runs, benchmark).read_text()
    assert "scores from 0 to 1." in page
    assert "an object detector" in page
    assert "score" in latex(runs).splitlines()[2]


@pytest.mark.parametrize(("text", "value"), [("Yes", 1), ("no.", 0), ("I think so: yes", 1), ("It is, yes, a dog", 1)])
def test_yes_and_no(text: str, value: float) -> None:
    assert parse_yes_no(text).values == (value,)


def test_neither_yes_nor_no() -> None:
    for text in ("maybe", "it may be yes or no I guess", ""):
        with pytest.raises(UnparsableAnswer):
            parse_yes_no(text)
    with pytest.raises(Refusal):
        parse_yes_no("I'm sorry, I can't look at this.")
