"""The tab that draws new pictures: from words, or from words and several given pictures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from unialignment.errors import InputError
from unialignment.serving.requests import TaskRequest
from unialignment.serving.web.context import MAX_PREVIEWS, PageContext, follow
from unialignment.serving.web.widgets import (
    Field,
    Tab,
    check_prompt,
    choice_field,
    gallery_field,
    gallery_number,
    link_query,
    link_row,
    local_only,
    progress,
    result_picture,
    run_buttons,
    runs,
    settings_panel,
    sketch_panel,
    strip,
    text_field,
)

MODES = {"From words": "generate", "From pictures": "compose"}
EXAMPLES = {
    "generate": (
        "a large flat car in the center, on a yellow background",
        "a large shaded dog on the left, on a blue background",
        "a shaded cactus on the left and a flat pizza on the right, on a white background",
    ),
    "compose": (
        "put the subject of image 1 to the left of the subject of image 2",
        "put the subject of image 1 above the subject of image 2",
    ),
}


def build(ctx: PageContext) -> tuple[Tab, gr.Image]:
    """Lay the tab out; returns it with its result, which other tabs can take."""
    most = ctx.tasks.get("compose").max_sources
    with gr.Row():
        with gr.Column(min_width=280):
            mode = gr.Radio(list(MODES), value="From words", label="Draw", elem_id="create-mode")
            prompt = gr.Textbox(
                label="What to draw", submit_btn=False, max_length=1000, elem_id="create-prompt",
                placeholder=EXAMPLES["generate"][0],
            )  # fmt: skip
            with gr.Column(visible=False) as given:
                references = local_only(
                    gr.Gallery(
                        label=f"Subjects: 1 to {most} pictures",
                        type="filepath", interactive=True, columns=4, height=180, object_fit="contain",
                        sources=["upload", "clipboard"], file_types=["image"], elem_id="create-references", buttons=[],
                    )
                )  # fmt: skip

                def add(path: str, values: list[Any] | None) -> list[str]:
                    return [*_paths(values), path][-most:]

                strip(ctx, "create", add, references, [references])
                sketch_panel(ctx, "create", add, references, [references])
            run, stop = run_buttons("create", "Draw")
            words = gr.Examples([[text] for text in EXAMPLES["generate"]], [prompt], label="Examples")
            with gr.Column(visible=False) as other:
                # A click fills in the pictures as well: without them the words mean nothing.
                pair = [str(path) for path, _ in ctx.gallery[:2]]
                for number, text in enumerate(EXAMPLES["compose"], 1):
                    button = gr.Button(text, size="sm", elem_id=f"compose-example-{number}")
                    button.click(
                        lambda text=text: (text, pair), None, [prompt, references],
                        show_progress="hidden", api_visibility="private",
                    )  # fmt: skip
            settings = settings_panel(ctx, "generate")
            count = gr.Slider(1, ctx.max_n, 1, step=1, label="Pictures")
        with gr.Column(min_width=280):
            result, download = result_picture("create")
            every = gr.Gallery(label="All pictures", columns=4, height=140, visible=False, allow_preview=False,
                               elem_id="create-all", buttons=[])  # fmt: skip
            status = gr.HTML(progress(0.0, "ready"), elem_id="create-status")
            link = link_row("create")
    saved = gr.State([])

    async def draw(
        mode: str, prompt: str, values: list[Any] | None, count: int, *knobs: Any
    ) -> AsyncIterator[dict[Any, Any]]:
        task = MODES[mode]
        paths = _paths(values) if task == "compose" else []
        if task == "compose" and not paths:
            raise InputError("add the pictures to take subjects from first: upload, or take some from the strip")
        options = {**settings.options(knobs), "num_images_per_prompt": int(count)}
        request = TaskRequest(
            task, check_prompt(prompt, "what to draw"), tuple(paths), options=options,
            previews=min(options["num_inference_steps"], MAX_PREVIEWS),
        )  # fmt: skip
        yield {settings.seed: options["seed"], download: gr.update(interactive=False), every: gr.update(visible=False)}
        async for update in follow(ctx.engine, request):
            shown: dict[Any, Any] = {status: progress(update.fraction, update.note)}
            if update.image is not None and update.index == 0:
                shown[result] = update.image
            if update.result is not None:
                revised = getattr(update.result, "revised_prompts", None)
                drawn = f", drawn as: {revised[0]}" if revised else ""
                files = [str(path) for path in await asyncio.to_thread(ctx.save, update.result)]
                shown |= {
                    result: files[0],
                    download: gr.update(value=files[0], interactive=True),
                    every: gr.update(value=files, visible=len(files) > 1),
                    saved: files,
                    status: progress(1.0, f"{update.note}, seed {options['seed']}{drawn}"),
                    link[0]: link_query("create", {
                        "mode": task, "prompt": prompt, "n": count, "pictures": _numbers(ctx, paths),
                        **settings.query(options),
                    }),
                }  # fmt: skip
            yield shown

    def switch(mode: str) -> list[Any]:
        compose, default = MODES[mode] == "compose", ctx.default(MODES[mode])
        return [
            gr.update(visible=compose), gr.update(visible=compose), gr.update(visible=not compose),
            default["num_inference_steps"], default["guidance_scale"],
            gr.update(placeholder=EXAMPLES[MODES[mode]][0]),
        ]  # fmt: skip

    def pick(files: list[str], event: gr.SelectData) -> list[Any]:
        path = files[int(event.index)]
        return [path, gr.update(value=path)]

    # `input`, not `change`: a link that sets the mode brings its own steps and guidance.
    mode.input(
        switch, mode, [given, other, words.dataset, settings.steps, settings.scales[0], prompt],
        show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    mode.change(
        lambda mode: [gr.update(visible=MODES[mode] == "compose")] * 2 + [gr.update(visible=MODES[mode] != "compose")],
        mode, [given, other, words.dataset], show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    every.select(pick, saved, [result, download], show_progress="hidden", api_visibility="private")
    runs(
        draw, run, stop, [mode, prompt, references, count, *settings.widgets],
        [result, download, every, saved, status, settings.seed, link[0]], link, status, enter=prompt,
    )  # fmt: skip
    fields = {
        "mode": choice_field(mode, {task: label for label, task in MODES.items()}),
        "prompt": text_field(prompt),
        "n": Field(count, _count(ctx.max_n)),
        "pictures": gallery_field(ctx, references, many=True),
        **settings.fields(),
    }
    return Tab("create", fields, references), result


def _paths(values: list[Any] | None) -> list[str]:
    """Paths of a gallery's value, whose entries are paths or pairs of path and caption."""
    return [str(value[0] if isinstance(value, (tuple, list)) else value) for value in values or []]


def _numbers(ctx: PageContext, paths: list[str]) -> str | None:
    numbers = [gallery_number(ctx, path) for path in paths]
    return ",".join(map(str, numbers)) if numbers and all(numbers) else None


def _count(most: int) -> Any:
    def read(text: str) -> int:
        number = int(text)
        if not 1 <= number <= most:
            raise ValueError(text)
        return number

    return read
