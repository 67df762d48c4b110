"""From pictures and timesteps to tokens. Knows nothing of text, attention or tasks."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from torch import Tensor, nn

from unialignment.errors import InputError


class PatchEmbed(nn.Module):
    """Latents to tokens with Stable Diffusion 3's centre-cropped sine-cosine positions.

    Args:
        channels: Latent channels.
        dim: Token width.
        patch_size: Side of a patch, in latent pixels.
        max_size: Side of the position table, in patches.
        base_size: Side of a training picture in patches; scales the sine-cosine coordinates as SD 3 does.
    """

    def __init__(self, channels: int, dim: int, patch_size: int, max_size: int, base_size: int) -> None:
        super().__init__()
        self.pos_embed: Tensor
        self.patch_size, self.max_size = patch_size, max_size
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)
        table = get_2d_sincos_pos_embed(dim, max_size, base_size=base_size, output_type="pt")
        self.register_buffer("pos_embed", table.float().unsqueeze(0), persistent=True)

    def forward(self, latents: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, N, D]``, row-major.

        Raises:
            InputError: H or W isn't a multiple of the patch size, or larger than the position table.
        """
        patches = self.patches(latents)
        rows, columns = latents.shape[-2] // self.patch_size, latents.shape[-1] // self.patch_size
        # A convolution whose stride equals its kernel is a matrix product over patches, much faster as such on CPUs.
        tokens = nn.functional.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
        top, left = (self.max_size - rows) // 2, (self.max_size - columns) // 2
        table = self.pos_embed.view(self.max_size, self.max_size, -1)
        return tokens + table[top : top + rows, left : left + columns].reshape(1, rows * columns, -1)

    def patches(self, latents: Tensor) -> Tensor:
        """``[B, C, H, W]`` to patches ``[B, N, C * p * p]``, row-major.

        Raises:
            InputError: as :meth:`forward`.
        """
        height, width = latents.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise InputError(
                f"latents of {height} x {width} don't divide into patches of {self.patch_size}: "
                "use a picture size that is a multiple of the patch."
            )
        rows, columns = height // self.patch_size, width // self.patch_size
        if max(rows, columns) > self.max_size:
            raise InputError(
                f"latents of {height} x {width} need {max(rows, columns)} positions a side, the model has "
                f"{self.max_size}: use a smaller picture."
            )
        p = self.patch_size
        batch, channels = latents.shape[:2]
        grid = latents.reshape(batch, channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        return grid.reshape(batch, rows * columns, channels * p * p)


def unpatchify(tokens: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """``[B, N, p * p * C]`` (patch-major, channels last, as SD 3) to ``[B, C, H, W]``; H and W in latent pixels."""
    batch, p = tokens.shape[0], patch_size
    grid = tokens.reshape(batch, height // p, width // p, p, p, -1)
    return torch.einsum("nhwpqc->nchpwq", grid).reshape(batch, -1, height, width)


class TimeEmbedding(nn.Module):
    """Sinusoidal features of the timestep (0 clean ... 1000 noise) through a two-layer MLP, named as in SD 3."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(256, dim)

    def forward(self, timestep: Tensor) -> Tensor:
        """``[B]`` to ``[B, D]``."""
        features = self.time_proj(timestep)
        return self.timestep_embedder(features.to(self.timestep_embedder.linear_1.weight.dtype))
