"""GenEval and DPG-Bench: prompts whose pictures are checked question by question.

GenEval (arXiv 2310.11513): ``evaluation_metadata.jsonl``. Its authors check with an object detector; here a judge that
looks at the picture is asked about every statement of the metadata, and a picture counts where all hold. The pictures
are also written in the layout that the authors' script reads, so that it can be run on them.

DPG-Bench (arXiv 2403.05135): ``dpg_bench.csv`` and ``prompts/``. Its questions are asked as they stand; one whose
parent does not hold does not count. The authors use mPLUG as judge and four pictures a prompt; here it is one picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unialignment.errors import InputError
from unialignment.evaluation.benchmarks import Benchmark, Check, Item
from unialignment.evaluation.benchmarks.files import fields, need, read_jsonl, read_table
from unialignment.evaluation.records import digest
from unialignment.model.folders import file_checksum
from unialignment.storage import atomic_file
from unialignment.world import language as lang

OTHER_JUDGE = "Not judged as by the authors ({}): figures are comparable among runs with this judge only."
_POSITIONS = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}


def load_geneval(root: Path) -> Benchmark:
    """Read GenEval's prompts.

    Args:
        root: Its metadata file, or a folder that holds it.

    Raises:
        InputError: The file is missing or damaged.
    """
    get = "get prompts/evaluation_metadata.jsonl from GenEval's repository (github.com/djghosh13/geneval)"
    path = root if root.is_file() else need(root, "evaluation_metadata.jsonl|prompts/evaluation_metadata.jsonl", get)
    items = []
    for number, row in enumerate(read_jsonl(path)):
        where = f"{path.name}, line {number + 1}"
        tag, prompt, include = fields(row, where, "tag", "prompt", "include")
        checks = _geneval_checks(include, row.get("exclude") or [], where)
        items.append(Item(f"{tag}/{number:05d}", tag, "generate", prompt, (prompt,), None, number, checks))
    groups = tuple(dict.fromkeys(item.group for item in items))
    if not items:
        raise InputError(f"{path} holds no prompts; {get}")
    ordered = tuple(item for group in groups for item in items if item.group == group)
    notes = (OTHER_JUDGE.format("an object detector"),)
    return Benchmark("GenEval", groups, ordered, file_checksum(path), ("score",), 1.0, "all", notes)


def _geneval_checks(include: list[Any], exclude: list[Any], where: str) -> tuple[Check, ...]:
    checks: list[Check] = []
    for index, one in enumerate(include):
        name, count = fields(one, where, "class", "count")
        colour, position = one.get("color"), one.get("position")
        above = f"there{index}"
        several = [other for other in exclude if other.get("class") == name]
        if count > 1 or several:
            text = (
                f"Are there exactly {count} {lang.plural(name)} in the picture?"
                if count > 1
                else f"Is there exactly one {name}?"
            )
            checks.append(Check(above, text))
        else:
            checks.append(Check(above, f"Is there at least one {name} in the picture?"))
        if colour:
            checks.append(Check(f"colour{index}", f"Is the {name} in the picture {colour}?", (above,)))
        if position:
            relation, target = position
            try:
                phrase, other = _POSITIONS[relation], include[target]["class"]
            except (KeyError, IndexError, TypeError):
                raise InputError(f"{where}: the position {position!r} is unknown") from None
            text = f"Is the {name} {phrase} the {other} in the picture?"
            checks.append(Check(f"position{index}", text, (above, f"there{target}")))
    return tuple(checks)


def export_geneval(folder: Path, root: Path, benchmark: Benchmark) -> Path:
    """Write drawn pictures in the layout of GenEval's own scripts, ``NNNNN/metadata.jsonl`` and
    ``NNNNN/samples/0000.png``.

    Args:
        folder: The run.
        root: Where the metadata came from, as given to :func:`load_geneval`.
        benchmark: What that returned.

    Returns:
        The folder to give to ``evaluate_images.py``.
    """
    from unialignment.evaluation.records import RecordLog

    path = root if root.is_file() else need(root, "evaluation_metadata.jsonl|prompts/evaluation_metadata.jsonl", "")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    log, home = RecordLog(folder / "generated.jsonl", ("item",)), folder / "geneval"
    for item in benchmark.items:
        record = log.get(item.id)
        if record is None or record["status"] != "ok":
            continue
        number = item.id.rpartition("/")[2]
        with atomic_file(home / number / "metadata.jsonl") as file:
            file.write((lines[int(number)] + "\n").encode())
        with atomic_file(home / number / "samples" / "0000.png") as file:
            file.write((folder / record["picture"]).read_bytes())
    return home


def load_dpg(root: Path) -> Benchmark:
    """Read DPG-Bench.

    Raises:
        InputError: A file is missing or damaged.
    """
    get = "get dpg_bench/dpg_bench.csv and dpg_bench/prompts/ of ELLA's repository (github.com/TencentQQGYLab/ELLA)"
    table, folder = need(root, "dpg_bench.csv", get), need(root, "prompts", get)
    columns = ("item_id", "text", "proposition_id", "dependency", "question_natural_language")
    checks: dict[str, list[Check]] = {}
    texts: dict[str, str] = {}
    for row in read_table(table, columns):
        key = row["item_id"]
        file = folder / f"{key}.txt"
        if key not in texts:
            texts[key] = file.read_text(encoding="utf-8").strip() if file.is_file() else row["text"].strip()
        parents = tuple(one.strip() for one in row["dependency"].split(",") if one.strip() not in ("", "0"))
        check = Check(row["proposition_id"].strip(), row["question_natural_language"].strip(), parents)
        checks.setdefault(key, []).append(check)
    items = tuple(
        Item(f"dpg/{key}", "dpg", "generate", texts[key], (texts[key],), None, number, tuple(checks[key]))
        for number, key in enumerate(checks)
    )
    if not items:
        raise InputError(f"{table} holds no questions; {get}")
    notes = (OTHER_JUDGE.format("mPLUG, four pictures a prompt"),)
    fingerprint = digest(file_checksum(table), *texts.values())
    return Benchmark("DPG-Bench", ("dpg",), items, fingerprint, ("score",), 100.0, "mean", notes)
