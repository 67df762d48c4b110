"""The engine: results equal the pipeline's, requests share passes, and every way a request can end."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unialignment.errors import InputError
from unialignment.serving.engine import (
    DeadlineError,
    Done,
    EmbedRequest,
    Engine,
    EngineClosedError,
    EngineSettings,
    Failed,
    Preview,
    Progress,
    QueueFullError,
    RequestCancelledError,
    TaskRequest,
    TextSoFar,
)
from unialignment.serving.handle import MAX_PENDING, Handle
from unialignment.serving.jobs import settled_text

WAIT = 60.0  # seconds; generous, as machines may be busy


class Gate:
    """Lets a pipeline's denoising passes through only while it is open, and notes their batch sizes."""

    def __init__(self, pipe: Any, open: bool = True) -> None:
        self.open, self.arrived = threading.Event(), threading.Event()
        self.rows: list[int] = []
        self.fail_if: Any = lambda **_: False
        real = pipe.transformer.denoise
        if open:
            self.open.set()

        def denoise(cache: Any, **given: Any) -> Any:
            self.arrived.set()
            assert self.open.wait(WAIT)
            self.rows.append(cache.batch_size)
            if self.fail_if(cache=cache, **given):
                raise RuntimeError("this row is poison")
            return real(cache, **given)

        pipe.transformer.denoise = denoise


@pytest.fixture
def pipe(make_tiny_pipeline: Any) -> Any:
    return make_tiny_pipeline()


@pytest.fixture(scope="module")
def pictures(tiny_pipeline: Any) -> list[Any]:
    return [tiny_pipeline.generate(text, seed=seed).images[0] for seed, text in enumerate(("a dog", "a cat"))]


def every_kind(pictures: list[Any]) -> list[TaskRequest]:
    """All tasks, solvers, decodings, guidance settings and numbers of steps, mixed."""
    first, second = pictures
    return [
        TaskRequest("generate", "a dog", options={"seed": 1}, previews=3),
        TaskRequest(
            "generate", "a red apple and a cat on the blue background",
            options={"seed": 2, "num_inference_steps": 7, "solver": "heun", "guidance_interval": (0.3, 0.9),
                     "num_images_per_prompt": 3, "shift": 2.0},
        ),
        TaskRequest("generate", None, options={"seed": 5, "guidance_scale": 1.0, "num_inference_steps": 3}),
        TaskRequest("generate", "a cat", options={"seed": 3, "solver": "stochastic", "num_images_per_prompt": 2}),
        TaskRequest("generate", "a dog", options={"seed": 1, "best_of": 3, "num_images_per_prompt": 2}),
        TaskRequest(
            "edit", "red", (first,),
            options={"seed": 1, "best_of": 2, "num_images_per_prompt": 2, "best_of_text": "a red dog",
                     "num_inference_steps": 3},
        ),
        TaskRequest("generate", "a cat", options={"seed": 9, "width": 16, "height": 32, "num_inference_steps": 4,
                                               "solver": "dpmpp"}),
        TaskRequest("edit", "replace dog by cat", (first,), options={"seed": 4, "image_guidance_scale": 1.5}),
        TaskRequest("edit", "red", (first.resize((50, 20)),), options={"seed": 4, "fit": "pad"}),
        TaskRequest("perceive", "the dog", (second,), kind="segment", options={"seed": 4}),
        TaskRequest("perceive", None, (second,), kind="depth", options={"seed": 4}),
        TaskRequest("control", "the dog", (second,), kind="edges", options={"seed": 4, "num_inference_steps": 5}),
        TaskRequest("compose", "a dog next to cat", (first, second), options={"seed": 4, "negative_prompt": "red"}),
        TaskRequest("compose", "a dog next to cat", (first, second, first), options={"seed": 6}),
        TaskRequest("caption", None, (first,), previews=1),
        TaskRequest("caption", None, (second,), options={"decoding": "ancestral", "temperature": 0.8, "seed": 3}),
        TaskRequest("answer", "what is the dog", (second,), options={"guidance_scale": 2.0, "seed": 1}),
        TaskRequest("caption", None, (second,), options={"confidence_threshold": 0.02}),
        TaskRequest("infill", "a ___ next to ___ dog", (second,)),
        TaskRequest("answer", "what is the dog", (second,), options={"image_guidance_scale": 2.0, "seed": 1}),
        TaskRequest("answer", "what is a dog", (second,), options={"image_guidance_scale": 2.0, "guidance_scale": 3.0}),
        TaskRequest("rewrite", "a dog left of a cat", options={"seed": 3}),
        TaskRequest("generate", "a dog", options={"seed": 1, "rewrite": True, "num_inference_steps": 3}),
        TaskRequest(
            "generate", "a dog and an apple",
            options={"seed": 8, "rewrite": True, "num_images_per_prompt": 2, "best_of": 3, "num_inference_steps": 3},
        ),
        TaskRequest("generate", None, options={"seed": 8, "rewrite": True, "num_inference_steps": 3}),
    ]  # fmt: skip


def alone(pipe: Any, request: TaskRequest) -> Any:
    images = [list(request.images)] if request.images else None
    return pipe.run(request.task, request.prompt, images, kind=request.kind, progress=False, **request.options)


@pytest.mark.parametrize("mode", ["prefix", "joint"])
def test_together_as_alone(make_tiny_pipeline: Any, pictures: list[Any], mode: str) -> None:
    pipe = make_tiny_pipeline(attention_mode=mode)
    requests = every_kind(pictures)
    with Engine(pipe) as engine:
        handles = []
        for number, request in enumerate(requests):
            handles.append(engine.submit(request))
            if number % 4 == 3:  # so that later ones join while earlier ones are under way
                time.sleep(0.02)
        results = [handle.result(WAIT) for handle in handles]
        stats = engine.stats()
    for request, together in zip(requests, results, strict=True):
        single: Any = alone(pipe, request)
        assert together.settings == single.settings
        assert together.prompts == single.prompts
        if "seed" in request.options:
            assert together.seeds == single.seeds
        if request.task in ("caption", "answer", "infill", "rewrite"):
            assert together.texts == single.texts, request
            continue
        assert len(together.images) == len(single.images)
        assert together.revised_prompts == single.revised_prompts
        assert together.scores == pytest.approx(single.scores, abs=1e-5)
        for one, other in zip(together.images, single.images, strict=True):
            assert one.size == other.size
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1, request
    assert stats.completed == len(requests)
    assert stats.active == stats.queued == stats.reserved_bytes == 0


def test_requests_share_passes_and_late_ones_join(pipe: Any) -> None:
    gate = Gate(pipe, open=False)
    with Engine(pipe) as engine:
        first = engine.submit(TaskRequest("generate", "a dog", options={"seed": 1, "num_inference_steps": 6}))
        assert gate.arrived.wait(WAIT)  # it is within its first step
        others = [
            engine.submit(TaskRequest("generate", "a cat", options={"seed": i, "num_inference_steps": 2 + i}))
            for i in range(3)
        ]
        gate.open.set()
        for handle in (first, *others):
            handle.result(WAIT)
    # Guidance makes two rows of each: alone at first, then all four at different steps in one pass.
    assert gate.rows[0] == 2
    assert gate.rows[1] == 8
    assert len(gate.rows) == 6  # as many passes as the longest has steps


def test_embeddings_of_several_requests(pipe: Any, pictures: list[Any]) -> None:
    with Engine(pipe) as engine:
        one = engine.submit(EmbedRequest(("a dog", "the  red cat"), (pictures[0],)))
        other = engine.submit(EmbedRequest(images=(pictures[1].resize((40, 20)), pictures[0])))
        vectors, pictured = one.result(WAIT), other.result(WAIT)
    assert isinstance(vectors, torch.Tensor)
    assert isinstance(pictured, torch.Tensor)
    torch.testing.assert_close(vectors[:2], pipe.embed_text(["a dog", "the red cat"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(vectors[2:], pipe.embed_image(pictures[0]), atol=1e-5, rtol=0)
    expected = pipe.embed_image([pictures[1].resize((40, 20)), pictures[0]])
    torch.testing.assert_close(pictured, expected, atol=1e-5, rtol=0)


def test_events_of_a_picture(pipe: Any) -> None:
    options = {"seed": 1, "num_inference_steps": 8, "num_images_per_prompt": 2}
    with Engine(pipe) as engine:
        events = list(engine.submit(TaskRequest("generate", "a dog", options=options, previews=3)))
    assert isinstance(events[-1], Done)
    for index in range(2):
        own = [event for event in events[:-1] if isinstance(event, Progress) and event.index == index]
        assert sorted(event.step for event in own) == list(range(1, 9))
        previews = [event for event in own if isinstance(event, Preview)]
        assert [event.number for event in previews] == [0, 1, 2]
        assert all(event.image.size == (32, 32) and 1 <= event.step < 8 for event in previews)


def test_previews_approach_the_picture(pipe: Any) -> None:
    with Engine(pipe) as engine:
        events = list(engine.submit(TaskRequest("generate", "a dog", options={"seed": 1}, previews=100)))
    final = np.asarray(events[-1].result.images[0], float)
    errors = [np.abs(np.asarray(event.image, float) - final).mean() for event in events if isinstance(event, Preview)]
    assert len(errors) == 19  # never more than there are steps before the last
    assert errors[-1] < errors[0]


def test_events_of_a_text_only_ever_settle(pipe: Any, pictures: list[Any]) -> None:
    with Engine(pipe) as engine:
        events = list(engine.submit(TaskRequest("caption", None, (pictures[0],), previews=1)))
    final = events[-1].result.texts[0]
    seen = [event for event in events if isinstance(event, TextSoFar)]
    assert len(seen) > 3
    assert any("[MASK]" in event.text for event in seen)
    for before, after in zip(seen, [*seen[1:]], strict=False):
        assert after.settled.startswith(before.settled)
    assert all(final.startswith(event.settled) for event in seen)
    assert any(0 < len(event.settled) < len(final) for event in seen)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_settled_text_is_a_prefix_of_whatever_follows(tiny_pipeline: Any, data: Any) -> None:
    tokenizer = tiny_pipeline.tokenizer
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1).filter(lambda i: i != 1), min_size=1, max_size=12))
    hidden = data.draw(st.sets(st.integers(0, len(ids) - 1)))
    partial = [tokenizer.mask_token_id if place in hidden else token for place, token in enumerate(ids)]
    assert tokenizer.decode([ids])[0].startswith(settled_text(tokenizer, partial))


def test_async_reading(pipe: Any, pictures: list[Any]) -> None:
    async def read(engine: Engine) -> tuple[list[Any], Any]:
        handle = await asyncio.to_thread(engine.submit, TaskRequest("answer", "what is the dog", (pictures[0],)))
        events = [event async for event in handle]
        return events, await engine.submit(TaskRequest("generate", "a dog", options={"seed": 3}))

    with Engine(pipe) as engine:
        events, result = asyncio.run(asyncio.wait_for(read(engine), WAIT))
    assert isinstance(events[-1], Done)
    assert result.seeds == [3]


# ------------------------------------------------------------------------------------------------------ other endings


def test_a_full_queue_refuses(pipe: Any) -> None:
    gate = Gate(pipe, open=False)
    with Engine(pipe, EngineSettings(max_queue=2, max_active=1)) as engine:
        request = TaskRequest("generate", "a dog", options={"num_inference_steps": 1})
        running = engine.submit(request)
        assert gate.arrived.wait(WAIT)
        waiting = [engine.submit(request) for _ in range(2)]
        with pytest.raises(QueueFullError) as caught:
            engine.submit(request)
        assert caught.value.retry_after >= 1
        assert engine.stats().refused == 1
        gate.open.set()
        for handle in (running, *waiting):
            handle.result(WAIT)
        assert engine.submit(request).result(WAIT)  # there is room again


def test_cancelling_what_waits_and_what_runs(pipe: Any) -> None:
    gate = Gate(pipe, open=False)
    with Engine(pipe, EngineSettings(max_active=1)) as engine:
        request = TaskRequest("generate", "a dog")
        running = engine.submit(request)
        assert gate.arrived.wait(WAIT)
        waiting = engine.submit(request)
        waiting.cancel()
        with pytest.raises(RequestCancelledError):
            waiting.result(WAIT)  # at once, although nothing moves
        running.cancel()
        gate.open.set()
        with pytest.raises(RequestCancelledError):
            running.result(WAIT)
        running.cancel()  # again, without effect
        assert len(gate.rows) == 1  # it stopped after the step that it was in
        assert engine.submit(request).result(WAIT)
        stats = engine.stats()
    assert (stats.cancelled, stats.completed, stats.reserved_bytes) == (2, 1, 0)


def test_cancelling_from_many_threads_at_once(pipe: Any) -> None:
    with Engine(pipe) as engine:
        handles = [engine.submit(TaskRequest("generate", "a dog", options={"seed": i})) for i in range(12)]
        threads = [threading.Thread(target=handle.cancel) for handle in handles[::2] for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for handle in handles[1::2]:
            assert handle.result(WAIT)
        for handle in handles[::2]:
            assert handle.done or isinstance(list(handle)[-1], (Failed, Done))
        stats = engine.stats()
        assert stats.completed + stats.cancelled == 12


@pytest.mark.parametrize("active", [True, False])
def test_deadlines_end_what_runs_and_what_waits(pipe: Any, active: bool) -> None:
    gate = Gate(pipe, open=False)
    with Engine(pipe, EngineSettings(max_active=1)) as engine:
        long = engine.submit(TaskRequest("generate", "a dog", timeout=0.05 if active else None))
        assert gate.arrived.wait(WAIT)
        late = long if active else engine.submit(TaskRequest("generate", "a cat", timeout=0.05))
        time.sleep(0.1)
        gate.open.set()
        with pytest.raises(DeadlineError, match=r"0\.05 s"):
            late.result(WAIT)
        if not active:
            assert long.result(WAIT)
        assert engine.stats().expired == 1


def test_priority_goes_first(pipe: Any) -> None:
    gate = Gate(pipe, open=False)
    with Engine(pipe, EngineSettings(max_active=1)) as engine:
        request = {"prompt": "a dog", "options": {"num_inference_steps": 1}}
        running = engine.submit(TaskRequest("generate", **request))  # type: ignore[arg-type]
        assert gate.arrived.wait(WAIT)
        order = (0, -5, 3, 0)
        handles = [engine.submit(TaskRequest("generate", priority=p, **request)) for p in order]  # type: ignore[arg-type]
        gate.open.set()
        ends: list[int] = []
        for handle in (running, *handles):
            handle.result(WAIT)
        done = [next(event for event in handle if isinstance(event, Done)).queued_seconds for handle in handles]
        ends = sorted(range(4), key=lambda i: handles[i].submitted + done[i])
    assert ends == [2, 0, 3, 1]


def test_memory_bounds_what_runs_together(pipe: Any) -> None:
    request = TaskRequest("generate", "a dog", options={"num_inference_steps": 2, "seed": 1})
    with Engine(pipe) as engine:
        from unialignment.serving.plans import make_plan

        needed = make_plan(pipe, request, engine.settings).bytes
    gate = Gate(pipe)
    with Engine(pipe, EngineSettings(memory_bytes=int(2.5 * needed))) as engine:
        handles = [engine.submit(request) for _ in range(5)]
        for handle in handles:
            handle.result(WAIT)
        assert engine.stats().reserved_bytes == 0
    assert max(gate.rows) <= 4  # two requests of two rows
    with (
        Engine(pipe, EngineSettings(memory_bytes=needed - 1)) as engine,
        pytest.raises(InputError, match="fewer or smaller"),
    ):
        engine.submit(request)


def test_rows_bound_a_pass(pipe: Any) -> None:
    gate = Gate(pipe)
    options = {"num_inference_steps": 2, "num_images_per_prompt": 5, "seed": 1}
    with Engine(pipe, EngineSettings(max_rows=4)) as engine:
        together = engine.submit(TaskRequest("generate", "a dog", options=options)).result(WAIT)
    assert max(gate.rows) <= 4
    single = pipe.generate("a dog", **options)
    for one, other in zip(together.images, single.images, strict=True):  # type: ignore[union-attr]
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_one_request_that_breaks_a_pass_fails_alone(pipe: Any) -> None:
    gate = Gate(pipe)
    with Engine(pipe) as engine:
        # Only the poisonous request reaches this noise level.
        gate.fail_if = lambda timestep, **_: bool(((timestep > 332) & (timestep < 335)).any())
        good = [engine.submit(TaskRequest("generate", "a dog", options={"seed": i})) for i in range(3)]
        bad = engine.submit(TaskRequest("generate", "a dog", options={"num_inference_steps": 3}))
        for handle in good:
            assert handle.result(WAIT)
        with pytest.raises(RuntimeError, match="poison"):
            bad.result(WAIT)
        assert engine.alive
        stats = engine.stats()
    assert (stats.completed, stats.failed) == (3, 1)


def test_closing_fails_what_is_left_and_refuses_more(pipe: Any) -> None:
    gate = Gate(pipe, open=False)
    engine = Engine(pipe, EngineSettings(max_active=1))
    handles = [engine.submit(TaskRequest("generate", "a dog")) for _ in range(3)]
    assert gate.arrived.wait(WAIT)
    threading.Timer(0.1, gate.open.set).start()
    engine.close()
    for handle in handles:
        with pytest.raises(EngineClosedError):
            handle.result(WAIT)
    with pytest.raises(EngineClosedError):
        engine.submit(TaskRequest("generate", "a dog"))
    engine.close()  # again, without effect
    assert not engine.alive


def test_closing_with_time_finishes_the_work(pipe: Any) -> None:
    engine = Engine(pipe)
    handles = [engine.submit(TaskRequest("generate", "a dog", options={"seed": i})) for i in range(3)]
    engine.close(drain=WAIT)
    assert all(handle.result(0).seeds == [i] for i, handle in enumerate(handles))  # type: ignore[union-attr]


def test_a_dead_thread_fails_requests_instead_of_hanging(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(pipe)

    def die() -> None:
        raise SystemError("a defect of the scheduler")

    monkeypatch.setattr(engine._scheduler, "round", die)
    with pytest.raises(EngineClosedError, match="SystemError"):
        engine.submit(TaskRequest("generate", "a dog")).result(WAIT)
    assert not engine.alive
    with pytest.raises(EngineClosedError):
        engine.submit(TaskRequest("generate", "a dog"))


def test_a_slow_reader_costs_bounded_memory_and_gets_the_end() -> None:
    handle = Handle(1, TaskRequest("generate"), lambda: None)
    for step in range(10 * MAX_PENDING):
        handle.emit(Progress(0, step + 1, 10 * MAX_PENDING))
    handle.emit(Done(torch.zeros(1)))
    events = list(handle)
    assert len(events) <= MAX_PENDING + 1
    assert isinstance(events[-1], Done)
    assert events[-2] == Progress(0, 10 * MAX_PENDING, 10 * MAX_PENDING)


@pytest.mark.parametrize(
    "request_, message",
    [
        (TaskRequest("nonsense", "x"), "unknown task"),
        (TaskRequest("edit", "x"), "takes 1 picture"),
        (TaskRequest("generate", "a dog", options={"batch_size": 3}), "batch_size"),
        (TaskRequest("generate", "a dog", options={"num_inference_steps": 100_000}), "more than 200"),
        (TaskRequest("generate", "a dog", options={"num_images_per_prompt": 17}), "17 pictures"),
        (TaskRequest("generate", "a dog", options={"width": 17}), "multiple of"),
        (TaskRequest("generate", "dog " * 200), "too long"),
        (TaskRequest("generate", "a dog", options={"guidance_scale": float("nan")}), "finite"),
        (TaskRequest("caption", None, (b"<svg xmlns='http://www.w3.org/2000/svg'/>",)), "SVG"),
        (EmbedRequest(), "1 to"),
        (EmbedRequest(texts=("a",) * 1000), "1 to"),
    ],
)
def test_unusable_requests_are_refused_at_once(tiny_pipeline: Any, request_: Any, message: str) -> None:
    with Engine(tiny_pipeline) as engine:
        with pytest.raises(InputError, match=message):
            engine.submit(request_)
        assert engine.stats().submitted == 0
