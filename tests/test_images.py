from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unialignment.errors import InputError
from unialignment.images import fit_image, load_image, to_images, to_tensor

RED = (200, 30, 40)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def halves(width: int = 40, height: int = 20) -> Image.Image:
    """Left half red, right half blue: reveals rotations, flips and wrong crops."""
    image = Image.new("RGB", (width, height), RED)
    image.paste((10, 20, 220), (width // 2, 0, width, height))
    return image


def test_every_kind_of_input_gives_the_same_picture(tmp_path: Path):
    image = halves()
    path = tmp_path / "picture.png"
    image.save(path)
    expected = np.asarray(image)
    array = np.asarray(image)
    for given_image in (image, path, str(path), path.read_bytes(), array, array / 255.0, array.astype(np.uint16) * 257):
        loaded = load_image(given_image)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), expected)


def test_transparency_is_composited_on_white_or_the_given_colour():
    image = Image.new("RGBA", (2, 1), (*RED, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert pixels(load_image(image)) == [RED, (255, 255, 255)]
    assert pixels(load_image(encode(image), background=(0, 255, 0))) == [RED, (0, 255, 0)]
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert load_image(half).getpixel((0, 0)) == (127, 127, 127)


def test_palette_with_transparency_and_grey_with_alpha():
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    assert pixels(load_image(palette)) == [RED, (0, 255, 0)]
    loaded = load_image(encode(palette, transparency=1))
    assert pixels(loaded) == [RED, (255, 255, 255)]
    grey_alpha = Image.new("LA", (1, 1), (10, 0))
    assert load_image(grey_alpha).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_and_bilevel(mode: str):
    image = Image.new(mode, (2, 2), 255)
    image.putpixel((0, 0), 0)
    assert load_image(encode(image)).getpixel((0, 0)) == (0, 0, 0)
    assert load_image(encode(image)).getpixel((1, 1)) == (255, 255, 255)


def test_sixteen_bit_is_scaled_rather_than_clipped():
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    data = encode(Image.fromarray(values))
    assert [pixel[0] for pixel in pixels(load_image(data))] == [0, 100, 255]


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red, green, blue = load_image(encode(image, "JPEG", quality=100)).getpixel((4, 4))
    assert red > 240
    assert green < 15
    assert blue < 15


@pytest.mark.parametrize(("orientation", "size"), [(1, (40, 20)), (3, (40, 20)), (6, (20, 40)), (8, (20, 40))])
def test_exif_rotation_is_applied(orientation: int, size: tuple[int, int]):
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load_image(encode(halves(), "JPEG", quality=95, exif=exif.tobytes()))
    assert loaded.size == size
    first_is_red = {1: True, 3: False, 6: True, 8: False}[orientation]
    assert (loaded.getpixel((2, 2))[0] > 120) == first_is_red


def test_an_embedded_colour_profile_is_converted():
    from PIL import ImageCms

    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    loaded = load_image(encode(halves(), icc_profile=lab))
    np.testing.assert_allclose(np.asarray(loaded).astype(int), np.asarray(halves()), atol=2)
    broken = load_image(encode(halves(), icc_profile=b"not a profile"))
    np.testing.assert_array_equal(np.asarray(broken), np.asarray(halves()))


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_of_an_animation_the_first_frame_counts(kind: str):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black", "red")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert load_image(data).getpixel((4, 4)) == (255, 255, 255)
    opened = Image.open(io.BytesIO(data))
    opened.seek(2)
    assert load_image(opened).getpixel((4, 4)) == (255, 255, 255)


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pixels = zlib.compress(b"\0" * 1000)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(30_000, 30_000), (12_000, 12_000)])
def test_a_decompression_bomb_is_refused_from_its_header(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded a bomb"))
    with pytest.raises(InputError, match="limit of 100,000,000"):
        load_image(png_header(*size))


def test_the_pixel_limit_is_configurable():
    data = encode(halves())
    assert load_image(data, max_pixels=800).size == (40, 20)
    for picture in (data, halves(), np.asarray(halves())):
        with pytest.raises(InputError, match=r"800|799"):
            load_image(picture, max_pixels=799)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_truncated_file_is_an_input_error(kind: str, share: float):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, kind)
    assert load_image(data).size == (64, 64)
    with pytest.raises(InputError) as caught:
        load_image(data[: int(len(data) * share)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"hello, I am a text", "not a picture"),
        (b"\0" * 5000, "not a picture"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"></svg>', "SVG"),
        (b"<svg></svg>", "SVG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture"),
    ],
)
def test_what_is_not_a_picture_is_an_input_error(tmp_path: Path, content: bytes, words: str):
    path = tmp_path / "file.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        load_image(path)
    assert "\n" not in str(caught.value)
    assert "file.png" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("nowhere.png", "no picture at"),
        ("", "empty"),
        ("a\0b", "invalid path"),
        ("x" * 5000, "could not read|no picture"),
        (None, "NoneType"),
        (7, "int"),
        (np.zeros((3, 8, 8), np.uint8), r"\[3, 8, 8\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"\[2, 8, 8, 3\]"),
        (np.zeros((0, 8, 3), np.uint8), "8 x 0"),
        (np.zeros((8, 8, 3), np.int64), "int64"),
        (np.full((8, 8, 3), 3.0), "0–1"),
        (np.full((8, 8, 3), -0.5), "0–1"),
        (np.full((8, 8, 3), np.nan), "finite"),
        (Image.new("RGB", (0, 5)), "empty"),
    ],
)
def test_unusable_values_are_input_errors(value, words: str):
    with pytest.raises(InputError, match=words) as caught:
        load_image(value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match="folder"):
        load_image(tmp_path)


def test_urls_are_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch):
    import urllib.request

    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: io.BytesIO(encode(halves())))
    with pytest.raises(InputError, match="allow_urls"):
        load_image("https://example.org/picture.png")
    assert load_image("https://example.org/picture.png", allow_urls=True).size == (40, 20)
    for url in ("file:///etc/hostname", "ftp://example.org/a.png"):
        with pytest.raises(InputError, match="only http"):
            load_image(url, allow_urls=True)
    with pytest.raises(InputError, match="limit of 20 bytes"):
        load_image("https://example.org/picture.png", allow_urls=True, max_bytes=20)


def test_cropping_keeps_the_middle_and_padding_keeps_everything():
    image = halves(80, 20)
    cropped = fit_image(image, 10, 10)
    assert cropped.size == (10, 10)
    assert cropped.getpixel((0, 5)) == RED
    assert cropped.getpixel((9, 5)) == (10, 20, 220)
    padded = fit_image(image, 16, 16, "pad")
    assert padded.size == (16, 16)
    assert padded.getpixel((8, 0)) == (255, 255, 255)
    assert padded.getpixel((1, 8)) == RED
    with pytest.raises(InputError, match="crop"):
        fit_image(image, 8, 8, "stretch")  # type: ignore[arg-type]


def test_shrinking_antialiases():
    checker = np.indices((256, 256)).sum(0) % 2 * 255
    small = np.asarray(fit_image(load_image(checker.astype(np.uint8)), 32, 32))
    assert np.abs(small.astype(int) - 127).max() < 8


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_pictures_survive_the_trip_through_tensors(width: int, height: int, seed: int):
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    tensor = to_tensor([Image.fromarray(array)])
    assert tensor.shape == (1, 3, height, width)
    assert tensor.min() >= -1
    assert tensor.max() <= 1
    np.testing.assert_array_equal(np.asarray(to_images(tensor)[0]), array)


def test_tensors_out_of_range_are_clipped_and_shapes_checked():
    assert to_images(torch.full((1, 3, 1, 1), 9.0))[0].getpixel((0, 0)) == (255, 255, 255)
    for shape in ((3, 4, 4), (1, 4, 4, 4)):
        with pytest.raises(InputError, match="shape|tensor"):
            to_images(torch.zeros(shape))
    with pytest.raises(InputError, match="one size"):
        to_tensor([halves(4, 4), halves(6, 4)])
    with pytest.raises(InputError, match="at least one"):
        to_tensor([])
