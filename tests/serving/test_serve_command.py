"""``unialign serve``: starts, answers and stops; mistakes are said in one line before anything is loaded."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from unialignment.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port must be 0 to 65535"),
        (["--max-queue", "0"], "--max-queue must be above 0"),
        (["--api-key", " "], "must not be empty"),
        (["--host", "203.0.113.7"], "can't listen on 203.0.113.7"),
        (["--port", "0", "--model", "no/such/folder", "--no-web"], "no/such/folder"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"can't listen on 127.0.0.1 port {port}" in capsys.readouterr().err


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve"]) == 2
    assert "pip install 'unialignment[serve]'" in capsys.readouterr().err


def test_it_serves_until_it_is_told_to_stop(tiny_folder: Path) -> None:
    command = [sys.executable, "-m", "unialignment", "serve", "--port", "0", "--no-web", "--model", str(tiny_folder)]
    environment = {**os.environ, "UNIALIGN_API_KEYS": "secret", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--alias", "gpt-image-1"], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        found = next(filter(None, (re.search(r"API (http://\S+/v1) \(1 key\(s\)\)", line) for line in lines)))
        next(line for line in lines if "startup complete" in line)
        address = urllib.parse.urlsplit(found[1])
        for _ in range(600):  # the line comes shortly before it listens
            try:
                socket.create_connection((address.hostname, address.port), 1).close()
                break
            except OSError:
                time.sleep(0.1)

        def get(path: str, **headers: str) -> Any:
            request = urllib.request.Request(found[1] + path, headers=headers)
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.loads(response.read())

        models = get("/models", Authorization="Bearer secret")
        assert [model["id"] for model in models["data"]] == ["tiny", "gpt-image-1"]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get("/models")
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()
