"""A submitted request as its submitter sees it: events to iterate over, from threads or coroutines, and cancellation.

Knows nothing of models or of how requests are scheduled.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

from torch import Tensor

from unialignment.outputs import ImageResult, TextResult
from unialignment.serving.requests import DeadlineError, Done, EmbedRequest, Event, Failed, Progress, TaskRequest

MAX_PENDING = 32
"""Events kept for a slow reader; beyond, the oldest progress reports and previews are dropped, never the last event."""


class Handle:
    """One submitted request.

    Iterate over it, with ``for`` or ``async for``, to receive its events; the last one is
    :class:`~unialignment.serving.requests.Done` or :class:`~unialignment.serving.requests.Failed`. Each event is given
    out once, so iterate in one place. :meth:`result` and ``await handle`` give the end alone.

    Attributes:
        id: Unique in this process.
        request: What was submitted.
        submitted: ``time.monotonic()`` of submission.
    """

    def __init__(self, id: int, request: TaskRequest | EmbedRequest, on_cancel: Callable[[], None]) -> None:
        self.id = id
        self.request = request
        self.submitted = time.monotonic()
        self._on_cancel = on_cancel
        self._changed = threading.Condition()
        self._pending: deque[Event] = deque()
        self._last: Done | Failed | None = None
        self._wanted = threading.Event()
        self._listeners: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    # ----------------------------------------------------------------------------------------------- the reader's side

    @property
    def done(self) -> bool:
        """Whether the last event has happened."""
        return self._last is not None

    @property
    def cancelled(self) -> bool:
        """Whether it was asked to be cancelled."""
        return self._wanted.is_set()

    def cancel(self) -> None:
        """Give up; at once if it waits, else before its next step. Without effect when it is done. From any thread."""
        self._wanted.set()
        self._on_cancel()

    def __iter__(self) -> Iterator[Event]:
        while True:
            with self._changed:
                while not self._pending:
                    if self._last is not None:
                        return
                    self._changed.wait()
                event = self._pending.popleft()
            yield event

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, wake = asyncio.get_running_loop(), asyncio.Event()
        listener = (loop, wake)
        with self._changed:
            self._listeners.append(listener)
        try:
            while True:
                with self._changed:
                    event = self._pending.popleft() if self._pending else None
                    finished = self._last is not None
                    wake.clear()
                if event is not None:
                    yield event
                elif finished:
                    return
                else:
                    await wake.wait()
        finally:
            with self._changed:
                self._listeners.remove(listener)

    def result(self, timeout: float | None = None) -> ImageResult | TextResult | Tensor:
        """Wait for the end.

        Args:
            timeout: Seconds to wait.

        Raises:
            DeadlineError: It isn't done by then; it goes on all the same.
            Exception: What it failed with.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._last is not None, timeout):
                raise DeadlineError(f"not done after {timeout:g} s; wait longer, or cancel it")
        return self._outcome()

    def __await__(self) -> Generator[Any, Any, ImageResult | TextResult | Tensor]:
        return self._wait().__await__()

    async def _wait(self) -> ImageResult | TextResult | Tensor:
        async for _ in self:
            pass
        return self._outcome()

    def _outcome(self) -> ImageResult | TextResult | Tensor:
        assert self._last is not None
        if isinstance(self._last, Failed):
            raise self._last.error
        return self._last.result

    # ----------------------------------------------------------------------------------------------- the engine's side

    def emit(self, event: Event) -> None:
        """Hand an event to the reader; ignored after the last one. The engine calls this."""
        with self._changed:
            if self._last is not None:
                return
            if isinstance(event, (Done, Failed)):
                self._last = event
            elif len(self._pending) >= MAX_PENDING:
                # Plain progress goes first, then whatever is oldest.
                plain = next((old for old in self._pending if type(old) is Progress), self._pending[0])
                self._pending.remove(plain)
            self._pending.append(event)
            self._changed.notify_all()
            for loop, wake in self._listeners:
                with contextlib.suppress(RuntimeError):  # a loop that was closed has no reader any more
                    loop.call_soon_threadsafe(wake.set)
