"""``unialign ablate``: compare arms of a training recipe over seeds. Knows nothing of how."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from unialignment.commands import common
from unialignment.errors import UniAlignmentError


def configure_ablate(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``unialign ablate``."""
    parser.add_argument("config", help="YAML file")
    parser.add_argument("override", nargs="*", metavar="key=value", help="settings to change, by dotted name")
    parser.add_argument(
        "--report-only", action="store_true", help="rebuild table and figure from the records there are"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder of the report (default: the file's `report`)"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at once, one thread each (default: the file's)")
    parser.add_argument(
        "--in-process", action="store_true", help="no processes of their own: one run after another here"
    )
    parser.add_argument("--list", action="store_true", help="say which runs there are and how far they came, and stop")
    common.add_output(parser)


def ablate(args: argparse.Namespace) -> int:
    """Run what is missing, then write the report; an interrupted ablation continues where it was."""
    try:
        from unialignment.training.ablation import driver, report
        from unialignment.training.ablation.config import load_ablation, plan
        from unialignment.training.ablation.worker import finished
    except ModuleNotFoundError as error:
        raise UniAlignmentError(
            f"this command needs the package {error.name}; run: pip install 'unialignment[train,world,eval]'"
        ) from error
    started = time.perf_counter()
    overrides = [*args.override, *([f"jobs={args.jobs}"] if args.jobs is not None else [])]
    config = load_ablation(args.config, overrides)
    folder = args.out or config.report
    if args.list:
        states = {run.name: _state(run.folder, finished(run, config.measure) is not None) for run in plan(config)}
        common.say(args, {"runs": states}, [f"{name}: {state}" for name, state in states.items()])
        return 0
    if not args.report_only:

        def say(text: str) -> None:
            if not args.quiet:
                print(text, file=sys.stderr, flush=True)

        if not driver.run_all(config, say, args.in_process):
            say("stopped; the same command goes on")
            return 130
    records, planned = report.collect(config)
    if args.report_only and not records and (folder / "records.jsonl").is_file():
        records = report.read_records(folder / "records.jsonl")  # the runs themselves are elsewhere, or gone
    paths = report.write_report(config, records, planned, folder)
    data = {"finished": len(records), "planned": planned, "files": [str(path) for path in paths]}
    lines = [f"{len(records)} of {planned} runs finished", *(str(path) for path in paths)]
    common.say(args, {**data, "seconds": common.seconds(started)}, lines)
    return 0


def _state(folder: Path, done: bool) -> str:
    if done:
        return "finished"
    if (folder / "trained.json").is_file():
        return "trained, not measured"
    if any((folder / "checkpoints").glob("*")):
        return "started"
    return "not started"
