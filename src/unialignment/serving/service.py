"""Between routes and engine: submitting, waiting as long as the client does, and server-sent events.

Knows nothing of particular tasks.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from unialignment.serving.engine import EmbedRequest, Engine, Event, Failed, Handle, RequestCancelledError, TaskRequest
from unialignment.serving.errors import APIError, as_api_error, body_of
from unialignment.serving.settings import ServerSettings

if TYPE_CHECKING:
    from unialignment.pipeline import UniAlignmentPipeline


class Service:
    """What routes share.

    Args:
        engine: Runs the requests.
        settings: Limits.
    """

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self.engine, self.settings = engine, settings

    @property
    def pipe(self) -> UniAlignmentPipeline:
        """The model."""
        return self.engine.pipe

    @property
    def models(self) -> tuple[str, ...]:
        """Names under which the model is found, its own first."""
        return (self.pipe.name, *self.settings.aliases)

    @property
    def size_step(self) -> int:
        """Sides of pictures are multiples of this."""
        pipe: Any = self.pipe
        if hasattr(pipe, "size_step"):  # a remote model's facts
            return int(pipe.size_step)
        return int(pipe.transformer.config.patch_size * pipe.autoencoder.spatial_factor)

    @property
    def largest_side(self) -> int:
        """Longest side that the model can draw."""
        pipe: Any = self.pipe
        if hasattr(pipe, "largest_side"):
            return int(pipe.largest_side)
        return int(pipe.transformer.config.pos_embed_max_size * self.size_step)

    def check_model(self, name: str | None) -> str:
        """The name that the client used, or the model's own.

        Raises:
            APIError: There is no such model.
        """
        if name is None or name in self.models:
            return name or self.pipe.name
        known = ", ".join(self.models)
        raise APIError(404, f"there is no model {name[:60]!r} here; there is {known}", "model_not_found", "model")

    def check_count(self, n: int | None) -> int:
        """How many results are wanted.

        Raises:
            APIError: Too many.
        """
        count = 1 if n is None else n
        if count > self.settings.max_n:
            raise APIError(400, f"n must be at most {self.settings.max_n} here, got {count}", "invalid_value", "n")
        return count

    def check_text(self, text: str, param: str) -> str:
        """A text of acceptable length.

        Raises:
            APIError: It is too long.
        """
        limit = self.settings.max_prompt_characters
        if len(text) > limit:
            message = f"{param} has {len(text):,} characters, more than the limit of {limit:,}; shorten it"
            raise APIError(400, message, "string_above_max_length", param)
        return text

    def count_tokens(self, *texts: str) -> int:
        """Tokens of texts, as this model reads them."""
        given = [text for text in texts if text]
        return int(self.pipe.tokenizer.encode(given)[1].sum()) if given else 0

    async def submit(self, request: TaskRequest | EmbedRequest) -> Handle:
        """Put a request in the engine's queue; decoding pictures doesn't hold up other connections."""
        return await run_in_threadpool(self.engine.submit, request)

    async def submit_all(self, requests: Sequence[TaskRequest]) -> list[Handle]:
        """The same for several, all or none."""
        handles: list[Handle] = []
        try:
            for request in requests:
                handles.append(await self.submit(request))
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return handles

    async def finished(self, request: Request, handles: Sequence[Handle]) -> list[Any]:
        """Results of all; if the client goes away or one fails, the others are cancelled.

        Raises:
            RequestCancelledError: The client has gone.
        """
        results = asyncio.ensure_future(asyncio.gather(*(_result(handle) for handle in handles)))
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({results, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not results.done():
                raise RequestCancelledError("the client closed the connection")
            return list(results.result())
        finally:
            for handle in handles:
                handle.cancel()  # without effect on what is done
            for task in (results, gone):
                task.cancel()
            # Their ends are taken note of, or the event loop would report them as forgotten.
            await asyncio.gather(results, gone, return_exceptions=True)

    def stream(self, events: AsyncIterator[tuple[str | None, Mapping[str, Any]]], end: bool) -> StreamingResponse:
        """Server-sent events, with a comment now and then while there is no news.

        Args:
            events: Name (or ``None``) and data of each.
            end: Whether to close with ``[DONE]``.
        """

        async def lines() -> AsyncIterator[bytes]:
            async for item in _with_pings(events, self.settings.ping_seconds):
                if item is None:
                    yield b": ping\n\n"
                    continue
                name, data = item
                head = f"event: {name}\n" if name else ""
                yield f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode("utf-8", "replace")
            if end:
                yield b"data: [DONE]\n\n"

        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)


async def _result(handle: Handle) -> Any:
    return await handle


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def following(handle: Handle) -> AsyncIterator[Event]:
    """A handle's events; cancels it when the reader stops.

    Raises:
        Exception: What it failed with.
    """
    try:
        async for event in handle:
            if isinstance(event, Failed):
                raise event.error
            yield event
    finally:
        handle.cancel()


async def guarded(
    events: AsyncIterator[tuple[str | None, Mapping[str, Any]]], handles: Sequence[Handle]
) -> AsyncIterator[tuple[str | None, Mapping[str, Any]]]:
    """Events of a stream that has begun: an error becomes its last event, and nothing is left running."""
    try:
        async for item in events:
            yield item
    except Exception as error:
        yield "error", body_of(as_api_error(error))
    finally:
        for handle in handles:
            handle.cancel()


async def _with_pings(events: AsyncIterator[Any], seconds: float) -> AsyncIterator[Any]:
    """Items, and ``None`` whenever none came for some time."""
    pending: asyncio.Task[Any] | None = None
    try:
        while True:
            if pending is None:
                pending = asyncio.ensure_future(anext(events))  # type: ignore[arg-type]
            done, _ = await asyncio.wait({pending}, timeout=seconds)
            if not done:
                yield None
                continue
            try:
                item = pending.result()
            except StopAsyncIteration:
                return
            finally:
                pending = None
            yield item
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.wait({pending})
        await events.aclose()  # type: ignore[attr-defined]


def new_id(prefix: str) -> str:
    """A unique name as OpenAI writes them."""
    return f"{prefix}-{secrets.token_hex(12)}"
