"""SemGen-World on a model: all tasks and the four groups on held-out scenes, judged exactly, with ceilings and floors.
floors.

Puts stream, contestants, judge and statistics together; knows nothing of how any of them works, nor of files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from unialignment.data.sample import Sample
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
from unialignment.evaluation.metrics import MAX_PSNR, Estimate, estimate, mean_of_groups, psnr, recall_at
from unialignment.evaluation.results import BY_KIND, Results, summarise
from unialignment.evaluation.semgen_world import GROUPS

if TYPE_CHECKING:
    from unialignment.world.stream import WorldStream

TASKS = ("caption", "answer", "infill", "generate", "edit", "perceive", "control", "compose")
"""Tasks that are judged, cheapest first."""

PARTS = (*TASKS, *GROUPS, "turns")
"""All that is judged item by item: the tasks, the four groups, and ``edit_multi`` told in three turns."""

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
    told = [semgen_world.turns(item) for item in samples]
    same = [semgen_world.untouched(judge, item) for item in samples]
    pictures: list[Any] = [item.sources[0] for item in samples]
    rows: list[dict[str, float]] = [{} for _ in samples]
    for turn in range(len(told[0])):
        asked = [replace(items[turn], sources=(now,)) for items, now in zip(told, pictures)]
        pictures = list(contestant.outputs(asked, seed + 1000 * turn))
        for row, now, item, where in zip(rows, pictures, samples, same):
            assert item.target_image is not None
            row[f"drift.psnr_{turn + 1}"] = psnr(now, item.sources[0], where)
    for row, now, item in zip(rows, pictures, samples):
        row["semgen.edit_multi_turns"] = semgen_world.marks(judge, item, now).o
    return rows


def evaluate(
    pipe: Any,
    stream: WorldStream,
    judge: Judge,
    *,
    limit: int = 200,
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
        limit: Items per task.
        seed: Seed of the samplers (item ``i`` uses ``seed + i``) and of the bootstrap.
        tasks: Which of :data:`PARTS`.
        model: Name for the report.
        batch_size: Items per pipeline call.
        settings: Sampler settings by task.
        references: Whether to score ceilings and floors too.
        pool: Size of the retrieval pool; 0 leaves retrieval out.
        progress: Told when a task is done.
    """
    contestant = ModelContestant(pipe, batch_size, settings)
    ceilings: dict[str, Contestant] = {"truth": Truth(), "reconstruction": Reconstruction(pipe)} if references else {}
    floors: dict[str, Contestant] = (
        {"copy": CopySource(), "random": RandomOther(), "commonest": Commonest()} if references else {}
    )
    everyone: dict[str, Contestant] = {"": contestant} | ceilings | floors
    metrics: dict[str, Estimate] = {}
    by_kind: dict[str, Estimate] = {}
    tables: dict[str, dict[str, float]] = {name: {} for name in everyone}
    marks: dict[str, dict[str, list[float]]] = {name: {} for name in everyone}
    seconds: dict[str, float] = {}

    def done(name: str, start: float) -> None:
        seconds[name] = round(time.perf_counter() - start, 2)
        if progress is not None:
            progress(name, seconds[name])

    for part in (name for name in PARTS if name in tasks):
        start = time.perf_counter()
        samples = _samples(stream, part, limit)
        for name, who in everyone.items():
            if part == "turns":
                if name not in ("", "copy"):
                    continue
                scores = turn_scores(judge, who, samples, seed)
            else:
                judged = _scored(judge, samples, who.outputs(samples, seed))
                scores = [row for _, row in judged]
                if part == "answer" and judged:
                    kinds = _by_kind(judged, seed)
                    tables[name] |= {f"{BY_KIND}.{kind}": item.value for kind, item in kinds.items()}
                    by_kind = by_kind or kinds  # the model is the first
            summary = summarise(scores, seed)
            tables[name] |= {key: item.value for key, item in summary.items()}
            if part in GROUPS and scores:
                marks[name][part] = [row[f"semgen.{part}"] for row in scores]
            if name == "":
                metrics |= summary
                done(part, start)
        if references and part == "turns":
            tables["truth"] |= dict.fromkeys(("drift.psnr_1", "drift.psnr_2", "drift.psnr_3"), MAX_PSNR)
            tables["truth"]["semgen.edit_multi_turns"] = tables["truth"].get("semgen.edit_multi", 10.0)
    for name, groups in marks.items():
        if set(groups) == set(GROUPS):
            overall = mean_of_groups([groups[group] for group in GROUPS], seed)
            tables[name]["semgen.overall"] = overall.value
            if name == "":
                metrics["semgen.overall"] = overall
    if pool:
        start = time.perf_counter()
        metrics |= retrieval(pipe, [stream.sample("generate", index) for index in range(pool)], seed)
        if references:
            tables["truth"] |= {"retrieval.r1": 1.0, "retrieval.r5": 1.0}
            tables["random"] |= {"retrieval.r1": 1 / pool, "retrieval.r5": min(1.0, 5 / pool)}
        done("retrieval", start)
    used: dict[str, Any] = dict(settings or {})
    if contestant.shortened:
        used["shortened_prompts"] = contestant.shortened
    return Results(
        model=model,
        preset=stream.preset.name,
        split=stream.split,
        seed=seed,
        limit=limit,
        metrics=metrics,
        by_kind=by_kind,
        ceilings={name: tables[name] for name in ceilings},
        floors={name: tables[name] for name in floors},
        settings=used,
        seconds=seconds,
    )


def _samples(stream: WorldStream, part: str, limit: int) -> list[Sample]:
    if part in TASKS:
        return held_out_samples(stream, part, limit)
    group = "edit_multi" if part == "turns" else part
    return [semgen_world.group_sample(stream, group, index) for index in range(limit)]


def _by_kind(judged: Sequence[tuple[Sample, dict[str, float]]], seed: int) -> dict[str, Estimate]:
    kinds = sorted({item.kind for item, _ in judged})
    return {kind: estimate([row["vqa.accuracy"] for item, row in judged if item.kind == kind], seed) for kind in kinds}


def _unit(vectors: Any) -> np.ndarray:
    array = np.asarray(vectors.detach().float().cpu().numpy(), dtype=np.float64)
    return array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12)
