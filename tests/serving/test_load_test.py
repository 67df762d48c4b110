"""The load test itself: that it would notice a wrong result, an error and a refusal, and what it compares."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "load_test.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("load_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["load_test"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def picture(value: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 100, 100)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


class Scripted(BaseHTTPRequestHandler):
    """Answers with what the server's ``answers`` yield."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:  # type: ignore[attr-defined]
            status, body = next(self.server.answers)  # type: ignore[attr-defined]
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After", "0.01")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[Any]:
    running = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    running.lock = threading.Lock()  # type: ignore[attr-defined]
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def drawn(value: int) -> tuple[int, dict[str, Any]]:
    return 200, {"data": [{"b64_json": picture(value)}]}


def run(script: Any, server: Any, answers: list[tuple[int, dict[str, Any]]]) -> Any:
    """A client that gets these answers, and then the right one until the time is over."""

    def endless() -> Iterator[tuple[int, dict[str, Any]]]:
        yield from answers
        while True:
            yield drawn(100)

    server.answers = endless()
    case = script.as_json("generate", "/v1/images/generations", script.read_picture, prompt="a dog")
    twins = [np.full((8, 8, 3), 100 / 255, np.float32)]
    tally = script.Tally()
    script.work(server.server_port, [case], twins, time.monotonic() + 0.5, script.Deck(1), tally)
    assert tally.done >= 1
    return tally


def test_right_results_are_right(script: Any, server: Any) -> None:
    tally = run(script, server, [drawn(101)])  # rounding to the next of 255 levels is allowed
    assert not tally.errors
    assert not tally.differing
    assert 0.9 < tally.worst["generate"] <= 1.0


def test_a_wrong_result_is_noticed(script: Any, server: Any) -> None:
    tally = run(script, server, [drawn(102), drawn(100), drawn(0)])
    assert tally.differing == {"generate": 2}
    assert not tally.errors


def test_errors_are_counted_and_refusals_tried_again(script: Any, server: Any) -> None:
    refused = (429, {"error": {"message": "later"}})
    tally = run(script, server, [refused, refused, drawn(100), (500, {"error": {"message": "broken"}}), (200, {})])
    assert tally.refused == 2
    assert sum(tally.errors.values()) == 2
    assert any("500" in text and "broken" in text for text in tally.errors)
    assert any("KeyError" in text for text in tally.errors)
    assert not tally.differing


def test_texts_and_vectors_are_compared(script: Any) -> None:
    assert script.differs("a dog", "a dog") == 0
    assert script.differs("a dog", "a Dog") > 1
    one = np.eye(3, dtype=np.float32)
    assert script.differs(one, one + 0.5e-4) < 1
    assert script.differs(one, one + 2e-4) > 1
    assert script.differs(one, one[:2]) > 1


def test_streams_are_read_to_their_end(script: Any) -> None:
    partial = {"type": "image_generation.partial_image", "b64_json": picture(1)}
    last = {"type": "image_generation.completed", "b64_json": picture(7)}
    text = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n: ping\n\n" for event in (partial, last))
    assert round(script.read_streamed_picture(text.encode())[0, 0, 0] * 255) == 7
    deltas = [{"choices": [{"delta": {"content": part}}]} for part in ("a ", "dog")] + [{"choices": [{"delta": {}}]}]
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in deltas) + "data: [DONE]\n\n"
    assert script.read_streamed_text(text.encode()) == "a dog"
    with pytest.raises(ValueError, match="no luck"):
        script.read_streamed_text(b'data: {"error": {"message": "no luck"}}\n\n')


def test_the_mixture_has_every_task(script: Any) -> None:
    from unialignment.tasks import TASKS

    found = script.cases("nano", 4)
    assert {case.task for case in found} == {*TASKS.names, "embed"}
    assert len({case.body for case in found if case.task == "generate"}) == 8
    assert any(b'"stream": true' in case.body for case in found if case.task == "caption")


def test_every_phase_has_the_same_mixture(script: Any) -> None:
    deck = script.Deck(10)
    first, second = ([deck.draw() for _ in range(10)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_two_halves_are_one_phase(script: Any) -> None:
    one, other = (script.Tally(seconds=2.0, latencies={"edit": [1.0]}, refused=1) for _ in range(2))
    other.differing["edit"] += 1
    both = script.joined(one, other)
    assert (both.seconds, both.done, both.throughput, both.refused) == (4.0, 2, 0.5, 2)
    assert both.differing == {"edit": 1}


@pytest.mark.slow
def test_a_short_run_on_a_tiny_model(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="serving is an extra (pip install 'unialignment[serve]')")
    command = [sys.executable, str(SCRIPT), "--model", str(tiny_folder), "--clients", "6", "--seconds", "3"]
    command += ["--seeds", "2", "--threads", "1", "--out", str(tmp_path / "report")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["batched"]["answers"] >= 6
    assert report["batched"]["latency_seconds"]["p99"] > 0
    assert report["one_client"]["servers_differ"] == []
    assert set(report["batched"]["errors"]) == set(report["one_at_a_time"]["differing"]) == set()
    assert "results unlike their twin | 0 | 0" in (tmp_path / "report.md").read_text()
