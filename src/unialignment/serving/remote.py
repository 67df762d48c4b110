"""An engine whose work is done elsewhere: the interface of the local engine in front of replicas that may die.

A request that was accepted is answered: when its replica is lost it goes to another one, with the seed it began with,
so that the reader sees the same result and no step twice. Knows nothing of Ray or HTTP: a :class:`Backend` opens the
streams and says which errors mean that a replica was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from unialignment.errors import InputError
from unialignment.images import ImageInput
from unialignment.serving.handle import Handle
from unialignment.serving.requests import (
    DeadlineError,
    Done,
    EmbedRequest,
    EngineClosedError,
    EngineSettings,
    EngineStats,
    Event,
    Failed,
    Progress,
    QueueFullError,
    RequestCancelledError,
    TaskRequest,
)
from unialignment.tasks import TASKS, TaskRegistry

log = logging.getLogger(__name__)

Request = TaskRequest | EmbedRequest
ATTEMPTS = 5
"""Replicas that one request may lose before it fails."""
PAUSE = 0.25
"""Seconds before the second attempt; doubled each time, up to a few seconds."""


class ReplicaLostError(EngineClosedError):
    """Every replica that worked on a request died; the request is safe to send again."""


class Backend(Protocol):
    """How requests reach replicas."""

    def stream(self, request: Request) -> AsyncIterator[Event]:
        """The events of one request, computed by any replica. Closing it early cancels the request."""

    def is_loss(self, error: BaseException) -> bool:
        """Whether the error means that the replica is gone, so that another one may try."""

    def is_full(self, error: BaseException) -> bool:
        """Whether the error means that all replicas have too much to do."""


@dataclass(frozen=True)
class ModelFacts:
    """What the server has to know of the model without holding it; the same names as the pipeline's.

    Attributes:
        name: The model's name.
        default_size: Side of its pictures in pixels.
        sampling: Sampler defaults by task.
        text_limit: Longest text in tokens.
        tokenizer: Counts tokens.
        size_step: Sides of pictures must be multiples of this.
        largest_side: Longest side that the model can draw.
        tasks: The tasks' declarations, this process's own.
    """

    name: str
    default_size: int
    sampling: Mapping[str, Mapping[str, Any]]
    text_limit: int
    tokenizer: Any = None
    tasks: TaskRegistry = TASKS
    size_step: int = 8
    largest_side: int = 1024

    @classmethod
    def of(cls, pipe: Any) -> ModelFacts:
        """The facts of a loaded pipeline."""
        sampling = {task: dict(values) for task, values in pipe.sampling.items()}
        step = pipe.transformer.config.patch_size * pipe.autoencoder.spatial_factor
        largest = pipe.transformer.config.pos_embed_max_size * step
        tasks = pipe.tasks
        return cls(pipe.name, pipe.default_size, sampling, pipe.text_limit, pipe.tokenizer, tasks, step, largest)

    def __getstate__(self) -> dict[str, Any]:
        # Declarations are code: every process has them.
        return {key: value for key, value in self.__dict__.items() if key != "tasks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, tasks=TASKS)


class RemoteEngine:
    """Requests go to replicas; all methods may be called from any thread.

    Args:
        backend: Opens streams to replicas.
        facts: Of the model that the replicas hold.
        settings: The replicas' limits.
        replicas: Most replicas there can be: bounds what is accepted.
        attempts: Replicas that one request may lose before it fails.
        pause: Seconds before the second attempt.
    """

    def __init__(
        self,
        backend: Backend,
        facts: ModelFacts,
        settings: EngineSettings | None = None,
        *,
        replicas: int = 1,
        attempts: int = ATTEMPTS,
        pause: float = PAUSE,
    ) -> None:
        self.pipe = facts
        self.settings = settings or EngineSettings()
        self.retries = 0
        """Requests that were sent again because their replica was lost."""
        self._backend = backend
        self._limit = replicas * (self.settings.max_queue + self.settings.max_active)
        self._attempts, self._pause = attempts, pause
        self._ids = itertools.count(1)
        self._lock = threading.Condition()
        self._running: dict[int, Handle] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._counts = dict.fromkeys(("submitted", "completed", "failed", "cancelled", "expired", "refused"), 0)
        self._closing = False
        # A loop of its own: requests go on while the server's loop is busy, and callers may block on results.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="unialignment-remote", daemon=True)
        self._thread.start()

    # --------------------------------------------------------------------------------------- as the local engine's

    def submit(self, request: Request) -> Handle:
        """Accept a request: from now on it will be answered.

        Raises:
            InputError: A picture can't be read.
            QueueFullError: Too many are under way.
            EngineClosedError: The engine was closed.
        """
        images = tuple(_portable(image) for image in request.images)
        if isinstance(request, TaskRequest):
            options = dict(request.options)
            if options.get("seed") is None:
                # Chosen here, so that another replica would draw the same.
                options["seed"] = secrets.randbelow(2**31)
            sent: Request = replace(request, images=images, options=options)
        else:
            sent = replace(request, images=images)
        with self._lock:
            if self._closing:
                raise EngineClosedError("the server is shutting down")
            if len(self._running) >= self._limit:
                self._counts["refused"] += 1
                raise QueueFullError(f"{len(self._running)} requests are under way already; try again later")
            handle = Handle(next(self._ids), sent, lambda: None)
            handle._on_cancel = lambda: self._cancel(handle.id)
            self._running[handle.id] = handle
            self._counts["submitted"] += 1
        self._loop.call_soon_threadsafe(self._start, handle)
        return handle

    def stats(self) -> EngineStats:
        """A snapshot of counters; what only replicas know is zero."""
        with self._lock:
            active = len(self._running)
            return EngineStats(
                alive=self.alive, queued=0, active=active, samples=active, **self._counts,
                passes=0, rows=0, reserved_bytes=0, memory_bytes=0, step_seconds=0.0,
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._closing

    def close(self, drain: float = 0.0) -> None:
        """Stop: no new requests; unfinished ones fail with :class:`EngineClosedError` after ``drain`` seconds."""
        with self._lock:
            self._closing = True
            self._lock.wait_for(lambda: not self._running, max(0.0, drain))
            left = list(self._running.values())
        for handle in left:
            self._end(handle, Failed(EngineClosedError("the server is shutting down")))
            self._cancel(handle.id)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------- the loop's side

    def _start(self, handle: Handle) -> None:
        if handle.done:
            return
        self._tasks[handle.id] = self._loop.create_task(self._drive(handle))

    def _cancel(self, id: int) -> None:
        def cancel() -> None:
            task = self._tasks.get(id)
            if task is not None:
                task.cancel()

        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(cancel)

    def _end(self, handle: Handle, event: Done | Failed) -> None:
        with self._lock:
            if self._running.pop(handle.id, None) is None:
                return
            error = event.error if isinstance(event, Failed) else None
            if error is None:
                name = "completed"
            else:
                names: dict[type[BaseException], str] = {RequestCancelledError: "cancelled", DeadlineError: "expired"}
                name = names.get(type(error), "failed")
            self._counts[name] += 1
            self._lock.notify_all()
        handle.emit(event)

    async def _drive(self, handle: Handle) -> None:
        request = handle.request
        limit = request.timeout if request.timeout is not None else self.settings.timeout
        until = None if limit is None else handle.submitted + limit
        told: dict[int, int] = {}
        try:
            if handle.cancelled:
                raise asyncio.CancelledError
            async with asyncio.timeout(None if until is None else max(0.0, until - time.monotonic())):
                self._end(handle, await self._insist(handle, told))
        except TimeoutError:
            self._end(handle, Failed(DeadlineError(f"the request wasn't done after {limit:g} s")))
        except asyncio.CancelledError:
            self._end(handle, Failed(RequestCancelledError("the request was cancelled")))
        except BaseException as error:
            log.exception("a request failed unexpectedly")
            self._end(handle, Failed(error))
        finally:
            self._tasks.pop(handle.id, None)

    async def _insist(self, handle: Handle, told: dict[int, int]) -> Done | Failed:
        """Try until a replica lives long enough; its last event."""
        pause = self._pause
        for attempt in range(1, self._attempts + 1):
            try:
                last = await self._once(handle, told)
                if not isinstance(last.error if isinstance(last, Failed) else None, EngineClosedError):
                    return last
                reason: BaseException | str = "it is shutting down"
            except asyncio.CancelledError:
                raise
            except Exception as error:
                if self._backend.is_full(error):
                    return Failed(QueueFullError("all replicas have too much to do; try again later"))
                if not self._backend.is_loss(error):
                    return Failed(error)
                reason = error
            if attempt < self._attempts:
                with self._lock:
                    self.retries += 1
                log.warning("request %d lost its replica (%s); sending it to another one", handle.id, reason)
                await asyncio.sleep(pause)
                pause = min(2 * pause, 4.0)
        return Failed(ReplicaLostError(f"{self._attempts} replicas died while working on this; send it again later"))

    async def _once(self, handle: Handle, told: dict[int, int]) -> Done | Failed:
        """One attempt; tells only what an earlier one had not got to."""
        stream = self._backend.stream(handle.request)
        try:
            async for event in stream:
                if isinstance(event, (Done, Failed)):
                    return event
                if isinstance(event, Progress) and event.step > told.get(event.index, 0):
                    told[event.index] = event.step
                    handle.emit(event)
        finally:
            close = getattr(stream, "aclose", None)
            if close is not None:
                await close()
        return Failed(EngineClosedError("the replica ended without an answer"))


def _portable(image: ImageInput) -> ImageInput:
    """A picture that another machine can read: paths become bytes."""
    if not isinstance(image, (str, Path)):
        return image
    if "://" in str(image)[:16]:
        raise InputError("pictures are not fetched from addresses; send the picture itself")
    try:
        return Path(image).read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"could not read the picture: {getattr(error, 'strerror', None) or error}") from error
