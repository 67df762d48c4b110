"""The engine: every request of a server goes through one queue and one thread that runs the model.

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
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from unialignment.errors import InputError
from unialignment.serving.handle import Handle
from unialignment.serving.requests import (
    REFUSED_OPTIONS,
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


class Engine:
    """Runs requests on one pipeline; all methods may be called from any thread.

    Args:
        pipe: The model. Nothing else may run it while the engine lives.
        settings: Limits.
    """

    def __init__(self, pipe: UniAlignmentPipeline, settings: EngineSettings | None = None) -> None:
        self.pipe = pipe
        self.settings = settings or EngineSettings()
        self._ids = itertools.count(1)
        self._lock = threading.Condition()
        self._queue: list[Handle] = []
        self._closing = False
        self._active: Handle | None = None
        self._counts = dict.fromkeys(("submitted", "completed", "failed", "cancelled", "expired", "refused"), 0)
        self._thread = threading.Thread(target=self._run, name="unialignment-engine", daemon=True)
        self._thread.start()

    def submit(self, request: TaskRequest | EmbedRequest) -> Handle:
        """Check a request and put it in the queue.

        Pictures are decoded here, in the caller's thread.

        Raises:
            InputError: Something of the request is unusable, or beyond the engine's limits.
            QueueFullError: Too many are waiting.
            EngineClosedError: The engine was closed.
        """
        if isinstance(request, TaskRequest):
            self._check(request.options)
            self.pipe.tasks.get(request.task)
        with self._lock:
            if self._closing:
                raise EngineClosedError("the engine is closed")
            if len(self._queue) >= self.settings.max_queue:
                self._counts["refused"] += 1
                raise QueueFullError(f"{len(self._queue)} requests are waiting already; try again later")
            handle = Handle(next(self._ids), request, self._wake)
            self._queue.append(handle)
            self._counts["submitted"] += 1
            self._lock.notify_all()
        return handle

    def stats(self) -> EngineStats:
        """A snapshot of counters."""
        with self._lock:
            active = int(self._active is not None)
            return EngineStats(
                self._thread.is_alive(), len(self._queue), active, active, **self._counts,
                passes=0, rows=0, reserved_bytes=0, memory_bytes=0, step_seconds=0.0,
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._closing

    def close(self, drain: float = 0.0) -> None:
        """Stop: no new requests; unfinished ones fail with :class:`EngineClosedError` after ``drain`` seconds."""
        until = time.monotonic() + drain
        with self._lock:
            self._closing = True
            self._lock.wait_for(lambda: not self._queue and self._active is None, max(0.0, until - time.monotonic()))
            for handle in self._queue:
                handle.emit(Failed(EngineClosedError("the engine was closed")))
            self._queue.clear()
            self._lock.notify_all()
        self._thread.join(timeout=60)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify_all()

    @staticmethod
    def _check(options: Mapping[str, Any]) -> None:
        for name in REFUSED_OPTIONS:
            if name in options:
                raise InputError(f"{name} is the engine's to decide; leave it out")

    def _run(self) -> None:
        while True:
            with self._lock:
                self._active = None
                self._lock.notify_all()
                self._lock.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                handle = self._active = self._queue.pop(0)
            started = time.monotonic()
            try:
                result = self._compute(handle)
            except BaseException as error:
                name = {RequestCancelledError: "cancelled", DeadlineError: "expired"}.get(type(error), "failed")
                self._counts[name] += 1
                handle.emit(Failed(error))
            else:
                self._counts["completed"] += 1
                handle.emit(Done(result, started - handle.submitted, time.monotonic() - handle.submitted))

    def _compute(self, handle: Handle) -> Any:
        request = handle.request
        if isinstance(request, EmbedRequest):
            import torch

            parts = [self.pipe.embed_text(list(request.texts))] if request.texts else []
            parts += [self.pipe.embed_image(list(request.images))] if request.images else []
            return torch.cat(parts)
        limit = request.timeout if request.timeout is not None else self.settings.timeout

        def hook(pipe: Any, step: int, time_: float, tensors: dict[str, Any]) -> None:
            if handle.cancelled:
                raise RequestCancelledError("the request was cancelled")
            if limit is not None and time.monotonic() - handle.submitted > limit:
                raise DeadlineError(f"the request wasn't done after {limit:g} s")
            handle.emit(Progress(0, step + 1, max(step + 1, int(request.options.get("num_inference_steps", step + 1)))))

        options = {**request.options, "callback_on_step_end": hook, "progress": False}
        images = list(request.images) or None
        if images is not None and self.pipe.tasks.get(request.task).max_sources == 1:
            images = images[0]  # type: ignore[assignment]
        return self.pipe.run(request.task, request.prompt, images, kind=request.kind, **options)
