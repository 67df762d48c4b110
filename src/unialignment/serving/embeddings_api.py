"""``/v1/embeddings``: texts and pictures in one space."""

from __future__ import annotations

import base64
from typing import Any

from fastapi import APIRouter, Request

from unialignment.serving.engine import EmbedRequest
from unialignment.serving.errors import APIError
from unialignment.serving.images_api import ERRORS
from unialignment.serving.pictures import picture_from_url
from unialignment.serving.schemas import (
    Embedding,
    EmbeddingBody,
    EmbeddingResponse,
    EmbeddingUsage,
    ImagePart,
    TextPart,
)
from unialignment.serving.service import Service

router = APIRouter(prefix="/v1", tags=["embeddings"])


@router.post("/embeddings", response_model=EmbeddingResponse, responses=ERRORS)
async def embed(request: Request, body: EmbeddingBody) -> Any:
    """Unit vectors; the cosine of a text's and a picture's says how well they match."""
    service: Service = request.app.state.service
    model = service.check_model(body.model)
    items = body.input if isinstance(body.input, list) else [body.input]
    limit = service.settings.engine.max_embeddings
    if not 1 <= len(items) <= limit:
        raise APIError(400, f"input must hold 1 to {limit} items, got {len(items)}", "invalid_value", "input")
    texts: list[str] = []
    images: list[str | bytes] = []
    order: list[tuple[bool, int]] = []  # whether it is a picture, and its place among those or among the texts
    for item in items:
        url = item.image_url.url if isinstance(item, ImagePart) else None
        if isinstance(item, str) and item[:11].lower() == "data:image/":
            url = item
        if url is not None:
            order.append((True, len(images)))
            images.append(picture_from_url(url, service.settings.allow_urls, "input"))
        else:
            text = item.text if isinstance(item, TextPart) else str(item)
            order.append((False, len(texts)))
            texts.append(service.check_text(text, "input"))
    if len(images) > service.settings.max_images:
        raise APIError(400, f"at most {service.settings.max_images} pictures a request", "invalid_value", "input")
    handle = await service.submit(EmbedRequest(tuple(texts), tuple(images), body.priority, body.timeout))
    (vectors,) = await service.finished(request, [handle])
    if body.dimensions not in (None, vectors.shape[1]):
        message = f"this model's vectors have {vectors.shape[1]} dimensions, which can't be changed"
        raise APIError(400, message, "invalid_value", "dimensions")
    data = []
    for index, (is_picture, place) in enumerate(order):
        vector = vectors[len(texts) + place if is_picture else place]
        if body.encoding_format == "base64":
            value: Any = base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
        else:
            value = vector.tolist()
        data.append(Embedding(index=index, embedding=value))
    tokens = service.count_tokens(*texts)
    return EmbeddingResponse(data=data, model=model, usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens))
