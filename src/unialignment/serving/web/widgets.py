"""Building blocks of the tabs: pictures that are given, sampler settings, the progress line, links.

Knows nothing of tasks beyond their declared defaults.
"""

from __future__ import annotations

import asyncio
import functools
import html
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

import gradio as gr

from unialignment.errors import InputError, UniAlignmentError
from unialignment.serving.requests import TaskRequest
from unialignment.serving.web.context import MAX_PREVIEWS, PageContext, follow, new_seed
from unialignment.serving.web.uploads import bounded_sketches

_Component = TypeVar("_Component", bound=gr.components.Component)
MAX_STEPS = 100
"""Longest setting of the steps slider; the engine may allow fewer."""
BRUSHES = ("#cc3434", "#f08c2e", "#52a84e", "#3e6ad6", "#1a1a1e", "#ffffff")
# Puts the settings into the address bar, so that the address can be kept or sent, and hands the whole address back.
LINK_JS = """(query) => {
  const url = new URL(window.location.href);
  url.search = query || "";
  window.history.replaceState(null, "", url);
  return url.toString();
}"""


def local_only(component: _Component) -> _Component:
    """Refuse addresses where the browser sends a file that it uploaded; returns the widget.

    Gradio would fetch them: a server that fetches what strangers name can be turned against others. On the instance,
    because gradio writes a stub file beside the source of every subclass, and asks the server for its code.
    """
    move = component.async_move_resource_to_block_cache

    async def local(url_or_file_path: str | Path | None) -> str | None:
        if str(url_or_file_path or "").strip().lower().startswith(("http://", "https://")):
            raise gr.Error("Pictures are not fetched from addresses; upload the file.", print_exception=False)
        return await move(url_or_file_path)

    component.async_move_resource_to_block_cache = local  # type: ignore[method-assign]
    return component


@dataclass
class Field:
    """A widget that a link can fill in.

    Attributes:
        component: The widget.
        read: Text of the query → the widget's value; raises ValueError for an unusable one.
    """

    component: gr.components.Component
    read: Callable[[str], Any]


@dataclass
class Tab:
    """What the page needs to know of a tab.

    Attributes:
        id: Name in links.
        fields: Query key → widget.
        source: The picture that other tabs can send a result to.
    """

    id: str
    fields: dict[str, Field] = field(default_factory=dict)
    source: gr.components.Component | None = None


@dataclass(frozen=True)
class Settings:
    """Sampler widgets of a tab, in the order in which handlers receive their values."""

    seed: gr.Number
    fresh: gr.Checkbox
    steps: gr.Slider
    scales: tuple[gr.Slider, ...]
    names: tuple[str, ...]

    @property
    def widgets(self) -> list[gr.components.Component]:
        """All of them: seed, fresh, steps, scales."""
        return [self.seed, self.fresh, self.steps, *self.scales]

    def fields(self) -> dict[str, Field]:
        """Query keys for links. A link repeats its result, so the seed is fixed with it."""
        limits = {"steps": self.steps, **dict(zip(self.names, self.scales, strict=True))}
        numbers = {name: Field(slider, _between(slider)) for name, slider in limits.items()}
        return {"seed": Field(self.seed, _whole), "fresh": Field(self.fresh, lambda text: text == "1"), **numbers}

    def options(self, values: Sequence[Any]) -> dict[str, Any]:
        """Pipeline options from the widgets' values."""
        seed, fresh, steps, *scales = values
        if fresh or seed is None:
            seed = new_seed()
        return {
            "seed": int(seed),
            "num_inference_steps": int(steps),
            **{name: float(value) for name, value in zip(self.names, scales, strict=True)},
        }

    def query(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What a link says of such options; :meth:`fields` reads it."""
        scales = {name: options[name] for name in self.names}
        return {"seed": options["seed"], "fresh": False, "steps": options["num_inference_steps"], **scales}


def settings_panel(ctx: PageContext, task: str, names: Sequence[str] = ("guidance_scale",)) -> Settings:
    """Seed, steps and the scales called ``names``, folded away."""
    default = ctx.default(task)
    ranges: Mapping[str, tuple[str, float, float]] = {
        "guidance_scale": ("Guidance: pull towards the words", 0.0, 10.0),
        "image_guidance_scale": ("Guidance: pull towards the picture", 0.0, 5.0),
        "temperature": ("Temperature: 0 writes the likeliest words", 0.0, 2.0),
    }
    with gr.Accordion("Settings", open=False):
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120)
            fresh = gr.Checkbox(True, label="New seed each time", min_width=120)
        most = min(MAX_STEPS, ctx.max_steps)
        steps = gr.Slider(1, most, min(most, default["num_inference_steps"]), step=1, label="Steps")
        scales = tuple(
            gr.Slider(low, high, default[name], step=0.1, label=label)
            for name, (label, low, high) in ((name, ranges[name]) for name in names)
        )
    return Settings(seed, fresh, steps, scales, tuple(names))


def source_panel(ctx: PageContext, label: str, name: str) -> gr.Image:
    """A picture to work on, as the path of a file: uploaded, pasted, taken from the strip, or sketched."""
    picture = local_only(
        gr.Image(
            label=label,
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard"],
            height=300,
            elem_id=f"{name}-source",
            elem_classes="ua-picture",
            alt_text=label,
            placeholder="Drop, paste or choose a picture",
            buttons=["fullscreen"],
        )
    )
    strip(ctx, name, lambda path: path, picture)
    sketch_panel(ctx, name, lambda path: path, picture)
    return picture


def strip(
    ctx: PageContext,
    name: str,
    change: Callable[..., Any],
    target: gr.components.Component,
    inputs: Sequence[gr.components.Component] = (),
) -> None:
    """Pictures of the gallery as buttons; ``change(path, *inputs)`` gives the new value of ``target``."""
    if not ctx.gallery:
        return
    with gr.Row(elem_classes="ua-strip", elem_id=f"{name}-strip"):
        for number, (path, text) in enumerate(ctx.gallery, 1):
            button = gr.Button(
                f"Take picture {number}: {text}", icon=path, size="sm", min_width=56, elem_classes="ua-thumb"
            )
            button.click(
                functools.partial(change, str(path)), list(inputs), target, show_progress="hidden",
                api_visibility="private",
            )  # fmt: skip


def sketch_panel(
    ctx: PageContext,
    name: str,
    change: Callable[..., Any],
    target: gr.components.Component,
    inputs: Sequence[gr.components.Component] = (),
) -> None:
    """A canvas, folded away, and a button that makes a picture of it."""

    def use(drawing: dict[str, Any] | None, *values: Any) -> Any:
        image = (drawing or {}).get("composite")
        if image is None or image.convert("L").getextrema() == (255, 255):
            raise gr.Error("The sketch is empty.", print_exception=False)
        return change(str(ctx.save_picture(image, "sketch")), *values)

    with gr.Accordion("Sketch one", open=False, elem_id=f"{name}-sketch"):
        canvas = local_only(
            gr.Sketchpad(
                type="pil",
                canvas_size=(320, 320),
                fixed_canvas=True,
                layers=False,
                show_label=False,
                brush=gr.Brush(default_size=12, colors=list(BRUSHES)),
                buttons=[],
            )
        )
        bounded_sketches(canvas)
        button = gr.Button("Use the sketch", size="sm")
        button.click(use, [canvas, *inputs], target, show_progress="hidden", api_visibility="private")


def progress(fraction: float, note: str) -> str:
    """The progress line; announced by screen readers at its end only."""
    done = fraction >= 1.0
    live = 'role="status"' if done else ""
    return (
        f'<div class="ua-progress"><progress max="1" value="{fraction:.3f}" aria-label="progress"></progress>'
        f"<span {live}>{html.escape(note)}</span></div>"
    )


def link_query(tab: str, values: Mapping[str, Any]) -> str:
    """Query of a link; keys without a value are left out."""
    shown = {key: value for key, value in values.items() if value not in (None, "")}
    return urlencode({"tab": tab, **{key: _plain(value) for key, value in shown.items()}})


def gallery_number(ctx: PageContext, path: str | None) -> int | None:
    """Which picture of the gallery this is, from 1, if it is one: links can name those."""
    if not path:
        return None
    try:
        data = Path(path).read_bytes()
        return next((n for n, (known, _) in enumerate(ctx.gallery, 1) if known.read_bytes() == data), None)
    except OSError:
        return None


def gallery_field(ctx: PageContext, component: gr.components.Component, many: bool = False) -> Field:
    """Lets a link name pictures of the gallery."""

    def read(text: str) -> Any:
        numbers = [int(part) for part in text.split(",")]
        if not all(1 <= number <= len(ctx.gallery) for number in numbers):
            raise ValueError(text)
        paths = [str(ctx.gallery[number - 1][0]) for number in numbers]
        return paths if many else paths[0]

    return Field(component, read)


def text_field(component: gr.components.Component, limit: int = 1000) -> Field:
    """Lets a link fill in a text."""
    return Field(component, lambda text: text[:limit])


def choice_field(component: gr.components.Component, choices: Mapping[str, Any]) -> Field:
    """Lets a link choose one of several; ``choices`` maps what stands in the link to the widget's value."""

    def read(text: str) -> Any:
        if text not in choices:
            raise ValueError(text)
        return choices[text]

    return Field(component, read)


def guarded(run: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    """Shows what a user can mend as a message on the page instead of a traceback in the log."""

    @functools.wraps(run)
    async def wrapped(*args: Any) -> AsyncIterator[Any]:
        try:
            async for update in run(*args):
                yield update
        except UniAlignmentError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    return wrapped


def runs(
    run: Callable[..., AsyncIterator[Any]],
    button: gr.Button,
    stop: gr.Button,
    inputs: Sequence[gr.components.Component],
    outputs: Sequence[gr.components.Component],
    link: tuple[gr.components.Component, gr.components.Component],
    status: gr.HTML,
    enter: gr.Textbox | None = None,
) -> None:
    """Wire a tab: button and Enter start ``run``, the stop button cancels it, the link follows at the end."""
    triggers = [button.click] if enter is None else [button.click, enter.submit]
    event = gr.on(
        triggers,
        guarded(run),
        inputs=list(inputs),
        outputs=list(outputs),
        show_progress="hidden",
        concurrency_limit=None,
        api_visibility="private",
        trigger_mode="once",
    )
    stop.click(
        lambda: progress(0.0, "stopped"),
        None,
        status,
        cancels=[event],
        show_progress="hidden",
        api_visibility="private",
    )
    query, address = link
    event.then(None, inputs=[query], outputs=[address], js=LINK_JS, api_visibility="private")


def run_buttons(name: str, label: str) -> tuple[gr.Button, gr.Button]:
    """The button that starts and the one that stops."""
    with gr.Row():
        run = gr.Button(label, variant="primary", elem_id=f"{name}-run", min_width=120, scale=3)
        stop = gr.Button("Stop", elem_id=f"{name}-stop", min_width=80, scale=1)
    return run, stop


def result_picture(name: str, label: str = "Result") -> tuple[gr.Image, gr.DownloadButton]:
    """A picture that is drawn, with a button to download it."""
    image = gr.Image(
        label=label,
        type="filepath",
        image_mode=None,
        format="png",
        interactive=False,
        height=340,
        elem_id=f"{name}-result",
        elem_classes="ua-picture",
        alt_text=label,
        buttons=["fullscreen"],
    )
    return image, gr.DownloadButton("Download", elem_id=f"{name}-download", interactive=False, size="sm")


@dataclass(frozen=True)
class Drawn:
    """Widgets of a tab that draws one picture from another.

    Attributes:
        result: The picture.
        download: The same as a file.
        status: The progress line.
        slider: Source and picture laid over one another.
        query: What the link says.
    """

    result: gr.Image
    download: gr.DownloadButton
    status: gr.HTML
    slider: gr.ImageSlider
    query: gr.Textbox

    @property
    def widgets(self) -> list[gr.components.Component]:
        """All of them."""
        return [self.result, self.download, self.status, self.slider, self.query]

    async def draw(
        self, ctx: PageContext, request: TaskRequest, path: str, settings: Settings, link: Mapping[str, Any]
    ) -> AsyncIterator[tuple[dict[Any, Any], str | None]]:
        """Run a request; widget → what it shows next, and at the end the picture's file.

        Args:
            ctx: The page.
            request: What to draw; its options are those of ``settings``.
            path: The source, to compare the picture with.
            settings: The tab's sampler widgets.
            link: What the link says beside them.
        """
        options = request.options
        request = replace(request, previews=min(options["num_inference_steps"], MAX_PREVIEWS))
        yield {settings.seed: options["seed"], self.download: gr.update(interactive=False)}, None
        async for update in follow(ctx.engine, request):
            shown: dict[Any, Any] = {self.status: progress(update.fraction, update.note)}
            file = None
            if update.image is not None:
                shown[self.result] = update.image
            if update.result is not None:
                file = str((await asyncio.to_thread(ctx.save, update.result))[0])
                compared = await asyncio.to_thread(ctx.compared, path, update.result)
                shown |= {
                    self.result: file,
                    self.slider: gr.update(value=compared, visible=True),
                    self.download: gr.update(value=file, interactive=True),
                    self.status: progress(1.0, f"{update.note}, seed {options['seed']}"),
                    self.query: link_query(request.task, {**link, **settings.query(options)}),
                }
            yield shown, file


def compare_slider(name: str, label: str) -> gr.ImageSlider:
    """Two pictures laid over one another, shown once there are two."""
    return gr.ImageSlider(
        label=label,
        type="filepath",
        format="png",
        interactive=False,
        visible=False,
        elem_id=f"{name}-slider",
        buttons=[],
    )


def link_row(name: str) -> tuple[gr.Textbox, gr.Textbox]:
    """The hidden query of the last result, and the whole address beside a copy button."""
    query = gr.Textbox(visible="hidden", elem_id=f"{name}-query", container=False)
    with gr.Accordion("Link to this", open=False):
        address = gr.Textbox(
            label="Fills in the same settings. Pictures that were uploaded or sketched are not part of it.",
            interactive=False,
            buttons=["copy"],
            elem_id=f"{name}-link",
        )
    return query, address


def check_prompt(text: str | None, what: str) -> str:
    """A text that was written.

    Raises:
        InputError: It is empty.
    """
    if not text or not text.strip():
        raise InputError(f"write {what} first")
    return text.strip()


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _whole(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**53:
        raise ValueError(text)
    return number


def _between(slider: gr.Slider) -> Callable[[str], float]:
    def read(text: str) -> float:
        number = float(text)
        if not slider.minimum <= number <= slider.maximum:
            raise ValueError(text)
        return number

    return read
