"""SemGen-World's per-task part: a model on held-out scenes, every task judged exactly, beside ceilings and floors.

Puts stream, contestants, judge and statistics together; knows nothing of how any of them works, nor of files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from unialignment.data.sample import Sample
from unialignment.evaluation.contestants import (
    Contestant,
    CopySource,
    ModelContestant,
    RandomOther,
    Reconstruction,
    Truth,
)
from unialignment.evaluation.judge import Judge
from unialignment.evaluation.metrics import Estimate, estimate, recall_at_1
from unialignment.evaluation.results import Results, summarise

if TYPE_CHECKING:
    from unialignment.world.stream import WorldStream

TASKS = ("caption", "answer", "infill", "generate", "edit", "perceive", "control", "compose")
"""Tasks that are judged, cheapest first."""

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
    outputs = contestant.outputs(samples, seed)
    return [judge.score(item, output) for item, output in zip(samples, outputs, strict=True) if output is not None]


def retrieval(pipe: Any, samples: Sequence[Sample], seed: int = 0) -> Estimate:
    """Recall at 1 by the model's own embeddings, both directions pooled.

    Args:
        pipe: The pipeline (``embed_image`` and ``embed_text`` return ``[B, D]`` tensors).
        samples: ``generate`` items: prompt and picture are a pair.
        seed: Seed of the bootstrap.
    """
    images = _unit(pipe.embed_image([item.target_image for item in samples]))
    texts = _unit(pipe.embed_text([item.prompt for item in samples]))
    similarity = images @ texts.T
    return estimate(np.concatenate([recall_at_1(similarity), recall_at_1(similarity.T)]), seed)


def evaluate(
    pipe: Any,
    stream: WorldStream,
    judge: Judge,
    *,
    limit: int = 200,
    seed: int = 0,
    tasks: Sequence[str] = TASKS,
    model: str = "",
    batch_size: int = 16,
    settings: dict[str, dict[str, Any]] | None = None,
    references: bool = True,
    pool: int = RETRIEVAL_POOL,
    progress: Progress | None = None,
) -> Results:
    """Judge a model on every task.

    Args:
        pipe: A loaded pipeline.
        stream: Items, normally of split ``"held_out"``.
        judge: The judge of the same preset.
        limit: Items per task.
        seed: Seed of the samplers (item ``i`` uses ``seed + i``) and of the bootstrap.
        tasks: Which tasks.
        model: Name for the report.
        batch_size: Items per pipeline call.
        settings: Sampler settings by task.
        references: Whether to score ceilings and floors too.
        pool: Size of the retrieval pool; 0 leaves retrieval out.
        progress: Told when a task is done.
    """
    contestant = ModelContestant(pipe, batch_size, settings)
    ceilings: dict[str, Contestant] = {"truth": Truth(), "reconstruction": Reconstruction(pipe)} if references else {}
    floors: dict[str, Contestant] = {"copy": CopySource(), "random": RandomOther()} if references else {}
    metrics: dict[str, Estimate] = {}
    by_kind: dict[str, Estimate] = {}
    high: dict[str, dict[str, float]] = {name: {} for name in ceilings}
    low: dict[str, dict[str, float]] = {name: {} for name in floors}
    seconds: dict[str, float] = {}

    def done(name: str, start: float) -> None:
        seconds[name] = round(time.perf_counter() - start, 2)
        if progress is not None:
            progress(name, seconds[name])

    for task in tasks:
        start = time.perf_counter()
        samples = held_out_samples(stream, task, limit)
        scores = score_all(judge, contestant, samples, seed)
        metrics |= summarise(scores, seed)
        if task == "answer":
            by_kind = _by_kind(samples, scores, seed)
        done(task, start)
        for names, table in ((ceilings, high), (floors, low)):
            for name, reference in names.items():
                summary = summarise(score_all(judge, reference, samples, seed), seed)
                table[name] |= {key: item.value for key, item in summary.items()}
    if pool:
        start = time.perf_counter()
        metrics["retrieval.r1"] = retrieval(pipe, [stream.sample("generate", index) for index in range(pool)], seed)
        if references:
            high["truth"]["retrieval.r1"], low["random"]["retrieval.r1"] = 1.0, 1 / pool
        done("retrieval", start)
    return Results(
        model=model,
        preset=stream.preset.name,
        split=stream.split,
        seed=seed,
        limit=limit,
        metrics=metrics,
        by_kind=by_kind,
        ceilings=high,
        floors=low,
        settings=settings or {},
        seconds=seconds,
    )


def _by_kind(samples: Sequence[Sample], scores: Sequence[dict[str, float]], seed: int) -> dict[str, Estimate]:
    kinds = sorted({item.kind for item in samples})
    return {
        kind: estimate(
            [row["vqa.accuracy"] for item, row in zip(samples, scores, strict=True) if item.kind == kind], seed
        )
        for kind in kinds
    }


def _unit(vectors: Any) -> np.ndarray:
    array = np.asarray(vectors.detach().float().cpu().numpy(), dtype=np.float64)
    return array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12)
