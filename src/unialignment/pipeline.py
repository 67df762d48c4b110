"""``load()`` and :class:`UniAlignmentPipeline`: every task from Python, by one path for pictures and one for texts.

Which task is which is said by its declaration in ``tasks``; nothing here asks for a task by name except the methods
that users call. Knows nothing of training, files of pictures or servers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unialignment import __version__
from unialignment.budget import MemoryChoice, choose
from unialignment.conditioning import Condition
from unialignment.errors import CheckpointError, InputError
from unialignment.images import fit_image, load_image, to_images, to_tensor
from unialignment.inputs import ImageOptions, Images, Prompts, TextOptions, build_requests
from unialignment.model.folders import resolve_model, save_folder
from unialignment.model.initialise import Initialisation
from unialignment.model.layouts import load_model
from unialignment.model.published import LoadOptions
from unialignment.model.quantization import parse_quantize, refuse_quantized
from unialignment.model.streaming import parse_size
from unialignment.model.tokenizer import encode_conditions
from unialignment.model.transformer import UniAlignmentTransformer
from unialignment.outputs import ImageResult, TextResult
from unialignment.placement import Placement, resolve_device, resolve_dtype
from unialignment.sampling import chunks, draw, write
from unialignment.tasks import TASKS, Task, TaskRegistry

_COMPONENTS = ("transformer", "text_embedder", "autoencoder", "tokenizer")
DEFAULT_TEXT_LIMIT = 512
"""Tokens of a text for embedders that set no limit themselves."""


def load(
    name: str | Path = "nano",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    allow_urls: bool = False,
    max_memory: str | int | None = None,
    drop_text_encoder: bool = False,
    quantize: str | Mapping[str, str] | None = None,
) -> UniAlignmentPipeline:
    """Load a model.

    Args:
        name: A packaged model (``"nano"``), a folder, or a hub id (``"owner/name"``). A folder is one of ours, the
            published UniAlignment pipeline, or Stable Diffusion 3 or 3.5 medium in diffusers' layout; the last is a
            starting point for training, and what is new in it is logged and listed in ``pipe.initialisation``.
        device: Where to compute; the best there is unless given.
        dtype: Arithmetic of the transformer, ``"float32"`` unless given. The autoencoder stays in float32.
        revision: Branch, tag or commit of a hub id.
        allow_urls: Whether pictures may be given as http(s) URLs.
        max_memory: Memory of the device to get along with, like ``"8GiB"``. Switches are chosen by a prediction, see
            :mod:`unialignment.budget`; what was chosen is logged and in ``pipe.memory_choice``.
        drop_text_encoder: Free a T5 encoder once prompts are encoded; the transformer is loaded only after that. See
            :meth:`~unialignment.placement.Placement.drop_text_encoder`.
        quantize: ``"8bit"`` or ``"4bit"`` for transformer and text encoder, or component → one of these.

    Raises:
        CheckpointError: There is no such model, or it is incomplete, damaged or unsafe.
        InputError: The device or dtype is unknown or not available, a backend for ``quantize`` is missing, or nothing
            makes the model fit ``max_memory``.
    """
    return UniAlignmentPipeline.from_pretrained(
        name,
        device=device,
        dtype=dtype,
        revision=revision,
        allow_urls=allow_urls,
        max_memory=max_memory,
        drop_text_encoder=drop_text_encoder,
        quantize=quantize,
    )


class UniAlignmentPipeline(Placement):
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
        self._place(transformer, text_embedder)
        self.autoencoder = autoencoder.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.sampling: dict[str, dict[str, Any]] = {task: dict(values) for task, values in (sampling or {}).items()}
        self.tasks = tasks
        self.allow_urls = allow_urls
        self.text_limit = int(tokenizer.prompt_length or getattr(text_embedder, "max_length", DEFAULT_TEXT_LIMIT))
        self.progress_options: dict[str, Any] = {}
        self.initialisation: Initialisation | None = None
        """Which tensors are new, when the weights are only a starting point (Stable Diffusion 3's)."""
        self.memory_choice: MemoryChoice | None = None
        """What ``max_memory`` led to."""

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
        max_memory: str | int | None = None,
        drop_text_encoder: bool = False,
        quantize: str | Mapping[str, str] | None = None,
    ) -> UniAlignmentPipeline:
        """Load a model; see :func:`load`."""
        target, folder, bits = resolve_device(device), resolve_model(name, revision), parse_quantize(quantize)
        arithmetic, choice = resolve_dtype(dtype), None
        if max_memory is not None:
            choice = choose(
                folder,
                parse_size(max_memory),
                target,
                dtype=None if dtype is None else arithmetic,
                quantize=bits,
                drop_text_encoder=drop_text_encoder,
            )
            arithmetic = choice.dtype
        drops = drop_text_encoder or (choice is not None and choice.drop_text_encoder)
        options = LoadOptions(arithmetic, lazy=drops, quantize=bits, device=target)
        loaded = load_model(folder, _COMPONENTS, options=options)
        index = loaded.settings
        sampling = index.get("sampling") or {}
        if not isinstance(sampling, dict) or not all(isinstance(value, dict) for value in sampling.values()):
            raise CheckpointError("'sampling' in model_index.json must map task names to settings")
        pipe = cls(
            **loaded.components,
            name=str(index.get("name") or Path(str(name)).name),
            sampling=sampling,
            allow_urls=allow_urls,
        )
        pipe.initialisation, pipe._loaders, pipe.memory_choice = loaded.initialisation, dict(loaded.loaders), choice
        offload = None if choice is None else choice.offload
        # Offloaded components go to the device one at a time.
        pipe.to("cpu" if offload else target, None if bits else arithmetic)
        if drops:
            alternate = choice is not None and choice.drop_text_encoder
            pipe.drop_text_encoder(alternate=alternate, now=False)
        if choice is not None:
            choice.apply(pipe, target)
        return pipe

    def save_pretrained(self, folder: str | Path, dtypes: Mapping[str, str] | None = None) -> None:
        """Write a model folder, atomically.

        Args:
            folder: Destination; a model that is there already is replaced as a whole.
            dtypes: Component name → ``"float32"`` (default), ``"float16"`` or ``"bfloat16"`` on disk.

        Raises:
            StorageError: It can't be written; nothing is left half-written.
            InputError: Weights are offloaded, quantized, or carry a LoRA.
        """
        self._check_plain("saving")
        for component in (self.transformer, self.text_embedder):
            refuse_quantized(component, "saving")
        if self.loras:
            raise InputError(
                "a LoRA is in use, which the folder would not hold; unload_lora() before saving, or write a model with "
                "the LoRA in it by `unialign merge`"
            )
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

    @property
    def default_size(self) -> int:
        """Side of the pictures that the model was trained on, in pixels."""
        return int(self.transformer.config.sample_size * self.autoencoder.spatial_factor)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options for ``tqdm`` in all later calls, e.g. ``disable=True``, as in diffusers."""
        self.progress_options = options

    # ---------------------------------------------------------------------------------------------------- the tasks

    def generate(self, prompt: Prompts, **options: Unpack[ImageOptions]) -> ImageResult:
        """Draw pictures from text; ``None`` as prompt draws whatever comes."""
        return self._draw("generate", prompt, None, "", options)

    def edit(self, instruction: Prompts, image: Images, **options: Unpack[ImageOptions]) -> ImageResult:
        """Change pictures by instruction."""
        return self._draw("edit", instruction, image, "", options)

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
            return self._draw("perceive", prompt, image, None, options)
        return self._draw("perceive", of, image, kind, options)

    def control(
        self, prompt: Prompts, image: Images, kind: str | None = None, **options: Unpack[ImageOptions]
    ) -> ImageResult:
        """Draw pictures that follow maps; ``kind`` says of which kind they are, unless the prompt does."""
        return self._draw("control", prompt, image, kind, options)

    def compose(self, instruction: Prompts, images: Images, **options: Unpack[ImageOptions]) -> ImageResult:
        """Draw a new picture from several; ``images`` is the list of references, or one such list for each input."""
        return self._draw("compose", instruction, images, "", options)

    def caption(self, image: Images, **options: Unpack[TextOptions]) -> TextResult:
        """Describe pictures."""
        return self._write("caption", None, image, "", options)

    def answer(self, image: Images, question: Prompts, **options: Unpack[TextOptions]) -> TextResult:
        """Answer questions about pictures; one picture may have a list of questions."""
        return self._write("answer", question, image, "", options)

    def infill(self, image: Images, text: Prompts, **options: Unpack[TextOptions]) -> TextResult:
        """Fill the gaps, one ``[MASK]`` or ``___`` for each missing word, of texts about pictures."""
        return self._write("infill", text, image, "", options)

    def rewrite(self, prompt: Prompts, **options: Unpack[TextOptions]) -> TextResult:
        """Say prompts as the model's own captions do, what they leave open decided by the seed.

        ``generate(..., rewrite=True)`` draws from such texts.
        """
        return self._write("rewrite", prompt, None, "", options)

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
            return self._draw(task, prompt, images, kind, options)
        return self._write(task, prompt, images, kind, options)

    def _draw(
        self, name: str, prompt: Prompts, images: Images, kind: str | None, options: Mapping[str, Any]
    ) -> ImageResult:
        try:
            return draw(self, self.tasks.get(name), prompt, images, kind, options)
        finally:
            self._rest()

    def _write(
        self, name: str, prompt: Prompts, images: Images, kind: str | None, options: Mapping[str, Any]
    ) -> TextResult:
        if self._alternates:
            raise InputError(
                "texts need the text encoder and the transformer at once, at every step, and max_memory leaves room "
                "for one of them; allow more memory, or use quantize"
            )
        # Dropped after the last step instead of after the prompt.
        drops, self._drops = self._drops, False
        try:
            return write(self, self.tasks.get(name), prompt, images, kind, options)
        finally:
            self._drops = drops
            self._rest()

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
        self.encode_ahead([""])
        side = self.default_size
        pictures = [fit_image(load_image(one, allow_urls=self.allow_urls), side, side) for one in given]  # type: ignore[arg-type]
        vectors = [self.embed_latents(self.encode_images(chunk)) for chunk in chunks(pictures, batch_size)]
        self._rest()
        return torch.cat(vectors)

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
            self.check_length(request.text)
        self.encode_ahead([request.text for request in requests])
        vectors = []
        for chunk in chunks(requests, batch_size):
            condition = self.condition([request.text for request in chunk], ())
            if self.transformer.config.attention_mode == "prefix":
                output: Any = self.transformer.prefill(
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
        self._rest()
        return torch.cat(vectors)

    def embed_latents(self, latents: Tensor) -> Tensor:
        """The same for pictures given as latents ``[B, C, h, w]``."""
        # The picture is seen as the caption task sees it, beside an empty prompt: so were training's contrastive pairs.
        latents = latents.to(self.dtype)
        if self.transformer.config.attention_mode == "prefix":
            condition = self.condition([""] * latents.shape[0], (latents,))
            output: Any = self.transformer.prefill(
                text_embeds=condition.text, text_mask=condition.mask, images=condition.images, features=True
            ).output
        else:
            output = self.transformer(latents=latents, timestep=torch.zeros(latents.shape[0], device=self.device))
        return self.transformer.embed(output.image_features, "image").float().cpu()

    # --------------------------------------------------------------------------------------- between data and tensors

    def encode_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """RGB pictures of one legal size as float32 latents ``[B, C, h, w]`` on the pipeline's device."""
        latents: Tensor = self.autoencoder.encode(to_tensor(pictures).to(self.device))
        return latents.float()

    def decode_latents(self, latents: Tensor) -> list[Image.Image]:
        """Latents ``[B, C, h, w]`` as RGB pictures."""
        return to_images(self.autoencoder.decode(latents.float()))

    def condition(self, texts: Sequence[str], images: Sequence[Tensor] = ()) -> Condition:
        """Condition texts, and latents of condition pictures, as the transformer takes them."""
        if self._drops:
            self.encode_ahead(texts)
            mask = encode_conditions(self.tokenizer, texts)[1].to(self.device)
            length = mask.shape[1]
            rows = [self._remembered[text] for text in texts]
            embeds = torch.stack([F.pad(row, [0, 0, 0, length - len(row)]) for row in rows])
        else:
            embeds, mask = self._embed_texts(texts)
        return Condition(embeds, mask, tuple(image.to(self.dtype) for image in images))

    def _embed_texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids, mask = encode_conditions(self.tokenizer, texts)
        ids, mask = ids.to(self.device), mask.to(self.device)
        return self.text_embedder.embed(ids, mask).to(self.dtype), mask

    def check_length(self, text: str) -> None:
        """Refuse a condition text that the model can't read.

        Raises:
            InputError: It is too long, or nothing of it is left after normalisation.
        """
        if not text:
            return
        count = int(self.tokenizer.encode([text])[1].sum())
        if count == 0:
            raise InputError(f"the text {text[:40]!r} holds nothing that the model can read; use words")
        if count + 1 > self.text_limit:  # one more for the end token
            raise InputError(
                f"a text of {count:,} tokens is too long, this model reads at most {self.text_limit - 1}; "
                f"shorten {text[:40]!r}…"
            )


_TEXT_ONLY = Task("embed_text", "embed a text", "image")
