"""From a configuration to the objects of a run: tokenizer, text embedder, transformer, autoencoder, objective.

Knows nothing of the training loop.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unialignment.diffusion import FlowPath, MaskedPath
from unialignment.errors import CheckpointError, ConfigError
from unialignment.model.autoencoder import PixelAutoencoder, load_autoencoder
from unialignment.model.text import TokenEmbedder
from unialignment.model.tokenizer import TextTokenizer
from unialignment.model.transformer import UniAlignmentTransformer
from unialignment.tasks import TASKS
from unialignment.training import lora
from unialignment.training.config import TransformerConfig
from unialignment.training.objective import Objective, ObjectiveSettings
from unialignment.training.samples import training_texts

FLAVOURS: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2},
    "nano": {"num_layers": 8, "attention_head_dim": 32, "num_attention_heads": 6},
    "small": {"num_layers": 12, "attention_head_dim": 64, "num_attention_heads": 6},
    "base": {"num_layers": 12, "attention_head_dim": 64, "num_attention_heads": 12},
    "sd3-medium": {"num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24},
}
"""Named transformer sizes; everything else has one default for models trained here."""

COMMON: dict[str, Any] = {
    "attention_mode": "prefix",
    "modulation": "shared",
    "qk_norm": "rms_norm",
    "num_null_image_tokens": 1,
    "pos_embed_max_size": 32,
}


def build_autoencoder(config: TransformerConfig) -> Any:
    """The frozen autoencoder that the configuration names.

    Raises:
        CheckpointError: the folder is missing or damaged.
    """
    if config.autoencoder.path is None:
        return PixelAutoencoder()
    if not config.autoencoder.path.is_dir():
        raise CheckpointError(
            f"autoencoder.path: no folder {config.autoencoder.path}. Train one with "
            "`unialign train configs/autoencoder.yaml`, or set autoencoder.path=null for pixel space."
        )
    return load_autoencoder(config.autoencoder.path)


def build_tokenizer(config: TransformerConfig, folder: Path) -> TextTokenizer:
    """The run's tokenizer: from ``folder`` if a run left it there, from the configured folder, or newly trained.

    Args:
        config: The configuration.
        folder: Where the run keeps it; written if absent.
    """
    if (folder / "tokenizer.json").is_file():
        return TextTokenizer.from_pretrained(folder)
    if config.text.tokenizer is not None:
        tokenizer = TextTokenizer.from_pretrained(config.text.tokenizer)
    elif config.model.initial is not None:
        from unialignment.model.layouts import load_model_tokenizer

        tokenizer = load_model_tokenizer(config.model.initial)
    elif (texts := training_texts(config, config.text.corpus)) is not None:
        tokenizer = TextTokenizer.train(texts, config.text.vocab_size)
    else:
        from unialignment.world.presets import preset
        from unialignment.world.sprites import SpritePack
        from unialignment.world.stream import all_language

        world = preset(config.world.preset, SpritePack.load(config.world.pack))
        # The corpus is part of the tokenizer's identity, so its seed is not the run's.
        texts = all_language(world, config.text.corpus, seed=0)
        tokenizer = TextTokenizer.train(texts, config.text.vocab_size, words=world.names)
    tokenizer.save_pretrained(folder)
    return tokenizer


def transformer_arguments(
    config: TransformerConfig, sample_size: int, channels: int, vocab_size: int
) -> dict[str, Any]:
    """Arguments of ``UniAlignmentTransformer``: flavour, then what follows from the other components, then overrides.

    Raises:
        ConfigError: unknown flavour or argument.
    """
    flavour = config.model.flavour
    if flavour not in FLAVOURS:
        raise ConfigError(f"model.flavour: {flavour!r} is unknown; use one of {', '.join(FLAVOURS)}.")
    known = [name for name in inspect.signature(UniAlignmentTransformer.__init__).parameters if name != "self"]
    for name in config.model.transformer:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"model.transformer: unknown argument {name!r} ({hint})")
    sizes = FLAVOURS[flavour]
    overrides = config.model.transformer
    width = overrides.get("attention_head_dim", sizes["attention_head_dim"]) * overrides.get(
        "num_attention_heads", sizes["num_attention_heads"]
    )
    derived = {
        "sample_size": sample_size,
        "in_channels": channels,
        "patch_size": 8 if config.autoencoder.path is None else 1,
        "joint_attention_dim": config.text.embedding_dim or width,
        "vocab_size": vocab_size,
    }
    return {**COMMON, **derived, **sizes, **overrides}


def build_objective(
    config: TransformerConfig,
    tokenizer: TextTokenizer,
    resolution: int,
    teacher_dims: tuple[int, int] = (0, 0),
    report: Callable[[str], None] = print,
) -> Objective:
    """Model, text embedder, autoencoder and loss of a run; weights from the global torch generator.

    Args:
        config: The configuration.
        tokenizer: The run's tokenizer.
        resolution: Side of the world's pictures in pixels.
        teacher_dims: Widths of the image and text teachers; 0: none.
        report: Receives remarks.

    Raises:
        ConfigError: settings that contradict each other.
        CheckpointError: a named folder is missing or damaged.
    """
    canvas = max((TASKS.get(task).target_length for task, count in config.mixture.items() if count), default=0)
    if config.text.max_length < canvas:
        raise ConfigError(
            f"text.max_length={config.text.max_length} is shorter than the longest text canvas of the mixture's tasks "
            f"({canvas} tokens); use at least {canvas}."
        )
    autoencoder = build_autoencoder(config)
    if config.model.initial is not None:
        from unialignment.pipeline import UniAlignmentPipeline

        initial = UniAlignmentPipeline.from_pretrained(config.model.initial, device="cpu")
        transformer, embedder = initial.transformer.train(), initial.text_embedder.train()
        if initial.tokenizer.fingerprint != tokenizer.fingerprint:
            raise ConfigError("model.initial has another tokenizer than text.tokenizer; leave text.tokenizer out.")
        if config.autoencoder.path is None:
            autoencoder = initial.autoencoder
        if config.model.transformer:
            report("model.transformer is ignored: the sizes come from model.initial.")
        # A LoRA's file has no place for new positions.
        longer = isinstance(embedder, TokenEmbedder) and embedder.max_length < config.text.max_length
        if longer and not config.lora.rank:
            report(f"Texts of up to {config.text.max_length} tokens: {embedder.max_length} positions are extended.")
            embedder.extend(config.text.max_length)
        transformer.requires_grad_(True)
        embedder.requires_grad_(isinstance(embedder, TokenEmbedder))  # a T5 encoder is frozen
    else:
        arguments = transformer_arguments(
            config, resolution // autoencoder.spatial_factor, autoencoder.latent_channels, tokenizer.vocab_size
        )
        transformer = UniAlignmentTransformer(**arguments)
        embedder = TokenEmbedder(tokenizer.vocab_size, transformer.config.joint_attention_dim, config.text.max_length)
    if config.lora.rank:
        layers = lora.prepare(transformer, embedder, config.lora)
        report(f"LoRA of rank {config.lora.rank} on {len(layers)} layers; all other weights are frozen.")
    flow = FlowPath(**config.flow.model_dump())
    masked = MaskedPath(tokenizer.mask_token_id, padding_id=tokenizer.pad_token_id, **config.masked.model_dump())
    settings = ObjectiveSettings(
        **config.loss.model_dump(), image_teacher_dim=teacher_dims[0], text_teacher_dim=teacher_dims[1]
    )
    if config.loss.cross and transformer.config.attention_mode == "joint" and config.loss.cross_form == "condition":
        raise ConfigError("loss.cross_form=condition needs attention_mode prefix; use published, or loss.cross=0.")
    return Objective(transformer, embedder, autoencoder, tokenizer, flow, masked, settings)


def parameter_count(module: torch.nn.Module) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
