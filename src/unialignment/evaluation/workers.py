"""SemGen-World in several processes: each part of the evaluation is independent of the others.

Knows how to hand parts out, nothing of what they are. Every process loads the model and the artwork for itself, and
computes with its share of the cores; the results do not depend on how many there are.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from unialignment.evaluation.world import Part, Settings, run_part

Build = Callable[[], tuple[Any, Any, Any]]
"""Makes pipeline, stream and judge; called once in every process, so it must be picklable."""

Run = Callable[..., Part | None]
"""Called with pipeline, stream, judge, name and settings; picklable too."""

_build: Build | None = None


def run_parts(
    build: Build, names: Sequence[str], settings: Settings, workers: int, run: Run = run_part
) -> Iterator[Part | None]:
    """Parts as they are done.

    Args:
        build: See :data:`Build`.
        names: Which parts.
        settings: How.
        workers: Number of processes; 1: this one.
        run: What is done with each.
    """
    if workers == 1:
        pipe, stream, judge = build()
        for name in names:
            yield run(pipe, stream, judge, name, settings)
        return
    threads = max(1, cores() // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(build, threads)) as pool:
        # The longest ones first, so that no process is left with one at the end.
        order = sorted(names, key=lambda name: _LENGTHS.get(name, 1.0), reverse=True)
        try:
            for future in as_completed([pool.submit(_run, run, name, settings) for name in order]):
                yield future.result()
        finally:  # after a failure nothing more is begun
            pool.shutdown(wait=False, cancel_futures=True)


_LENGTHS = {
    "turns": 3.0,
    "compose": 1.5,
    "perceive": 0.3,
    "caption": 0.1,
    "answer": 0.1,
    "infill": 0.1,
    "retrieval": 0.1,
}


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(build: Build, threads: int) -> None:
    # Built with the first part: what fails in here breaks the pool, and the reason would not reach the caller.
    global _build
    import torch

    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _build = functools.cache(build)


def _follow_parent() -> None:
    """End with the process that started this one: after its SIGKILL nobody else may write to a run's folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(run: Run, name: str, settings: Settings) -> Part | None:
    assert _build is not None
    return run(*_build(), name, settings)
