"""``load()`` and :class:`UniAlignmentPipeline`: every task from Python, by one path for pictures and one for texts.

Which task is which is said by its declaration in ``tasks``; nothing here asks for a task by name except the methods
that users call. Knows nothing of training, files of pictures or servers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unialignment import __version__
from unialignment.conditioning import Condition, Denoiser
from unialignment.diffusion import Guidance, MaskedPath, TextDecoding, decode, seeded_normal, sigma_schedule, solve
from unialignment.diffusion.guidance import Branch
from unialignment.diffusion.solvers import SOLVERS
from unialignment.errors import CheckpointError, InputError
from unialignment.images import ImageInput, fit_image, load_image, to_images, to_tensor
from unialignment.inputs import (
    ImageOptions,
    Images,
    Prompts,
    Request,
    TextOptions,
    build_requests,
    expand_seeds,
    merge_options,
)
from unialignment.model.folders import load_folder, resolve_model, save_folder
from unialignment.model.transformer import UniAlignmentTransformer
from unialignment.outputs import ImageResult, TextResult
from unialignment.tasks import TASKS, Task, TaskRegistry
from unialignment.training.batching import encode_conditions

_COMPONENTS = ("transformer", "text_embedder", "autoencoder", "tokenizer")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENS_AT_ONCE = 16_384
"""Target tokens in flight, guidance branches included, from which the default ``batch_size`` follows."""
DEFAULT_TEXT_LIMIT = 512
_SETTINGS = ("num_inference_steps", "guidance_scale", "image_guidance_scale", "negative_prompt", "fit")
_IMAGE_SETTINGS = (*_SETTINGS, "guidance_interval", "solver", "shift", "best_of")
_TEXT_SETTINGS = (*_SETTINGS, "temperature", "top_p", "decoding")
"""Settings that are recorded with results."""


def load(
    name: str | Path = "nano",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    allow_urls: bool = False,
) -> UniAlignmentPipeline:
    """Load a model.

    Args:
        name: A packaged model (``"nano"``), a folder, or a hub id (``"owner/name"``).
        device: Where to compute; the best there is unless given.
        dtype: Arithmetic of the transformer, ``"float32"`` unless given. The autoencoder stays in float32.
        revision: Branch, tag or commit of a hub id.
        allow_urls: Whether pictures may be given as http(s) URLs.

    Raises:
        CheckpointError: There is no such model, or it is incomplete, damaged or unsafe.
        InputError: The device or dtype is unknown or not available.
    """
    return UniAlignmentPipeline.from_pretrained(
        name, device=device, dtype=dtype, revision=revision, allow_urls=allow_urls
    )


class UniAlignmentPipeline:
    """One model, all tasks.

    Every method takes single inputs or lists, and the options of :class:`~unialignment.inputs.ImageOptions` or
    :class:`~unialignment.inputs.TextOptions`. A sample's result depends on its inputs and its own seed only, not on its
    batch. A task that was registered later is called by its name as well: ``pipe.mytask(prompt, images)``.

    Args:
        transformer: The model.
        text_embedder: Token ids to vectors.
        autoencoder: Pictures to latents and back.
        tokenizer: Texts to token ids and back.
        name: Name for metadata.
        sampling: Task name → sampler defaults that suit this model, over the task's own.
        tasks: Registry to look tasks up in.
        allow_urls: Whether pictures may be given as http(s) URLs.

    Raises:
        CheckpointError: The components don't fit together.
    """

    def __init__(
        self,
        transformer: UniAlignmentTransformer,
        text_embedder: Any,
        autoencoder: Any,
        tokenizer: Any,
        *,
        name: str = "unnamed",
        sampling: Mapping[str, Mapping[str, Any]] | None = None,
        tasks: TaskRegistry = TASKS,
        allow_urls: bool = False,
    ) -> None:
        config = transformer.config
        for what, have, need in (
            ("the autoencoder's latent channels", autoencoder.latent_channels, config.in_channels),
            ("the text embedder's width", text_embedder.embedding_dim, config.joint_attention_dim),
            ("the tokenizer's vocabulary", tokenizer.vocab_size, config.vocab_size),
        ):
            if have != need:
                raise CheckpointError(
                    f"{what} ({have}) and the transformer's ({need}) differ; they belong to two models"
                )
        self.transformer = transformer.eval()
        self.text_embedder = text_embedder.eval()
        self.autoencoder = autoencoder.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.sampling: dict[str, dict[str, Any]] = {task: dict(values) for task, values in (sampling or {}).items()}
        self.tasks = tasks
        self.allow_urls = allow_urls
        self.text_limit = int(getattr(text_embedder, "max_length", DEFAULT_TEXT_LIMIT))
        self._progress_options: dict[str, Any] = {}

    # ------------------------------------------------------------------------------------------- loading and saving

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        allow_urls: bool = False,
    ) -> UniAlignmentPipeline:
        """Load a model; see :func:`load`."""
        target, arithmetic = _device(device), _dtype(dtype)
        components, index = load_folder(resolve_model(name, revision), _COMPONENTS)
        sampling = index.get("sampling") or {}
        if not isinstance(sampling, dict) or not all(isinstance(value, dict) for value in sampling.values()):
            raise CheckpointError("'sampling' in model_index.json must map task names to settings")
        pipe = cls(
            **components,
            name=str(index.get("name") or Path(str(name)).name),
            sampling=sampling,
            allow_urls=allow_urls,
        )
        return pipe.to(target, arithmetic)

    def save_pretrained(self, folder: str | Path, dtypes: Mapping[str, str] | None = None) -> None:
        """Write a model folder, atomically.

        Args:
            folder: Destination; a model that is there already is replaced as a whole.
            dtypes: Component name → ``"float32"`` (default), ``"float16"`` or ``"bfloat16"`` on disk.

        Raises:
            StorageError: It can't be written; nothing is left half-written.
        """
        save_folder(
            {name: getattr(self, name) for name in _COMPONENTS},
            folder,
            index={
                "_class_name": type(self).__name__,
                "_unialignment_version": __version__,
                "name": self.name,
                "sampling": self.sampling,
            },
            dtypes=dtypes,
        )

    def to(
        self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
    ) -> UniAlignmentPipeline:
        """Move to a device and/or change the arithmetic of transformer and text embedder; returns the pipeline."""
        if device is not None:
            target = _device(device)
            for module in (self.transformer, self.text_embedder, self.autoencoder):
                module.to(target)
        if dtype is not None:
            for module in (self.transformer, self.text_embedder):
                # Not their own `to`: diffusers' warns of float32 modules even where there are none.
                torch.nn.Module.to(module, _dtype(dtype))
        return self

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of the transformer."""
        return next(self.transformer.parameters()).dtype

    @property
    def default_size(self) -> int:
        """Side of the pictures that the model was trained on, in pixels."""
        return int(self.transformer.config.sample_size * self.autoencoder.spatial_factor)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options for ``tqdm`` in all later calls, e.g. ``disable=True``, as in diffusers."""
        self._progress_options = options

    # ---------------------------------------------------------------------------------------------------- the tasks

    def generate(self, prompt: Prompts, **options: Unpack[ImageOptions]) -> ImageResult:
        """Draw pictures from text; ``None`` as prompt draws whatever comes."""
        return self._images("generate", prompt, None, "", options)

    def edit(self, instruction: Prompts, image: Images, **options: Unpack[ImageOptions]) -> ImageResult:
        """Change pictures by instruction."""
        return self._images("edit", instruction, image, "", options)

    def perceive(
        self,
        image: Images,
        kind: str = "depth",
        of: Prompts = None,
        *,
        prompt: Prompts = None,
        **options: Unpack[ImageOptions],
    ) -> ImageResult:
        """Draw maps of pictures.

        ``kind`` is ``"depth"``, ``"edges"``, or ``"segment"`` with ``of="the dog"``. A ``prompt`` says all in own words
        instead ("mark the dog in white").
        """
        if prompt is not None:
            return self._images("perceive", prompt, image, None, options)
        return self._images("perceive", of, image, kind, options)

    def control(
        self, prompt: Prompts, image: Images, kind: str | None = None, **options: Unpack[ImageOptions]
    ) -> ImageResult:
        """Draw pictures that follow maps; ``kind`` says of which kind they are, unless the prompt does."""
        return self._images("control", prompt, image, kind, options)

    def compose(self, instruction: Prompts, images: Images, **options: Unpack[ImageOptions]) -> ImageResult:
        """Draw a new picture from several; ``images`` is the list of references, or one such list for each input."""
        return self._images("compose", instruction, images, "", options)

    def caption(self, image: Images, **options: Unpack[TextOptions]) -> TextResult:
        """Describe pictures."""
        return self._texts("caption", None, image, "", options)

    def answer(self, image: Images, question: Prompts, **options: Unpack[TextOptions]) -> TextResult:
        """Answer questions about pictures; one picture may have a list of questions."""
        return self._texts("answer", question, image, "", options)

    def infill(self, image: Images, text: Prompts, **options: Unpack[TextOptions]) -> TextResult:
        """Fill the gaps, one ``[MASK]`` or ``___`` for each missing word, of texts about pictures."""
        return self._texts("infill", text, image, "", options)

    def run(
        self, task: str, prompt: Prompts = None, images: Images = None, *, kind: str | None = "", **options: Any
    ) -> ImageResult | TextResult:
        """Run any registered task.

        Args:
            task: Its name.
            prompt: Condition text, or the text with gaps; one or a list.
            images: Condition pictures; one, a list, or a list of lists for tasks with several.
            kind: One of the task's kinds; its first unless given. ``None``: the prompt is the whole condition text.
            options: See :class:`~unialignment.inputs.ImageOptions` and :class:`~unialignment.inputs.TextOptions`.

        Raises:
            InputError: The task, an input or an option is unusable.
        """
        if self.tasks.get(task).target == "image":
            return self._images(task, prompt, images, kind, options)
        return self._texts(task, prompt, images, kind, options)

    def __getattr__(self, name: str) -> Any:
        tasks = self.__dict__.get("tasks")
        if tasks is not None and name in tasks.names:
            return partial(self.run, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # --------------------------------------------------------------------------------------------------- embeddings

    @torch.no_grad()
    def embed_image(self, image: Images, *, batch_size: int = 32) -> Tensor:
        """Unit vectors of pictures, in the space of :meth:`embed_text`.

        Returns:
            Float32 ``[B, E]`` on the CPU.

        Raises:
            InputError: A picture is unusable.
        """
        given = list(image) if isinstance(image, (list, tuple)) else [image]
        if not given:
            raise InputError("expected at least one picture, got an empty list")
        side = self.default_size
        pictures = [fit_image(load_image(one, allow_urls=self.allow_urls), side, side) for one in given]  # type: ignore[arg-type]
        return torch.cat([self._embed_latents(self._encode(chunk)) for chunk in _chunks(pictures, batch_size)])

    @torch.no_grad()
    def embed_text(self, text: Prompts, *, batch_size: int = 64) -> Tensor:
        """Unit vectors of texts, in the space of :meth:`embed_image`.

        Returns:
            Float32 ``[B, E]`` on the CPU.

        Raises:
            InputError: A text is empty or too long.
        """
        requests = build_requests(_TEXT_ONLY, text, None, "", None)
        for request in requests:
            self._check_length(request.text)
        vectors = []
        for chunk in _chunks(requests, batch_size):
            condition = self._condition([request.text for request in chunk], ())
            if self.transformer.config.attention_mode == "prefix":
                output = self.transformer.prefill(
                    text_embeds=condition.text, text_mask=condition.mask, features=True
                ).output
            else:
                output = self.transformer(
                    text_embeds=condition.text,
                    text_mask=condition.mask,
                    timestep=torch.zeros(len(chunk), device=self.device),
                    target="text",
                )
            vectors.append(self.transformer.embed(output.text_features, "text", condition.mask).float().cpu())
        return torch.cat(vectors)

    def _embed_latents(self, latents: Tensor) -> Tensor:
        # The picture is seen as the caption task sees it, beside an empty prompt: so were training's contrastive pairs.
        latents = latents.to(self.dtype)
        if self.transformer.config.attention_mode == "prefix":
            condition = self._condition([""] * latents.shape[0], (latents,))
            output = self.transformer.prefill(
                text_embeds=condition.text, text_mask=condition.mask, images=condition.images, features=True
            ).output
        else:
            output = self.transformer(latents=latents, timestep=torch.zeros(latents.shape[0], device=self.device))
        return self.transformer.embed(output.image_features, "image").float().cpu()

    # ------------------------------------------------------------------------------------------------ picture targets

    @torch.no_grad()
    def _images(
        self, name: str, prompt: Prompts, images: Images, kind: str | None, given: Mapping[str, Any]
    ) -> ImageResult:
        task, options, requests = self._prepare(name, "image", prompt, images, kind, given)
        keep = options["num_images_per_prompt"]
        draw = max(keep, options["best_of"] or 1)
        guidance = Guidance(
            options["guidance_scale"], options["image_guidance_scale"], _interval(options["guidance_interval"])
        )
        if options["solver"] not in SOLVERS:
            raise InputError(f"solver must be one of {', '.join(SOLVERS)}, got {options['solver']!r}")
        if draw > keep and any(not request.prompt for request in requests):
            raise InputError(f"best_of compares pictures with their prompt, and {name} was given none")
        sigmas = sigma_schedule(options["num_inference_steps"], options["shift"])
        width, height = self._size(options["width"], options["height"])
        seeds = expand_seeds(options["seed"], len(requests), draw)
        sources = self._load_sources(requests, width, height, options)
        samples = [(row, seed) for row, row_seeds in enumerate(seeds) for seed in row_seeds]
        factor = self.autoencoder.spatial_factor
        shape = (self.transformer.config.in_channels, height // factor, width // factor)
        tokens = shape[1] * shape[2] // self.transformer.config.patch_size**2
        pictures: list[Image.Image | None] = [None] * len(samples)
        scores = torch.zeros(len(samples))
        texts = self.embed_text([request.prompt for request in requests]) if draw > keep else None
        groups = self._groups(samples, requests, options["batch_size"], tokens * len(guidance.branches(True)))
        with self._bar(len(groups) * options["num_inference_steps"], name, options["progress"]) as bar:
            for indices in groups:
                rows = [samples[index][0] for index in indices]
                denoiser = self._denoiser(requests, sources, rows, guidance, options["use_cache"])
                has_sources = bool(sources[rows[0]])

                def velocity(
                    x: Tensor, sigma: float, denoiser: Denoiser = denoiser, have: bool = has_sources
                ) -> Tensor:
                    return guidance.combine(denoiser.velocity(guidance.branches(have, sigma), x, sigma))

                noise = seeded_normal([samples[index][1] for index in indices], shape).to(self.device)
                hook = self._step_hook(options["callback_on_step_end"], indices, sigmas, bar)
                latents = solve(velocity, noise, sigmas, options["solver"], hook)
                for index, picture in zip(indices, to_images(self._decode(latents)), strict=True):
                    pictures[index] = picture
                if texts is not None:
                    scores[indices] = (self._embed_latents(latents) * texts[rows]).sum(-1)
        chosen = _best(scores, len(requests), draw, keep) if texts is not None else list(range(len(samples)))
        settings = _plain(options, _IMAGE_SETTINGS)
        return ImageResult(
            images=[picture for picture in (pictures[index] for index in chosen) if picture is not None],
            seeds=[samples[index][1] for index in chosen],
            prompts=[requests[samples[index][0]].prompt for index in chosen],
            task=task.name,
            model=self.name,
            settings={**({} if kind == "" else {"kind": kind}), "width": width, "height": height, **settings},
            scores=[float(scores[index]) for index in chosen] if texts is not None else None,
        )

    def _size(self, width: int | None, height: int | None) -> tuple[int, int]:
        patch = self.transformer.config.patch_size * self.autoencoder.spatial_factor
        largest = self.transformer.config.pos_embed_max_size * patch
        for name, value in (("width", width), ("height", height)):
            if value is not None and (value % patch or value > largest):
                raise InputError(f"{name} must be a multiple of {patch} up to {largest} for this model, got {value}")
        return width or self.default_size, height or self.default_size

    # --------------------------------------------------------------------------------------------------- text targets

    @torch.no_grad()
    def _texts(
        self, name: str, prompt: Prompts, images: Images, kind: str | None, given: Mapping[str, Any]
    ) -> TextResult:
        task, options, requests = self._prepare(name, "text", prompt, images, kind, given)
        guidance = Guidance(options["guidance_scale"], options["image_guidance_scale"])
        decoding = TextDecoding(
            options["decoding"], options["num_inference_steps"], options["temperature"], options["top_p"]
        )
        length = options["max_length"] or task.target_length
        if length > self.text_limit:
            raise InputError(f"max_length must be at most {self.text_limit} tokens for this model, got {length}")
        seeds = [row[0] for row in expand_seeds(options["seed"], len(requests), 1)]
        sources = self._load_sources(requests, self.default_size, self.default_size, options)
        path = MaskedPath(self.tokenizer.mask_token_id)
        pad = self.tokenizer.pad_token_id
        texts = [""] * len(requests)
        groups = self._groups([(row, 0) for row in range(len(requests))], requests, options["batch_size"], length)
        with self._bar(len(groups) * options["num_inference_steps"], name, options["progress"]) as bar:
            for rows in groups:
                denoiser = self._denoiser(requests, sources, rows, guidance, options["use_cache"])
                branches = guidance.branches(bool(sources[rows[0]]))
                ids = self._canvas([requests[row] for row in rows], length).to(self.device)

                def logits(
                    ids: Tensor,
                    positions: Tensor,
                    denoiser: Denoiser = denoiser,
                    branches: tuple[Branch, ...] = branches,
                ) -> Tensor:
                    embeds = self.text_embedder.embed(ids).to(self.dtype)
                    result = guidance.combine(denoiser.logits(branches, embeds, positions))
                    if task.gaps:  # a gap is a missing word, never the end of the text
                        result[:, pad] = -torch.inf
                    return result

                hook = self._text_hook(options["callback_on_step_end"], rows, options["num_inference_steps"], bar)
                end = None if task.gaps else pad
                filled = decode(logits, ids, path, decoding, [seeds[row] for row in rows], end, hook)
                bar.update(hook.rest())
                for row, text in zip(rows, self.tokenizer.decode(filled.cpu()), strict=True):
                    texts[row] = text
        settings = _plain(options, _TEXT_SETTINGS)
        return TextResult(
            texts=texts,
            seeds=seeds,
            prompts=[request.prompt for request in requests],
            task=task.name,
            model=self.name,
            settings={**({} if kind == "" else {"kind": kind}), "max_length": length, **settings},
        )

    def _canvas(self, requests: Sequence[Request], length: int) -> Tensor:
        """Target ids ``[B, length]``: masks where to write, given words elsewhere."""
        given = [request.given for request in requests]
        if all(text is None for text in given):
            ids = torch.full((len(requests), length), self.tokenizer.mask_token_id)
        else:
            ids, _ = self.tokenizer.encode([text or "" for text in given], gaps=True)
            if ids.shape[1] > length:
                raise InputError(
                    f"a text of {ids.shape[1]} tokens doesn't fit max_length={length}; shorten it or raise that"
                )
            ids = torch.nn.functional.pad(ids, (0, length - ids.shape[1]), value=self.tokenizer.pad_token_id)
        return ids

    # ---------------------------------------------------------------------------------------------- what both share

    def _prepare(
        self, name: str, target: str, prompt: Prompts, images: Images, kind: str | None, given: Mapping[str, Any]
    ) -> tuple[Task, dict[str, Any], list[Request]]:
        task = self.tasks.get(name)
        options = merge_options(task, self.sampling.get(name, {}), given)
        requests = build_requests(task, prompt, images, kind, options["negative_prompt"])
        for request in requests:
            for text in (request.text, request.negative):
                self._check_length(text)
        return task, options, requests

    def _check_length(self, text: str) -> None:
        if not text:
            return
        count = int(self.tokenizer.encode([text])[1].sum())
        if count == 0:
            raise InputError(f"the text {text[:40]!r} holds nothing that the model can read; use words")
        if count + 1 > self.text_limit:
            raise InputError(
                f"a text of {count:,} tokens is too long, this model reads at most {self.text_limit - 1}; "
                f"shorten {text[:40]!r}…"
            )

    def _load_sources(
        self, requests: Sequence[Request], width: int, height: int, options: Mapping[str, Any]
    ) -> list[tuple[Image.Image, ...]]:
        loaded: dict[int, Image.Image] = {}  # by identity: one picture with many questions is decoded once

        def one(source: ImageInput) -> Image.Image:
            if id(source) not in loaded:
                image = load_image(source, allow_urls=self.allow_urls, background=options["background"])
                loaded[id(source)] = fit_image(image, width, height, options["fit"], options["background"])
            return loaded[id(source)]

        return [tuple(one(source) for source in request.sources) for request in requests]

    def _groups(
        self, samples: Sequence[tuple[int, int]], requests: Sequence[Request], batch_size: int | None, tokens: int
    ) -> list[list[int]]:
        """Sample indices that are computed together: those with equally many sources, ``batch_size`` at a time."""
        size = batch_size or max(1, min(64, TOKENS_AT_ONCE // max(tokens, 1)))
        by_sources: dict[int, list[int]] = {}
        for index, (row, _) in enumerate(samples):
            by_sources.setdefault(len(requests[row].sources), []).append(index)
        return [chunk for group in by_sources.values() for chunk in _chunks(group, size)]

    def _denoiser(
        self,
        requests: Sequence[Request],
        sources: Sequence[tuple[Image.Image, ...]],
        rows: Sequence[int],
        guidance: Guidance,
        cached: bool,
    ) -> Denoiser:
        """The model as a function of target tokens, given the conditions of ``rows``, each encoded once."""
        unique = list(dict.fromkeys(rows))
        chosen = [requests[row] for row in unique]
        count = len(sources[unique[0]])
        latents = tuple(
            self._encode([sources[row][number] for row in unique]).to(self.dtype) for number in range(count)
        )
        conditions: dict[Branch, Condition] = {}
        for branch in guidance.branches(count > 0):
            texts = [request.text if branch == "full" else request.negative for request in chosen]
            conditions[branch] = self._condition(texts, () if branch == "nothing" else latents)
        index = torch.tensor([unique.index(row) for row in rows], device=self.device)
        return Denoiser(self.transformer, conditions, index, cached)

    def _condition(self, texts: Sequence[str], images: tuple[Tensor, ...]) -> Condition:
        ids, mask = encode_conditions(self.tokenizer, texts)
        ids, mask = ids.to(self.device), mask.to(self.device)
        return Condition(self.text_embedder.embed(ids, mask).to(self.dtype), mask, images)

    def _encode(self, pictures: Sequence[Image.Image]) -> Tensor:
        latents: Tensor = self.autoencoder.encode(to_tensor(pictures).to(self.device))
        return latents.float()

    def _decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.autoencoder.decode(latents.float())
        return images

    # ------------------------------------------------------------------------------------------ progress and callbacks

    def _bar(self, total: int, name: str, progress: bool | None) -> Any:
        shown = sys.stderr.isatty() if progress is None else progress
        return tqdm(**{"total": total, "desc": name, "leave": False, "disable": not shown, **self._progress_options})

    def _step_hook(
        self, callback: Any, indices: list[int], sigmas: list[float], bar: Any
    ) -> Callable[[int, float, Tensor], Tensor | None]:
        def hook(step: int, sigma: float, x: Tensor) -> Tensor | None:
            bar.update(1)
            if callback is None:
                return None
            # As in diffusers, the timestep is the one that the step started from.
            replaced = callback(self, step, 1000.0 * sigmas[step], {"latents": x, "indices": indices})
            return _replacement(replaced, x)

        return hook

    def _text_hook(self, callback: Any, rows: list[int], steps: int, bar: Any) -> _TextHook:
        return _TextHook(self, callback, rows, steps, bar)


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


_TEXT_ONLY = Task("embed_text", "embed a text", "image")


def _replacement(replaced: Any, x: Tensor) -> Tensor | None:
    latents = replaced.get("latents") if isinstance(replaced, dict) else None
    if latents is None:
        return None
    if not isinstance(latents, Tensor) or latents.shape != x.shape:
        raise InputError(f"callback_on_step_end must return latents of shape {list(x.shape)}, or nothing")
    return latents.to(x)


def _best(scores: Tensor, inputs: int, drawn: int, keep: int) -> list[int]:
    """Indices of the ``keep`` highest scores of each input, best first."""
    order = scores.view(inputs, drawn).argsort(dim=1, descending=True, stable=True)[:, :keep]
    return [row * drawn + int(column) for row, columns in enumerate(order.tolist()) for column in columns]


def _chunks(items: Sequence[Any], size: int) -> Iterator[Any]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _interval(value: Any) -> tuple[float, float]:
    try:
        low, high = (float(number) for number in value)
    except (TypeError, ValueError) as error:
        raise InputError(f"guidance_interval must be two numbers (low, high) in 0–1, got {value!r}") from error
    return low, high


def _plain(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    plain = {name: options[name] for name in names if options[name] is not None}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def _device(device: str | torch.device | None) -> torch.device:
    if device is None or device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or ["unknown"])[0]
        raise InputError(f"device {str(device)!r} can't be used here: {reason[:120]}") from error
    return target


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    if dtype is None:
        return torch.float32
    if dtype in _DTYPES.values():
        return dtype  # type: ignore[return-value]
    raise InputError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
