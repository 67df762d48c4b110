"""Requests being computed: their samples, each a solver or decoder that asks for one prediction after the other.

What samples ask for is computed elsewhere, together with what others ask for. Knows nothing of queues or threads.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from unialignment.diffusion import SeededNoise, decoding_steps, solver_steps
from unialignment.diffusion.guidance import WITH_PROMPT, Branch
from unialignment.outputs import ImageResult, TextResult
from unialignment.reranking import Reranker
from unialignment.serving.batches import Known, Row
from unialignment.serving.handle import Handle
from unialignment.serving.plans import EmbedPlan, ImagePlan, Plan, TextPlan
from unialignment.serving.requests import Event, Progress, TaskRequest, TextSoFar

if TYPE_CHECKING:
    from unialignment.pipeline import UniAlignmentPipeline


class Sample:
    """One result of a request on its way.

    Args:
        job: The request.
        index: Which of its samples.

    Attributes:
        finished: The solver's result, once there.
        preview: ``(number, expected latents [1, C, H, W])`` that is due; whoever draws it sets it to ``None``.
    """

    def __init__(self, job: Job, index: int) -> None:
        self.job, self.index = job, index
        self.finished: Tensor | None = None
        self.preview: tuple[int, Tensor] | None = None
        self.step = 0
        plan, device = job.plan, job.pipe.device
        self._steps: Generator[Any, Tensor, Tensor]
        if isinstance(plan, ImagePlan):
            fresh = SeededNoise([plan.seeds[index]], plan.shape)
            self._steps = solver_steps(fresh().to(device), list(plan.sigmas), plan.solver, self._image_step, fresh)
        else:
            assert isinstance(plan, TextPlan)
            ids, seeds = plan.canvas.unsqueeze(0).to(device), [plan.seeds[index]]
            self._steps = decoding_steps(ids, plan.path, plan.decoding, seeds, plan.end_id, self._text_step)
        self._asked: tuple[Any, Any] | None = None
        self._advance(None)

    def rows(self) -> list[Row]:
        """What it asks for: a row for each guidance branch that the present step needs."""
        assert self._asked is not None
        target, second = self._asked
        if isinstance(self.job.plan, ImagePlan):
            return [Row(self._condition(branch), target, second) for branch in self._branches()]
        return [Row(self._condition(branch), target, 0.0, second) for branch in self._branches()]

    def _condition(self, branch: Branch) -> Known:
        known = self.job.conditions[branch]
        return known[self.index if len(known) > 1 else 0]

    def _branches(self) -> tuple[Branch, ...]:
        plan = self.job.plan
        assert self._asked is not None
        sigma = self._asked[1] if isinstance(plan, ImagePlan) else None
        return plan.guidance.branches(bool(plan.pictures), sigma)

    def answer(self, predictions: list[Tensor]) -> None:
        """Go on with the predictions for :meth:`rows`, in their order."""
        plan = self.job.plan
        assert self._asked is not None
        combined = plan.guidance.combine(dict(zip(self._branches(), predictions, strict=True)))
        if isinstance(plan, TextPlan) and plan.excluded is not None:
            combined[:, plan.excluded] = -torch.inf
        asked, before = self._asked, self.step
        self._advance(combined)
        if isinstance(plan, ImagePlan) and self.step > before and self.step in self.job.preview_steps:
            # The clean picture that the velocity points at.
            self.preview = self.job.preview_steps.index(self.step), asked[0] - asked[1] * combined

    def _advance(self, reply: Tensor | None) -> None:
        try:
            self._asked = self._steps.send(reply)  # type: ignore[arg-type]  # the first reply must be None
        except StopIteration as end:
            self.finished, self._asked = end.value, None

    def _image_step(self, step: int, _sigma: float, _x: Tensor) -> None:
        self.step = step + 1
        if self.step not in self.job.preview_steps:
            self.job.emit(Progress(self.index, self.step, self.job.steps))

    def _text_step(self, step: int, ids: Tensor) -> None:
        self.step = step + 1
        plan, job = self.job.plan, self.job
        assert isinstance(plan, TextPlan)
        if not job.previews:
            job.emit(Progress(self.index, self.step, job.steps))
            return
        written = ids[0, plan.start :].tolist()
        settled = settled_text(job.pipe.tokenizer, written)
        # Kept if a tokenizer should ever take back what it said: readers rely on it.
        self.job.settled = settled if settled.startswith(self.job.settled) else self.job.settled
        text = job.pipe.tokenizer.decode([written])[0]
        job.emit(TextSoFar(self.index, self.step, job.steps, text, self.job.settled))


def settled_text(tokenizer: Any, ids: list[int]) -> str:
    """The beginning of a text that its open positions can't change any more.

    That is what stands before the first mask, less its last word, which the next token may continue; all of it when a
    text has ended before its first mask.
    """
    ends = {tokenizer.pad_token_id, tokenizer.eos_token_id}
    for position, token in enumerate(ids):
        if token in ends:
            break
        if token == tokenizer.mask_token_id:
            written: str = tokenizer.decode([ids[:position]])[0]
            return written.rpartition(" ")[0]
    whole: str = tokenizer.decode([ids])[0]
    return whole


class Job:
    """A request being computed.

    Args:
        pipe: The model.
        handle: The request.
        plan: What it needs.
        prompts: Condition texts of its samples where each has its own: rewritten ones.

    Attributes:
        conditions: Guidance branch → conditions, one for all samples or one for each, kept while it lives; set before
            its first step.
        samples: Its results on their way; empty until :meth:`start`.
        started: ``time.monotonic()`` when it left the queue.
    """

    def __init__(
        self, pipe: UniAlignmentPipeline, handle: Handle, plan: Plan, prompts: Sequence[str] | None = None
    ) -> None:
        self.pipe, self.handle, self.plan, self.prompts = pipe, handle, plan, prompts
        self.conditions: Mapping[Branch, Sequence[Known]] = {}
        self.samples: list[Sample] = []
        self.started = time.monotonic()
        self.settled = ""
        self.pictures: dict[int, Image.Image] = {}
        self.ranking: Reranker | None = None
        request = handle.request
        self.previews = request.previews if isinstance(request, TaskRequest) else 0
        self.steps = len(plan.sigmas) - 1 if isinstance(plan, ImagePlan) else plan.decoding.steps  # type: ignore[attr-defined]
        inner = range(1, self.steps)
        count = min(self.previews, len(inner)) if isinstance(plan, ImagePlan) else 0
        self.preview_steps = tuple(inner[(2 * i + 1) * len(inner) // (2 * count)] for i in range(count))

    @property
    def first(self) -> bool:
        """Whether it only prepares the request's own task: rewriting the prompt of a picture."""
        request = self.handle.request
        return isinstance(request, TaskRequest) and request.task != self.plan.task.name

    def emit(self, event: Event) -> None:
        """Tell the request's reader; not of what is only preparation, whose steps aren't its task's."""
        if not self.first:
            self.handle.emit(event)

    def texts(self) -> list[tuple[Branch, str | None]]:
        """Condition texts by branch, several of one branch where samples have their own."""
        own = self.prompts
        return [
            (branch, each)
            for branch, text in self.plan.branches.items()
            for each in (own if own is not None and branch in WITH_PROMPT else [text])
        ]

    def start(self, conditions: Mapping[Branch, Sequence[Known]]) -> None:
        """Begin all samples, given the conditions of :meth:`texts`."""
        self.conditions = conditions
        self.samples = [Sample(self, index) for index in range(len(self.plan.seeds))]

    def open_samples(self) -> list[Sample]:
        """Those that still ask for predictions."""
        return [sample for sample in self.samples if sample.finished is None]

    def text_result(self) -> TextResult:
        """The result of a finished job whose target is a text."""
        plan = self.plan
        assert isinstance(plan, TextPlan)
        ids = [sample.finished[0, plan.start :].tolist() for sample in self.samples if sample.finished is not None]
        return TextResult(
            texts=self.pipe.tokenizer.decode(ids),
            seeds=list(plan.seeds),
            prompts=[plan.prompt],
            task=plan.task.name,
            model=self.pipe.name,
            settings=dict(plan.settings),
        )

    def image_result(self) -> ImageResult:
        """The result of a finished job whose target is a picture, once all its ``pictures`` are drawn."""
        plan = self.plan
        assert isinstance(plan, ImagePlan)
        order = list(range(len(plan.seeds))) if self.ranking is None else self.ranking.best(plan.keep)
        return ImageResult(
            images=[self.pictures[index] for index in order],
            seeds=[plan.seeds[index] for index in order],
            prompts=[plan.prompt] * len(order),
            task=plan.task.name,
            model=self.pipe.name,
            settings=dict(plan.settings),
            scores=None if self.ranking is None else [float(self.ranking.scores[index]) for index in order],
            revised_prompts=None if self.prompts is None else [self.prompts[index] for index in order],
        )


class EmbedJob:
    """Texts and pictures being embedded, some in each round.

    Args:
        pipe: The model.
        handle: The request.
        plan: What it needs.
    """

    def __init__(self, pipe: UniAlignmentPipeline, handle: Handle, plan: EmbedPlan) -> None:
        self.pipe, self.handle, self.plan = pipe, handle, plan
        self.started = time.monotonic()
        self.texts: list[Tensor] = []
        self.images: list[Tensor] = []

    def waiting_texts(self) -> tuple[str, ...]:
        """Those without a vector yet."""
        return self.plan.texts[len(self.texts) :]

    def waiting_pictures(self) -> tuple[Image.Image, ...]:
        """Those without a vector yet."""
        return self.plan.pictures[len(self.images) :]

    @property
    def done(self) -> bool:
        """Whether all have vectors."""
        return not self.waiting_texts() and not self.waiting_pictures()

    def result(self) -> Tensor:
        """Float32 ``[B, E]``, texts first."""
        return torch.stack([*self.texts, *self.images])
