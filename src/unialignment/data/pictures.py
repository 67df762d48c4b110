"""From a picture's reference to pixels of the size that a batch needs. Knows nothing of tasks or tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image as Pillow

from unialignment.data.sample import Image
from unialignment.errors import InputError
from unialignment.images import WHITE, fit_image, load_image

Size = tuple[int, int]
"""Width and height in pixels."""


def bucket_sizes(resolution: int, step: int, max_ratio: float) -> tuple[Size, ...]:
    """Sizes of about ``resolution``² pixels with sides that are multiples of ``step``, from tall to wide.

    Args:
        resolution: Side of the square one, a multiple of ``step``.
        step: Pixels.
        max_ratio: Longest side over shortest, at most.

    Raises:
        InputError: ``resolution`` isn't a multiple of ``step``.
    """
    if resolution < step or resolution % step:
        raise InputError(f"data.resolution={resolution} must be a multiple of data.bucket_step={step}")
    sizes = set()
    area = resolution * resolution
    for width in range(step, int(resolution * math.sqrt(max_ratio)) + step, step):
        height = max(step, round(area / width / step) * step)
        for size in ((width, height), (height, width)):
            if max(size) / min(size) <= max_ratio + 1e-9:
                sizes.add(size)
    sizes.add((resolution, resolution))
    return tuple(sorted(sizes, key=lambda size: (size[0] / size[1], size)))


def nearest_bucket(size: Size, sizes: tuple[Size, ...]) -> int:
    """Index of the bucket whose shape is nearest to a picture's."""
    ratio = math.log(size[0] / size[1])
    return min(range(len(sizes)), key=lambda index: abs(math.log(sizes[index][0] / sizes[index][1]) - ratio))


@dataclass(frozen=True)
class PictureLoader:
    """Opens references.

    Attributes:
        root: Folder that relative paths start from.
        max_pixels: Larger pictures are refused by their header, before a pixel is decoded.
        fit: ``"crop"`` fills the frame and cuts what overhangs, ``"pad"`` shows all on white.
    """

    root: Path
    max_pixels: int
    fit: Literal["crop", "pad"] = "crop"

    def data(self, reference: Any) -> str | bytes:
        """The path or encoded bytes behind a reference.

        Raises:
            InputError: neither.
        """
        if isinstance(reference, Mapping):  # an undecoded picture of the `datasets` library
            reference = reference.get("bytes") or reference.get("path")
        if isinstance(reference, str):
            if "://" in reference[:16]:
                raise InputError(f"{reference[:80]} is a URL; download pictures before training")
            return str(self.root / reference)
        if isinstance(reference, bytes) and reference:
            return reference
        raise InputError(f"a picture must be a path or encoded bytes, got {type(reference).__name__}")

    def load(self, reference: Any, size: Size) -> Image:
        """Pixels ``[height, width, 3]`` of exactly ``size``.

        Raises:
            InputError: missing, damaged, too large or not a picture.
        """
        picture = load_image(self.data(reference), max_pixels=self.max_pixels, background=WHITE)
        return np.asarray(fit_image(picture, *size, self.fit), dtype=np.uint8)

    def size(self, reference: Any) -> Size:
        """Width and height from the header alone, upright.

        Raises:
            InputError: the file can't be opened as a picture.
        """
        data = self.data(reference)
        try:
            if isinstance(data, bytes):
                import io

                opened = Pillow.open(io.BytesIO(data))
            else:
                opened = Pillow.open(data)
            with opened as picture:
                width, height = picture.size
                # Pillow decodes the whole of a PNG to look for EXIF behind its pixels; nobody turns PNGs that way.
                has_exif = picture.format != "PNG" or "exif" in picture.info
                turned = has_exif and picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        except Exception as error:  # Pillow's decoders raise whatever they stumble over
            name = data if isinstance(data, str) else "the picture's bytes"
            raise InputError(f"{str(name)[:120]} can't be opened as a picture ({type(error).__name__})") from None
        return (height, width) if turned else (width, height)
