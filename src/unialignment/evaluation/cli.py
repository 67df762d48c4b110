"""``unialign eval`` and ``unialign card``: arguments, and which functions they call. Knows nothing of measuring."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unialignment.errors import InputError
from unialignment.evaluation import bench_cli

if TYPE_CHECKING:
    from unialignment.evaluation.results import Results
    from unialignment.evaluation.world import Part, Settings
    from unialignment.world.layout import Split

BENCHMARKS = (
    *("semgen-world", "semgen-bench", "geneval", "dpg-bench", "gedit-bench", "imgedit"),
    *("coco-captions", "vqav2", "gqa", "pope", "mmbench", "nyuv2"),
)
WORLD_LIMIT = 100


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="nano", help="bundled name, folder or hub id (default: nano); see docs")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and samplers (default: 0)")
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: the best there is)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``unialign eval``."""
    parser.add_argument("benchmark", nargs="?", choices=BENCHMARKS, default=BENCHMARKS[0], help="what to run")
    _add_shared(parser)
    parser.add_argument("--limit", type=int, help="items per task or group (default: 100; semgen-bench: all)")
    parser.add_argument("--tasks", help="comma-separated tasks or groups, 'semgen' for all four (default: all)")
    parser.add_argument("--split", default="held_out", choices=("held_out", "train"), help="which scenes")
    parser.add_argument("--preset", default="nano", help="world preset (default: nano)")
    parser.add_argument("--batch-size", type=int, default=16, help="items per call (default: 16)")
    parser.add_argument(
        "--workers", type=int, help="processes of semgen-world (default: 2 on a processor of two cores)"
    )
    parser.add_argument("--steps", type=int, help="denoising steps for pictures (default: each task's own)")
    parser.add_argument("--guidance-scale", type=float, help="guidance for pictures (default: each task's own)")
    parser.add_argument(
        "--best-of", type=int, metavar="N", help="generate and edit: draw N, keep the model's own choice"
    )
    parser.add_argument("--no-references", action="store_true", help="leave out ceilings and floors")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="folder of the run; semgen-world: or a .json file for the figures alone",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    bench_cli.add_arguments(parser)


def add_card_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``unialign card``."""
    _add_shared(parser)
    parser.add_argument("--results", type=Path, help="an evaluation's JSON (default: the one beside the weights)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the model's own)")
    parser.add_argument("--per-task", type=int, default=6, help="samples per task on the contact sheet (default: 6)")
    parser.add_argument("--no-samples", action="store_true", help="keep the contact sheet that is there")
    parser.add_argument("--json", action="store_true", help="print the path as JSON")


def _world(preset_name: str, split: Split, seed: int) -> tuple[Any, Any]:
    from unialignment.world.presets import preset
    from unialignment.world.sprites import SpritePack
    from unialignment.world.stream import WorldStream

    pack = SpritePack.load()
    world = preset(preset_name, pack)
    return pack, WorldStream(pack, world, split, seed)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print a table or JSON.

    Raises:
        InputError: an unusable argument.
    """
    if args.benchmark != "semgen-world":
        return bench_cli.run(args)
    from unialignment.evaluation.card import kind_table, metric_table
    from unialignment.evaluation.workers import cores
    from unialignment.evaluation.world import GROUPS, PARTS, Settings

    if args.limit is None:
        args.limit = WORLD_LIMIT
    tasks = PARTS if args.tasks is None else tuple(name.strip() for name in args.tasks.split(","))
    tasks = tuple(part for name in tasks for part in (GROUPS if name == "semgen" else (name,)))
    if unknown := [name for name in tasks if name not in PARTS]:
        known = ", ".join((*PARTS, "semgen"))
        raise InputError(f"unknown task {', '.join(map(repr, unknown))}; expected some of {known}")
    if args.data is not None or args.judge:
        raise InputError("semgen-world takes neither files nor judges: its scenes are drawn, the parser judges them")
    if args.workers is None:
        args.workers = min(2, cores()) if args.device in (None, "cpu") and not _accelerated() else 1
    for name in ("limit", "batch_size", "workers"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}; expected 1 or more")
    settings = Settings(
        limit=args.limit,
        seed=args.seed,
        batch_size=args.batch_size,
        samplers=_settings(args.steps, args.guidance_scale, args.best_of),
        references=not args.no_references,
    )
    names = _possible(args, [name for name in PARTS if name in tasks], settings)
    if args.out is not None and args.out.suffix != ".json":
        results, page = _run_folder(args, names, settings)
    else:
        results, page = _run_once(args, names, settings), None
    if results is None:
        return 0
    if args.json:
        print(json.dumps(results.to_json(), indent=2))
    else:
        print(metric_table(results))
        for key in results.by_kind:
            print("\n" + kind_table(results, key))
        if page is not None:
            print(f"\n{page}")
    return 0


def _parts(args: argparse.Namespace, names: list[str], settings: Settings, run: Any) -> Iterator[Part]:
    from unialignment.evaluation.workers import run_parts

    build = functools.partial(_contest, args.model, args.device, args.preset, args.split, args.seed, _shared(settings))
    for part in run_parts(build, names, settings, args.workers, run):
        if part is not None:
            print(f"{part.name}: {part.seconds:.1f} s", file=sys.stderr, flush=True)
            yield part


def _run_once(args: argparse.Namespace, names: list[str], settings: Settings) -> Results:
    """Figures alone: nothing else is kept."""
    from unialignment.evaluation.world import combine, run_part

    if args.step or args.compare:
        raise InputError("--step and --compare need the folder of a run: --out DIR")
    parts = list(_parts(args, names, settings, run_part))
    results = combine(parts, _world(args.preset, args.split, args.seed)[1], settings, args.model)
    if args.out is not None:
        results.save(args.out)
    return results


def _run_folder(args: argparse.Namespace, names: list[str], settings: Settings) -> tuple[Results | None, Path | None]:
    """A run with everything on disk, in steps; returns results and page, if the report is among them."""
    from unialignment.evaluation import models, world_report, world_run
    from unialignment.evaluation.guests import PREFIXES
    from unialignment.evaluation.records import run_lock
    from unialignment.evaluation.world import PARTS, combine
    from unialignment.storage import atomic_file

    steps = tuple(args.step or bench_cli.STEPS)
    bench_cli.check_compared(args)
    stream = _world(args.preset, args.split, args.seed)[1]
    with run_lock(args.out):
        if args.model.startswith(PREFIXES):
            identity = _built(args.model, args.device, _shared(settings)).identity()
        else:
            identity = {"kind": "unialignment", "fingerprint": models.fingerprint(args.model)}
        # The report says whose figures these are, and of how many items, so that its step is checked as well.
        world_run.begin(args.out, stream, identity, settings, args.accept_versions)
        if set(steps) - {"report"}:
            recorded = functools.partial(world_run.run_recorded, folder=args.out, steps=steps)
            for _ in _parts(args, names, settings, recorded):
                pass
        if "report" not in steps:
            return None, None
        parts = [part for name in PARTS if (part := world_run.read_part(args.out, name)) is not None]
        if not parts:
            raise InputError(f"nothing is judged in {args.out}; run the generate and judge steps first")
        results = combine(parts, stream, settings, args.model)
        results.save(args.out / "results.json")
        with bench_cli.held(args.compare):
            runs = world_report.read_runs([args.out, *args.compare])
            page = world_report.write_html(args.out / "report.html", runs, stream)
        with atomic_file(args.out / "table.tex") as file:
            file.write(world_report.latex(runs).encode())
    return results, page


def _shared(settings: Settings) -> tuple[tuple[str, Any], ...]:
    """Sampler settings that hold for every task."""
    return tuple(sorted(settings.samplers.get("perceive", {}).items()))


@functools.cache  # loading may take long
def _built(model: str, device: str | None, options: tuple[tuple[str, Any], ...]) -> Any:
    from unialignment.evaluation import models

    return models.build(model, device, dict(options))


def _possible(args: argparse.Namespace, names: list[str], settings: Settings) -> list[str]:
    """The parts that the model can take part in.

    Raises:
        InputError: Others are asked for by name.
    """
    from unialignment.evaluation.guests import PREFIXES, Guest

    if not args.model.startswith(PREFIXES):
        return names
    guest = Guest(_built(args.model, args.device, _shared(settings)))
    found = [name for name in names if name in guest.parts]
    if not found or (args.tasks is not None and found != names):
        known = ", ".join(guest.parts)
        raise InputError(f"{args.model} can take part in {known} alone; give some of these with --tasks")
    return found


def _contest(
    model: str,
    device: str | None,
    preset_name: str,
    split: Split,
    seed: int,
    options: tuple[tuple[str, Any], ...] = (),
) -> tuple[Any, Any, Any]:
    """Pipeline, stream and judge; a function of plain values, for processes that are started for it."""
    import unialignment
    from unialignment.evaluation.guests import PREFIXES, Guest
    from unialignment.evaluation.judge import Judge

    pack, stream = _world(preset_name, split, seed)
    if model.startswith(PREFIXES):
        pipe: Any = Guest(_built(model, device, options), stream.preset.resolution)
    else:
        pipe = unialignment.load(model, device=device)
    return pipe, stream, Judge(pack, stream.preset)


def _accelerated() -> bool:
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _settings(steps: int | None, guidance: float | None, best_of: int | None = None) -> dict[str, dict[str, Any]]:
    given = {"num_inference_steps": steps, "guidance_scale": guidance}
    chosen = {name: value for name, value in given.items() if value is not None}
    ranked = {"best_of": best_of} if best_of is not None else {}  # where the prompt says what is to be seen
    extra = {"generate": ranked, "edit": ranked}
    tasks = ("generate", "edit", "perceive", "control", "compose")
    return {task: {**chosen, **extra.get(task, {})} for task in tasks if chosen or extra.get(task)}


def run_card(args: argparse.Namespace) -> int:
    """Render the card of a model from its evaluation.

    Raises:
        InputError: there is no evaluation.
    """
    import unialignment
    from unialignment.evaluation.card import RESULTS_FILE, sample_sheet, write_card
    from unialignment.evaluation.results import Results
    from unialignment.model.folders import resolve_model

    folder = resolve_model(args.model)
    results = Results.load(args.results or folder / RESULTS_FILE)
    sheet = None
    facts: dict[str, Any] = {"tasks": "generate, edit, perceive, control, compose, caption, answer, infill"}
    if not args.no_samples:
        _, stream = _world(results.preset, "held_out", args.seed)
        pipe = unialignment.load(args.model, device=args.device)
        sheet = sample_sheet(pipe, stream, args.per_task, args.seed)
    facts |= model_facts(folder)
    path = write_card(args.out or folder, results, sheet, facts)
    print(json.dumps({"card": str(path)}) if args.json else path)
    return 0


def model_facts(folder: Path) -> dict[str, str]:
    """Rows of the card's first table that the weights themselves tell: parameters and size of each part."""
    from safetensors import safe_open

    facts = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        with safe_open(file, "np") as tensors:
            count = sum(_size(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        facts[file.parent.name] = f"{count / 1e6:.2f} M parameters, {file.stat().st_size / 2**20:.1f} MiB"
    return facts


def _size(shape: Sequence[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
