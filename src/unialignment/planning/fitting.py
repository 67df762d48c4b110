"""Which switches make a configuration fit into a given memory, and the report for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from unialignment.errors import ConfigError
from unialignment.model.streaming import format_size
from unialignment.planning.components import build
from unialignment.planning.inference import InferenceMemory, inference_memory
from unialignment.planning.training import TrainingMemory, resident, training_memory
from unialignment.training.config import TransformerConfig


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found.

    Attributes:
        training: As configured.
        inference: By dtype.
        budget: Bytes to fit into, if given.
        fitting: Overrides that make training fit the budget; empty when it fits as it is, ``None`` when nothing does.
        fitted: Training with them.
        fitting_inference: The first inference setting that fits, in words; ``None``: none does.
        notes: What was assumed.
    """

    training: TrainingMemory
    inference: dict[str, InferenceMemory]
    budget: int | None = None
    fitting: tuple[str, ...] | None = None
    fitted: TrainingMemory | None = None
    fitting_inference: str | None = None
    notes: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Plain data, sizes in bytes."""
        return asdict(self)

    def lines(self) -> list[str]:
        """A text for people."""
        text = [
            f"transformer: {self.training.parameters / 1e6:,.1f} M parameters, {self.training.trainable / 1e6:,.1f} M "
            "trained (text embedder included)",
            "training, as configured:",
            *_training_lines(self.training),
        ]
        for dtype, memory in self.inference.items():
            weights = ", ".join(f"{name} {format_size(size)}" for name, size in memory.weights.items())
            text += [
                f"inference in {dtype} (one picture edited, with guidance): peak {format_size(memory.peak)}",
                f"  weights: {weights}",
                f"  text encoder dropped after the prompt: {format_size(memory.without_text_encoder)}; model offload: "
                f"{format_size(memory.offloaded)}; group offload: {format_size(memory.grouped)}",
            ]
        if self.budget is not None:
            text.append(f"to fit into {format_size(self.budget)}:")
            if self.fitting is None or self.fitted is None:
                text.append("  training: no combination of switches fits; use more memory or a smaller model")
            elif not self.fitting:
                text.append("  training: fits as configured")
            else:
                text.append(f"  training: {' '.join(self.fitting)}")
                text += _training_lines(self.fitted, "    ")
            text.append(f"  inference: {self.fitting_inference or 'nothing here fits'}")
        return [*text, *(f"note: {note}" for note in self.notes)]


def _training_lines(memory: TrainingMemory, indent: str = "  ") -> list[str]:
    parts = ("weights", "gradients", "optimizer", "average", "activations", "peak")
    return [f"{indent}{part:<12}{format_size(getattr(memory, part)):>12}" for part in parts]


def _apply(config: TransformerConfig, override: str) -> TransformerConfig:
    section, _, rest = override.partition("=")
    value: Any = {"true": True}.get(rest, int(rest) if rest.isdigit() else rest)
    room, _, key = section.partition(".")
    if not key:
        return config.model_copy(update={room: value})
    return config.model_copy(update={room: getattr(config, room).model_copy(update={key: value})})


def _halved(config: TransformerConfig, times: int) -> TransformerConfig:
    """The same batch in ``2 ** times`` as many micro-batches, as near as whole samples allow."""
    factor = 2**times
    mixture = {task: -(-count // factor) for task, count in config.mixture.items()}
    return config.model_copy(update={"mixture": mixture, "micro_batches": config.micro_batches * factor})


def _said(config: TransformerConfig) -> str:
    mixture = ", ".join(f"{task}: {count}" for task, count in config.mixture.items())
    return f"micro_batches={config.micro_batches} 'mixture={{{mixture}}}'"


def _fit(
    config: TransformerConfig, budget: int, first: TrainingMemory, prompt_tokens: int | None
) -> tuple[tuple[str, ...] | None, TrainingMemory | None]:
    """The mildest switches that make training fit, each kept once it has been tried."""
    if first.peak <= budget:
        return (), first
    chosen: list[str] = []
    ladder: list[list[str]] = [[]]
    if config.run.precision != "bf16":
        ladder.append(["run.precision=bf16"])
    if not config.run.activation_checkpointing:
        ladder.append(["run.activation_checkpointing=true"])
    if config.optimizer.name == "adamw":
        ladder.append(["optimizer.name=adamw8bit"])
    if not config.lora.rank:
        ladder.append(["optimizer.name=adamw", "lora.rank=16", "lora.base_precision=bf16"])
    elif config.lora.base_precision != "bf16":
        ladder.append(["lora.base_precision=bf16"])
    deepest = max(0, (max(config.mixture.values()) - 1).bit_length())
    for step in ladder:
        for override in step:
            config = _apply(config, override)
            chosen = [item for item in chosen if item.partition("=")[0] != override.partition("=")[0]] + [override]
        if sum(resident(config, build(config, []))) > budget:
            continue  # without any activation
        smallest = _halved(config, deepest)
        least = training_memory(smallest, prompt_tokens)
        if least.peak > budget:
            continue
        for times in range(deepest + 1):
            tried = _halved(config, times)
            # Activations grow linearly with the samples: skip what clearly can't fit.
            ratio = sum(tried.mixture.values()) / sum(smallest.mixture.values())
            if times < deepest and least.peak + least.activations * (ratio - 1) * 0.5 > budget:
                continue
            memory = least if times == deepest else training_memory(tried, prompt_tokens)
            if memory.peak <= budget:
                return (*chosen, *([_said(tried)] if times else [])), memory
    return None, None


def plan(config: Any, budget: int | None = None, prompt_tokens: int | None = None) -> Plan:
    """Predict the memory of a configuration, and find switches that make it fit.

    Args:
        config: A transformer run.
        budget: Bytes to fit into.
        prompt_tokens: Condition tokens of a text.

    Raises:
        ConfigError: It is the configuration of another kind of run, or contradicts itself.
    """
    if not isinstance(config, TransformerConfig):
        raise ConfigError("plan needs a configuration of kind: transformer; autoencoders here are small")
    notes: list[str] = []
    training = training_memory(config, prompt_tokens, notes)
    notes.append("an accelerator also holds its context and unused reserve: leave about a gigabyte of room")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    inference = {name: inference_memory(config, dtype, prompt_tokens) for name, dtype in dtypes.items()}
    result = Plan(training, inference, budget, notes=tuple(dict.fromkeys(notes)))
    if budget is None:
        return result
    fitting, fitted = _fit(config, budget, training, prompt_tokens)
    if fitting and any("adamw8bit" in item for item in fitting):
        result = replace(result, notes=(*result.notes, "adamw8bit needs the package bitsandbytes and CUDA"))
    return replace(result, fitting=fitting, fitted=fitted, fitting_inference=_fit_inference(inference, budget))


def _fit_inference(inference: dict[str, InferenceMemory], budget: int) -> str | None:
    for attribute, words in (
        ("peak", ""),
        ("without_text_encoder", ", drop_text_encoder=True (for pictures)"),
        ("offloaded", ", enable_model_cpu_offload()"),
        ("grouped", ", enable_group_offload()"),
    ):
        for dtype, memory in inference.items():
            if getattr(memory, attribute) <= budget:
                return f"dtype {dtype}{words}: {format_size(getattr(memory, attribute))}"
    return None
