"""Few-step students: a trained model taught to draw in a few unguided steps what it drew in many guided ones.

Two stages, both published. *Guidance distillation* (Meng et al., arXiv 2210.03142, section 3.1): one pass of the
student learns the guided combination of the teacher's two. *Progressive distillation* (Salimans & Ho, arXiv
2202.00512): one step of the student learns two of the teacher's, and the student becomes the next teacher, halving the
steps each time. Texts are held where they were by the divergence from the original model's predictions.

Knows nothing of where batches come from, nor of evaluation.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unialignment.diffusion import FlowPath, Guidance, MaskedPath, shift_sigma, sigma_schedule
from unialignment.errors import ConfigError, UniAlignmentError
from unialignment.model.tokenizer import encode_conditions
from unialignment.model.transformer import UniAlignmentTransformer
from unialignment.pipeline import UniAlignmentPipeline
from unialignment.storage import storage_error, write_text
from unialignment.training.batching import Batch
from unialignment.training.checkpoint import (
    CheckpointStore,
    flatten_optimizer,
    restore_optimizer,
    with_prefix,
    without_prefix,
)
from unialignment.training.ema import ExponentialMovingAverage
from unialignment.training.runtime import autocast
from unialignment.training.schedule import learning_rate_factor

Source = Callable[[int], list[Batch]]
"""The batches of update ``i``, a function of ``i`` alone."""


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        steps: Steps of the student; ``None``: guidance distillation, at all noise levels.
        updates: Optimizer steps.
    """

    steps: int | None
    updates: int

    @property
    def name(self) -> str:
        """For logs."""
        return "guidance" if self.steps is None else f"{2 * self.steps} to {self.steps} steps"


@dataclass(frozen=True)
class DistillSettings:
    """How to distil.

    Attributes:
        stages: In order; guidance first, then halving step counts.
        guidance: Guidance scale by task; where absent the model's own default.
        shift: Resolution shift of the noise levels, for training and for the student's sampler.
        lr: Base learning rate of each stage (warm-up, then linear to ``final``).
        warmup: Updates of warm-up.
        final: Last learning rate, as a fraction.
        clip: Largest gradient norm.
        ema: Decay of the average that becomes the next teacher and, last, the student.
        keep: Weight of the texts' divergence.
        precision: ``"fp32"`` or ``"bf16"`` (autocast).
        checkpoint_every: Updates between checkpoints.
        log_every: Updates between log lines.
        seed: Of noise and times.

    Raises:
        ConfigError: the stages aren't in order, or a number is out of range.
    """

    stages: tuple[Stage, ...]
    guidance: Mapping[str, float]
    shift: float = 1.0
    lr: float = 3e-4
    warmup: int = 20
    final: float = 0.1
    clip: float = 1.0
    ema: float = 0.99
    keep: float = 1.0
    precision: str = "fp32"
    checkpoint_every: int = 200
    log_every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        counts = [stage.steps for stage in self.stages if stage.steps is not None]
        if not self.stages or any(stage.updates < 1 for stage in self.stages):
            raise ConfigError("stages: give at least one, each with at least one update")
        if any(stage.steps is None for stage in self.stages[1:]):
            raise ConfigError("stages: guidance distillation comes first, its student is what is then halved")
        if any(after * 2 != before for before, after in pairwise(counts)):
            raise ConfigError(f"stages: each must have half the steps of the one before, got {counts}")
        if self.stages[0].steps is not None:
            raise ConfigError("stages: the first must distil guidance, so that a step of the student is one pass")


class Distiller:
    """Trains a student of a pipeline's model.

    Args:
        pipe: The teacher, with its tokenizer, text embedder and autoencoder, which the student keeps.
        source: Batches.
        settings: How.
        folder: Run folder: checkpoints, ``metrics.jsonl``, and at the end the student in ``model``.
        say: Receives one line now and then.
    """

    def __init__(
        self,
        pipe: UniAlignmentPipeline,
        source: Source,
        settings: DistillSettings,
        folder: Path,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.pipe, self.source, self.settings, self.folder, self.say = pipe, source, settings, folder, say
        self.original = pipe.transformer.eval().requires_grad_(False)
        self.teacher = self.original
        self.student = copy.deepcopy(self.original).requires_grad_(True)
        self.masked = MaskedPath(pipe.tokenizer.mask_token_id)
        self.flow = FlowPath(shift=settings.shift)
        self.store = CheckpointStore(folder / "checkpoints", keep=1)
        self.stage = self.update = 0
        self._begin()

    # -------------------------------------------------------------------------------------------------- the whole run

    def run(self) -> Path:
        """Distil through all stages, from the last checkpoint if there is one; returns the student's folder.

        Raises:
            ConfigError: the folder holds a run of other stages.
            StorageError: something could not be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(self.folder, error) from error
        self.resume()
        stages = self.settings.stages
        while self.stage < len(stages):
            stage = stages[self.stage]
            self.say(f"{stage.name}: {stage.updates} updates")
            window: list[dict[str, float]] = []
            while self.update < stage.updates:
                window.append(self.train_update(stage))
                self.update += 1
                if self.update % self.settings.log_every == 0 or self.update == stage.updates:
                    self._log(stage, window)
                    window = []
                if self.update % self.settings.checkpoint_every == 0 and self.update < stage.updates:
                    self.save()
            self._finish_stage()
            self.save()
        return self.export()

    def _begin(self) -> None:
        """Optimizer and average of a stage that starts from the present student."""
        self.optimizer = torch.optim.AdamW(
            [p for p in self.student.parameters() if p.requires_grad],
            lr=self.settings.lr,
            betas=(0.9, 0.99),
            weight_decay=0.0,
        )
        self.ema = ExponentialMovingAverage(self.student, self.settings.ema)

    def _finish_stage(self) -> None:
        self.ema.copy_to_model()
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.stage, self.update = self.stage + 1, 0
        self._begin()

    def export(self) -> Path:
        """Writes the student as a model folder, whose sampler defaults are the few unguided steps."""
        steps = self.settings.stages[-1].steps
        tasks = [task for task in self.pipe.tasks.names if self.pipe.tasks.get(task).target == "image"]
        sampling = {task: dict(values) for task, values in self.pipe.sampling.items()}
        for task in tasks:
            few = {"guidance_scale": 1.0, "image_guidance_scale": 1.0, "solver": "euler", "shift": self.settings.shift}
            sampling[task] = {
                **sampling.get(task, {}),
                **few,
                **({} if steps is None else {"num_inference_steps": steps}),
            }
        student = UniAlignmentPipeline(
            self.student.eval(),
            self.pipe.text_embedder,
            self.pipe.autoencoder,
            self.pipe.tokenizer,
            name=f"{self.pipe.name}-{'guided' if steps is None else f'{steps}-step'}",
            sampling=sampling,
            tasks=self.pipe.tasks,
        )
        student.save_pretrained(self.folder / "model")
        return self.folder / "model"

    # ------------------------------------------------------------------------------------------------------ one update

    def train_update(self, stage: Stage) -> dict[str, float]:
        """One optimizer step; returns the losses.

        Raises:
            UniAlignmentError: the loss isn't finite.
        """
        number = sum(earlier.updates for earlier in self.settings.stages[: self.stage]) + self.update
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + number)
        factor = learning_rate_factor(
            self.update, self.update / stage.updates, self.settings.warmup, "linear", self.settings.final
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * factor
        self.student.train()
        logs: dict[str, float] = {}
        batches = self.source(number)
        total = sum(len(batch) for batch in batches)
        for batch in batches:
            with autocast(self.pipe.device, self.settings.precision):
                if batch.target == "image":
                    loss = self.image_loss(batch, stage, generator)
                else:
                    loss = self.settings.keep * self.text_loss(batch, generator)
            share = len(batch) / total
            (loss * share).backward()
            logs[batch.target] = logs.get(batch.target, 0.0) + share * float(loss.detach())
        if not all(math.isfinite(value) for value in logs.values()):
            raise UniAlignmentError(
                f"the loss of update {number} ({stage.name}) isn't finite: {logs}. Use a lower lr or precision=fp32; "
                "the same command resumes from the last checkpoint."
            )
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        return logs

    def image_loss(self, batch: Batch, stage: Stage, generator: torch.Generator) -> Tensor:
        """Mean squared error between the student's velocity and the stage's target, over the batch."""
        with torch.no_grad():
            assert batch.target_images is not None
            encode, count = self.pipe.autoencoder.encode, len(batch)
            target = encode(batch.target_images).float()
            prompt, mask, pictures = self._conditions(batch)
            noise = torch.randn(target.shape, generator=generator).to(target)
            wanted_at = self._teacher(batch, prompt, mask, pictures, guided=stage.steps is None)
            if stage.steps is None:
                # One draw from each of equally likely intervals: a batch covers all levels.
                uniform = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
                sigma = shift_sigma(uniform, self.settings.shift).to(target)
                x = torch.lerp(target, noise, sigma.view(-1, 1, 1, 1))
                wanted = wanted_at(x, sigma)
            else:
                grid = torch.tensor(sigma_schedule(2 * stage.steps, self.settings.shift)).to(target)
                step = 2 * torch.randint(stage.steps, (count,), generator=generator).to(target.device)
                sigma, middle, there = (grid[step + k].view(-1, 1, 1, 1) for k in range(3))
                x = torch.lerp(target, noise, sigma)
                first = wanted_at(x, sigma.flatten())
                second = wanted_at(x + (middle - sigma) * first, middle.flatten())
                # The slope of the straight line to where two of the teacher's steps arrive.
                wanted = ((middle - sigma) * first + (there - middle) * second) / (there - sigma)
                sigma = sigma.flatten()
        found = _velocity(self.student, prompt, mask, pictures)(x, sigma)
        return F.mse_loss(found, wanted)

    def text_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Kullback-Leibler divergence of the student's word predictions from the original model's, at masked places."""
        assert batch.target_ids is not None
        with torch.no_grad():
            prompt, mask, sources = self._conditions(batch)
            time = self.masked.sample_time(len(batch), generator)
            path = self.masked.sample_path(batch.target_ids, time, generator, batch.maskable)
            noised = self.pipe.text_embedder.embed(path.noised, None).to(self.pipe.dtype)
        given: dict[str, Any] = {
            "text_embeds": noised,
            "latents": sources[0] if sources else None,
            "sources": sources[1:],
            "condition_text_embeds": prompt,
            "condition_text_mask": mask,
            "timestep": torch.zeros(len(batch), device=prompt.device),
            "target": "text",
            "logit_positions": path.corrupted,
            "condition_features": False,
        }
        with torch.no_grad():
            wanted = self.original(**given).text_logits.float().log_softmax(-1)
        found = self.student(**given).text_logits.float().log_softmax(-1)
        # The mean over masked places; none may be masked.
        return F.kl_div(found, wanted, log_target=True, reduction="sum") / max(1, len(found))

    @torch.no_grad()
    def _conditions(self, batch: Batch) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Embedded prompts, their mask, and latents of the condition pictures."""
        prompt = self.pipe.text_embedder.embed(batch.prompt_ids, batch.prompt_mask).to(self.pipe.dtype)
        encode = self.pipe.autoencoder.encode
        return prompt, batch.prompt_mask, tuple(encode(source).to(self.pipe.dtype) for source in batch.sources)

    def _teacher(
        self, batch: Batch, prompt: Tensor, mask: Tensor, pictures: tuple[Tensor, ...], guided: bool
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The velocity that is to be learned from; each sample guided by its own task's scale."""
        full = _velocity(self.teacher, prompt, mask, pictures)
        scales = torch.tensor([self._scale(task) if guided else 1.0 for task in batch.tasks], device=prompt.device)
        if not bool((scales != 1.0).any()):
            return full
        ids, empty = encode_conditions(self.pipe.tokenizer, [""] * len(batch))
        ids, empty = ids.to(prompt.device), empty.to(prompt.device)
        embedded = self.pipe.text_embedder.embed(ids, empty).to(prompt.dtype)
        without = _velocity(self.teacher, embedded, empty, pictures)
        weight = scales.view(-1, 1, 1, 1)
        return lambda x, sigma: torch.lerp(without(x, sigma), full(x, sigma), weight)

    def _scale(self, task: str) -> float:
        own = {**self.pipe.tasks.get(task).sampling, **self.pipe.sampling.get(task, {})}.get("guidance_scale", 1.0)
        scale = float(self.settings.guidance.get(task, own))
        Guidance(scale)  # refuses what isn't a scale
        return scale

    # ------------------------------------------------------------------------------------------- logs and checkpoints

    def _log(self, stage: Stage, window: list[dict[str, float]]) -> None:
        means = {key: sum(row.get(key, 0.0) for row in window) / len(window) for key in window[0]}
        entry = {"stage": stage.name, "update": self.update, **means}
        path = self.folder / "metrics.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise storage_error(path, error) from error
        self.say(f"{stage.name} {self.update}/{stage.updates}: " + ", ".join(f"{k} {v:.5f}" for k, v in means.items()))

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            StorageError: it could not be written.
        """
        tensors, plain = flatten_optimizer(self.optimizer)
        average = self.ema.state_dict()
        self.store.save(
            self.stage * 1_000_000 + self.update,
            {
                **with_prefix("student.", self.student.state_dict()),
                **with_prefix("teacher.", self.teacher.state_dict()),
                **with_prefix("ema.", {k: v for k, v in average.items() if isinstance(v, Tensor)}),
                **with_prefix("optimizer.", tensors),
            },
            {
                "stage": self.stage,
                "update": self.update,
                "optimizer": plain,
                "ema_updates": average["updates"],
                "stages": [[stage.steps, stage.updates] for stage in self.settings.stages],
            },
        )
        write_text(self.folder / "stages.json", json.dumps([stage.name for stage in self.settings.stages]) + "\n")

    def resume(self) -> bool:
        """Continue from the latest checkpoint, if there is one.

        Raises:
            ConfigError: it is of a run with other stages.
        """
        latest = self.store.latest()
        if latest is None:
            return False
        tensors, state = self.store.load(latest)
        if state["stages"] != [[stage.steps, stage.updates] for stage in self.settings.stages]:
            raise ConfigError(f"{self.folder} holds a run with other stages; use another folder, or remove that one")
        self.student.load_state_dict(without_prefix("student.", tensors))
        self.teacher = copy.deepcopy(self.original)
        self.teacher.load_state_dict(without_prefix("teacher.", tensors))
        self.stage, self.update = int(state["stage"]), int(state["update"])
        self._begin()
        self.ema.load_state_dict({**without_prefix("ema.", tensors), "updates": state["ema_updates"]})
        restore_optimizer(self.optimizer, without_prefix("optimizer.", tensors), state["optimizer"])
        self.say(f"resumed in stage {self.stage + 1}, update {self.update}")
        return True


def _velocity(
    model: UniAlignmentTransformer, prompt: Tensor, mask: Tensor, pictures: tuple[Tensor, ...]
) -> Callable[[Tensor, Tensor], Tensor]:
    """``(x [B, C, H, W], σ [B]) -> velocity`` of a model, its conditions encoded once where they can be."""
    if model.config.attention_mode == "prefix":
        cache = model.prefill(text_embeds=prompt, text_mask=mask, images=pictures)
        return lambda x, sigma: model.denoise(
            cache, latents=x.to(prompt.dtype), timestep=1000.0 * sigma
        ).velocity.float()  # type: ignore[union-attr]
    return lambda x, sigma: model(
        text_embeds=prompt,
        text_mask=mask,
        latents=x.to(prompt.dtype),
        sources=pictures,
        timestep=1000.0 * sigma,
        target="image",
    ).velocity.float()
