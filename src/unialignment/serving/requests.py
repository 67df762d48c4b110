"""What is asked of the engine and what it says back: plain data, and the errors of serving.

Knows nothing of threads, models or HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from PIL import Image
from torch import Tensor

from unialignment.errors import UniAlignmentError
from unialignment.images import ImageInput
from unialignment.outputs import ImageResult, TextResult

REFUSED_OPTIONS = ("batch_size", "callback_on_step_end", "progress", "use_cache")
"""Pipeline options that make no sense here: the engine decides on batches, and events take the callback's place."""


class ServingError(UniAlignmentError):
    """A request could not be served for a reason that is not its content."""


class QueueFullError(ServingError):
    """Too much is waiting already; try again after ``retry_after`` seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(ServingError, TimeoutError):
    """The request's deadline passed before it was done."""


class RequestCancelledError(ServingError):
    """The request was cancelled by :meth:`Handle.cancel`."""


class EngineClosedError(ServingError):
    """The engine is shutting down, or its thread has died."""


@dataclass(frozen=True)
class TaskRequest:
    """One call of a task: one prompt, one set of condition pictures, one or several results.

    Attributes:
        task: Name in the pipeline's registry (``"generate"``, ``"caption"``, …).
        prompt: Condition text, or the text with gaps.
        images: Condition pictures: paths, bytes, PIL pictures or arrays.
        kind: One of the task's kinds; ``""``: its first; ``None``: the prompt is the whole condition text.
        options: As in :class:`~unialignment.inputs.ImageOptions` and :class:`~unialignment.inputs.TextOptions`
            (``seed``, ``num_inference_steps``, ``num_images_per_prompt``, …), less :data:`REFUSED_OPTIONS`.
        priority: Higher ones leave the queue first; equal ones in order of arrival.
        timeout: Seconds from submission after which it fails with :class:`DeadlineError`; ``None``: the engine's.
        previews: Previews wanted of each picture, evenly spaced over the steps; for texts any number above 0 asks for
            the text after every step.
    """

    task: str
    prompt: str | None = None
    images: tuple[ImageInput, ...] = ()
    kind: str | None = ""
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    priority: int = 0
    timeout: float | None = None
    previews: int = 0


@dataclass(frozen=True)
class EmbedRequest:
    """Vectors of texts and pictures, texts first.

    Attributes:
        texts: Any number.
        images: Any number of pictures, as for :class:`TaskRequest`.
        priority: See :class:`TaskRequest`.
        timeout: See :class:`TaskRequest`.
    """

    texts: tuple[str, ...] = ()
    images: tuple[ImageInput, ...] = ()
    priority: int = 0
    timeout: float | None = None


@dataclass(frozen=True)
class Progress:
    """A sample has done another step.

    Attributes:
        index: Which of the request's results.
        step: Steps done, 1 … ``steps``.
        steps: Of so many; a text may be done earlier.
    """

    index: int
    step: int
    steps: int

    @property
    def fraction(self) -> float:
        """0–1."""
        return self.step / self.steps


@dataclass(frozen=True)
class Preview(Progress):
    """The same with the picture that the model expects in the end.

    Attributes:
        image: RGB, of the result's size.
        number: 0, 1, … among the previews of this result.
    """

    image: Image.Image = field(repr=False, default_factory=lambda: Image.new("RGB", (1, 1)))
    number: int = 0


@dataclass(frozen=True)
class TextSoFar(Progress):
    """The same with the text as far as it is written.

    Attributes:
        text: All of it, ``[MASK]`` for each open position.
        settled: The beginning that can't change any more: what stands before the first open position, less a last word
            that may still grow. Only ever gets longer.
    """

    text: str = ""
    settled: str = ""


@dataclass(frozen=True)
class Done:
    """The last event of a request that went well.

    Attributes:
        result: What the pipeline would have returned: :class:`~unialignment.outputs.ImageResult`,
            :class:`~unialignment.outputs.TextResult`, or float32 ``[B, E]`` vectors.
        queued_seconds: From submission to the first step.
        seconds: From submission to the end.
    """

    result: ImageResult | TextResult | Tensor
    queued_seconds: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Failed:
    """The last event of a request that didn't.

    Attributes:
        error: A :class:`~unialignment.errors.UniAlignmentError` says what its user can do; anything else is a defect.
    """

    error: BaseException


Event = Progress | Preview | TextSoFar | Done | Failed


@dataclass(frozen=True)
class EngineSettings:
    """Limits of the engine.

    Attributes:
        max_queue: Requests that wait; further ones are refused with :class:`QueueFullError`.
        max_active: Requests computed at once.
        max_rows: Rows (samples × guidance branches) of one forward pass; up to four passes make a round. ``None``: 16
            on CPUs, where more gain nothing with nano, and 64 elsewhere.
        memory_bytes: What condition caches and activations of all active requests together may take; ``None``: a
            quarter of what is free when the engine starts.
        timeout: Seconds that a request without a deadline of its own may take, waiting included; ``None``: for ever.
        max_pixels: Largest width × height of a condition picture, judged before it is decoded.
        max_steps: Most denoising steps of a request.
        max_samples: Most results of one request.
        max_embeddings: Most texts and pictures of one embedding request.
    """

    max_queue: int = 64
    max_active: int = 64
    max_rows: int | None = None
    memory_bytes: int | None = None
    timeout: float | None = 300.0
    max_pixels: int = 25_000_000
    max_steps: int = 200
    max_samples: int = 16
    max_embeddings: int = 256


@dataclass(frozen=True)
class EngineStats:
    """What the engine is doing and has done.

    Attributes:
        alive: Whether its thread runs.
        queued: Requests waiting.
        active: Requests being computed.
        samples: Their samples.
        submitted: Requests accepted so far.
        completed: Of these, done.
        failed: Failed for other reasons than the next two.
        cancelled: Cancelled.
        expired: Failed by their deadline.
        refused: Requests not accepted because the queue was full.
        passes: Forward passes of the denoising network.
        rows: Rows in these passes; ``rows / passes`` is the mean batch.
        reserved_bytes: Memory reserved by active requests.
        memory_bytes: The limit of that.
        step_seconds: Mean duration of a round of steps, lately.
    """

    alive: bool
    queued: int
    active: int
    samples: int
    submitted: int
    completed: int
    failed: int
    cancelled: int
    expired: int
    refused: int
    passes: int
    rows: int
    reserved_bytes: int
    memory_bytes: int
    step_seconds: float
