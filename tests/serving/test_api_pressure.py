"""Clients that drip, flood, leave in the middle and come back: the server goes on, and nothing of them stays behind."""

from __future__ import annotations

import base64
import contextlib
import gc
import http.client
import io
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

import torch
from PIL import Image

from unialignment.serving.app import create_app
from unialignment.serving.engine import Engine
from unialignment.serving.guard import Guard
from unialignment.serving.handle import Handle
from unialignment.serving.jobs import EmbedJob, Job
from unialignment.serving.server import BackgroundServer
from unialignment.serving.settings import ServerSettings

DRAW, CHAT, EMBED = "/v1/images/generations", "/v1/chat/completions", "/v1/embeddings"
WAIT = 60.0


@pytest.fixture(scope="module")
def engine(make_tiny_pipeline: Any) -> Iterator[Engine]:
    with Engine(make_tiny_pipeline()) as running:
        yield running


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[BackgroundServer]:
    settings = ServerSettings(port=0, web=False, body_timeout=1.0, header_timeout=1.0, max_body_bytes=4 * 2**20)
    with BackgroundServer(create_app(engine, settings)) as running:
        yield running


def connect(server: BackgroundServer) -> socket.socket:
    url = urlsplit(server.url)
    return socket.create_connection((url.hostname, url.port), timeout=WAIT)


def post(server: BackgroundServer, path: str, body: Any) -> tuple[int, bytes]:
    url = urlsplit(server.url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=WAIT)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def is_idle(engine: Engine) -> bool:
    stats = engine.stats()
    return stats.active == stats.queued == stats.reserved_bytes == 0


def guard_of(server: BackgroundServer) -> Guard:
    layer: Any = server.server.config.loaded_app
    while not isinstance(layer, Guard):
        layer = getattr(layer, "middleware_stack", None) or layer.app
    return layer


def head(path: str, length: int) -> bytes:
    fields = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {length}"
    return f"POST {path} HTTP/1.1\r\n{fields}\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("begin", "drip", "answer"),
    [(b"POST /v1/embeddings HTTP/1.1\r\nX-Slow: ", b"a", b""), (head(EMBED, 10_000), b" ", b" 408 ")],
    ids=["headers", "body"],
)
def test_a_client_that_drips_is_let_go(server: BackgroundServer, begin: bytes, drip: bytes, answer: bytes) -> None:
    """A byte now and then doesn't buy more time."""
    with connect(server) as raw:
        raw.sendall(begin)
        raw.settimeout(0.05)
        data, end = b"", time.monotonic() + WAIT
        while True:
            assert time.monotonic() < end, "it may drip for ever"
            try:
                raw.sendall(drip)
                piece = raw.recv(1000)
            except TimeoutError:
                continue
            except OSError:
                break
            data += piece
            if not piece:
                break
    assert answer in data


def test_many_silent_connections_stop_nobody(server: BackgroundServer, engine: Engine) -> None:
    silent = [connect(server) for _ in range(60)]
    for number, raw in enumerate(silent):
        if number % 2:
            raw.sendall(head(EMBED, 1000)[: 10 + number])
    assert post(server, EMBED, {"input": "a dog"})[0] == 200
    for raw in silent:
        with contextlib.suppress(OSError):  # a reset is a good-bye, too
            while raw.recv(1000):
                pass
        raw.close()
    until(lambda: not server.server.server_state.connections, "silent connections are kept")
    assert is_idle(engine)


def test_many_clients_that_leave_at_any_moment(server: BackgroundServer, engine: Engine) -> None:
    before = engine.stats()
    sent = threading.Barrier(16)

    def one(number: int) -> None:
        rng = random.Random(number)
        body = {"prompt": "a dog", "n": 2, "num_inference_steps": 100, "stream": bool(number % 2), "partial_images": 2}
        data = json.dumps(body).encode()
        cut = len(data) // 2 if number % 4 == 3 else len(data)  # some leave before they have said it all
        with connect(server) as raw:
            sent.wait(WAIT)
            raw.sendall(head(DRAW, len(data)) + data[:cut])
            time.sleep(rng.uniform(0, 0.4))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    until(lambda: is_idle(engine), "requests of clients that left are still computed")
    until(lambda: guard_of(server)._held == 0, "bodies of clients that left are still counted")
    stats = engine.stats()
    assert stats.failed == before.failed
    assert stats.cancelled > before.cancelled
    counts = [getattr(stats, name) - getattr(before, name) for name in ("submitted", "completed", "cancelled")]
    assert counts[0] == counts[1] + counts[2]  # each ended once
    assert post(server, DRAW, {"prompt": "a dog", "num_inference_steps": 1})[0] == 200


def test_memory_is_back_where_it_was(server: BackgroundServer, engine: Engine) -> None:
    """After good, bad, huge and abandoned requests no request, tensor or body is left, and the process hasn't grown."""
    buffer = io.BytesIO()
    Image.new("RGB", (400, 300), "red").save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": url}}]
    huge = "x" * 2**20
    good = [
        (DRAW, {"prompt": "a dog", "num_inference_steps": 2, "seed": 1}),
        (DRAW, {"prompt": "a dog", "num_inference_steps": 3, "seed": 1, "stream": True, "partial_images": 2}),
        (CHAT, {"messages": [{"role": "user", "content": content}], "stream": True}),
        (EMBED, {"input": ["a dog", url]}),
    ]
    bad = [
        (DRAW, {"prompt": huge}),
        (DRAW, {"prompt": "a dog", "n": 10_000}),
        (CHAT, {"messages": [{"role": "user", "content": [content[0], {**content[1], "x": huge}]}]}),
        (EMBED, {"input": ["data:image/png;base64," + huge]}),
    ]

    def round_of_requests() -> None:
        for path, body in good:
            assert post(server, path, body)[0] == 200
        for path, body in bad:
            assert post(server, path, body)[0] == 400
        with connect(server) as raw:
            data = json.dumps({"prompt": "a dog", "num_inference_steps": 150}).encode()
            raw.sendall(head(DRAW, len(data)) + data)
            until(lambda: engine.stats().active > 0, "it never began")
        until(lambda: is_idle(engine), "an abandoned request goes on")
        until(lambda: not server.server.server_state.connections, "connections are kept")

    def alive() -> dict[str, int]:
        gc.collect()
        kinds = {"requests": (Handle, Job, EmbedJob), "tensors": torch.Tensor, "pictures": Image.Image}
        types = Counter(map(type, gc.get_objects()))
        return {name: sum(n for one, n in types.items() if issubclass(one, kind)) for name, kind in kinds.items()}

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    others = alive()["requests"]  # what earlier tests of this process still hold
    for _ in range(3):  # caches fill, the allocator settles
        round_of_requests()
    until(lambda: alive()["requests"] <= others, "finished requests are kept")
    before, size = alive(), resident() if os.path.exists("/proc/self/statm") else 0
    for _ in range(6):
        round_of_requests()
    until(lambda: alive()["requests"] <= others, "finished requests are kept")
    now = alive()
    assert all(now[kind] <= before[kind] for kind in before), (now, before)
    assert guard_of(server)._held == 0
    if size:
        # Six rounds' bodies are 18 MiB, and their texts as many again.
        assert resident() - size < 12 * 2**20
