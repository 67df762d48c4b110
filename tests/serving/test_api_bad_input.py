"""Bad and hostile input over HTTP: a clear refusal in OpenAI's shape, never a 500, never a hang, no memory kept."""

from __future__ import annotations

import base64
import contextlib
import gc
import io
import json
import socket
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

import http.client

from PIL import Image

from unialignment.serving.app import create_app
from unialignment.serving.engine import Engine, EngineSettings
from unialignment.serving.guard import is_key
from unialignment.serving.server import BackgroundServer
from unialignment.serving.settings import ServerSettings, keys_from

MAX_BODY = 2 * 2**20
Answer = tuple[int, dict[str, Any], dict[str, str]]


@pytest.fixture(scope="module")
def engine(make_tiny_pipeline: Any) -> Iterator[Engine]:
    with Engine(make_tiny_pipeline(), EngineSettings(max_pixels=1_000_000)) as running:
        yield running


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[BackgroundServer]:
    settings = ServerSettings(
        port=0, web=False, max_body_bytes=MAX_BODY, engine=engine.settings, body_timeout=1.0, header_timeout=1.0,
        send_timeout=1.0,
    )  # fmt: skip
    with BackgroundServer(create_app(engine, settings)) as running:
        yield running


@pytest.fixture(autouse=True)
def _nothing_is_left(engine: Engine) -> Iterator[None]:
    yield
    end = time.monotonic() + 30
    while engine.stats().active or engine.stats().queued:
        assert time.monotonic() < end, "a request was left running"
        time.sleep(0.01)
    assert engine.alive


def send(server: BackgroundServer, path: str, body: bytes | str = b"", method: str = "POST", **headers: str) -> Answer:
    url = urlsplit(server.url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=30)
    given = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    try:
        connection.request(method, path, body, given)
        response = connection.getresponse()
        text = response.read()
        return response.status, json.loads(text or b"{}"), {k.lower(): v for k, v in response.getheaders()}
    finally:
        connection.close()


def post(server: BackgroundServer, path: str, body: Any, **headers: str) -> Answer:
    return send(server, path, json.dumps(body), **headers)


def form(server: BackgroundServer, fields: list[tuple[str, str | None, bytes]]) -> Answer:
    """An edit; fields are (name, file name or None, content)."""
    boundary = "b0undary"
    body = b""
    for name, filename, content in fields:
        head = f'Content-Disposition: form-data; name="{name}"' + (f'; filename="{filename}"' if filename else "")
        body += f"--{boundary}\r\n{head}\r\n\r\n".encode() + content + b"\r\n"
    body += f"--{boundary}--\r\n".encode()
    return send(server, "/v1/images/edits", body, Content_Type=f"multipart/form-data; boundary={boundary}")


def refused(answer: Answer, *statuses: int) -> dict[str, Any]:
    status, body, _ = answer
    assert status in statuses, (status, body)
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) <= 500
    assert "Traceback" not in error["message"]
    return dict(error)


def png(width: int = 8, height: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises many pixels and whose data are few."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", b"\0" * 10_000_000)
    return buffer.getvalue()


SVG = b"""<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">
<!ENTITY x SYSTEM "file:///etc/passwd">]><svg xmlns="http://www.w3.org/2000/svg"><text>&b;&x;</text></svg>"""
NOT_PICTURES = {
    "empty": b"",
    "noise": bytes(range(256)) * 4,
    "svg bomb": SVG,
    "zip bomb": zip_bomb(),
    "gzip bomb": zlib.compress(b"\0" * 5_000_000),
    "pixel bomb": bomb(60_000, 60_000),
    "beyond the limit": bomb(2_000, 2_000),
    "truncated": png(64, 64)[:-30],
    "html": b"<html><img src=x></html>",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage",
    "path": b"/etc/passwd",
}
CHAT, DRAW, EMBED = "/v1/chat/completions", "/v1/images/generations", "/v1/embeddings"


def talk(url: Any, text: str = "what is it?") -> dict[str, Any]:
    content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    return {"model": "tiny", "messages": [{"role": "user", "content": content}]}


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.mark.parametrize("name", NOT_PICTURES)
def test_what_is_no_picture(server: BackgroundServer, name: str) -> None:
    data = NOT_PICTURES[name]
    refused(form(server, [("prompt", None, b"x"), ("image", "a.png", data)]), 400)
    refused(post(server, CHAT, talk(data_url(data))), 400)
    refused(post(server, EMBED, {"input": data_url(data)}), 400)


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/", "https://example.com/a.png", "file:///etc/passwd", "/etc/passwd",
        "../../etc/passwd", "ftp://host/a.png", "gopher://x", "data:", "data:,hello", "data:text/html;base64,PGI+",
        "data:image/png;base64,!!!!", "data:image/svg+xml;utf8,<svg/>", "", "\x00", "javascript:alert(1)",
    ],
)  # fmt: skip
def test_urls_and_paths_are_never_opened(server: BackgroundServer, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the server opened something")

    monkeypatch.setattr("urllib.request.urlopen", never)
    monkeypatch.setattr("unialignment.images._read", never)
    part = {"type": "image_url", "image_url": {"url": url}}
    assert refused(post(server, EMBED, {"input": [part]}), 400)["param"] == "input"
    error = refused(post(server, CHAT, talk(url)), 400)
    assert error["param"] == "messages"
    assert "root:" not in error["message"]
    if url.startswith("http"):
        assert error["code"] == "url_not_allowed"


@pytest.mark.parametrize(
    ("path", "body", "statuses"),
    [
        (DRAW, {}, (400,)),
        (DRAW, {"prompt": ""}, (400,)),
        (DRAW, {"prompt": None}, (400,)),
        (DRAW, {"prompt": ["a", "b"]}, (400,)),
        (DRAW, {"prompt": "a" * 1_000_000}, (400,)),
        (DRAW, {"prompt": "dog " * 1_500}, (400,)),
        (DRAW, {"prompt": "\ud800"}, (400,)),
        (DRAW, {"prompt": "a\x00b", "n": 10_000}, (400,)),
        (DRAW, {"prompt": "a dog", "n": 0}, (400,)),
        (DRAW, {"prompt": "a dog", "n": -1}, (400,)),
        (DRAW, {"prompt": "a dog", "n": 1.5}, (400,)),
        (DRAW, {"prompt": "a dog", "n": "many"}, (400,)),
        (DRAW, {"prompt": "a dog", "model": "../../etc/passwd"}, (404,)),
        (DRAW, {"prompt": "a dog", "size": "99999x99999"}, (400,)),
        (DRAW, {"prompt": "a dog", "size": "0x0"}, (400,)),
        (DRAW, {"prompt": "a dog", "size": "1x10000"}, (400,)),
        (DRAW, {"prompt": "a dog", "size": "big"}, (400,)),
        (DRAW, {"prompt": "a dog", "width": 100_000}, (400,)),
        (DRAW, {"prompt": "a dog", "width": 7}, (400,)),
        (DRAW, {"prompt": "a dog", "seed": -1}, (400,)),
        (DRAW, {"prompt": "a dog", "seed": 2**70}, (400,)),
        (DRAW, {"prompt": "a dog", "num_inference_steps": 10**9}, (400,)),
        (DRAW, {"prompt": "a dog", "guidance_scale": 1e400}, (400,)),
        (DRAW, {"prompt": "a dog", "guidance_scale": float("nan")}, (400,)),
        (DRAW, {"prompt": "a dog", "guidance_interval": [0.9, 0.1]}, (400,)),
        (DRAW, {"prompt": "a dog", "best_of": 1000}, (400,)),
        (DRAW, {"prompt": "a dog", "timeout": -5}, (400,)),
        (DRAW, {"prompt": "a dog", "priority": 11}, (400,)),
        (DRAW, {"prompt": "a dog", "response_format": "url"}, (400,)),
        (DRAW, {"prompt": "a dog", "background": "transparent"}, (400,)),
        (DRAW, {"prompt": "a dog", "sed": 1}, (400,)),
        (DRAW, [1, 2], (400,)),
        (DRAW, "x", (400,)),
        (CHAT, {"messages": []}, (400,)),
        (CHAT, {"messages": [{"role": "user", "content": "hello"}]}, (400,)),
        (CHAT, {"messages": [{"role": "assistant", "content": "hello"}]}, (400,)),
        (CHAT, {**talk(data_url(png())), "task": "rewrite"}, (400,)),
        (CHAT, {"messages": [{"role": "user", "content": "hello"}], "task": "answer"}, (400,)),
        (DRAW, {"prompt": "a dog", "rewrite": "perhaps"}, (400,)),
        (CHAT, {"messages": [{"role": "robot", "content": "hello"}]}, (400,)),
        (CHAT, talk(data_url(png()), "a" * 1_000_000), (400,)),
        (CHAT, {**talk(data_url(png())), "temperature": 99}, (400,)),
        (CHAT, {**talk(data_url(png())), "n": 10_000}, (400,)),
        (CHAT, {**talk(data_url(png())), "tools": [{"type": "function"}]}, (400,)),
        (CHAT, {**talk(data_url(png())), "response_format": {"type": "json_object"}}, (400,)),
        (CHAT, {**talk(data_url(png())), "task": "infill"}, (400,)),
        (CHAT, {**talk(data_url(png())), "model": "gpt-4o"}, (404,)),
        (CHAT, talk({"nested": "x"}), (400,)),
        (EMBED, {"input": []}, (400,)),
        (EMBED, {"input": ""}, (400,)),
        (EMBED, {"input": ["a"] * 300}, (400,)),
        (EMBED, {"input": [1, 2, 3]}, (400,)),
        (EMBED, {"input": "a dog", "dimensions": 7}, (400,)),
        (EMBED, {"input": [data_url(png())] * 17}, (400,)),
    ],
)
def test_unusable_bodies(server: BackgroundServer, path: str, body: Any, statuses: tuple[int, ...]) -> None:
    refused(post(server, path, body), *statuses)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xff\xfe", b"[" * 200_000, b'{"prompt": 1' + b"0" * 10_000 + b"}", b'{"prompt": "\\ud800"}',
        b"null",
        b'{"a":' * 50_000, b'{"prompt": NaN}', b'{"prompt": "a", "prompt": {}}',
    ],
    ids=["empty", "cut", "not text", "deep", "huge number", "surrogate", "null", "deep objects", "nan", "twice"],
)  # fmt: skip
def test_broken_json(server: BackgroundServer, body: bytes) -> None:
    refused(send(server, DRAW, body), 400)


def test_an_exact_message(server: BackgroundServer) -> None:
    error = refused(post(server, DRAW, {"prompt": "a dog", "n": 10_000}), 400)
    assert error == {
        "message": "n must be at most 8 here, got 10000",
        "type": "invalid_request_error",
        "param": "n",
        "code": "invalid_value",
    }


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "", "multipart/form-data", "application/jsonp"])
def test_wrong_content_types(server: BackgroundServer, kind: str) -> None:
    for path in (DRAW, CHAT, EMBED):
        refused(send(server, path, b'{"prompt": "a dog"}', Content_Type=kind), 415)
    refused(send(server, "/v1/images/edits", b"{}", Content_Type=kind or "application/json"), 400, 415)


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [("prompt", None, b"x")],
        [("image", "a.png", png())],
        [("prompt", None, b"x"), ("image", None, b"/etc/passwd")],
        [("prompt", None, b"x"), ("image", "a.png", png()), ("n", None, b"10000")],
        [("prompt", None, b"x"), ("image", "a.png", png()), ("n", None, b"two")],
        [("prompt", None, b"x"), ("image", "a.png", png()), ("mask", "m.png", png())],
        [("prompt", None, b"x"), ("image", "a.png", png()), ("sead", None, b"1")],
        [("prompt", None, b"x"), ("image", "a.png", png()), ("task", None, b"caption")],
        [("prompt", None, b"x"), ("image", "a.png", png()), ("task", None, b"perceive")],
        [("prompt", None, b"x"), ("image", "a.png", png()), ("kind", None, b"pose")],
        [("prompt", None, b"x"), ("image", "a.png", png()), ("model", None, b"../x")],
        [("prompt", None, b"x" * 900_000), ("image", "a.png", png())],
        [("prompt", None, b"x"), *[("image[]", "a.png", png())] * 17],
        [("prompt", None, b"x"), *[("image[]", "a.png", png())] * 5],
        [("prompt", None, b"\xff\xfe"), ("image", "../../../etc/cron.d/x", b"#!/bin/sh")],
        [(f"field{i}", None, b"x") for i in range(2000)],
    ],
)  # fmt: skip
def test_unusable_forms(server: BackgroundServer, fields: list[tuple[str, str | None, bytes]]) -> None:
    refused(form(server, fields), 400, 404)


def test_a_broken_form(server: BackgroundServer) -> None:
    kind = "multipart/form-data; boundary=x"
    for body in (b"", b"--x", b"--x\r\nContent-Disposition: nonsense\r\n\r\nabc\r\n--x--\r\n", b"\0" * 1000):
        refused(send(server, "/v1/images/edits", body, Content_Type=kind), 400)
    refused(send(server, "/v1/images/edits", b"abc", Content_Type="multipart/form-data"), 400)


def test_file_names_are_only_names(server: BackgroundServer) -> None:
    fields = [
        ("prompt", None, b"red"),
        ("image", "../../../../tmp/evil.png", png()),
        ("num_inference_steps", None, b"1"),
    ]
    status, body, _ = form(server, fields)  # type: ignore[arg-type]
    assert status == 200
    assert body["task"] == "edit"


def test_bodies_that_are_too_large(server: BackgroundServer) -> None:
    refused(send(server, DRAW, b"", Content_Length=str(10**12)), 413)
    # Of unknown length, the limit is found while it flows.
    url = urlsplit(server.url)
    with socket.create_connection((url.hostname, url.port), timeout=30) as raw:
        raw.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                    b"Transfer-Encoding: chunked\r\n\r\n")  # fmt: skip
        piece = b"10000\r\n" + b" " * 65536 + b"\r\n"
        with contextlib.suppress(OSError):
            for _ in range(MAX_BODY // 65536 + 8):
                raw.sendall(piece)
        assert b" 413 " in _read(raw)


def _read(raw: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(OSError):
        while piece := raw.recv(65536):
            data += piece
    return data


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"", b""),
        (b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nX-Slow: ", b""),
        (
            b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b'Content-Length: 1000\r\n\r\n{"prompt": "a',
            b" 408 ",
        ),
    ],
    ids=["silence", "headers without end", "body without end"],
)
def test_slow_clients_are_let_go(server: BackgroundServer, sent: bytes, expected: bytes) -> None:
    url = urlsplit(server.url)
    with socket.create_connection((url.hostname, url.port), timeout=30) as raw:
        raw.sendall(sent)
        answer = _read(raw)  # ends when the server closes the connection
    assert expected in answer
    assert send(server, "/healthz", method="GET")[0] == 200


def test_what_is_not_http(server: BackgroundServer) -> None:
    url = urlsplit(server.url)
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n"
    for data in (
        b"\x16\x03\x01\x02\x00" * 100, b"GET / HTTP/9.9\r\n\r\n", b"GET " + b"a" * 100_000,
        head + b"Content-Length: " + b"9" * 400 + b"\r\n\r\n", head + b"Content-Length: -1\r\n\r\n",
        head + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
    ):  # fmt: skip
        with socket.create_connection((url.hostname, url.port), timeout=30) as raw:
            with contextlib.suppress(OSError):
                raw.sendall(data)
            answer = _read(raw)
        assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 505"))
    assert send(server, "/healthz", method="GET")[0] == 200


def test_a_client_that_reads_nothing_is_let_go(server: BackgroundServer, engine: Engine) -> None:
    url = urlsplit(server.url)
    body = json.dumps({"prompt": "a dog", "stream": True, "partial_images": 3, "size": "1200x1200"})
    connections = server.server.server_state.connections
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(30)
        raw.connect((url.hostname, url.port))
        raw.sendall(
            f"POST {DRAW} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            f"{body}".encode()
        )
        assert b" 200 " in raw.recv(100)
        assert send(server, "/healthz", method="GET")[0] == 200  # the server goes on meanwhile
        end = time.monotonic() + 60
        while connections:
            assert time.monotonic() < end, "the connection is kept for ever"
            time.sleep(0.02)


def test_addresses_and_methods_that_do_not_exist(server: BackgroundServer) -> None:
    refused(send(server, "/v1/nothing", method="GET"), 404)
    refused(send(server, "/v1/../../etc/passwd", method="GET"), 404)
    refused(send(server, "/v1/models/..%2f..%2fetc%2fpasswd", method="GET"), 404)
    refused(send(server, "/static/../../../etc/passwd", method="GET"), 404)
    refused(send(server, DRAW, method="GET"), 405)
    refused(send(server, "/v1/models", method="DELETE"), 405)


def test_keys(engine: Engine) -> None:
    keys = ("correct-horse", "schlüssel")
    with BackgroundServer(create_app(engine, ServerSettings(port=0, web=False, api_keys=keys))) as server:
        body = {"prompt": "a dog", "num_inference_steps": 1}
        for header in (
            None,
            "",
            "correct-horse",
            "Basic correct-horse",
            "Bearer",
            "Bearer wrong",
            "Bearer correct-hors",
        ):
            given = {} if header is None else {"Authorization": header}
            error = refused(post(server, DRAW, body, **given), 401)
            assert error["type"] == "authentication_error"
        refused(send(server, "/v1/models", method="GET"), 401)
        refused(send(server, "/v1/nothing", method="GET"), 401)  # nothing is learned without a key
        assert post(server, DRAW, body, Authorization="Bearer correct-horse")[0] == 200
        assert post(server, DRAW, body, Authorization="bearer  correct-horse")[0] == 200
        assert send(server, "/healthz", method="GET")[0] == 200
        assert "x-request-id" in post(server, DRAW, body, Authorization="Bearer correct-horse")[2]


def test_key_comparison() -> None:
    assert is_key("b", ("a", "b"))
    assert not is_key("", ("a", "b"))
    assert not is_key("\udcff", ("a",))
    assert not is_key("a", ())
    assert keys_from({"UNIALIGN_API_KEYS": "one, two\nthree"}) == ("one", "two", "three")
    assert keys_from({}) == ()


def test_memory_comes_back(server: BackgroundServer) -> None:
    """A hundred large refused pictures leave nothing behind that grows."""
    import resource

    large = data_url(png(990, 990) + b"\0" * 300_000)
    request = json.dumps(talk(large, "x" * 9_000))
    for _ in range(10):
        refused(send(server, CHAT, request), 400)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(30):
        refused(send(server, CHAT, request), 400)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 8 * 1024  # KiB; thirty bodies kept would be 12 MiB, their pictures 90 MiB


def test_a_storm_of_everything_at_once(server: BackgroundServer, engine: Engine) -> None:
    before = engine.stats()
    statuses: list[int] = []

    def one(number: int) -> None:
        good = {"prompt": "a dog", "num_inference_steps": 2}
        bodies = [good, {"prompt": ""}, {**good, "n": 99}, {**good, "timeout": 0.001}, {"x": 1}]
        statuses.append(post(server, DRAW, bodies[number % len(bodies)])[0])

    threads = [threading.Thread(target=one, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(statuses) == 30
    assert set(statuses) <= {200, 400, 429, 504}
    assert statuses.count(200) >= 6
    stats = engine.stats()
    assert stats.failed == before.failed
    assert stats.reserved_bytes == 0


def test_an_unforeseen_failure_says_nothing_of_the_inside(make_tiny_pipeline: Any) -> None:
    pipe = make_tiny_pipeline()

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("secret path /home/somebody")

    pipe.transformer.denoise = broken
    with Engine(pipe) as engine, BackgroundServer(create_app(engine, ServerSettings(port=0, web=False))) as server:
        error = refused(post(server, DRAW, {"prompt": "a dog"}), 500)
        assert "secret" not in json.dumps(error)
        assert error["code"] == "internal_error"
