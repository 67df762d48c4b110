"""Rounds of steps: every active sample does one step in each round, in forward passes that all requests share.

Requests join between two rounds and leave as soon as they are done. Runs in one thread; knows nothing of queues.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from PIL import Image

from unialignment.diffusion.guidance import WITH_PICTURES, Branch
from unialignment.reranking import Reranker
from unialignment.serving.batches import Batcher, Known
from unialignment.serving.jobs import EmbedJob, Job, Sample
from unialignment.serving.plans import ImagePlan
from unialignment.serving.requests import Preview

if TYPE_CHECKING:
    from unialignment.pipeline import UniAlignmentPipeline

Item = TypeVar("Item")


class Scheduler:
    """The requests being computed.

    Args:
        pipe: The model.
        max_rows: Most rows of a forward pass.
        done: Called with a job and its result.
        failed: Called with a job and its error.

    Attributes:
        jobs: Active ones, oldest first.
        step_seconds: Mean duration of a round, lately.
    """

    def __init__(
        self,
        pipe: UniAlignmentPipeline,
        max_rows: int,
        done: Callable[[Job | EmbedJob, object], None],
        failed: Callable[[Job | EmbedJob, BaseException], None],
    ) -> None:
        self.pipe, self.max_rows = pipe, max_rows
        self.batcher = Batcher(pipe, max_rows)
        self.jobs: list[Job | EmbedJob] = []
        self.step_seconds = 0.0
        self._done, self._failed = done, failed

    def remove(self, job: Job | EmbedJob) -> None:
        """Stop computing a job."""
        self.jobs = [one for one in self.jobs if one is not job]
        if not self.jobs:
            self.batcher.forget()

    def rows(self, target: str) -> int:
        """Rows that active jobs with this kind of target (``"image"``, ``"text"``) take."""
        return sum(job.plan.rows for job in self.jobs if isinstance(job, Job) and job.plan.task.target == target)

    @torch.no_grad()
    def round(self) -> None:
        """One step of everything."""
        started = time.monotonic()
        self._start([job for job in self.jobs if isinstance(job, Job) and not job.samples])
        self._step()
        self._preview()
        self._finish()
        self._embed([job for job in self.jobs if isinstance(job, EmbedJob)])
        self.step_seconds += 0.1 * (time.monotonic() - started - self.step_seconds)

    # ------------------------------------------------------------------------------------------------------- its parts

    def _fail(self, job: Job | EmbedJob, error: BaseException) -> None:
        if any(one is job for one in self.jobs):
            self.remove(job)
            self._failed(job, error)

    def _each(
        self, items: Sequence[Item], work: Callable[[Sequence[Item]], None], job_of: Callable[[Item], Job]
    ) -> None:
        """Do work on all items at once; if that fails, on halves, so that an error is that of one job."""
        if not items:
            return
        try:
            work(items)
            return
        except Exception as error:
            if len({id(job_of(item)) for item in items}) == 1:
                self._fail(job_of(items[0]), error)
                return
        middle = len(items) // 2
        self._each(items[:middle], work, job_of)
        self._each(items[middle:], work, job_of)

    def _start(self, jobs: list[Job]) -> None:
        """Encode the conditions of jobs that have just joined."""

        def work(chosen: Sequence[Job]) -> None:
            latents = self._encode([picture for job in chosen for picture in job.plan.pictures])
            texts, images, owners = [], [], []
            for job in chosen:
                own = tuple(latents[id(picture)] for picture in job.plan.pictures)
                for branch, text in job.texts():
                    texts.append(text)
                    images.append(own if branch in WITH_PICTURES else ())
                    owners.append((job, branch))
            known = self.batcher.encode(texts, images)
            for job in chosen:
                found: dict[Branch, list[Known]] = defaultdict(list)
                for (owner, branch), one in zip(owners, known, strict=True):
                    if owner is job:
                        found[branch].append(one)
                job.start(found)

        self._each(jobs, work, lambda job: job)

    def _encode(self, pictures: list[Image.Image]) -> dict[int, torch.Tensor]:
        by_size: dict[tuple[int, int], list[Image.Image]] = defaultdict(list)
        for picture in {id(one): one for one in pictures}.values():
            by_size[picture.size].append(picture)
        found: dict[int, torch.Tensor] = {}
        for group in by_size.values():
            for start in range(0, len(group), self.max_rows):
                chunk = group[start : start + self.max_rows]
                found.update(zip((id(one) for one in chunk), self.pipe.encode_images(chunk).split(1), strict=True))
        return found

    def _step(self) -> None:
        samples = [sample for job in self.jobs if isinstance(job, Job) for sample in job.open_samples()]
        if not samples:
            return
        rows = [(sample, row) for sample in samples for row in sample.rows()]
        answers = self.batcher.predict([row for _, row in rows])
        gathered: dict[int, list[torch.Tensor | Exception]] = defaultdict(list)
        for (sample, _), answer in zip(rows, answers, strict=True):
            gathered[id(sample)].append(answer)
        for sample in samples:
            own = gathered[id(sample)]
            error = next((one for one in own if isinstance(one, Exception)), None)
            try:
                if error is not None:
                    raise error
                sample.answer([one for one in own if isinstance(one, torch.Tensor)])
            except Exception as problem:
                self._fail(sample.job, problem)

    def _preview(self) -> None:
        due = [s for job in self.jobs if isinstance(job, Job) for s in job.samples if s.preview is not None]

        def work(samples: Sequence[Sample]) -> None:
            latents = [sample.preview[1] for sample in samples if sample.preview is not None]
            for sample, picture in zip(samples, self.pipe.decode_latents(torch.cat(latents)), strict=True):
                assert sample.preview is not None
                assert isinstance(sample.job.plan, ImagePlan)
                box, number = sample.job.plan.content, sample.preview[0]
                picture = picture.crop(box) if box is not None else picture
                sample.job.handle.emit(Preview(sample.index, sample.step, sample.job.steps, picture, number))
                sample.preview = None

        for group in _alike(due, self.max_rows):
            self._each(group, work, lambda sample: sample.job)

    def _finish(self) -> None:
        """Turn samples that are done into results."""
        over = [job for job in self.jobs if isinstance(job, Job) and job.samples and not job.open_samples()]
        drawn = [sample for job in over if isinstance(job.plan, ImagePlan) for sample in job.samples]

        def work(samples: Sequence[Sample]) -> None:
            latents = torch.cat([sample.finished for sample in samples if sample.finished is not None])
            for sample, picture in zip(samples, self.pipe.decode_latents(latents), strict=True):
                assert isinstance(sample.job.plan, ImagePlan)
                box = sample.job.plan.content
                sample.job.pictures[sample.index] = picture.crop(box) if box is not None else picture

        for group in _alike(drawn, self.max_rows):
            self._each(group, work, lambda sample: sample.job)
        for job in over:
            if not any(one is job for one in self.jobs):
                continue  # failed just now
            try:
                if isinstance(job.plan, ImagePlan) and job.plan.compared is not None:
                    self._score(job, job.plan.compared)
                result = job.image_result() if isinstance(job.plan, ImagePlan) else job.text_result()
            except Exception as error:
                self._fail(job, error)
                continue
            self.remove(job)
            self._done(job, result)

    def _score(self, job: Job, text: str) -> None:
        """Similarity of each drawn picture to a text, as ``best_of`` needs it."""
        job.ranking = Reranker(self.pipe, [text], len(job.samples))
        latents = torch.cat([sample.finished for sample in job.samples if sample.finished is not None])
        job.ranking.see(range(len(job.samples)), latents)

    def _embed(self, jobs: list[EmbedJob]) -> None:
        if not jobs:
            return
        texts = [(job, text) for job in jobs for text in job.waiting_texts()][: self.max_rows]
        pictures = [(job, picture) for job in jobs for picture in job.waiting_pictures()][: self.max_rows]
        try:
            if texts:
                vectors = self.pipe.embed_text([text for _, text in texts])
                for (job, _), vector in zip(texts, vectors, strict=True):
                    job.texts.append(vector)
            if pictures:
                vectors = self.pipe.embed_latents(self.pipe.encode_images([picture for _, picture in pictures]))
                for (job, _), vector in zip(pictures, vectors, strict=True):
                    job.images.append(vector)
        except Exception as error:  # inputs were checked before, so this is the engine's trouble, not one request's
            for job in jobs:
                self._fail(job, error)
        for job in jobs:
            if any(one is job for one in self.jobs) and job.done:
                self.remove(job)
                self._done(job, job.result())


def _alike(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Samples with latents of one shape, ``size`` at most."""
    groups: dict[object, list[Sample]] = defaultdict(list)
    for sample in samples:
        assert isinstance(sample.job.plan, ImagePlan)
        groups[sample.job.plan.shape].append(sample)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]
