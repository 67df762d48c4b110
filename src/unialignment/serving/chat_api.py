"""``/v1/chat/completions``: captions, answers and filled gaps about one picture, streamed as they settle."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from unialignment.outputs import TextResult
from unialignment.serving.engine import Done, Handle, TaskRequest, TextSoFar
from unialignment.serving.errors import APIError
from unialignment.serving.images_api import STREAMED
from unialignment.serving.pictures import picture_from_url
from unialignment.serving.schemas import ChatBody, ChatMessage, ChatResponse, ChatUsage, Choice, ImagePart
from unialignment.serving.service import Service, following, guarded, new_id

router = APIRouter(prefix="/v1/chat", tags=["chat"])
_DESCRIBE = re.compile(
    r"(please |can you |could you )*(describe|caption)\b.*"
    r"|what('s| is| do you see| can you see) (shown )?(in|on) (this|the) (image|picture|photo)"
    r"|what does (this|the) (image|picture|photo) show|what do you see",
    re.IGNORECASE,
)
_GAPS = re.compile(r"\[MASK\]|_{3,}")


@dataclass(frozen=True)
class _Talk:
    """A checked request for texts."""

    requests: tuple[TaskRequest, ...]
    prompt_tokens: int
    stops: tuple[str, ...]


def task_of(text: str) -> str:
    """The task that the words beside a picture ask for."""
    if _GAPS.search(text):
        return "infill"
    plain = " ".join(text.split()).rstrip(".?!: ")
    return "caption" if not plain or _DESCRIBE.fullmatch(plain) else "answer"


def _prepare(service: Service, body: ChatBody) -> _Talk:
    service.check_model(body.model)
    count = service.check_count(body.n)
    for name in ("tools", "functions", "logprobs", "audio"):
        if getattr(body, name):
            raise APIError(400, f"this model has no {name}; leave it out", "unsupported_parameter", name)
    if (body.response_format or {}).get("type", "text") != "text":
        raise APIError(400, "this model writes plain text only", "unsupported_parameter", "response_format")
    if body.modalities and body.modalities != ["text"]:
        raise APIError(400, "this route answers with text only", "unsupported_parameter", "modalities")
    text, images = _question(body)
    service.check_text(text, "messages")
    service.check_text(body.negative_prompt or "", "negative_prompt")
    task = body.task or task_of(text)
    declared = service.pipe.tasks.get(task)
    if not images and declared.min_sources:
        message = "this model answers questions about pictures: put one into a user message as an image_url part"
        raise APIError(400, message, "missing_image", "messages")
    if len(images) > 1:
        message = f"one picture a message, got {len(images)}; ask about each in a request of its own"
        raise APIError(400, message, "too_many_images", "messages")
    pictures = tuple(picture_from_url(url, service.settings.allow_urls, "messages") for url in images)
    options: dict[str, Any] = {
        name: value
        for name in (
            *("num_inference_steps", "guidance_scale", "image_guidance_scale", "negative_prompt", "fit"),
            *("temperature", "top_p", "decoding", "confidence_threshold"),
        )
        if (value := getattr(body, name)) is not None
    }
    most = body.max_completion_tokens or body.max_tokens
    if most is not None and most < declared.target_length:
        options["max_length"] = most  # a limit: it never makes texts longer than the model's own
    prompt = text if task != "caption" else None
    requests = tuple(
        TaskRequest(
            task, prompt, pictures, "",
            {**options, **({} if body.seed is None else {"seed": body.seed + index})},
            body.priority, body.timeout, int(bool(body.stream)),
        )
        for index in range(count)
    )  # fmt: skip
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    tokens = service.count_tokens(text) + len(pictures) * (service.pipe.default_size // service.size_step) ** 2
    return _Talk(requests, tokens, tuple(stop for stop in stops if stop))


def _question(body: ChatBody) -> tuple[str, list[str]]:
    """The last user message's text, and the pictures of the last user message that has any."""
    users = [message for message in body.messages if message.role == "user"]
    if not users:
        raise APIError(400, "no message of role 'user'", "invalid_value", "messages")
    parts = users[-1].content or ""
    text = parts if isinstance(parts, str) else " ".join(part.text for part in parts if not isinstance(part, ImagePart))
    for message in reversed(users):
        if isinstance(message.content, list):
            found = [part.image_url.url for part in message.content if isinstance(part, ImagePart)]
            if found:
                return text, found
    return text, []


def cut(text: str, stops: tuple[str, ...], whole: bool) -> tuple[str, bool]:
    """A text before its first stop sequence, and whether there was one.

    Unless the text is ``whole``, an end that may be the beginning of a stop sequence is held back.
    """
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    if places:
        return text[: min(places)], True
    if not whole:
        held = max((_overlap(text, stop) for stop in stops), default=0)
        text = text[: len(text) - held]
    return text, False


def _overlap(text: str, stop: str) -> int:
    """How many characters at the text's end are the beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@router.post("/completions", response_model=ChatResponse, responses=STREAMED)
async def complete(request: Request, body: ChatBody) -> Any:
    """Describe a picture, answer a question about it, or fill the gaps (``___``) of a text about it."""
    service: Service = request.app.state.service
    model = service.check_model(body.model)
    talk = _prepare(service, body)
    handles = await service.submit_all(talk.requests)
    if body.stream:
        return _stream(service, body, talk, model, handles)
    results = await service.finished(request, handles)
    texts = [cut(result.texts[0], talk.stops, whole=True)[0] for result in results]
    written = service.count_tokens(*texts)
    return ChatResponse(
        id=new_id("chatcmpl"),
        created=int(time.time()),
        model=model,
        choices=[Choice(index=index, message=ChatMessage(content=text)) for index, text in enumerate(texts)],
        usage=ChatUsage(
            prompt_tokens=talk.prompt_tokens, completion_tokens=written, total_tokens=talk.prompt_tokens + written
        ),
    )


def _stream(service: Service, body: ChatBody, talk: _Talk, model: str, handles: list[Handle]) -> StreamingResponse:
    """Deltas can only append, while diffusion writes anywhere: sent is the beginning that can't change any more."""
    common = {
        "id": new_id("chatcmpl"),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": None,
    }
    asked = body.stream_options

    def chunk(
        index: int, delta: Mapping[str, Any], reason: str | None = None, more: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": dict(delta), "logprobs": None, "finish_reason": reason}
        return {**common, "choices": [choice], **more}

    async def events() -> AsyncIterator[tuple[str | None, Mapping[str, Any]]]:
        texts = []
        for index, handle in enumerate(handles):
            yield None, chunk(index, {"role": "assistant", "content": ""})
            sent = ""
            async for event in following(handle):
                more: dict[str, Any] = {}
                if isinstance(event, TextSoFar):
                    text, stopped = cut(event.settled, talk.stops, whole=False)
                    if asked is not None and asked.include_canvas:
                        more = {"canvas": event.text, "step": event.step, "steps": event.steps}
                elif isinstance(event, Done):
                    assert isinstance(event.result, TextResult)
                    text, stopped = cut(event.result.texts[0], talk.stops, whole=True)
                else:
                    continue
                if len(text) > len(sent) or more:
                    yield None, chunk(index, {"content": text[len(sent) :]}, more=more)
                    sent = max(sent, text, key=len)
                if stopped:
                    break
            texts.append(sent)
            yield None, chunk(index, {}, "stop")
        if asked is not None and asked.include_usage:
            written = service.count_tokens(*texts)
            total = talk.prompt_tokens + written
            usage = {"prompt_tokens": talk.prompt_tokens, "completion_tokens": written, "total_tokens": total}
            yield None, {**common, "choices": [], "usage": usage}

    return service.stream(guarded(events(), handles), end=True)
