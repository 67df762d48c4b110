"""Trains the unified transformer: ``python -m unialignment.training.loop configs/nano.yaml key=value``.

One optimizer step takes ``micro_batches`` micro-batches of the task mixture, averages their gradients, clips, updates
and moves the weight average. The run folder describes itself: resolved configuration, metrics, samples, checkpoints,
the averaged weights as a loadable model, and a summary. Knows nothing of losses (the objective's business), of how
samples are made, or of any task by name.
"""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from unialignment.errors import ConfigError, UniAlignmentError
from unialignment.storage import write_text
from unialignment.training import lora
from unialignment.training.batching import collate
from unialignment.training.build import build_objective, build_tokenizer, parameter_count
from unialignment.training.checkpoint import (
    CheckpointStore,
    flatten_optimizer,
    random_states,
    restore_optimizer,
    restore_random_states,
    with_prefix,
    without_prefix,
)
from unialignment.training.config import LoraSection, TransformerConfig, load_config, to_yaml
from unialignment.training.data import Prefetcher
from unialignment.training.ema import ExponentialMovingAverage
from unialignment.training.logging import Reporter, RunLog, grid
from unialignment.training.optimizer import build_optimizer
from unialignment.training.runtime import (
    StopRequest,
    autocast,
    choose_device,
    compile_if_faster,
    seed_everything,
    set_threads,
)
from unialignment.training.samples import Micro, StepSource, fill_teacher_cache, move, validation_samples
from unialignment.training.sampling import draw, to_pictures, write
from unialignment.training.schedule import Progress, learning_rate_factor
from unialignment.training.summary import summarise

RESUME_MUST_MATCH = ("world", "model", "lora", "text", "autoencoder", "mixture", "micro_batches", "teacher")
"""Sections that may not change when a run is resumed: weights or data position would lose their meaning."""


class Trainer:
    """One resumable run.

    Args:
        config: The run's configuration.
        console: Where to talk.

    Raises:
        ConfigError, CheckpointError, AssetError: something that the configuration names is unusable.
    """

    def __init__(self, config: TransformerConfig, console: Console | None = None) -> None:
        self.config = config
        self.console = console or Console(stderr=True)
        self.folder = config.run.folder
        self.device = choose_device(config.run.device)
        self.threads = set_threads(config.run.threads)
        seed_everything(config.run.seed)
        self.tokenizer = build_tokenizer(config, self.folder / "tokenizer")
        teacher_folder, teacher_dims = None, (0, 0)
        if config.teacher.name is not None:
            teacher_folder = config.teacher.cache or self.folder / "teacher"
            teacher_dims = fill_teacher_cache(config, teacher_folder, self._say)
        self.held_out = validation_samples(config, self.tokenizer)
        resolution = next(iter(self.held_out.values()))[0]
        picture = resolution.target_image if resolution.target_image is not None else resolution.sources[0]
        # Everything above may have drawn from the global generators; the weights follow from the seed alone.
        seed_everything(config.run.seed)
        self.objective = build_objective(config, self.tokenizer, picture.shape[0], teacher_dims, self._say)
        self.objective.to(self.device).train()
        self.objective.autoencoder.eval()
        self.trainable = self.objective.trainable()
        self.optimizer = build_optimizer(self.trainable, config.optimizer)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.ema = ExponentialMovingAverage(self.trainable, config.ema.decay, config.ema.warmup)
        self.progress = Progress(config.run.max_steps, config.run.budget_seconds)
        self.noise = torch.Generator().manual_seed(config.run.seed)
        self.store = CheckpointStore(self.folder / "checkpoints", config.run.keep_checkpoints)
        self.source = StepSource(config, self.folder / "tokenizer", teacher_folder)
        self.per_step = config.micro_batches * sum(config.mixture.values())
        self.skipped = 0
        self.replaced: dict[str, int] = defaultdict(int)
        self.validations: list[dict[str, float]] = []
        self.resumed_at: int | None = None

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save(self) -> Path:
        """Write a checkpoint: model, average, optimizer, schedule, random states, data position.

        Raises:
            StorageError: it could not be written; earlier ones are intact.
        """
        optimizer_tensors, optimizer_plain = flatten_optimizer(self.optimizer)
        random_tensors, random_plain = random_states()
        ema = self.ema.state_dict()
        tensors = {
            **with_prefix("model.", self._trained()),
            **with_prefix("ema.", {k: v for k, v in ema.items() if isinstance(v, Tensor)}),
            **with_prefix("optimizer.", optimizer_tensors),
            **with_prefix("random.", random_tensors),
            "noise": self.noise.get_state(),
        }
        state = {
            "progress": self.progress.state_dict(),
            "data_position": self.progress.step * self.config.micro_batches,
            "ema_updates": ema["updates"],
            "optimizer": optimizer_plain,
            "random": random_plain,
            "skipped": self.skipped,
            "replaced": dict(self.replaced),
            "validations": self.validations,
            "config": self.config.model_dump(mode="json"),
        }
        return self.store.save(self.progress.step, tensors, state)

    def _trained(self) -> dict[str, Tensor]:
        return lora.trained_state(self.trainable) if self.config.lora.rank else self.trainable.state_dict()

    def resume(self) -> bool:
        """Continue from the latest checkpoint in the run folder, if there is one.

        Raises:
            ConfigError: a section that must not change has changed.
        """
        latest = self.store.latest()
        if latest is None:
            return False
        tensors, state = self.store.load(latest)
        now = self.config.model_dump(mode="json")
        for section in RESUME_MUST_MATCH:
            if now[section] != state["config"].get(section, _absent(section)):
                raise ConfigError(
                    f"{self.folder} holds a run with another {section!r} section. Use a new run.dir, or run.fresh=true "
                    "to start over in this one."
                )
        if self.config.lora.rank:
            lora.load_trained_state(self.trainable, without_prefix("model.", tensors))
        else:
            self.trainable.load_state_dict(without_prefix("model.", tensors))
        self.ema.load_state_dict({**without_prefix("ema.", tensors), "updates": state["ema_updates"]})
        restore_optimizer(self.optimizer, without_prefix("optimizer.", tensors), state["optimizer"])
        restore_random_states(without_prefix("random.", tensors), state["random"])
        self.noise.set_state(tensors["noise"])
        self.progress.load_state_dict(state["progress"])
        self.skipped = state["skipped"]
        self.replaced = defaultdict(int, state["replaced"])
        self.validations = state["validations"]
        self.resumed_at = self.progress.step
        return True

    # --------------------------------------------------------------------------------------------------- training

    def step(self, micros: list[Micro]) -> dict[str, Tensor]:
        """One optimizer step on ``micro_batches`` micro-batches; returns its mean logs, as tensors.

        Raises:
            UniAlignmentError: too many steps had a non-finite loss.
        """
        options = self.config.optimizer
        factor = learning_rate_factor(
            self.progress.step, self.progress.fraction, options.warmup_steps, options.schedule, options.final
        )
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * factor
        logs: dict[str, Tensor] = {}
        for batches, replaced in micros:
            for task, count in replaced.items():
                self.replaced[task] += count
            with autocast(self.device, self.config.run.precision):
                output = self.objective([move(batch, self.device) for batch in batches], self.noise)
            (output.loss / len(micros)).backward()
            for name, value in output.logs.items():
                logs[name] = logs.get(name, 0) + value.detach().float() / len(micros)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, options.clip or math.inf)
        if bool(torch.isfinite(norm)):
            self.optimizer.step()
            self.ema.update()
        else:
            self.skipped += 1
            self.optimizer.zero_grad(set_to_none=True)
            if self.skipped > self.config.run.max_skipped_steps:
                raise UniAlignmentError(
                    f"{self.skipped} steps had a loss or gradient that is not finite; stopped at step "
                    f"{self.progress.step}. Lower optimizer.lr or use run.precision=fp32, then run the same command: "
                    "it resumes from the last checkpoint."
                )
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        logs["gradient_norm"] = norm.detach()
        logs["learning_rate"] = torch.tensor(options.lr * factor)
        return logs

    def train(self) -> Path:
        """Train until the budget is spent or a signal arrives.

        Returns:
            The model folder if the run is complete, the run folder if it was stopped early.

        Raises:
            StorageError: a checkpoint or log could not be written.
        """
        config = self.config
        if config.run.fresh:
            self.store.clear()
        resumed = self.resume()
        log = RunLog(self.folder, config.logging.tensorboard, self.resumed_at)
        write_text(self.folder / "config.yaml", to_yaml(config))
        counts = ", ".join(f"{count} {task}" for task, count in config.mixture.items() if count)
        self._say(
            f"{config.run.name}: {parameter_count(self.trainable) / 1e6:.2f} M trainable parameters on {self.device} "
            f"({self.threads} threads), {self.per_step} samples a step ({counts}), in {self.folder}"
            + (f", resumed at step {self.progress.step}" if resumed else "")
        )
        stop = StopRequest()
        position = self.progress.step * config.micro_batches
        data = Prefetcher(self.source, position, config.data.workers, config.data.prefetch)
        try:
            with stop.watching(), data:
                self.progress.start()
                self._compile()
                self._loop(data, log, stop)
                self.save()
            if stop.requested and not self.progress.done:
                self._say(
                    f"Stopped by {stop.requested} after step {self.progress.step}; everything is saved. "
                    "Run the same command to resume."
                )
                return self.folder
            return self.finish(log)
        finally:
            log.close()

    def _compile(self) -> None:
        if self.config.run.compile == "off":
            return
        batches, _ = self.source()(1 << 41)
        batches = [move(batch, self.device) for batch in batches]
        states, noise = random_states(), self.noise.get_state()

        def step() -> None:
            with autocast(self.device, self.config.run.precision):
                loss = self.objective(batches, self.noise).loss
            loss.backward()

        # Block by block: all blocks share one compiled code, which keeps compilation short.
        blocks = list(self.objective.transformer.transformer_blocks)
        compile_if_faster(self.config.run.compile, blocks, step, self._say, dynamic=None)
        self.optimizer.zero_grad(set_to_none=True)
        restore_random_states(*states)
        self.noise.set_state(noise)

    def _loop(self, data: Prefetcher[Micro], log: RunLog, stop: StopRequest) -> None:
        config = self.config
        saved = validated = time.monotonic()
        window = _Window()
        with Reporter(self.console, config.run.name, config.run.max_steps) as reporter:
            while not self.progress.done and not stop.requested:
                began = time.monotonic()
                micros = [next(data) for _ in range(config.micro_batches)]
                window.waited += time.monotonic() - began
                window.add(self.step(micros))
                step = self.progress.step
                if step % config.logging.log_every == 0:
                    means = window.means()
                    rate, waiting = window.rate(self.per_step)
                    log.scalars(step, {**means, "samples_per_second": rate, "waiting_share": waiting}, "train/")
                    reporter.update(self.progress, means, rate)
                    window = _Window()
                every, minutes = config.logging.validation_steps, config.logging.validation_minutes
                if step % every == 0 if every else time.monotonic() - validated >= 60 * minutes:
                    reporter.note(self.validate(log))
                    validated = time.monotonic()
                    window = _Window()
                if time.monotonic() - saved >= 60 * config.run.checkpoint_minutes:
                    self.save()
                    saved = time.monotonic()

    # ------------------------------------------------------------------------------------------------- validation

    @torch.no_grad()
    def validate(self, log: RunLog | None = None) -> dict[str, float]:
        """Losses, prompt-following and samples on held-out data, with the averaged weights.

        Leaves no trace in the run's random states. Also writes the averaged weights to ``model/``.

        Returns:
            ``task/<task>`` losses and ``gap/<task>/<t>/{right,empty,gap}``.
        """
        self.objective.eval()
        scores: dict[str, float] = {}
        # Shapes here differ from training's: compiling them would cost minutes for a few passes.
        # Frozen weights in bfloat16 beside float32 inputs need autocast here too.
        low = self.config.lora.rank and self.config.lora.base_precision == "bf16"
        precision = autocast(self.device, "bf16" if low else "fp32")
        with self.ema.applied(), torch.compiler.set_stance("force_eager"), precision:
            for task, samples in self.held_out.items():
                batches = [move(batch, self.device) for batch in collate(samples, self.tokenizer)]
                generator = torch.Generator().manual_seed(0)
                output = self.objective(batches, generator)
                scores |= {name: float(value) for name, value in output.logs.items() if name.startswith("task/")}
                scores |= self.objective.prompt_gap(batches)
                if log is not None and self.config.logging.samples:
                    self._sample(task, log)
            if log is not None:
                self.export()
        self.objective.train()
        self.objective.autoencoder.eval()
        self.validations.append({"step": self.progress.step, **{k: float(f"{v:.6g}") for k, v in scores.items()}})
        if log is not None:
            log.scalars(self.progress.step, scores, "validation/")
        return scores

    def _sample(self, task: str, log: RunLog) -> None:
        """A picture grid (sources, truth, sample) or a list of texts, for a few held-out samples of a task."""
        options = self.config.logging
        samples = self.held_out[task][: options.samples_per_task]
        rows: list[list[Any]] = []
        lines: list[str] = []
        for batch in collate(samples, self.tokenizer):
            batch = move(batch, self.device)
            texts = self.tokenizer.decode(torch.where(batch.prompt_mask, batch.prompt_ids, self.tokenizer.pad_token_id))
            if batch.target == "image":
                # Maps follow from their source alone; guidance is for prompts that leave room.
                scale = options.guidance_scale if not batch.sources else 1.0
                drawn = draw(self.objective, batch, options.sampling_steps, scale)
                assert batch.target_images is not None
                shown = [*(to_pictures(s) for s in batch.sources), to_pictures(batch.target_images), drawn]
                rows += [[pictures[i] for pictures in shown] for i in range(len(batch))]
                lines += [f"{i}. {text}" for i, text in enumerate(texts, len(lines) + 1)]
            else:
                assert batch.target_ids is not None
                wanted = self.tokenizer.decode(batch.without_questions(batch.target_ids))
                written = write(self.objective, batch, options.sampling_steps)
                for prompt, given, truth in zip(texts, written, wanted, strict=True):
                    lines.append(f"- {prompt or task}: **{given}** (truth: {truth})")
        if rows:
            log.image(self.progress.step, task, grid(rows))
        log.text(self.progress.step, task, "\n".join(lines))

    def export(self) -> Path:
        """Write the present weights (the average, inside :meth:`validate`) as a model folder that ``load`` takes.

        Of a LoRA run, the LoRA file alone.
        """
        if self.config.lora.rank:
            return lora.export(self.objective.transformer, self.folder / "lora")
        from unialignment.pipeline import UniAlignmentPipeline

        objective = self.objective
        training = objective.transformer.training
        pipeline = UniAlignmentPipeline(
            objective.transformer,
            objective.text_embedder,
            objective.autoencoder,
            self.tokenizer,
            name=self.config.run.name,
            sampling=dict(self.config.sampling),
        )
        folder = self.folder / "model"
        pipeline.save_pretrained(folder)
        objective.transformer.train(training)
        objective.text_embedder.train(training)
        return folder

    def finish(self, log: RunLog) -> Path:
        """Validate once more, write the final weights and the summary; returns the model folder."""
        scores = self.validate(log)
        folder = self.folder / ("lora" if self.config.lora.rank else "model")
        path = self.folder / "summary.md"
        write_text(path, summarise(self.config, self.progress, log.path, self.validations, self.skipped, self.replaced))
        self._say(f"Finished after {self.progress.step} steps. Weights: {folder}   Summary: {path}")
        gaps = {k.split("/")[1]: v for k, v in scores.items() if k.startswith("gap/") and k.endswith("0.99/gap")}
        if gaps:
            self._say("Prompt-following (error with empty minus right prompt at t = 0.99): " + _pairs(gaps))
        return folder


def _absent(section: str) -> Any:
    """What a section says of a run from before it existed."""
    return LoraSection().model_dump(mode="json") if section == "lora" else None


class _Window:
    """Mean logs and speed since the last report."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = defaultdict(int)
        self.steps = 0
        self.waited = 0.0
        self.began = time.monotonic()

    def add(self, logs: dict[str, Tensor]) -> None:
        self.steps += 1
        for name, value in logs.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] += 1

    def means(self) -> dict[str, float]:
        return {name: float(value) / self.counts[name] for name, value in self.sums.items()}

    def rate(self, per_step: int) -> tuple[float, float]:
        """Samples per second, and the share of time spent waiting for data."""
        seconds = max(1e-9, time.monotonic() - self.began)
        return self.steps * per_step / seconds, self.waited / seconds


def _pairs(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


def train(config: TransformerConfig, console: Console | None = None) -> Path:
    """Train (or continue) the run that ``config`` describes; see :meth:`Trainer.train`."""
    return Trainer(config, console).train()


def run(path: str | Path, overrides: list[str], console: Console | None = None) -> Path:
    """What ``unialign train`` does: read the configuration, train what its ``kind`` says."""
    config = load_config(path, overrides)
    if config.kind == "autoencoder":
        from unialignment.training.autoencoder import train_autoencoder

        return train_autoencoder(config, console)
    return train(config, console)


def main(arguments: list[str] | None = None) -> int:
    """Command line: a configuration file, then ``key=value`` overrides."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if not arguments:
            raise ConfigError("Usage: python -m unialignment.training.loop CONFIG.yaml [key=value ...]")
        run(arguments[0], arguments[1:])
    except UniAlignmentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
