"""``unialign eval`` of benchmarks over files: arguments, and the steps they stand for. Knows nothing of measuring."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unialignment.errors import InputError

STEPS = ("generate", "judge", "report")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what runs in folders, and benchmarks over files, take besides the arguments of ``unialign eval``."""
    group = parser.add_argument_group("runs that are kept in a folder (--out DIR)")
    group.add_argument("--step", action="append", choices=STEPS, help="only this step; several may be given")
    group.add_argument(
        "--compare", action="append", default=[], type=Path, metavar="DIR", help="another run in the same report"
    )
    group.add_argument("--accept-versions", action="store_true", help="go on with records of other package versions")
    group = parser.add_argument_group("benchmarks over files (all but semgen-world)")
    group.add_argument("data", nargs="?", metavar="PATH", help="the benchmark's folder, zip file or hub id")
    group.add_argument(
        "--judge",
        action="append",
        default=[],
        help="[LABEL=]openai:MODEL[@URL] or [LABEL=]local:FOLDER; several may be given",
    )
    group.add_argument("--turns", choices=("one", "three"), default="one", help="how edit_multi is told (default: one)")
    group.add_argument("--protocol", choices=("corrected", "published"), default="corrected", help="how it is judged")
    group.add_argument("--prompts", type=Path, metavar="DIR", help="judge prompts in place of the packaged ones")
    group.add_argument("--in-flight", type=int, default=4, metavar="N", help="requests at once (default: 4)")
    group.add_argument("--max-requests", type=int, metavar="N", help="stop after N requests to each judge")
    group.add_argument("--max-judge-tokens", type=int, metavar="N", help="stop after N tokens of each judge")
    group.add_argument("--cache", type=Path, metavar="DIR", help="keep answers of endpoints here, across runs")
    group.add_argument(
        "--calibration", type=int, default=8, metavar="N", help="pictures for testing each judge; 0: none (default: 8)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the steps of a benchmark over files.

    Raises:
        InputError: An unusable argument.
    """
    from unialignment.evaluation import calibration, harness, judges, models, scoring
    from unialignment.evaluation.benchmarks import checked, registry, semgen_bench
    from unialignment.evaluation.judges.prompts import PromptSet
    from unialignment.evaluation.records import run_lock

    if args.data is None:
        raise InputError(f"{args.benchmark} needs its files: unialign eval {args.benchmark} PATH --out DIR")
    if args.out is None:
        raise InputError(f"{args.benchmark} needs a folder for its records: --out DIR")
    check_compared(args)
    if args.benchmark in registry.READING:
        return _read(args)
    steps = tuple(args.step or STEPS)
    if "judge" in steps and not args.judge:
        raise InputError("no judge: give --judge openai:MODEL@URL or local:FOLDER, or only --step generate")
    if args.benchmark == "semgen-bench":
        benchmark = semgen_bench.load(args.data, turns=args.turns)
    else:
        benchmark = registry.DRAWING[args.benchmark](Path(args.data))
    protocol, prompts = scoring.protocol(args.protocol), PromptSet(args.prompts)

    def progress(step: str, done: int, total: int) -> None:
        if done == total or done % 25 == 0:
            print(f"{step}: {done} of {total}", file=sys.stderr, flush=True)

    shared: dict[str, Any] = {"limit": args.limit, "accept_versions": args.accept_versions, "progress": progress}
    with run_lock(args.out):
        if "generate" in steps:
            options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
            given = {name: value for name, value in options.items() if value is not None}
            harness.generate(
                args.out, benchmark, models.build(args.model, args.device, given), seed=args.seed, **shared
            )
            if args.benchmark == "geneval":
                checked.export_geneval(args.out, Path(args.data), benchmark)
        if "judge" in steps:
            settings = judges.JudgeOptions(
                in_flight=args.in_flight,
                max_requests=args.max_requests,
                max_tokens_total=args.max_judge_tokens,
                cache=args.cache,
            )
            made = [judges.build(spec, settings, args.device) for spec in args.judge]
            judges.names(made)
            for one in made:
                if args.calibration and any(item.photo for item in benchmark.items):
                    calibration.calibrate(
                        args.out, benchmark, one, prompts, protocol, args.calibration, args.accept_versions
                    )
                harness.judge(args.out, benchmark, one, prompts, protocol, **shared)
        if "report" in steps:
            return _report(args, benchmark)
    return 0


def _read(args: argparse.Namespace) -> int:
    """Benchmarks that ask for texts or maps: answer, then work out the figures; no judge takes part."""
    from unialignment.evaluation import models, reading, reading_report
    from unialignment.evaluation.benchmarks.registry import READING
    from unialignment.evaluation.records import run_lock
    from unialignment.storage import atomic_file

    if args.judge or "judge" in (args.step or ()):
        raise InputError(f"{args.benchmark} compares answers with known ones; it takes no judge")
    benchmark = READING[args.benchmark](Path(args.data))
    steps = tuple(args.step or STEPS)

    def progress(step: str, done: int, total: int) -> None:
        if done == total or done % 25 == 0:
            print(f"{step}: {done} of {total}", file=sys.stderr, flush=True)

    with run_lock(args.out):
        if "generate" in steps:
            options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
            given = {name: value for name, value in options.items() if value is not None}
            model = models.build(args.model, args.device, given)
            shared: dict[str, Any] = {"accept_versions": args.accept_versions, "progress": progress}
            reading.answer(args.out, benchmark, model, seed=args.seed, limit=args.limit, **shared)
        if "report" in steps:
            summary = reading.summarise(args.out, benchmark, args.limit)
            with atomic_file(args.out / "table.tex") as file:
                file.write(reading.latex(summary).encode())
            with held(args.compare):
                page = reading_report.write_html(args.out, args.compare, benchmark, args.limit)
            print(json.dumps(summary, indent=2) if args.json else f"{reading.table(summary)}\n\n{page}")
    return 0


def _report(args: argparse.Namespace, benchmark: Any) -> int:
    from unialignment.evaluation import calibration, harness, report
    from unialignment.evaluation.records import read_identity
    from unialignment.storage import atomic_file

    found = sorted((args.out / "judges").glob("*/judge.json"))
    if not found:
        raise InputError(f"nothing is judged in {args.out}; run the judge step first")
    summary = harness.summarise(args.out, benchmark, [path.parent.name for path in found], args.limit)
    summary["run"] = read_identity(args.out / "run.json")
    summary["identities"] = {path.parent.name: read_identity(path) for path in found}
    if len({identity["protocol"] for identity in summary["identities"].values()}) > 1:
        raise InputError(f"the judges in {args.out} followed different protocols; use one folder for each")
    summary["calibration"] = {path.parent.name: calibration.verdict(path.parent) for path in found}
    path = harness.save_summary(args.out, summary)
    with held(args.compare):
        runs = report.read_runs([args.out, *args.compare])
        page = report.write_html(args.out / "report.html", runs, benchmark, args.limit)
    with atomic_file(args.out / "table.tex") as file:
        file.write(report.latex(runs).encode())
    print(json.dumps(summary, indent=2) if args.json else f"{table(summary)}\n\n{path}\n{page}")
    return 0


def check_compared(args: argparse.Namespace) -> None:
    """Refuse runs that are named twice.

    Raises:
        InputError: One is.
    """
    folders = [folder.resolve() for folder in (args.out, *args.compare)]
    if len(set(folders)) < len(folders):
        raise InputError("--compare needs runs other than --out, each named once")


@contextlib.contextmanager
def held(folders: Sequence[Path]) -> Iterator[None]:
    """Hold other runs: reading records repairs them, which must not happen under a run of its own."""
    from unialignment.evaluation.records import run_lock

    with contextlib.ExitStack() as stack:
        for folder in folders:
            if folder.is_dir():
                stack.enter_context(run_lock(folder))
        yield


def table(summary: dict[str, Any]) -> str:
    """Markdown: IC, PQ and O with intervals, for each judge and group, and what is missing."""
    measures = summary.get("measures", ["ic", "pq", "o"])
    titles = " | ".join(key.upper() if len(key) < 3 else key for key in measures)
    lines = [f"| judge | group | {titles} | judged | failed |", "|---" * (4 + len(measures)) + "|"]
    for name, judged in summary["judges"].items():
        rows = dict(judged["groups"])
        if "mean" in judged:
            rows["mean of groups"] = judged["mean"]
        for group, row in rows.items():
            cells = [_cell(row.get(key)) for key in measures]
            count = f"{row['judged']} of {row['items']}" if "items" in row else ""
            failed = ", ".join(f"{n} {state}" for state, n in row.get("failed", {}).items())
            lines.append(f"| {name} | {group} | {' | '.join(cells)} | {count} | {failed} |")
    if len(summary["judges"]) > 1:
        alphas = ", ".join(
            f"{k.upper()} {'undefined' if a is None else f'{a:.2f}'}" for k, a in summary["agreement"].items()
        )
        lines += ["", f"Agreement of judges (Krippendorff's alpha, interval): {alphas}."]
    for name, tested in summary.get("calibration", {}).items():
        lines += ["", f"Judge {name}: {tested['verdict']}"]
    lines += ["", *summary["notes"]] if summary.get("notes") else []
    if summary.get("run", {}).get("model", {}).get("world") == "scenes":
        lines += ["", "The model's world is drawn scenes of emoji: photographs are outside it."]
    if summary["shortened_prompts"]:
        lines += ["", f"{summary['shortened_prompts']} prompts were longer than the model reads and were shortened."]
    return "\n".join(lines)


def _cell(values: list[float] | None) -> str:
    return "–" if values is None else f"{values[0]:.2f} [{values[1]:.2f}, {values[2]:.2f}]"
