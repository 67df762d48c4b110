"""Autoencoders: exact saving, calibration, a loss that trains, and clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from unialignment.errors import CheckpointError, InputError
from unialignment.model.autoencoder import (
    Autoencoder,
    KLAutoencoder,
    PixelAutoencoder,
    WorldAutoencoder,
    build_autoencoder,
    load_autoencoder,
)

TINY: dict[str, Any] = {
    "latent_channels": 4, "encoder_channels": (8, 8, 16), "decoder_channels": (8, 8, 16), "encoder_layers": (1, 1, 1),
    "decoder_layers": (1, 1, 1),
}  # fmt: skip


def tiny() -> WorldAutoencoder:
    torch.manual_seed(0)
    return WorldAutoencoder(**TINY)


def kl(**config: Any) -> KLAutoencoder:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return build_autoencoder(
        "AutoencoderKL", latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, **blocks, **config
    )


def pictures(count: int = 4, side: int = 32, seed: int = 0) -> Tensor:
    """Flat pictures with one coloured square each."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 1, 1, generator=generator).expand(-1, -1, side, side).clone()
    images[:, :, 8:20, 4:16] = torch.rand(count, 3, 1, 1, generator=generator)
    return images * 2 - 1


@pytest.mark.parametrize(("make", "channels", "factor"), [(tiny, 4, 8), (PixelAutoencoder, 3, 1), (kl, 4, 2)])
def test_interface(make: Any, channels: int, factor: int) -> None:
    autoencoder = make().eval()
    assert isinstance(autoencoder, Autoencoder)
    assert (autoencoder.latent_channels, autoencoder.spatial_factor) == (channels, factor)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        latents = autoencoder.encode(images)
        decoded = autoencoder.decode(latents * 50)
    assert latents.shape == (2, channels, 16 // factor, 24 // factor)
    assert decoded.shape == images.shape and bool((decoded.abs() <= 1).all())


@pytest.mark.parametrize("make", [tiny, PixelAutoencoder, lambda: kl(shift_factor=0.1, scaling_factor=1.5)])
def test_saved_is_loaded_exactly(make: Any, tmp_path: Path) -> None:
    autoencoder = make().eval()
    if hasattr(autoencoder, "calibrate"):
        autoencoder.calibrate([pictures()])
    autoencoder.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob("*.bin"))
    loaded = load_autoencoder(tmp_path)
    assert type(loaded) is type(autoencoder) and not loaded.training
    with torch.no_grad():
        latents = autoencoder.encode(pictures())
        assert torch.equal(loaded.encode(pictures()), latents)
        assert torch.equal(loaded.decode(latents), autoencoder.decode(latents))


def test_default_is_f8_with_16_channels_and_small() -> None:
    autoencoder = WorldAutoencoder()
    assert (autoencoder.spatial_factor, autoencoder.latent_channels) == (8, 16)
    assert sum(parameter.numel() for parameter in autoencoder.parameters()) < 3.2e6


def test_calibrated_latents_are_normal() -> None:
    autoencoder = tiny()
    batches = [pictures(seed=seed) for seed in range(3)]
    with torch.no_grad():
        before = autoencoder.decode(autoencoder.encode(batches[0]))
        autoencoder.calibrate(iter(batches))
        latents = torch.cat([autoencoder.encode(batch) for batch in batches])
        torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(latents.var((0, 2, 3), correction=0), torch.ones(4), atol=1e-3, rtol=0)
        # Normalising changes the latents, never the pictures.
        torch.testing.assert_close(autoencoder.decode(autoencoder.encode(batches[0])), before, atol=1e-5, rtol=1e-4)


def test_calibration_refuses_nothing_and_constants() -> None:
    with pytest.raises(InputError, match="at least one batch"):
        tiny().calibrate([])
    with pytest.raises(InputError, match="constant"):
        PixelAutoencoder().calibrate([torch.zeros(2, 3, 8, 8)])


def test_pixels_are_the_identity() -> None:
    images = pictures()
    autoencoder = PixelAutoencoder()
    assert torch.equal(autoencoder.decode(autoencoder.encode(images)), images)


def test_training_lowers_the_loss() -> None:
    autoencoder = tiny()
    optimizer = torch.optim.AdamW(autoencoder.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    history = []
    for step in range(100):
        losses = autoencoder.training_loss(pictures(8, seed=step % 4), generator)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append((losses["loss"].item(), losses["psnr"].item()))
    assert history[-1][0] < 0.6 * history[0][0] and history[-1][1] > history[0][1] + 2
    assert all(parameter.grad is not None for parameter in autoencoder.parameters())


def test_loss_parts() -> None:
    autoencoder, images = tiny(), pictures()
    clean = autoencoder.training_loss(images, latent_noise=0.0, edge_weight=0.0, moment_weight=0.0)
    error = autoencoder._decode(autoencoder._encode(images)) - images
    torch.testing.assert_close(clean["loss"], error.abs().mean() + error.square().mean())
    torch.testing.assert_close(clean["psnr"], -10 * torch.log10((error / 2).square().mean()))
    assert clean["loss"].requires_grad and not clean["psnr"].requires_grad

    def loss(seed: int, **options: float) -> float:
        return autoencoder.training_loss(images, torch.Generator().manual_seed(seed), **options)["loss"].item()

    assert loss(1) == loss(1) != loss(2)
    assert loss(1, edge_weight=2.0) > loss(1, edge_weight=0.0)
    assert loss(1, latent_noise=20.0) != loss(1, latent_noise=0.0)


def test_latent_noise_is_relative() -> None:
    """Scaling all latents up (and back before the decoder) must not make the noise smaller."""
    autoencoder, images = tiny(), pictures()
    encode, decode = autoencoder._encode, autoencoder._decode

    def error(scale: float) -> float:
        autoencoder._encode = lambda x: encode(x) * scale  # type: ignore[method-assign]
        autoencoder._decode = lambda z: decode(z / scale)  # type: ignore[method-assign]
        options = {"latent_noise": 1.0, "moment_weight": 0.0}
        return autoencoder.training_loss(images, torch.Generator().manual_seed(0), **options)["loss"].item()

    assert error(100.0) == pytest.approx(error(1.0), rel=1e-4)


def test_kl_shift_and_scale() -> None:
    plain, scaled = kl(shift_factor=None, scaling_factor=1.0), kl(shift_factor=0.3, scaling_factor=1.7)
    images = pictures()
    with torch.no_grad():
        latents = plain.encode(images)
        torch.testing.assert_close(scaled.encode(images), (latents - 0.3) * 1.7)
        torch.testing.assert_close(scaled.decode((latents - 0.3) * 1.7), plain.decode(latents), atol=1e-5, rtol=1e-4)
        drawn = [plain.encode(images, sample=True, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_kl_loads_a_published_folder_and_passes_tiling_through(tmp_path: Path) -> None:
    kl().autoencoder.save_pretrained(tmp_path / "vae")
    autoencoder = load_autoencoder(tmp_path / "vae")
    assert isinstance(autoencoder, KLAutoencoder) and isinstance(autoencoder.autoencoder, AutoencoderKL)
    autoencoder.enable_tiling()
    autoencoder.enable_slicing()
    assert autoencoder.autoencoder.use_tiling and autoencoder.autoencoder.use_slicing
    autoencoder.disable_tiling()
    autoencoder.disable_slicing()
    assert not autoencoder.autoencoder.use_tiling and not autoencoder.autoencoder.use_slicing


@pytest.mark.parametrize("make", [tiny, PixelAutoencoder, kl])
def test_bad_pictures_are_named(make: Any) -> None:
    autoencoder = make()
    with pytest.raises(InputError, match="floating-point"):
        autoencoder.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"\[B, 3, H, W\]"):
        autoencoder.encode(torch.zeros(3, 16, 16))
    with pytest.raises(InputError, match="latents must be"):
        autoencoder.decode(torch.zeros(1, 7, 2, 2))
    if autoencoder.spatial_factor > 1:
        with pytest.raises(InputError, match="multiples of"):
            autoencoder.encode(torch.zeros(1, 3, 17, 16))


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no autoencoder"):
        load_autoencoder(tmp_path / "absent")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Mystery"}))
    with pytest.raises(CheckpointError, match="Mystery"):
        load_autoencoder(tmp_path)
    tiny().save_pretrained(tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot load WorldAutoencoder"):
        load_autoencoder(tmp_path)
    weights.unlink()
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot load WorldAutoencoder"):
        load_autoencoder(tmp_path)


def test_bad_configurations_are_named() -> None:
    with pytest.raises(InputError, match="same, positive length"):
        WorldAutoencoder(encoder_layers=(1, 1))
    with pytest.raises(InputError, match="multiples of latent_channels"):
        WorldAutoencoder(latent_channels=12)
    with pytest.raises(InputError, match="unknown autoencoder"):
        build_autoencoder("VQ")
