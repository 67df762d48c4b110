"""``unialign data check``: what is in a data set, and what is wrong with it. The work is the data room's."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from unialignment.commands import common
from unialignment.errors import InputError, StorageError


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign data``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        help="look at every row and picture of a data set",
        description="Look at every row and picture of a data set: counts by task, sizes, examples, and what is wrong.",
        epilog="example: unialign data check manifest.jsonl --quarantine bad.jsonl",
    )
    check.add_argument("path", nargs="+", help="file, folder, pattern, or a data set's name")
    check.add_argument(
        "--format", choices=("auto", "jsonl", "parquet", "webdataset", "dataset"), default="auto", help="by ending"
    )
    check.add_argument("--split", default="train", help="split of a named data set")
    check.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="only these; says what picture-to-picture rows are for"
    )
    check.add_argument(
        "--root", type=Path, metavar="FOLDER", help="where pictures' paths start (default: the manifest)"
    )
    check.add_argument("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="column names")
    check.add_argument("--quarantine", type=Path, metavar="FILE", help="write unusable rows here (for data.exclude)")
    check.add_argument("--quick", action="store_true", help="only read pictures' headers")
    check.add_argument("--limit", type=int, metavar="N", help="look at the first N rows only")
    check.add_argument("--examples", type=int, default=1, metavar="N", help="examples to show per task (default: 1)")
    check.add_argument("--max-pixels", type=int, default=100_000_000, metavar="N", help="larger pictures are unusable")
    check.add_argument("--max-bad", type=float, default=0.1, metavar="SHARE", help="exit with 2 above (default: 0.1)")
    common.add_output(check)


def run(args: argparse.Namespace) -> int:
    """Check data sets; 2 if more rows are unusable than allowed."""
    from unialignment.data.check import check
    from unialignment.data.mixture import DataSettings, SourceSpec
    from unialignment.data.quarantine import append
    from unialignment.tasks import TASKS

    columns = dict(_pair(item) for item in args.columns)
    for task in args.tasks or ():
        TASKS.get(task)
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit must be 1 or more, got {args.limit}")
    started = time.perf_counter()
    if args.quarantine is not None:
        try:
            args.quarantine.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"could not replace {args.quarantine}: {error.strerror or error}") from error
    results: list[dict[str, Any]] = []
    lines: list[str] = []
    worst = 0.0
    for path in args.path:
        spec = SourceSpec(
            path,
            args.format,
            args.split,
            tasks=tuple(args.tasks) if args.tasks else None,
            root=args.root,
            columns=columns,
        )
        found = check(
            spec,
            DataSettings(max_pixels=args.max_pixels),
            quick=args.quick,
            limit=args.limit,
            examples=args.examples,
            problem=None if args.quarantine is None else lambda bad: append(args.quarantine, bad),
            progress=None if args.quiet or args.json or not sys.stderr.isatty() else _progress,
        )
        worst = max(worst, found.bad_share)
        plain = {"path": path, **found.plain()}
        plain["problems"] = [{"row": p.row, "reason": p.reason} for p in found.problems[:20]]
        results.append(plain)
        lines += _lines(plain)
    if args.quarantine is not None and any(result["problems"] for result in results):
        lines.append(
            f"unusable rows are listed in {args.quarantine}; leave them out with data.exclude={args.quarantine}"
        )
    common.say(args, {"data": results, "seconds": common.seconds(started)}, lines)
    return 2 if worst > args.max_bad else 0


def _pair(item: str) -> tuple[str, str]:
    ours, separator, theirs = item.partition("=")
    if not separator or not ours or not theirs:
        raise InputError(f"--columns {item!r} is not of the form ours=theirs, for example caption=text_en")
    return ours, theirs


def _progress(done: int, total: int) -> None:
    if done % 200 == 0 or done == total:
        print(f"\r{done} of {total} rows", end="\n" if done == total else "", file=sys.stderr)


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{found['path']}: {found['rows']} rows, {found['usable']} usable, "
        f"{found['bad_share']:.1%} unusable" + (f", {found['duplicates']} duplicates" if found["duplicates"] else "")
    ]
    for title, values in (("samples", found["tasks"]), ("kinds", found["kinds"]), ("pictures", found["sizes"])):
        if values:
            lines.append(f"  {title}: " + "; ".join(f"{count} {name}" for name, count in values.items()))
    if found["longest_text"]:
        lengths = ", ".join(f"{task} {length}" for task, length in found["longest_text"].items())
        lines.append(f"  longest text in characters: {lengths}")
    for task, examples in found["examples"].items():
        for example in examples:
            target = example.get("target", repr(example.get("target_text", "")))
            given = " + ".join([*example["sources"], repr(example["prompt"])])
            lines.append(f"  example of {task} ({example['row']}): {given} -> {target}")
    for reason, count in sorted(found["reasons"].items(), key=lambda item: -item[1]):
        lines.append(f"  unusable: {count} x {reason}")
    for bad in found["problems"][:5]:
        lines.append(f"    {bad['row']}: {bad['reason']}")
    return lines
