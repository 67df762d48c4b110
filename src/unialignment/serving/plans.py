"""Requests turned into plans: everything checked, pictures decoded and fitted, nothing computed by the model yet.

Inputs, defaults and limits are the pipeline's own (``sampling`` and ``inputs``), so that the engine accepts and means
the same. Knows nothing of threads or of what else is being served.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from unialignment import sampling
from unialignment.diffusion import Guidance, MaskedPath, TextDecoding, sigma_schedule
from unialignment.diffusion.guidance import WITH_PROMPT, Branch
from unialignment.diffusion.solvers import SOLVERS
from unialignment.errors import InputError
from unialignment.images import fit_image, load_image
from unialignment.inputs import Request, build_requests, expand_seeds, merge_options
from unialignment.serving.requests import REFUSED_OPTIONS, EmbedRequest, EngineSettings, TaskRequest
from unialignment.tasks import Task

if TYPE_CHECKING:
    from unialignment.pipeline import UniAlignmentPipeline


@dataclass(frozen=True)
class Plan:
    """What a request needs.

    Attributes:
        task: Its declaration.
        prompt: What the user wrote.
        branches: Guidance branch → condition text, or ``None`` where the model sees no text.
        pictures: Condition pictures, decoded and fitted.
        guidance: How predictions of the branches are combined.
        seeds: One for each sample.
        settings: Settings in force, for the result.
        bytes: Estimate of the memory that it takes while computed.
    """

    task: Task
    prompt: str
    branches: Mapping[Branch, str | None]
    pictures: tuple[Image.Image, ...] = field(repr=False)
    guidance: Guidance
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    bytes: int

    @property
    def rows(self) -> int:
        """Rows that its samples take in forward passes."""
        return len(self.seeds) * len(self.branches)


@dataclass(frozen=True)
class ImagePlan(Plan):
    """A plan whose target is a picture.

    Attributes:
        shape: ``(C, H, W)`` of the latents.
        sigmas: Noise levels.
        solver: Its name.
        keep: How many of the samples are kept.
        compared: Text with which drawn pictures are compared; the most similar are kept, best first. ``None``: all are.
        content: Box of the drawn picture that is the result, where padding is cut off again.
        rewriting: What is written first: the prompt in the model's words, once for each seed. ``None``: nothing.
    """

    shape: tuple[int, int, int]
    sigmas: tuple[float, ...]
    solver: str
    keep: int
    compared: str | None
    content: tuple[int, int, int, int] | None
    rewriting: TextPlan | None


@dataclass(frozen=True)
class TextPlan(Plan):
    """A plan whose target is a text.

    Attributes:
        canvas: Ids ``[L]``: the question for models that read it so, then masks and given words.
        start: Where the text begins in the canvas.
        path: The diffusion.
        decoding: How to decode.
        end_id: Token that ends the text; ``None`` where gaps are filled.
        excluded: Token that must not be written.
    """

    canvas: Tensor = field(repr=False)
    start: int
    path: MaskedPath
    decoding: TextDecoding
    end_id: int | None
    excluded: int | None


@dataclass(frozen=True)
class EmbedPlan:
    """Texts and pictures to embed.

    Attributes:
        texts: Normalised and short enough.
        pictures: Decoded and fitted.
        bytes: Estimate of the memory that it takes while computed.
    """

    texts: tuple[str, ...]
    pictures: tuple[Image.Image, ...] = field(repr=False)
    bytes: int = 0


def make_plan(pipe: UniAlignmentPipeline, request: TaskRequest | EmbedRequest, limits: EngineSettings) -> Any:
    """Check a request; returns an :class:`ImagePlan`, :class:`TextPlan` or :class:`EmbedPlan`.

    Raises:
        InputError: Something is unusable or beyond a limit.
    """
    if isinstance(request, EmbedRequest):
        return _embed_plan(pipe, request, limits)
    for name in REFUSED_OPTIONS:
        if name in request.options:
            raise InputError(f"{name} is the engine's to decide; leave it out")
    task = pipe.tasks.get(request.task)
    task.check_sources(len(request.images))
    background = request.options.get("background") or (255, 255, 255)
    images = [
        load_image(image, allow_urls=pipe.allow_urls, max_pixels=limits.max_pixels, background=background)
        for image in request.images
    ]
    # Not the pipeline's own preparation, which may run the text encoder: only the engine's thread runs the model.
    options = merge_options(task, pipe.sampling.get(task.name, {}), request.options)
    given = [images] if images else None
    checked = build_requests(task, request.prompt, given, request.kind, options["negative_prompt"])
    for one in checked:
        pipe.check_length(one.text)
        pipe.check_length(one.negative)
    if len(checked) != 1:
        raise InputError(f"{task.name}: one prompt a request, got {len(checked)}")
    if options["num_inference_steps"] > limits.max_steps:
        raise InputError(f"num_inference_steps={options['num_inference_steps']} is more than {limits.max_steps} here")
    make = _image_plan if task.target == "image" else _text_plan
    plan = make(pipe, task, checked[0], request.kind, options, limits)
    return replace(plan, bytes=_estimate(pipe, plan))


def _image_plan(
    pipe: UniAlignmentPipeline,
    task: Task,
    request: Request,
    kind: str | None,
    options: Mapping[str, Any],
    limits: EngineSettings,
) -> ImagePlan:
    keep = options["num_images_per_prompt"]
    drawn = max(keep, options["best_of"] or 1)
    if drawn > limits.max_samples:
        raise InputError(f"{drawn} pictures are more than the {limits.max_samples} that one request may ask for here")
    if options["solver"] not in SOLVERS:
        raise InputError(f"solver must be one of {', '.join(SOLVERS)}, got {options['solver']!r}")
    compared = None
    if (options["best_of"] or 1) > 1:
        (compared,) = sampling.compared_texts(task, [request], options["best_of_text"])
        pipe.check_length(compared)
    guidance = Guidance(
        options["guidance_scale"],
        options["image_guidance_scale"],
        sampling.noise_interval(options["guidance_interval"]),
    )
    width, height = sampling.picture_size(pipe, options["width"], options["height"])
    sources = sampling.Sources(pipe, [request], width, height, options)
    factor = pipe.autoencoder.spatial_factor
    seeds = tuple(expand_seeds(options["seed"], 1, drawn)[0])
    settings = {"width": width, "height": height, **sampling.plain_settings(options, sampling.IMAGE_SETTINGS)}
    return ImagePlan(
        task=task,
        prompt=request.prompt,
        branches=_branches(guidance, request, texts=True),
        pictures=sources.pictures[0],
        guidance=guidance,
        seeds=seeds,
        settings={**sampling.kind_setting(kind), **settings},
        bytes=0,
        shape=(pipe.transformer.config.in_channels, height // factor, width // factor),
        sigmas=tuple(sigma_schedule(options["num_inference_steps"], options["shift"])),
        solver=options["solver"],
        keep=keep,
        compared=compared,
        content=sources.content(0) if task.size_from_source else None,
        rewriting=_rewriting(pipe, request, seeds, limits) if options["rewrite"] and request.text else None,
    )


def _rewriting(
    pipe: UniAlignmentPipeline, request: Request, seeds: tuple[int, ...], limits: EngineSettings
) -> TextPlan:
    task = pipe.tasks.get("rewrite")
    options = merge_options(task, pipe.sampling.get(task.name, {}), {})
    asked = Request(request.text, task.condition_text(request.text), "", None, ())
    plan = replace(_text_plan(pipe, task, asked, "", options, limits), seeds=seeds)
    return replace(plan, bytes=_estimate(pipe, plan))


def _text_plan(
    pipe: UniAlignmentPipeline,
    task: Task,
    request: Request,
    kind: str | None,
    options: Mapping[str, Any],
    limits: EngineSettings,
) -> TextPlan:
    guidance = Guidance(options["guidance_scale"], options["image_guidance_scale"], reads=True)
    length = options["max_length"] or task.target_length
    if length > pipe.text_limit:
        raise InputError(f"max_length must be at most {pipe.text_limit} tokens for this model, got {length}")
    beside = not pipe.tokenizer.question_first
    if not beside and guidance.text_scale != 1.0:
        raise InputError(
            f"{pipe.name} reads questions as part of the text it writes, which nothing can be guided away "
            "from; leave guidance_scale at 1"
        )
    sources = sampling.Sources(pipe, [request], pipe.default_size, pipe.default_size, options)
    question = sampling.question_ids(pipe, request)
    canvas = sampling.text_canvas(pipe, request, length, fixed=options["max_length"] is not None)
    tokenizer = pipe.tokenizer
    end = tokenizer.pad_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    return TextPlan(
        task=task,
        prompt=request.prompt,
        branches=_branches(guidance, request, texts=beside),
        pictures=sources.pictures[0],
        guidance=guidance,
        seeds=(expand_seeds(options["seed"], 1, 1)[0][0],),
        settings={
            **sampling.kind_setting(kind),
            "max_length": length,
            **sampling.plain_settings(options, sampling.TEXT_SETTINGS),
        },
        bytes=0,
        canvas=torch.cat([question, canvas]),
        start=len(question),
        path=MaskedPath(tokenizer.mask_token_id),
        decoding=TextDecoding(
            options["decoding"],
            options["num_inference_steps"],
            options["temperature"],
            options["top_p"],
            options["confidence_threshold"],
        ),
        end_id=None if task.gaps else end,
        excluded=end if task.gaps else None,
    )


def _branches(guidance: Guidance, request: Request, texts: bool) -> dict[Branch, str | None]:
    return {
        branch: (request.text if branch in WITH_PROMPT else request.negative) if texts else None
        for branch in guidance.branches(bool(request.sources))
    }


def _embed_plan(pipe: UniAlignmentPipeline, request: EmbedRequest, limits: EngineSettings) -> EmbedPlan:
    count = len(request.texts) + len(request.images)
    if not 1 <= count <= limits.max_embeddings:
        raise InputError(f"expected 1 to {limits.max_embeddings} texts and pictures to embed, got {count}")
    texts = []
    if request.texts:
        checked = build_requests(Task("embed", "embed", "image"), list(request.texts), None, "", None)
        for one in checked:
            pipe.check_length(one.text)
        texts = [one.text for one in checked]
    side = pipe.default_size
    pictures = [
        fit_image(load_image(image, allow_urls=pipe.allow_urls, max_pixels=limits.max_pixels), side, side)
        for image in request.images
    ]
    return EmbedPlan(tuple(texts), tuple(pictures), count * side * side * 256)


def _estimate(pipe: UniAlignmentPipeline, plan: Plan) -> int:
    """Bytes of condition caches and activations, generously."""
    config = pipe.transformer.config
    dim = config.num_attention_heads * config.attention_head_dim
    size = torch.finfo(pipe.dtype).bits // 8
    patch = config.patch_size * pipe.autoencoder.spatial_factor
    pictures = sum((one.width // patch) * (one.height // patch) for one in plan.pictures)
    words = max((len(text or "") for text in plan.branches.values()), default=0) // 2 + 2
    condition = pictures + (pipe.tokenizer.prompt_length or min(words, pipe.text_limit + 1))
    if isinstance(plan, ImagePlan):
        target = plan.shape[1] * plan.shape[2] // config.patch_size**2
        heads = 0
        pixels = len(plan.seeds) * plan.shape[1] * plan.shape[2] * pipe.autoencoder.spatial_factor**2
    else:
        assert isinstance(plan, TextPlan)
        target, pixels = len(plan.canvas), 0
        heads = target * config.vocab_size * 4 * 3
    # Twice: each condition's own, and its copy in the joined batch.
    rewritten = isinstance(plan, ImagePlan) and plan.rewriting is not None
    # Each picture has its own condition text where prompts are rewritten.
    branches = len(plan.branches) + (len(plan.seeds) - 1 if rewritten else 0)
    caches = 2 * 2 * config.num_layers * dim * condition * size * branches
    width = dim * (8 + 2 * config.mlp_ratio) * size
    passes = plan.rows * (target * width + heads) + branches * condition * width
    written = plan.rewriting.bytes if isinstance(plan, ImagePlan) and plan.rewriting is not None else 0
    return written + int(caches + passes + pixels * 4 * 128 + sum(one.width * one.height * 16 for one in plan.pictures))
