"""The pack file (refuses what is damaged, stale or foreign) and the scaling of sprites."""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unialignment.errors import AssetError, InputError, StorageError
from unialignment.world import sprites
from unialignment.world.presets import BACKGROUNDS, WorldPreset
from unialignment.world.sprites import MASTER_PX, SpritePack, area_weights, default_pack_path, write_pack


def picture(color: tuple[int, int, int, int], box: tuple[int, int, int, int]) -> bytes:
    image = Image.new("RGBA", (MASTER_PX, MASTER_PX), (255, 255, 255, 0))
    image.paste(color, box)
    stream = io.BytesIO()
    image.save(stream, "WEBP", lossless=True, exact=True)
    return stream.getvalue()


@pytest.fixture
def small_pack(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "test.pack"
    pictures = {
        "plain": {
            "square": picture((200, 100, 0, 255), (32, 32, 96, 96)),
            "glass": picture((200, 100, 0, 51), (0, 0, 128, 128)),
        }
    }
    write_pack(path, pictures, {"plain": {"license": "MIT", "source": "test", "version": "1"}}, {"route": "test"})
    return path


def rewrite(path: Path, manifest: dict | None = None, blob: bytes | None = None) -> None:
    """Replace members, keeping the zip itself valid."""
    with zipfile.ZipFile(path) as archive:
        old = json.loads(archive.read("manifest.json"))
        data = archive.read("sprites.bin")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", json.dumps(old | (manifest or {})))
        archive.writestr("sprites.bin", blob if blob is not None else data)


def test_round_trip(small_pack: Path) -> None:
    pack = SpritePack.load(small_pack)
    assert pack.names == ("glass", "square")
    assert pack.styles == ("plain",)
    assert pack.licenses == {"plain": "MIT"}
    assert pack.master("square", "plain")[64, 64].tolist() == [200, 100, 0, 255]
    assert len(pack.digest) == 64
    assert not list(small_pack.parent.glob(".*")), "temporary file left behind"


def test_alpha_is_premultiplied(small_pack: Path) -> None:
    glass = SpritePack.load(small_pack).rgba("glass", "plain", 24)
    np.testing.assert_allclose(
        glass, np.broadcast_to([0.2 * 200 / 255, 0.2 * 100 / 255, 0, 0.2], (24, 24, 4)), atol=1e-6
    )


def test_scaling_keeps_the_mean_and_bleeds_no_hidden_white(small_pack: Path) -> None:
    """Transparent pixels of the file are white; averaging straight alpha would lighten every outline."""
    pack = SpritePack.load(small_pack)
    master = pack.rgba("square", "plain", MASTER_PX)
    for px in (8, 20, 24, 32, 48, 100):
        scaled = pack.rgba("square", "plain", px)
        assert scaled.shape == (px, px, 4)
        assert scaled.dtype == np.float32
        np.testing.assert_allclose(scaled.mean((0, 1), np.float64), master.mean((0, 1), np.float64), atol=1e-6)
        np.testing.assert_allclose(scaled[..., 0], scaled[..., 3] * 200 / 255, atol=1e-6)


def test_sprites_are_memoised_and_read_only(small_pack: Path) -> None:
    pack = SpritePack.load(small_pack)
    first = pack.rgba("square", "plain", 16)
    assert pack.rgba("square", "plain", 16) is first
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1


def test_memory_for_scaled_sprites_is_bounded(small_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sprites, "SCALED_BYTES", 3 * 16 * 10 * 10)
    pack = SpritePack.load(small_pack)
    drawn = [pack.rgba(name, "plain", px) for px in (9, 10) for name in pack.names]
    assert pack.rgba("square", "plain", 10) is drawn[-1]
    again = pack.rgba("glass", "plain", 9)
    assert again is not drawn[0], "the oldest left"
    assert np.array_equal(again, drawn[0])


@pytest.mark.parametrize(
    ("name", "style", "px"), [("nonsense", "plain", 8), ("square", "nonsense", 8), ("square", "plain", 0)]
)
def test_unknown_sprites_are_input_errors(small_pack: Path, name: str, style: str, px: int) -> None:
    with pytest.raises(InputError, match=r"nonsense|0 px"):
        SpritePack.load(small_pack).rgba(name, style, px)


@given(source=st.integers(1, 128), target=st.integers(1, 128))
def test_area_weights(source: int, target: int) -> None:
    weights = area_weights(source, target)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    # Every source pixel counts equally in the whole.
    np.testing.assert_allclose(weights.sum(0), target / source, atol=1e-4)


def test_missing_pack_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="unialign world build") as caught:
        SpritePack.load(tmp_path / "absent.pack")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 10, 500, -30])
def test_truncated_pack_is_refused(small_pack: Path, keep: int) -> None:
    small_pack.write_bytes(small_pack.read_bytes()[:keep])
    with pytest.raises(AssetError, match=r"damaged.*unialign world build"):
        SpritePack.load(small_pack)


def test_every_flipped_byte_is_noticed_or_harmless(small_pack: Path) -> None:
    """Wherever a byte flips, the pack is refused or draws exactly what it drew before."""
    original = small_pack.read_bytes()
    digest = SpritePack.load(small_pack).digest
    for position in range(0, len(original), 37):
        damaged = bytearray(original)
        damaged[position] ^= 0x55
        small_pack.write_bytes(damaged)
        with contextlib.suppress(AssetError):
            assert SpritePack.load(small_pack).digest == digest


def test_changed_pictures_are_refused(small_pack: Path) -> None:
    rewrite(small_pack, blob=b"x" * 400)
    with pytest.raises(AssetError, match="checksum"):
        SpritePack.load(small_pack)


@pytest.mark.parametrize("change", [{"format": "other"}, {"format_version": 99}])
def test_other_formats_are_refused(small_pack: Path, change: dict) -> None:
    rewrite(small_pack, change)
    with pytest.raises(AssetError, match="expected 'unialignment-sprite-pack' version 1"):
        SpritePack.load(small_pack)


def test_stale_pack_is_refused(small_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sprites, "table_digest", lambda: "of a later list of classes")
    with pytest.raises(AssetError, match="stale"):
        SpritePack.load(small_pack)


def test_not_a_pack(tmp_path: Path) -> None:
    path = tmp_path / "a.pack"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", "[1, 2]")
        archive.writestr("sprites.bin", b"")
    with pytest.raises(AssetError, match="damaged"):
        SpritePack.load(path)


def test_full_disk_leaves_the_old_pack(small_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = small_pack.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write_pack(small_pack, {"plain": {"dot": b"1"}}, {"plain": {"license": "MIT"}}, {})
    assert small_pack.read_bytes() == before
    assert [item.name for item in small_pack.parent.iterdir()] == [small_pack.name]


def test_destination_in_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="can't write"):
        write_pack(tmp_path / "file" / "a.pack", {"plain": {"dot": b"1"}}, {"plain": {"license": "MIT"}}, {})


def test_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_pack_path().parent == tmp_path / "unialignment"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # to be ignored, says the specification
    assert default_pack_path().parent == Path.home() / ".cache" / "unialignment"


def test_real_pack(pack: SpritePack) -> None:
    assert len(pack.names) >= 512
    assert list(pack.names) == sorted(set(pack.names))
    assert all(len(name) <= 22 and len(name.split()) <= 3 and name.replace(" ", "").isalpha() for name in pack.names)
    if pack.manifest["route"] == "npm":
        assert pack.styles[:4] == ("noto", "fluent", "twemoji", "openmoji")  # extra ones come behind
    assert set(pack.licenses.values()) <= {"Apache-2.0", "MIT", "CC-BY-4.0", "CC-BY-SA-4.0"}
    assert pack.path is not None
    assert pack.path.stat().st_size < 40e6


def test_real_sprites_fill_their_square(pack: SpritePack) -> None:
    """Trimmed and centred alike in every style, so that a size means the same everywhere."""
    for name in pack.names[::40]:
        for style in pack.styles:
            alpha = pack.rgba(name, style, MASTER_PX)[..., 3] > 0.1
            rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
            spans = rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0]
            assert 0.93 * MASTER_PX <= max(spans) <= 0.99 * MASTER_PX, (name, style, spans)
            for edge in (rows, columns):
                assert abs(edge[0] - (MASTER_PX - 1 - edge[-1])) <= 4, (name, style)


def test_nano_classes_differ(pack: SpritePack, nano: WorldPreset) -> None:
    """At 24 px no two classes look alike, in any style, and none vanishes on any background."""
    entries = [(name, style) for name in nano.names for style in nano.styles]
    pixels = np.stack([pack.rgba(name, style, 24) for name, style in entries])
    flat = pixels.reshape(len(entries), -1)
    squares = (flat**2).sum(1)
    distance = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * flat @ flat.T, 0) / flat.shape[1])
    for i, (name, _) in enumerate(entries):
        for j in range(i):
            assert entries[j][0] == name or distance[i, j] > 0.2, (entries[i], entries[j])
    for color in BACKGROUNDS.values():
        ground = np.asarray(color, np.float32) / 255
        contrast = np.sqrt(((pixels[..., :3] - pixels[..., 3:] * ground) ** 2).mean((1, 2, 3)))
        assert contrast.min() > 0.05, entries[int(contrast.argmin())]
