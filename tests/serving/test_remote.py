"""The engine in front of replicas: what was accepted is answered, whatever dies meanwhile."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from PIL import Image

from unialignment.errors import InputError
from unialignment.outputs import TextResult
from unialignment.serving.remote import ModelFacts, RemoteEngine, ReplicaLostError
from unialignment.serving.requests import (
    DeadlineError,
    Done,
    EmbedRequest,
    EngineClosedError,
    EngineSettings,
    Event,
    Failed,
    Progress,
    QueueFullError,
    RequestCancelledError,
    TaskRequest,
)

FACTS = ModelFacts("fake", 64, {}, 32)
STEPS = 4


class LostError(Exception):
    """Stands for Ray's."""


class FullError(Exception):
    """Stands for Ray's."""


class Replicas:
    """A backend whose n-th stream behaves as the n-th script says; further ones go well."""

    def __init__(self, *scripts: Callable[[int], Event | BaseException | None]) -> None:
        self.scripts = list(scripts)
        self.requests: list[TaskRequest | EmbedRequest] = []
        self.closed = 0
        self.hold: asyncio.Event | None = None

    async def stream(self, request: TaskRequest | EmbedRequest) -> AsyncIterator[Event]:
        attempt = len(self.requests)
        self.requests.append(request)
        script = self.scripts[attempt] if attempt < len(self.scripts) else (lambda step: None)
        try:
            for step in range(1, STEPS + 1):
                await asyncio.sleep(0)
                told = script(step)
                if isinstance(told, BaseException):
                    raise told
                yield told or Progress(0, step, STEPS)
            options = getattr(request, "options", {})
            yield Done(TextResult([f"seed {options.get('seed')}"], [0], [""], "caption", "fake"))
        finally:
            self.closed += 1

    def is_loss(self, error: BaseException) -> bool:
        return isinstance(error, LostError)

    def is_full(self, error: BaseException) -> bool:
        return isinstance(error, FullError)


def dies_at(step: int) -> Callable[[int], BaseException | None]:
    return lambda now: LostError("killed") if now == step else None


def engine(backend: Replicas, **options: object) -> RemoteEngine:
    return RemoteEngine(backend, FACTS, EngineSettings(max_queue=1, max_active=1), pause=0.001, **options)


def test_a_request_outlives_its_replicas_and_tells_no_step_twice() -> None:
    backend = Replicas(dies_at(3), dies_at(1), dies_at(4))
    with engine(backend) as remote:
        events = list(remote.submit(TaskRequest("caption")))
    assert [event.step for event in events[:-1]] == [1, 2, 3, 4]
    assert isinstance(events[-1], Done)
    assert remote.retries == 3
    assert len(backend.requests) == 4


def test_every_attempt_has_the_seed_of_the_first() -> None:
    backend = Replicas(dies_at(2), dies_at(2))
    with engine(backend) as remote:
        remote.submit(TaskRequest("generate")).result(60)
    seeds = [request.options["seed"] for request in backend.requests]
    assert len(seeds) == 3
    assert len(set(seeds)) == 1
    assert isinstance(seeds[0], int)


def test_a_given_seed_is_kept() -> None:
    backend = Replicas(dies_at(1))
    with engine(backend) as remote:
        assert remote.submit(TaskRequest("generate", options={"seed": 5})).result(60).texts == ["seed 5"]


def test_it_gives_up_with_a_clear_error() -> None:
    backend = Replicas(*[dies_at(1)] * 9)
    with engine(backend, attempts=3) as remote, pytest.raises(ReplicaLostError, match="3 replicas died"):
        remote.submit(TaskRequest("caption")).result(60)
    assert len(backend.requests) == 3
    assert remote.stats().failed == 1


def test_a_replica_that_shuts_down_is_not_the_end() -> None:
    backend = Replicas(lambda step: Failed(EngineClosedError("draining")))
    with engine(backend) as remote:
        assert remote.submit(TaskRequest("caption")).result(60).texts


@pytest.mark.parametrize("error", [InputError("bad prompt"), ZeroDivisionError("a defect")])
def test_what_the_replica_refuses_is_not_tried_again(error: Exception) -> None:
    for script in (lambda step: Failed(error), lambda step: error):
        backend = Replicas(script)
        with engine(backend) as remote, pytest.raises(type(error), match=str(error)):
            remote.submit(TaskRequest("caption")).result(60)
        assert len(backend.requests) == 1


def test_full_replicas_mean_try_again_later() -> None:
    with engine(Replicas(lambda step: FullError())) as remote, pytest.raises(QueueFullError):
        remote.submit(TaskRequest("caption")).result(60)


class Waiting(Replicas):
    """Never answers until it is cancelled."""

    async def stream(self, request: TaskRequest | EmbedRequest) -> AsyncIterator[Event]:
        self.requests.append(request)
        try:
            yield Progress(0, 1, STEPS)
            await asyncio.Event().wait()
        finally:
            self.closed += 1


def test_what_is_accepted_is_bounded() -> None:
    remote = engine(Waiting(), replicas=2)
    for _ in range(4):
        remote.submit(TaskRequest("caption"))
    with pytest.raises(QueueFullError):
        remote.submit(TaskRequest("caption"))
    assert remote.stats().refused == 1
    remote.close()


def test_cancelling_reaches_the_replica_and_frees_the_place() -> None:
    backend = Waiting()
    with engine(backend) as remote:
        handle = remote.submit(TaskRequest("caption"))
        assert isinstance(next(iter(handle)), Progress)
        handle.cancel()
        with pytest.raises(RequestCancelledError):
            handle.result(60)
        assert remote.stats().active == 0
        assert remote.stats().cancelled == 1
    assert backend.closed == 1


def test_a_deadline_holds_over_all_attempts() -> None:
    backend = Waiting()
    with engine(backend) as remote, pytest.raises(DeadlineError):
        remote.submit(TaskRequest("caption", timeout=0.05)).result(60)
    assert backend.closed == 1


def test_closing_answers_what_is_left() -> None:
    remote = engine(Waiting())
    handle = remote.submit(TaskRequest("caption"))
    remote.close()
    with pytest.raises(EngineClosedError):
        handle.result(60)
    with pytest.raises(EngineClosedError):
        remote.submit(TaskRequest("caption"))


def test_pictures_travel_as_bytes(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGB", (4, 4)).save(path)
    backend = Replicas()
    with engine(backend) as remote:
        remote.submit(TaskRequest("caption", images=(str(path),))).result(60)
        remote.submit(EmbedRequest(images=(path,))).result(60)
        for missing in (str(tmp_path / "none.png"), "http://example.org/a.png", "\0"):
            with pytest.raises(InputError):
                remote.submit(TaskRequest("caption", images=(missing,)))
    assert [request.images[0] for request in backend.requests] == [path.read_bytes()] * 2
    pickle.dumps(backend.requests)  # a frozen mapping in a request would not survive the way


def test_facts_survive_the_way(tiny_pipeline) -> None:
    facts = pickle.loads(pickle.dumps(ModelFacts.of(tiny_pipeline)))
    assert (facts.name, facts.default_size, facts.text_limit) == ("tiny", tiny_pipeline.default_size, 48)
    assert facts.tasks.get("caption").target == "text"
    assert facts.tokenizer.encode(["a dog"])[0].tolist() == tiny_pipeline.tokenizer.encode(["a dog"])[0].tolist()
