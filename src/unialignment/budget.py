"""``max_memory``: the mildest switches with which a model is predicted to fit, or what would be needed.

The order, each step kept while the next is tried:

1. as asked: float32 unless a dtype was given; pictures through the autoencoder one by one (slicing, same results);
2. bfloat16, unless a dtype was given;
3. VAE tiling, in tiles of 256 pixels;
4. on an accelerator, model offload: one component on the device at a time;
5. on an accelerator, group offload: one block of the transformer on the device at a time;
6. on a CPU, where there is nowhere to offload to: a T5 encoder dropped once prompts are encoded, for pictures only.

Quantizing changes results, so it is never chosen, only named where it would help. Predictions are for one picture of
the model's own size with one source picture, and for one text. Knows nothing of how switches work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from unialignment.errors import InputError
from unialignment.model.streaming import format_size

if TYPE_CHECKING:
    from unialignment.pipeline import UniAlignmentPipeline
    from unialignment.planning import InferenceMemory

logger = logging.getLogger(__name__)

TILE = 256
"""Side of a tile in pixels."""
MOST_AT_ONCE = 64


@dataclass(frozen=True)
class MemoryChoice:
    """What ``max_memory`` led to.

    Attributes:
        budget: Bytes to fit into.
        predicted: Bytes that the choice needs.
        dtype: Of transformer and text encoder.
        tiling: Whether the autoencoder works in tiles.
        offload: ``"model"``, ``"group"`` or ``None``.
        drop_text_encoder: Whether the text encoder is dropped once prompts are encoded; texts are refused then.
        batch_size: Most samples computed at once.
    """

    budget: int
    predicted: int
    dtype: torch.dtype
    tiling: bool = False
    offload: Literal["model", "group"] | None = None
    drop_text_encoder: bool = False
    batch_size: int = 1

    def summary(self) -> str:
        """One sentence."""
        switches = [str(self.dtype).removeprefix("torch.")]
        switches += ["VAE tiling"] if self.tiling else []
        switches += [f"{self.offload} offload"] if self.offload else []
        switches += ["text encoder dropped after the prompt (pictures only)"] if self.drop_text_encoder else []
        return (
            f"{', '.join(switches)}, {self.batch_size} at once: {format_size(self.predicted)} predicted of "
            f"{format_size(self.budget)}"
        )

    def apply(self, pipe: UniAlignmentPipeline, device: torch.device) -> None:
        """Set the switches of a loaded pipeline (its dtype and its text encoder are loaded as chosen already)."""
        pipe.batch_limit = self.batch_size
        if hasattr(pipe.autoencoder, "enable_slicing"):
            pipe.enable_vae_slicing()
        if self.tiling:
            pipe.enable_vae_tiling(TILE)
        if self.offload == "model":
            pipe.enable_model_cpu_offload(device)
        elif self.offload == "group":
            pipe.enable_group_offload(device)
        logger.info("max_memory: %s", self.summary())


def choose(
    folder: str | Path,
    budget: int,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    quantize: Mapping[str, str] | None = None,
    drop_text_encoder: bool = False,
    predict: Callable[..., InferenceMemory] | None = None,
) -> MemoryChoice:
    """Choose switches for a model folder.

    Args:
        folder: Of any layout; only its configs are read.
        budget: Bytes.
        device: Where it will compute.
        dtype: If it is fixed.
        quantize: Component → ``"8bit"`` or ``"4bit"``, if that was asked for.
        drop_text_encoder: Whether that was asked for; offloading is then out of the question.
        predict: In place of :func:`~unialignment.planning.folder_memory`.

    Raises:
        InputError: Nothing makes it fit; the message says what would be needed.
        CheckpointError: A config is missing or damaged.
    """
    from unialignment.planning.components import has_text_encoder
    from unialignment.planning.inference import folder_memory

    def needs(kind: torch.dtype, tiling: bool, bits: Mapping[str, str] | None = quantize) -> InferenceMemory:
        return (predict or folder_memory)(folder, kind, quantize=bits or None, tiling=tiling)

    large = has_text_encoder(folder)
    least: list[int] = []
    dtypes = [torch.float32, torch.bfloat16] if dtype is None else [dtype]
    for kind in dtypes:
        memory = needs(kind, False)
        if memory.peak <= budget:
            return _fill(MemoryChoice(budget, memory.peak, kind), memory)
        least.append(memory.peak)
    memory = needs(kind, True)
    if memory.peak <= budget:
        return _fill(MemoryChoice(budget, memory.peak, kind, tiling=True), memory)
    least.append(memory.peak)
    if device.type != "cpu" and not drop_text_encoder:
        for name, needed in (("model", memory.offloaded), ("group", memory.grouped)):
            if needed <= budget:
                return MemoryChoice(budget, needed, kind, tiling=True, offload=name)  # type: ignore[arg-type]
            least.append(needed)
    elif large:
        if memory.without_text_encoder <= budget:
            return MemoryChoice(budget, memory.without_text_encoder, kind, tiling=True, drop_text_encoder=True)
        least.append(memory.without_text_encoder)
    advice = f"allow {format_size(min(least))}"
    if dtype not in (None, torch.bfloat16):
        advice += ", leave the dtype open"
    if not quantize:
        small = needs(kind, True, _all_quantized(large))
        needed = min(small.peak, small.offloaded if device.type != "cpu" else small.peak)
        if needed < min(least):
            advice += f", or use quantize='4bit' (about {format_size(needed)})"
    raise InputError(
        f"the model can't get along with {format_size(budget)} on {device.type}: with every switch that helps here it "
        f"needs {format_size(min(least))}; {advice}"
    )


def _all_quantized(large: bool) -> dict[str, str]:
    return {"transformer": "4bit", **({"text_embedder": "4bit"} if large else {})}


def _fill(choice: MemoryChoice, memory: InferenceMemory) -> MemoryChoice:
    """As many samples at once as there is room for; the autoencoder takes them one by one."""
    growing = max(memory.working[name] for name in ("text", "denoise", "write"))
    fixed = sum(memory.weights.values())
    count = max(1, min(MOST_AT_ONCE, (choice.budget - fixed) // max(growing, 1)))
    return replace(choice, batch_size=count, predicted=max(choice.predicted, fixed + count * growing))
