"""The command about training runs on disk. The work is done in :mod:`unialignment.training.runs`."""

from __future__ import annotations

import argparse
from pathlib import Path

from unialignment.commands import common


def configure_runs(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign runs``."""
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="DIR", help="runs, or folders that hold runs (default: runs)"
    )
    parser.add_argument("--compare", action="store_true", help="also list the settings in which the runs differ")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw their curves: a .png, .svg or .html file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def runs(args: argparse.Namespace) -> int:
    """List training runs, compare them, plot them."""
    from unialignment.training import runs as room

    found = room.find_runs(args.folders or [Path("runs")])
    facts = [run.facts() for run in found]
    lines = room.table_lines([room.cells(each) for each in facts], list(room.COLUMNS.values()))
    data: dict[str, object] = {"runs": facts}
    if args.compare:
        differing = room.differences(found)
        data["differences"] = differing
        rows = [[key, *map(str, values)] for key, values in differing.items()]
        lines += ["", *room.table_lines(rows, ["setting", *(run.name for run in found)])]
    if args.plot is not None:
        data["plot"] = str(room.plot(found, args.plot))
        lines += ["", str(args.plot)]
    common.say(args, data, lines)
    return 0
