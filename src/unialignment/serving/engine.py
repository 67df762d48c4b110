"""The engine: all requests of a server go through one queue and one thread, which batches them step by step.

>>> engine = Engine(unialignment.load("nano"))                                             # doctest: +SKIP
>>> handle = engine.submit(TaskRequest("generate", "a dog", options={"seed": 1}))          # doctest: +SKIP
>>> handle.result().images[0]                                                              # doctest: +SKIP

Knows nothing of HTTP.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from unialignment.errors import InputError
from unialignment.outputs import TextResult
from unialignment.serving.handle import Handle
from unialignment.serving.jobs import EmbedJob, Job
from unialignment.serving.memory import free_bytes
from unialignment.serving.plans import EmbedPlan, ImagePlan, Plan, make_plan
from unialignment.serving.requests import (
    DeadlineError,
    Done,
    EmbedRequest,
    EngineClosedError,
    EngineSettings,
    EngineStats,
    Event,
    Failed,
    Preview,
    Progress,
    QueueFullError,
    RequestCancelledError,
    ServingError,
    TaskRequest,
    TextSoFar,
)
from unialignment.serving.scheduler import Scheduler

if TYPE_CHECKING:
    from unialignment.pipeline import UniAlignmentPipeline

__all__ = [
    "DeadlineError",
    "Done",
    "EmbedRequest",
    "Engine",
    "EngineClosedError",
    "EngineSettings",
    "EngineStats",
    "Event",
    "Failed",
    "Handle",
    "Preview",
    "Progress",
    "QueueFullError",
    "RequestCancelledError",
    "ServingError",
    "TaskRequest",
    "TextSoFar",
]
log = logging.getLogger(__name__)


_PASSES = 4
"""Full passes of a round: among more requests more are of a kind, share a pass, and begin and end together."""
_DECODERS = 2
"""Threads that may decode pictures at once: each may hold a large picture several times over."""


@dataclass(order=True)
class _Waiting:
    """A request in the queue; the smallest is next."""

    priority: int
    id: int
    handle: Handle = field(compare=False)
    plan: Plan | EmbedPlan = field(compare=False)
    deadline: float | None = field(compare=False)
    target: str = field(compare=False)


class Engine:
    """Runs requests on one pipeline; all methods may be called from any thread.

    Args:
        pipe: The model. Nothing else may run it while the engine lives.
        settings: Limits.
    """

    def __init__(self, pipe: UniAlignmentPipeline, settings: EngineSettings | None = None) -> None:
        self.pipe = pipe
        self.settings = settings or EngineSettings()
        given = self.settings.memory_bytes
        self.memory_bytes = free_bytes(pipe.device) // 4 if given is None else given
        self.max_rows = self.settings.max_rows or (16 if pipe.device.type == "cpu" else 64)
        self._scheduler = Scheduler(pipe, self.max_rows, self._on_done, self._on_failed)
        self._ids = itertools.count(1)
        self._lock = threading.Condition()
        self._queue: list[_Waiting] = []
        self._entries: dict[int, _Waiting] = {}  # active ones, by the identity of their job
        self._reserved = 0
        self._closing = self._aborting = False
        self._decoding = threading.BoundedSemaphore(_DECODERS)
        self._counts = dict.fromkeys(("submitted", "completed", "failed", "cancelled", "expired", "refused"), 0)
        self._seconds = 1.0  # mean time between two completions, lately
        self._completed_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="unialignment-engine", daemon=True)
        self._thread.start()

    # --------------------------------------------------------------------------------------------------- for everybody

    def submit(self, request: TaskRequest | EmbedRequest) -> Handle:
        """Check a request and put it in the queue.

        Pictures are decoded here, in the caller's thread.

        Raises:
            InputError: Something of the request is unusable, or beyond the engine's limits.
            QueueFullError: Too many are waiting.
            EngineClosedError: The engine was closed.
        """
        with self._lock:
            self._check_room()  # before any work is done for it
        with self._decoding:
            plan = make_plan(self.pipe, request, self.settings)
        if plan.bytes > self.memory_bytes:
            raise InputError(
                f"the request needs about {plan.bytes / 2**20:,.0f} MiB, and requests may take "
                f"{self.memory_bytes / 2**20:,.0f} MiB here; ask for fewer or smaller pictures"
            )
        with self._lock:
            self._check_room()
            # The pictures given are decoded by now; what waits must not hold them.
            handle = Handle(next(self._ids), replace(request, images=()), lambda: self._cancel(handle))
            limit = self.settings.timeout if request.timeout is None else request.timeout
            if request.timeout is not None and self.settings.timeout is not None:
                limit = min(request.timeout, self.settings.timeout)
            deadline = None if limit is None else handle.submitted + limit
            target = "embed" if isinstance(plan, EmbedPlan) else plan.task.target
            self._queue.append(_Waiting(-request.priority, handle.id, handle, plan, deadline, target))
            self._counts["submitted"] += 1
            self._lock.notify_all()
        return handle

    def stats(self) -> EngineStats:
        """A snapshot of counters."""
        with self._lock:
            jobs = list(self._scheduler.jobs)
            return EngineStats(
                alive=self.alive,
                queued=len(self._queue),
                active=len(jobs),
                samples=sum(len(job.samples) for job in jobs if isinstance(job, Job)),
                **self._counts,
                passes=self._scheduler.batcher.passes,
                rows=self._scheduler.batcher.rows,
                reserved_bytes=self._reserved,
                memory_bytes=self.memory_bytes,
                step_seconds=self._scheduler.step_seconds,
            )

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._closing

    def close(self, drain: float = 0.0) -> None:
        """Stop: no new requests; those not done after ``drain`` seconds fail with :class:`EngineClosedError`."""
        until = time.monotonic() + drain
        with self._lock:
            self._closing = True
            self._lock.notify_all()
            self._lock.wait_for(
                lambda: (not self._queue and not self._entries) or not self._thread.is_alive(),
                max(0.0, until - time.monotonic()),
            )
            self._aborting = True
            self._lock.notify_all()
        self._thread.join(timeout=60)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------- the queue

    def _check_room(self) -> None:
        if self._closing or not self._thread.is_alive():
            raise EngineClosedError("the engine is closed; start it again")
        if len(self._queue) >= self.settings.max_queue:
            self._counts["refused"] += 1
            wait = min(60.0, max(1.0, self._seconds * len(self._queue) / 2))
            raise QueueFullError(
                f"{len(self._queue)} requests are waiting already, as many as may; try again in {wait:.0f} s", wait
            )

    def _cancel(self, handle: Handle) -> None:
        with self._lock:
            found = next((one for one in self._queue if one.handle is handle), None)
            if found is not None:
                self._queue.remove(found)
                self._end(found.handle, RequestCancelledError("the request was cancelled"))
            self._lock.notify_all()

    def _end(self, handle: Handle, error: BaseException) -> None:
        kinds: dict[type[BaseException], str] = {RequestCancelledError: "cancelled", DeadlineError: "expired"}
        self._counts[kinds.get(type(error), "failed")] += 1
        handle.emit(Failed(error))

    def _sweep(self) -> None:
        """Drop what was cancelled or is too late. Under the lock."""
        now = time.monotonic()
        for waiting in [one for one in self._queue if one.deadline is not None and one.deadline < now]:
            self._queue.remove(waiting)
            self._end(waiting.handle, _late(waiting))
        for job in list(self._scheduler.jobs):
            entry = self._entries[id(job)]
            error: ServingError | None = None
            if entry.handle.cancelled:
                error = RequestCancelledError("the request was cancelled")
            elif entry.deadline is not None and entry.deadline < now:
                error = _late(entry)
            if error is not None:
                self._scheduler.remove(job)
                self._release(job)
                self._end(entry.handle, error)

    def _admit(self) -> None:
        """Let in what waits, by priority and arrival, as far as memory and rows allow. Under the lock.

        Nothing overtakes what doesn't fit, or large requests would wait for ever; only requests for another kind of
        target do, since they don't share its passes.
        """
        blocked: set[str] = set()
        for waiting in sorted(self._queue):
            if len(self._scheduler.jobs) >= self.settings.max_active:
                return
            if waiting.target in blocked:
                continue
            if self._reserved and self._reserved + waiting.plan.bytes > self.memory_bytes:
                return
            if isinstance(waiting.plan, Plan):
                rows = self._scheduler.rows(waiting.target)
                if rows and rows + waiting.plan.rows > _PASSES * self.max_rows:
                    blocked.add(waiting.target)
                    continue
                first = waiting.plan.rewriting if isinstance(waiting.plan, ImagePlan) else None
                job: Job | EmbedJob = Job(self.pipe, waiting.handle, first or waiting.plan)
            else:
                job = EmbedJob(self.pipe, waiting.handle, waiting.plan)
            self._queue.remove(waiting)
            self._entries[id(job)] = waiting
            self._reserved += waiting.plan.bytes
            self._scheduler.jobs.append(job)

    # ------------------------------------------------------------------------------------------------------ the thread

    def _release(self, job: Job | EmbedJob) -> _Waiting:
        entry = self._entries.pop(id(job))
        self._reserved -= entry.plan.bytes
        self._lock.notify_all()
        return entry

    def _on_done(self, job: Job | EmbedJob, result: Any) -> None:
        if isinstance(job, Job) and job.first:
            self._draw(job, result)
            return
        now = time.monotonic()
        with self._lock:
            self._release(job)
            self._counts["completed"] += 1
            self._seconds += 0.1 * (now - self._completed_at - self._seconds)
            self._completed_at = now
        job.handle.emit(Done(result, job.started - job.handle.submitted, now - job.handle.submitted))

    def _draw(self, job: Job, result: TextResult) -> None:
        """Go on from a rewritten prompt to its pictures."""
        with self._lock:
            entry = self._entries.pop(id(job))
            assert isinstance(entry.plan, ImagePlan)
            prompts = [text or entry.plan.branches["full"] or "" for text in result.texts]
            drawing = Job(self.pipe, entry.handle, entry.plan, prompts)
            drawing.started = job.started
            self._entries[id(drawing)] = entry
            self._scheduler.jobs.append(drawing)

    def _on_failed(self, job: Job | EmbedJob, error: BaseException) -> None:
        log.error("request %d failed", job.handle.id, exc_info=error)
        with self._lock:
            self._release(job)
            self._end(job.handle, error)

    def _run(self) -> None:
        reason: BaseException = EngineClosedError("the engine was closed before the request was done")
        try:
            while True:
                with self._lock:
                    self._lock.wait_for(lambda: self._queue or self._scheduler.jobs or self._closing)
                    if self._aborting or (self._closing and not self._queue and not self._scheduler.jobs):
                        return
                    self._sweep()
                    self._admit()
                if self._scheduler.jobs:
                    self._scheduler.round()
        except BaseException as error:
            log.critical("the engine's thread died", exc_info=error)
            reason = EngineClosedError(f"the engine failed ({type(error).__name__}); see the server's log")
            reason.__cause__ = error
        finally:
            with self._lock:
                self._closing = True
                for waiting in [*self._queue, *self._entries.values()]:
                    self._end(waiting.handle, reason)
                self._queue.clear()
                self._entries.clear()
                self._scheduler.jobs.clear()
                self._reserved = 0
                self._lock.notify_all()


def _late(waiting: _Waiting) -> DeadlineError:
    assert waiting.deadline is not None
    seconds = waiting.deadline - waiting.handle.submitted
    return DeadlineError(f"the request wasn't done within its {seconds:.3g} s; ask for less, or allow more time")
