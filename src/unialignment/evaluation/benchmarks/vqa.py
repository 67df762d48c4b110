"""Questions with short answers: VQAv2, GQA and POPE, scored as their authors do.

Files of VQAv2: ``v2_OpenEnded_mscoco_val2014_questions.json``, ``v2_mscoco_val2014_annotations.json``, ``val2014/``.
Files of GQA: ``testdev_balanced_questions.json`` (or ``val_balanced_questions.json``), ``images/``.
Files of POPE: ``coco_pope_random.json``, ``..._popular.json``, ``..._adversarial.json`` (any of them), ``val2014/``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unialignment.errors import InputError
from unialignment.evaluation.benchmarks.files import fields, need, picture, read_json, read_jsonl
from unialignment.evaluation.reading import Question, ReadingBenchmark, Rows, Statistic, mean_of
from unialignment.evaluation.records import digest
from unialignment.model.folders import file_checksum
from unialignment.world import language as lang

SHORT = "Answer the question with a single word or a short phrase."

_NUMBERS = {
    **{word: str(number) for number, word in enumerate(lang.NUMBER_WORDS)},
    "none": "0",
}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_WITH_APOSTROPHE = """
    aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's i'm i've
    isn't it'd it'll might've mightn't must've mustn't needn't oughtn't shan't should've shouldn't somebody's someone's
    that'd that's there'd there're there's they'd they'll they're they've wasn't we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all
    you'd you'll you're you've
"""
# VQA's evaluation puts the apostrophe back into words that people write without one.
_CONTRACTIONS = {word.replace("'", ""): word for word in lang.words(_WITH_APOSTROPHE)}


def normalised(answer: str) -> str:
    """An answer as VQA's evaluation compares it: lower case, no articles, digits for number words, no punctuation."""
    text = given = answer.replace("\n", " ").replace("\t", " ").strip().lower()
    commas = re.search(r"\d,\d", given) is not None
    for mark in _PUNCTUATION:
        joined = f"{mark} " in given or f" {mark}" in given or commas
        text = text.replace(mark, "" if joined else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [_NUMBERS.get(word, word) for word in text.split() if word not in _ARTICLES]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """VQA accuracy (Antol et al. 2015): mean over the people of ``min(1, others who said the same / 3)``."""
    given, said = normalised(answer), [normalised(text) for text in people]
    scores = []
    for left_out in range(len(said)):
        agreeing = sum(text == given for index, text in enumerate(said) if index != left_out)
        scores.append(min(1.0, agreeing / 3))
    return sum(scores) / len(scores)


def load_vqav2(root: Path) -> ReadingBenchmark:
    """Read VQAv2's validation questions.

    Raises:
        InputError: A file is missing or damaged.
    """
    get = "get questions, annotations (visualqa.org, balanced real images, validation) and COCO's val2014.zip"
    asked = need(root, "v2_OpenEnded_mscoco_val2014_questions.json", get)
    known = need(root, "v2_mscoco_val2014_annotations.json", get)
    folder = need(root, "val2014", get)
    answers = {row["question_id"]: row for row in fields(read_json(known), known.name, "annotations")[0]}
    items = []
    for row in fields(read_json(asked), asked.name, "questions")[0]:
        number, image, text = fields(row, asked.name, "question_id", "image_id", "question")
        if number not in answers:
            raise InputError(f"{known}: no annotation for question {number}; questions and annotations must belong")
        people = [one["answer"] for one in answers[number]["answers"]]
        file = picture(folder, f"COCO_val2014_{image:012d}.jpg", asked.name)
        items.append(Question(str(number), answers[number]["answer_type"], file, (text,), {"people": people}))

    def score(items: Sequence[Question], given: Sequence[Any]) -> Rows:
        return np.array([[vqa_accuracy(one[0], item.facts["people"])] for item, one in zip(items, given, strict=True)])

    fingerprint = digest(file_checksum(asked), file_checksum(known))
    return ReadingBenchmark("VQAv2", tuple(items), fingerprint, SHORT, score, {"accuracy": mean_of(0)})


def load_gqa(root: Path) -> ReadingBenchmark:
    """Read GQA's balanced questions.

    Raises:
        InputError: A file is missing or damaged.
    """
    get = "get questions1.2.zip and images.zip of GQA (cs.stanford.edu/people/dorarad/gqa)"
    path = need(root, "testdev_balanced_questions.json|val_balanced_questions.json", get)
    folder = need(root, "images", get)
    items = []
    for key, row in sorted(read_json(path).items()):
        image, text, answer = fields(row, f"{path.name}, question {key}", "imageId", "question", "answer")
        group = (row.get("types") or {}).get("structural", "all")
        file = picture(folder, f"{image}.jpg", path.name)
        items.append(Question(key, group, file, (text,), {"answer": answer}))

    def score(items: Sequence[Question], given: Sequence[Any]) -> Rows:
        right = [normalised(one[0]) == normalised(item.facts["answer"]) for item, one in zip(items, given, strict=True)]
        return np.array(right, dtype=np.float64)[:, None]

    statistics = {"accuracy": mean_of(0)}
    return ReadingBenchmark("GQA", tuple(items), file_checksum(path), SHORT, score, statistics)


def yes_or_no(answer: str) -> str:
    """``"yes"``, ``"no"``, or empty where neither is said first of all."""
    words = re.findall(r"[a-z]+", answer.lower())
    if words[:1] in (["yes"], ["no"]):
        return words[0]
    if "not" in words or "no" in words:
        return "no"
    return "yes" if "yes" in words else ""


def load_pope(root: Path) -> ReadingBenchmark:
    """Read POPE (arXiv 2305.10355): is there such an object? A model that sees what isn't there says yes too often.

    Raises:
        InputError: A file is missing or damaged.
    """
    get = "get output/coco/coco_pope_*.json of POPE's repository (github.com/RUCAIBox/POPE) and COCO's val2014.zip"
    files = [
        path for kind in ("random", "popular", "adversarial") if (path := root / f"coco_pope_{kind}.json").exists()
    ]
    if not files:
        need(root, "coco_pope_random.json", get)
    folder = need(root, "val2014", get)
    items = []
    for path in files:
        kind = path.stem.removeprefix("coco_pope_")
        for number, row in enumerate(read_jsonl(path)):
            image, text, label = fields(row, f"{path.name}, line {number + 1}", "image", "text", "label")
            file = picture(folder, image, path.name)
            items.append(Question(f"{kind}/{number}", kind, file, (text,), {"label": label.strip().lower()}))

    def score(items: Sequence[Question], given: Sequence[Any]) -> Rows:
        said = [yes_or_no(one[0]) for one in given]
        return np.array(
            [[item.facts["label"] == "yes", one == "yes", one == ""] for item, one in zip(items, said)], float
        )

    statistics: dict[str, Statistic] = {"accuracy": _accuracy, "precision": _precision, "recall": _recall, "F1": _f1}
    statistics |= {"share of yes": mean_of(1), "neither yes nor no": mean_of(2)}
    fingerprint = digest(*map(file_checksum, files))
    hint = "Answer with yes or no."
    return ReadingBenchmark("POPE", tuple(items), fingerprint, hint, score, statistics)


def _accuracy(rows: Rows) -> float:
    return float(((rows[:, 0] == rows[:, 1]) & (rows[:, 2] == 0)).mean())


def _precision(rows: Rows) -> float:
    said = rows[:, 1].sum()
    return float((rows[:, 0] * rows[:, 1]).sum() / said) if said else float("nan")


def _recall(rows: Rows) -> float:
    true = rows[:, 0].sum()
    return float((rows[:, 0] * rows[:, 1]).sum() / true) if true else float("nan")


def _f1(rows: Rows) -> float:
    both = rows[:, 0].sum() + rows[:, 1].sum()
    return float(2 * (rows[:, 0] * rows[:, 1]).sum() / both) if both else float("nan")
