"""GEdit-Bench and ImgEdit: instructions to change photographs, marked like SemGen-Bench's.

GEdit-Bench (arXiv 2504.17761), as files: ``gedit.jsonl``, with ``key``, ``task_type``, ``instruction``,
``instruction_language`` and ``image`` (a path below the folder) on each line. ``unialign`` does not read the hub's
parquet: the documentation has the ten lines that write these files from it. Its authors score semantic consistency,
quality and their geometric mean as here, with GPT-4.1.

ImgEdit (arXiv 2505.20275), basic suite: ``basic_edit.json`` (item to ``id``, ``prompt``, ``edit_type``) and
``singleturn/``. Its authors have GPT-4.1 give three marks from 1 to 5; here it is IC, PQ and O from 0 to 10.
"""

from __future__ import annotations

from pathlib import Path

from unialignment.errors import InputError
from unialignment.evaluation.benchmarks import Benchmark, Item
from unialignment.evaluation.benchmarks.files import fields, need, picture, read_json, read_jsonl
from unialignment.evaluation.records import digest
from unialignment.model.folders import file_checksum


def load_gedit(root: Path, language: str = "en") -> Benchmark:
    """Read GEdit-Bench.

    Args:
        root: Its folder.
        language: ``"en"`` or ``"cn"``: which instructions.

    Raises:
        InputError: A file is missing or damaged.
    """
    get = "write it from the hub's stepfun-ai/GEdit-Bench as docs/benchmarks.md shows"
    path = need(root, "gedit.jsonl", get)
    found = []
    for number, row in enumerate(read_jsonl(path)):
        where = f"{path.name}, line {number + 1}"
        names = ("key", "task_type", "instruction", "instruction_language", "image")
        key, task, text, spoken, image = fields(row, where, *names)
        if spoken == language:
            file = picture(root, image, where)
            found.append(Item(f"{task}/{key}", task, "edit", text, (text,), file, number))
    return _benchmark("GEdit-Bench", path, found, f"instructions in language {language!r}", ())


def load_imgedit(root: Path) -> Benchmark:
    """Read ImgEdit's basic suite.

    Raises:
        InputError: A file is missing or damaged.
    """
    get = "get Benchmark/Basic/basic_edit.json (github.com/PKU-YuanGroup/ImgEdit) and its pictures (singleturn/)"
    path = need(root, "basic_edit.json", get)
    folder = need(root, "singleturn", get)
    found = []
    for number, (key, row) in enumerate(sorted(read_json(path).items())):
        image, text, kind = fields(row, f"{path.name}, item {key}", "id", "prompt", "edit_type")
        file = picture(folder, image, f"{path.name}, item {key}")
        found.append(Item(f"{kind}/{key}", kind, "edit", text, (text,), file, number))
    notes = ("Marked by IC, PQ and O from 0 to 10; ImgEdit's authors use three marks from 1 to 5.",)
    return _benchmark("ImgEdit", path, found, "items", notes)


def _benchmark(name: str, path: Path, items: list[Item], what: str, notes: tuple[str, ...]) -> Benchmark:
    if not items:
        raise InputError(f"{path} holds no {what}")
    groups = tuple(sorted({item.group for item in items}))
    ordered = tuple(item for group in groups for item in items if item.group == group)
    pictures = sorted({item.photo for item in items if item.photo is not None})
    fingerprint = digest(file_checksum(path), *map(file_checksum, pictures))
    return Benchmark(name, groups, ordered, fingerprint, notes=notes)
