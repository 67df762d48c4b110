"""The memory of one training step: a real one, forward and backward, is run on tensors without storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from unialignment.memory import MemoryTracker, size_of, tensors_of
from unialignment.planning.components import Components, build, embed, fake, materialise, prompt_tokens_of, shorten
from unialignment.tasks import TASKS
from unialignment.training.batching import PROMPT_BUCKET
from unialignment.training.config import TransformerConfig

_PAIRED = ("generate", "caption", "infill")


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training step.

    Attributes:
        parameters: Numbers in the transformer (not bytes).
        trainable: Numbers that are trained, text embedder included (not bytes).
        weights: All components' weights.
        gradients: Of the trained weights.
        optimizer: Its state.
        average: The average of the trained weights (EMA).
        activations: What the step's peak has above weights, gradients at that moment included, less ``gradients``.
        peak: All of it at its highest.
    """

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    peak: int


def _groups(config: TransformerConfig) -> list[tuple[str, int, int, int, bool]]:
    """(target, sources, text length, samples, paired) of each batch of a micro-batch, in the objective's order."""
    groups: dict[tuple[str, int, int], list[Any]] = {}
    for name, count in config.mixture.items():
        task = TASKS.get(name)
        # Compositions of two and of three pictures are equally frequent in the scene world.
        shares = {2: count - count // 2, 3: count // 2} if task.max_sources > 1 else {task.max_sources: count}
        for sources, share in shares.items():
            if share:
                entry = groups.setdefault((task.target, sources, task.target_length), [0, False])
                entry[0] += share
                entry[1] = entry[1] or name in _PAIRED
    return [(*key, count, paired and config.loss.cross > 0) for key, (count, paired) in sorted(groups.items())]


def _step(config: TransformerConfig, parts: Components, prompt: int) -> None:
    """One micro-batch, forward and backward, as the objective computes it."""
    losses: list[Tensor] = []
    pixels = parts.trained_side * parts.autoencoder.spatial_factor
    layer = config.loss.feature_layer if config.teacher.name is not None else None
    with torch.autocast("cpu", torch.bfloat16, enabled=config.run.precision == "bf16"):
        for target, sources, length, batch, paired in _groups(config):
            count = sources + (target == "image")
            images = torch.empty(batch * count, 3, pixels, pixels)
            with torch.no_grad():
                latents = list(parts.autoencoder.encode(images).float().chunk(count)) if count else []
            # Captions have no prompt, questions are short; a text from no picture is about a prompt.
            words = prompt if target == "image" or not sources else min(prompt, PROMPT_BUCKET)
            if target == "text" and parts.encoder is not None:  # as published: a question leads the text it is about
                words, length = 0, length + words
            text, mask = embed(parts, batch, words), torch.ones(batch, words, dtype=torch.bool)
            if target == "image":
                loss = _image_loss(config, parts, latents, text, mask, paired, layer)
            else:
                loss = _text_loss(parts, latents, text, mask, batch, length, paired, layer)
            losses.append(loss)
    torch.stack(losses).sum().backward()


def _image_loss(
    config: TransformerConfig,
    parts: Components,
    latents: list[Tensor],
    text: Tensor,
    mask: Tensor,
    paired: bool,
    layer: int | None,
) -> Tensor:
    clean, draws = latents[0], config.loss.draws
    if draws > 1:
        cache = parts.transformer.prefill(
            text_embeds=text, text_mask=mask, images=latents[1:], feature_layer=layer, features=paired
        )
        rows = torch.zeros(len(clean) * draws, dtype=torch.long)
        clean = clean[rows]
        noise = torch.randn_like(clean)
        output = parts.transformer.denoise(
            cache.select(rows),
            latents=torch.lerp(clean, noise, 0.5),
            timestep=torch.empty(len(clean)),
            feature_layer=layer,
        )
    else:
        noise = torch.randn_like(clean)
        output = parts.transformer(
            text_embeds=text,
            text_mask=mask,
            latents=torch.lerp(clean, noise, 0.5),
            sources=latents[1:],
            timestep=torch.empty(len(clean)),
            feature_layer=layer,
            condition_features=paired,
        )
    velocity = cast(Tensor, output.velocity)
    return (velocity.float() - (noise - clean)).square().flatten(1).mean(1).sum()


def _text_loss(
    parts: Components,
    latents: list[Tensor],
    prompt: Tensor,
    mask: Tensor,
    batch: int,
    length: int,
    paired: bool,
    layer: int | None,
) -> Tensor:
    # Half of the positions are masked on average. Which ones doesn't matter to memory, but their number must be known.
    masked = torch.zeros(max(1, batch * length // 2), dtype=torch.long)
    output = parts.transformer(
        text_embeds=embed(parts, batch, length),
        latents=latents[0] if latents else None,
        sources=latents[1:],
        timestep=torch.empty(batch),
        target="text",
        feature_layer=layer,
        condition_text_embeds=prompt,
        condition_text_mask=mask,
        logit_positions=(masked, masked),
        condition_features=paired,
    )
    logits = output.text_logits.float().clone()
    return F.cross_entropy(logits, masked, reduction="none").sum()


def _optimizer_bytes(config: TransformerConfig, parts: Components) -> int:
    modules = [module for module in (parts.transformer, parts.embedder) if module is not None]
    trained = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
    if config.optimizer.name == "adamw8bit":
        return sum(2 * p.numel() for _, p in trained)
    if config.optimizer.name == "adamw":
        return sum(8 * p.numel() for _, p in trained)
    matrices = [p.ndim == 2 and "blocks." in name and "norm" not in name for name, p in trained]
    return sum((4 if matrix else 8) * p.numel() for matrix, (_, p) in zip(matrices, trained, strict=True))


def resident(config: TransformerConfig, parts: Components) -> tuple[int, int, int, int]:
    """Bytes of weights, gradients, average and optimizer state."""
    trained = [p for module in parts.modules for p in module.parameters() if p.requires_grad]
    weights = size_of(tensors_of(*parts.modules))
    return weights, size_of(trained), sum(4 * p.numel() for p in trained), _optimizer_bytes(config, parts)


def training_memory(
    config: TransformerConfig, prompt_tokens: int | None = None, notes: list[str] | None = None
) -> TrainingMemory:
    """Predict the memory of one training step.

    Args:
        config: A transformer run.
        prompt_tokens: Condition tokens of a text; 256 with T5, 24 for the scene world unless given.
        notes: Receives what was assumed.

    Raises:
        ConfigError: The configuration contradicts itself.
        CheckpointError: A folder that it names is damaged.
    """
    parts = build(config, notes if notes is not None else [])
    with fake():
        materialise(parts)
        modules = parts.modules
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        weights, gradients, average, optimizer = resident(config, parts)
        shorten(parts)
        if config.micro_batches > 1:  # those of the first micro-batch are there during the second
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        before = gradients if config.micro_batches > 1 else 0
        existing = [*tensors_of(*modules), *(p.grad for p in trained if p.grad is not None)]
        parts.transformer.train()
        with MemoryTracker(existing) as tracker:
            _step(config, parts, prompt_tokens_of(parts, prompt_tokens))
        step = max(tracker.peak + before, gradients)
        return TrainingMemory(
            parameters=sum(p.numel() for n, p in parts.transformer.named_parameters() if "lora_" not in n),
            trainable=sum(p.numel() for p in trained),
            weights=weights,
            gradients=gradients,
            optimizer=optimizer,
            average=average,
            activations=step - gradients,
            peak=weights + optimizer + average + step,
        )
