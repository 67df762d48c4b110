"""Training a LoRA instead of the weights: what is frozen, what a checkpoint holds, what is saved. Knows no losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unialignment.errors import CheckpointError
from unialignment.model.lora import add_lora, save_lora
from unialignment.model.text import TokenEmbedder
from unialignment.training.config import LoraSection


def prepare(transformer: Any, embedder: nn.Module, options: LoraSection) -> tuple[str, ...]:
    """Freeze transformer and text embedder and give the transformer a new adapter in float32.

    Returns:
        The adapted layers.

    Raises:
        ConfigError: A target fits no layer.
    """
    embedder.requires_grad_(False)
    if options.base_precision == "bf16":
        # Not `transformer.to`: diffusers' warns of float32 modules even where there are none.
        nn.Module.to(transformer, torch.bfloat16)
        if not isinstance(embedder, TokenEmbedder):  # a T5 encoder, larger than the model itself
            nn.Module.to(embedder, torch.bfloat16)
    layers = add_lora(transformer, options.rank, options.alpha, options.targets)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return layers


def trained_state(trainable: nn.Module) -> dict[str, Tensor]:
    """State of the parameters that are trained: a checkpoint needs no copy of frozen weights, they have a file."""
    wanted = {name for name, parameter in trainable.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in trainable.state_dict().items() if name in wanted}


def load_trained_state(trainable: nn.Module, state: dict[str, Tensor]) -> None:
    """Inverse of :func:`trained_state`.

    Raises:
        CheckpointError: Names differ, for example because the targets have changed.
    """
    wanted = set(trained_state(trainable))
    if wanted != set(state):
        raise CheckpointError(
            f"the run's last checkpoint has {len(state)} trained tensors, the configuration {len(wanted)}; use the "
            "same lora section as before, or run.fresh=true"
        )
    trainable.load_state_dict(state, strict=False)


def export(transformer: Any, folder: Path) -> Path:
    """Write the adapter as a LoRA file in diffusers' form into a folder; returns the folder."""
    save_lora(transformer, folder)
    return folder
