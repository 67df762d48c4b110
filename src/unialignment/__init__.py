"""UniAlignment: one diffusion transformer that generates, edits, perceives, composes, captions and answers.

    import unialignment
    pipe = unialignment.load("nano")
    pipe.generate("a dog on a red background", seed=1).images[0].save("dog.png")

Importing this package imports nothing heavy; PyTorch is loaded with the first attribute that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unialignment.processor import limit_instruction_sets

if TYPE_CHECKING:
    from unialignment.pipeline import ImageResult, TextResult, UniAlignmentPipeline, load

__version__ = "0.1.0"
__all__ = ["ImageResult", "TextResult", "UniAlignmentPipeline", "__version__", "load"]

limit_instruction_sets()


def __getattr__(name: str) -> Any:
    if name in __all__:
        from unialignment import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'unialignment' has no attribute {name!r}")
