"""Pictures in and out: anything a user may hand over becomes an 8-bit RGB PIL picture, and those become tensors.

What is decided here: transparency is composited on white, EXIF rotation is applied, 16-bit pictures are scaled (not
clipped) to 8 bits, embedded colour profiles are converted to sRGB, of animations the first frame counts, URLs are
refused unless allowed, and a picture's size is judged from its header before a pixel is decoded. Knows nothing of
models.
"""

from __future__ import annotations

import io
import urllib.request
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from unialignment.errors import InputError

if TYPE_CHECKING:
    import torch

ImageInput = str | Path | bytes | Image.Image | np.ndarray
"""What :func:`load_image` accepts."""

MAX_PIXELS = 100_000_000
"""Default limit on width × height, judged from the header (a 100-megapixel photograph passes)."""

MAX_BYTES = 256 * 2**20
"""Default limit on the size of an encoded picture, in bytes."""

# Raster formats that Pillow decodes itself. Left out on purpose: EPS (runs Ghostscript) and rarely fuzzed formats.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
WHITE = (255, 255, 255)


def load_image(
    image: ImageInput,
    *,
    allow_urls: bool = False,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    background: tuple[int, int, int] = WHITE,
    timeout: float = 20.0,
) -> Image.Image:
    """Load one picture as 8-bit sRGB.

    Args:
        image: A path, the bytes of an encoded picture, a PIL picture, or an array ``[H, W]``, ``[H, W, 1]``,
            ``[H, W, 3]`` or ``[H, W, 4]`` of uint8, uint16, bool, or float in 0–1. With ``allow_urls`` also an http(s)
            URL.
        allow_urls: Whether a URL may be fetched. Off by default: a server that fetches what strangers name can be
            turned against its own network.
        max_pixels: Largest width × height. Pillow has a limit of its own, ``2 * PIL.Image.MAX_IMAGE_PIXELS``.
        max_bytes: Largest encoded size in bytes.
        background: 8-bit RGB colour under transparent pixels; white unless given.
        timeout: Seconds to wait for a URL.

    Returns:
        A picture of mode ``"RGB"``, upright, of its original size.

    Raises:
        InputError: It is missing, not a picture, damaged, too large or of an unsupported kind.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(_checked(image, max_pixels, "the picture"), "the picture", background)
    if isinstance(image, np.ndarray):
        return _from_array(image, max_pixels, background)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _decode(bytes(image), "the picture's bytes", max_pixels, max_bytes, background)
    if isinstance(image, (str, Path)):
        text = str(image)
        if isinstance(image, str) and "://" in text[:16]:
            return _decode(_fetch(text, allow_urls, max_bytes, timeout), text, max_pixels, max_bytes, background)
        return _decode(_read(text, max_bytes), text, max_pixels, max_bytes, background)
    raise InputError(f"expected a picture (path, bytes, PIL picture or array [H, W, 3]), got {type(image).__name__}")


def _read(text: str, max_bytes: int) -> bytes:
    if not text.strip() or "\0" in text:
        raise InputError("expected the path of a picture, got an empty or invalid path")
    path = Path(text).expanduser()
    try:
        if path.is_dir():
            raise InputError(f"{text} is a folder; give the path of one picture")
        if not path.exists():
            raise InputError(f"no picture at {text}; check the path")
        size = path.stat().st_size
        if size > max_bytes:
            raise InputError(f"{text} has {size:,} bytes, more than the limit of {max_bytes:,}; use a smaller file")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"could not read {_short(text)}: {error.strerror or error}") from error


def _short(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _fetch(url: str, allow_urls: bool, max_bytes: int, timeout: float) -> bytes:
    if not allow_urls:
        raise InputError(f"{_short(url)} is a URL and URLs are refused; download it first, or pass allow_urls=True")
    if urlsplit(url).scheme.lower() not in ("http", "https"):
        raise InputError(f"{_short(url)}: only http and https URLs can be fetched")
    request = urllib.request.Request(url, headers={"User-Agent": "unialignment"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            data: bytes = response.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"could not fetch {_short(url)}: {error}") from error
    if len(data) > max_bytes:
        raise InputError(f"{_short(url)} has more than the limit of {max_bytes:,} bytes; use a smaller file")
    return data


def _checked(image: Image.Image, max_pixels: int, name: str) -> Image.Image:
    width, height = image.size
    if width == 0 or height == 0:
        raise InputError(f"{name} is empty ({width} x {height} pixels)")
    if width * height > max_pixels:
        raise InputError(
            f"{name} is {width:,} x {height:,} pixels, more than the limit of {max_pixels:,} in all; "
            "resize it first or raise max_pixels"
        )
    return image


def _decode(data: bytes, name: str, max_pixels: int, max_bytes: int, background: tuple[int, int, int]) -> Image.Image:
    name = _short(name)
    if not data:
        raise InputError(f"{name} is empty (0 bytes), not a picture")
    if len(data) > max_bytes:
        raise InputError(f"{name} has {len(data):,} bytes, more than the limit of {max_bytes:,}; use a smaller file")
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<svg", b"<?xml", b"<!doctype svg")) and b"<svg" in data[:65536].lower():
        raise InputError(f"{name} is an SVG drawing, which has no pixels; export it as PNG first")
    try:
        with warnings.catch_warnings():
            # Our own limit, below, speaks instead of Pillow's warning.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.init()
            image = Image.open(io.BytesIO(data), formats=[kind for kind in _FORMATS if kind in Image.OPEN])
            _checked(image, max_pixels, name)
            image.load()
        return _to_rgb(image, name, background)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(
            f"{name} is not a picture of a known format (PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF)"
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{name} declares far more pixels than the limit of {max_pixels:,}; it was refused before decoding"
        ) from error
    # Decoders of damaged files raise whatever they stumble over; none of it is a reason to crash the caller.
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, ArithmeticError) as error:
        raise InputError(f"{name} is damaged or truncated and can't be decoded ({_one_line(error)})") from error
    except Exception as error:
        if type(error).__module__ in ("struct", "zlib"):
            raise InputError(f"{name} is damaged and can't be decoded ({_one_line(error)})") from error
        raise


def _one_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return _short(lines[0] if lines else type(error).__name__)


def _to_rgb(image: Image.Image, name: str, background: tuple[int, int, int]) -> Image.Image:
    if getattr(image, "is_animated", False):
        image.seek(0)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except (OSError, EOFError) as error:
        raise InputError(f"{name} is damaged or truncated and can't be decoded ({_one_line(error)})") from error
    except Exception:
        pass  # a broken EXIF block says nothing about the pixels; show them as stored
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_wide_to_uint8(np.asarray(image), name)).convert("RGB")
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if transparent:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*background, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return _to_srgb(image)


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "CMYK", "L"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
            if converted is not None:
                converted.info.pop("icc_profile", None)
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass  # an unusable profile: the plain conversion below is what viewers do then
    converted = image.convert("RGB")
    return converted if converted is not image else image.copy()


def _wide_to_uint8(values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Scale 16-bit, 32-bit or float grey or colour values to 0–255."""
    if not np.isfinite(values).all():
        raise InputError(f"{name} holds values that are not finite; expected 0–1, 0–255 or 0–65535")
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f":
        limit = 1.0 if high <= 1.0 + 1e-6 else 255.0
    else:
        limit = 65535.0
    if low < -1e-6 or high > limit + 1e-3:
        raise InputError(
            f"{name} holds values from {low:g} to {high:g}; expected uint8 0–255, uint16 0–65535 or float 0–1"
        )
    scaled: np.ndarray[Any, Any] = (values.astype(np.float64) * (255.0 / limit)).round().clip(0, 255).astype(np.uint8)
    return scaled


def _from_array(array: np.ndarray[Any, Any], max_pixels: int, background: tuple[int, int, int]) -> Image.Image:
    name = "the array"
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise InputError(
            f"expected an array [H, W], [H, W, 3] or [H, W, 4], got shape {list(array.shape)}; "
            "channels go last and pictures are passed one by one or in a list"
        )
    height, width = array.shape[:2]
    if height == 0 or width == 0 or height * width > max_pixels:
        raise InputError(f"{name} is {width:,} x {height:,} pixels; expected 1 to {max_pixels:,} pixels in all")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype.kind == "f":
        # A lone value above 1 is a mistake of scale here; _wide_to_uint8 alone would take 0–255 for float TIFFs.
        if (array > 1.0 + 1e-6).any():
            raise InputError(f"{name} is float with values up to {float(array.max()):g}; expected 0–1, or uint8 0–255")
        array = _wide_to_uint8(array, name)
    elif array.dtype == np.uint16:
        array = _wide_to_uint8(array, name)
    elif array.dtype != np.uint8:
        raise InputError(f"expected an array of uint8, uint16, bool or float 0–1, got {array.dtype}")
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), name, background)


def fit_image(
    image: Image.Image,
    width: int,
    height: int,
    fit: Literal["crop", "pad"] = "crop",
    background: tuple[int, int, int] = WHITE,
) -> Image.Image:
    """Bring a picture to ``width`` × ``height`` pixels without distorting it.

    Args:
        image: RGB picture of any size.
        width: Pixels.
        height: Pixels.
        fit: ``"crop"`` fills the frame and cuts what overhangs, equally on both sides; ``"pad"`` shows the whole
            picture and fills the rest with ``background``.
        background: 8-bit RGB colour for ``"pad"``.

    Returns:
        A picture of the exact size, resampled with antialiasing (Lanczos) only if its size differs.

    Raises:
        InputError: ``fit`` is neither.
    """
    if fit not in ("crop", "pad"):
        raise InputError(f"fit must be 'crop' or 'pad', got {fit!r}")
    if image.size == (width, height):
        return image
    if fit == "crop":
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS, color=background)


def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """Stack RGB pictures of equal size as float32 ``[B, 3, H, W]`` in −1…1.

    Raises:
        InputError: There is none, or their sizes differ.
    """
    import torch

    if not images:
        raise InputError("expected at least one picture, got none")
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise InputError(f"pictures of one batch must have one size, got {sorted(sizes)}; use fit_image first")
    array = np.stack([np.asarray(image.convert("RGB"), dtype=np.uint8) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_images(tensor: torch.Tensor) -> list[Image.Image]:
    """Turn a float tensor ``[B, 3, H, W]`` in −1…1 into 8-bit RGB pictures; values outside are clipped.

    Raises:
        InputError: The shape is another.
    """
    if tensor.ndim != 4 or tensor.shape[1] != 3:
        raise InputError(f"expected a tensor [B, 3, H, W], got {list(tensor.shape)}")
    array = tensor.detach().float().add(1.0).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in array]
