"""The official OpenAI client against a running server: what it sends works, and what it gets back is the pipeline's."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
openai = pytest.importorskip("openai", reason="the extra 'eval' is not installed")

from PIL import Image  # noqa: E402

from unialignment.diffusion.solvers import SOLVERS  # noqa: E402
from unialignment.serving.app import create_app  # noqa: E402
from unialignment.serving.chat_api import cut, task_of  # noqa: E402
from unialignment.serving.engine import Engine, EngineSettings  # noqa: E402
from unialignment.serving.images_api import perception_of  # noqa: E402
from unialignment.serving.pictures import drawn_size  # noqa: E402
from unialignment.serving.schemas import Solver  # noqa: E402
from unialignment.serving.server import BackgroundServer  # noqa: E402
from unialignment.serving.settings import ServerSettings  # noqa: E402
from unialignment.tasks import TASKS  # noqa: E402

KEY = "sk-test"


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def picture(data: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data.b64_json)))


def data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def ask(text: str, *images: Image.Image) -> list[Any]:
    parts: list[Any] = [{"type": "text", "text": text}]
    parts += [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return [{"role": "user", "content": parts}]


def assert_same(one: Image.Image, other: Image.Image) -> None:
    assert np.abs(np.asarray(one.convert("RGB"), int) - np.asarray(other, int)).max() <= 1


@pytest.fixture(scope="module")
def pipe(make_tiny_pipeline: Any) -> Any:
    return make_tiny_pipeline()


@pytest.fixture(scope="module")
def images(pipe: Any) -> list[Image.Image]:
    return [pipe.generate(text, seed=seed).images[0] for seed, text in enumerate(("a dog", "a cat"))]


@pytest.fixture(scope="module")
def server(pipe: Any) -> Iterator[BackgroundServer]:
    settings = ServerSettings(port=0, api_keys=("other", KEY), aliases=("gpt-image-1",), web=False)
    with Engine(pipe) as engine, BackgroundServer(create_app(engine, settings)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: BackgroundServer) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60)


def test_generate(client: Any, pipe: Any) -> None:
    answer = client.images.generate(model="tiny", prompt="a red dog", extra_body={"seed": 7})
    drawn = picture(answer.data[0])
    assert_same(drawn, pipe.generate("a red dog", seed=7).images[0])
    assert '"seed": 7' in drawn.text["unialignment"]  # type: ignore[attr-defined]
    assert answer.size == "32x32"
    assert answer.usage.output_tokens == 16


def test_generate_several_with_settings(client: Any, pipe: Any) -> None:
    options = {"num_inference_steps": 5, "guidance_scale": 1.5, "solver": "heun", "negative_prompt": "blue"}
    answer = client.images.generate(prompt="a dog", n=3, output_format="webp", extra_body={"seed": 3, **options})
    assert [data.seed for data in answer.data] == [3, 4, 5]
    assert {picture(data).format for data in answer.data} == {"WEBP"}
    answer = client.images.generate(prompt="a dog", n=3, extra_body={"seed": 3, **options})
    expected = pipe.generate("a dog", seed=3, num_images_per_prompt=3, **options).images
    for data, image in zip(answer.data, expected, strict=True):
        assert_same(picture(data), image)


def test_prompts_are_rewritten_on_demand(client: Any, pipe: Any) -> None:
    options = {"seed": 3, "num_inference_steps": 3}
    answer = client.images.generate(prompt="a dog", n=2, extra_body={**options, "rewrite": True})
    expected = pipe.generate("a dog", num_images_per_prompt=2, rewrite=True, **options)
    assert [data.revised_prompt for data in answer.data] == expected.revised_prompts
    for data, image in zip(answer.data, expected.images, strict=True):
        assert_same(picture(data), image)
    assert client.images.generate(prompt="a dog", extra_body=options).data[0].revised_prompt is None
    stream = client.images.generate(
        prompt="a dog", stream=True, partial_images=1, extra_body={**options, "rewrite": True}
    )
    assert_same(picture(list(stream)[-1]), expected.images[0])
    said = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a dog"}], seed=3, extra_body={"task": "rewrite"}
    )
    assert said.choices[0].message.content == expected.revised_prompts[0]


def test_every_solver_can_be_asked_for(client: Any, pipe: Any, images: list[Image.Image]) -> None:
    assert get_args(Solver) == SOLVERS
    options = {"seed": 3, "num_inference_steps": 3, "solver": "dpmpp"}
    drawn = client.images.generate(prompt="a dog", extra_body=options)
    assert_same(picture(drawn.data[0]), pipe.generate("a dog", **options).images[0])
    edited = client.images.edit(image=png(images[0]), prompt="a blue dog", extra_body=options)
    assert_same(picture(edited.data[0]), pipe.edit("a blue dog", images[0], **options).images[0])


def test_the_sizes_that_applications_ask_for(client: Any, pipe: Any) -> None:
    answer = client.images.generate(model="gpt-image-1", prompt="a dog", size="1024x512", extra_body={"seed": 1})
    assert picture(answer.data[0]).size == (1024, 512)
    exact = client.images.generate(prompt="a dog", extra_body={"seed": 1, "width": 16, "height": 32})
    assert_same(picture(exact.data[0]), pipe.generate("a dog", seed=1, width=16, height=32).images[0])


def test_generate_streams_partial_images(client: Any, pipe: Any) -> None:
    stream = client.images.generate(prompt="a dog", stream=True, partial_images=2, extra_body={"seed": 1})
    events = list(stream)
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert_same(picture(events[-1]), pipe.generate("a dog", seed=1).images[0])
    assert events[-1].usage.total_tokens > 0


def test_edit(client: Any, pipe: Any, images: list[Image.Image]) -> None:
    answer = client.images.edit(image=png(images[0]), prompt="a blue dog", extra_body={"seed": 2})
    assert_same(picture(answer.data[0]), pipe.edit("a blue dog", images[0], seed=2).images[0])
    stream = client.images.edit(
        image=png(images[0]), prompt="a blue dog", stream=True, partial_images=1, extra_body={"seed": 2}
    )
    assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]


def test_two_images_compose(client: Any, pipe: Any, images: list[Image.Image]) -> None:
    files = [("a.png", png(images[0]), "image/png"), ("../../etc/passwd", png(images[1]), "text/plain")]
    answer = client.images.edit(image=files, prompt="a dog next to the cat", extra_body={"seed": 2})
    assert answer.task == "compose"
    assert_same(picture(answer.data[0]), pipe.compose("a dog next to the cat", images, seed=2).images[0])


@pytest.mark.parametrize(
    ("prompt", "extra", "kind", "of"),
    [
        ("segment the dog", {}, "segment", "the dog"),
        ("Estimate the depth.", {}, "depth", None),
        ("whatever", {"kind": "edges"}, "edges", None),
        ("the dog", {"task": "perceive", "kind": "segment"}, "segment", "the dog"),
        ("segment the dog", {"kind": "segment"}, "segment", "the dog"),
    ],
)
def test_perception_by_prompt_or_field(
    client: Any, pipe: Any, images: list[Image.Image], prompt: str, extra: dict[str, str], kind: str, of: str | None
) -> None:
    answer = client.images.edit(image=png(images[0]), prompt=prompt, extra_body={"seed": 2, **extra})
    assert answer.task == "perceive"
    assert_same(picture(answer.data[0]), pipe.perceive(images[0], kind, of, seed=2).images[0])


def test_control(client: Any, pipe: Any, images: list[Image.Image]) -> None:
    extra = {"task": "control", "kind": "depth", "seed": 2}
    answer = client.images.edit(image=png(images[0]), prompt="a cat", extra_body=extra)
    assert_same(picture(answer.data[0]), pipe.control("a cat", images[0], "depth", seed=2).images[0])


def test_caption(client: Any, pipe: Any, images: list[Image.Image]) -> None:
    answer = client.chat.completions.create(model="tiny", messages=ask("Describe this picture.", images[0]))
    assert answer.choices[0].message.content == pipe.caption(images[0]).texts[0]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_question_and_infill(client: Any, pipe: Any, images: list[Image.Image]) -> None:
    question = "what is on the background?"
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "Be brief."}, *ask(question, images[0])],
        extra_body={"num_inference_steps": 3},
    )
    expected = pipe.answer(images[0], question, num_inference_steps=3).texts[0]
    assert answer.choices[0].message.content == expected
    filled = client.chat.completions.create(model="tiny", messages=ask("a ___ next to the [MASK]", images[0]))
    assert filled.choices[0].message.content == pipe.infill(images[0], "a ___ next to the [MASK]").texts[0]


def test_a_follow_up_question_is_about_the_last_picture(client: Any, pipe: Any, images: list[Image.Image]) -> None:
    messages = [
        *ask("what is this?", images[0]),
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "is the dog red?"},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, n=2, temperature=0.9, seed=4)
    for seed, choice in zip((4, 5), answer.choices, strict=True):
        expected = pipe.answer(images[0], "is the dog red?", temperature=0.9, seed=seed).texts[0]
        assert choice.message.content == expected


@pytest.mark.parametrize("text", ["Describe this picture.", "what is on the background?"])
def test_streamed_deltas_add_up(client: Any, images: list[Image.Image], text: str) -> None:
    request = {"model": "tiny", "messages": ask(text, images[0])}
    chunks = list(
        client.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}, extra_body={"num_inference_steps": 8}
        )
    )
    whole = client.chat.completions.create(**request, extra_body={"num_inference_steps": 8}).choices[0].message.content
    deltas = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(deltas) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens > 0


def test_the_canvas_can_be_watched(client: Any, images: list[Image.Image]) -> None:
    extra = {"stream_options": {"include_canvas": True}}
    stream = client.chat.completions.create(model="tiny", messages=ask("", images[0]), stream=True, extra_body=extra)
    canvases = [chunk.canvas for chunk in stream if getattr(chunk, "canvas", None) is not None]
    assert "[MASK]" in canvases[0]
    assert "[MASK]" not in canvases[-1]


def test_stop_sequences(client: Any, images: list[Image.Image]) -> None:
    request = {"model": "tiny", "messages": ask("", images[0])}
    whole = client.chat.completions.create(**request).choices[0].message.content
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    cut_off = client.chat.completions.create(**request, stop=[stop]).choices[0].message.content
    assert cut_off == whole[: whole.find(stop)]
    stream = client.chat.completions.create(**request, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == cut_off


def test_embeddings(client: Any, pipe: Any, images: list[Image.Image]) -> None:
    answer = client.embeddings.create(model="tiny", input=["a dog", data_url(images[0]), "the cat"])
    vectors = np.array([entry.embedding for entry in answer.data])
    np.testing.assert_allclose(vectors[[0, 2]], pipe.embed_text(["a dog", "the cat"]).numpy(), atol=1e-5)
    np.testing.assert_allclose(vectors[1:2], pipe.embed_image(images[0]).numpy(), atol=1e-5)
    plain = client.embeddings.create(model="tiny", input="a dog", encoding_format="float")
    np.testing.assert_allclose(plain.data[0].embedding, vectors[0], atol=1e-5)


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "gpt-image-1"]
    assert client.models.retrieve("tiny").owned_by == "unialignment"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")


def test_operation_needs_no_key(server: BackgroundServer) -> None:
    import urllib.request

    def get(path: str) -> str:
        with urllib.request.urlopen(server.url + path, timeout=60) as response:
            return str(response.read().decode())

    assert get("/healthz") == get("/readyz") == '{"status":"ok"}'
    metrics = get("/metrics")
    assert "unialign_engine_completed_total" in metrics
    assert 'unialign_http_requests_total{method="GET",route="/healthz",status="200"}' in metrics
    assert "/v1/images/edits" in get("/openapi.json")


def test_the_documentation_page_needs_nobody_else(server: BackgroundServer) -> None:
    import urllib.request

    page = urllib.request.urlopen(f"{server.url}/docs", timeout=60).read().decode()
    document = json.loads(urllib.request.urlopen(f"{server.url}/openapi.json", timeout=60).read())
    for path in document["paths"]:
        assert path in page
    for schema in document["components"]["schemas"].values():
        for field in schema.get("properties", ()):
            assert f"<code>{field}</code>" in page, field
    for field in ("image", "kind", "num_inference_steps"):  # of the form
        assert f"<code>{field}</code>" in page
    assert '"segment"'.replace('"', "&quot;") in page
    assert "<script" not in page
    assert "//" not in page.replace("application/", "")  # no address of another machine


def test_a_stopped_engine_is_not_ready(make_tiny_pipeline: Any) -> None:
    import urllib.error
    import urllib.request

    engine = Engine(make_tiny_pipeline())
    with BackgroundServer(create_app(engine, ServerSettings(port=0, web=False))) as running:
        engine.close()
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{running.url}/readyz", timeout=60)
        assert caught.value.code == 503
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError) as refused:
            client.images.generate(prompt="a dog")
        assert refused.value.status_code == 503


def test_full_queue_deadline_and_going_away(make_tiny_pipeline: Any) -> None:
    pipe = make_tiny_pipeline()
    opened, arrived, real = threading.Event(), threading.Event(), pipe.transformer.denoise

    def denoise(*args: Any, **given: Any) -> Any:
        arrived.set()
        assert opened.wait(60)
        return real(*args, **given)

    pipe.transformer.denoise = denoise
    with (
        Engine(pipe, EngineSettings(max_queue=1, max_active=1)) as engine,
        BackgroundServer(create_app(engine, ServerSettings(port=0, web=False, engine=engine.settings))) as running,
    ):
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60)
        # One that goes away while it runs, by a time limit of its own, and one that streams and is closed.
        gone = threading.Thread(target=_impatient, args=(client,))
        gone.start()
        assert arrived.wait(60)
        outcome: list[Any] = []

        def late() -> None:
            try:
                client.images.generate(prompt="a cat", extra_body={"timeout": 0.01})
            except openai.APIStatusError as error:
                outcome.append(error)

        waiting = threading.Thread(target=late)
        waiting.start()
        _until(lambda: engine.stats().queued == 1)
        with pytest.raises(openai.RateLimitError) as full:
            client.images.generate(prompt="one too many")
        assert int(full.value.response.headers["retry-after"]) >= 1
        gone.join(60)
        opened.set()
        waiting.join(60)
        assert outcome[0].status_code == 504
        assert outcome[0].code == "deadline_exceeded"
        _until(lambda: engine.stats().cancelled == 1)  # the one that went away
        opened.clear()
        arrived.clear()
        stream = client.images.generate(prompt="a dog", stream=True, partial_images=1)
        assert arrived.wait(60)
        stream.close()
        _until(lambda: next(iter(engine._entries.values())).handle.cancelled)
        opened.set()
        _until(lambda: engine.stats().cancelled == 2)
        assert client.images.generate(prompt="a dog").data


def _impatient(client: Any) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=1.0).images.generate(prompt="a dog")


def _until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def test_many_clients_at_once_get_what_they_would_alone(client: Any, pipe: Any, images: list[Image.Image]) -> None:
    def draw(seed: int) -> Image.Image:
        return picture(client.images.generate(prompt="a dog", extra_body={"seed": seed}).data[0])

    def change(seed: int) -> Image.Image:
        extra = {"seed": seed, "num_inference_steps": 5 + seed}
        return picture(client.images.edit(image=png(images[0]), prompt="a red dog", extra_body=extra).data[0])

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        drawn, changed = [pool.submit(draw, seed) for seed in range(6)], [pool.submit(change, s) for s in range(6)]
    for seed in range(6):
        assert_same(drawn[seed].result(), pipe.generate("a dog", seed=seed).images[0])
        expected = pipe.edit("a red dog", images[0], seed=seed, num_inference_steps=5 + seed).images[0]
        assert_same(changed[seed].result(), expected)


def test_the_bundled_model() -> None:
    import unialignment

    pipe = unialignment.load("nano", device="cpu")
    with Engine(pipe) as engine, BackgroundServer(create_app(engine, ServerSettings(port=0, web=False))) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=120)
        extra = {"seed": 1, "num_inference_steps": 4}
        answer = client.images.generate(model="nano", prompt="a dog on a blue background", extra_body=extra)
        drawn = picture(answer.data[0])
        assert_same(drawn, pipe.generate("a dog on a blue background", seed=1, num_inference_steps=4).images[0])
        talk = client.chat.completions.create(
            model="nano", messages=ask("what color is the background?", drawn), stream=True
        )
        said = "".join(chunk.choices[0].delta.content or "" for chunk in talk)
        assert said == pipe.answer(drawn.convert("RGB"), "what color is the background?").texts[0]


# ------------------------------------------------------------------------------------------------------- small parts


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("", "caption"), ("Describe this picture.", "caption"), ("What's in this image?", "caption"),
        ("What does the picture show?", "caption"), ("what color is the dog?", "answer"),
        ("is the dog in the picture red?", "answer"), ("a ___ dog", "infill"), ("a [MASK] dog", "infill"),
    ],
)  # fmt: skip
def test_tasks_by_wording(text: str, task: str) -> None:
    assert task_of(text) == task


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("segment the dog", ("segment", "the dog")), ("Segment  the Dog.", ("segment", "the Dog")),
        ("estimate the depth", ("depth", "")), ("edge map", ("edges", "")), ("Detect the edges!", ("edges", "")),
        ("segment", None), ("make the dog blue", None), ("put the segment there", None),
    ],
)  # fmt: skip
def test_perception_by_wording(prompt: str, found: tuple[str, str] | None) -> None:
    assert perception_of(TASKS.get("perceive"), prompt) == found


def test_stops_are_held_back_until_they_are_sure() -> None:
    assert cut("a dog and a", ("and",), whole=False) == ("a dog ", True)
    assert cut("a dog an", ("and",), whole=False) == ("a dog ", False)
    assert cut("a dog an", ("and",), whole=True) == ("a dog an", False)
    assert cut("a dog", (), whole=False) == ("a dog", False)


@pytest.mark.parametrize(
    ("wanted", "drawn"), [((1024, 1024), (64, 64)), ((1792, 1024), (88, 48)), ((10, 160), (16, 256))]
)
def test_drawn_sizes_are_legal_and_of_the_shape(wanted: tuple[int, int], drawn: tuple[int, int]) -> None:
    assert drawn_size(wanted, 64, 8, 256) == drawn
