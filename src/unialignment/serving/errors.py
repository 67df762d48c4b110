"""Errors as OpenAI's API words them: ``{"error": {"message", "type", "param", "code"}}`` with the fitting status.

Knows nothing of routes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from unialignment.errors import InputError, UniAlignmentError
from unialignment.serving.requests import DeadlineError, EngineClosedError, QueueFullError, RequestCancelledError

log = logging.getLogger(__name__)
_LONGEST = 500
"""Characters of a message; what users sent is in some of them."""


class APIError(UniAlignmentError):
    """An error with its HTTP status.

    Args:
        status: HTTP status.
        message: What was given, what was expected, how to fix it.
        code: Short machine-readable name.
        param: The parameter that is wrong.
        headers: Further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers or {}


_TYPES = {401: "authentication_error", 404: "invalid_request_error", 429: "rate_limit_error"}


def as_api_error(error: BaseException) -> APIError:
    """Any error as one for the client; what is not the client's to know is logged and replaced."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, QueueFullError):
        wait = {"Retry-After": str(max(1, round(error.retry_after)))}
        return APIError(429, str(error), "queue_full", headers=wait)
    if isinstance(error, DeadlineError):
        return APIError(504, str(error), "deadline_exceeded")
    if isinstance(error, RequestCancelledError):
        return APIError(499, str(error), "cancelled")
    if isinstance(error, EngineClosedError):
        return APIError(503, str(error), "unavailable", headers={"Retry-After": "5"})
    if isinstance(error, InputError):
        return APIError(400, str(error), "invalid_value")
    log.error("a request failed unexpectedly", exc_info=error)
    return APIError(500, "the server failed on this request; its log says why", "internal_error")


def body_of(error: APIError) -> dict[str, Any]:
    """OpenAI's JSON shape of an error."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    # Lone surrogates can't be encoded, and a message may quote any input.
    message = " ".join(str(error).encode("utf-8", "replace").decode().split())
    message = message if len(message) <= _LONGEST else f"{message[: _LONGEST - 1]}…"
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}


def response_of(error: BaseException) -> JSONResponse:
    """The response that tells a client of an error."""
    known = as_api_error(error)
    return JSONResponse(body_of(known), known.status, known.headers)


def _validation(error: RequestValidationError) -> APIError:
    problems: Sequence[dict[str, Any]] = error.errors()
    first = problems[0] if problems else {"loc": (), "msg": "the request is malformed", "type": "unknown"}
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = ".".join(place)[:100] or None
    if first["type"] == "json_invalid":
        return APIError(400, "the request's body is not valid JSON", "invalid_json")
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return APIError(400, f"unknown parameter {param!r}; see /docs for those that exist", "unknown_parameter", param)
    return APIError(400, f"{param}: {message}" if param else message, "invalid_value", param)


def add_error_handlers(app: FastAPI) -> None:
    """Make every error of an application one of OpenAI's shape."""

    async def known(_: Request, error: Exception) -> JSONResponse:
        return response_of(error)

    async def validation(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return response_of(_validation(error))

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        inner = getattr(error, "error", None)
        if isinstance(inner, APIError):
            return response_of(inner)
        codes = {404: "not_found", 405: "method_not_allowed"}
        message = error.detail if isinstance(error.detail, str) else "the request can't be handled"
        if error.status_code == 404:
            message = "there is nothing at this address; /docs lists what there is"
        headers = dict(error.headers or {})
        return response_of(APIError(error.status_code, message, codes.get(error.status_code), headers=headers))

    app.add_exception_handler(UniAlignmentError, known)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, known)
