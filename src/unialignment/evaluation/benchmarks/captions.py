"""COCO captions: descriptions against those of five people, by CIDEr-D.

Files: ``annotations/captions_val2014.json`` (or ``captions_val2017.json``) and the pictures in ``val2014/``
(``val2017/``). The Karpathy test split is used where ``dataset_coco.json`` lies beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unialignment.evaluation.benchmarks.files import fields, need, picture, read_json
from unialignment.evaluation.cider import cider
from unialignment.evaluation.reading import Question, ReadingBenchmark, Rows, mean_of
from unialignment.model.folders import file_checksum

GET = (
    "get the annotations (annotations_trainval2014.zip) and pictures (val2014.zip) from cocodataset.org and unpack "
    "both into one folder"
)


def load(root: Path) -> ReadingBenchmark:
    """Read COCO captions.

    Raises:
        InputError: A file is missing or damaged.
    """
    path = need(root, "annotations/captions_val2014.json|annotations/captions_val2017.json", GET)
    folder = need(root, "val2014" if "2014" in path.name else "val2017", GET)
    images, annotations = fields(read_json(path), str(path), "images", "annotations")
    names = {row["id"]: row["file_name"] for row in images}
    said: dict[int, list[str]] = {}
    for row in annotations:
        said.setdefault(row["image_id"], []).append(row["caption"])
    split = root / "dataset_coco.json"
    if split.is_file():
        test = {row["cocoid"] for row in fields(read_json(split), str(split), "images")[0] if row["split"] == "test"}
        said = {key: texts for key, texts in said.items() if key in test}
    items = tuple(
        Question(str(key), "all", picture(folder, names[key], path.name), facts={"captions": texts})
        for key, texts in sorted(said.items())
    )
    notes = (
        "CIDEr-D as in COCO's evaluation, but for the tokenizer (see the documentation); n-gram weights are those of "
        "the pictures at hand, so that few pictures give other figures than all.",
    )
    hint = "Describe the picture in one sentence."
    return ReadingBenchmark(
        "COCO captions", items, file_checksum(path), hint, _score, {"CIDEr-D": mean_of(0), "words": mean_of(1)}, notes
    )


def _score(items: Sequence[Question], answers: Sequence[Any]) -> Rows:
    texts = [given[0] for given in answers]
    scores = cider(texts, [item.facts["captions"] for item in items])
    return np.array([[10 * score, len(text.split())] for score, text in zip(scores, texts, strict=True)])
