"""8-bit and 4-bit weights of the two large components, by the backends that diffusers and transformers support.

bitsandbytes where there is CUDA, optimum-quanto anywhere. Weights are quantized while they are read, linear layer by
linear layer; embeddings, norms, input and output layers keep their type. Knows nothing of layouts or of tasks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from unialignment.errors import InputError

Bits = Literal["8bit", "4bit"]
BITS = ("8bit", "4bit")
QUANTIZABLE = ("transformer", "text_embedder")
KEPT: dict[str, tuple[str, ...]] = {
    # The first four are read outright for their type; predictions suffer most from coarse outputs.
    "transformer": (
        *("time_text_embed", "context_embedder", "pos_embed", "aligned_proj", "shared_modulation"),
        *("image_norm_out", "image_proj_out", "text_proj_out", "image_embedding_head", "text_embedding_head"),
    ),
    "text_embedder": (),
}
"""Layers (beginnings of names) that keep their type, by component."""
_GROUP = 128
"""Weights that share one scale in 4 bits, in optimum-quanto."""


def parse_quantize(value: str | Mapping[str, str] | None) -> dict[str, str]:
    """Which components to quantize, and how.

    Args:
        value: ``"8bit"`` or ``"4bit"`` for both, or component → one of these; as text
            ``"text_embedder=8bit,transformer=4bit"``.

    Raises:
        InputError: It is something else.
    """
    if value is None:
        return {}
    if isinstance(value, str):
        if value in BITS:
            return dict.fromkeys(QUANTIZABLE, value)
        pairs = [item.partition("=") for item in value.split(",")]
        value = {name.strip(): bits.strip() for name, _, bits in pairs}
    for name, bits in value.items():
        if name not in QUANTIZABLE or bits not in BITS:
            raise InputError(
                f"quantize: got {name!r}={bits!r}; expected {' or '.join(BITS)} for all, or for "
                f"{' or '.join(QUANTIZABLE)}, e.g. text_embedder=8bit"
            )
    return dict(value)


def backend(device: torch.device) -> str:
    """The backend for a device.

    Raises:
        InputError: None is installed.
    """
    if device.type == "cuda" and importlib.util.find_spec("bitsandbytes"):
        return "bitsandbytes"
    if importlib.util.find_spec("optimum") and importlib.util.find_spec("optimum.quanto"):
        return "quanto"
    wanted = "bitsandbytes or optimum-quanto" if device.type == "cuda" else "optimum-quanto"
    raise InputError(
        f"8-bit and 4-bit weights on {device.type} need {wanted}, which isn't installed; "
        "`pip install 'unialignment[quantize]'`, or leave quantize out"
    )


def quantization_config(component: str, bits: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The configuration object that the component's library takes as ``quantization_config``.

    Args:
        component: ``"transformer"`` (diffusers) or ``"text_embedder"`` (transformers).
        bits: ``"8bit"`` or ``"4bit"``.
        device: Where it will compute.
        dtype: Of the arithmetic.

    Raises:
        InputError: The backend isn't there.
    """
    import diffusers
    import transformers

    library: Any = diffusers if component == "transformer" else transformers
    name, kept = backend(device), list(KEPT[component]) or None
    if name == "quanto":
        key = "weights_dtype" if library is diffusers else "weights"
        return library.QuantoConfig(**{key: f"int{bits[0]}"}, modules_to_not_convert=kept)
    if bits == "8bit":
        return library.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return library.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=kept
    )


def is_quantized(module: nn.Module) -> bool:
    """Whether a module was loaded with quantized weights."""
    return any(getattr(part, "is_quantized", False) for part in module.modules())


def refuse_quantized(module: nn.Module, what: str) -> None:
    """Refuse what needs plain weights.

    Raises:
        InputError: The module is quantized.
    """
    if is_quantized(module):
        raise InputError(f"{what} needs plain weights, and these are quantized; load the model without quantize")


def kept_weight(shape: Sequence[int], bits: str) -> int:
    """Bytes of a quantized weight ``[out, in]`` with its scales, about."""
    count = 1
    for length in shape:
        count *= length
    if bits == "8bit":
        return count + 4 * shape[0]
    return count // 2 + 8 * (count // _GROUP)
