"""The tab that draws a picture which follows a map: depth, edges, or the mask of all objects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from unialignment.serving.requests import TaskRequest
from unialignment.serving.web.context import PageContext, follow, picture_path
from unialignment.serving.web.widgets import (
    Drawn,
    Tab,
    check_prompt,
    choice_field,
    compare_slider,
    link_row,
    progress,
    result_picture,
    run_buttons,
    runs,
    settings_panel,
    source_panel,
    text_field,
)

KINDS = {"Depth": "depth", "Edges": "edges", "Mask of all objects": "segment"}
EXAMPLES = (
    "a large flat car in the center, on a red background",
    "a large shaded apple on the right, on a blue background",
)


def build(ctx: PageContext) -> Tab:
    """Lay the tab out."""
    with gr.Row():
        with gr.Column(min_width=280):
            source = source_panel(ctx, "Map to follow", "control")
            derive = gr.Button("Make a map of this picture", size="sm", elem_id="control-derive")
            kind = gr.Radio(list(KINDS), value="Depth", label="Map", elem_id="control-kind")
            prompt = gr.Textbox(label="What to draw", placeholder=EXAMPLES[0], max_length=1000,
                                elem_id="control-prompt")  # fmt: skip
            run, stop = run_buttons("control", "Draw it")
            gr.Examples([[text] for text in EXAMPLES], [prompt], label="Examples")
            settings = settings_panel(ctx, "control", ("guidance_scale", "image_guidance_scale"))
        with gr.Column(min_width=280):
            result, download = result_picture("control")
            status = gr.HTML(progress(0.0, "ready"), elem_id="control-status")
            slider = compare_slider("control", "Map and picture")
            link = link_row("control")
    drawn = Drawn(result, download, status, slider, link[0])

    async def draw(path: str | None, label: str, text: str, *knobs: Any) -> AsyncIterator[dict[Any, Any]]:
        path, options = picture_path(path, "a map"), settings.options(knobs)
        text = check_prompt(text, "what to draw")
        request = TaskRequest("control", text, (path,), KINDS[label], options)
        said = {"kind": KINDS[label], "prompt": text}
        async for shown, _ in drawn.draw(ctx, request, path, settings, said):
            yield shown

    async def make_map(path: str | None, label: str) -> AsyncIterator[dict[Any, Any]]:
        path, chosen = picture_path(path), KINDS[label]
        # A mask needs the name of one object; for all of them the words are the world's.
        text = "all objects" if chosen == "segment" else None
        options = {"seed": 0}
        async for update in follow(ctx.engine, TaskRequest("perceive", text, (path,), chosen, options)):
            shown: dict[Any, Any] = {status: progress(update.fraction, update.note)}
            if update.result is not None:
                shown[source] = str((await asyncio.to_thread(ctx.save, update.result))[0])
            yield shown

    runs(
        draw, run, stop, [source, kind, prompt, *settings.widgets],
        [*drawn.widgets, settings.seed], link, status, enter=prompt,
    )  # fmt: skip
    runs(make_map, derive, stop, [source, kind], [source, status], link, status)
    fields = {
        "kind": choice_field(kind, {value: label for label, value in KINDS.items()}),
        "prompt": text_field(prompt),
        **settings.fields(),
    }
    return Tab("control", fields, source)
