"""SemGen-World on a model: all tasks and the four groups on held-out scenes, judged exactly, with ceilings and floors.

Puts stream, contestants, judge and statistics together; knows nothing of how any of them works, nor of files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from unialignment.data.sample import Sample
from unialignment.errors import InputError
from unialignment.evaluation import semgen_world
from unialignment.evaluation.cider import cider
from unialignment.evaluation.contestants import (
    Commonest,
    Contestant,
    CopySource,
    ModelContestant,
    RandomOther,
    Reconstruction,
    Truth,
)
from unialignment.evaluation.judge import Judge, Output
from unialignment.evaluation.metrics import Estimate, estimate, mean_of_groups, psnr, recall_at
from unialignment.evaluation.results import BY_KIND, METRICS, Results, summarise
from unialignment.evaluation.semgen_world import GROUPS

if TYPE_CHECKING:
    from unialignment.world.stream import WorldStream

TASKS = ("caption", "answer", "infill", "generate", "edit", "perceive", "control", "compose")
"""Tasks that are judged, cheapest first."""

PARTS = (*TASKS, *GROUPS, "turns", "retrieval")
"""All that is evaluated: the tasks, the four groups, ``edit_multi`` told in three turns, and retrieval."""

CEILINGS, FLOORS = ("truth", "reconstruction"), ("copy", "random", "commonest")
"""Who else is judged; see ``contestants``."""

RETRIEVAL_POOL = 100
"""Pictures, and as many captions, among which the pair has to be found."""

Progress = Callable[[str, float], None]
"""Called with the name of what is done and the seconds that it took."""


def held_out_samples(stream: WorldStream, task: str, count: int) -> list[Sample]:
    """The first ``count`` items of a task, sorted by kind (stably), so that batches are alike."""
    return sorted(
        (stream.sample(task, index) for index in range(count)), key=lambda item: (item.kind, len(item.sources))
    )


def score_all(judge: Judge, contestant: Contestant, samples: Sequence[Sample], seed: int) -> list[dict[str, float]]:
    """Scores of one contestant, one mapping per item to which it applies."""
    return [row for _, row in _scored(judge, samples, contestant.outputs(samples, seed))]


def _scored(
    judge: Judge, samples: Sequence[Sample], outputs: Sequence[Output | None]
) -> list[tuple[Sample, dict[str, float]]]:
    done = [(item, output) for item, output in zip(samples, outputs, strict=True) if output is not None]
    if samples and samples[0].kind in GROUPS:
        return [(item, semgen_world.group_scores(judge, item, np.asarray(output))) for item, output in done]
    rows = [judge.score(item, output) for item, output in done]
    if samples and samples[0].task == "caption":
        texts = [str(output) for _, output in done]
        for row, value in zip(rows, cider(texts, [[item.target_text or ""] for item, _ in done]), strict=True):
            row["caption.cider"] = value
    return [(item, row) for (item, _), row in zip(done, rows, strict=True)]


def retrieval(pipe: Any, samples: Sequence[Sample], seed: int = 0) -> dict[str, Estimate]:
    """Recall at 1 and 5 by the model's own embeddings, both directions pooled.

    Args:
        pipe: The pipeline (``embed_image`` and ``embed_text`` return ``[B, D]`` tensors).
        samples: ``generate`` items: prompt and picture are a pair.
        seed: Seed of the bootstrap.
    """
    images = _unit(pipe.embed_image([item.target_image for item in samples]))
    texts = _unit(pipe.embed_text([item.prompt for item in samples]))
    similarity = images @ texts.T
    return {
        f"retrieval.r{k}": estimate(np.concatenate([recall_at(similarity, k), recall_at(similarity.T, k)]), seed)
        for k in (1, 5)
    }


def turn_scores(judge: Judge, contestant: Contestant, samples: Sequence[Sample], seed: int) -> list[dict[str, float]]:
    """``edit_multi`` told clause by clause, each turn on what the turn before made.

    The last picture is marked as the answer to the whole instruction. After every turn the pixels that no clause
    touches are compared with the source: how they drift from turn to turn.

    Args:
        judge: The judge.
        contestant: Who edits.
        samples: Items of ``edit_multi``.
        seed: Turn ``k`` of item ``i`` is sampled with seed ``seed + 1000 k + i``.
    """
    same = [semgen_world.untouched(judge, item) for item in samples]
    rows: list[dict[str, float]] = [{} for _ in samples]
    for turn, pictures in enumerate(turn_pictures(contestant, samples, seed), 1):
        for row, now, item, where in zip(rows, pictures, samples, same):
            row[f"drift.psnr_{turn}"] = psnr(now, item.sources[0], where)
    for row, now, item in zip(rows, pictures, samples):
        row["semgen.edit_multi_turns"] = semgen_world.marks(judge, item, now).o
    return rows


def turn_pictures(contestant: Contestant, samples: Sequence[Sample], seed: int) -> list[list[Any]]:
    """What ``contestant`` makes of the samples, turn by turn; see :func:`turn_scores`."""
    told = [semgen_world.turns(item) for item in samples]
    pictures: list[list[Any]] = [[item.sources[0] for item in samples]]
    for turn in range(len(told[0])):
        asked = [replace(items[turn], sources=(now,)) for items, now in zip(told, pictures[-1])]
        pictures.append(list(contestant.outputs(asked, seed + 1000 * turn)))
    return pictures[1:]


@dataclass(frozen=True)
class Settings:
    """How to evaluate, as plain data.

    Attributes:
        limit: Items per task and group.
        seed: Seed of the samplers (item ``i`` uses ``seed + i``) and of the bootstrap.
        batch_size: Items per pipeline call.
        samplers: Sampler settings by task.
        references: Whether to score ceilings and floors too.
        pool: Size of the retrieval pool.
    """

    limit: int = 100
    seed: int = 0
    batch_size: int = 16
    samplers: dict[str, dict[str, Any]] = field(default_factory=dict)
    references: bool = True
    pool: int = RETRIEVAL_POOL


@dataclass(frozen=True)
class Part:
    """What came of one part of an evaluation; plain data, so that it may have been computed in another process.

    Attributes:
        name: One of :data:`PARTS`.
        metrics: The model's estimates by key.
        by_kind: By key of ``results.BY_KIND``, then kind: the metric on items of that kind.
        tables: Ceiling or floor, then key, to its mean.
        marks: The model (``""``), ceiling or floor, to its overall mark of each item, for the four groups.
        seconds: Time spent on the model's own outputs and their judging.
        shortened: Prompts that were cut for the model.
        scores: The model's scores of each item, without what does not apply.
    """

    name: str
    metrics: dict[str, Estimate]
    by_kind: dict[str, dict[str, Estimate]]
    tables: dict[str, dict[str, float]]
    marks: dict[str, list[float]]
    seconds: float
    shortened: int = 0
    scores: tuple[dict[str, float], ...] = ()


def part_samples(stream: WorldStream, name: str, limit: int) -> list[Sample]:
    """The items of a part; of retrieval none."""
    if name in TASKS:
        return held_out_samples(stream, name, limit)
    group = "edit_multi" if name == "turns" else name
    return [semgen_world.group_sample(stream, group, index) for index in range(limit)] if group in GROUPS else []


def draw_part(stream: WorldStream, name: str, settings: Settings, model: Contestant) -> None:
    """Let a model make its outputs for a part, to be judged another time."""
    if samples := part_samples(stream, name, settings.limit):
        if name == "turns":
            turn_pictures(model, samples, settings.seed)
        else:
            model.outputs(samples, settings.seed)


def run_part(
    pipe: Any,
    stream: WorldStream,
    judge: Judge,
    name: str,
    settings: Settings,
    model: ModelContestant | None = None,
) -> Part:
    """Evaluate one part; it depends on nothing but its arguments.

    Args:
        pipe: A loaded pipeline.
        stream: Items, normally of split ``"held_out"``.
        judge: The judge of the same preset.
        name: One of :data:`PARTS`.
        settings: How.
        model: Who is judged, unless it is the pipeline as it is.

    Raises:
        InputError: Unknown part.
    """
    if name not in PARTS:
        raise InputError(f"unknown task {name!r}; expected one of {', '.join(PARTS)}")
    start = time.perf_counter()
    if name == "retrieval":
        count = settings.pool
        found = retrieval(pipe, [stream.sample("generate", index) for index in range(count)], settings.seed)
        ideal, blind = dict.fromkeys(found, 1.0), {"retrieval.r1": 1 / count, "retrieval.r5": min(1.0, 5 / count)}
        references = {"truth": ideal, "random": blind} if settings.references else {}
        return Part(name, found, {}, references, {}, time.perf_counter() - start)
    samples = part_samples(stream, name, settings.limit)
    model = model or ModelContestant(pipe, settings.batch_size, settings.samplers)

    def judged(who: Contestant) -> list[tuple[Sample, dict[str, float]]]:
        if name == "turns":
            return list(zip(samples, turn_scores(judge, who, samples, settings.seed), strict=True))
        return _scored(judge, samples, who.outputs(samples, settings.seed))

    own = judged(model)
    seconds = time.perf_counter() - start
    tables, marks = {}, {"": own}
    for reference, who in _references(pipe, name).items() if settings.references else ():
        marks[reference] = judged(who)
        summary = summarise([row for _, row in marks[reference]], settings.seed)
        tables[reference] = {key: item.value for key, item in summary.items()}
        for broken_down, kinds in _by_kind(name, marks[reference], settings.seed).items():
            tables[reference] |= {f"{broken_down}.{kind}": item.value for kind, item in kinds.items()}
    key = f"semgen.{name}"
    return Part(
        name,
        summarise([row for _, row in own], settings.seed),
        _by_kind(name, own, settings.seed),
        tables,
        {who: [row[key] for _, row in rows] for who, rows in marks.items() if rows} if name in GROUPS else {},
        seconds,
        model.shortened,
        tuple({key: float(value) for key, value in row.items() if not np.isnan(value)} for _, row in own),
    )


def _references(pipe: Any, name: str) -> dict[str, Contestant]:
    if name == "turns":  # what another item's result, or the autoencoder, does in turns says nothing new
        return {"truth": Truth(), "copy": CopySource()}
    ceilings: dict[str, Contestant] = {"truth": Truth()}
    if hasattr(pipe, "autoencoder"):  # other people's models have one of their own, or none
        ceilings["reconstruction"] = Reconstruction(pipe)
    return {**ceilings, "copy": CopySource(), "random": RandomOther(), "commonest": Commonest()}


def combine(parts: Sequence[Part], stream: WorldStream, settings: Settings, model: str = "") -> Results:
    """Results of an evaluation from its parts, in any order; the four groups' mean is added when all four are there.

    Args:
        parts: The parts.
        stream: Where the items came from.
        settings: How they were evaluated.
        model: Name for the report.
    """
    parts = sorted(parts, key=lambda part: PARTS.index(part.name))
    metrics: dict[str, Estimate] = {}
    by_kind: dict[str, dict[str, Estimate]] = {}
    tables: dict[str, dict[str, float]] = {name: {} for name in (*CEILINGS, *FLOORS) if settings.references}
    marks: dict[str, list[list[float]]] = {}
    for part in parts:
        metrics |= part.metrics
        by_kind |= part.by_kind
        for name, table in part.tables.items():
            tables[name] |= table
        for name, values in part.marks.items():
            marks.setdefault(name, []).append(values)
    for name, groups in marks.items():
        if len(groups) == len(GROUPS):
            overall = mean_of_groups(groups, settings.seed)
            if name:
                tables[name]["semgen.overall"] = overall.value
            else:
                metrics["semgen.overall"] = overall
    used: dict[str, Any] = dict(settings.samplers)
    if shortened := sum(part.shortened for part in parts):
        used["shortened_prompts"] = shortened
    return Results(
        model=model,
        preset=stream.preset.name,
        split=stream.split,
        seed=settings.seed,
        limit=settings.limit,
        metrics=metrics,
        by_kind=by_kind,
        ceilings={name: tables[name] for name in CEILINGS if name in tables},
        floors={name: tables[name] for name in FLOORS if name in tables},
        settings=used,
        seconds={part.name: round(part.seconds, 2) for part in parts},
    )


def evaluate(
    pipe: Any,
    stream: WorldStream,
    judge: Judge,
    *,
    limit: int = 100,
    seed: int = 0,
    tasks: Sequence[str] = PARTS,
    model: str = "",
    batch_size: int = 16,
    settings: dict[str, dict[str, Any]] | None = None,
    references: bool = True,
    pool: int = RETRIEVAL_POOL,
    progress: Progress | None = None,
) -> Results:
    """Judge a model on every task and in every group.

    Args:
        pipe: A loaded pipeline.
        stream: Items, normally of split ``"held_out"``.
        judge: The judge of the same preset.
        limit: Items per task and group.
        seed: Seed of the samplers (item ``i`` uses ``seed + i``) and of the bootstrap.
        tasks: Which of :data:`PARTS`.
        model: Name for the report.
        batch_size: Items per pipeline call.
        settings: Sampler settings by task.
        references: Whether to score ceilings and floors too.
        pool: Size of the retrieval pool; 0 leaves retrieval out.
        progress: Told when a task is done.
    """
    chosen = Settings(limit, seed, batch_size, settings or {}, references, pool)
    parts = []
    for name in (name for name in PARTS if name in tasks and (pool or name != "retrieval")):
        parts.append(run_part(pipe, stream, judge, name, chosen))
        if progress is not None:
            progress(name, parts[-1].seconds)
    return combine(parts, stream, chosen, model)


def _by_kind(name: str, judged: Sequence[tuple[Sample, dict[str, float]]], seed: int) -> dict[str, dict[str, Estimate]]:
    found = {}
    for key, metric in BY_KIND.items():
        kinds = sorted({item.kind for item, row in judged if metric in row})
        if name == METRICS[metric].task and kinds:
            rows = {kind: [row[metric] for item, row in judged if item.kind == kind] for kind in kinds}
            found[key] = {kind: estimate(values, seed) for kind, values in rows.items()}
    return found


def _unit(vectors: Any) -> np.ndarray:
    array = np.asarray(vectors.detach().float().cpu().numpy(), dtype=np.float64)
    return array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12)
