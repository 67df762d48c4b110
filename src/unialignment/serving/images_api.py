"""``/v1/images``: generation, and edits of all kinds (editing, composing, perceiving, drawing from maps)."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi.responses import Response, StreamingResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from unialignment.outputs import ImageResult
from unialignment.serving.engine import Done, Handle, Preview, TaskRequest
from unialignment.serving.errors import APIError
from unialignment.serving.pictures import drawn_size, encode, parse_size, resized
from unialignment.serving.schemas import (
    DrawingOptions,
    ErrorBody,
    GenerationBody,
    ImageData,
    ImagesResponse,
    OutputFormat,
    Solver,
    Usage,
)
from unialignment.serving.service import Service, following, guarded
from unialignment.tasks import Task

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in (
        (400, "Something of the request is unusable."),
        (401, "No API key, or a wrong one."),
        (404, "No such model."),
        (408, "The body didn't arrive in time."),
        (413, "The body is too large."),
        (415, "The body is of another type."),
        (429, "Too many requests are waiting."),
        (503, "The engine is not available."),
        (504, "The request's deadline passed."),
    )
}
STREAMED: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "The result, or a stream."},
}
_PASSED = (
    *("seed", "num_inference_steps", "guidance_scale", "image_guidance_scale", "negative_prompt", "fit"),
    *("guidance_interval", "solver", "shift", "rewrite", "best_of", "best_of_text"),
)
router = APIRouter(prefix="/v1/images", tags=["images"])


@dataclass(frozen=True)
class _Drawing:
    """A checked request for pictures."""

    request: TaskRequest
    size: tuple[int, int] | None
    kind: str
    quality: int | None
    event: str


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _prepare(
    service: Service,
    body: DrawingOptions,
    task: str,
    prompt: str | None,
    images: tuple[bytes, ...] = (),
    kind: str | None = "",
) -> _Drawing:
    service.check_model(body.model)
    count = service.check_count(body.n)
    service.check_text(prompt or "", "prompt")
    service.check_text(body.negative_prompt or "", "negative_prompt")
    service.check_text(body.best_of_text or "", "best_of_text")
    if body.response_format not in (None, "b64_json"):
        message = "this server keeps no files to link to; use response_format='b64_json'"
        raise APIError(400, message, "invalid_value", "response_format")
    if body.background == "transparent":
        raise APIError(400, "this model draws no transparency", "invalid_value", "background")
    if body.svg or body.frame_count not in (None, 1, "1"):
        raise APIError(400, "this model draws single raster pictures only", "invalid_value", "svg")
    size = parse_size(body.size, service.settings.max_output_pixels)
    options: dict[str, Any] = {name: value for name in _PASSED if (value := getattr(body, name)) is not None}
    options["num_images_per_prompt"] = count
    if body.width or body.height:
        options.update({name: value for name in ("width", "height") if (value := getattr(body, name)) is not None})
    elif size is not None:
        side, step, largest = service.pipe.default_size, service.size_step, service.largest_side
        options["width"], options["height"] = drawn_size(size, side, step, largest)
    return _Drawing(
        TaskRequest(
            task, prompt, images, kind, options, body.priority, body.timeout,
            (body.partial_images or 0) if body.stream else 0,
        ),
        size, body.output_format, body.output_compression,
        "image_edit" if images else "image_generation",
    )  # fmt: skip


def _usage(service: Service, drawing: _Drawing, result: ImageResult) -> Usage:
    step, settings = service.size_step, result.settings
    patches = (settings["width"] // step) * (settings["height"] // step)
    text = service.count_tokens(drawing.request.prompt or "")
    pictures = patches * len(drawing.request.images)
    drawn = patches * len(result.images)
    return Usage(
        input_tokens=text + pictures,
        output_tokens=drawn,
        total_tokens=text + pictures + drawn,
        input_tokens_details={"text_tokens": text, "image_tokens": pictures},
    )


def _encoded(drawing: _Drawing, result: ImageResult) -> list[ImageData]:
    entries = zip(result.images, result.seeds, result.metadata(), strict=True)
    return [
        ImageData(
            b64_json=encode(resized(image, drawing.size), drawing.kind, drawing.quality, metadata),
            seed=seed,
            revised_prompt=metadata.get("revised_prompt"),
        )
        for image, seed, metadata in entries
    ]


async def _answer(request: Request, service: Service, drawing: _Drawing, stream: bool) -> Response | ImagesResponse:
    handle = await service.submit(drawing.request)
    if stream:
        return _stream(service, drawing, handle)
    (result,) = await service.finished(request, [handle])
    data = await run_in_threadpool(_encoded, drawing, result)
    return ImagesResponse(
        created=int(time.time()),
        data=data,
        size=_size(drawing, result),
        output_format=drawing.kind,  # type: ignore[arg-type]
        usage=_usage(service, drawing, result),
        task=result.task,
    )


def _size(drawing: _Drawing, result: ImageResult) -> str:
    width, height = drawing.size or result.images[0].size
    return f"{width}x{height}"


def _stream(service: Service, drawing: _Drawing, handle: Handle) -> StreamingResponse:
    async def events() -> AsyncIterator[tuple[str | None, Mapping[str, Any]]]:
        common = {"background": "opaque", "output_format": drawing.kind, "quality": "auto"}
        async for event in following(handle):
            if isinstance(event, Preview):
                width, height = drawing.size or event.image.size
                data = await run_in_threadpool(
                    encode, resized(event.image, drawing.size), drawing.kind, drawing.quality
                )
                name = f"{drawing.event}.partial_image"
                yield name, {
                    "type": name, "b64_json": data, "partial_image_index": event.number, "index": event.index,
                    "created_at": int(time.time()), "size": f"{width}x{height}", **common,
                }  # fmt: skip
            elif isinstance(event, Done):
                assert isinstance(event.result, ImageResult)
                usage = _usage(service, drawing, event.result).model_dump()
                name = f"{drawing.event}.completed"
                for index, picture in enumerate(await run_in_threadpool(_encoded, drawing, event.result)):
                    yield name, {
                        "type": name, "b64_json": picture.b64_json, "seed": picture.seed, "index": index,
                        "created_at": int(time.time()), "size": _size(drawing, event.result), "usage": usage, **common,
                    }  # fmt: skip

    return service.stream(guarded(events(), [handle]), end=False)


@router.post("/generations", response_model=ImagesResponse, responses=STREAMED)
async def generate(request: Request, body: GenerationBody) -> Any:
    """Draw pictures from text."""
    service = _service(request)
    drawing = _prepare(service, body, "generate", body.prompt)
    return await _answer(request, service, drawing, bool(body.stream))


# ---------------------------------------------------------------------------------------------------------------- edits


def perception_of(task: Task, prompt: str) -> tuple[str, str] | None:
    """The kind of map that a prompt asks for and what it is of, if it is worded as the model learned it.

    ``"segment the dog"`` → ``("segment", "the dog")``; ``"estimate the depth"`` → ``("depth", "")``. A kind's bare name
    (``"depth"``, ``"edge map"``) is understood too.
    """
    words = " ".join(prompt.lower().split()).rstrip(".! ")
    for kind, template in task.templates.items():
        before, found, _ = template.partition("{prompt}")
        if found:
            if before and words.startswith(before) and len(words) > len(before):
                return kind, " ".join(prompt.split())[len(before) :].rstrip(".! ")
        elif words in (template, kind, f"{kind} map", f"{kind.removesuffix('s')} map"):
            return kind, ""
    return None


def choose_task(
    service: Service, task: str | None, kind: str | None, prompt: str, images: int
) -> tuple[str, str, str | None]:
    """Task, kind and prompt of an edit: by explicit field, else by the prompt's wording and the number of pictures."""
    registry = service.pipe.tasks
    if task is None and kind is not None:
        task = "perceive"
    if task is None:
        found = (
            perception_of(registry.get("perceive"), prompt) if images == 1 and "perceive" in registry.names else None
        )
        if found is not None:
            return "perceive", found[0], found[1] or None
        task = "edit" if images == 1 else "compose"
    declared = registry.get(task)
    if declared.target != "image":
        raise APIError(400, f"{task} writes a text; use /v1/chat/completions", "invalid_value", "task")
    if kind is not None and kind not in declared.kinds:
        known = ", ".join(one for one in declared.kinds if one) or "none"
        raise APIError(400, f"{task} has no kind {kind[:40]!r}; there are {known}", "invalid_value", "kind")
    if task == "perceive" and kind is None:
        found = perception_of(declared, prompt)
        if found is None:
            kinds = ", ".join(declared.kinds)
            raise APIError(400, f"give the kind of map: {kinds}", "invalid_value", "kind")
        return task, found[0], found[1] or None
    chosen = kind or declared.kinds[0]
    if "{prompt}" not in declared.templates[chosen]:
        return task, kind or "", None  # the kind says it all; OpenAI's API asks for a prompt all the same
    if task == "perceive":
        found = perception_of(declared, prompt)
        prompt = found[1] if found is not None and found[0] == chosen else prompt
    return task, kind or "", prompt


@router.post("/edits", response_model=ImagesResponse, responses=STREAMED)
async def edit(
    request: Request,
    prompt: Annotated[str, Form(description="What to do. With a kind of map that needs no words it has no effect.")],
    image: Annotated[list[UploadFile] | None, File(description="One picture to edit, or several to compose.")] = None,
    image_list: Annotated[list[UploadFile] | None, File(alias="image[]", description="The same, as a list.")] = None,
    task: Annotated[
        Literal["edit", "compose", "perceive", "control"] | None,
        Form(description="From prompt and pictures unless given."),
    ] = None,
    kind: Annotated[
        Literal["depth", "segment", "edges"] | None, Form(description="Kind of map; implies the task perceive.")
    ] = None,
    model: Annotated[str | None, Form()] = None,
    n: Annotated[int, Form(ge=1)] = 1,
    size: Annotated[str | None, Form()] = None,
    width: Annotated[int | None, Form(ge=1)] = None,
    height: Annotated[int | None, Form(ge=1)] = None,
    response_format: Annotated[str | None, Form()] = None,
    output_format: Annotated[OutputFormat, Form()] = "png",
    output_compression: Annotated[int | None, Form(ge=0, le=100)] = None,
    stream: Annotated[bool, Form()] = False,
    partial_images: Annotated[int | None, Form(ge=0, le=3)] = None,
    seed: Annotated[int | None, Form(ge=0, le=2**62)] = None,
    num_inference_steps: Annotated[int | None, Form(ge=1)] = None,
    guidance_scale: Annotated[float | None, Form(ge=0)] = None,
    image_guidance_scale: Annotated[float | None, Form(ge=0)] = None,
    negative_prompt: Annotated[str | None, Form()] = None,
    fit: Annotated[Literal["crop", "pad"] | None, Form()] = None,
    solver: Annotated[Solver | None, Form()] = None,
    best_of: Annotated[int | None, Form(ge=1)] = None,
    best_of_text: Annotated[str | None, Form(description="What best_of compares pictures with.")] = None,
    priority: Annotated[int, Form(ge=-10, le=10)] = 0,
    timeout: Annotated[float | None, Form(ge=0.001, le=3600)] = None,
    background: Annotated[str | None, Form()] = None,
) -> Any:
    """Change a picture, compose several, draw a map of one, or a picture from a map."""
    service = _service(request)
    form = await request.form()  # parsed already
    if "mask" in form or "mask[]" in form:
        message = "masks are not supported; say in the prompt what to change"
        raise APIError(400, message, "invalid_value", "mask")
    known = {field.alias for field in request.scope["route"].dependant.body_params}
    unknown = sorted(set(form) - known - _WITHOUT_EFFECT)
    if unknown:
        name = unknown[0][:60]
        raise APIError(400, f"unknown parameter {name!r}; see /docs for those that exist", "unknown_parameter", name)
    files = [*(image or []), *(image_list or [])]
    if not files:
        raise APIError(400, "image: give at least one picture", "invalid_value", "image")
    if len(files) > service.settings.max_images:
        raise APIError(
            400, f"at most {service.settings.max_images} pictures, got {len(files)}", "invalid_value", "image"
        )
    service.check_text(prompt, "prompt")
    chosen, chosen_kind, text = choose_task(service, task, kind, prompt, len(files))
    try:
        body = DrawingOptions(
            model=model, n=n, size=size, width=width, height=height, response_format=response_format,
            output_format=output_format, output_compression=output_compression, stream=stream,
            partial_images=partial_images, seed=seed, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, image_guidance_scale=image_guidance_scale,
            negative_prompt=negative_prompt, fit=fit, solver=solver, best_of=best_of,
            best_of_text=best_of_text, priority=priority,
            timeout=timeout, background=background,  # type: ignore[arg-type]
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else None
        raise APIError(400, f"{field}: {first['msg']}", "invalid_value", field) from None
    images = tuple([await file.read() for file in files])
    drawing = _prepare(service, body, chosen, text, images, chosen_kind)
    return await _answer(request, service, drawing, stream)


_WITHOUT_EFFECT = {"quality", "user", "input_fidelity", "moderation", "safety_identifier", "complexity", "style"}
