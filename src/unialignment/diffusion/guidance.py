"""Classifier-free guidance on text and, separately, on source pictures. Pure arithmetic on predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from unialignment.errors import InputError

Branch = Literal["full", "no_text", "no_image", "nothing"]
"""Which conditions a pass sees: all; the pictures but the negative (or empty) prompt; the prompt alone; neither."""
WITH_PROMPT: tuple[Branch, ...] = ("full", "no_image")
WITH_PICTURES: tuple[Branch, ...] = ("full", "no_text")


@dataclass(frozen=True)
class Guidance:
    """Guidance settings.

    Attributes:
        text_scale: How far to go from the negative prompt to the prompt; 1: no guidance.
        image_scale: How far to go from no source pictures to the sources; 1: no guidance. Ignored without sources.
        interval: ``(low, high)`` in σ: guidance applies for low <= σ <= high only (arXiv 2404.07724).
        reads: Whether the target is a text about the pictures. The pictures are then guided towards with the prompt
            kept: what an answer would be to the question alone is what has to be moved away from (contrastive
            decoding, Leng et al., arXiv 2311.16922).

    Raises:
        InputError: a scale is negative or the interval isn't ordered within 0-1.
    """

    text_scale: float = 1.0
    image_scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    reads: bool = False

    def __post_init__(self) -> None:
        if self.text_scale < 0 or self.image_scale < 0:
            raise InputError(
                f"guidance scales must not be negative, got {self.text_scale} and {self.image_scale}: "
                "1 means no guidance."
            )
        if not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise InputError(f"guidance interval {self.interval} must be 0 <= low <= high <= 1 (noise levels).")

    def branches(self, has_sources: bool, sigma: float | None = None) -> tuple[Branch, ...]:
        """Passes needed at noise level ``sigma`` (``None``: anywhere), the fully conditioned one first."""
        if sigma is not None and not self.interval[0] <= sigma <= self.interval[1]:
            return ("full",)
        text = self.text_scale != 1.0
        image = has_sources and self.image_scale != 1.0
        # With equal scales the middle branch cancels out of the formula below.
        if text and image and self.text_scale == self.image_scale:
            return ("full", "nothing")
        if image and self.reads:
            return ("full", "no_image", "nothing") if text else ("full", "no_image")
        if image:
            return ("full", "no_text", "nothing")
        return ("full", "no_text") if text else ("full",)

    def combine(self, predictions: dict[Branch, Tensor]) -> Tensor:
        """InstructPix2Pix's combination (arXiv 2211.09800, equation 3) of the passes :meth:`branches` named.

        v = v_nothing + s_image·(v_no_text − v_nothing) + s_text·(v_full − v_no_text)

        Where texts are read from pictures the other way round:
        v = v_nothing + s_text·(v_no_image − v_nothing) + s_image·(v_full − v_no_image)
        """
        full = predictions["full"]
        if len(predictions) == 1:
            return full
        if "no_image" in predictions:
            no_image = predictions["no_image"]
            guided = no_image + self.image_scale * (full - no_image)
            if "nothing" in predictions:
                guided = guided + (self.text_scale - 1.0) * (no_image - predictions["nothing"])
            return guided
        if "no_text" not in predictions:
            return predictions["nothing"] + self.text_scale * (full - predictions["nothing"])
        no_text = predictions["no_text"]
        guided = no_text + self.text_scale * (full - no_text)
        if "nothing" in predictions:
            nothing = predictions["nothing"]
            guided = guided + (self.image_scale - 1.0) * (no_text - nothing)
        return guided
