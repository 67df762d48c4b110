"""Tiny random models in the layouts that others publish, built from the real classes (T5, AutoencoderKL, tokenizer)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

WORDS = (
    *("a", "the", "dog", "cat", "apple", "red", "blue", "background", "with", "on", "what", "is", "and", "next", "to"),
    *("segment", "estimate", "depth", "detect", "edges", "replace", "by"),
)
EXTRA_IDS = 4
"""T5 has 100 sentinels at the end of its vocabulary, in falling order; the last one is ``<extra_id_0>``, the mask."""
T5_WIDTH = 48


def make_tokenizer(folder: Path, size: int = 124) -> int:
    """Save a tiny T5 tokenizer as ``transformers`` does; returns its size (the mask is the last id)."""
    from transformers import T5TokenizerFast

    letters = [chr(code) for code in range(33, 127)][: size - 4 - len(WORDS) - EXTRA_IDS]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS] + [(letter, -6.0) for letter in letters]
    pieces += [(f"<extra_id_{index}>", 0.0) for index in reversed(range(EXTRA_IDS))]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=EXTRA_IDS, model_max_length=512)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def make_transformer(folder: Path, seed: int = 0, **changes: object) -> None:
    """Save a tiny transformer as the published code does: ``_class_name: SD3JointModelFlexible``, its own config."""
    from safetensors.torch import save_file

    from unialignment.model.transformer import UniAlignmentTransformer

    sizes = {
        **{"vocab_size": 97, "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 3},
        **{"attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": T5_WIDTH},
        **{"caption_projection_dim": 64, "pooled_projection_dim": 32, "out_channels": 4, "pos_embed_max_size": 12},
        **changes,
    }
    torch.manual_seed(seed)
    model = UniAlignmentTransformer(**sizes, attention_mode="joint")
    for parameter in model.parameters():  # zero-initialised gates and heads would hide every mistake
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    # The published class takes part of its arguments as **kwargs: diffusers then lists even given values as defaults.
    config = {
        **sizes,
        **{"dual_attention_layers": [], "qk_norm": None, "_class_name": "SD3JointModelFlexible"},
        **{"_diffusers_version": "0.31.0", "_use_default_values": sorted(set(sizes) - {"vocab_size"})},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def make_text_encoder(folder: Path, seed: int = 1, width: int = T5_WIDTH, vocab_size: int = 160) -> None:
    """Save a tiny ``T5EncoderModel``; like T5's its table is longer than the tokenizer."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocab_size, d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(folder)


def make_vae(folder: Path, seed: int = 2) -> None:
    """Save a tiny ``AutoencoderKL`` (f8, 4 channels) with Stable Diffusion 3's shift and scale."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.save_pretrained(folder)


def make_published_folder(path: Path | str, seed: int = 0) -> Path:
    """Save one complete tiny pipeline in the published layout.

    64 x 64 pixels, 8 x 8 latents of 4 channels, width 64, 3 blocks, T5 width 48, vocabulary as the tokenizer's.

    Args:
        path: Folder to create.
        seed: Of all weights.

    Returns:
        ``path``.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    path = Path(path)
    path.mkdir(parents=True)
    size = make_tokenizer(path / "tokenizer")
    make_transformer(path / "transformer", seed, vocab_size=size)
    make_text_encoder(path / "text_encoder", seed + 1)
    make_vae(path / "vae", seed + 2)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(path / "scheduler")
    torch.save(torch.randn(T5_WIDTH, generator=torch.Generator().manual_seed(seed)), path / "mask_token_emb_00001.pth")
    index = {
        "_class_name": "UniAlignmentPipeline",
        "_diffusers_version": "0.31.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["modules.unialignment_model", "SD3JointModelFlexible"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (path / "model_index.json").write_text(json.dumps(index, indent=2))
    return path


@pytest.fixture(scope="session", name="make_tokenizer")
def tokenizer_builder() -> Callable[..., int]:
    """``make_tokenizer(folder, size=124)``."""
    return make_tokenizer


@pytest.fixture(scope="session", name="make_transformer")
def transformer_builder() -> Callable[..., None]:
    """``make_transformer(folder, seed=0, **changes)``."""
    return make_transformer


@pytest.fixture(scope="session", name="make_text_encoder")
def text_encoder_builder() -> Callable[..., None]:
    """``make_text_encoder(folder, seed=1, width=48, vocab_size=160)``."""
    return make_text_encoder


@pytest.fixture(scope="session")
def published_builder() -> Callable[..., Path]:
    """``make_published_folder``, for tests that change what they load."""
    return make_published_folder


@pytest.fixture(scope="session")
def published_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny pipeline in the published layout; don't change it."""
    return make_published_folder(tmp_path_factory.mktemp("published") / "tiny")
