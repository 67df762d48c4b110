"""What is learned, and the files it lies in: transformer, autoencoders, text embedders, tokenizer, folders, LoRAs.

    from unialignment.model import UniAlignmentTransformer
    model = UniAlignmentTransformer.from_pretrained("models/UniAlignment", subfolder="transformer")

Knows nothing of tasks, diffusion or training. Importing this package imports nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unialignment.model.cache import ConditionCache, TransformerOutput
    from unialignment.model.transformer import UniAlignmentTransformer

__all__ = ["ConditionCache", "TransformerOutput", "UniAlignmentTransformer"]


def __getattr__(name: str) -> Any:
    if name == "UniAlignmentTransformer":
        from unialignment.model.transformer import UniAlignmentTransformer

        return UniAlignmentTransformer
    if name in __all__:
        from unialignment.model import cache

        return getattr(cache, name)
    raise AttributeError(f"module 'unialignment.model' has no attribute {name!r}")
