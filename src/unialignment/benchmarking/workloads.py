"""The tasks as they are computed: our way, the published way, and a peer's. Knows nothing of timing.

*Ours*: conditions encoded once, target tokens alone at every step, guidance branches in one batch, only the needed
head, logits at masked positions only, many pictures at once. *Published* (``joint`` attention, same weights): all
tokens at every step, sources and texts doubled for guidance, both heads, all positions, one picture at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from unialignment.benchmarking.models import POOLED_DIM, arguments, build, build_peer, tokens_of
from unialignment.conditioning import Condition, Denoiser
from unialignment.diffusion import Guidance, MaskedPath, TextDecoding, decode, sigma_schedule, solve
from unialignment.diffusion.guidance import Branch
from unialignment.errors import InputError

MASK = 1
TASKS = ("generate", "edit", "caption", "answer")


@dataclass(frozen=True)
class Case:
    """One workload.

    Attributes:
        task: One of :data:`TASKS`.
        size: Model, see :mod:`~unialignment.benchmarking.models`.
        pixels: Side of all pictures.
        sources: Condition pictures.
        batch: Samples.
        steps: Denoising steps, or passes over a text.
        prompt: Tokens of the prompt or question.
        length: Tokens of the text to write.
        guidance: Scale; 1 is none. Texts are written without.
        dtype: ``"float32"`` or ``"bfloat16"``.
    """

    task: str
    size: str
    pixels: int = 256
    sources: int = 0
    batch: int = 1
    steps: int = 4
    prompt: int = 32
    length: int = 32
    guidance: float = 3.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise InputError(f"unknown task {self.task!r}: use one of {', '.join(TASKS)}")

    @property
    def tokens(self) -> int:
        """Of one picture."""
        return tokens_of(self.size, self.pixels)[1]

    @property
    def text_target(self) -> bool:
        """Whether a text is written."""
        return self.task in ("caption", "answer")

    @property
    def name(self) -> str:
        """Short and unique within a report."""
        sources = f"-{self.sources}" if self.task == "edit" else ""
        batch = f" x{self.batch}" if self.batch > 1 else ""
        return f"{self.task}{sources} {self.pixels}px{batch}"

    def with_(self, **changes: Any) -> Case:
        """A copy with some fields changed."""
        return replace(self, **changes)


def standard(task: str, size: str, pixels: int, sources: int = 0, **changes: Any) -> Case:
    """The case of a task that reports use: 32 words a caption, 8 an answer; questions of 16."""
    defaults: dict[str, dict[str, Any]] = {
        "edit": {"sources": sources},
        "caption": {"sources": 1, "prompt": 0, "length": 32, "steps": 16, "guidance": 1.0},
        "answer": {"sources": 1, "prompt": 16, "length": 8, "steps": 4, "guidance": 1.0},
    }
    return Case(task, size, pixels, **{**defaults.get(task, {}), **changes})


@dataclass(frozen=True)
class Data:
    """Random inputs of a case, the same for all ways of computing it."""

    noise: Tensor
    sources: tuple[Tensor, ...]
    prompt: Tensor
    empty: Tensor
    words: nn.Embedding

    @staticmethod
    def of(case: Case) -> Data:
        """Seeded; latents ``[B, C, H, W]``, texts ``[B, L, D]``."""
        given, (side, _) = arguments(case.size), tokens_of(case.size, case.pixels)
        dtype, width = getattr(torch, case.dtype), given["joint_attention_dim"]
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        words = nn.Embedding(given["vocab_size"], width, _weight=torch.zeros(1, width).expand(given["vocab_size"], -1))
        words.weight = nn.Parameter(normal(257, width), requires_grad=False)
        shape = (case.batch, given["in_channels"], side, side)
        return Data(
            noise=normal(*shape),
            sources=tuple(normal(*shape) for _ in range(case.sources)),
            prompt=normal(case.batch, case.prompt, width),
            empty=normal(1, case.prompt, width),
            words=words,
        )

    def embed(self, ids: Tensor) -> Tensor:
        """``[B, L]`` to ``[B, L, D]``; a small table stands for the vocabulary's."""
        return self.words(ids % 257)


@dataclass(frozen=True)
class Way:
    """How a case is computed.

    Attributes:
        prepare: What happens once; its result goes to ``step``.
        step: One pass of all branches, ``step(state, number)``; for texts at the first step's masks.
        whole: Everything, from inputs to result.
    """

    prepare: Callable[[], Any]
    step: Callable[[Any, int], Any]
    whole: Callable[[], Any]


def _branches(case: Case) -> Guidance:
    return Guidance(1.0 if case.text_target else case.guidance)


def ours(case: Case) -> Way:
    """As the pipeline does it."""
    model, data = build(case.size, "prefix", getattr(torch, case.dtype)), Data.of(case)
    guidance = _branches(case)
    names: tuple[Branch, ...] = guidance.branches(case.sources > 0)
    sigmas = sigma_schedule(case.steps)
    everyone, one = torch.arange(case.batch), torch.zeros(case.batch, dtype=torch.long)

    def condition(text: Tensor, pictures: tuple[Tensor, ...]) -> Condition:
        return Condition(text, torch.ones(text.shape[:2], dtype=torch.bool), pictures)

    @torch.no_grad()
    def prepare() -> Denoiser:
        model.fuse_projections()
        conditions: dict[Branch, Condition] = {"full": condition(data.prompt, data.sources)}
        index: dict[Branch, Tensor] = {"full": everyone}
        if len(names) > 1:
            # Without sources all samples move away from the same thing, which is encoded once.
            shared = not case.sources
            empty = data.empty if shared else data.empty.expand(case.batch, -1, -1)
            conditions["no_text"], index["no_text"] = condition(empty, data.sources), one if shared else everyone
        denoiser = Denoiser(model, conditions, index, cached=True)
        if not case.text_target:
            denoiser.plan(sigmas[:-1])
        return denoiser

    def velocity(denoiser: Denoiser, x: Tensor, sigma: float) -> Tensor:
        return guidance.combine(denoiser.velocity(names, x, sigma))

    def logits(denoiser: Denoiser, ids: Tensor, positions: Tensor) -> Tensor:
        return denoiser.logits(names, data.embed(ids), positions)["full"]

    @torch.no_grad()
    def step(denoiser: Denoiser, number: int) -> Tensor:
        if case.text_target:
            ids = torch.full((case.batch, case.length), MASK)
            # On average over the steps of a text, half of its positions are still open.
            return logits(denoiser, ids, (torch.arange(case.length) % 2 == 0).expand(case.batch, -1))
        here, there = sigmas[number % case.steps], sigmas[number % case.steps + 1]
        return data.noise + (there - here) * velocity(denoiser, data.noise, here)

    @torch.no_grad()
    def whole() -> Tensor:
        denoiser = prepare()
        if not case.text_target:
            return solve(lambda x, sigma: velocity(denoiser, x, sigma), data.noise, sigmas)
        ids = torch.full((case.batch, case.length), MASK)
        settings = TextDecoding("confidence", case.steps)
        return decode(lambda i, p: logits(denoiser, i, p), ids, MaskedPath(MASK), settings, range(case.batch))

    return Way(prepare, step, whole)


def published(case: Case) -> Way:
    """The published arithmetic and schedule: nothing is kept between steps; samples one after another."""
    model = build(case.size, "joint", getattr(torch, case.dtype))
    data = Data.of(case)
    guidance = _branches(case)
    doubled = len(guidance.branches(False)) > 1
    sigmas = sigma_schedule(case.steps)

    def velocity(row: int, x: Tensor, sigma: float) -> Tensor:
        rows = slice(row, row + 1)
        text, sources, latents = data.prompt[rows], [source[rows] for source in data.sources], x
        if doubled:
            text, latents = torch.cat([data.empty, text]), torch.cat([x, x])
            sources = [torch.cat([source, source]) for source in sources]
        time = torch.full((len(latents),), 1000.0 * sigma)
        output = model(text_embeds=text, latents=latents, sources=sources, timestep=time, target="both")
        if not doubled:
            return output.velocity
        without, with_ = output.velocity.chunk(2)
        return without + guidance.text_scale * (with_ - without)

    def logits(row: int, ids: Tensor, positions: Tensor) -> Tensor:
        rows = slice(row, row + 1)
        text = data.embed(ids)
        if case.prompt:
            text = torch.cat([data.prompt[rows], text], dim=1)
        output = model(
            text_embeds=text, latents=data.sources[0][rows], timestep=torch.zeros(1), target="both"
        ).text_logits
        return output[:, case.prompt :][positions]

    @torch.no_grad()
    def step(_: Any, number: int) -> None:
        for row in range(case.batch):
            if case.text_target:
                ids = torch.full((1, case.length), MASK)
                logits(row, ids, ids == MASK)
            else:
                x = data.noise[row : row + 1]
                here, there = sigmas[number % case.steps], sigmas[number % case.steps + 1]
                x + (there - here) * velocity(row, x, here)

    @torch.no_grad()
    def whole() -> Tensor:
        rows = []
        for row in range(case.batch):
            if case.text_target:
                ids = torch.full((1, case.length), MASK)
                settings = TextDecoding("confidence", case.steps)
                rows.append(
                    decode(lambda i, p, row=row: logits(row, i, p), ids, MaskedPath(MASK), settings, [row])  # type: ignore[misc]
                )
            else:
                noise = data.noise[row : row + 1]
                rows.append(solve(lambda x, sigma, row=row: velocity(row, x, sigma), noise, sigmas))  # type: ignore[misc]
        return torch.cat(rows)

    return Way(lambda: None, step, whole)


def peer(case: Case) -> Way:
    """diffusers' ``StableDiffusion3Pipeline`` on a random model of the same shape, given embedded prompts.

    Raises:
        InputError: it only generates.
    """
    if case.task != "generate":
        raise InputError(f"diffusers' StableDiffusion3Pipeline generates; there is no {case.task} to compare with")
    pipe, data = build_peer(case.size, getattr(torch, case.dtype)), Data.of(case)
    pooled = torch.zeros(case.batch, POOLED_DIM, dtype=data.noise.dtype)

    def whole() -> Tensor:
        return pipe(
            prompt_embeds=data.prompt,
            negative_prompt_embeds=data.empty.expand(case.batch, -1, -1),
            pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=pooled,
            latents=data.noise.clone(),
            height=case.pixels,
            width=case.pixels,
            num_inference_steps=case.steps,
            guidance_scale=case.guidance,
            output_type="latent",
        ).images

    return Way(lambda: None, lambda _s, _n: whole(), whole)
