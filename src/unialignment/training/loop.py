"""Trains the unified transformer: ``python -m unialignment.training.loop configs/nano.yaml key=value``.

One optimizer step takes ``micro_batches`` micro-batches of the task mixture, averages their gradients, clips, updates
and moves the weight average. The run folder describes itself: resolved configuration, metrics, samples, checkpoints,
the averaged weights as a loadable model, and a summary. Knows nothing of losses (the objective's business), of how
samples are made, of what is applied to the model (:mod:`unialignment.training.parallel`), or of any task by name.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from unialignment.alignment.pairs import cached_gradients
from unialignment.errors import ConfigError, UniAlignmentError
from unialignment.storage import write_text
from unialignment.training import guard
from unialignment.training.build import parameter_count
from unialignment.training.checkpoint import random_states, restore_random_states
from unialignment.training.config import TransformerConfig, load_config, to_yaml
from unialignment.training.data import Prefetcher
from unialignment.training.logging import Reporter, RunLog
from unialignment.training.objective import PairGradients
from unialignment.training.parallel import launched_processes
from unialignment.training.runtime import StopRequest, autocast
from unialignment.training.samples import move
from unialignment.training.schedule import learning_rate_factor
from unialignment.training.sharing import Micro, Share, count_tokens, noise_seed
from unialignment.training.summary import summarise
from unialignment.training.throughput import Throughput, Window, combined, gemm_rate, step_flops
from unialignment.training.validation import ValidatedRun


class Trainer(ValidatedRun):
    """One resumable run, and the loop that advances it; see :class:`~unialignment.training.run.Run`."""

    def step(self, micros: Sequence[Micro]) -> dict[str, Tensor]:
        """One optimizer step on this process's micro-batches of it; returns their mean logs, as tensors.

        Raises:
            UniAlignmentError: the guard has skipped too many steps.
        """
        options = self.config.optimizer
        factor = learning_rate_factor(
            self.progress.step, self.progress.fraction, options.warmup_steps, options.schedule, options.final
        )
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * factor
        logs: dict[str, Tensor] = {}
        moved = [[self._move(batch) for batch in batches] for batches, _ in micros]
        for _, replaced in micros:
            for task, count in replaced.items():
                self.replaced[task] += count
        pairs = self._pair_gradients(moved, logs)
        for index, batches in enumerate(moved):
            self._seed_noise(index)
            with self.parallel.accumulating(last=index == len(moved) - 1):
                with autocast(self.device, self.config.run.precision):
                    more = () if pairs is None else (pairs[index],)
                    output = self.forward(batches, self.noise, *more)
                (output.loss / len(moved)).backward()
            for name, value in output.logs.items():
                logs[name] = logs.get(name, 0) + value.detach().float() / len(moved)
        norm = self.parallel.gradient_norm(self.parameters, options.clip or math.inf)
        reason = self.guard.judge(float(norm))
        if reason is None:
            self.optimizer.step()
            self.ema.update()
        else:
            self._skip(reason, float(norm), moved, logs)
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        logs["gradient_norm"] = norm.detach()
        logs["learning_rate"] = torch.tensor(options.lr * factor)
        return logs

    def _move(self, item: Any) -> Any:
        if isinstance(item, Share):
            return item if self.device.type == "cpu" else replace(item, batch=move(item.batch, self.device))
        return move(item, self.device)

    def _position(self, index: int) -> int:
        """Position, in the run, of this process's ``index``-th micro-batch of the present step."""
        return self.layout.position(self.progress.step * self.layout.local + index)

    def _seed_noise(self, index: int) -> None:
        self.noise.manual_seed(noise_seed(self.config.run.seed, self._position(index)))

    def _pair_gradients(self, moved: list[list[Any]], logs: dict[str, Tensor]) -> list[PairGradients] | None:
        """With ``loss.negatives=step``: the contrastive loss over all pairs of the step, and its gradients."""
        settings = self.objective.settings
        if settings.negatives != "step" or not settings.cross:
            return None
        features = []
        for index, batches in enumerate(moved):
            self._seed_noise(index)
            with autocast(self.device, self.config.run.precision):
                features.append(self.objective.pair_features(batches, self.noise))
        found = cached_gradients(features, settings.temperature, self.parallel.everyone())
        if found is None:
            return [[(None, None)] * len(batches) for batches in moved]
        logs |= {
            "loss/cross": found.loss,
            "loss/total": settings.cross * found.loss,
            "cross/accuracy": found.accuracy,
            "cross/pairs": torch.tensor(float(found.pairs)),
        }
        # The step's loss is the mean over micro-batches and processes; of this part it is to be the sum.
        scale = self.parallel.processes * len(moved)
        return [
            [(None if i is None else scale * i, None if t is None else scale * t) for i, t in micro]
            for micro in found.gradients
        ]

    def _skip(self, reason: str, norm: float, moved: list[list[Any]], logs: dict[str, Tensor]) -> None:
        """Write down a step that the guard refused, and stop past its limit.

        Raises:
            UniAlignmentError: too many steps were skipped.
        """
        step = self.progress.step
        own = [
            {"position": self._position(index), "samples": guard.describe(batches, self.tokenizer)}
            for index, batches in enumerate(moved)
        ]
        everyone = [micro for each in self.parallel.gather(own) for micro in each]
        loss = float(logs["loss/total"])
        entry = {"step": step, "reason": reason, "gradient_norm": norm, "loss": loss, "micro_batches": everyone}
        path = self.folder / "skipped.jsonl"
        self.parallel.on_main(lambda: guard.record(self.folder, entry))
        self.optimizer.zero_grad(set_to_none=True)
        self._say(f"Step {step + 1} skipped: {reason} ({self.guard.skipped} so far; {path}).")
        if self.guard.exhausted:
            batch = self.folder / "skipped" / f"step-{step:08d}-process-{self.parallel.rank}.safetensors"
            guard.write_batches(batch, moved)
            raise UniAlignmentError(
                f"{self.guard.skipped} steps had a loss or gradient that is not finite or far above the usual; stopped "
                f"at step {step}, where {reason}. The samples of skipped steps are in {path}, the last batch in "
                f"{batch.parent}. Lower optimizer.lr, use run.precision=fp32 or mend the data, then run the same "
                "command: it resumes from the last checkpoint."
            )

    def train(self) -> Path:
        """Train until the budget is spent or a signal arrives.

        Returns:
            The model folder if the run is complete, the run folder if it was stopped early.

        Raises:
            StorageError: a checkpoint or log could not be written.
        """
        folder = self.store.folder
        with self.parallel.watching(lambda: self.progress.step, folder):
            result = self._train()
        self.parallel.close()
        return result

    def _train(self) -> Path:
        config = self.config
        if config.run.fresh:
            self.parallel.on_main(self.store.clear)
        resumed = self.resume()
        log = self._open_log()
        counts = ", ".join(f"{count} {task}" for task, count in config.mixture.items() if count)
        where = f"{self.parallel.processes} processes ({self.parallel.kind})" if self.parallel.processes > 1 else ""
        self._say(
            f"{config.run.name}: {parameter_count(self.trainable) / 1e6:.2f} M trainable parameters on {self.device} "
            f"({self.threads} threads{', ' if where else ''}{where}), {self.per_step} samples a step ({counts}), in "
            f"{self.folder}" + (f", resumed at step {self.progress.step}" if resumed else "")
        )
        stop = StopRequest()
        position = self.progress.step * self.layout.local
        data = Prefetcher(self.source, position, config.data.workers, config.data.prefetch, self._warn)
        try:
            with stop.watching(), data:
                self.progress.start()
                self._compile()
                stopped = self._loop(data, log, stop)
                self.save()
            if stopped:
                self._say(
                    f"Stopped by {stopped} after step {self.progress.step}; everything is saved. "
                    "Run the same command to resume."
                )
                return self.folder
            return self.finish(log)
        finally:
            if log is not None:
                log.close()

    def _open_log(self) -> RunLog | None:
        """The run's log, in the process that writes it."""
        config = self.config
        opened: list[RunLog] = []

        def prepare() -> None:
            log = RunLog(
                self.folder, config.logging.tensorboard, self.resumed_at, config.logging.trackers, config.run.name,
                config.model_dump(mode="json"),
            )  # fmt: skip
            opened.append(log)
            write_text(self.folder / "config.yaml", to_yaml(config))

        self.parallel.on_main(prepare)  # where it fails, it fails in all
        return opened[0] if opened else None

    def _compile(self) -> None:
        if self.config.run.compile == "off":
            return
        batches, _ = self.source()(1 << 41)
        batches = [self._move(batch) for batch in batches]
        states = random_states()

        def step() -> None:
            with autocast(self.device, self.config.run.precision):
                loss = self.objective(batches, self.noise).loss
            loss.backward()

        self.parallel.compile(self.objective, self.config.run.compile, step, self._say)
        self.optimizer.zero_grad(set_to_none=True)
        restore_random_states(*states)

    def _loop(self, data: Prefetcher[Micro], log: RunLog | None, stop: StopRequest) -> str | None:
        """Step until the run is done, and return ``None``, or until it is stopped, and return the signal's name."""
        options = self.config.logging
        saved = validated = time.monotonic()
        window = Window()
        stopped, _, _ = self._agree(stop, False, False)
        with Reporter(self.console, self.config.run.name, self.config.run.max_steps) as reporter:
            while not self.progress.done and not stopped:
                began = time.monotonic()
                micros = [next(data) for _ in range(self.layout.local)]
                window.waited += time.monotonic() - began
                window.tokens += self.count_tokens(micros)
                window.add(self.step(micros))
                step = self.progress.step
                if step % options.log_every == 0:
                    means = self._report(window, micros)
                    if log is not None:
                        log.scalars(step, means, "train/")
                    reporter.update(self.progress, means, means["samples_per_second"])
                    window = Window()
                if options.gradient_norms_every and step % options.gradient_norms_every == 0:
                    norms = self.loss_gradient_norms(micros)
                    if log is not None:
                        log.scalars(step, norms, "gradients/")
                every, now = options.validation_steps, time.monotonic()
                validate = step % every == 0 if every else now - validated >= 60 * options.validation_minutes
                save = now - saved >= 60 * self.config.run.checkpoint_minutes
                stopped, validate, save = self._agree(stop, validate, save)
                if validate:
                    reporter.note(self.validate(log))
                    save = self._keep_best() or save
                    validated = time.monotonic()
                    window = Window()
                if save:
                    self.save()
                    if self._new_best is not None:
                        self.parallel.on_main(self._mark_best)
                        self._new_best = None
                    saved = time.monotonic()
        finished = self.progress.done
        self.progress.agree(None)
        return None if finished else stopped

    def _agree(self, stop: StopRequest, validate: bool, save: bool) -> tuple[str | None, bool, bool]:
        """What all processes do next: the first one's clock counts, and a signal to any of them stops all."""
        if self.parallel.kind == "none":
            return stop.requested, validate, save
        main = self.parallel.is_main
        self.progress.agree(None)
        names = ("SIGTERM", "SIGINT")
        asked = [float(stop.requested == name) for name in names]
        *stops, decided, due, elapsed = self.parallel.agree(
            *asked, main and validate, main and save, self.progress.elapsed if main else 0.0
        )
        self.progress.agree(elapsed)
        stopped = next((name for name, each in zip(names, stops, strict=True) if each), None)
        return stopped, bool(decided), bool(due)

    def _keep_best(self) -> bool:
        """Whether the validation just made is among the best: its checkpoint is then to be saved and kept."""

        def judge() -> float | None:
            losses = [value for name, value in self.validations[-1].items() if name.startswith("task/")]
            score = sum(losses) / max(1, len(losses))
            return score if losses and self.store.is_better(score) else None

        self._new_best = self.parallel.on_main(judge)
        return self._new_best is not None

    def _mark_best(self) -> None:
        assert self._new_best is not None
        self.store.mark_best(self.progress.step, self._new_best)
        if self.store.best()[0]["step"] == self.progress.step:
            self.keep_model()

    def count_tokens(self, micros: Sequence[Micro]) -> int:
        """Tokens of this process's micro-batches."""
        patch = int(self.objective.transformer.config.patch_size)
        pixels = int(self.objective.autoencoder.spatial_factor) * patch
        return sum(count_tokens(batches, pixels, patch) for batches, _ in micros)

    def _report(self, window: Window, micros: Sequence[Micro]) -> dict[str, float]:
        """Mean logs, speed and memory since the last report, of all processes."""
        collected = self.parallel.gather(window.plain())
        means = combined(collected) if len(collected) > 1 else window.means()
        tokens, seconds = sum(each["tokens"] for each in collected), window.seconds
        if self._flops is None:
            self._flops = self._measure_flops(micros)
        flops, machine = self._flops
        speed = Throughput(window.steps, seconds, tokens, flops, machine)
        return {
            **means,
            "samples_per_second": window.steps * self.per_step / seconds,
            "waiting_share": window.waited / seconds,
            **speed.numbers(),
            "memory_bytes": max(each["memory"] for each in collected),
        }

    def _measure_flops(self, micros: Sequence[Micro]) -> tuple[float, float]:
        """Floating-point operations of a step, and what the machines' matrix products do in a second."""
        moved = [[self._move(batch) for batch in batches] for batches, _ in micros]
        noise = torch.Generator().manual_seed(0)

        def passes() -> None:
            for batches in moved:
                self.objective(batches, noise)

        def encoders() -> None:
            for batches in moved:
                self.objective.frozen_passes(batches)

        with autocast(self.device, self.config.run.precision), torch.compiler.set_stance("force_eager"):
            flops = step_flops(passes, encoders)
        rate = gemm_rate(self.device, self.config.run.precision)
        totals = self.parallel.gather((flops, rate))
        return sum(each for each, _ in totals), sum(each for _, each in totals)

    def loss_gradient_norms(self, micros: Sequence[Micro]) -> dict[str, float]:
        """Gradient norm of each weighted loss alone, on this process's first micro-batch of the step.

        Leaves weights, gradients and random states as they were. Empty for sharded weights, whose gradients exist only
        inside the backward pass.
        """
        if self.parallel.sharded:
            return {}
        self.noise.manual_seed(0)
        with autocast(self.device, self.config.run.precision):
            parts = self._plain_parts([self._move(batch) for batch in micros[0][0]])
        norms = {}
        for name, part in parts.items():
            found = torch.autograd.grad(part, self.parameters, retain_graph=True, allow_unused=True)
            squares = [g.detach().float().square().sum() for g in found if g is not None]
            norms[name] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
        return norms

    def _plain_parts(self, batches: list[Any]) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = self.objective.forward(batches, self.noise).parts
        return {name: part for name, part in parts.items() if part.requires_grad}

    def finish(self, log: RunLog | None) -> Path:
        """Validate once more, write the final weights and the summary; returns the model folder."""
        scores = self.validate(log)
        folder = self.folder / ("lora" if self.config.lora.rank else "model")
        path = self.folder / "summary.md"

        def write_summary() -> None:
            assert log is not None
            text = summarise(self.config, self.progress, log.path, self.validations, self.skipped, self.replaced)
            write_text(path, text)

        self.parallel.on_main(write_summary)
        self._say(f"Finished after {self.progress.step} steps. Weights: {folder}   Summary: {path}")
        gaps = {k.split("/")[1]: v for k, v in scores.items() if k.startswith("gap/") and k.endswith("0.99/gap")}
        if gaps:
            self._say("Prompt-following (error with empty minus right prompt at t = 0.99): " + _pairs(gaps))
        return folder


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

        if launched_processes() > 1:
            raise ConfigError(
                f"kind: autoencoder trains in one process, {launched_processes()} were launched; run it without a "
                "launcher."
            )
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
