"""The tab that reads a picture: describes it, answers a question, or fills the gaps of a text about it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from unialignment.serving.requests import TaskRequest
from unialignment.serving.web.context import PageContext, follow, picture_path
from unialignment.serving.web.widgets import (
    Tab,
    check_prompt,
    choice_field,
    gallery_field,
    gallery_number,
    link_query,
    link_row,
    progress,
    run_buttons,
    runs,
    settings_panel,
    source_panel,
    text_field,
)

MODES = {"Describe": "caption", "Ask": "answer", "Fill gaps": "infill"}
LABELS = {"caption": "", "answer": "Question", "infill": "Text with ___ for each missing word"}
EXAMPLES = {
    "answer": ("what is in the picture?", "what color is the background?", "is there a car?"),
    "infill": ("a large flat ___ in the center, on a ___ background", "a ___ dog on the ___, on a blue background"),
}


def build(ctx: PageContext) -> Tab:
    """Lay the tab out."""
    with gr.Row():
        with gr.Column(min_width=280):
            source = source_panel(ctx, "Picture to read", "understand")
        with gr.Column(min_width=280):
            mode = gr.Radio(list(MODES), value="Describe", label="Do", elem_id="understand-mode")
            with gr.Column(visible=False) as asking:
                prompt = gr.Textbox(label=LABELS["answer"], max_length=1000, elem_id="understand-prompt",
                                    placeholder=EXAMPLES["answer"][0])  # fmt: skip
            examples = {}
            for task, texts in EXAMPLES.items():
                with gr.Column(visible=False) as examples[task]:
                    gr.Examples([[text] for text in texts], [prompt], label="Examples")
            run, stop = run_buttons("understand", "Read")
            answer = gr.Textbox(label="Text", lines=3, interactive=False, buttons=["copy"], elem_id="understand-text",
                                elem_classes="ua-text")  # fmt: skip
            status = gr.HTML(progress(0.0, "ready"), elem_id="understand-status")
            settings = settings_panel(ctx, "caption", ("temperature",))
            link = link_row("understand")

    async def read(path: str | None, label: str, text: str, *knobs: Any) -> AsyncIterator[dict[Any, Any]]:
        path, task, options = picture_path(path), MODES[label], settings.options(knobs)
        wanted = {"answer": "a question", "infill": "a text with gaps"}
        prompt_text = check_prompt(text, wanted[task]) if task in wanted else None
        request = TaskRequest(task, prompt_text, (path,), options=options, previews=1)
        yield {settings.seed: options["seed"], answer: ""}
        async for update in follow(ctx.engine, request):
            shown: dict[Any, Any] = {status: progress(update.fraction, update.note)}
            if update.text is not None:
                shown[answer] = update.text
            if update.result is not None:
                shown |= {
                    answer: update.result.texts[0],
                    link[0]: link_query("understand", {
                        "mode": task, "prompt": prompt_text, "picture": gallery_number(ctx, path),
                        **settings.query(options),
                    }),
                }  # fmt: skip
            yield shown

    def switch(label: str) -> list[Any]:
        task = MODES[label]
        return [
            gr.update(visible=task != "caption"),
            gr.update(label=LABELS[task], placeholder=EXAMPLES.get(task, ("",))[0]),
            *(gr.update(visible=task == name) for name in examples),
        ]

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    mode.change(switch, mode, [asking, prompt, *examples.values()], **quiet)
    mode.input(lambda label: ctx.default(MODES[label])["num_inference_steps"], mode, settings.steps, **quiet)
    runs(
        read, run, stop, [source, mode, prompt, *settings.widgets],
        [answer, status, settings.seed, link[0]], link, status, enter=prompt,
    )  # fmt: skip
    fields = {
        "mode": choice_field(mode, {value: label for label, value in MODES.items()}),
        "prompt": text_field(prompt),
        "picture": gallery_field(ctx, source),
        **settings.fields(),
    }
    return Tab("understand", fields, source)
