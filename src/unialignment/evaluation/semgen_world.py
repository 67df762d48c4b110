"""SemGen-World: SemGen-Bench's four groups on the scene world, judged exactly, clause by clause.

Knows the items of the groups and how one is scored from what the parser saw; nothing of statistics or reports. The
marks follow SemGen-Bench's (IC, PQ and O, 0-10), with the parser in the place of a judge that has to be believed:

* **IC**, text-to-image: ten times the share of the prompt's clauses that hold (``clauses.stated_facts``). Editing:
  ten times the lesser of two shares, the instruction's clauses that are carried out, and what it doesn't speak of
  and is as it was (``clauses.edit_clauses``, ``clauses.preserved``). A source given back carries out no clause, and
  so has IC 0.
* **PQ**: ten times the mean confidence, 0-1, with which the parser explains the objects that it sees, those that it
  rejects included: about 1 for the world's own artwork, low for blurred, torn or half-drawn objects; 0 where it sees
  none.
* **O** = sqrt(IC · PQ) of each item.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from unialignment.data.sample import Sample
from unialignment.errors import InputError
from unialignment.evaluation import clauses, metrics
from unialignment.evaluation.judge import Judge
from unialignment.world import captions, edits
from unialignment.world import language as lang
from unialignment.world.layout import sample_scene
from unialignment.world.scene import Scene
from unialignment.world.stream import SPLITS, WorldStream

GROUPS = ("t2i_long", "t2i_complex", "edit_multi", "edit_complex")
"""As in SemGen-Bench: long prompts; prompts with relations; instructions of three clauses; instructions that can
only be followed by understanding the scene (a landmark, several objects at once, or one of several of a class)."""

_FIRST_STREAM = 100
"""Keeps the random numbers of these items apart from those of the stream's tasks."""

_COMPLEX_KINDS = ("move", "add", "remove", "resize", "restyle", "replace")


def group_sample(stream: WorldStream, group: str, index: int) -> Sample:
    """The item of a group at an index, always the same for one stream.

    Its task is ``"generate"`` or ``"edit"``, its kind the group's name; ``meta`` is as in the stream's own samples.

    Raises:
        InputError: Unknown group or negative index.
    """
    if group not in GROUPS:
        raise InputError(f"unknown group {group!r}; expected one of {', '.join(GROUPS)}")
    if index < 0:
        raise InputError(f"index={index}; expected 0 or more")
    identity = [stream.seed, SPLITS.index(stream.split), _FIRST_STREAM + GROUPS.index(group), index]
    rng = np.random.default_rng(identity)
    if group.startswith("t2i"):
        scene, made = _long(stream, rng) if group == "t2i_long" else _complex(stream, rng)
        meta: dict[str, Any] = {"scene": scene, "description": made}
        return Sample("generate", made.text, target_image=stream.renderer.render(scene), kind=group, meta=meta)
    source, edit = _edit(stream, rng, group == "edit_complex")
    meta = {"scene": edit.result, "source": source, "edit": edit}
    sources = (stream.renderer.render(source),)
    return Sample("edit", edit.instruction, sources, stream.renderer.render(edit.result), kind=group, meta=meta)


def _long(stream: WorldStream, rng: np.random.Generator) -> tuple[Scene, captions.Description]:
    scene = sample_scene(rng, stream.preset, stream.split)
    return scene, captions.describe_long(scene, rng)


def _complex(stream: WorldStream, rng: np.random.Generator) -> tuple[Scene, captions.Description]:
    """A scene as full as there are, in words that state relations."""
    while True:
        scene = sample_scene(rng, stream.preset, stream.split, count=stream.preset.max_objects)
        for _ in range(8):
            made = captions.describe_short(scene, rng)
            if made.relations or made.between:
                return scene, made


def _edit(stream: WorldStream, rng: np.random.Generator, hard: bool) -> tuple[Scene, edits.Edit]:
    most = stream.preset.max_objects
    while True:
        kind = lang.pick(rng, _COMPLEX_KINDS) if hard else None
        count = max(2, most - 1) if kind == "add" else 2 + int(rng.random() * (most - 1))
        # As in the stream: part of the edits bring the held-out combination in, the others find it there.
        new = stream.split == "held_out" and rng.random() < 0.3
        repeat = True if hard and kind in ("remove", "replace") else None
        scene = sample_scene(rng, stream.preset, "train" if new else stream.split, count=count, repeat=repeat)
        number = (1 + int(rng.random() < 0.3)) if hard else edits.MAX_CLAUSES
        edit = edits.try_edit(scene, rng, stream.preset, stream.split, number, kind)
        if edit is not None and (not hard or needs_understanding(scene, edit)):
            return scene, edit


def needs_understanding(source: Scene, edit: edits.Edit) -> bool:
    """Whether a clause takes another object as landmark, acts on several at once, or on one of several of a class."""
    names = [item.name for item in source.objects]
    for clause in edit.clauses:
        own = {source.objects[i].name for i in clause.sources} | {target.name for target in clause.targets}
        landmark = set(lang.mentioned(clause.text, sorted(set(names)))) - own
        if landmark or len(clause.sources) > 1 or any(names.count(source.objects[i].name) > 1 for i in clause.sources):
            return True
    return False


@dataclass(frozen=True)
class Marks:
    """Marks of one picture, 0-10.

    Attributes:
        ic: Instruction consistency.
        pq: Perceptual quality.
    """

    ic: float
    pq: float

    @property
    def o(self) -> float:
        """The overall mark, ``sqrt(ic * pq)``."""
        return math.sqrt(self.ic * self.pq)


def marks(judge: Judge, sample: Sample, image: np.ndarray) -> Marks:
    """Marks of a picture made for an item of a group.

    Args:
        judge: Holds the parser.
        sample: The item.
        image: ``[R, R, 3]`` uint8.
    """
    seen = judge.parsed(image)
    if sample.task == "edit":
        source, edit = sample.meta["source"], sample.meta["edit"]
        success = _share(clauses.edit_clauses(seen.scene, source, edit))
        consistency = min(success, _share(clauses.preserved(seen.scene, source, edit)))
    else:
        facts = clauses.stated_facts(seen.scene, sample.meta["scene"], sample.meta["description"])
        consistency = _share([right for _, right in facts])
    confidence = float(np.mean(seen.explanation_scores)) if seen.explanation_scores else 0.0
    return Marks(10 * consistency, 10 * confidence)


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


def group_scores(judge: Judge, sample: Sample, image: np.ndarray) -> dict[str, float]:
    """The marks under the keys of the results, for editing also the likeness of what had to stay (decibels)."""
    made = marks(judge, sample, image)
    key = f"semgen.{sample.kind}"
    scores = {key: made.o, f"{key}.ic": made.ic, f"{key}.pq": made.pq}
    if sample.target_image is not None and sample.task == "edit":
        scores[f"{key}.psnr"] = metrics.psnr(image, sample.target_image, untouched(judge, sample))
    return scores


def untouched(judge: Judge, sample: Sample) -> np.ndarray:
    """``[R, R]`` booleans: pixels that are the same in the source and in the true result of an edit."""
    before, after = (judge.renderer.render(sample.meta[name]) for name in ("source", "scene"))
    same: np.ndarray = (before == after).all(axis=-1)
    return same


def turns(sample: Sample) -> list[Sample]:
    """An instruction clause by clause: samples whose prompts are the single clauses, in order.

    Clauses act on different objects and leave one another's landmarks alone, so that each can be told on its own.
    All hold the facts of the whole edit; the source of all but the first is what the turn before made.
    """
    return [replace(sample, prompt=clause.text) for clause in sample.meta["edit"].clauses]
