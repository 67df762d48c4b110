"""A run: what it consists of, how it is saved, and how it is taken up again. Knows nothing of steps or losses."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from unialignment.errors import ConfigError
from unialignment.training import guard, lora
from unialignment.training.build import build_objective, build_tokenizer
from unialignment.training.checkpoint import (
    CheckpointStore,
    flatten_optimizer,
    random_states,
    read_state,
    restore_optimizer,
    restore_random_states,
    with_prefix,
    without_prefix,
)
from unialignment.training.config import LoraSection, TransformerConfig
from unialignment.training.ema import ExponentialMovingAverage
from unialignment.training.optimizer import build_optimizer
from unialignment.training.parallel import Parallel, is_sharded
from unialignment.training.runtime import seed_everything, set_threads
from unialignment.training.samples import (
    StepSource,
    check_same_data,
    fill_teacher_cache,
    picture_side,
    validation_samples,
)
from unialignment.training.schedule import Progress
from unialignment.training.sharded import Like, load_tensors, save_sharded
from unialignment.training.sharing import Layout, Micro, SharedSource

RESUME_MUST_MATCH = ("world", "model", "lora", "text", "autoencoder", "mixture", "micro_batches", "teacher")
"""Sections that may not change when a run is resumed: weights or data position would lose their meaning."""


class Run:
    """One resumable run: everything that a step needs and a checkpoint holds.

    Args:
        config: The run's configuration.
        console: Where to talk.

    Raises:
        ConfigError, CheckpointError, AssetError: something that the configuration names is unusable.
    """

    def __init__(self, config: TransformerConfig, console: Console | None = None) -> None:
        self.config = config
        self.parallel = Parallel.start(config.run)
        self.parallel.check_optimizer(config.optimizer)
        if config.lora.rank and self.parallel.sharded:
            raise ConfigError("lora.rank > 0 with run.parallel=fsdp is not supported; use run.parallel=ddp.")
        self.console = (console or Console(stderr=True)) if self.parallel.is_main else Console(quiet=True)
        self.folder = config.run.folder
        self.device = self.parallel.device
        self.threads = set_threads(config.run.threads, self.parallel.local_processes)
        self.layout = Layout(
            config.micro_batches, self.parallel.processes, self.parallel.rank, in_step=self.parallel.sharded
        )
        seed_everything(config.run.seed)
        tokenizer_folder = self.folder / "tokenizer"
        if self.parallel.processes > 1:
            self.parallel.on_main(lambda: _discard(build_tokenizer(config, tokenizer_folder)))
        self.tokenizer = build_tokenizer(config, tokenizer_folder)
        teacher_folder, teacher_dims = None, (0, 0)
        if config.teacher.name is not None:
            teacher_folder = config.teacher.cache or self.folder / "teacher"
            filled = teacher_folder
            teacher_dims = self.parallel.on_main(lambda: fill_teacher_cache(config, filled, self._say))
        self.held_out = validation_samples(config, self.tokenizer)
        # Everything above may have drawn from the global generators; the weights follow from the seed alone.
        seed_everything(config.run.seed)
        self.objective = build_objective(
            config, self.tokenizer, picture_side(config, self.held_out), teacher_dims, self._say
        )
        self.forward = self.parallel.apply(self.objective, config.run, self.layout)
        self.objective.train()
        self.objective.autoencoder.eval()
        self.trainable = self.objective.trainable()
        self.optimizer = build_optimizer(self.trainable, config.optimizer)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.ema = ExponentialMovingAverage(self.trainable, config.ema.decay, config.ema.warmup)
        self.progress = Progress(config.run.max_steps, config.run.budget_seconds)
        self.noise = torch.Generator().manual_seed(config.run.seed)
        self.store = CheckpointStore(self.folder / "checkpoints", config.run.keep_checkpoints, config.run.keep_best)
        self.source: Callable[[], Callable[[int], Micro]] = StepSource(config, tokenizer_folder, teacher_folder)
        if self.parallel.kind != "none":
            self.source = SharedSource(self.source, self.layout)
        self.per_step = config.micro_batches * sum(config.mixture.values())
        self.guard = guard.StepGuard(config.run.spike_factor, config.run.max_skipped_steps)
        self.replaced: dict[str, int] = defaultdict(int)
        self.validations: list[dict[str, float]] = []
        self.resumed_at: int | None = None
        self._new_best: float | None = None
        self._flops: tuple[float, float] | None = None

    @property
    def skipped(self) -> int:
        """Steps skipped so far."""
        return self.guard.skipped

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def _warn(self, text: str) -> None:
        """Say what concerns this process alone, whichever it is."""
        if self.parallel.is_main:
            self._say(text)
        else:
            print(f"process {self.parallel.rank}: {text}", file=sys.stderr, flush=True)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save(self) -> Path:
        """Write a checkpoint: model, average, optimizer, schedule, random states, data position.

        All processes call this together. Of sharded weights each writes its own part, otherwise the first writes all.

        Raises:
            StorageError: it could not be written; earlier ones are intact. Raised in all processes.
        """
        optimizer_tensors, optimizer_plain = flatten_optimizer(self.optimizer)
        random_tensors, random_plain = random_states()
        ema = self.ema.state_dict()
        tensors = {
            **with_prefix("model.", self._trained()),
            **with_prefix("ema.", {k: v for k, v in ema.items() if isinstance(v, Tensor)}),
            **with_prefix("optimizer.", optimizer_tensors),
            **with_prefix("random.", random_tensors),
        }
        replaced: dict[str, int] = defaultdict(int)
        for each in self.parallel.gather(dict(self.replaced)):
            for task, count in each.items():
                replaced[task] += count
        state = {
            "progress": self.progress.state_dict(),
            "data_position": self.progress.step * self.config.micro_batches,
            "ema_updates": ema["updates"],
            "optimizer": optimizer_plain,
            "random": random_plain,
            "guard": self.guard.state_dict(),
            "replaced": dict(replaced),
            "validations": self.validations,
            "processes": self.parallel.processes,
            "config": self.config.model_dump(mode="json"),
        }
        step = self.progress.step
        if self.parallel.sharded:
            return save_sharded(self.store, step, tensors, state, self.parallel)
        return self.parallel.on_main(lambda: self.store.save(step, tensors, state))

    def _trained(self) -> dict[str, Tensor]:
        return lora.trained_state(self.trainable) if self.config.lora.rank else self.trainable.state_dict()

    def resume(self) -> bool:
        """Continue from the latest checkpoint in the run folder, if there is one.

        Raises:
            ConfigError: a section that must not change has changed.
        """
        latest = self.parallel.on_main(self.store.latest)
        if latest is None:
            return False
        state = read_state(latest)
        now = self.config.model_dump(mode="json")
        for section in RESUME_MUST_MATCH:
            if now[section] != state["config"].get(section, _absent(section)):
                raise ConfigError(
                    f"{self.folder} holds a run with another {section!r} section. Use a new run.dir, or run.fresh=true "
                    "to start over in this one."
                )
        check_same_data(now, state["config"])
        tensors = load_tensors(latest, self._like(), self.parallel)
        if self.config.lora.rank:
            lora.load_trained_state(self.trainable, without_prefix("model.", tensors))
        else:
            self.trainable.load_state_dict(without_prefix("model.", tensors))
        self.ema.load_state_dict({**without_prefix("ema.", tensors), "updates": state["ema_updates"]})
        restore_optimizer(self.optimizer, without_prefix("optimizer.", tensors), state["optimizer"])
        restore_random_states(without_prefix("random.", tensors), state["random"])
        self.progress.load_state_dict(state["progress"])
        self.guard.load_state_dict(state.get("guard") or {"skipped": state["skipped"], "recent": []})
        # Counted by every process for itself, and together in checkpoints.
        self.replaced = defaultdict(int, state["replaced"] if self.parallel.is_main else {})
        self.validations = state["validations"]
        self.resumed_at = self.progress.step
        return True

    def _like(self) -> Like:
        """Says which tensor of this run a checkpoint's is for; ``None`` if nothing is sharded."""
        state = self.trainable.state_dict() if self.parallel.sharded else {}
        sharded = {name: value for name, value in state.items() if is_sharded(value)}

        def like(name: str, shape: torch.Size) -> Tensor | None:
            kind, _, rest = name.partition(".")
            if not self.parallel.sharded:
                return None
            if kind == "model":
                return sharded.get(rest)
            if kind == "ema":
                return self.ema.shadow.get(rest.removeprefix("shadow."))
            if kind == "optimizer":
                parameter = self.parameters[int(rest.partition(".")[0])]
                return parameter if parameter.shape == shape else None
            return None

        return like


def _absent(section: str) -> Any:
    """What a section says of a run from before it existed."""
    return LoraSection().model_dump(mode="json") if section == "lora" else None


def _discard(_: object) -> None:
    """Nothing: results of the first process need not travel to the others."""
