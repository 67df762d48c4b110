"""The two paths of the pipeline: drawing pictures and writing texts, for any task, in micro-batches.

What differs between tasks is read from their declarations. Knows nothing of how models are loaded or results are saved.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unialignment.conditioning import Condition, Denoiser
from unialignment.diffusion import Guidance, MaskedPath, SeededNoise, TextDecoding, decode, sigma_schedule, solve
from unialignment.diffusion.guidance import WITH_PICTURES, WITH_PROMPT, Branch
from unialignment.diffusion.solvers import SOLVERS
from unialignment.errors import InputError
from unialignment.images import ImageInput, fit_image, load_image
from unialignment.inputs import Images, Prompts, Request, build_requests, expand_seeds, merge_options
from unialignment.outputs import ImageResult, TextResult
from unialignment.reranking import Reranker
from unialignment.tasks import Task

if TYPE_CHECKING:
    from unialignment.pipeline import UniAlignmentPipeline

TOKENS_AT_ONCE = 16_384
"""Target tokens in flight, guidance branches included, from which the default ``batch_size`` follows."""
_SETTINGS = ("num_inference_steps", "guidance_scale", "image_guidance_scale", "negative_prompt", "fit")
IMAGE_SETTINGS = (*_SETTINGS, "guidance_interval", "solver", "shift", "rewrite", "best_of", "best_of_text")
TEXT_SETTINGS = (*_SETTINGS, "temperature", "top_p", "decoding", "confidence_threshold")


@torch.no_grad()
def draw(
    pipe: UniAlignmentPipeline,
    task: Task,
    prompt: Prompts,
    images: Images,
    kind: str | None,
    given: Mapping[str, Any],
) -> ImageResult:
    """Run a task whose target is a picture.

    Args:
        pipe: The model.
        task: Its declaration.
        prompt: One or a list.
        images: One, a list, or a list of lists.
        kind: See :func:`~unialignment.inputs.build_requests`.
        given: The user's options, :class:`~unialignment.inputs.ImageOptions`.

    Raises:
        InputError: An input or an option is unusable.
    """
    options, requests = _prepare(pipe, task, prompt, images, kind, given)
    keep = options["num_images_per_prompt"]
    ranked = (options["best_of"] or 1) > 1
    drawn = max(keep, options["best_of"] or 1)
    guidance = Guidance(
        options["guidance_scale"], options["image_guidance_scale"], noise_interval(options["guidance_interval"])
    )
    if options["solver"] not in SOLVERS:
        raise InputError(f"solver must be one of {', '.join(SOLVERS)}, got {options['solver']!r}")
    compared = compared_texts(task, requests, options["best_of_text"]) if ranked else []
    sigmas = sigma_schedule(options["num_inference_steps"], options["shift"])
    width, height = picture_size(pipe, options["width"], options["height"])
    seeds = expand_seeds(options["seed"], len(requests), drawn)
    sources = Sources(pipe, requests, width, height, options)
    samples = [(row, seed) for row, row_seeds in enumerate(seeds) for seed in row_seeds]
    shown = [requests[row] for row, _ in samples]
    rewrites = options["rewrite"] and any(request.text for request in requests)
    if rewrites:
        shown = rewritten(pipe, shown, [seed for _, seed in samples], options)
    factor = pipe.autoencoder.spatial_factor
    shape = (pipe.transformer.config.in_channels, height // factor, width // factor)
    tokens = shape[1] * shape[2] // pipe.transformer.config.patch_size**2 * len(guidance.branches(True))
    ranking = Reranker(pipe, compared, drawn) if ranked else None
    pictures: dict[int, Image.Image] = {}
    groups = _groups([len(requests[row].sources) for row, _ in samples], options["batch_size"], tokens)
    with _bar(pipe, task, len(groups), options) as bar:
        for indices in groups:
            rows = [samples[index][0] for index in indices]
            chosen = [shown[index] for index in indices]
            pictured = [sources.pictures[row] for row in rows]
            denoiser = _denoiser(pipe, chosen, pictured, guidance, options["use_cache"])
            denoiser.plan(sigmas[:-1])
            velocity = _guided_velocity(denoiser, guidance, bool(chosen[0].sources))
            fresh = SeededNoise([samples[index][1] for index in indices], shape)
            hook = _step_hook(pipe, options["callback_on_step_end"], indices, sigmas, bar)
            latents = solve(velocity, fresh().to(pipe.device), sigmas, options["solver"], hook, fresh)
            for index, row, picture in zip(indices, rows, pipe.decode_latents(latents), strict=True):
                pictures[index] = picture.crop(sources.content(row)) if task.size_from_source else picture
            if ranking is not None:
                ranking.see(indices, latents)
    kept = list(range(len(samples))) if ranking is None else ranking.best(keep)
    return ImageResult(
        images=[pictures[index] for index in kept],
        seeds=[samples[index][1] for index in kept],
        prompts=[requests[samples[index][0]].prompt for index in kept],
        task=task.name,
        model=pipe.name,
        settings={**kind_setting(kind), "width": width, "height": height, **plain_settings(options, IMAGE_SETTINGS)},
        scores=None if ranking is None else [float(ranking.scores[index]) for index in kept],
        revised_prompts=[shown[index].text for index in kept] if rewrites else None,
    )


@torch.no_grad()
def write(
    pipe: UniAlignmentPipeline,
    task: Task,
    prompt: Prompts,
    images: Images,
    kind: str | None,
    given: Mapping[str, Any],
) -> TextResult:
    """Run a task whose target is a text.

    Arguments as for :func:`draw`, with the options of :class:`~unialignment.inputs.TextOptions`.

    Raises:
        InputError: An input or an option is unusable.
    """
    options, requests = _prepare(pipe, task, prompt, images, kind, given)
    guidance = Guidance(options["guidance_scale"], options["image_guidance_scale"], reads=True)
    steps = options["num_inference_steps"]
    decoding = TextDecoding(
        options["decoding"], steps, options["temperature"], options["top_p"], options["confidence_threshold"]
    )
    length = options["max_length"] or task.target_length
    if length > pipe.text_limit:
        raise InputError(f"max_length must be at most {pipe.text_limit} tokens for this model, got {length}")
    seeds = [row[0] for row in expand_seeds(options["seed"], len(requests), 1)]
    sources = Sources(pipe, requests, pipe.default_size, pipe.default_size, options)
    path = MaskedPath(pipe.tokenizer.mask_token_id)
    end = pipe.tokenizer.pad_token_id if pipe.tokenizer.eos_token_id is None else pipe.tokenizer.eos_token_id
    texts: dict[int, str] = {}
    canvases = [text_canvas(pipe, request, length, fixed=options["max_length"] is not None) for request in requests]
    questions = [question_ids(pipe, request) for request in requests]
    beside = not pipe.tokenizer.question_first
    if not beside and guidance.text_scale != 1.0:
        raise InputError(
            f"{pipe.name} reads questions as part of the text it writes, which nothing can be guided away "
            "from; leave guidance_scale at 1"
        )
    canvases = [torch.cat(parts) for parts in zip(questions, canvases, strict=True)]
    shapes = [(len(request.sources), len(canvas)) for request, canvas in zip(requests, canvases, strict=True)]
    groups = _groups(shapes, options["batch_size"], length)
    with _bar(pipe, task, len(groups), options) as bar:
        for rows in groups:
            chosen, pictured = [requests[row] for row in rows], [sources.pictures[row] for row in rows]
            denoiser = _denoiser(pipe, chosen, pictured, guidance, options["use_cache"], texts=beside)
            branches = guidance.branches(bool(requests[rows[0]].sources))
            # A gap is a missing word, never the end of the text.
            logits = _guided_logits(pipe, denoiser, guidance, branches, end if task.gaps else None)
            ids = torch.stack([canvases[row] for row in rows]).to(pipe.device)
            hook = _TextHook(pipe, options["callback_on_step_end"], rows, steps, bar)
            own = [seeds[row] for row in rows]
            filled = decode(logits, ids, path, decoding, own, None if task.gaps else end, hook)
            bar.update(hook.rest())
            written = [row_ids[len(questions[row]) :] for row, row_ids in zip(rows, filled.tolist(), strict=True)]
            texts.update(zip(rows, pipe.tokenizer.decode(written), strict=True))
    return TextResult(
        texts=[texts[row] for row in range(len(requests))],
        seeds=seeds,
        prompts=[request.prompt for request in requests],
        task=task.name,
        model=pipe.name,
        settings={**kind_setting(kind), "max_length": length, **plain_settings(options, TEXT_SETTINGS)},
    )


def rewritten(
    pipe: UniAlignmentPipeline, requests: Sequence[Request], seeds: Sequence[int], options: Mapping[str, Any]
) -> list[Request]:
    """The requests with condition texts as the model words them, each by its own seed; those without a prompt as are.

    Args:
        pipe: The model.
        requests: One for each sample.
        seeds: Theirs.
        options: Of the drawing; ``batch_size``, ``use_cache`` and ``progress`` hold for this as well.

    Raises:
        InputError: a prompt is too long, or the model can't hold text encoder and transformer at once.
    """
    asked = [index for index, request in enumerate(requests) if request.text]
    result = list(requests)
    own = {name: options[name] for name in ("batch_size", "use_cache", "progress")}
    texts = [requests[index].text for index in asked]
    # A prompt is worded again for each of its pictures, which differ in what it leaves open.
    said = pipe.rewrite(texts, seed=[seeds[index] for index in asked], **own)
    for index, text in zip(asked, said.texts, strict=True):
        result[index] = replace(requests[index], text=text or requests[index].text)
    return result


# --------------------------------------------------------------------------------------------------- inputs and results


def _prepare(
    pipe: UniAlignmentPipeline,
    task: Task,
    prompt: Prompts,
    images: Images,
    kind: str | None,
    given: Mapping[str, Any],
) -> tuple[dict[str, Any], list[Request]]:
    options = merge_options(task, pipe.sampling.get(task.name, {}), given)
    requests = build_requests(task, prompt, images, kind, options["negative_prompt"])
    for request in requests:
        pipe.check_length(request.text)
        pipe.check_length(request.negative)
    if options["batch_size"] is None:
        options["batch_size"] = pipe.batch_limit
    if task.target == "image" and not options["rewrite"]:
        texts = [text for request in requests for text in (request.text, request.negative)]
        if (options["best_of"] or 1) > 1:
            texts += ["", *compared_texts(task, requests, options["best_of_text"])]
        pipe.encode_ahead(texts)
    return options, requests


class Sources:
    """Condition pictures of all requests, loaded and fitted before any computation; each is decoded once."""

    def __init__(
        self,
        pipe: UniAlignmentPipeline,
        requests: Sequence[Request],
        width: int,
        height: int,
        options: Mapping[str, Any],
    ) -> None:
        self.width, self.height, self.fit = width, height, options["fit"]
        self._sizes: dict[int, tuple[int, int]] = {}
        loaded: dict[int, Image.Image] = {}  # by identity: one picture with many questions is decoded once

        def one(source: ImageInput) -> Image.Image:
            if id(source) not in loaded:
                image = load_image(source, allow_urls=pipe.allow_urls, background=options["background"])
                self._sizes[id(source)] = image.size
                loaded[id(source)] = fit_image(image, width, height, options["fit"], options["background"])
            return loaded[id(source)]

        self.pictures = [tuple(one(source) for source in request.sources) for request in requests]
        self._first = [self._sizes[id(request.sources[0])] if request.sources else None for request in requests]

    def content(self, row: int) -> tuple[int, int, int, int]:
        """The box that the first picture of a request fills: all of it, unless it was padded."""
        size = self._first[row]
        if size is None or self.fit == "crop":
            return 0, 0, self.width, self.height
        scale = min(self.width / size[0], self.height / size[1])
        width, height = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
        left, top = (self.width - width) // 2, (self.height - height) // 2
        return left, top, left + width, top + height


def picture_size(pipe: UniAlignmentPipeline, width: int | None, height: int | None) -> tuple[int, int]:
    """Width and height of the pictures drawn: those asked for, if the model can draw them, else its own."""
    patch = pipe.transformer.config.patch_size * pipe.autoencoder.spatial_factor
    largest = pipe.transformer.config.pos_embed_max_size * patch
    for name, value in (("width", width), ("height", height)):
        if value is not None and (value % patch or value > largest):
            raise InputError(f"{name} must be a multiple of {patch} up to {largest} for this model, got {value}")
    return width or pipe.default_size, height or pipe.default_size


def text_canvas(pipe: UniAlignmentPipeline, request: Request, length: int, fixed: bool) -> Tensor:
    """Target ids ``[L]``: masks where to write, given words elsewhere.

    L is ``length``, or what a longer given text needs unless ``fixed``. It must not depend on other requests.
    """
    if request.given is None:
        return torch.full((length,), pipe.tokenizer.mask_token_id)
    ids = pipe.tokenizer.encode([request.given], gaps=True)[0][0]
    limit = length if fixed else pipe.text_limit
    if len(ids) > limit:
        raise InputError(f"a text of {len(ids):,} tokens is too long, at most {limit} fit here; shorten it")
    missing = max(0, length - len(ids))
    return torch.nn.functional.pad(ids, (0, missing), value=pipe.tokenizer.pad_token_id)


def question_ids(pipe: UniAlignmentPipeline, request: Request) -> Tensor:
    """Ids ``[Q]`` that the target text begins with: the question, for models that read it so; else none."""
    if not request.text or not pipe.tokenizer.question_first:
        return torch.zeros(0, dtype=torch.long)
    return pipe.tokenizer.encode([request.text])[0][0]


def compared_texts(task: Task, requests: Sequence[Request], given: Prompts) -> list[str]:
    """What ``best_of`` compares the pictures of each request with: texts of the user's, or the prompts."""
    texts = [request.prompt for request in requests]
    if given is not None:
        texts = [given] * len(requests) if isinstance(given, str) else list(given)
        if len(texts) != len(requests):
            raise InputError(f"best_of_text: {len(texts)} texts for {len(requests)} inputs; give as many, or one")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(
            f"best_of compares pictures with their prompt, and {task.name} was given none; say what the pictures "
            "should show with best_of_text"
        )
    return texts


def noise_interval(value: Any) -> tuple[float, float]:
    """``guidance_interval`` as two numbers."""
    try:
        low, high = (float(number) for number in value)
    except (TypeError, ValueError) as error:
        raise InputError(f"guidance_interval must be two numbers (low, high) in 0–1, got {value!r}") from error
    return low, high


def kind_setting(kind: str | None) -> dict[str, Any]:
    """What a result's settings say of the kind: nothing where none was given."""
    return {} if kind == "" else {"kind": kind}


def plain_settings(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The options called ``names`` that are in force, as JSON can hold them."""
    plain = {name: options[name] for name in names if options[name] is not None}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


# ------------------------------------------------------------------------------------------------------- micro-batches


def chunks(items: Sequence[Any], size: int) -> Iterator[Any]:
    """Consecutive slices of at most ``size`` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _groups(shapes: Sequence[Hashable], batch_size: int | None, tokens: int) -> list[list[int]]:
    """Sample indices that are computed together: those of equal shape, ``batch_size`` at a time."""
    size = batch_size or max(1, min(64, TOKENS_AT_ONCE // max(tokens, 1)))
    by_shape: dict[Hashable, list[int]] = {}
    for index, shape in enumerate(shapes):
        by_shape.setdefault(shape, []).append(index)
    return [chunk for group in by_shape.values() for chunk in chunks(group, size)]


def _denoiser(
    pipe: UniAlignmentPipeline,
    requests: Sequence[Request],
    pictures: Sequence[tuple[Image.Image, ...]],
    guidance: Guidance,
    cached: bool,
    texts: bool = True,
) -> Denoiser:
    """The model as a function of target tokens, given a request and fitted pictures for each sample.

    Each distinct condition is encoded once.

    Samples of one prompt share its condition, and so do all samples of a branch that guides away from the same thing.
    Without ``texts``, pictures are the only conditions.
    """
    count = len(requests[0].sources)
    encoded = _latents(pipe, [picture for own in pictures for picture in own])
    conditions: dict[Branch, Condition] = {}
    index: dict[Branch, Tensor] = {}
    for branch in guidance.branches(count > 0):

        def identity(row: int, branch: Branch = branch) -> tuple[Hashable, ...]:
            prompt = requests[row].text if branch in WITH_PROMPT else requests[row].negative
            own = (id(picture) for picture in pictures[row]) if branch in WITH_PICTURES else ()
            return (prompt if texts else "", *own)

        keys = [identity(row) for row in range(len(requests))]
        unique = list(dict.fromkeys(keys))
        index[branch] = torch.tensor([unique.index(key) for key in keys], device=pipe.device)
        chosen = [keys.index(key) for key in unique]
        images = [
            torch.stack([encoded[id(pictures[row][number])] for row in chosen])
            for number in range(count if branch in WITH_PICTURES else 0)
        ]
        if texts:
            conditions[branch] = pipe.condition([str(key[0]) for key in unique], images)
        else:
            none = torch.zeros(len(chosen), 0, pipe.text_embedder.embedding_dim, device=pipe.device, dtype=pipe.dtype)
            conditions[branch] = Condition(
                none, none.new_zeros(none.shape[:2], dtype=torch.bool), tuple(image.to(pipe.dtype) for image in images)
            )
    pipe.transformer.fuse_projections()
    return Denoiser(pipe.transformer, conditions, index, cached, room=pipe.memory_choice is None)


def _latents(pipe: UniAlignmentPipeline, pictures: Sequence[Image.Image]) -> dict[int, Tensor]:
    """Latents ``[C, h, w]`` of each distinct picture, by identity."""
    unique = list({id(picture): picture for picture in pictures}.values())
    if not unique:
        return {}
    return {id(picture): latents for picture, latents in zip(unique, pipe.encode_images(unique), strict=True)}


def _guided_velocity(denoiser: Denoiser, guidance: Guidance, has_sources: bool) -> Callable[[Tensor, float], Tensor]:
    def velocity(x: Tensor, sigma: float) -> Tensor:
        return guidance.combine(denoiser.velocity(guidance.branches(has_sources, sigma), x, sigma))

    return velocity


def _guided_logits(
    pipe: UniAlignmentPipeline,
    denoiser: Denoiser,
    guidance: Guidance,
    branches: tuple[Branch, ...],
    excluded: int | None,
) -> Callable[[Tensor, Tensor], Tensor]:
    def logits(ids: Tensor, positions: Tensor) -> Tensor:
        # Finished texts are left out. The open positions' order stays: theirs are all in the rows that remain.
        rows = tuple(positions.any(1).nonzero().flatten().tolist())
        if len(rows) == len(ids):
            embeds = pipe.text_embedder.embed(ids).to(pipe.dtype)
            result = guidance.combine(denoiser.logits(branches, embeds, positions))
        else:
            kept = torch.tensor(rows, device=ids.device)
            embeds = pipe.text_embedder.embed(ids[kept]).to(pipe.dtype)
            result = guidance.combine(denoiser.logits(branches, embeds, positions[kept], rows))
        if excluded is not None:
            result[:, excluded] = -torch.inf
        return result

    return logits


# -------------------------------------------------------------------------------------------- progress and callbacks


def _bar(pipe: UniAlignmentPipeline, task: Task, groups: int, options: Mapping[str, Any]) -> Any:
    progress = options["progress"]
    shown = sys.stderr.isatty() if progress is None else progress
    total = groups * options["num_inference_steps"]
    return tqdm(**{"total": total, "desc": task.name, "leave": False, "disable": not shown, **pipe.progress_options})


def _step_hook(
    pipe: UniAlignmentPipeline, callback: Any, indices: list[int], sigmas: list[float], bar: Any
) -> Callable[[int, float, Tensor], Tensor | None]:
    def hook(step: int, sigma: float, x: Tensor) -> Tensor | None:
        bar.update(1)
        if callback is None:
            return None
        # As in diffusers, the timestep is the one that the step started from.
        replaced = callback(pipe, step, 1000.0 * sigmas[step], {"latents": x, "indices": indices})
        latents = replaced.get("latents") if isinstance(replaced, dict) else None
        if latents is None:
            return None
        if not isinstance(latents, Tensor) or latents.shape != x.shape:
            raise InputError(f"callback_on_step_end must return latents of shape {list(x.shape)}, or nothing")
        return latents.to(x)

    return hook


class _TextHook:
    """Counts decoding steps, which may end early, and hands the ids to the user's callback."""

    def __init__(self, pipe: UniAlignmentPipeline, callback: Any, rows: list[int], steps: int, bar: Any) -> None:
        self.pipe, self.callback, self.rows, self.steps, self.bar = pipe, callback, rows, steps, bar
        self.done = 0

    def __call__(self, step: int, ids: Tensor) -> None:
        self.bar.update(step + 1 - self.done)
        self.done = step + 1
        if self.callback is not None:
            time = 1000.0 * (1 - step / self.steps)
            self.callback(self.pipe, step, time, {"ids": ids, "indices": self.rows})

    def rest(self) -> int:
        """Steps that were not needed."""
        return self.steps - self.done
