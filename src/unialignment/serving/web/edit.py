"""The tab that changes a picture by instruction, in as many turns as wanted, each of which can be undone."""

from __future__ import annotations

import asyncio
import html
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from unialignment.errors import InputError
from unialignment.serving.requests import TaskRequest
from unialignment.serving.web.context import PageContext, picture_path
from unialignment.serving.web.widgets import (
    Drawn,
    Tab,
    check_prompt,
    compare_slider,
    gallery_field,
    gallery_number,
    link_row,
    progress,
    result_picture,
    run_buttons,
    runs,
    settings_panel,
    source_panel,
    text_field,
)

EXAMPLES = ("make the background green", "remove the car", "move the dog to the right")
MAX_TURNS = 30
"""Turns that can be undone."""


@dataclass(frozen=True)
class Turn:
    """One edit: the picture before it, as PNG bytes (files go, sessions stay), and what was asked."""

    before: bytes
    name: str
    instruction: str
    seed: int


def build(ctx: PageContext) -> Tab:
    """Lay the tab out."""
    with gr.Row():
        with gr.Column(min_width=280):
            source = source_panel(ctx, "Picture to change", "edit")
            prompt = gr.Textbox(label="What to change", max_length=1000, elem_id="edit-prompt",
                                placeholder=EXAMPLES[0])  # fmt: skip
            run, stop = run_buttons("edit", "Change it")
            gr.Examples([[text] for text in EXAMPLES], [prompt], label="Examples")
            settings = settings_panel(ctx, "edit", ("guidance_scale", "image_guidance_scale"))
        with gr.Column(min_width=280):
            result, download = result_picture("edit")
            status = gr.HTML(progress(0.0, "ready"), elem_id="edit-status")
            slider = compare_slider("edit", "Before and after")
            turns_shown = gr.HTML("", elem_id="edit-turns")
            with gr.Row():
                undo = gr.Button("Undo", size="sm", interactive=False, elem_id="edit-undo")
                again = gr.Button("Back to the first picture", size="sm", interactive=False, elem_id="edit-reset")
            link = link_row("edit")
    drawn = Drawn(result, download, status, slider, link[0])
    turns = gr.State([])
    # The picture that the last turn made: when the source is another one, its user has begun anew.
    made = gr.State("")

    async def edit(
        path: str | None, instruction: str, history: list[Turn], last: str, *knobs: Any
    ) -> AsyncIterator[dict[Any, Any]]:
        path = picture_path(path)
        instruction = check_prompt(instruction, "what to change")
        data, last_data = await asyncio.to_thread(_read, path), await asyncio.to_thread(_read, last)
        if data != last_data:
            history = []
        options = settings.options(knobs)
        request = TaskRequest("edit", instruction, (data,), options=options)
        said = {"prompt": instruction, "picture": gallery_number(ctx, path)}
        async for shown, after in drawn.draw(ctx, request, path, settings, said):
            if after is not None:
                turn = Turn(data, path.rsplit("/", 1)[-1], instruction, options["seed"])
                history = [*history, turn][-MAX_TURNS:]
                shown |= {source: after, made: after, turns: history, **_listing(history)}
            yield shown

    def _listing(history: list[Turn]) -> dict[Any, Any]:
        items = "".join(f"<li>{html.escape(turn.instruction)} <small>seed {turn.seed}</small></li>" for turn in history)
        return {
            turns_shown: f'<ol class="ua-turns" aria-label="Changes so far">{items}</ol>' if items else "",
            undo: gr.update(interactive=bool(history)),
            again: gr.update(interactive=len(history) > 1),
        }

    def back(history: list[Turn], keep: int) -> dict[Any, Any]:
        if not history:
            raise gr.Error("There is nothing to undo.", print_exception=False)
        turn, rest = history[keep], history[:keep]
        path = ctx.new_file(turn.name.rsplit(".", 1)[0])
        path.write_bytes(turn.before)
        return {
            source: str(path), made: str(path), turns: rest, prompt: turn.instruction,
            result: None, slider: gr.update(visible=False), download: gr.update(interactive=False),
            status: progress(0.0, f"undone: {turn.instruction}"), **_listing(rest),
        }  # fmt: skip

    outputs = [*drawn.widgets, source, made, turns, settings.seed, turns_shown, undo, again]
    runs(edit, run, stop, [source, prompt, turns, made, *settings.widgets], outputs, link, status, enter=prompt)
    undone = [source, made, turns, prompt, result, slider, download, status, turns_shown, undo, again]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    undo.click(lambda history: back(history, len(history) - 1), turns, undone, **quiet)
    again.click(lambda history: back(history, 0), turns, undone, **quiet)
    fields = {"prompt": text_field(prompt), "picture": gallery_field(ctx, source), **settings.fields()}
    return Tab("edit", fields, source)


def _read(path: str) -> bytes:
    if not path:
        return b""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InputError("the picture is gone from the server; choose it again") from error
