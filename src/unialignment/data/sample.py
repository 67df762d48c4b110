"""One training or evaluation example of any task, as plain data. Knows nothing of models, files or tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
"""A picture ``[H, W, 3]``, 8-bit sRGB."""


@dataclass(frozen=True)
class Sample:
    """Conditions and target of one example (DESIGN section 1).

    Attributes:
        task: Task name in the registry, e.g. ``"edit"``.
        prompt: Condition text: prompt, instruction or question. Empty when the task has none.
        sources: Clean condition pictures, in the order in which the prompt refers to them.
        target_image: Picture to produce, for tasks with image targets.
        target_text: Text to produce, for tasks with text targets.
        kind: Finer label for reporting, e.g. ``"count"`` for a question or ``"depth"`` for a map.
        pair_id: Equal for samples that show the same picture with the same caption, so that the contrastive
            loss can pair a text seen as condition with an image seen as condition. ``None``: not paired.
        given: Parts of ``target_text``, from one character to another, that are shown in training and not learned.
        meta: Facts for judging (scenes, accepted answers); never shown to a model.
    """

    task: str
    prompt: str = ""
    sources: tuple[Image, ...] = ()
    target_image: Image | None = None
    target_text: str | None = None
    kind: str = ""
    pair_id: int | None = None
    given: tuple[tuple[int, int], ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
