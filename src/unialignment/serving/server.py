"""Running an application with uvicorn: in the foreground, or in a thread. Knows nothing of what it answers."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from unialignment.errors import InputError
from unialignment.serving.settings import ServerSettings


def _protocol(header_timeout: float, send_timeout: float) -> type[H11Protocol]:
    """uvicorn's HTTP protocol that also drops connections on which nothing moves.

    uvicorn itself waits for ever for the end of headers, and for a client to read what it was sent: a client that does
    neither could hold any number of connections and what is buffered for them.
    """

    class TimedProtocol(H11Protocol):
        _header_timer: asyncio.TimerHandle | None = None
        _send_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            self._cancel_send_timer()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            # Not close(), which would wait for the client to read the rest.
            self._send_timer = self.loop.call_later(send_timeout, self.transport.abort)

        def resume_writing(self) -> None:
            self._cancel_send_timer()
            super().resume_writing()

        def _cancel_send_timer(self) -> None:
            if self._send_timer is not None:
                self._send_timer.cancel()
                self._send_timer = None

        def _watch(self) -> None:
            if self.conn.their_state is h11.IDLE:
                if self._header_timer is None:
                    self._header_timer = self.loop.call_later(header_timeout, self.transport.close)
            else:
                self._stop()

        def _stop(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

    return TimedProtocol


def configure(
    app: FastAPI, settings: ServerSettings, *, log_level: str = "info", drain: float = 30.0
) -> uvicorn.Config:
    """uvicorn's configuration for an application.

    Args:
        app: What to serve.
        settings: Address and limits.
        log_level: uvicorn's.
        drain: Seconds that open requests are given at shutdown.
    """
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=_protocol(settings.header_timeout, settings.send_timeout),
        loop="asyncio",
        log_level=log_level,
        limit_concurrency=settings.max_connections,
        timeout_graceful_shutdown=max(1, round(drain)),
        server_header=False,
        access_log=log_level in ("info", "debug", "trace"),
    )


def listen(settings: ServerSettings) -> socket.socket:
    """A socket on the settings' address.

    Raises:
        InputError: The address can't be used.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((settings.host, settings.port))
    except (OSError, OverflowError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"can't listen on {settings.host} port {settings.port}: {reason}; choose another with --host and --port"
        ) from error
    return found


def address(found: socket.socket) -> str:
    """The base URL of a bound socket."""
    host, port = found.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class BackgroundServer:
    """An application served from a thread, for tests, notebooks and measurements.

    >>> with BackgroundServer(create_app(engine)) as server:                                    # doctest: +SKIP
    ...     openai.OpenAI(base_url=f"{server.url}/v1", api_key="none").models.list()

    Args:
        app: What to serve; its settings' port, or a free one where that is 0.
        options: For uvicorn's configuration.
    """

    def __init__(self, app: FastAPI, **options: Any) -> None:
        settings: ServerSettings = app.state.settings
        self._socket = listen(settings)
        self.url = address(self._socket)
        self.server = uvicorn.Server(configure(app, settings, **{"log_level": "warning", "drain": 1.0, **options}))
        self._thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [self._socket]}, name="unialignment-http", daemon=True
        )

    def __enter__(self) -> BackgroundServer:
        self._thread.start()
        while not self.server.started and self._thread.is_alive():
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(timeout=30)
        self._socket.close()
