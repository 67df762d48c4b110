"""The tab that turns a picture into a map: an object's mask, depth, or edges."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from unialignment.serving.requests import TaskRequest
from unialignment.serving.web.context import PageContext, picture_path
from unialignment.serving.web.widgets import (
    Drawn,
    Tab,
    check_prompt,
    choice_field,
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

KINDS = {"Depth": "depth", "Mask of an object": "segment", "Edges": "edges"}
EXAMPLES = ("the car", "the dog", "the apple")


def build(ctx: PageContext) -> tuple[Tab, gr.Image]:
    """Lay the tab out; returns it with its result, which the tab for maps can take."""
    with gr.Row():
        with gr.Column(min_width=280):
            source = source_panel(ctx, "Picture to look at", "perceive")
            kind = gr.Radio(list(KINDS), value="Depth", label="Map", elem_id="perceive-kind")
            with gr.Column(visible=False) as named:
                prompt = gr.Textbox(label="Of what", placeholder=EXAMPLES[0], max_length=1000, elem_id="perceive-of")
                gr.Examples([[text] for text in EXAMPLES], [prompt], label="Examples")
            run, stop = run_buttons("perceive", "Draw the map")
            settings = settings_panel(ctx, "perceive", ("guidance_scale", "image_guidance_scale"))
        with gr.Column(min_width=280):
            result, download = result_picture("perceive", "Map")
            status = gr.HTML(progress(0.0, "ready"), elem_id="perceive-status")
            slider = compare_slider("perceive", "Picture and map")
            link = link_row("perceive")
    drawn = Drawn(result, download, status, slider, link[0])

    async def look(path: str | None, label: str, of: str, *knobs: Any) -> AsyncIterator[dict[Any, Any]]:
        path, chosen = picture_path(path), KINDS[label]
        text = check_prompt(of, "what to mask, for instance “the dog”,") if chosen == "segment" else None
        request = TaskRequest("perceive", text, (path,), chosen, settings.options(knobs))
        said = {"kind": chosen, "of": text, "picture": gallery_number(ctx, path)}
        async for shown, _ in drawn.draw(ctx, request, path, settings, said):
            yield shown

    kind.change(
        lambda label: gr.update(visible=KINDS[label] == "segment"), kind, named,
        show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    runs(
        look, run, stop, [source, kind, prompt, *settings.widgets],
        [*drawn.widgets, settings.seed], link, status, enter=prompt,
    )  # fmt: skip
    fields = {
        "kind": choice_field(kind, {value: label for label, value in KINDS.items()}),
        "of": text_field(prompt),
        "picture": gallery_field(ctx, source),
        **settings.fields(),
    }
    return Tab("perceive", fields, source), result
