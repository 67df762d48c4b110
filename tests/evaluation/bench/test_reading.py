"""Benchmarks that ask for texts or maps: tiny files in their authors' layouts, figures worked out by hand."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unialignment.cli import main
from unialignment.errors import InputError
from unialignment.evaluation import reading
from unialignment.evaluation.benchmarks import mmbench, nyu, vqa
from unialignment.evaluation.benchmarks.registry import READING


class Parrot:
    """Answers from a table, by question; fails where there is none."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers, self.asked = answers, 0

    def identity(self) -> dict[str, Any]:
        return {"kind": "parrot"}

    def tell(self, picture: Image.Image, question: str, hint: str, seed: int) -> str:
        self.asked += 1
        if question not in self.answers:
            raise InputError("what?")
        return self.answers[question]


def photo(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12), colour).save(path)
    return path


def dump(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


def figures(name: str, root: Path, model: Any, out: Path, **options: Any) -> dict[str, Any]:
    benchmark = READING[name](root)
    reading.answer(out, benchmark, model, **options)
    return reading.summarise(out, benchmark, options.get("limit"))


@pytest.mark.parametrize("name", READING)
def test_missing_files_say_what_to_get_and_where(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no .*; (get|write) .*nothing is downloaded"):
        READING[name](tmp_path)


# --- captions ------------------------------------------------------------------------------------------------------


def coco(root: Path) -> None:
    for number in (1, 2):
        photo(root / "val2014" / f"{number}.jpg")
    texts = {1: ["a red car", "the red car"], 2: ["two blue birds on a wire"]}
    dump(
        root / "annotations" / "captions_val2014.json",
        {
            "images": [{"id": number, "file_name": f"{number}.jpg"} for number in texts],
            "annotations": [{"image_id": key, "caption": text} for key, some in texts.items() for text in some],
        },
    )


def test_coco_captions(tmp_path: Path) -> None:
    coco(tmp_path)
    summary = figures("coco-captions", tmp_path, Parrot({"": "two blue birds on a wire"}), tmp_path / "run")
    # The second answer is its only reference: 10 times 10. The first shares "a" alone: all have it.
    assert summary["figures"]["CIDEr-D"][0] == pytest.approx(50)
    assert summary["figures"]["words"][0] == 6
    assert (summary["items"], summary["answered"]) == (2, 2)


def test_the_karpathy_split_is_used_where_it_lies(tmp_path: Path) -> None:
    coco(tmp_path)
    dump(tmp_path / "dataset_coco.json", {"images": [{"cocoid": 1, "split": "train"}, {"cocoid": 2, "split": "test"}]})
    assert [item.id for item in READING["coco-captions"](tmp_path).items] == ["2"]


# --- short answers -------------------------------------------------------------------------------------------------


def test_vqa_accuracy_by_hand() -> None:
    people = ["two"] * 2 + ["three"] * 8
    # Leaving one out of ten: two of the others agree (2/3) eight times, one of them (1/3) twice.
    assert vqa.vqa_accuracy("Two.", people) == pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10)
    assert vqa.vqa_accuracy("3", people) == 1
    assert vqa.vqa_accuracy("four", people) == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("The  Dog", "dog"),
        ("two", "2"),
        ("dont know", "don't know"),
        ("1,000", "1000"),
        ("yes!", "yes"),
        ("3.5", "3.5"),
    ],
)
def test_answers_are_normalised_as_vqa_does(given: str, expected: str) -> None:
    assert vqa.normalised(given) == expected


@given(st.text(max_size=30))
@settings(max_examples=50)
def test_any_answer_can_be_normalised(text: str) -> None:
    found = vqa.normalised(text)
    assert not {"a", "an", "the", "two"} & set(found.split())
    assert found == " ".join(found.split())


def vqav2(root: Path) -> None:
    photo(root / "val2014" / "COCO_val2014_000000000007.jpg")
    asked = [{"question_id": n, "image_id": 7, "question": f"q{n}"} for n in (1, 2)]
    known = [
        {"question_id": 1, "answer_type": "yes/no", "answers": [{"answer": "yes"}] * 10},
        {"question_id": 2, "answer_type": "number", "answers": [{"answer": "2"}] * 10},
    ]
    dump(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    dump(root / "v2_mscoco_val2014_annotations.json", {"annotations": known})


def test_vqav2(tmp_path: Path) -> None:
    vqav2(tmp_path)
    summary = figures("vqav2", tmp_path, Parrot({"q1": "Yes", "q2": "three"}), tmp_path / "run")
    assert summary["figures"]["accuracy"][0] == 0.5
    assert {name: found["accuracy"][0] for name, found in summary["groups"].items()} == {"yes/no": 1, "number": 0}


def test_questions_without_annotation_are_refused(tmp_path: Path) -> None:
    vqav2(tmp_path)
    dump(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": []})
    with pytest.raises(InputError, match="no annotation for question 1"):
        READING["vqav2"](tmp_path)


def test_gqa(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "n1.jpg")
    row = {"imageId": "n1", "question": "what color?", "answer": "red", "types": {"structural": "query"}}
    dump(
        tmp_path / "testdev_balanced_questions.json", {"10": row, "11": {**row, "question": "who?", "answer": "a man"}}
    )
    summary = figures("gqa", tmp_path, Parrot({"what color?": "Red", "who?": "woman"}), tmp_path / "run")
    assert summary["figures"]["accuracy"][0] == 0.5


def test_pope_by_hand(tmp_path: Path) -> None:
    photo(tmp_path / "val2014" / "a.jpg")
    labels = {"q1": "yes", "q2": "yes", "q3": "no", "q4": "no"}
    lines = [
        {"question_id": n, "image": "a.jpg", "text": q, "label": label} for n, (q, label) in enumerate(labels.items())
    ]
    (tmp_path / "coco_pope_random.json").write_text("\n".join(map(json.dumps, lines)))
    said = {"q1": "Yes, there is.", "q2": "I see no dog", "q3": "yes", "q4": "perhaps"}
    summary = figures("pope", tmp_path, Parrot(said), tmp_path / "run")
    found = {name: value[0] for name, value in summary["figures"].items()}
    assert found == pytest.approx(
        {
            "accuracy": 1 / 4,
            "precision": 1 / 2,
            "recall": 1 / 2,
            "F1": 1 / 2,
            "share of yes": 1 / 2,
            "neither yes nor no": 1 / 4,
        }
    )


# --- multiple choice -----------------------------------------------------------------------------------------------


def table(path: Path, *rows: dict[str, str]) -> None:
    names = list(rows[0])
    path.write_text("\n".join("\t".join(row[name] for name in names) for row in ({n: n for n in names}, *rows)))


def choice(**changes: str) -> dict[str, str]:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    row = {"index": "1", "question": "color?", "hint": "", "A": "blue", "B": "red", "C": "green", "answer": "B"}
    return {**row, "l2-category": "attribute", "image": base64.b64encode(buffer.getvalue()).decode(), **changes}


class Chooser(Parrot):
    """Finds the option "red", or always says the first letter."""

    def tell(self, picture: Image.Image, question: str, hint: str, seed: int) -> str:
        self.asked += 1
        return next(iter(self.answers)) or next(line for line in question.splitlines() if line.endswith("red"))


def test_mmbench_circular(tmp_path: Path) -> None:
    table(
        tmp_path / "mmbench_dev_en_20231003.tsv", choice(), choice(index="2", image="1", answer="A", A="red", B="blue")
    )
    right = Chooser({"": ""})
    summary = figures("mmbench", tmp_path, right, tmp_path / "right")
    assert right.asked == 6  # two questions, each in three rotations
    assert [summary["figures"][name][0] for name in ("circular accuracy", "accuracy", "no option named")] == [1, 1, 0]
    summary = figures("mmbench", tmp_path, Chooser({"A": ""}), tmp_path / "always")
    assert [summary["figures"][name][0] for name in ("circular accuracy", "accuracy")] == [0, 0.5]


def test_mmbench_refuses_answers_that_are_no_option(tmp_path: Path) -> None:
    table(tmp_path / "mmbench_dev_en_20231003.tsv", choice(answer="D"))
    with pytest.raises(InputError, match="'D' is none of its options"):
        READING["mmbench"](tmp_path)


CHOICES = {
    "B": "B",
    "(B) red": "B",
    "B. red": "B",
    "B red": "B",
    "The answer is B.": "B",
    "It is red": "B",
    "A red one": "B",  # the article is no letter
    "red or blue": "",
    "purple": "",
    "": "",
}


@pytest.mark.parametrize("text", CHOICES)
def test_choices(text: str) -> None:
    assert mmbench.chosen(text, ["blue", "red", "green"]) == CHOICES[text]


# --- depth ---------------------------------------------------------------------------------------------------------


def test_depth_up_to_scale_and_shift() -> None:
    depth = np.random.default_rng(0).uniform(1, 5, (48, 64))
    assert nyu.compare(37 / depth + 5, depth) == pytest.approx([1, 0, 0], abs=1e-9)
    flat = nyu.compare(np.ones_like(depth), depth)
    assert flat[0] < 0.6 and flat[1] > 0.2
    depth[20, 30] = 0  # not measured
    assert nyu.compare(37 / np.where(depth > 0, depth, 1), depth) == pytest.approx([1, 0, 0], abs=1e-9)


def test_nyu_files(tmp_path: Path) -> None:
    depth = np.linspace(1000, 4000, 48 * 64).reshape(48, 64).astype(np.uint16)
    photo(tmp_path / "rgb" / "1.png").rename(tmp_path / "rgb" / "1.jpg")
    (tmp_path / "depth").mkdir()
    Image.fromarray(depth).save(tmp_path / "depth" / "1.png")
    assert nyu.read_depth(tmp_path / "depth" / "1.png").max() == 4

    class Oracle(Parrot):
        def chart(self, picture: Image.Image, kind: str, seed: int) -> Image.Image:
            assert (kind, picture.size) == ("depth", (16, 12))
            return Image.fromarray((255_000 / depth).astype(np.uint8))

    summary = figures("nyuv2", tmp_path, Oracle({}), tmp_path / "run")
    assert summary["figures"]["delta1"][0] == 1
    assert summary["figures"]["AbsRel"][0] < 0.02
    with pytest.raises(InputError, match="needs a model with a method 'chart'"):
        figures("nyuv2", tmp_path, Parrot({}), tmp_path / "other")
    Image.fromarray(depth.astype(np.uint8)).save(tmp_path / "depth" / "1.png")
    with pytest.raises(InputError, match="expected 16-bit depth"):
        nyu.read_depth(tmp_path / "depth" / "1.png")


# --- the steps -----------------------------------------------------------------------------------------------------


def test_answers_are_kept_failures_counted_and_nothing_asked_twice(tmp_path: Path) -> None:
    vqav2(tmp_path)
    model = Parrot({"q1": "yes"})
    first = figures("vqav2", tmp_path, model, tmp_path / "run")
    assert (first["answered"], first["failed"], first["missing"]) == (1, 1, 0)
    assert figures("vqav2", tmp_path, model, tmp_path / "run") == first
    assert model.asked == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert lines[0]["answers"] == ["yes"] and lines[1] == {**lines[1], "status": "error", "error": "what?"}
    with pytest.raises(InputError, match="another"):
        figures("vqav2", tmp_path, model, tmp_path / "run", seed=1)


def test_pictures_outside_the_folder_are_refused(tmp_path: Path) -> None:
    photo(tmp_path / "secret.jpg")
    (tmp_path / "pope" / "val2014").mkdir(parents=True)
    line = {"question_id": 1, "image": "../../secret.jpg", "text": "q", "label": "yes"}
    (tmp_path / "pope" / "coco_pope_random.json").write_text(json.dumps(line))
    with pytest.raises(InputError, match="leads out"):
        READING["pope"](tmp_path / "pope")


def test_the_command_with_the_documented_adapter(
    tmp_path: Path, repo_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vqav2(tmp_path)
    model = f"python:{repo_root / 'examples/evaluation/my_model.py'}:MyModel"
    arguments = ["eval", "vqav2", str(tmp_path), "--model", model, "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    assert "| all | accuracy | **0.5** |" in capsys.readouterr().out
    assert r"\toprule" in (tmp_path / "run" / "table.tex").read_text()
    assert main([*arguments, "--step", "report", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["accuracy"][0] == 0.5
    assert main([*arguments, "--judge", "openai:x@http://localhost/v1"]) == 2
    assert "takes no judge" in capsys.readouterr().err
