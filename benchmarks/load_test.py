"""Many clients at once against a server that this script starts: throughput, latency, and whether results are right.

    python benchmarks/load_test.py --clients 32 --seconds 120 --threads 2 --required-ratio 1.5 --out out/load_test

Two servers with the same model and settings, of which one computes one request after the other (``max_active`` 1), and
the same mixture of all tasks over HTTP:

1. *alone*: every distinct request once, by one client, on both servers. These results are the twins that all later ones
   must equal, on either server; both are warm after it.
2. *one at a time*: N clients against the second server, for half of its time before the next and for half after;
3. *batched*: N clients against the first.

A result equals its twin when texts are the same, pixels differ by at most 1/255, and vectors by at most 1e-4. Only 429
(try again later; waiting for that counts as latency) may go wrong besides. Clients send the next request when the last
is answered, and draw from one shuffled deck of all, so that every phase has the same mixture whatever its length; what
is under way when the time is over is waited for, and that time counts. Writes ``OUT.json`` and ``OUT.md``; exits with 1
when something differed or failed, or with ``--required-ratio`` when batching gained too little.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unialignment.storage import write_json, write_text

PIXELS = 1 / 255
VECTORS = 1e-4
TIMEOUT = 300.0
PROMPTS = (
    "a large flat car in the center, on a yellow background",
    "a large shaded dog on the left, on a blue background",
    "a flat rocket at the top, on a purple background",
    "a shaded cat at the bottom left and a flat bus at the top right, on an orange background",
)


@dataclass(frozen=True)
class Case:
    """One distinct request and how to read its answer."""

    task: str
    path: str
    body: bytes
    content_type: str
    read: Callable[[bytes], Any] = field(repr=False)


@dataclass
class Tally:
    """What one phase saw."""

    seconds: float = 0.0
    latencies: dict[str, list[float]] = field(default_factory=dict)
    refused: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    differing: Counter[str] = field(default_factory=Counter)
    worst: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def done(self) -> int:
        """Requests that were answered."""
        return sum(map(len, self.latencies.values()))

    @property
    def throughput(self) -> float:
        """Answers per second."""
        return self.done / self.seconds if self.seconds else 0.0


# ------------------------------------------------------------------------------------------------------------ requests


def scene(color: tuple[int, int, int], spot: tuple[int, int, int], side: int = 64) -> Image.Image:
    """A plain picture with a square: any source does for measuring speed."""
    image = Image.new("RGB", (side, side), color)
    image.paste(spot, (side // 4, side // 4, side * 3 // 4, side * 3 // 4))
    return image


def png(image: Image.Image) -> bytes:
    """Encoded."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def read_picture(answer: bytes) -> np.ndarray:
    """Float pixels 0-1 of the first picture."""
    return pixels(json.loads(answer)["data"][0]["b64_json"])


def pixels(encoded: str) -> np.ndarray:
    """Float 0-1 of a picture in base64."""
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        return np.asarray(image.convert("RGB"), np.float32) / 255


def events(answer: bytes) -> list[dict[str, Any]]:
    """Data of server-sent events; one that reports an error is raised."""
    lines = [line.removeprefix("data: ") for line in answer.decode().splitlines() if line.startswith("data: ")]
    found = [json.loads(line) for line in lines if line != "[DONE]"]
    for event in found:
        if "error" in event:
            raise ValueError(f"the stream ended with {event['error']['message']}")
    return found


def read_streamed_picture(answer: bytes) -> np.ndarray:
    """The picture that a stream ends with."""
    return pixels(next(event["b64_json"] for event in events(answer) if event["type"].endswith(".completed")))


def read_text(answer: bytes) -> str:
    """The first choice."""
    return str(json.loads(answer)["choices"][0]["message"]["content"])


def read_streamed_text(answer: bytes) -> str:
    """What the deltas add up to."""
    return "".join(choice["delta"].get("content") or "" for event in events(answer) for choice in event["choices"])


def read_vectors(answer: bytes) -> np.ndarray:
    """All vectors."""
    return np.asarray([entry["embedding"] for entry in json.loads(answer)["data"]], np.float32)


def as_json(task: str, path: str, read: Callable[[bytes], Any], /, **body: Any) -> Case:
    """A request with a JSON body."""
    return Case(task, path, json.dumps(body).encode(), "application/json", read)


def as_form(task: str, pictures: list[bytes], /, **fields: Any) -> Case:
    """A request to the edits route."""
    edge = "edge-of-a-part"
    parts = [
        f'--{edge}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    name = "image" if len(pictures) == 1 else "image[]"
    for number, data in enumerate(pictures):
        head = (
            f'--{edge}\r\nContent-Disposition: form-data; name="{name}"; filename="{number}.png"\r\n'
            "Content-Type: image/png\r\n\r\n"
        )
        parts.append(head.encode() + data + b"\r\n")
    parts.append(f"--{edge}--\r\n".encode())
    return Case(task, "/v1/images/edits", b"".join(parts), f"multipart/form-data; boundary={edge}", read_picture)


def cases(model: str, seeds: int) -> list[Case]:
    """The mixture: every task, streams among them, at settings of its own."""
    sources = [png(scene((200, 40, 40), (40, 80, 220))), png(scene((40, 160, 60), (240, 220, 60)))]
    urls = ["data:image/png;base64," + base64.b64encode(data).decode() for data in sources]

    def chat(task: str, url: str | None, text: str, stream: bool = False) -> Case:
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if url is not None:
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        message = {"role": "user", "content": content}
        read = read_streamed_text if stream else read_text
        fields = {"model": model, "task": task, "messages": [message], "seed": 0, "stream": stream}
        return as_json(task, "/v1/chat/completions", read, **fields)

    def draw(prompt: str, seed: int, read: Callable[[bytes], Any] = read_picture, **fields: Any) -> Case:
        return as_json("generate", "/v1/images/generations", read, model=model, prompt=prompt, seed=seed, **fields)

    found: list[Case] = []
    for seed in range(seeds):
        prompt, url, source = PROMPTS[seed % len(PROMPTS)], urls[seed % 2], sources[seed % 2]
        found += [
            draw(prompt, seed, read_streamed_picture, stream=True, partial_images=2)
            if seed % 2
            else draw(prompt, seed),
            # Fewer steps and no guidance: requests that differ in all of this share batches.
            draw(prompt, seed, num_inference_steps=8 + seed, guidance_scale=1.0),
            as_form("edit", [source], model=model, prompt="make the background green", seed=seed),
            as_form("compose", sources, model=model, seed=seed,
                    prompt="put the subject of image 1 to the left of the subject of image 2"),
            as_form("perceive", [source], model=model, prompt="depth", kind="depth", seed=seed),
            as_form("control", [source], model=model, task="control", prompt=prompt, seed=seed),
            chat("caption", url, "describe the picture", stream=bool(seed % 2)),
            chat("answer", url, ("what color is the background?", "what is in the picture?")[seed // 2 % 2]),
            chat("infill", url, "a large flat ___ in the center, on a ___ background"),
            chat("rewrite", None, prompt),
            as_json("embed", "/v1/embeddings", read_vectors, model=model, input=[prompt, "a dog"]),
        ]  # fmt: skip
    return found


def differs(twin: Any, result: Any) -> float:
    """How far a result is from its twin, in units of what is allowed: above 1 is a fault."""
    if isinstance(twin, str):
        return 0.0 if twin == result else float("inf")
    if twin.shape != result.shape:
        return float("inf")
    distance = float(np.abs(twin - result).max())
    # Half a step of slack, so that rounding of 1/255 itself is no fault.
    return distance / (VECTORS if twin.shape[-1] != 3 or twin.ndim != 3 else PIXELS * 1.001)


# ------------------------------------------------------------------------------------------------------------- clients


class Client:
    """One connection that is kept open."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.connection: http.client.HTTPConnection | None = None

    def send(self, case: Case) -> tuple[int, bytes, float]:
        """Status, body, and the seconds to wait before trying again if it was refused."""
        if self.connection is None:
            self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        try:
            self.connection.request("POST", case.path, case.body, {"Content-Type": case.content_type})
            response = self.connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException):
            self.close()
            raise
        wait = float(response.headers.get("Retry-After") or 1)
        if response.headers.get("Connection", "").lower() == "close":
            self.close()
        return response.status, data, wait

    def close(self) -> None:
        """Hang up."""
        if self.connection is not None:
            self.connection.close()
        self.connection = None


class Deck:
    """Numbers below ``size`` for all clients of a phase: each once in random order, then all again in another one."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.rng = size, random.Random(seed)
        self.left: list[int] = []
        self.lock = threading.Lock()

    def draw(self) -> int:
        """The next one."""
        with self.lock:
            if not self.left:
                self.left = self.rng.sample(range(self.size), self.size)
            return self.left.pop()


def work(port: int, mixture: list[Case], twins: list[Any], until: float, deck: Deck, tally: Tally) -> None:
    """One client: requests one after the other until the time is over."""
    client, rng = Client(port), random.Random(0)
    while time.monotonic() < until:
        index = deck.draw()
        case, started = mixture[index], time.monotonic()
        try:
            while True:
                status, answer, wait = client.send(case)
                if status != 429:
                    break
                with tally.lock:
                    tally.refused += 1
                time.sleep(wait * rng.uniform(0.5, 1.0))
            seconds = time.monotonic() - started
            if status != 200:
                with tally.lock:
                    tally.errors[f"{case.task}: {status} {answer[:160].decode('utf-8', 'replace')}"] += 1
                continue
            distance = differs(twins[index], case.read(answer))
        except Exception as error:
            with tally.lock:
                tally.errors[f"{case.task}: {type(error).__name__}: {error}"[:160]] += 1
            continue
        with tally.lock:
            tally.latencies.setdefault(case.task, []).append(seconds)
            tally.worst[case.task] = max(tally.worst.get(case.task, 0.0), distance)
            if distance > 1:
                tally.differing[case.task] += 1
    client.close()


def one_by_one(port: int, mixture: list[Case]) -> tuple[list[Any], float]:
    """Results of all requests, each sent when the last was answered, and the seconds that this took."""
    client, results, started = Client(port), [], time.monotonic()
    for case in mixture:
        status, answer, _ = client.send(case)
        if status != 200:
            raise SystemExit(f"{case.task} alone failed with {status}: {answer[:500]!r}")
        results.append(case.read(answer))
    client.close()
    return results, time.monotonic() - started


def load(port: int, mixture: list[Case], twins: list[Any], clients: int, seconds: float) -> Tally:
    """All clients at once. Requests under way when the time is over are waited for and counted."""
    tally, deck, started = Tally(), Deck(len(mixture)), time.monotonic()
    threads = [
        threading.Thread(target=work, args=(port, mixture, twins, started + seconds, deck, tally))
        for _ in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tally.seconds = time.monotonic() - started
    return tally


def joined(one: Tally, other: Tally) -> Tally:
    """Two phases as one."""
    both = Tally(one.seconds + other.seconds, refused=one.refused + other.refused)
    for tally in (one, other):
        both.errors.update(tally.errors)
        both.differing.update(tally.differing)
        for task, values in tally.latencies.items():
            both.latencies.setdefault(task, []).extend(values)
        for task, value in tally.worst.items():
            both.worst[task] = max(both.worst.get(task, 0.0), value)
    return both


# -------------------------------------------------------------------------------------------------------------- server


class Server:
    """A server in a process of its own."""

    def __init__(self, args: argparse.Namespace, max_active: int | None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, __file__, "--serve", str(self.port), "--model", args.model]
        command += ["--threads", str(args.threads)]
        if max_active is not None:
            command += ["--max-active", str(max_active)]
        self.process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(args.threads)})
        until = time.monotonic() + 600
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise SystemExit("the server did not start; its messages are above")
            if self._get("/readyz") is not None:
                return
            time.sleep(0.2)
        raise SystemExit("the server was not ready after 10 minutes")

    def _get(self, path: str) -> str | None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            text = response.read().decode()
            return text if response.status == 200 else None
        except OSError:
            return None
        finally:
            connection.close()

    def model(self) -> str:
        """Its name, which is not that of its folder."""
        return str(json.loads(self._get("/v1/models") or "")["data"][0]["id"])

    def counters(self) -> tuple[float, float]:
        """Rows and forward passes of the denoising network so far."""
        values: dict[str, float] = {}
        for line in (self._get("/metrics") or "").splitlines():
            name, _, value = line.rpartition(" ")
            if not line.startswith("#"):
                values[name.partition("{")[0]] = float(value)
        rows, passes = (
            next((value for name, value in values.items() if name.endswith(f"{kind}_total")), 0.0)
            for kind in ("rows", "passes")
        )
        return rows, passes

    def memory(self) -> int | None:
        """Resident bytes, on Linux."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            return None
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> None:
        """End it and wait."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def serve(args: argparse.Namespace) -> None:
    """The server's process."""
    from dataclasses import replace

    import torch
    import uvicorn

    import unialignment
    from unialignment.serving.app import create_app
    from unialignment.serving.engine import Engine
    from unialignment.serving.settings import ServerSettings

    torch.set_num_threads(args.threads)
    settings = ServerSettings(port=args.serve, web=False)
    if args.max_active is not None:
        settings = replace(settings, engine=replace(settings.engine, max_active=args.max_active))
    with Engine(unialignment.load(args.model), settings.engine) as engine:
        uvicorn.run(create_app(engine, settings), port=args.serve, log_level="warning", timeout_graceful_shutdown=5)


# -------------------------------------------------------------------------------------------------------------- report


def summary(tally: Tally) -> dict[str, Any]:
    """Figures of a phase."""
    everything = sorted(value for values in tally.latencies.values() for value in values)

    def quantiles(values: list[float]) -> dict[str, float]:
        return {f"p{q}": round(float(np.quantile(values, q / 100)), 4) for q in (50, 90, 99)} if values else {}

    return {
        "seconds": round(tally.seconds, 2),
        "answers": tally.done,
        "answers_per_second": round(tally.throughput, 3),
        "latency_seconds": quantiles(everything),
        "latency_by_task": {task: quantiles(values) for task, values in sorted(tally.latencies.items())},
        "answers_by_task": {task: len(values) for task, values in sorted(tally.latencies.items())},
        "refused_429": tally.refused,
        "errors": dict(tally.errors),
        "differing": dict(tally.differing),
        "largest_difference_over_allowed": {task: round(value, 4) for task, value in sorted(tally.worst.items())},
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    one, many, facts, alone = (report[name] for name in ("one_at_a_time", "batched", "facts", "one_client"))
    rows = [
        "# Load test",
        "",
        f"`{report['command']}`",
        "",
        f"{facts['clients']} clients, {facts['threads']} thread(s) of torch, "
        f"{facts['cores']} core(s) for server and clients together, {facts['machine']}.",
        "",
        "| | one at a time | batched |",
        "|---|---:|---:|",
        f"| answers | {one['answers']} in {one['seconds']:.0f} s | {many['answers']} in {many['seconds']:.0f} s |",
        f"| answers per second | {one['answers_per_second']:.2f} | **{many['answers_per_second']:.2f}** |",
    ]
    for q in ("p50", "p90", "p99"):
        a, b = one["latency_seconds"].get(q, 0), many["latency_seconds"].get(q, 0)
        rows.append(f"| latency {q} | {a:.2f} s | {b:.2f} s |")
    rows += [
        f"| refused (429, tried again) | {one['refused_429']} | {many['refused_429']} |",
        f"| other errors | {sum(one['errors'].values())} | {sum(many['errors'].values())} |",
        f"| results unlike their twin | {sum(one['differing'].values())} | {sum(many['differing'].values())} |",
        "",
        f"Batching serves **{report['ratio'] or 0:.2f} ×** as many requests (0: nothing was answered to compare with). "
        f"Answers per second one at a time, before and after: {', '.join(map(str, report['before_and_after']))}; "
        f"of one client alone: {alone['answers'] / alone['seconds']:.2f}.",
        "",
        "| task | answers | p50 | p99 | largest difference / allowed |",
        "|---|---:|---:|---:|---:|",
    ]
    for task, latency in many["latency_by_task"].items():
        worst = many["largest_difference_over_allowed"][task]
        count = many["answers_by_task"][task]
        rows.append(f"| {task} | {count} | {latency['p50']:.2f} s | {latency['p99']:.2f} s | {worst:.3f} |")
    if report["rows_per_pass"]:
        rows += ["", f"Mean batch of the denoising network: {report['rows_per_pass']:.1f} rows."]
    before, after = report["memory_bytes"]
    if before and after:
        rows += ["", f"Memory of the server: {before / 2**20:.0f} MiB before, {after / 2**20:.0f} MiB after the load."]
    return "\n".join([*rows, ""])


def main() -> int:
    """Run the phases and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=120.0, help="length of the batched phase")
    parser.add_argument("--baseline-seconds", type=float, help="of the other ones together (default: a third)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="torch threads")
    parser.add_argument("--seeds", type=int, default=4, help="distinct requests: 10 for each seed")
    parser.add_argument("--required-ratio", type=float, default=0.0, help="least gain of batching")
    parser.add_argument("--out", type=Path, default=Path("out/load_test"), help="files to write, without ending")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--max-active", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args)
        return 0
    half = (args.baseline_seconds or args.seconds / 3) / 2
    with Server(args, None) as server, Server(args, 1) as single:
        mixture = cases(server.model(), args.seeds)
        twins, alone = one_by_one(server.port, mixture)
        others, _ = one_by_one(single.port, mixture)
        unlike = [
            case.task for case, twin, other in zip(mixture, twins, others, strict=True) if differs(twin, other) > 1
        ]
        print(f"alone: {len(mixture)} requests in {alone:.1f} s", flush=True)
        first = load(single.port, mixture, twins, args.clients, half)
        print(f"one at a time: {first.throughput:.2f} answers/s", flush=True)
        before, counted = server.memory(), server.counters()
        many = load(server.port, mixture, twins, args.clients, args.seconds)
        after = server.memory()
        rows, passes = (now - then for now, then in zip(server.counters(), counted, strict=True))
        print(f"batched: {many.throughput:.2f} answers/s", flush=True)
        second = load(single.port, mixture, twins, args.clients, half)
        print(f"one at a time: {second.throughput:.2f} answers/s", flush=True)
    one = joined(first, second)
    report = {
        "command": "python benchmarks/load_test.py " + " ".join(sys.argv[1:]),
        "facts": {
            "clients": args.clients,
            "threads": args.threads,
            "cores": len(os.sched_getaffinity(0)),
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
            "model": args.model,
        },
        "ratio": round(many.throughput / one.throughput, 3) if one.throughput else None,
        "rows_per_pass": round(rows / passes, 2) if passes else None,
        "memory_bytes": [before, after],
        "one_client": {"answers": len(mixture), "seconds": round(alone, 2), "servers_differ": unlike},
        "before_and_after": [round(first.throughput, 3), round(second.throughput, 3)],
        "one_at_a_time": summary(one),
        "batched": summary(many),
    }
    write_json(args.out.with_suffix(".json"), report)
    write_text(args.out.with_suffix(".md"), markdown(report))
    print(markdown(report))
    wrong = len(unlike) + sum(sum(tally.errors.values()) + sum(tally.differing.values()) for tally in (one, many))
    return int(wrong > 0 or (report["ratio"] or 0.0) < args.required_ratio)


if __name__ == "__main__":
    sys.exit(main())
