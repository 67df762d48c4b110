"""Random models in Stable Diffusion 3's proportions (blocks = heads, 64 channels a head), ours and a peer's.

What they draw is noise; what they cost is what trained ones of that size cost. Knows nothing of timing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from unialignment.errors import InputError
from unialignment.model.transformer import UniAlignmentTransformer

CHANNELS, PATCH, TEXT_DIM, POOLED_DIM, POSITIONS = 16, 2, 4096, 2048, 64
VOCABULARY = 32128
LATENT_FACTOR = 8
"""Pixels a latent, as Stable Diffusion 3's autoencoder has it: 512 px are 64 x 64 latents, 1024 tokens."""


@dataclass(frozen=True)
class Size:
    """A model to be measured.

    Attributes:
        depth: Blocks, and heads of 64 channels.
        width_per_head: Channels a head.
        extra: Other arguments of the transformer.
    """

    depth: int
    width_per_head: int = 64
    extra: tuple[tuple[str, Any], ...] = ()


SIZES = {
    "tiny": Size(2, 16, (("joint_attention_dim", 32), ("vocab_size", 64))),
    "25M": Size(5),
    "100M": Size(8),
    "300M": Size(12),
    "2B": Size(24),
}
"""``nano`` beside these is the bundled model's own shape, see :func:`build`."""
NANO = {
    "num_layers": 8,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "patch_size": 1,
    "joint_attention_dim": 192,
    "vocab_size": 856,
    "modulation": "shared",
    "qk_norm": "rms_norm",
    "activation": "relu2",
    "aligned_source": True,
    "embedding_dim": 128,
}


def arguments(size: str) -> dict[str, Any]:
    """Arguments of the transformer called ``size``.

    Raises:
        InputError: unknown size.
    """
    if size == "nano":
        return {"sample_size": 8, "in_channels": CHANNELS, "pos_embed_max_size": 32, **NANO}
    if size not in SIZES:
        raise InputError(f"unknown size {size!r}: use one of nano, {', '.join(SIZES)}")
    entry = SIZES[size]
    return {
        "sample_size": POSITIONS,
        "patch_size": PATCH,
        "in_channels": CHANNELS,
        "num_layers": entry.depth,
        "attention_head_dim": entry.width_per_head,
        "num_attention_heads": entry.depth,
        "joint_attention_dim": TEXT_DIM,
        "pos_embed_max_size": POSITIONS,
        "vocab_size": VOCABULARY,
        **dict(entry.extra),
    }


@lru_cache(maxsize=4)
def build(size: str, mode: str = "prefix", dtype: torch.dtype = torch.float32) -> UniAlignmentTransformer:
    """A random model; the same weights in ``prefix`` and ``joint`` mode.

    ``nano``'s aligned source exists in ``prefix`` mode only: its ``joint`` form, which no trained weights have, is the
    published arithmetic at its size, without it.

    Raises:
        InputError: unknown size.
    """
    given = arguments(size)
    if mode == "joint":
        given["aligned_source"] = False
    generator = torch.Generator().manual_seed(0)
    model = UniAlignmentTransformer(**given, attention_mode=mode)
    state = model.state_dict()
    for name in sorted(state):  # by name, so that what only one mode has changes nothing of the rest
        if name in ("reference_embed.weight", "condition_text_embed", "pos_embed.pos_embed") or "aligned" in name:
            continue
        state[name].normal_(0.0, 0.02, generator=generator)
    return torch.nn.Module.to(model.eval(), dtype).requires_grad_(False)  # type: ignore[return-value]


def tokens_of(size: str, pixels: int) -> tuple[int, int]:
    """Side of the latents, and target tokens, of a square picture.

    Raises:
        InputError: the model has no such size.
    """
    given = arguments(size)
    step = LATENT_FACTOR * int(given["patch_size"])
    largest = step * int(given["pos_embed_max_size"])
    if pixels % step or not 0 < pixels <= largest:
        raise InputError(f"{pixels} px: {size} takes multiples of {step} up to {largest}")
    side = pixels // LATENT_FACTOR
    return side, (side // int(given["patch_size"])) ** 2


@lru_cache(maxsize=1)
def build_peer(size: str, dtype: torch.dtype = torch.float32) -> Any:
    """diffusers' ``StableDiffusion3Pipeline`` around a random transformer of the same shape, without encoders."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    given = arguments(size)
    names = ("sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim", "num_attention_heads")
    transformer = SD3Transformer2DModel(
        **{name: given[name] for name in (*names, "joint_attention_dim", "pos_embed_max_size")},
        caption_projection_dim=given["num_attention_heads"] * given["attention_head_dim"],
        pooled_projection_dim=POOLED_DIM,
        out_channels=CHANNELS,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=torch.nn.Module.to(transformer.eval(), dtype).requires_grad_(False),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
