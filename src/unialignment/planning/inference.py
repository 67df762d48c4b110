"""The memory of using a model: each stage of drawing and of writing is run on tensors without storage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unialignment.memory import MemoryTracker, size_of, tensors_of
from unialignment.model.cache import ConditionCache
from unialignment.model.quantization import KEPT, kept_weight
from unialignment.planning.components import (
    Components,
    build,
    build_folder,
    embed,
    fake,
    materialise,
    prompt_tokens_of,
    shorten,
)
from unialignment.training.config import TransformerConfig

WRITTEN = 128
"""Tokens of a text that is written, as published."""


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes of editing one picture with guidance, and of writing one text about it.

    Attributes:
        weights: By component.
        working: Most that each stage needs above weights: ``text``, ``encode``, ``denoise``, ``decode``, ``write``.
        peak: Everything resident, whatever the task.
        without_text_encoder: Drawing, the text encoder dropped once prompts are encoded and the transformer loaded
            after that. Writing needs both, ``peak``.
        offloaded: Only the component at work on the device (model offload).
        grouped: Only the block at work on the device (group offload).
    """

    weights: dict[str, int]
    working: dict[str, int]
    peak: int
    without_text_encoder: int
    offloaded: int
    grouped: int


def inference_memory(
    config: TransformerConfig, dtype: torch.dtype, prompt_tokens: int | None = None
) -> InferenceMemory:
    """Predict the memory of using the model of a configuration; see :func:`folder_memory`.

    Args:
        config: A transformer run; its model is meant.
        dtype: Of transformer and text embedder; the autoencoder stays in float32.
        prompt_tokens: Condition tokens.
    """
    plain = config.model_copy(update={"lora": config.lora.model_copy(update={"rank": 0})})
    return _predict(build(plain, []), dtype, prompt_tokens, room=True)


def folder_memory(
    folder: str | Path,
    dtype: torch.dtype,
    *,
    quantize: Mapping[str, str] | None = None,
    tiling: bool = False,
    prompt_tokens: int | None = None,
) -> InferenceMemory:
    """Predict the memory of using a model folder of any layout under ``max_memory``, from its configs alone.

    What ``max_memory`` does in any case is assumed: caches keep no room for targets.

    Args:
        folder: The model's.
        dtype: Of transformer and text embedder; the autoencoder stays in float32.
        quantize: Component → ``"8bit"`` or ``"4bit"``.
        tiling: Whether the autoencoder works in tiles.
        prompt_tokens: Condition tokens of a text.

    Raises:
        CheckpointError: A config is missing, damaged or of a class that isn't known.
    """
    return _predict(build_folder(folder), dtype, prompt_tokens, quantize or {}, tiling)


@torch.no_grad()
def _predict(
    parts: Components,
    dtype: torch.dtype,
    prompt_tokens: int | None,
    quantize: Mapping[str, str] | None = None,
    tiling: bool = False,
    room: bool = False,
) -> InferenceMemory:
    text_module: nn.Module = parts.embedder or parts.encoder  # type: ignore[assignment]
    for part in (parts.transformer, text_module):
        nn.Module.to(part, dtype)
    if tiling and hasattr(parts.autoencoder, "enable_tiling"):
        parts.autoencoder.enable_tiling()
    with fake():
        materialise(parts)
        parts.transformer.eval()
        modules = {"transformer": parts.transformer, "text_embedder": text_module, "autoencoder": parts.autoencoder}
        saved = {name: _quantized(module, name, (quantize or {}).get(name)) for name, module in modules.items()}
        weights = {name: size_of(tensors_of(module)) - saved[name][0] for name, module in modules.items()}
        scratch = {name: saved[name][1] for name in modules}
        parts_of_blocks = _largest_parts(parts, text_module)
        shorten(parts)
        working = {
            name: peak + scratch[module]
            for name, (module, peak) in _stages(parts, modules, prompt_tokens, room).items()
        }
    total, drawing = sum(weights.values()), ("encode", "denoise", "decode")
    of = {"text": "text_embedder", "encode": "autoencoder", "denoise": "transformer", "decode": "autoencoder"}
    rest = weights["transformer"] + weights["autoencoder"]
    return InferenceMemory(
        weights=weights,
        working=working,
        peak=total + max(working.values()),
        without_text_encoder=max(
            weights["text_embedder"] + weights["autoencoder"] + working["text"], rest + max(working[n] for n in drawing)
        ),
        # A text is embedded anew at every step, so its stages alternate; no two components are there at once either.
        offloaded=max(
            *(weights[module] + working[stage] for stage, module in of.items()),
            weights["transformer"] + working["write"],
        ),
        grouped=max(
            *(min(parts_of_blocks[module], weights[module]) + working[stage] for stage, module in of.items()),
            parts_of_blocks["transformer"] + working["write"],
        ),
    )


def _stages(
    parts: Components, modules: Mapping[str, nn.Module], prompt_tokens: int | None, room: bool
) -> dict[str, tuple[str, int]]:
    """Stage → the component that works in it, and its working memory."""
    length, pixels = prompt_tokens_of(parts, prompt_tokens), parts.side * parts.autoencoder.spatial_factor
    channels, width = parts.autoencoder.latent_channels, parts.transformer.config.joint_attention_dim
    dtype = parts.transformer.context_embedder.weight.dtype
    latents = torch.empty(2, channels, parts.side, parts.side, dtype=dtype)
    text, time = torch.empty(2, length, width, dtype=dtype), torch.empty(2)
    mask = torch.ones(2, length, dtype=torch.bool)
    limit = WRITTEN if parts.embedder is None else min(WRITTEN, parts.embedder.max_length)
    words, open_ = torch.empty(1, limit, width, dtype=dtype), torch.arange(limit)
    joint = parts.transformer.config.attention_mode == "joint"

    def denoise() -> Any:
        if joint:
            # Branch by branch, as the denoiser does.
            return parts.transformer(
                text_embeds=text[:1],
                text_mask=mask[:1],
                latents=latents[:1],
                sources=[latents[:1]],
                timestep=time[:1],
            )
        # Each branch's conditions, then all in one batch with room for the target, as the denoiser does.
        caches: list[Any] = [
            (parts.transformer.prefill(text_embeds=text[:1], text_mask=mask[:1], images=[latents[:1]]), None)
            for _ in range(2)
        ]
        tokens = (parts.side // parts.transformer.config.patch_size) ** 2
        cache = ConditionCache.assemble(caches, tokens if room else 0, consume=True)
        return parts.transformer.denoise(cache, latents=latents, timestep=time[:1])

    def write() -> Any:
        # Positions by their indices: how many there are of a mask can't be known without its values.
        rows: Any = (torch.zeros_like(open_), open_)
        if joint:
            output = parts.transformer(
                text_embeds=words, latents=latents[:1], timestep=time[:1], target="text", logit_positions=rows
            )
        else:
            cache = parts.transformer.prefill(text_embeds=text[:1], text_mask=mask[:1], images=[latents[:1]])
            output = parts.transformer.denoise(cache, text_embeds=words, timestep=time[:1], logit_positions=rows)
        return output.text_logits.float().softmax(-1)

    stages: dict[str, tuple[str, Any]] = {
        "text": ("text_embedder", lambda: embed(parts, 1, length)),
        "encode": ("autoencoder", lambda: parts.autoencoder.encode(torch.empty(1, 3, pixels, pixels))),
        "denoise": ("transformer", denoise),
        "decode": ("autoencoder", lambda: parts.autoencoder.decode(torch.empty(1, *latents.shape[1:]))),
        "write": ("transformer", write),
    }
    working = {}
    for name, (module, run) in stages.items():
        known: list[Tensor] = [*tensors_of(modules[module]), latents, text, mask, time, words, open_]
        with MemoryTracker(known) as tracker:
            run()
        working[name] = (module, tracker.peak)
    return working


def _quantized(module: nn.Module, name: str, bits: str | None) -> tuple[int, int]:
    """Bytes that quantized weights save, and those of the largest layer, which is expanded while it works."""
    if bits is None:
        return 0, 0
    saved = largest = 0
    for layer, part in module.named_modules():
        if isinstance(part, nn.Linear) and not layer.startswith(KEPT.get(name, ())):
            size = size_of([part.weight])
            saved += size - kept_weight(part.weight.shape, bits)
            largest = max(largest, size)
    return saved, largest


def _largest_parts(parts: Components, text_module: nn.Module) -> dict[str, int]:
    """Bytes on the device at once with group offload: of the transformer all but its blocks, and the largest block."""
    blocks = parts.transformer.transformer_blocks
    sizes = [size_of(tensors_of(block)) for block in blocks]
    layers = [size_of(tensors_of(part)) for part in text_module.modules() if not list(part.children())]
    return {
        "transformer": size_of(tensors_of(parts.transformer)) - sum(sizes) + max(sizes),
        "text_embedder": max(layers),
        "autoencoder": size_of(tensors_of(parts.autoencoder)),
    }
