"""What a user may write, turned into plain requests: one condition each, checked before any computation.

Options are validated and merged with the task's and the model's defaults here. Knows nothing of tensors or models.
"""

from __future__ import annotations

import difflib
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np

from unialignment.errors import InputError
from unialignment.images import ImageInput
from unialignment.tasks import Task

Prompts = str | Sequence[str] | None
Images = ImageInput | Sequence[ImageInput] | Sequence[Sequence[ImageInput]] | None
Seed = int | Sequence[int] | None
StepCallback = Callable[[Any, int, float, dict[str, Any]], dict[str, Any] | None]
"""``(pipe, step, timestep, tensors) -> replaced tensors or None``, as in diffusers."""

MAX_CHARACTERS = 100_000
_GAP = re.compile(r"_{3,}")


class CommonOptions(TypedDict, total=False):
    """Options of every task.

    Attributes:
        seed: An integer for all inputs, or one for each. ``None``: a new one, reported in the result.
        num_inference_steps: Denoising steps; for texts an upper bound.
        guidance_scale: Pull towards the condition text; 1 is none.
        image_guidance_scale: Pull towards the condition pictures; 1 is none. For texts: away from what would be written
            without the pictures.
        negative_prompt: What to move away from, instead of the empty prompt; one, or one for each input.
        batch_size: Samples computed at once; results don't depend on it.
        callback_on_step_end: Called after every step as ``callback(pipe, step, timestep, tensors)``; ``tensors`` holds
            ``latents`` or ``ids``, and ``indices`` (which samples they are). A returned ``latents`` replaces the old.
        progress: Show a bar; ``None``: if standard error is a terminal.
        use_cache: Encode conditions once (``prefix`` models); switching it off gives the same result, slower.
        fit: How pictures of another shape are fitted: ``"crop"`` to their middle, or ``"pad"`` with ``background``;
            edited pictures and maps then have the padding cut off again.
        background: 8-bit RGB colour for transparent and padded parts of pictures; white unless given.
    """

    seed: Seed
    num_inference_steps: int | None
    guidance_scale: float | None
    image_guidance_scale: float | None
    negative_prompt: Prompts
    batch_size: int | None
    callback_on_step_end: StepCallback | None
    progress: bool | None
    use_cache: bool
    fit: Literal["crop", "pad"]
    background: tuple[int, int, int]


class ImageOptions(CommonOptions, total=False):
    """Options of tasks that draw a picture, besides :class:`CommonOptions`.

    Attributes:
        num_images_per_prompt: Pictures for each input; picture i has seed ``seed + i``.
        best_of: Draw this many for each input and keep the ``num_images_per_prompt`` most similar to the prompt.
        rewrite: Have the model say each prompt in its own words first (task ``rewrite``), anew for each seed: what the
            prompt leaves open, like places, is then decided before a picture is drawn. Only without condition pictures.
        best_of_text: Compare with this text instead, one or one for each input: for edits, whose prompt is an
            instruction, what the result should show.
        guidance_interval: ``(low, high)`` noise levels in 0–1 between which guidance applies.
        solver: ``"euler"``, ``"heun"``, ``"dpmpp"`` or ``"stochastic"``.
        shift: Resolution shift of the noise levels; 1 is none.
        width: Pixels; the model's own size unless given.
        height: Pixels.
    """

    num_images_per_prompt: int
    rewrite: bool
    best_of: int | None
    best_of_text: Prompts
    guidance_interval: tuple[float, float] | None
    solver: str | None
    shift: float | None
    width: int | None
    height: int | None


class TextOptions(CommonOptions, total=False):
    """Options of tasks that write a text, besides :class:`CommonOptions`.

    Attributes:
        max_length: Tokens of the text.
        temperature: 0 takes the likeliest tokens; above, they are sampled.
        top_p: Sample from the smallest set of tokens of this probability.
        decoding: ``"confidence"`` or ``"ancestral"``.
        confidence_threshold: Write all words at once that the model is at least this sure of; fewer steps. 1: off.
    """

    max_length: int | None
    temperature: float | None
    top_p: float | None
    decoding: str | None
    confidence_threshold: float | None


_DEFAULTS: dict[str, dict[str, Any]] = {
    "image": {
        "num_inference_steps": 20,
        "guidance_scale": 1.0,
        "image_guidance_scale": 1.0,
        "guidance_interval": (0.0, 1.0),
        "num_images_per_prompt": 1,
        "rewrite": False,
        "best_of": None,
        "best_of_text": None,
        "solver": "euler",
        "shift": 1.0,
        "width": None,
        "height": None,
    },
    "text": {
        "num_inference_steps": 16,
        "guidance_scale": 1.0,
        "image_guidance_scale": 1.0,
        "max_length": None,
        "temperature": 0.0,
        "top_p": 1.0,
        "decoding": "confidence",
        "confidence_threshold": 1.0,
    },
}
_COMMON: dict[str, Any] = {
    "seed": None,
    "negative_prompt": None,
    "batch_size": None,
    "callback_on_step_end": None,
    "progress": None,
    "use_cache": True,
    "fit": "crop",
    "background": (255, 255, 255),
}
_COUNTS = ("num_inference_steps", "num_images_per_prompt", "best_of", "batch_size", "max_length", "width", "height")
_NUMBERS = ("guidance_scale", "image_guidance_scale", "shift", "temperature", "top_p", "confidence_threshold")


def merge_options(task: Task, model_defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Options in force: the given ones over the model's for this task over the task's over general ones.

    Raises:
        InputError: An option is unknown for the task's kind of target, or has an unusable value.
    """
    known = {**_COMMON, **_DEFAULTS[task.target]}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise InputError(f"{task.name} has no option {name!r}; {hint}")
    merged = dict(known)
    for source in (task.sampling, model_defaults, given):
        merged.update({name: value for name, value in source.items() if name in known and value is not None})
    for name in _COUNTS:
        value = merged.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1):
            raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
    for name in _NUMBERS:
        value = merged.get(name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not np.isfinite(value)
        ):
            raise InputError(f"{name} must be a finite number, got {value!r}")
    if not isinstance(merged.get("rewrite", False), bool):
        raise InputError(f"rewrite must be True or False, got {merged['rewrite']!r}")
    if merged.get("rewrite") and task.max_sources:
        raise InputError(f"rewrite works for prompts alone, and {task.name} has pictures beside them; leave it out")
    best_of = merged.get("best_of")
    if best_of is not None and 1 < best_of < merged["num_images_per_prompt"]:
        raise InputError(
            f"best_of={best_of} must be at least num_images_per_prompt={merged['num_images_per_prompt']}: "
            "it says how many are drawn, of which that many are kept"
        )
    if merged.get("best_of_text") is not None and (best_of or 1) < 2:
        raise InputError("best_of_text says what best_of compares pictures with; give best_of=2 or more too")
    return merged


@dataclass(frozen=True)
class Request:
    """One input of a task, checked.

    Attributes:
        prompt: What the user wrote; ``""`` if nothing.
        text: Condition text that the model sees.
        negative: Condition text of the unguided branch.
        given: Target text with gaps, for tasks that fill them; else ``None``.
        sources: Condition pictures, as given.
    """

    prompt: str
    text: str
    negative: str
    given: str | None
    sources: tuple[ImageInput, ...]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def _as_prompts(value: Prompts, name: str) -> list[str | None]:
    items = list(value) if value is not None and not isinstance(value, str) and _is_list(value) else [value]
    for item in items:
        if item is not None and not isinstance(item, str):
            raise InputError(f"expected {name} to be a text or a list of texts, got {type(item).__name__}")
        if item is not None and len(item) > MAX_CHARACTERS:
            raise InputError(f"{name} has {len(item):,} characters, more than {MAX_CHARACTERS:,}; shorten it")
        if item is not None and any("\ud800" <= character <= "\udfff" for character in item):
            raise InputError(f"{name} holds half a Unicode character (a lone surrogate); check its encoding")
    if not items:
        raise InputError(f"expected at least one {name}, got an empty list")
    return items  # type: ignore[return-value]


def _as_sources(task: Task, images: Images) -> list[tuple[ImageInput, ...]]:
    if images is None:
        return [()]
    if not _is_list(images):
        return [(images,)]  # type: ignore[list-item]
    items: list[Any] = list(images)  # type: ignore[arg-type]
    if not items:
        raise InputError(f"{task.name}: expected at least one picture, got an empty list")
    if any(_is_list(item) for item in items):
        if not all(_is_list(item) for item in items):
            raise InputError(f"{task.name}: give either a list of pictures or a list of lists, not a mixture")
        return [tuple(item) for item in items]
    # A flat list is one input's references where several are allowed, and several inputs where only one is.
    return [tuple(items)] if task.max_sources > 1 else [(item,) for item in items]


def build_requests(task: Task, prompt: Prompts, images: Images, kind: str | None, negative: Prompts) -> list[Request]:
    """Check and pair prompts and pictures; a single one is shared by all of the other.

    With ``kind=None`` a prompt is the whole condition text, past the task's template.

    Raises:
        InputError: Something is missing, empty, of the wrong type, or their numbers differ.
    """
    prompts, sources, negatives = (
        _as_prompts(prompt, "prompt"),
        _as_sources(task, images),
        _as_prompts(negative, "negative_prompt"),
    )
    count = max(len(prompts), len(sources))
    if len(prompts) not in (1, count) or len(sources) not in (1, count):
        raise InputError(
            f"{task.name}: {len(prompts)} texts and {len(sources)} pictures don't pair up; give as many of each, or one"
        )
    if len(negatives) not in (1, count):
        raise InputError(f"{task.name}: {len(negatives)} negative prompts for {count} inputs; give as many, or one")
    return [
        _request(
            task,
            prompts[index % len(prompts)],
            sources[index % len(sources)],
            kind,
            " ".join((negatives[index % len(negatives)] or "").split()),
        )
        for index in range(count)
    ]


def _request(
    task: Task, prompt: str | None, sources: tuple[ImageInput, ...], kind: str | None, negative: str
) -> Request:
    task.check_sources(len(sources))
    if prompt is not None and not prompt.strip():
        raise InputError(f"{task.name}: the prompt is empty; write what you want")
    if kind is None and not task.gaps:
        if not prompt and task.prompt == "required":
            raise InputError(f"{task.name}: give a kind ({', '.join(task.kinds)}), or a prompt that says all")
        return Request(prompt or "", " ".join((prompt or "").split()), negative, None, sources)
    if not task.gaps:
        return Request(prompt or "", task.condition_text(prompt or "", kind or ""), negative, None, sources)
    if prompt is None:
        raise InputError(f"{task.name}: give a text with gaps, written [MASK] or ___")
    given = _GAP.sub("[MASK]", prompt)
    if "[MASK]" not in given:
        raise InputError(f"{task.name}: the text has no gap; write [MASK] or ___ for each missing word")
    # Whether the text with gaps is a condition too, or only the canvas that is written on, is the template's to say.
    shown = given if "{prompt}" in task.templates.get(kind or task.kinds[0], "") else ""
    return Request(prompt, task.condition_text(shown, kind or ""), negative, given, sources)


def expand_seeds(seed: Seed, count: int, each: int) -> list[list[int]]:
    """Seeds of ``each`` samples for each of ``count`` inputs.

    Sample i of an input has the input's seed plus i, so that neither the batch nor the other inputs matter. A list
    gives one seed for each input, or one for each sample.

    Raises:
        InputError: Not integers of 0 … 2**63 − 1, or a list of another length.
    """
    if seed is None:
        starts = [secrets.randbelow(2**31) for _ in range(count)]
    elif isinstance(seed, (list, tuple)):
        if len(seed) not in (count, count * each):
            raise InputError(
                f"{len(seed)} seeds for {count} inputs with {each} samples; give one, {count} or {count * each}"
            )
        starts = list(seed)
    else:
        starts = [seed] * count  # type: ignore[list-item]
    for value in starts:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < 2**63 - 2**20:
            raise InputError(f"a seed must be a whole number from 0 to about 9.2e18, got {value!r}")
    if len(starts) == count * each and each > 1:
        return [[int(value) for value in starts[i * each : (i + 1) * each]] for i in range(count)]
    return [[int(value) + i for i in range(each)] for value in starts]
