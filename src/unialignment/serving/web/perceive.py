"""The tab that turns a picture into a map: an object's mask, depth, or edges."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from unialignment.serving.requests import TaskRequest
from unialignment.serving.web.context import MAX_PREVIEWS, PageContext, follow, picture_path
from unialignment.serving.web.widgets import (
    Tab,
    check_prompt,
    choice_field,
    compare_slider,
    gallery_field,
    gallery_number,
    link_query,
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

    async def look(path: str | None, label: str, of: str, *knobs: Any) -> AsyncIterator[dict[Any, Any]]:
        path, chosen = picture_path(path), KINDS[label]
        text = check_prompt(of, "what to mask, for instance “the dog”,") if chosen == "segment" else None
        options = settings.options(knobs)
        request = TaskRequest("perceive", text, (path,), chosen, options, client="page",
                              previews=min(options["num_inference_steps"], MAX_PREVIEWS))  # fmt: skip
        yield {settings.seed: options["seed"], download: gr.update(interactive=False)}
        async for update in follow(ctx.engine, request):
            shown: dict[Any, Any] = {status: progress(update.fraction, update.note)}
            if update.image is not None:
                shown[result] = update.image
            if update.result is not None:
                after = str((await asyncio.to_thread(ctx.save, update.result))[0])
                compared = await asyncio.to_thread(ctx.compared, path, update.result)
                shown |= {
                    result: after,
                    slider: gr.update(value=compared, visible=True),
                    download: gr.update(value=after, interactive=True),
                    status: progress(1.0, f"{update.note}, seed {options['seed']}"),
                    link[0]: link_query("perceive", {
                        "kind": chosen, "of": text, "seed": options["seed"], "fresh": False,
                        "steps": options["num_inference_steps"], "guidance_scale": options["guidance_scale"],
                        "image_guidance_scale": options["image_guidance_scale"],
                        "picture": gallery_number(ctx, path),
                    }),
                }  # fmt: skip
            yield shown

    kind.change(
        lambda label: gr.update(visible=KINDS[label] == "segment"), kind, named,
        show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    runs(
        look, run, stop, [source, kind, prompt, *settings.widgets],
        [result, download, status, slider, settings.seed, link[0]], link, status, enter=prompt,
    )  # fmt: skip
    fields = {
        "kind": choice_field(kind, {value: label for label, value in KINDS.items()}),
        "of": text_field(prompt),
        "picture": gallery_field(ctx, source),
        **settings.fields(),
    }
    return Tab("perceive", fields, source), result
