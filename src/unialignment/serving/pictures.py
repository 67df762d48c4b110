"""Pictures in requests and responses: data: URLs in, encoded bytes out. Knows nothing of routes or models."""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image, PngImagePlugin

from unialignment.metadata import KEY
from unialignment.serving.errors import APIError

_DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[\w.+-]*)*)(;base64)?,", re.IGNORECASE)
_SIZE = re.compile(r"(\d{1,5})[x×](\d{1,5})")


def picture_from_url(url: str, allow_urls: bool, param: str) -> str | bytes:
    """A picture as the engine takes it: the bytes of a data: URL, or an http(s) URL where those are allowed.

    Raises:
        APIError: It is neither, or damaged. Paths and other schemes are never opened.
    """
    if url[:5].lower() == "data:":
        head = _DATA.match(url[:1000])
        if head is None or head[3] is None:
            raise APIError(400, "expected 'data:image/png;base64,…' with base64 data", "invalid_image_url", param)
        if head[1] and not head[1].lower().startswith(("image/", "application/octet-stream")):
            raise APIError(400, f"expected a picture, got a data: URL of type {head[1][:60]}", "invalid_image", param)
        try:
            return base64.b64decode("".join(url[head.end() :].split()), validate=True)
        except (binascii.Error, ValueError):
            raise APIError(400, "the data: URL holds no valid base64", "invalid_image_url", param) from None
    if url[:8].lower().startswith(("http://", "https://")):
        if allow_urls:
            return url
        message = "this server fetches no URLs; send the picture itself as a data: URL"
        raise APIError(400, message, "url_not_allowed", param)
    raise APIError(400, "expected a picture as 'data:image/…;base64,…'", "invalid_image_url", param)


def encode(image: Image.Image, kind: str, quality: int | None = None, metadata: Mapping[str, Any] | None = None) -> str:
    """A picture as base64 of a PNG (with its metadata inside), JPEG or WebP."""
    buffer = io.BytesIO()
    if kind == "png":
        info = PngImagePlugin.PngInfo()
        if metadata is not None:
            info.add_itxt(KEY, json.dumps(dict(metadata), ensure_ascii=False))
            info.add_text("Software", "UniAlignment")
        image.save(buffer, "PNG", pnginfo=info)
    else:
        image.save(buffer, kind.upper(), quality=90 if quality is None else quality)
    return base64.b64encode(buffer.getvalue()).decode()


def parse_size(text: str | None, largest: int) -> tuple[int, int] | None:
    """Width and height of ``"WxH"``; ``None`` for ``"auto"``.

    Raises:
        APIError: It is neither, or has more than ``largest`` pixels.
    """
    if text is None or text == "auto":
        return None
    found = _SIZE.fullmatch(text)
    if found is None or not int(found[1]) or not int(found[2]):
        raise APIError(400, f"size must be 'auto' or 'WIDTHxHEIGHT', got {text[:20]!r}", "invalid_value", "size")
    width, height = int(found[1]), int(found[2])
    if width * height > largest or max(width, height) > 16 * min(width, height):
        raise APIError(
            400, f"size {text} is not possible here: at most {largest:,} pixels, sides within 1:16", "invalid_value",
            "size",
        )  # fmt: skip
    return width, height


def drawn_size(wanted: tuple[int, int], side: int, step: int, largest: int) -> tuple[int, int]:
    """Legal width and height of the wanted shape with about the area ``side``²: what a model is good at.

    Args:
        wanted: Width and height asked for.
        side: Side of the pictures that the model was trained on.
        step: Sides must be multiples of this.
        largest: Longest legal side.
    """
    ratio = (wanted[0] / wanted[1]) ** 0.5
    width, height = (min(largest, max(step, round(side * value / step) * step)) for value in (ratio, 1 / ratio))
    return width, height


def resized(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """The picture at ``size``, or as it is."""
    return image if size is None or image.size == size else image.resize(size, Image.Resampling.LANCZOS)
