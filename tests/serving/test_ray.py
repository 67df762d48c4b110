"""Two replicas on this machine: one killed under load, then both replaced; every accepted request is answered."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

# Ray reads these when it is imported. Machines that run tests may be busy, and idle workers are not needed.
os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
os.environ.setdefault("RAY_enable_worker_prestart", "0")

pytest.importorskip("ray", reason="Ray Serve is an extra (pip install 'unialignment[ray]')")
pytest.importorskip("fastapi", reason="serving is an extra (pip install 'unialignment[serve]')")

pytestmark = pytest.mark.slow
REQUESTS, STEPS = 32, 40
WAIT = 300.0
"""Seconds; machines that run tests may be busy."""


def arguments(folder: Path, **more: Any) -> Any:
    from unialignment.serving.ray_app import RayArguments

    return RayArguments(
        model=str(folder), replicas=2, cpus=0.1, threads=1, web=False, health_seconds=1, drain_seconds=60, **more
    )


@pytest.fixture(scope="module")
def cluster(tiny_folder) -> Iterator[int]:
    """The application with a tiny model, two replicas; its port."""
    from unialignment.serving import ray_app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        ray_app.start(arguments(tiny_folder), "127.0.0.1", port, blocking=False)
        yield port
    finally:
        ray_app.stop()


def pids(wanted: int) -> set[int]:
    """Processes of the model's replicas, as many as answer."""
    from ray import serve

    from unialignment.serving.ray_app import APP_NAME

    handle = serve.get_deployment_handle("model", APP_NAME)
    found: set[int] = set()
    until = time.monotonic() + WAIT
    while len(found) < wanted and time.monotonic() < until:
        found.add(handle.pid.remote().result(timeout_s=WAIT))
    return found


def draw(port: int, seed: int) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
    body = json.dumps({"prompt": "a dog", "seed": seed, "num_inference_steps": STEPS})
    connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    status, answer = response.status, json.loads(response.read())
    connection.close()
    return status, answer


def test_one_of_two_replicas_is_killed_under_load(cluster: int, tiny_pipeline) -> None:
    from ray import serve

    from unialignment.serving.ray_app import APP_NAME

    before = pids(2)
    assert len(before) == 2
    answers: dict[int, tuple[int, dict]] = {}
    clients = [
        threading.Thread(target=lambda seed=seed: answers.__setitem__(seed, draw(cluster, seed)))
        for seed in range(REQUESTS)
    ]
    for client in clients:
        client.start()
    # Killed while it works: both replicas have begun, hardly anything is done.
    time.sleep(0.5)
    while not answers and any(client.is_alive() for client in clients):
        time.sleep(0.01)
    done = len(answers)
    os.kill(min(before), signal.SIGKILL)
    for client in clients:
        client.join(WAIT)
    assert len(answers) == REQUESTS
    assert {status for status, _ in answers.values()} == {200}, [a for s, a in answers.values() if s != 200][:3]
    retries = serve.get_deployment_handle("frontend", APP_NAME).retries.remote().result(timeout_s=WAIT)
    assert retries > 0, f"the kill hit nobody ({done} were done before), so that nothing was shown"
    for seed in (0, REQUESTS // 2, REQUESTS - 1):
        alone = tiny_pipeline.generate("a dog", seed=seed, num_inference_steps=STEPS, progress=False).images[0]
        sent = Image.open(io.BytesIO(base64.b64decode(answers[seed][1]["data"][0]["b64_json"]))).convert("RGB")
        assert np.abs(np.asarray(sent, int) - np.asarray(alone, int)).max() <= 1
    # Ray replaces the dead one, and the new one works.
    after = pids(2)
    assert min(before) not in after
    assert len(after) == 2
    assert draw(cluster, 1)[0] == 200


def test_a_changed_application_is_rolled_out_under_load(cluster: int, tiny_folder) -> None:
    from unialignment.serving import ray_app

    before = pids(2)
    answers: list[int] = []
    over = threading.Event()

    def work(seed: int) -> None:
        while not over.is_set():
            answers.append(draw(cluster, seed)[0])

    clients = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for client in clients:
        client.start()
    try:
        # The same command again with another limit, as `serve deploy` would with a changed file.
        ray_app.start(arguments(tiny_folder, engine={"max_steps": 50}), "127.0.0.1", cluster, blocking=False)
        count, until = len(answers), time.monotonic() + WAIT
        while len(answers) < count + 8 and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        over.set()
        for client in clients:
            client.join(WAIT)
    assert len(answers) >= 8
    assert set(answers) == {200}
    assert not before & pids(2), "all replicas were replaced"
