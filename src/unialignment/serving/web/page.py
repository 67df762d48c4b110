"""The page as a whole: heading, tabs, links, and mounting it on the server. Knows nothing of single tasks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from starlette.requests import Request

from unialignment.serving.guard import is_key
from unialignment.serving.settings import ServerSettings
from unialignment.serving.web import control, create, edit, perceive, understand
from unialignment.serving.web.context import PageContext
from unialignment.serving.web.environment import UPLOADS
from unialignment.serving.web.gallery import build_gallery
from unialignment.serving.web.uploads import UploadRoom, make_room
from unialignment.serving.web.widgets import Tab

PATH = "/ui"
"""Where the page is; ``/`` leads there."""
MAX_FILE = 25 * 2**20
"""Largest uploaded file in bytes; the server's own limit may be lower."""
TITLES = {
    "create": "Create",
    "edit": "Edit",
    "understand": "Understand",
    "perceive": "Perceive",
    "control": "Follow a map",
}
STYLE = Path(__file__).parents[1] / "static" / "page.css"


def mount(app: FastAPI, engine: Any, settings: ServerSettings) -> None:
    """Put the page on a server.

    Args:
        app: The server's application.
        engine: Runs the requests; needs ``submit`` and ``pipe``.
        settings: The server's limits. With API keys the page asks for one as password, whatever the name.
    """
    pipe = engine.pipe
    ctx = PageContext(
        engine, pipe.name, pipe.default_size, pipe.sampling, settings.engine.max_steps,
        max(1, min(4, settings.max_n, settings.engine.max_samples)), settings.engine.max_pixels, pipe.tasks,
    )  # fmt: skip
    ctx.gallery = build_gallery(engine, ctx.size, ctx.folder / "gallery")
    blocks = build(ctx)
    # Requests wait in the engine's queue, which batches them; gradio's must not hold them back one by one.
    blocks.queue(default_concurrency_limit=None, max_size=4 * settings.engine.max_queue)

    most = max(settings.max_upload_bytes, settings.max_body_bytes)  # else a single upload would not outlive its request
    room = functools.partial(make_room, UPLOADS, blocks.upload_file_set, most)
    app.add_middleware(UploadRoom, path=f"{PATH}/gradio_api/upload", room=room)

    @app.get("/", include_in_schema=False)
    def page(request: Request) -> RedirectResponse:
        query = f"?{request.url.query}" if request.url.query else ""
        # Relative, so that it holds behind a proxy with a prefix.
        return RedirectResponse(f"{PATH.lstrip('/')}/{query}")

    gr.mount_gradio_app(
        app,
        blocks,
        PATH,
        auth=(lambda _, key: is_key(key, settings.api_keys)) if settings.api_keys else None,
        auth_message="Any name; the password is an API key of this server.",
        allowed_paths=[str(ctx.folder)],
        max_file_size=min(MAX_FILE, settings.max_body_bytes),
        ssr_mode=False,
        run_history=False,
        footer_links=[],
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        theme=theme(),
        css_paths=[STYLE],
        head='<meta name="description" content="Draw, edit, read and perceive pictures with one model.">',
    )


def theme() -> gr.themes.Base:
    """Colours and fonts; only fonts that the reader's machine has."""
    system = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    return gr.themes.Base(
        primary_hue="indigo", neutral_hue="slate", radius_size="md", font=system, font_mono=mono
    )  # fmt: skip


def build(ctx: PageContext) -> gr.Blocks:
    """The page, not yet mounted."""
    # Files that visitors upload and gradio copies are removed an hour after their last use.
    with gr.Blocks(title="UniAlignment", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(
            f"# UniAlignment\nOne model ({ctx.model}) that draws, edits, reads and perceives pictures.",
            elem_classes="ua-head",
        )
        tabs: list[Tab] = []
        sends: list[tuple[gr.Image, str]] = []
        with gr.Tabs(selected="create", elem_id="tabs") as bar:
            with gr.Tab(TITLES["create"], id="create"):
                tab, picture = create.build(ctx)
                tabs.append(tab)
                sends.append((picture, "create"))
                created = gr.Row(elem_classes="ua-send")
            with gr.Tab(TITLES["edit"], id="edit"):
                tabs.append(edit.build(ctx))
            with gr.Tab(TITLES["understand"], id="understand"):
                tabs.append(understand.build(ctx))
            with gr.Tab(TITLES["perceive"], id="perceive"):
                tab, picture = perceive.build(ctx)
                tabs.append(tab)
                sends.append((picture, "perceive"))
                perceived = gr.Row(elem_classes="ua-send")
            with gr.Tab(TITLES["control"], id="control"):
                tabs.append(control.build(ctx))
        sources = {tab.id: tab.source for tab in tabs}
        with created:
            for target in ("edit", "understand", "perceive"):
                _send(sends[0][0], sources[target], bar, "create", target)
        with perceived:
            _send(sends[1][0], sources["control"], bar, "perceive", "control")
        _open_links(blocks, bar, tabs)
    return blocks


def _send(picture: gr.Image, source: Any, bar: gr.Tabs, origin: str, target: str) -> None:
    button = gr.Button(f"{TITLES[target]} it" if target != "control" else "Draw a picture that follows it", size="sm",
                       elem_id=f"{origin}-to-{target}", min_width=100)  # fmt: skip

    def send(path: str | None) -> list[Any]:
        if not path:
            raise gr.Error("There is no picture yet; draw one first.", print_exception=False)
        return [path, gr.Tabs(selected=target)]

    button.click(send, picture, [source, bar], show_progress="hidden", api_visibility="private")


def _open_links(blocks: gr.Blocks, bar: gr.Tabs, tabs: Sequence[Tab]) -> None:
    """Fill in what the address says when the page opens; what it says wrongly is left out."""
    targets = [(tab.id, key, field) for tab in tabs for key, field in tab.fields.items()]

    def fill(request: gr.Request) -> list[Any]:
        query = dict(request.query_params or {})
        chosen = query.get("tab")
        if chosen not in TITLES:
            return [gr.skip()] * (1 + len(targets))
        values: list[Any] = [gr.Tabs(selected=chosen)]
        for tab, key, field in targets:
            value: Any = gr.skip()
            if tab == chosen and key in query:
                try:
                    value = field.read(query[key])
                except ValueError:
                    gr.Warning(f"The link's “{key}” can't be used and was left out.")
            values.append(value)
        return values

    blocks.load(fill, None, [bar, *(field.component for _, _, field in targets)], show_progress="hidden",
                api_visibility="private")  # fmt: skip
