"""What every request passes before any route sees it: key, content type, size, and time limits.

Bodies are limited on every route, the page's too; keys and content types under ``/v1`` only, as the page has a login of
its own. Pure ASGI, so that bodies and streams are counted as they flow. Knows nothing of what routes do.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unialignment.serving.errors import APIError, response_of
from unialignment.serving.settings import ServerSettings

PREFIX = "/v1/"
MULTIPART = ("/v1/images/edits",)
"""Routes that take forms; the others take JSON."""


def is_key(given: str, keys: Sequence[str]) -> bool:
    """Whether ``given`` is one of ``keys``, in a time that depends neither on which nor on how much agrees."""
    found = False
    for key in keys:
        found |= hmac.compare_digest(given.encode("utf-8", "replace"), key.encode())
    return found


class Guard:
    """Refuses what must not reach a route.

    Args:
        app: The application.
        settings: Limits and keys.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        self.settings = settings
        self._held = 0  # bytes of bodies being received or worked on

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        has_body = scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if scope["type"] != "http" or not (has_body or scope["path"].startswith(PREFIX)):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = f"req_{secrets.token_hex(12)}"
        limits = self.settings
        patience = limits.body_timeout if scope["path"].startswith(PREFIX) else limits.upload_timeout
        state = _Exchange(self, receive, send, request_id, has_body, patience)
        try:
            self._check(scope, headers)
        except APIError as error:
            await response_of(error)(scope, receive, state.send)
            return
        try:
            await self.app(scope, state.receive, state.send)
        finally:
            self._held -= state.received

    def _check(self, scope: Scope, headers: Headers) -> None:
        settings = self.settings
        length = headers.get("content-length", "")
        too_large = length.isdigit() and int(length[:20]) > settings.max_body_bytes
        if not scope["path"].startswith(PREFIX):
            if too_large:
                raise self.too_large()
            return
        if settings.api_keys:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not is_key(key.strip(), settings.api_keys):
                message = "no API key given" if not key else "wrong API key"
                raise APIError(
                    401, f"{message}; send 'Authorization: Bearer KEY'", "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        if scope["method"] != "POST":
            return
        wanted = "multipart/form-data" if scope["path"].rstrip("/") in MULTIPART else "application/json"
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != wanted:
            raise APIError(415, f"expected content of type {wanted}, got {kind or 'none'}", "unsupported_media_type")
        if too_large:
            raise self.too_large()

    def too_large(self) -> APIError:
        """The error for a body beyond the limit."""
        limit = self.settings.max_body_bytes
        return APIError(413, f"the request's body is larger than the limit of {limit:,} bytes", "body_too_large")

    def hold(self, count: int) -> None:
        """Count bytes of a body.

        Raises:
            Refusal: All bodies together are too large at present.
        """
        self._held += count
        if self._held > self.settings.max_held_bytes:
            raise Refusal(
                APIError(
                    429, "too many large requests at once; try again soon", "overloaded", headers={"Retry-After": "2"}
                )
            )


class Refusal(HTTPException):
    """An error found while a body arrives; an HTTP exception, since frameworks let only these through there.

    Args:
        error: What to tell the client.
    """

    def __init__(self, error: APIError) -> None:
        super().__init__(error.status, str(error), error.headers)
        self.error = error


class _Exchange:
    """Receiving and sending of one request, within the limits."""

    def __init__(
        self, guard: Guard, receive: Receive, send: Send, request_id: str, has_body: bool, patience: float
    ) -> None:
        self.guard, self._receive, self._send, self.request_id = guard, receive, send, request_id
        self.received = 0
        self._has_body = has_body
        self._complete = False
        self._patience = patience
        self._deadline = asyncio.get_running_loop().time() + patience

    async def receive(self) -> Message:
        """The next piece of the body, or the news that the client has gone."""
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            message_ = f"the request's body didn't arrive within {self._patience:g} s"
            raise Refusal(APIError(408, message_, "body_timeout")) from None
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self.received += size
            self.guard.hold(size)
            if self.received > self.guard.settings.max_body_bytes:
                raise Refusal(self.guard.too_large())
            self._complete = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Pass a piece of the response on."""
        if message["type"] == "http.response.start":
            headers: list[Any] = [*message.get("headers", []), (b"x-request-id", self.request_id.encode())]
            if self._has_body and not self._complete:
                headers.append((b"connection", b"close"))  # the rest of the body isn't waited for
            message = {**message, "headers": headers}
        await self._send(message)
