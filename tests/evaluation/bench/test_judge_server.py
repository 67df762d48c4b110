"""The documented stand-in for a judge, over HTTP: whole runs, and the calibration says what it is worth."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
from PIL import Image

from unialignment.cli import main
from unialignment.evaluation import calibration
from unialignment.evaluation.benchmarks.semgen_bench import GROUPS, INDEX
from unialignment.evaluation.calibration import NEEDED, SPOILT, auc

ROWS = 4


@contextlib.contextmanager
def serving(root: Path, marks: str) -> Iterator[str]:
    """The server's address, as it prints it."""
    command = [sys.executable, str(root / "examples/evaluation/judge_server.py"), "--port", "0", "--marks", marks]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "bench" / "images").mkdir(parents=True)
    rows = []
    for n in range(ROWS):
        Image.new("RGB", (24, 16), (60 * n, 40, 0)).save(tmp_path / "bench" / "images" / f"{n}.png")
        texts = {group: f"{group} {n}." for group in GROUPS}
        rows.append(json.dumps({"image_id": n, "image_path": f"images/{n}.png", **texts}))
    (tmp_path / "bench" / INDEX).write_text("\n".join(rows))
    return tmp_path / "bench"


def run(data: Path, out: Path, url: str) -> dict[str, Any]:
    model = ["--model", "photograph", "--judge", f"openai:test@{url}"]
    assert main(["eval", "semgen-bench", str(data), *model, "--out", str(out), "--json"]) == 0
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    return results


@pytest.mark.parametrize("marks", ["ten", "hash"])
def test_a_whole_run_with_the_stand_in(
    repo_root: Path, data: Path, tmp_path: Path, marks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(repo_root, marks) as url:
        first, again = (run(data, tmp_path / name, url) for name in ("one", "two"))
    groups = first["judges"]["openai-test"]["groups"]
    assert {name: row["judged"] for name, row in groups.items()} == dict.fromkeys(GROUPS, ROWS)
    assert first["judges"] == again["judges"]
    assert not first["calibration"]["openai-test"]["trusted"]
    page = (tmp_path / "one" / "report.html").read_text()
    assert "NOT to be believed" in page and "Calibration of judges" in page
    for fault in first["calibration"]["openai-test"]["faults"]:
        cells = (fault["kind"], fault["fault"], fault["aspect"], f"{fault['auc']:.2f}", f"{fault['right']:.2f}")
        assert "".join(f"<td>{cell}</td>" for cell in cells) in page
    if marks == "ten":
        assert {row["o"][0] for row in groups.values()} == {10}


def test_the_stand_in_refuses_what_is_no_chat(repo_root: Path) -> None:
    with serving(repo_root, "random") as url:
        for path, body, status in (("/completions", b"{}", 404), ("/chat/completions", b"{}", 400)):
            with pytest.raises(HTTPError) as error:
                urllib.request.urlopen(url + path, body, timeout=30)
            assert error.value.code == status


def test_of_judges_that_answer_at_random_none_passes() -> None:
    rng = np.random.default_rng(0)
    passed = 0
    for _ in range(1000):
        asked: dict[tuple[str, ...], list[float]] = {}

        def marks(*key: str, asked: dict[tuple[str, ...], list[float]] = asked) -> list[float]:
            return asked.setdefault(key, rng.integers(0, 11, 8).tolist())

        told = [
            auc(marks(kind, "right", aspect), marks(kind, fault, aspect)) or 0.0
            for (kind, fault), aspects in SPOILT.items()
            for aspect in aspects
        ]
        passed += min(told) >= NEEDED
    assert passed == 0


def test_a_judge_that_sees_quality_alone_is_caught(tmp_path: Path) -> None:
    log = calibration._log(tmp_path)
    for (kind, fault), aspects in {**SPOILT, ("edit", "right"): ("consistency", "quality")}.items():
        for aspect in aspects if kind == "edit" else ():
            spoilt = fault in ("noise", "jpeg")
            score = 0.0 if spoilt else 9.0
            record = {"item": "i", "kind": kind, "fault": fault, "aspect": aspect, "status": "ok", "scores": [score]}
            log.append(record)
    found = calibration.verdict(tmp_path)
    assert not found["trusted"]
    assert "(edit/untouched/consistency, edit/other/consistency)" in found["verdict"]
