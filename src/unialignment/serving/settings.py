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
        max_body_bytes: Largest request body.
        max_images: Most pictures in one request.
        max_n: Most results of one request.
        max_prompt_characters: Longest text.
        body_timeout: Seconds in which a request's body must have arrived.
        allow_urls: Whether the server fetches pictures from http(s) URLs.
        web: Whether to mount the web page.
        title: Name shown in the documentation.
        engine: The engine's limits.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_body_bytes: int = 32 * 2**20
    max_images: int = 16
    max_n: int = 8
    max_prompt_characters: int = 8_000
    body_timeout: float = 30.0
    allow_urls: bool = False
    web: bool = True
    title: str = "UniAlignment"
    engine: EngineSettings = field(default_factory=EngineSettings)


def keys_from(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """API keys from ``UNIALIGN_API_KEYS``, separated by commas or white space."""
    return tuple(environment.get("UNIALIGN_API_KEYS", "").replace(",", " ").split())
