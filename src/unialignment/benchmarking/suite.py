"""What ``unialign bench`` measures: every task ours against the published way, generation against diffusers, scaling.

Plain data comes out; how it is shown is ``report``'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from unialignment.benchmarking.counting import Sizes, count_flops
from unialignment.benchmarking.measure import Machine, Timing, exponent, interleave, ratio
from unialignment.benchmarking.models import build
from unialignment.benchmarking.workloads import TASKS, Case, Way, ours, peer, published, standard
from unialignment.errors import InputError
from unialignment.memory import MemoryTracker, size_of, tensors_of

Say = Callable[[str], None]
PARTS = ("tasks", "peer", "scaling", "batches")


@dataclass
class Results:
    """What was measured; all of it JSON.

    Attributes:
        machine: See :class:`~unialignment.benchmarking.measure.Machine`.
        settings: How.
        rows: One per case and way: seconds, operations, memory.
        comparisons: Ratios of seconds, with their spread.
        scaling: Costs along one size, with fitted exponents.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    scaling: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class Suite:
    """One run of the benchmark.

    Args:
        size: Model.
        pixels: Side of pictures in the task table.
        repeats: Measurements of each thing.
        dtype: ``"float32"`` or ``"bfloat16"``.
        say: Told what is being measured.
    """

    def __init__(self, size: str, pixels: int, repeats: int, dtype: str = "float32", say: Say = lambda _: None) -> None:
        self.size, self.pixels, self.repeats, self.dtype, self.say = size, pixels, repeats, dtype, say
        self.machine = Machine.measured()
        self.results = Results(
            self.machine.to_json(), {"size": size, "pixels": pixels, "repeats": repeats, "dtype": dtype}
        )
        self.has_peer = size != "nano"

    def run(self, tasks: Sequence[str] = TASKS, parts: Sequence[str] | None = None) -> Results:
        """Measure the chosen parts; by default all that the size has.

        Raises:
            InputError: an unknown task or part, or one that this size doesn't have.
        """
        if parts is None:
            parts = PARTS if self.has_peer else tuple(part for part in PARTS if part != "peer")
        for what, given, known in (("task", tasks, TASKS), ("part", parts, PARTS)):
            if unknown := [name for name in given if name not in known]:
                raise InputError(f"unknown {what} {', '.join(map(repr, unknown))}: use some of {', '.join(known)}")
        if "peer" in parts and not self.has_peer:
            raise InputError(
                f"part 'peer' needs a size in Stable Diffusion 3's proportions: diffusers has no model of {self.size}'s"
                " shape (shared modulation, squared ReLU). Use --size 25M, 100M, 300M or 2B, or leave the part out"
            )
        if "tasks" in parts:
            self.tasks(tasks)
        if "peer" in parts:
            self.peer()
        if "batches" in parts:
            self.batches()
        if "scaling" in parts:
            self.scaling()
        return self.results

    def case(self, task: str, sources: int = 0, **changes: Any) -> Case:
        """A task's standard case at this run's size."""
        return standard(task, self.size, self.pixels, sources, dtype=self.dtype, **changes)

    # ------------------------------------------------------------------------------------------------------- parts

    def tasks(self, tasks: Sequence[str]) -> None:
        """Every task ours and, on the same weights, the published way; edits beside generation."""
        cases = [self.case("generate")] if "generate" in tasks or "edit" in tasks else []
        cases += [self.case("edit", count) for count in (1, 2, 3, 4)] if "edit" in tasks else []
        cases += [self.case(task) for task in ("caption", "answer") if task in tasks]
        ways = {("ours", case): ours(case) for case in cases}
        ways |= {("published", case): published(case) for case in cases}
        steps = self._steps(ways, cases)
        wholes = self._wholes(ways, [case for case in cases if case.task != "edit" or case.sources in (1, 4)])
        for (name, case), way in ways.items():
            self._row(name, case, way, steps[name, case], wholes.get((name, case)))
        base = next((case for case in cases if case.task == "generate"), None)
        for case in cases:
            if case.task == "edit" and base is not None:
                for name in ("ours", "published"):
                    if (name, case) in steps:
                        self._compare(
                            f"{case.name} / {base.name}, {name}, per step", steps[name, case], steps[name, base]
                        )
            if ("published", case) in wholes:
                self._compare(f"{case.name}: published / ours, whole", wholes["published", case], wholes["ours", case])

    def peer(self) -> None:
        """Generation beside diffusers' pipeline, without and with guidance, whole runs."""
        for guidance in (1.0, 3.0):
            case = self.case("generate", guidance=guidance)
            self.say(f"diffusers, guidance {guidance:g}")
            seconds = interleave({"ours": ours(case).whole, "diffusers": peer(case).whole}, self.repeats)
            name = f"{case.name}, guidance {guidance:g}, {case.steps} steps: diffusers / ours, whole"
            self._compare(name, seconds["diffusers"], seconds["ours"])

    def batches(self) -> None:
        """Texts and pictures, eight at once against one at a time; and texts in the published way, one pass a token."""
        for task in ("generate", "caption", "answer"):
            one, many = self.case(task), self.case(task, batch=8)
            self.say(f"{many.name} against singles")
            seconds = interleave({"one": ours(one).whole, "many": ours(many).whole}, self.repeats)
            eight = [8 * value for value in seconds["one"]]
            self._compare(f"{many.name}: singles / batch, whole", eight, seconds["many"])
            if task == "generate":
                continue
            # Published: one picture at a time, about one token a pass; ours: eight pictures, the task's default steps.
            slow = one.with_(steps=one.length)
            self.say(f"{many.name} against one pass a token")
            seconds = interleave({"ours": ours(many).whole, "published": published(slow).whole}, self.repeats, 0)
            eight = [8 * value for value in seconds["published"]]
            name = f"{many.name}: published with a pass a token / ours, whole"
            self._compare(name, eight, seconds["ours"])

    def scaling(self) -> None:
        """Cost of a step against tokens, sources, batch and parameters, beside the roofline."""
        pixels = (64, 128, 256, 512) if self.size != "nano" else (64, 128, 256)
        self._sweep("tokens", [self.case("generate").with_(pixels=p) for p in pixels], lambda c: c.tokens)
        self._sweep("sources", [self.case("edit", count) for count in (1, 2, 3, 4)], lambda c: c.sources)
        self._sweep("batch", [self.case("generate", batch=count) for count in (1, 2, 4, 8)], lambda c: c.batch)
        if self.size in ("100M", "300M"):
            sizes = ("25M", "100M", "300M")
            cases = [self.case("generate").with_(size=size) for size in sizes]
            self._sweep("parameters", cases, lambda c: sum(p.numel() for p in self._model(c).parameters()))

    # --------------------------------------------------------------------------------------------------- internals

    def _model(self, case: Case, mode: str = "prefix") -> Any:
        return build(case.size, mode, getattr(torch, case.dtype))

    def _steps(self, ways: dict[tuple[str, Case], Way], cases: Sequence[Case]) -> dict[tuple[str, Case], list[float]]:
        self.say(f"steps of {len(cases)} cases")
        runs = {}
        for number, way in enumerate(ways.values()):
            state = way.prepare()
            runs[f"{number}"] = partial(way.step, state, 0)
        seconds = interleave(runs, self.repeats)
        return dict(zip(ways, seconds.values(), strict=True))

    def _wholes(self, ways: dict[tuple[str, Case], Way], cases: Sequence[Case]) -> dict[tuple[str, Case], list[float]]:
        wholes: dict[tuple[str, Case], list[float]] = {}
        for case in cases:
            self.say(f"{case.name}, whole")
            runs = {name: way.whole for (name, own), way in ways.items() if own is case}
            seconds = interleave(runs, max(2, self.repeats // 2), 0)
            wholes |= {(name, case): values for name, values in seconds.items()}
        return wholes

    def _row(self, name: str, case: Case, way: Way, step: list[float], whole: list[float] | None) -> None:
        model = self._model(case, "prefix" if name == "ours" else "joint")
        state = way.prepare()
        flops = count_flops(lambda: way.step(state, 0))
        with MemoryTracker(tensors_of(model)) as tracker:
            way.step(way.prepare(), 0)
        timing = Timing.of(step)
        self.results.rows.append(
            {
                "case": case.name,
                **asdict(case),
                "way": name,
                "step_seconds": asdict(timing),
                "whole_seconds": None if whole is None else asdict(Timing.of(whole)),
                "step_flops": flops,
                "prepare_flops": count_flops(way.prepare),
                "gemm_share": flops / timing.median / self.machine.gemm[case.dtype],
                "weights_bytes": size_of(tensors_of(model)),
                "working_bytes": tracker.peak,
            }
        )

    def _compare(self, name: str, above: list[float], below: list[float]) -> None:
        self.results.comparisons.append({"name": name, "ratio": asdict(ratio(above, below))})
        self.say(f"  {name}: {ratio(above, below)}")

    def _sweep(self, along: str, cases: list[Case], value: Callable[[Case], float]) -> None:
        self.say(f"scaling with {along}")
        points: list[dict[str, Any]] = []
        for name, build_way in (("ours", ours), ("published", published)):
            if name == "published" and along not in ("tokens", "sources"):
                continue
            ways = {str(number): build_way(case) for number, case in enumerate(cases)}
            states = {key: way.prepare() for key, way in ways.items()}
            runs = {key: partial(way.step, states[key], 0) for key, way in ways.items()}
            seconds = interleave(runs, max(3, self.repeats // 2))
            for number, case in enumerate(cases):
                key = str(number)
                model = self._model(case, "prefix" if name == "ours" else "joint")
                flops = count_flops(runs[key])
                with MemoryTracker(tensors_of(model)) as tracker:
                    ways[key].step(ways[key].prepare(), 0)
                timing = Timing.of(seconds[key])
                # Of two streams only one has tokens in a step of ours.
                read = size_of(tensors_of(model)) * (0.5 if name == "ours" else 1.0)
                points.append(
                    {
                        "way": name,
                        "size": float(value(case)),
                        "seconds": asdict(timing),
                        "flops": flops,
                        "working_bytes": tracker.peak,
                        "bound_seconds": self.machine.bound(flops, read, case.dtype),
                    }
                )
        fits = {}
        for name in dict.fromkeys(point["way"] for point in points):
            own = [point for point in points if point["way"] == name]
            sizes = [point["size"] for point in own]
            fits[name] = {
                "seconds": exponent(sizes, [point["seconds"]["median"] for point in own]),
                "flops": exponent(sizes, [float(point["flops"]) for point in own]),
                "working_bytes": exponent(sizes, [float(point["working_bytes"]) for point in own]),
            }
        self.results.scaling.append({"along": along, "points": points, "exponents": fits})


def expected_step_flops(case: Case) -> int:
    """By formula: one of our steps over all branches, what the time contributes apart (it is computed ahead)."""
    sizes = Sizes.of(build(case.size).config)
    if case.text_target:
        open_positions = (case.length + 1) // 2
        conditions = case.prompt + case.sources * case.tokens
        return case.batch * sizes.text_step(case.length, conditions, open_positions)
    conditions = case.prompt + case.sources * case.tokens
    passes = case.batch * (2 if case.guidance != 1.0 else 1)
    step = sizes.image_step(case.tokens, conditions)
    # The head's own modulation is one row for the whole batch.
    head = 4 * sizes.width**2
    return passes * (step - head) + head
