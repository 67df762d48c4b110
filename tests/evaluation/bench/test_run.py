"""A whole run over real HTTP, killed in the middle and resumed; judges that calibration must catch."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unialignment.cli import main
from unialignment.errors import InputError
from unialignment.evaluation import calibration
from unialignment.evaluation.agreement import krippendorff_alpha
from unialignment.evaluation.benchmarks.semgen_bench import INDEX, load
from unialignment.evaluation.harness import item_scores
from unialignment.evaluation.judges import Answer, JudgeOptions, JudgeRejected, JudgeUnavailable, names
from unialignment.evaluation.judges.endpoint import EndpointJudge
from unialignment.evaluation.judges.prompts import PromptSet
from unialignment.evaluation.scoring import PROTOCOLS

ROWS = 6


class Server(ThreadingHTTPServer):
    """Chat completions whose answer depends on nothing but the question. ``fail`` lists status codes to send first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[str] = []
        self.fail: list[int] = []
        self.delay = 0.0
        self.bias = 1
        self.headers: dict[str, str] = {}
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        assert isinstance(server, Server)
        server.seen.append(body.decode())
        time.sleep(server.delay)
        if server.fail:
            status, data = server.fail.pop(0), {"error": {"message": "try later"}}
        else:
            content = json.loads(body)["messages"][0]["content"]
            score = sum(content[0]["text"].encode()) % 8 + server.bias
            for part in content[1:]:
                Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))).verify()
            message = {"role": "assistant", "content": f'```json\n{{"score": [{score}, {score + 1}]}}\n```'}
            if "Consistency: how much" in content[0]["text"]:
                message["content"] = f"Score: {score}"
            status = 200
            data = {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "test",
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
            }
        sent = json.dumps(data).encode()
        self.send_response(status)
        for name, value in server.headers.items() if status != 200 else ():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    one = Server()
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield one
    one.shutdown()
    one.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving() as one:
        yield one


@pytest.fixture
def second() -> Iterator[Server]:
    with serving() as one:
        yield one


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "bench"
    (folder / "images").mkdir(parents=True)
    rows = []
    for index in range(ROWS):
        ramp = np.linspace(0, 255, 64)[None, :, None] * np.ones((48, 1, 3)) * (0.4 + 0.1 * index)
        ramp[:, :, index % 3] /= 2
        Image.fromarray(ramp.astype(np.uint8)).save(folder / "images" / f"{index}.png")
        texts = {"t2i_long": f"A long dog {index}.", "t2i_complex": f"Dog {index}.", "edit_complex": f"Cat {index}."}
        texts["edit_multi"] = f"Add cat {index}.Remove the dog.Make it red."
        rows.append(json.dumps({"image_id": index, "image_path": f"images/{index}.png", **texts}))
    (folder / INDEX).write_text("\n".join(rows))
    return folder


def command(data: Path, out: Path, server: Server, *more: str) -> list[str]:
    judge = ["--judge", f"openai:test@{server.url}", "--model", "photograph", "--calibration", "0"]
    return ["eval", "semgen-bench", str(data), "--out", str(out), *judge, *more]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_killed_and_resumed_without_a_lost_or_repeated_item(data: Path, tmp_path: Path, server: Server) -> None:
    out = tmp_path / "run"
    server.delay = 0.1
    args = command(data, out, server, "--in-flight", "2")
    process = subprocess.Popen([sys.executable, "-m", "unialignment", *args], env=os.environ)
    deadline = time.monotonic() + 60
    while len(server.seen) < 8 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    judgements = out / "judges" / "openai-test" / "judgements.jsonl"
    before = judgements.read_text()
    assert 1 <= len(before.splitlines()) < 4 * ROWS * 2
    server.delay = 0
    asked = len(server.seen)
    assert main(args) == 0
    after = judgements.read_text()
    assert after.startswith(before[: before.rfind("\n") + 1])
    records = lines(judgements)
    keys = [(record["item"], record["aspect"]) for record in records]
    assert len(keys) == len(set(keys)) == 4 * ROWS * 2
    assert len(server.seen) - asked == 4 * ROWS * 2 - before.count("\n")
    assert len(lines(out / "generated.jsonl")) == 4 * ROWS
    assert main(args) == 0
    assert judgements.read_text() == after


def test_the_results_are_those_worked_out_from_the_records(data: Path, tmp_path: Path, server: Server) -> None:
    out = tmp_path / "run"
    assert main(command(data, out, server, "--limit", "2")) == 0
    results = json.loads((out / "results.json").read_text())
    group = results["judges"]["openai-test"]["groups"]["edit_multi"]
    records = lines(out / "judges" / "openai-test" / "judgements.jsonl")
    by = {(r["item"], r["aspect"]): min(r["scores"]) for r in records}
    expected = [(by[f"edit_multi/{i}", "consistency"] * by[f"edit_multi/{i}", "quality"]) ** 0.5 for i in (0, 1)]
    assert group["o"][0] == pytest.approx(sum(expected) / 2)
    assert group["judged"] == 2 and group["failed"] == {}
    assert {len(json.loads(body)["messages"][0]["content"]) for body in server.seen} == {2, 3}


def test_other_settings_are_not_mixed_in(
    data: Path, tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(command(data, out, server, "--limit", "1")) == 0
    assert main(command(data, out, server, "--limit", "1", "--seed", "1")) == 2
    assert "seed: 0 there, 1 here" in capsys.readouterr().err
    assert main(command(data, out, server, "--limit", "1", "--protocol", "published")) == 2
    assert "protocol" in capsys.readouterr().err


def test_failures_are_retried_and_budgets_kept(server: Server, tmp_path: Path) -> None:
    waits: list[float] = []
    options = JudgeOptions(retries=2, backoff=0.5, max_requests=7, cache=tmp_path)
    judge = EndpointJudge("test", server.url, options, sleep=waits.append)
    server.fail = [500, 429]
    assert "score" in judge.ask("p", [], 0).text
    assert len(waits) == 2 and 0.25 <= waits[0] <= 0.75 and 0.5 <= waits[1] <= 1.5
    assert judge.ask("p", [], 0).cached
    server.fail = [400]
    with pytest.raises(JudgeRejected):
        judge.ask("q", [], 0)
    server.fail = [503] * 3
    with pytest.raises(JudgeUnavailable, match="failed 3 times"):
        judge.ask("q", [], 0)
    with pytest.raises(JudgeUnavailable, match="budget"):
        judge.ask("q", [], 0)


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("7", 7, 7),
        ("3600", 60, 60),
        ("0", 0.25, 0.75),
        (lambda: formatdate(time.time() + 20, usegmt=True), 15, 20),
        (lambda: formatdate(time.time() - 20, usegmt=True), 0.25, 0.75),
        ("soon", 0.25, 0.75),
        ("nan", 0.25, 0.75),
    ],
)
def test_the_endpoint_says_when_to_come_back(value, low: float, high: float, server: Server) -> None:
    waits: list[float] = []
    judge = EndpointJudge("test", server.url, JudgeOptions(retries=1, backoff=0.5), sleep=waits.append)
    server.fail, server.headers = [429], {"Retry-After": value if isinstance(value, str) else value()}
    assert "score" in judge.ask("p", [], 0).text
    assert len(waits) == 1 and low <= waits[0] <= high


def test_several_judges_and_how_far_they_agree(
    data: Path, tmp_path: Path, server: Server, second: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    second.bias = 0
    shared = ["eval", "semgen-bench", str(data), "--out", str(out), "--model", "photograph", "--calibration", "0"]
    alike = [*shared, "--judge", f"openai:test@{server.url}", "--judge", f"openai:test@{second.url}"]
    assert main(alike) == 2
    assert "give one a label" in capsys.readouterr().err and not server.seen
    args = [*shared, "--judge", f"a=openai:test@{server.url}", "--judge", f"b=openai:test@{second.url}"]
    assert main([*args, "--limit", "2"]) == 0
    shown = capsys.readouterr().out
    assert main(args) == 0
    assert len(server.seen) == len(second.seen) == 4 * ROWS * 2
    results = json.loads((out / "results.json").read_text())
    assert list(results["judges"]) == ["a", "b"] and "| a | edit_multi |" in shown and "alpha" in shown
    assert results["identities"]["a"]["judge"]["url"] == server.url
    assert results["identities"]["b"]["judge"]["url"] == second.url
    scores = {name: item_scores(out, load(data).items, name) for name in ("a", "b")}
    for key in ("ic", "pq", "o"):
        pairs = [[scores[name][item][key] for name in ("a", "b")] for item in scores["a"]]
        assert results["agreement"][key] == krippendorff_alpha(pairs)
    assert all(scores["a"][item]["ic"] - scores["b"][item]["ic"] == 1 for item in scores["a"])
    page = (out / "report.html").read_text()
    assert "alpha" in page and "a, edit_multi" in page and "b, edit_multi" in page
    assert (out / "table.tex").read_text().count("edit\\_multi") == 2
    other = ["--out", str(tmp_path / "other"), "--judge", f"a=openai:test@{server.url}", "--compare", str(out)]
    assert main([*shared, *other]) == 0
    assert "other, a, edit_multi" in (page := (tmp_path / "other" / "report.html").read_text())
    assert "run, b, edit_multi" in page
    assert main([*args, "--compare", str(out)]) == 2
    assert "runs other than --out" in capsys.readouterr().err
    swapped = [*shared, "--judge", f"b=openai:test@{server.url}", "--judge", f"a=openai:test@{second.url}"]
    assert main(swapped) == 2
    assert "judge.url" in capsys.readouterr().err


@pytest.mark.parametrize("pair", [("openai:x y", "openai:x-y"), ("A", "a"), ("openai:x", "openai:x")])
def test_judges_whose_records_would_mix_are_refused(pair: tuple[str, str]) -> None:
    made = [Scripted(str) for _ in pair]
    for judge, name in zip(made, pair, strict=True):
        judge.name = name
    with pytest.raises(InputError, match="called alike"):
        names(made)


class Scripted:
    """A judge in this process."""

    name, in_flight = "scripted", 1

    def __init__(self, answer) -> None:
        self.answer = answer

    def identity(self) -> dict:
        return {"kind": "scripted"}

    def ask(self, prompt, images, attempt) -> Answer:
        return Answer(self.answer(prompt, images))


def honest(prompt: str, images: list[Image.Image]) -> str:
    """Scores by looking at pixels: roughness, and likeness to what is asked for."""
    result = np.asarray(images[-1], float)
    if "technical quality" in prompt:
        rough = np.abs(np.diff(result, axis=0)).mean()
        levels = len(np.unique(result.reshape(-1, 3), axis=0))
        return str({"score": [10 if rough < 20 else 0, 10 if levels >= 60 else 0]})
    if len(images) == 1:
        index = int(re.search(r"dog (\d)", prompt, re.IGNORECASE).group(1))
        expected = 255 * (0.4 + 0.1 * index)
        return f'{{"score": [{10 if abs(result.max() - expected) < 12 else 0}]}}'
    source = images[0]
    for instruction, transform in calibration.EDITS:
        if instruction in prompt:
            far = np.abs(np.asarray(transform(source), float) - result).mean()
            return f'{{"score": [{max(0, 10 - far):.2f}, 10]}}'
    raise AssertionError(prompt)


def calibrated(answer, data: Path, out: Path) -> dict:
    benchmark = load(data)
    return calibration.calibrate(out, benchmark, Scripted(answer), PromptSet(), PROTOCOLS["corrected"], 5)


def test_calibration_catches_a_judge_that_always_says_ten(data: Path, tmp_path: Path) -> None:
    found = calibrated(lambda prompt, images: '{"score": [10, 10]}' if "[con" not in prompt else "10", data, tmp_path)
    assert not found["trusted"]
    assert {fault["auc"] for fault in found["faults"]} == {0.5}


@pytest.mark.parametrize("seed", range(5))
def test_calibration_catches_a_judge_that_answers_at_random(data: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    found = calibrated(lambda prompt, images: str(rng.randint(0, 10)), data, tmp_path)
    assert not found["trusted"]
    assert "NOT" in found["verdict"]


def test_calibration_catches_a_judge_that_refuses(data: Path, tmp_path: Path) -> None:
    found = calibrated(lambda prompt, images: "I'm sorry, I can't.", data, tmp_path)
    assert not found["trusted"] and found["answered"] == 0
    records = lines(tmp_path / "judges" / "scripted" / "calibration.jsonl")
    assert {(record["status"], record["attempts"]) for record in records} == {("refused", 3)}


def test_calibration_lets_an_honest_judge_pass(data: Path, tmp_path: Path) -> None:
    found = calibrated(honest, data, tmp_path)
    assert found["trusted"], found


def test_prompts_can_be_replaced_and_are_checked(tmp_path: Path) -> None:
    (tmp_path / "edit_consistency.txt").write_text("Rate {instruction}")
    replaced = PromptSet(tmp_path)
    assert replaced.question("edit", "consistency", "x", PROTOCOLS["corrected"]).text == "Rate x"
    assert replaced.fingerprint != PromptSet().fingerprint
    (tmp_path / "edit_consistency.txt").write_text("Rate it")
    with pytest.raises(InputError, match="must hold"):
        PromptSet(tmp_path)


def test_the_published_protocol_asks_about_editing_everywhere() -> None:
    prompts = PromptSet()
    published = prompts.question("generate", "consistency", "x", PROTOCOLS["published"])
    assert published.count == 2 and not published.with_source and "Preservation" in published.text
    assert prompts.question("generate", "consistency", "x", PROTOCOLS["corrected"]).count == 1
