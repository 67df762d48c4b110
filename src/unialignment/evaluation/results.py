"""Results of an evaluation as plain data, and their JSON form.

Knows nothing of how they were obtained. In the JSON every metric is a top-level number under its dotted key
(``"caption.objects": 0.63``); intervals, counts, ceilings and floors stand beside it under the same keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unialignment.errors import InputError
from unialignment.evaluation.metrics import Estimate, estimate
from unialignment.storage import write_text

BY_KIND = {"vqa.by_kind": "vqa.accuracy", "edit.by_kind": "edit.success"}
"""Keys under which a metric is broken down by the kind of its items: answers by question, edits by what is asked."""


@dataclass(frozen=True)
class Metric:
    """What a key means.

    Attributes:
        task: Task that it belongs to.
        title: A few words for tables.
        meaning: One sentence: when an item counts as right, or what is averaged.
        unit: ``"share"`` (0-1, printed as per cent), ``"dB"``, ``"mark"`` (0-10) or ``"number"``.
    """

    task: str
    title: str
    meaning: str
    unit: str = "share"


METRICS: dict[str, Metric] = {
    "caption.objects": Metric("caption", "all objects named", "every class in the picture is named"),
    "caption.exact": Metric("caption", "... and no others", "the classes named are exactly those in the picture"),
    "caption.background": Metric("caption", "background named", "the background's colour, and no other one, is named"),
    "caption.cider": Metric("caption", "CIDEr-D", "likeness to the true caption's n-grams, 0-10", "number"),
    "vqa.accuracy": Metric("answer", "answers right", "the answer is among the accepted ones"),
    "infill.accuracy": Metric("infill", "gaps right", "share of gaps filled with the very word that was taken out"),
    "generate.objects": Metric(
        "generate", "prompted objects drawn", "share of all prompted objects, one by one, that the parser finds"
    ),
    "generate.scenes": Metric("generate", "... all of a prompt's", "the parser finds every object of the prompt"),
    "generate.relations": Metric(
        "generate", "relations right", "every relation that the prompt states holds (prompts that state one)"
    ),
    "generate.places": Metric(
        "generate", "places right", "every object whose place the prompt states stands there, by thirds of the canvas"
    ),
    "generate.background": Metric("generate", "background right", "the parser finds the prompted background"),
    "edit.success": Metric(
        "edit", "edits right", "the parser finds exactly the right result: classes, styles, sizes, places, background"
    ),
    "edit.psnr_outside": Metric("edit", "PSNR outside", "likeness of what the edit had to leave alone", "dB"),
    "segment.iou": Metric("perceive", "segmentation IoU", "intersection over union of the mask"),
    "depth.delta1": Metric("perceive", "depth delta-1", "object pixels within a factor 1.25 of the true value"),
    "depth.abs_rel": Metric(
        "perceive", "depth AbsRel", "mean of |given - true| / true over object pixels; 0 is best", "number"
    ),
    "edges.f": Metric("perceive", "edges F1", "F1 of edge pixels, matched within one pixel"),
    "control.objects": Metric("control", "all objects drawn", "the parser finds every object of the prompt and map"),
    "compose.subjects": Metric("compose", "all subjects present", "the parser finds the subject of every reference"),
    "retrieval.r1": Metric(
        "embed", "retrieval R@1", "the pair is nearest among 100, image to text and text to image pooled"
    ),
    "retrieval.r5": Metric("embed", "retrieval R@5", "the pair is among the nearest five, both directions pooled"),
}
_GROUPS = {
    "t2i_long": ("generate", "long prompts"),
    "t2i_complex": ("generate", "prompts with relations"),
    "edit_multi": ("edit", "three clauses at once"),
    "edit_complex": ("edit", "landmarks, several objects"),
}
for _group, (_task, _title) in _GROUPS.items():
    METRICS[f"semgen.{_group}"] = Metric(_task, f"{_title}: O", "sqrt(IC · PQ) of each item", "mark")
    METRICS[f"semgen.{_group}.ic"] = Metric(
        _task,
        "... IC",
        "10 x the share of the prompt's clauses that hold"
        if _task == "generate"
        else "10 x the lesser of the share of clauses carried out and of what was to stay as it was",
        "mark",
    )
    METRICS[f"semgen.{_group}.pq"] = Metric(
        _task, "... PQ", "10 x the parser's confidence in the objects that it sees", "mark"
    )
    if _task == "edit":
        METRICS[f"semgen.{_group}.psnr"] = Metric(_task, "... PSNR outside", "likeness of what no clause touches", "dB")
METRICS |= {
    "semgen.overall": Metric("all", "mean of the four groups' O", "unweighted mean of the groups' means", "mark"),
    "semgen.edit_multi_turns": Metric(
        "edit", "three clauses in three turns: O", "each clause told on its own, the next one for the result", "mark"
    ),
    "drift.psnr_1": Metric("edit", "PSNR outside after turn 1", "likeness of what none of three turns touches", "dB"),
    "drift.psnr_2": Metric("edit", "... after turn 2", "the same, the result edited again", "dB"),
    "drift.psnr_3": Metric("edit", "... after turn 3", "the same, and again", "dB"),
}
"""Every scalar metric, in the order of the tables."""


def number(value: float, metric: Metric) -> str:
    """A figure as it is printed, in the metric's unit."""
    if metric.unit == "share":
        return f"{100 * value:.1f} %"
    return f"{value:.1f} dB" if metric.unit == "dB" else f"{value:.2f}"


@dataclass(frozen=True)
class Results:
    """One evaluation of one model.

    Attributes:
        model: Name or path of the model.
        preset: World preset.
        split: World split.
        seed: Seed of scenes and samplers.
        limit: Items per task.
        metrics: Estimates by dotted key.
        by_kind: By key of :data:`BY_KIND`, then kind: the metric on items of that kind.
        ceilings: By reference name (``"truth"``, ``"reconstruction"``), then key: what a perfect model would score.
        floors: By reference name (``"copy"``, ``"random"``), then key: what looking at nothing would score.
        settings: Sampler settings and anything else needed to repeat it.
        seconds: Time spent per task, in seconds.
    """

    model: str
    preset: str
    split: str
    seed: int
    limit: int
    metrics: dict[str, Estimate]
    by_kind: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    ceilings: dict[str, dict[str, float]] = field(default_factory=dict)
    floors: dict[str, dict[str, float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON-serialisable form: every metric a number under its key, everything else beside."""
        data: dict[str, Any] = {key: item.value for key, item in self.metrics.items()}
        intervals: dict[str, Any] = {key: [item.low, item.high] for key, item in self.metrics.items()}
        for key, kinds in self.by_kind.items():
            data[key] = {kind: item.value for kind, item in kinds.items()}
            intervals[key] = {kind: [item.low, item.high] for kind, item in kinds.items()}
        data |= {
            "intervals": intervals,
            "counts": {key: item.count for key, item in self.metrics.items()},
            "by_kind_detail": {
                key: {kind: asdict(item) for kind, item in kinds.items()} for key, kinds in self.by_kind.items()
            },
        }
        rest = ("model", "preset", "split", "seed", "limit", "ceilings", "floors", "settings", "seconds")
        return data | {name: getattr(self, name) for name in rest}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Results:
        """Inverse of :meth:`to_json`.

        Raises:
            InputError: a field is missing, or has the form of another version.
        """
        try:
            metrics = {}
            for key, count in data["counts"].items():
                low, high = data["intervals"][key]
                metrics[key] = Estimate(data[key], low, high, count)
            rest = ("model", "preset", "split", "seed", "limit", "ceilings", "floors", "settings", "seconds")
            by_kind = {
                key: {kind: Estimate(**item) for kind, item in kinds.items()}
                for key, kinds in data["by_kind_detail"].items()
            }
            return cls(metrics=metrics, by_kind=by_kind, **{name: data[name] for name in rest})
        except KeyError as error:
            raise InputError(f"not an evaluation's JSON: {error} is missing; write one with `unialign eval`") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"an evaluation of another version ({error}); repeat it with `unialign eval`") from error

    def save(self, path: Path) -> None:
        """Write the JSON form.

        Raises:
            StorageError: it can't be written.
        """
        write_text(path, json.dumps(self.to_json(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: the file is missing or is something else.
        """
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise InputError(f"no evaluation at {path}; write one with `unialign eval --out {path}`") from None
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not JSON: {error}") from error


def summarise(scores: Sequence[Mapping[str, float]], seed: int = 0) -> dict[str, Estimate]:
    """Estimates by key from one mapping of scores per item; items to which a key does not apply lack it or hold nan."""
    values: dict[str, list[float]] = {}
    for item in scores:
        for key, value in item.items():
            if not math.isnan(value):
                values.setdefault(key, []).append(value)
    return {key: estimate(column, seed) for key, column in values.items()}
