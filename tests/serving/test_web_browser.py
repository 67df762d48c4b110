"""The page in a real browser: every tab, live previews, a download, links, the keyboard, a phone, no outside request.

With ``UNIALIGN_SCREENSHOTS=docs/images`` the screenshots of the documentation are written; with ``UNIALIGN_PAGE`` a
server that runs already is used.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
pytest.importorskip("gradio", reason="no gradio: the web page is an extra (pip install 'unialignment[web]')")
uvicorn = pytest.importorskip("uvicorn", reason="no uvicorn: serving is an extra (pip install 'unialignment[serve]')")

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
ROOT = Path(__file__).resolve().parents[2]
WAIT = 120_000
"""Milliseconds; machines that run tests may be busy."""
# Notes everything that is shown, from within the page: looking from outside now and then misses what passes quickly,
# and on a busy machine all of it.
WATCH = """name => {
  const seen = {notes: [], pictures: []};
  const add = (list, value) => { if (value && value !== list.at(-1)) list.push(value); };
  const look = () => {
    add(seen.notes, document.querySelector(`#${name}-status`)?.textContent.trim());
    add(seen.pictures, document.querySelector(`#${name}-result img`)?.src);
  };
  window.watcher?.disconnect();
  window.watcher = new MutationObserver(look);
  window.seen = seen;
  look();
  window.watcher.observe(document.body, {subtree: true, childList: true, characterData: true, attributes: true});
}"""
PROMPT = "a large flat car in the center, on a yellow background"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
    pytest.mark.skipif(
        not (ROOT / "src/unialignment/weights/nano/model_index.json").exists(), reason="no bundled weights here"
    ),
]


ENGINES: list = []
"""The engine of the server that is started here."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server with the bundled model on a free port, or the one that UNIALIGN_PAGE names; its address."""
    if os.environ.get("UNIALIGN_PAGE"):
        yield os.environ["UNIALIGN_PAGE"]
        return
    import unialignment
    from unialignment.serving.app import create_app
    from unialignment.serving.engine import Engine
    from unialignment.serving.settings import ServerSettings

    with Engine(unialignment.load("nano")) as engine:
        ENGINES.append(engine)
        app = create_app(engine, ServerSettings())
        running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=running.run, daemon=True)
        thread.start()
        until = time.monotonic() + 60
        while not running.started and time.monotonic() < until:
            time.sleep(0.05)
        assert running.started
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
        running.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as driver:
        # --no-sandbox: containers often run as root, where Chromium refuses to start otherwise.
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


class Watched:
    """A page and what went wrong on it."""

    def __init__(self, browser, server: str, path: str = "/", **options) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1180, "height": 860}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.foreign: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", self._request)
        self.page.on("response", lambda r: self.errors.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.server = server
        self.page.goto(server + path)
        self.page.wait_for_selector("#tabs")

    def _request(self, request) -> None:
        if not request.url.startswith((self.server, "data:", "blob:")):
            self.foreign.append(request.url)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def run(self, name: str, start: Callable[[], object] | None = None) -> list[str]:
        """Press the button, or start otherwise; the distinct pictures (addresses) shown from then until it was done."""
        self.page.wait_for_timeout(300)  # what came before may be drawn once more
        self.page.evaluate(WATCH, name)
        pictures = len(self.page.evaluate("window.seen.pictures"))
        if start is None:
            self.page.click(f"#{name}-run")
        else:
            start()
        self.page.wait_for_function("window.seen.notes.length > 1 && window.seen.notes.at(-1).includes('done')")
        found = self.page.evaluate("window.seen")
        # The address follows the result.
        seed = re.search(r"seed (\d+)", found["notes"][-1])
        said = f"seed={seed[1]}" if seed else "seed="
        self.page.wait_for_function("said => location.search.includes(said)", arg=said)
        return list(dict.fromkeys(self.page.evaluate("window.seen.pictures")[pictures:]))

    def take(self, name: str, number: int) -> None:
        """A picture of the strip."""
        self.page.click(f"#{name}-strip button >> nth={number - 1}")
        self.page.wait_for_selector(f"#{name}-source img, #{name}-references img")

    def download(self, name: str, folder: Path) -> Path:
        with self.page.expect_download() as waiting:
            self.page.click(f"#{name}-download")
        path = folder / waiting.value.suggested_filename
        waiting.value.save_as(path)
        return path

    def photograph(self, name: str) -> None:
        folder = os.environ.get("UNIALIGN_SCREENSHOTS")
        if not folder:
            return
        target = Path(folder) / f"web-{name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        self.page.wait_for_timeout(400)
        self.page.screenshot(path=target)
        with Image.open(target) as image:
            # A palette keeps such pictures small.
            image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)

    def close(self) -> None:
        self.context.close()
        assert not self.foreign, f"requests to other machines: {self.foreign}"
        assert not self.errors, self.errors


@pytest.fixture
def open_page(browser, server: str) -> Iterator:
    opened: list[Watched] = []

    def open_it(path: str = "/", **options) -> Watched:
        opened.append(Watched(browser, server, path, **options))
        return opened[-1]

    yield open_it
    for page in opened:
        page.close()


def test_create_shows_previews_and_downloads_with_metadata(open_page, tmp_path: Path) -> None:
    from unialignment.metadata import read_metadata

    web = open_page()
    web.page.fill("#create-prompt textarea", PROMPT)
    assert len(web.run("create")) >= 3, "live previews"
    web.photograph("create")
    path = web.download("create", tmp_path)
    found = read_metadata(path)
    assert found is not None
    assert (found["prompt"], found["task"], found["model"]) == (PROMPT, "generate", "nano")
    assert f"seed={found['seed']}" in web.page.url


def test_stopping_and_leaving_free_the_engine(browser, server: str, open_page, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ENGINES:
        pytest.skip("the server runs elsewhere")
    engine = ENGINES[0]
    denoise = engine.pipe.transformer.denoise

    def slowly(*args, **given):
        time.sleep(0.5)  # a hundred steps last longer than any browser needs to press a button
        return denoise(*args, **given)

    monkeypatch.setattr(engine.pipe.transformer, "denoise", slowly)

    def cancelled(more: int) -> None:
        until = time.monotonic() + WAIT / 1000
        while time.monotonic() < until and not (engine.stats().cancelled >= more and engine.stats().active == 0):
            time.sleep(0.05)
        assert engine.stats().cancelled >= more
        assert engine.stats().active == 0

    def start(web: Watched) -> None:
        web.page.wait_for_function("document.querySelector('#create-prompt textarea').value.includes('rocket')")
        web.page.click("#create-run")
        web.page.wait_for_function("document.querySelector('#create-status').innerText.includes('step')")

    before = engine.stats().cancelled
    path = "/?tab=create&prompt=a+flat+rocket&steps=100"
    web = open_page(path)
    start(web)
    web.page.click("#create-stop")
    cancelled(before + 1)
    web.page.wait_for_function("document.querySelector('#create-status').innerText.includes('stopped')")
    other = Watched(browser, server, path)
    start(other)
    other.context.close()
    cancelled(before + 2)


def test_a_link_repeats_a_result(open_page, tmp_path: Path) -> None:
    pictures = []
    first = open_page("/?tab=create&prompt=a+flat+rocket+at+the+top&seed=7&fresh=0&steps=6")
    first.page.wait_for_function("document.querySelector('#create-prompt textarea').value.includes('rocket')")
    first.run("create")
    pictures.append(Image.open(first.download("create", tmp_path)).tobytes())
    second = open_page(first.page.url.removeprefix(first.server))
    second.page.wait_for_function("document.querySelector('#create-prompt textarea').value.includes('rocket')")
    second.run("create")
    pictures.append(Image.open(second.download("create", tmp_path)).tobytes())
    assert pictures[0] == pictures[1]


def test_compose_takes_pictures_from_the_strip(open_page) -> None:
    web = open_page()
    web.page.get_by_label("From pictures").check()
    web.page.click("#compose-example-1")
    web.page.wait_for_function("document.querySelectorAll('#create-references img').length >= 2")
    assert len(web.run("create")) >= 3
    web.photograph("compose")
    web.page.click("#create-to-edit")
    web.page.wait_for_selector("#edit-source img")


def test_edit_in_turns_with_undo(open_page) -> None:
    web = open_page("/?tab=edit&picture=1&steps=6")
    web.page.wait_for_selector("#edit-source img")
    before = web.page.get_attribute("#edit-source img", "src")
    for number, text in enumerate(("make the background green", "make the background blue"), 1):
        web.page.fill("#edit-prompt textarea", text)
        web.run("edit")
        web.page.wait_for_function(f"document.querySelectorAll('#edit-turns li').length === {number}")
    assert web.page.get_attribute("#edit-source img", "src") != before
    assert web.page.locator("#edit-slider img").count() == 2
    web.photograph("edit")
    web.page.click("#edit-undo")
    web.page.wait_for_function("document.querySelectorAll('#edit-turns li').length === 1")
    assert web.page.input_value("#edit-prompt textarea") == "make the background blue"
    web.page.click("#edit-undo")
    web.page.wait_for_function("document.querySelectorAll('#edit-turns li').length === 0")
    assert web.page.is_disabled("#edit-undo")


def test_understand_writes_word_by_word(open_page, monkeypatch) -> None:
    web = open_page("/?tab=understand&picture=4")
    if ENGINES:  # all of it takes a tenth of a second, in which a page is drawn once
        scheduler = ENGINES[0]._scheduler
        unhurried = scheduler.round
        monkeypatch.setattr(scheduler, "round", lambda: (time.sleep(0.15), unhurried()))
    web.page.wait_for_selector("#understand-source img")
    web.page.evaluate(
        """() => { window.texts = new Set(); const box = document.querySelector('#understand-text textarea');
        setInterval(() => window.texts.add(box.value), 5); }"""
    )
    web.run("understand")
    texts = web.page.evaluate("[...window.texts]")
    monkeypatch.undo()
    assert any("▢" in text for text in texts), texts
    final = web.page.input_value("#understand-text textarea")
    assert final
    assert "▢" not in final
    web.photograph("understand")
    web.page.get_by_label("Ask").check()
    web.page.fill("#understand-prompt textarea", "what color is the background?")
    web.run("understand", lambda: web.page.press("#understand-prompt textarea", "Enter"))
    assert web.page.input_value("#understand-text textarea") != final
    web.page.get_by_label("Fill gaps").check()
    web.page.fill("#understand-prompt textarea", "on a ___ background")
    web.run("understand")
    assert re.search(r"on an? \S+ background", web.page.input_value("#understand-text textarea"))


def test_perceive_draws_maps_and_control_follows_one(open_page, tmp_path: Path) -> None:
    web = open_page("/?tab=perceive&picture=1")
    web.page.wait_for_selector("#perceive-source img")
    for label in ("Edges", "Mask of an object", "Depth"):
        web.page.get_by_role("tabpanel").get_by_label(label, exact=True).check()
        if "object" in label:
            web.page.fill("#perceive-of textarea, #perceive-of input", "the bus")
        assert web.run("perceive")[-1]
    assert web.page.locator("#perceive-slider img").count() == 2
    web.photograph("perceive")
    assert Image.open(web.download("perceive", tmp_path)).size == (64, 64)
    web.page.click("#perceive-to-control")
    web.page.wait_for_selector("#control-source img")
    web.page.fill("#control-prompt textarea", "a flat bus at the top left, on a blue background")
    assert len(web.run("control")) >= 3
    web.photograph("control")


def test_mistakes_are_told_on_the_page(open_page) -> None:
    web = open_page("/?tab=edit&steps=nonsense&seed=-1")
    web.page.fill("#edit-prompt textarea", "make the background green")
    web.page.click("#edit-run")
    web.page.get_by_text("choose a picture first").wait_for()


def test_uploads_and_sketches(open_page, tmp_path: Path) -> None:
    path = tmp_path / "mine.png"
    Image.new("RGB", (200, 120), (40, 90, 200)).save(path)
    web = open_page("/?tab=understand")
    web.page.set_input_files("#understand-source input[type=file]", path)
    web.page.wait_for_selector("#understand-source img")
    web.run("understand")
    web.page.get_by_role("button", name="Sketch one").click()
    canvas = web.page.locator("#understand-sketch canvas").first
    canvas.wait_for()
    web.page.wait_for_timeout(2000)
    web.page.click("#understand-sketch button[title=Brush]")
    box = canvas.bounding_box()
    web.page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.4 * box["height"])
    web.page.mouse.down()
    web.page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.6 * box["height"], steps=10)
    web.page.mouse.up()
    web.page.wait_for_timeout(1000)
    before = web.page.get_attribute("#understand-source img", "src")
    web.page.get_by_role("button", name="Use the sketch").click()
    web.page.wait_for_function(f"document.querySelector('#understand-source img').src !== {before!r}")
    assert "sketch" in web.page.get_attribute("#understand-source img", "src")


def test_a_picture_is_pasted(open_page) -> None:
    web = open_page("/?tab=perceive")
    web.context.grant_permissions(["clipboard-read", "clipboard-write"])
    web.page.evaluate(
        """async () => {
          const canvas = Object.assign(document.createElement("canvas"), {width: 96, height: 64});
          canvas.getContext("2d").fillRect(0, 0, 96, 64);
          const blob = await new Promise(done => canvas.toBlob(done, "image/png"));
          await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
        }"""
    )
    web.page.locator("#perceive-source [aria-label*='clipboard' i]").click()
    web.page.wait_for_selector("#perceive-source img")
    assert web.page.evaluate("document.querySelector('#perceive-source img').naturalWidth") == 96


def test_with_the_keyboard_alone(open_page) -> None:
    web = open_page()
    web.page.focus("#create-prompt textarea")
    web.page.keyboard.type("a flat tree in the center")
    web.run("create", lambda: web.page.keyboard.press("Enter"))
    # From the text, Tab reaches the buttons; from the tab bar, arrows or Tab reach the other tabs.
    web.page.keyboard.press("Tab")
    reached = web.page.evaluate("document.activeElement.closest('#create-run, #create-run *') !== null")
    assert reached
    web.page.get_by_role("tab", name="Edit").focus()
    web.page.keyboard.press("Enter")
    web.page.wait_for_selector("#edit-prompt textarea")
    web.page.focus("#edit-strip button >> nth=1")
    web.page.keyboard.press("Enter")
    web.page.wait_for_selector("#edit-source img")


PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
TABS = {
    "Create": "create",
    "Edit": "edit",
    "Understand": "understand",
    "Perceive": "perceive",
    "Follow a map": "control",
}


def test_on_a_phone(open_page) -> None:
    web = open_page("/?tab=understand&picture=2", **PHONE)
    web.page.wait_for_selector("#understand-source img")
    web.run("understand", lambda: web.page.tap("#understand-run"))
    web.photograph("phone")
    for label, name in TABS.items():
        tab = web.page.get_by_role("tab", name=label, exact=True)
        if tab.count() == 0 or not tab.first.is_visible():  # those that don't fit are behind a button
            web.page.locator("#tabs .overflow-menu button").first.tap()
            web.page.locator("#tabs .overflow-dropdown").get_by_text(label, exact=True).tap()
        else:
            tab.first.tap()
        button = web.page.locator(f"#{name}-run")
        button.wait_for()
        button.scroll_into_view_if_needed()
        assert button.bounding_box()["height"] >= 44, "large enough for a thumb"
        web.page.wait_for_function("document.documentElement.scrollWidth <= window.innerWidth + 1")  # never sideways
