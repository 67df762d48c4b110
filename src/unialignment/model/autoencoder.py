"""Image autoencoders: pictures to the latents that the transformer denoises, and back.

Every autoencoder takes pictures in ``[-1, 1]`` and gives latents of about unit variance per channel, so that nothing
downstream knows which one is in use. Knows nothing of tasks, of optimizers or of where pictures come from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from unialignment.errors import CheckpointError, InputError


@runtime_checkable
class Autoencoder(Protocol):
    """What the rest of the package relies on."""

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position along one side."""

    def encode(self, images: Tensor) -> Tensor:
        """Pictures ``[B, 3, H, W]`` in ``[-1, 1]`` to normalised latents ``[B, C, H / f, W / f]``."""

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents ``[B, C, h, w]`` to pictures ``[B, 3, h * f, w * f]`` in ``[-1, 1]``."""


def _check_images(images: Tensor, factor: int) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise InputError(
            f"pictures must be a floating-point tensor [B, 3, H, W] in [-1, 1], got {images.dtype} "
            f"{list(images.shape)}; convert with images / 127.5 - 1"
        )
    if images.shape[2] % factor or images.shape[3] % factor or not images.shape[2] * images.shape[3]:
        raise InputError(
            f"picture height and width must be positive multiples of {factor}, got {images.shape[2]} x "
            f"{images.shape[3]}; resize or pad the picture first"
        )


def _check_latents(latents: Tensor, channels: int) -> None:
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise InputError(f"latents must be [B, {channels}, h, w], got {list(latents.shape)}")


class _NormalisedAutoencoder(ModelMixin, ConfigMixin):
    """Per-channel normalisation shared by the autoencoders that carry their own statistics.

    Subclasses give ``_encode`` (raw latents) and ``_decode`` (unclamped pictures).
    """

    latent_mean: Tensor
    latent_std: Tensor

    def _register_statistics(self, channels: int) -> None:
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.latent_mean.numel())

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position along one side."""
        raise NotImplementedError

    def _encode(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def _decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """Encode pictures.

        Args:
            images: ``[B, 3, H, W]`` in ``[-1, 1]``, sides multiples of ``spatial_factor``.

        Returns:
            Latents ``[B, C, H / f, W / f]``, about unit variance per channel once calibrated.

        Raises:
            InputError: Wrong shape or an integer tensor.
        """
        _check_images(images, self.spatial_factor)
        latents = self._encode(images)
        return (latents - self.latent_mean.view(1, -1, 1, 1)) / self.latent_std.view(1, -1, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents ``[B, C, h, w]`` to pictures ``[B, 3, h * f, w * f]``, clamped to ``[-1, 1]``.

        Raises:
            InputError: Wrong number of channels.
        """
        _check_latents(latents, self.latent_channels)
        raw = latents * self.latent_std.view(1, -1, 1, 1) + self.latent_mean.view(1, -1, 1, 1)
        return self._decode(raw).clamp(-1, 1)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set ``latent_mean`` and ``latent_std`` from pictures, so that latents have mean 0 and variance 1 per channel.

        Args:
            batches: Picture batches ``[B, 3, H, W]`` in ``[-1, 1]``; a few thousand pictures of the training mixture.

        Raises:
            InputError: No batch was given, or a channel is constant (the autoencoder is untrained or has collapsed).
        """
        training = self.training
        self.eval()
        count = 0
        total = torch.zeros(self.latent_channels, dtype=torch.float64)
        squares = torch.zeros(self.latent_channels, dtype=torch.float64)
        for images in batches:
            _check_images(images, self.spatial_factor)
            latents = self._encode(images.to(self.latent_mean.device, self.latent_mean.dtype)).double().cpu()
            count += latents.numel() // latents.shape[1]
            total += latents.sum((0, 2, 3))
            squares += latents.square().sum((0, 2, 3))
        self.train(training)
        if not count:
            raise InputError("calibrate needs at least one batch of pictures, got none")
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        if bool((std < 1e-6).any()):
            dead = (std < 1e-6).nonzero().flatten().tolist()
            raise InputError(
                f"latent channels {dead} are constant over the given pictures; train the autoencoder first"
            )
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)


class PixelAutoencoder(_NormalisedAutoencoder):
    """The identity: latents are pixels (after optional calibration, pixels of unit variance)."""

    @register_to_config
    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self._register_statistics(channels)

    @property
    def spatial_factor(self) -> int:
        """One pixel per latent position."""
        return 1

    def _encode(self, images: Tensor) -> Tensor:
        return images

    def _decode(self, latents: Tensor) -> Tensor:
        return latents


class WorldAutoencoder(_NormalisedAutoencoder):
    """A small convolutional autoencoder, f8 and 16 channels by default, around diffusers' ``AutoencoderDC``.

    No convolution runs at the full resolution: a pixel-unshuffling stem enters at half of it and a pixel-shuffling head
    leaves from there, which is what makes it quick on one CPU core while edges stay sharp (every output pixel has its
    own weights in the head). Deep compression autoencoder: arXiv 2410.10733, residual blocks only.

    Args:
        latent_channels: Channels of a latent; must divide the last encoder and decoder widths.
        encoder_channels: Width at 1/2, 1/4, 1/8, … of the resolution; each level halves it once more.
        decoder_channels: The same for the decoder.
        encoder_layers: Residual blocks per level.
        decoder_layers: The same for the decoder.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        encoder_channels: tuple[int, ...] = (32, 64, 128),
        decoder_channels: tuple[int, ...] = (48, 96, 192),
        encoder_layers: tuple[int, ...] = (1, 1, 1),
        decoder_layers: tuple[int, ...] = (1, 2, 2),
    ) -> None:
        super().__init__()
        levels = len(encoder_channels)
        if not levels or any(len(given) != levels for given in (decoder_channels, encoder_layers, decoder_layers)):
            raise InputError(
                "encoder_channels, decoder_channels, encoder_layers and decoder_layers need the same, positive length, "
                f"got {len(encoder_channels)}, {len(decoder_channels)}, {len(encoder_layers)}, {len(decoder_layers)}"
            )
        if encoder_channels[-1] % latent_channels or decoder_channels[-1] % latent_channels:
            raise InputError(
                f"the last encoder and decoder widths ({encoder_channels[-1]}, {decoder_channels[-1]}) must be "
                f"multiples of latent_channels ({latent_channels})"
            )
        # A first level without layers is diffusers' way to ask for the pixel-unshuffling stem and the shuffling head.
        self.autoencoder = AutoencoderDC(
            in_channels=3,
            latent_channels=latent_channels,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(encoder_channels[0], *encoder_channels),
            decoder_block_out_channels=(decoder_channels[0], *decoder_channels),
            encoder_layers_per_block=(0, *encoder_layers),
            decoder_layers_per_block=(0, *decoder_layers),
            encoder_qkv_multiscales=((),) * (levels + 1),
            decoder_qkv_multiscales=((),) * (levels + 1),
        )
        self._register_statistics(latent_channels)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position along one side."""
        return int(self.autoencoder.spatial_compression_ratio)

    def _encode(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.autoencoder.encoder(images))

    def _decode(self, latents: Tensor) -> Tensor:
        return cast(Tensor, self.autoencoder.decoder(latents))

    def training_loss(
        self,
        images: Tensor,
        generator: torch.Generator | None = None,
        *,
        latent_noise: float = 0.2,
        edge_weight: float = 0.5,
        square_weight: float = 1.0,
        moment_weight: float = 1e-3,
    ) -> dict[str, Tensor]:
        """Loss of one training step.

        ``L1 + square_weight * L2 + edge_weight * L1(image gradients)``, decoded from latents with Gaussian noise of
        ``U(0, latent_noise)`` times their standard deviation (one level per picture, so that the decoder is exact on
        clean latents and forgiving towards generated ones), plus a small pull of every channel's batch moments towards
        mean 0 and variance 1.

        Args:
            images: ``[B, 3, H, W]`` in ``[-1, 1]``.
            generator: Source of the latent noise; the default generator when ``None``.
            latent_noise: Largest noise, in standard deviations of each latent channel. 0 turns it off.
            edge_weight: Weight of the gradient term, which keeps outlines crisp.
            square_weight: Weight of the squared error, which punishes wrong colours.
            moment_weight: Weight of the moment term (a KL divergence of batch moments from the unit normal).

        Returns:
            ``loss`` (with gradient), ``reconstruction`` (its part without the moment term), ``psnr`` in dB over the
            batch, ``latent_std``; all scalars.

        Raises:
            InputError: Wrong shape or an integer tensor.
        """
        _check_images(images, self.spatial_factor)
        latents = self._encode(images)
        moments = latents.float()
        mean, std = moments.mean((0, 2, 3)), moments.std((0, 2, 3)).clamp_min(1e-6)
        divergence = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        if latent_noise > 0:
            device = generator.device if generator else latents.device
            noise = torch.randn(latents.shape, generator=generator, device=device).to(latents)
            level = latent_noise * torch.rand((len(latents), 1, 1, 1), generator=generator, device=device).to(latents)
            # Detached: otherwise shrinking the spread would pay, and relative noise would stop being relative.
            latents = latents + level * std.detach().to(latents).view(1, -1, 1, 1) * noise
        error = self._decode(latents).float() - images.float()
        vertical, horizontal = error.diff(dim=2), error.diff(dim=3)
        squared = error.square().mean()
        reconstruction = error.abs().mean() + square_weight * squared
        reconstruction = reconstruction + edge_weight * (vertical.abs().mean() + horizontal.abs().mean())
        return {
            "loss": reconstruction + moment_weight * divergence,
            "reconstruction": reconstruction.detach(),
            "psnr": -10 * torch.log10(squared.detach() / 4 + 1e-12),
            "latent_std": std.detach().mean(),
        }


class KLAutoencoder(nn.Module):
    """diffusers' ``AutoencoderKL`` (Stable Diffusion 3's, FLUX's, …) with its shift and scale.

    Its folder stays in diffusers' layout, so that published ``vae`` folders load as they are. ``enable_tiling`` and
    ``enable_slicing`` (and their opposites) are passed through for large pictures.
    """

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.autoencoder.config.latent_channels)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position along one side."""
        return int(2 ** (len(self.autoencoder.config.block_out_channels) - 1))

    @property
    def _shift(self) -> float:
        return float(getattr(self.autoencoder.config, "shift_factor", None) or 0.0)

    @property
    def _scale(self) -> float:
        return float(getattr(self.autoencoder.config, "scaling_factor", None) or 1.0)

    def encode(self, images: Tensor, *, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Encode pictures ``[B, 3, H, W]`` to ``(latents - shift) * scale``.

        Args:
            images: Pictures in ``[-1, 1]``.
            sample: Draw from the posterior instead of taking its mode.
            generator: Source of that draw.

        Raises:
            InputError: Wrong shape or an integer tensor.
        """
        _check_images(images, self.spatial_factor)
        posterior = self.autoencoder.encode(images).latent_dist
        latents = posterior.sample(generator) if sample else posterior.mode()
        return cast(Tensor, (latents - self._shift) * self._scale)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode ``[B, C, h, w]`` to pictures clamped to ``[-1, 1]``.

        Raises:
            InputError: Wrong number of channels.
        """
        _check_latents(latents, self.latent_channels)
        return cast(Tensor, self.autoencoder.decode(latents / self._scale + self._shift).sample.clamp(-1, 1))

    def enable_tiling(self, tile: int | None = None) -> None:
        """Work tile by tile: large pictures in little memory.

        Args:
            tile: Side of a tile in pixels; the autoencoder's own ``sample_size`` unless given.

        Raises:
            InputError: The tile is no multiple of four latent positions.
        """
        if tile is not None:
            if tile < 1 or tile % (4 * self.spatial_factor):  # tiles overlap by a quarter
                raise InputError(f"a tile must be a multiple of {4 * self.spatial_factor} pixels, got {tile}")
            self.autoencoder.tile_sample_min_size = tile
            self.autoencoder.tile_latent_min_size = tile // self.spatial_factor
        self.autoencoder.enable_tiling()

    def disable_tiling(self) -> None:
        """Undo ``enable_tiling``."""
        self.autoencoder.disable_tiling()

    def enable_slicing(self) -> None:
        """Work picture by picture: large batches in little memory."""
        self.autoencoder.enable_slicing()

    def disable_slicing(self) -> None:
        """Undo ``enable_slicing``."""
        self.autoencoder.disable_slicing()

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Save in diffusers' ``AutoencoderKL`` layout."""
        self.autoencoder.save_pretrained(folder, **options)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> KLAutoencoder:
        """Load a diffusers ``AutoencoderKL`` folder (safetensors only)."""
        return cls(AutoencoderKL.from_pretrained(folder, use_safetensors=True, **options))


AUTOENCODERS: dict[str, Any] = {
    "PixelAutoencoder": PixelAutoencoder,
    "WorldAutoencoder": WorldAutoencoder,
    "AutoencoderKL": KLAutoencoder,
}
"""Class name in ``config.json`` to the class that loads such a folder."""


def build_autoencoder(name: str, **config: Any) -> Any:
    """Make a new, untrained autoencoder.

    Args:
        name: ``"PixelAutoencoder"``, ``"WorldAutoencoder"`` or ``"AutoencoderKL"``.
        config: Arguments of that class.

    Raises:
        InputError: Unknown name.
    """
    if name not in AUTOENCODERS:
        raise InputError(f"unknown autoencoder {name!r}; expected one of {', '.join(sorted(AUTOENCODERS))}")
    return KLAutoencoder(AutoencoderKL(**config)) if name == "AutoencoderKL" else AUTOENCODERS[name](**config)


def load_autoencoder(folder: str | Path, **options: Any) -> Any:
    """Load whichever autoencoder a folder holds, by the class name in its ``config.json``.

    Args:
        folder: Local folder with ``config.json`` and ``diffusion_pytorch_model.safetensors``.
        options: Passed to ``from_pretrained``, e.g. ``torch_dtype``.

    Raises:
        CheckpointError: Missing, unreadable or of an unknown class.
    """
    path = Path(folder) / "config.json"
    try:
        name = json.loads(path.read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} holds no autoencoder: cannot read {path} ({error})") from error
    if name not in AUTOENCODERS:
        raise CheckpointError(
            f"{path} names the class {name!r}; known autoencoders are {', '.join(sorted(AUTOENCODERS))}"
        )
    try:
        loaded = AUTOENCODERS[name].from_pretrained(
            str(folder), **({} if name == "AutoencoderKL" else {"use_safetensors": True}) | options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot load {name} from {folder}: {error}") from error
    return loaded.eval()
