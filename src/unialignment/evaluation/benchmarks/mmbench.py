"""MMBench (arXiv 2307.06281): multiple choice, with CircularEval: a question counts as right only if it is answered
rightly in every rotation of its options.

File: ``mmbench_dev_en_20231003.tsv`` or another one of MMBench's tables with answers; the pictures stand in it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unialignment.errors import InputError
from unialignment.evaluation.benchmarks.files import need, read_table
from unialignment.evaluation.reading import Question, ReadingBenchmark, Rows, mean_of
from unialignment.model.folders import file_checksum

LETTERS = "ABCD"


def load(root: Path) -> ReadingBenchmark:
    """Read MMBench.

    Args:
        root: Its table, or a folder that holds one.

    Raises:
        InputError: The file is missing or damaged.
    """
    get = "get a table with answers (mmbench_dev_en_20231003.tsv) from MMBench's page (github.com/open-compass/MMBench)"
    path = root
    if not root.is_file():
        found = sorted(root.glob("*mbench*.tsv"))
        path = found[0] if found else need(root, "mmbench_dev_en_20231003.tsv", get)
    items: list[Question] = []
    pictures: dict[str, bytes] = {}
    for row in read_table(path, ("index", "question", "answer", "image", "A", "B"), "\t"):
        options = [row[letter] for letter in LETTERS if row.get(letter)]
        if row["answer"] not in LETTERS[: len(options)]:
            given = row["answer"]
            raise InputError(f"{path.name}, question {row['index']}: the answer {given!r} is none of its options")
        try:
            # Later questions about a picture may name the index of the first instead of holding it again.
            data = pictures[row["image"]] if row["image"] in pictures else base64.b64decode(row["image"], validate=True)
        except binascii.Error as error:
            raise InputError(f"{path.name}, question {row['index']}: its picture is damaged ({error})") from error
        pictures[row["index"]] = data
        right = LETTERS.index(row["answer"])
        texts = [_asked(row, options[shift:] + options[:shift]) for shift in range(len(options))]
        answers = [LETTERS[(right - shift) % len(options)] for shift in range(len(options))]
        turned = [options[shift:] + options[:shift] for shift in range(len(options))]
        group = row.get("l2-category") or row.get("l2_category") or row.get("category") or "all"
        facts = {"answers": answers, "options": turned}
        items.append(Question(row["index"], group, data, tuple(texts), facts))
    hint = "Answer with the option's letter from the given choices directly."
    statistics = {"circular accuracy": mean_of(0), "accuracy": mean_of(1), "no option named": mean_of(2)}
    return ReadingBenchmark("MMBench", tuple(items), file_checksum(path), hint, _score, statistics)


def _asked(row: dict[str, str], options: Sequence[str]) -> str:
    lines = [hint] if (hint := (row.get("hint") or "").strip()) and hint.lower() != "nan" else []
    lines += [row["question"], *(f"{letter}. {text}" for letter, text in zip(LETTERS, options))]
    return "\n".join(lines)


def chosen(answer: str, options: Sequence[str]) -> str:
    """The letter that an answer chooses, by letter or by the option's text; empty where it is none or several."""
    text = answer.strip()
    if match := re.match(r"^\(?([A-D])(?:[.:,)]|$)", text):
        return match.group(1)
    for letter, option in zip(LETTERS, options):
        if text.lower() == f"{letter} {option}".lower():
            return letter
    if match := re.search(r"\banswer(?:\s+is)?:?\s*\(?([A-D])\b", text):
        return match.group(1)
    found = [letter for letter, option in zip(LETTERS, options) if option.strip().lower() in text.lower()]
    return found[0] if len(found) == 1 else ""


def _score(items: Sequence[Question], given: Sequence[Any]) -> Rows:
    rows = []
    for item, answers in zip(items, given, strict=True):
        picks = [chosen(text, options) for text, options in zip(answers, item.facts["options"], strict=True)]
        right = [pick == truth for pick, truth in zip(picks, item.facts["answers"], strict=True)]
        rows.append([float(all(right)), float(right[0]), float(not picks[0])])
    return np.array(rows)
