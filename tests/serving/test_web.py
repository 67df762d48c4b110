"""The page without a browser: what it asks of the engine, links, files, keys, and what it refuses."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="the web page is an extra (pip install 'unialignment[web]')")
fastapi = pytest.importorskip("fastapi", reason="serving is an extra (pip install 'unialignment[serve]')")

from fastapi.testclient import TestClient  # noqa: E402

from unialignment.errors import AssetError, InputError  # noqa: E402
from unialignment.metadata import read_metadata  # noqa: E402
from unialignment.outputs import ImageResult  # noqa: E402
from unialignment.serving.engine import Engine  # noqa: E402
from unialignment.serving.requests import (  # noqa: E402
    Done,
    Event,
    Failed,
    Preview,
    Progress,
    QueueFullError,
    TaskRequest,
    TextSoFar,
)
from unialignment.serving.settings import ServerSettings  # noqa: E402
from unialignment.serving.web import context, gallery, mount, uploads, widgets  # noqa: E402


class Scripted:
    """An engine that plays given events."""

    def __init__(self, *events: Event) -> None:
        self.events = events
        self.cancelled = 0

    def submit(self, request: TaskRequest) -> Scripted:
        return self

    def cancel(self) -> None:
        self.cancelled += 1

    async def __aiter__(self):
        for event in self.events:
            yield event


@pytest.fixture
def ctx(tmp_path: Path) -> context.PageContext:
    found = context.PageContext(Scripted(), "tiny", 64, {"generate": {"guidance_scale": 4.5}}, max_steps=50)
    entries = []
    for number in range(2):
        path = tmp_path / f"scene-{number}.png"
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
        entries.append((path, f"scene {number}"))
    found.gallery = entries
    return found


def collect(engine: Scripted) -> list[context.Update]:
    async def run() -> list[context.Update]:
        return [update async for update in context.follow(engine, TaskRequest("generate"))]

    return asyncio.run(run())


def test_events_become_what_is_shown() -> None:
    picture = Image.new("RGB", (4, 4))
    result = ImageResult([picture], [1], [""], "generate", "tiny")
    engine = Scripted(
        Progress(0, 1, 4), Preview(0, 2, 4, picture, 0), TextSoFar(0, 3, 4, "a [MASK] dog", "a"), Done(result, 0.1, 2.0)
    )
    updates = collect(engine)
    assert [round(update.fraction, 2) for update in updates] == [0, 0.25, 0.5, 0.75, 1]
    assert updates[2].image is picture
    assert updates[3].text == "a ▢ dog"
    assert updates[4].result is result
    assert "2.0 s" in updates[4].note


def test_a_failure_is_raised_and_leaving_cancels() -> None:
    engine = Scripted(Progress(0, 1, 4), Failed(QueueFullError("try again later")))
    with pytest.raises(QueueFullError):
        collect(engine)
    assert engine.cancelled == 1

    async def leave() -> None:
        updates = context.follow(engine, TaskRequest("generate"))
        await anext(updates)
        await updates.aclose()

    asyncio.run(leave())
    assert engine.cancelled == 2


def test_mistakes_become_messages_without_markup() -> None:
    async def run():
        raise InputError("<script>alert(1)</script>")
        yield

    async def start() -> None:
        async for _ in widgets.guarded(run)():
            pass

    with pytest.raises(gr.Error) as caught:
        asyncio.run(start())
    assert "<script>" not in caught.value.message
    assert "&lt;script&gt;" in caught.value.message


def test_results_are_saved_with_their_origin_and_old_ones_go(ctx, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "MAX_FILES", 3)
    picture = Image.new("RGB", (4, 4))
    paths = [ctx.save(ImageResult([picture], [seed], ["a dog"], "generate", "tiny"))[0] for seed in range(5)]
    assert [path.exists() for path in paths] == [False, False, True, True, True]
    found = read_metadata(paths[-1])
    assert found is not None
    assert (found["seed"], found["prompt"]) == (4, "a dog")
    assert ".." not in str(ctx.new_file("../../etc/passwd"))


def test_a_source_is_laid_over_the_result(ctx, tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    Image.new("RGB", (100, 40)).save(path)
    result = ImageResult([Image.new("RGB", (16, 16))], [0], [""], "edit", "tiny")
    before, after = ctx.compared(str(path), result)
    assert Image.open(before).size == Image.open(after).size == (512, 512)


def test_links_say_the_settings_and_only_those(ctx) -> None:
    query = parse_qs(widgets.link_query("edit", {"prompt": "a&b=c #", "seed": 7, "fresh": False, "picture": None}))
    assert query == {"tab": ["edit"], "prompt": ["a&b=c #"], "seed": ["7"], "fresh": ["0"]}
    assert widgets.gallery_number(ctx, str(ctx.gallery[1][0])) == 2
    assert widgets.gallery_number(ctx, __file__) is None
    assert widgets.gallery_number(ctx, "/nowhere") is None


def test_links_are_read_strictly(ctx) -> None:
    with gr.Blocks():
        box, slider, seed = gr.Textbox(), gr.Slider(1, 9), gr.Number()
        settings = widgets.settings_panel(ctx, "generate")
    fields = settings.fields()
    assert fields["steps"].read("12") == 12
    assert fields["fresh"].read("0") is False
    for name, text in (("steps", "0"), ("steps", "51"), ("steps", "nan"), ("seed", "-1"), ("seed", "1e9"),
                       ("guidance_scale", "99"), ("guidance_scale", "x")):  # fmt: skip
        with pytest.raises(ValueError):
            fields[name].read(text)
    pictures = widgets.gallery_field(ctx, box, many=True)
    assert pictures.read("2,1") == [str(ctx.gallery[1][0]), str(ctx.gallery[0][0])]
    for text in ("0", "3", "1,,2", "../x"):
        with pytest.raises(ValueError):
            pictures.read(text)
    with pytest.raises(ValueError):
        widgets.choice_field(box, {"depth": "Depth"}).read("other")
    assert len(widgets.text_field(box).read("x" * 5000)) == 1000
    assert slider is not seed


def test_settings_start_at_the_models_own_and_keep_a_fixed_seed(ctx) -> None:
    with gr.Blocks():
        settings = widgets.settings_panel(ctx, "generate")
    assert settings.scales[0].value == 4.5
    assert settings.options([7, False, 10, 3]) == {"seed": 7, "num_inference_steps": 10, "guidance_scale": 3.0}
    seeds = {settings.options([7, True, 10, 3])["seed"] for _ in range(20)}
    assert len(seeds) > 1


def test_addresses_are_not_fetched() -> None:
    with gr.Blocks():
        picture = widgets.local_only(gr.Image(type="filepath"))
    for address in ("http://localhost:1/x.png", "HTTPS://example.org/x.png", " http://example.org"):
        with pytest.raises(gr.Error, match="not fetched"):
            asyncio.run(picture.async_move_resource_to_block_cache(address))


def test_the_model_draws_the_gallery_where_there_is_no_artwork(
    tiny_pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(size: int) -> list:
        raise AssetError("no sprite pack")

    monkeypatch.setattr(gallery, "world_pictures", missing)
    with Engine(tiny_pipeline) as engine:
        entries = gallery.build_gallery(engine, 64, tmp_path)
    assert [text for _, text in entries] == list(gallery.PROMPTS)
    pictures = [np.asarray(Image.open(path)) for path, _ in entries]
    assert all((pictures[0] != other).any() for other in pictures[1:])


def test_the_gallery_shows_scenes(pack, tmp_path: Path) -> None:
    entries = gallery.build_gallery(Scripted(), 64, tmp_path)
    assert len(entries) == len(gallery.SCENES)
    assert all("background" in text for _, text in entries)


@pytest.fixture(scope="module")
def pages(tiny_pipeline):
    """The page on two servers: without keys, and with one."""
    found = []
    with Engine(tiny_pipeline) as engine:
        for keys in ((), ("right",)):
            app = fastapi.FastAPI()
            mount(app, engine, ServerSettings(api_keys=keys))
            client = TestClient(app)
            client.__enter__()
            found.append(client)
        yield found
        for client in found:
            client.__exit__(None, None, None)


def test_the_page_is_served_and_asks_nobody_else(pages) -> None:
    client = pages[0]
    answer = client.get("/?tab=edit&seed=3", follow_redirects=False)
    assert answer.status_code == 307
    assert answer.headers["location"] == "ui/?tab=edit&seed=3"
    text = client.get("/ui/").text
    assert "UniAlignment" in text
    config = client.get("/ui/config").json()
    assert config["analytics_enabled"] is False
    assert not any("googleapis" in str(sheet) or "http" in str(sheet) for sheet in config["stylesheets"])
    named = {str(item["props"].get("elem_id")) for item in config["components"]}
    for family in ("create", "edit", "understand", "perceive", "control"):
        assert f"{family}-run" in named


def test_files_outside_are_not_served(pages) -> None:
    for path in ("/etc/passwd", str(Path(__file__).resolve()), "../../../etc/passwd"):
        assert pages[0].get(f"/ui/gradio_api/file={path}").status_code in (403, 404)


def test_uploads_lie_in_a_folder_of_this_server(pages) -> None:
    (path,) = pages[0].post("/ui/gradio_api/upload", files={"files": ("a.png", b"x", "image/png")}).json()
    assert Path(os.environ["GRADIO_TEMP_DIR"]) in Path(path).parents
    assert Path(tempfile.gettempdir()) / "gradio" not in Path(path).parents
    assert pages[1].post("/ui/gradio_api/upload", files={"files": ("a.png", b"x", "image/png")}).status_code == 401


def test_with_keys_the_page_asks_for_one(pages) -> None:
    client = pages[1]
    assert client.get("/ui/config").status_code == 401
    assert client.post("/ui/login", data={"username": "me", "password": "wrong"}).status_code == 400
    assert client.get("/ui/config").status_code == 401
    assert client.post("/ui/login", data={"username": "me", "password": "right"}).status_code == 200
    assert client.get("/ui/config").status_code == 200


def test_handlers_are_not_an_open_api(pages) -> None:
    described = pages[0].get("/ui/gradio_api/info").json()
    assert described["named_endpoints"] == {}
    assert json.dumps(described).count("/draw") == 0


# ------------------------------------------------------------------------------------------------- limits on what comes


def lay(path: Path, size: int, age: float) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_the_oldest_uploads_make_room(tmp_path: Path) -> None:
    old, middle, new = (lay(tmp_path / f"hash{age}" / "a.png", 100, age) for age in (300, 200, 100))
    unfinished = lay(tmp_path / "tmpabc", 100, 250)
    known = {str(old), str(middle), str(new), str(tmp_path / "gone" / "a.png")}
    assert uploads.make_room(tmp_path, known, 400) == 0
    assert uploads.make_room(tmp_path, known, 399) == 1
    assert not old.parent.exists()
    assert str(old) not in known
    assert uploads.make_room(tmp_path, known, 10**9, most_files=1) == 2
    assert not unfinished.exists()
    assert not middle.exists()
    assert new.exists()


def test_uploads_that_broke_off_are_removed(tmp_path: Path) -> None:
    broken, going_on = lay(tmp_path / "tmpabc", 1, 2 * uploads.BROKEN_SECONDS), lay(tmp_path / "tmpdef", 1, 1)
    uploads.make_room(tmp_path, set(), 10**9)
    assert not broken.exists()
    assert going_on.exists()


def test_only_uploads_make_room(tmp_path: Path) -> None:
    shown = lay(tmp_path / "hash" / "thumbnail.png", 100, 50)  # the page's own
    uploads.make_room(tmp_path, set(), 1)
    assert shown.exists()


@pytest.fixture(scope="module")
def small(tiny_pipeline) -> Iterator[str]:
    """Host and port of a server with a page and small limits."""
    from unialignment.serving.app import create_app
    from unialignment.serving.server import BackgroundServer

    limits = {"max_body_bytes": 20_000, "max_upload_bytes": 50_000, "upload_timeout": 1.0}
    with (
        Engine(tiny_pipeline) as engine,
        BackgroundServer(create_app(engine, ServerSettings(port=0, **limits))) as running,
    ):
        yield running.url.removeprefix("http://")


HEAD = b'--edge\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\nContent-Type: image/png\r\n\r\n'


def upload(address: str, *contents: bytes) -> tuple[int, bytes]:
    parts = [HEAD % b"a.png" + content + b"\r\n" for content in contents]
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        kind = {"Content-Type": "multipart/form-data; boundary=edge"}
        connection.request("POST", "/ui/gradio_api/upload", b"".join(parts) + b"--edge--\r\n", kind)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_one_upload_is_limited_as_a_whole(small: str) -> None:
    assert upload(small, b"a" * 15_000)[0] == 200
    status, body = upload(small, *(b"%d" % number * 5_000 for number in range(5)))
    assert status == 413  # each file alone would do
    assert b"larger than the limit" in body


def test_all_uploads_together_are_limited(small: str) -> None:
    paths = []
    for number in range(5):
        status, body = upload(small, bytes([number]) * 15_000)
        assert status == 200
        paths.append(Path(json.loads(body)[0]))
    # Room is made once more after the answer.
    until = time.monotonic() + 60
    while sum(path.stat().st_size for path in paths if path.exists()) > 50_000:
        assert time.monotonic() < until
        time.sleep(0.01)
    kept = [path.exists() for path in paths]
    assert kept[-1]
    assert not kept[0]


@pytest.mark.parametrize(("rest", "expected"), [(b"", b" 408 "), (b"4000\r\n" + b"x" * 0x4000 + b"\r\n", b" 413 ")])
def test_an_upload_of_unknown_length_is_limited(small: str, rest: bytes, expected: bytes) -> None:
    host, port = small.split(":")
    head = HEAD % b"a.png"
    with socket.create_connection((host, int(port)), timeout=60) as raw:
        raw.sendall(
            b"POST /ui/gradio_api/upload HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            b"Content-Type: multipart/form-data; boundary=edge\r\n\r\n%x\r\n%s\r\n" % (len(head), head)
        )
        raw.sendall(rest * 2)  # and no end
        assert expected in raw.recv(100)


def test_sketches_are_limited(pages) -> None:
    client = pages[0]
    config = client.get("/ui/config").json()
    canvas = next(item["id"] for item in config["components"] if item["type"] in ("sketchpad", "imageeditor"))

    def send(content: bytes = b"x", **facts: str) -> int:
        data = {"fn_name": "accept_blobs", "session_hash": "s", "component_id": str(canvas), **facts}
        return client.post(
            "/ui/gradio_api/component_server", data=data, files={"file": ("blob", content, "image/png")}
        ).status_code

    assert send(type="composite", index="null", id="one") == 200
    assert send(type="layer", index="0", id="one") == 200
    assert send(type="layer", index=str(10**9), id="two") == 400  # gradio would make a list as long
    assert send(type="layer", index="-1", id="two") == 400
    assert send(b"x" * (uploads.MAX_SKETCH + 1), type="composite", index="null", id="two") == 400
    assert send(index="0") == 400
    body = {"fn_name": "accept_blobs", "session_hash": "s", "component_id": canvas, "data": [1]}
    assert client.post("/ui/gradio_api/component_server", json=body).status_code == 400


def test_sketches_that_nobody_uses_are_forgotten() -> None:
    canvas = gr.Sketchpad()
    uploads.bounded_sketches(canvas)
    for number in range(uploads.MAX_SKETCHES + 10):
        facts = {"type": "composite", "index": "null", "id": str(number)}
        canvas.accept_blobs(type("Data", (), {"data": facts, "files": [("a", b"x")]}))
    assert len(canvas.blob_storage) == uploads.MAX_SKETCHES
    assert str(uploads.MAX_SKETCHES + 9) in canvas.blob_storage
