"""Few-step students: a trained model taught to draw in a few unguided steps what it draws in many guided ones.

*Piecewise rectified flow* (PeRFlow, Yan et al., arXiv 2405.07510): the way from noise to picture is cut into K windows,
and in each the student learns the straight line from where the teacher's guided solution enters it to where it leaves.
Unlike there, windows are those of whole trajectories from noise, computed ahead and kept (as Luhman & Luhman,
arXiv 2101.02388, do for one step): see :mod:`~unialignment.training.distill_trajectories` for why. The classifier-free
guidance of the teacher is in the trajectories, so one pass of the student stands for two (Meng et al., arXiv
2210.03142). Stages go from more windows to fewer, on the same trajectories: the first mostly learns guidance, later
ones to go straight. Texts are held where they were by the divergence from the original model's predictions.

Knows nothing of where batches come from, nor of evaluation.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unialignment.diffusion import MaskedPath
from unialignment.errors import ConfigError, InputError, UniAlignmentError
from unialignment.inputs import merge_options
from unialignment.model import UniAlignmentTransformer
from unialignment.pipeline import UniAlignmentPipeline
from unialignment.storage import storage_error, write_text
from unialignment.tasks import TASKS
from unialignment.training.batching import Batch
from unialignment.training.checkpoint import (
    CheckpointStore,
    flatten_optimizer,
    restore_optimizer,
    with_prefix,
    without_prefix,
)
from unialignment.training.config import OptimizerSection
from unialignment.training.distill_trajectories import (
    Source,
    Teacher,
    Trajectories,
    TrajectoryStore,
    compute,
    velocity_of,
)
from unialignment.training.ema import ExponentialMovingAverage
from unialignment.training.optimizer import build_optimizer
from unialignment.training.runtime import autocast
from unialignment.training.schedule import learning_rate_factor


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        steps: Steps of the student.
        updates: Optimizer steps.
    """

    steps: int
    updates: int

    @property
    def name(self) -> str:
        """For logs."""
        return f"{self.steps} steps"


@dataclass(frozen=True)
class DistillSettings:
    """How to distil.

    Attributes:
        stages: In order; each has fewer steps than the one before, whose number they divide.
        trajectories: Files of trajectories to compute; the first is held out.
        guidance: Guidance scale by task; where absent the model's own default.
        shift: Resolution shift of the noise levels; ``None``: each task's own.
        draws: Windows of each trajectory in an update, which share its conditions.
        weighting: What of a window's error counts: ``"arrival"``: that of where its step arrives, (K·Δσ)² times the
            velocity's, 1 where levels are even; right for students that go these very steps. ``"velocity"``: the
            velocity's own at every level. With a shift the steps at high noise are short, and the former hardly weighs
            them (a thirteenth of the mean at σ = 1 with shift 3); but the stochastic sampler goes by x̂ = x − σ·v alone,
            and it is there that layouts are decided.
        budget_seconds: Wall clock for everything, over all sessions; ``None``: the counts alone decide.
        draw_share: Share of the budget for trajectories.
        optimizer: ``"adamw"`` or ``"muon"``.
        lr: Base learning rate of each stage (warm-up, then linear to ``final``).
        warmup: Updates of warm-up.
        final: Last learning rate, as a fraction.
        clip: Largest gradient norm.
        ema: Decay of the average that becomes the student.
        keep: Weight of the texts' divergence.
        precision: ``"fp32"`` or ``"bf16"`` (autocast).
        checkpoint_every: Updates between checkpoints.
        log_every: Updates between log lines.
        seed: Of noise and order.
        sampler: Defaults that the students carry instead of as many Euler steps as they have windows, see
            :func:`sampler_of`. A student of the teacher's own number of steps has learned guidance only, and may be
            sampled as the teacher may.

    Raises:
        ConfigError: the stages aren't in order, a number is out of range, or the sampler has options that can't be.
    """

    stages: tuple[Stage, ...]
    trajectories: int
    guidance: Mapping[str, float]
    shift: float | None = None
    draws: int = 4
    weighting: Literal["arrival", "velocity"] = "arrival"
    budget_seconds: float | None = None
    draw_share: float = 0.4
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-4
    warmup: int = 20
    final: float = 0.1
    clip: float = 1.0
    ema: float = 0.99
    keep: float = 1.0
    precision: str = "fp32"
    checkpoint_every: int = 50
    log_every: int = 20
    seed: int = 0
    sampler: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = [stage.steps for stage in self.stages]
        if not self.stages or any(stage.updates < 1 or stage.steps < 1 for stage in self.stages):
            raise ConfigError("stages: give at least one, each with at least one step and one update")
        if any(after >= before or before % after for before, after in pairwise(counts)):
            raise ConfigError(f"stages: each must have fewer steps, dividing those of the one before, got {counts}")
        if self.trajectories < 2:
            raise ConfigError("trajectories: at least 2 files are needed, one of them held out")
        if not 0 < self.draw_share < 1 or (self.budget_seconds is not None and self.budget_seconds <= 0):
            raise ConfigError("budget_seconds must be positive, and draw_share between 0 and 1")
        try:
            check_sampler(self.sampler)
        except InputError as error:
            raise ConfigError(str(error)) from None


def sampler_of(sampler: Mapping[str, Any], task: str) -> dict[str, Any]:
    """A task's options of ``DistillSettings.sampler``: those of all that draw, if it does, and those under its name."""
    common = {key: value for key, value in sampler.items() if key not in TASKS.names}
    return (common if TASKS.get(task).target == "image" else {}) | dict(sampler.get(task, {}))


def check_sampler(sampler: Mapping[str, Any]) -> None:
    """Whether tasks can be sampled like this; seen before hours of distilling rather than after.

    Raises:
        InputError: an unknown option, or something else than options.
    """
    for task in map(TASKS.get, TASKS.names):
        own = sampler.get(task.name, {})
        if not isinstance(own, Mapping):
            raise InputError(f"sampler: under {task.name} expected options like {{shift: 3.0}}, got {own!r}")
        try:
            merge_options(task, {}, sampler_of(sampler, task.name))
        except InputError as error:
            raise InputError(f"sampler: {error}") from None


class Distiller:
    """Trains a student of a pipeline's model.

    Args:
        pipe: The teacher, with its tokenizer, text embedder and autoencoder, which the student keeps.
        source: Batches.
        settings: How.
        folder: Run folder: trajectories, checkpoints, ``metrics.jsonl``, and a student ``model-<steps>`` of each stage.
        say: Receives one line now and then.
        initial: Transformer that the student starts from; default: the teacher's.

    Raises:
        ConfigError: ``initial`` has other tensors than the teacher's transformer.
    """

    def __init__(
        self,
        pipe: UniAlignmentPipeline,
        source: Source,
        settings: DistillSettings,
        folder: Path,
        say: Callable[[str], None] = lambda _: None,
        initial: UniAlignmentTransformer | None = None,
    ) -> None:
        self.pipe, self.source, self.settings, self.folder, self.say = pipe, source, settings, folder, say
        self.original = pipe.transformer.eval().requires_grad_(False)
        self.student = copy.deepcopy(self.original).requires_grad_(True)
        if initial is not None:
            try:
                self.student.load_state_dict(initial.state_dict())
            except RuntimeError as error:
                raise ConfigError(
                    "initial: its transformer has other tensors than the teacher's; name a student of this teacher, or "
                    f"of one of the same sizes ({str(error).splitlines()[-1].strip()})"
                ) from None
        self.masked = MaskedPath(pipe.tokenizer.mask_token_id)
        self.teacher = Teacher(pipe, settings.stages[0].steps, settings.guidance, settings.shift)
        self.store = CheckpointStore(folder / "checkpoints", keep=1)
        self.files = 0
        self.stage = self.update = 0
        self.spent = 0.0
        self._begin()

    # -------------------------------------------------------------------------------------------------- the whole run

    def run(self) -> list[Path]:
        """Distil through all stages, from where an earlier session stopped; returns the students' folders.

        Raises:
            ConfigError: the folder holds a run of another teacher or other stages.
            StorageError: something could not be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(self.folder, error) from error
        settings = self.settings
        self.trajectories = TrajectoryStore(
            self.folder / "trajectories", {**self.teacher.describe(), "seed": settings.seed}
        )
        budget = settings.budget_seconds
        with autocast(self.pipe.device, settings.precision):
            self.files = compute(
                self.teacher,
                self.trajectories,
                self.source,
                settings.trajectories,
                settings.seed,
                None if budget is None else budget * settings.draw_share,
                self.say,
            )
        self.resume()
        while self.stage < len(settings.stages):
            self._run_stage(settings.stages[self.stage])
        return [self.place(stage) for stage in settings.stages]

    def place(self, stage: Stage) -> Path:
        """Where a stage's student is written."""
        return self.folder / f"model-{stage.steps}"

    def _run_stage(self, stage: Stage) -> None:
        self.say(f"{stage.name}: up to {stage.updates} updates, held-out error {self.held_out(stage):.5f} before")
        window: list[dict[str, float]] = []
        while (progress := self._progress(stage)) < 1.0:
            began = time.perf_counter()
            window.append(self.train_update(stage, progress))
            self.update, self.spent = self.update + 1, self.spent + time.perf_counter() - began
            last = self._progress(stage) >= 1.0
            if self.update % self.settings.log_every == 0 or last:
                self._log(stage, window)
                window = []
            if self.update % self.settings.checkpoint_every == 0 and not last:
                self.save()
        self.ema.copy_to_model()
        error = self.held_out(stage)
        self._write_log({"stage": stage.name, "update": self.update, "held_out": error})
        self.say(f"{stage.name}: {self.update} updates, held-out error {error:.5f}")
        self.export(stage)
        self.stage, self.update, self.spent = self.stage + 1, 0, 0.0
        self._begin()
        self.save()

    def _progress(self, stage: Stage) -> float:
        """How much of a stage is done: of its updates or of its time, whichever is more."""
        budget, done = self.settings.budget_seconds, self.update / stage.updates
        if budget is None:
            return done
        share = stage.updates / sum(each.updates for each in self.settings.stages)
        return max(done, self.spent / (budget * (1 - self.settings.draw_share) * share))

    def _begin(self) -> None:
        """Optimizer and average of a stage that starts from the present student."""
        section = OptimizerSection(name=self.settings.optimizer, lr=self.settings.lr, weight_decay=0.0)
        self.optimizer = build_optimizer(self.student, section)
        self.ema = ExponentialMovingAverage(self.student, self.settings.ema)

    def export(self, stage: Stage) -> Path:
        """Writes the student as a model folder, whose sampler defaults are the few unguided steps."""
        sampling = {task: dict(values) for task, values in self.pipe.sampling.items()}
        for task in self.teacher.scales:
            few = {"guidance_scale": 1.0, "image_guidance_scale": 1.0, "solver": "euler"}
            few |= {"shift": self.teacher.shifts[task], "num_inference_steps": stage.steps}
            sampling[task] = {**sampling.get(task, {}), **few, **sampler_of(self.settings.sampler, task)}
        for task in TASKS.names:
            if TASKS.get(task).target == "text" and (own := sampler_of(self.settings.sampler, task)):
                sampling[task] = {**sampling.get(task, {}), **own}
        student = UniAlignmentPipeline(
            copy.deepcopy(self.student).eval(),
            self.pipe.text_embedder,
            self.pipe.autoencoder,
            self.pipe.tokenizer,
            name=f"{self.pipe.name}-{stage.steps}-step",
            sampling=sampling,
            tasks=self.pipe.tasks,
        )
        student.save_pretrained(self.place(stage))
        return self.place(stage)

    # ------------------------------------------------------------------------------------------------------ one update

    def train_update(self, stage: Stage, progress: float) -> dict[str, float]:
        """One optimizer step at ``progress`` (0-1) of a stage; returns the losses.

        Raises:
            UniAlignmentError: the loss isn't finite.
        """
        number = sum(earlier.updates for earlier in self.settings.stages[: self.stage]) + self.update
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + number)
        factor = learning_rate_factor(self.update, progress, self.settings.warmup, "linear", self.settings.final)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * factor
        self.student.train()
        logs: dict[str, float] = {}
        pictures = self.trajectories.read(self._file(number))
        texts = self.source(number, "text") if self.settings.keep else []
        total = {"image": sum(map(len, pictures)), "text": sum(map(len, texts))}

        def learn(kind: str, loss: Tensor, count: int, weight: float) -> None:
            (weight * loss * (count / total[kind])).backward()
            logs[kind] = logs.get(kind, 0.0) + count / total[kind] * float(loss.detach())

        for part in pictures:
            with autocast(self.pipe.device, self.settings.precision):
                loss = self.window_loss(part, stage, self.settings.draws, generator)
            learn("image", loss, len(part), 1.0)
        for batch in texts:
            with autocast(self.pipe.device, self.settings.precision):
                loss = self.text_loss(batch, generator)
            learn("text", loss, len(batch), self.settings.keep)
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

    def _file(self, number: int) -> int:
        """The file of update ``number``: all but the first, in another order each epoch."""
        epoch, place = divmod(number, self.files - 1)
        order = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        return 1 + int(torch.randperm(self.files - 1, generator=order)[place])

    def window_loss(
        self, part: Trajectories, stage: Stage, draws: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Mean squared error of the student's velocity against each window's slope, ``(x_there − x_here) / Δσ``.

        Windows weigh by ``DistillSettings.weighting``.

        Args:
            part: Trajectories.
            stage: Whose windows; each is as many of the stored ones as the first stage has more.
            draws: Windows of each trajectory, at most all.
            generator: Chooses them; ``None``: all of them.
        """
        device, count = self.pipe.device, len(part)
        inner = (len(part.grid) - 1) // stage.steps
        draws = stage.steps if generator is None else min(draws, stage.steps)
        order = torch.rand(count, stage.steps, generator=generator) if generator else torch.zeros(count, stage.steps)
        # `rows` is whose conditions each has: sample by sample, its windows side by side.
        windows = order.argsort(dim=1, stable=True)[:, :draws].flatten()
        rows = torch.arange(count).repeat_interleave(draws)
        here, there = inner * windows, inner * (windows + 1)
        sigma, arrived = part.grid[here].to(device), part.grid[there].to(device)
        x, target = part.points[here, rows].to(device), part.points[there, rows].to(device)
        change = (arrived - sigma).view(-1, 1, 1, 1)
        prompt, mask = self._prompt(part.prompt_ids, part.prompt_mask)
        pictures = tuple(source.to(device, self.pipe.dtype) for source in part.sources)
        velocity = velocity_of(self.student, prompt, mask, pictures, self.pipe.dtype)
        error = velocity(x, sigma, rows.to(device)) - (target - x) / change
        if self.settings.weighting == "arrival":
            error = error * change * stage.steps
        return error.square().mean()

    @torch.no_grad()
    def held_out(self, stage: Stage) -> float:
        """The windows' error on the held-out trajectories, with the student's present weights."""
        parts = self.trajectories.read(0)
        with autocast(self.pipe.device, self.settings.precision):
            losses = [float(self.window_loss(part, stage, stage.steps)) * len(part) for part in parts]
        return sum(losses) / sum(map(len, parts))

    def text_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Kullback-Leibler divergence of the student's word predictions from the original model's, at masked places."""
        assert batch.target_ids is not None
        with torch.no_grad():
            prompt, mask = self._prompt(batch.prompt_ids, batch.prompt_mask)
            sources = tuple(self.pipe.autoencoder.encode(source).to(self.pipe.dtype) for source in batch.sources)
            time_ = self.masked.sample_time(len(batch), generator)
            path = self.masked.sample_path(batch.target_ids, time_, generator, batch.maskable)
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
    def _prompt(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded condition texts and their mask."""
        ids, mask = ids.to(self.pipe.device), mask.to(self.pipe.device)
        return self.pipe.text_embedder.embed(ids, mask).to(self.pipe.dtype), mask

    # ------------------------------------------------------------------------------------------- logs and checkpoints

    def _log(self, stage: Stage, window: list[dict[str, float]]) -> None:
        means = {key: sum(row.get(key, 0.0) for row in window) / len(window) for key in window[0]}
        self._write_log({"stage": stage.name, "update": self.update, "seconds": round(self.spent, 1), **means})
        self.say(
            f"{stage.name} {self.update}/{stage.updates}, {self.spent:.0f} s: "
            + ", ".join(f"{key} {value:.5f}" for key, value in means.items())
        )

    def _write_log(self, entry: Mapping[str, Any]) -> None:
        path = self.folder / "metrics.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise storage_error(path, error) from error

    def _stages(self) -> list[list[int]]:
        return [[stage.steps, stage.updates] for stage in self.settings.stages]

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
                **with_prefix("ema.", {k: v for k, v in average.items() if isinstance(v, Tensor)}),
                **with_prefix("optimizer.", tensors),
            },
            {
                "stage": self.stage,
                "update": self.update,
                "spent": self.spent,
                "optimizer": plain,
                "ema_updates": average["updates"],
                "stages": self._stages(),
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
        if state["stages"] != self._stages():
            raise ConfigError(f"{self.folder} holds a run with other stages; use another folder, or remove that one")
        self.student.load_state_dict(without_prefix("student.", tensors))
        self.stage, self.update, self.spent = int(state["stage"]), int(state["update"]), float(state["spent"])
        self._begin()
        self.ema.load_state_dict({**without_prefix("ema.", tensors), "updates": state["ema_updates"]})
        restore_optimizer(self.optimizer, without_prefix("optimizer.", tensors), state["optimizer"])
        self.say(f"resumed in stage {self.stage + 1}, update {self.update}")
        return True
