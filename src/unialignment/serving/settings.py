"""Settings of the server. Knows nothing of how they are given (command line, environment, cluster file)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from unialignment.serving.requests import EngineSettings


@dataclass(frozen=True)
class ServerSettings:
    """What the HTTP side allows.

    Attributes:
        host: Address to listen on; only this machine unless given.
        port: TCP port; 0 takes a free one.
        api_keys: Keys of which every request under ``/v1`` must carry one; none: no key is asked for.
        aliases: Further names under which the model is found, for applications whose model name can't be changed.
        max_body_bytes: Largest request body, an upload to the page included.
        max_held_bytes: Bodies of all requests being handled, together.
        max_upload_bytes: Files uploaded to the page that are kept, together; beyond, the oldest are removed.
        max_images: Most pictures in one request.
        max_n: Most results of one request.
        max_prompt_characters: Longest text.
        max_output_pixels: Largest width × height of a picture that is enlarged to the size asked for.
        header_timeout: Seconds in which a connection's first request must have begun and its headers arrived.
        body_timeout: Seconds in which a request's body must have arrived.
        upload_timeout: The same for what is sent to the page, from phones among others.
        send_timeout: Seconds without reading after which a client's connection is dropped.
        ping_seconds: A stream without news is kept alive by a comment this often.
        max_connections: Connections at once; further ones are answered 503.
        allow_urls: Whether the server fetches pictures from http(s) URLs.
        web: Whether to mount the web page.
        title: Name shown in the documentation.
        engine: The engine's limits.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    aliases: tuple[str, ...] = ()
    max_body_bytes: int = 32 * 2**20
    max_held_bytes: int = 256 * 2**20
    max_upload_bytes: int = 2**30
    max_images: int = 16
    max_n: int = 8
    max_prompt_characters: int = 8_000
    max_output_pixels: int = 2048 * 2048
    header_timeout: float = 20.0
    body_timeout: float = 30.0
    upload_timeout: float = 120.0
    send_timeout: float = 60.0
    ping_seconds: float = 15.0
    max_connections: int = 512
    allow_urls: bool = False
    web: bool = True
    title: str = "UniAlignment"
    engine: EngineSettings = field(default_factory=EngineSettings)


def keys_from(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """API keys from ``UNIALIGN_API_KEYS``, separated by commas or white space."""
    return tuple(environment.get("UNIALIGN_API_KEYS", "").replace(",", " ").split())
