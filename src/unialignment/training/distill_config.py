"""The configuration of ``unialign distill``, and the batches that it names. Knows nothing of losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from unialignment.errors import InputError
from unialignment.tasks import TASKS
from unialignment.training.batching import Batch, collate
from unialignment.training.config import Section, WorldSection, merge, parse_overrides, read_yaml, validate
from unialignment.training.distill import DistillSettings, Stage
from unialignment.training.distill_trajectories import Source

_ELSEWHERE = 1 << 40


class DistillConfig(Section):
    """A distillation run; see docs/speed.md for the table of keys."""

    kind: Literal["distill"] = "distill"
    model: str = Field("nano", description="Teacher: packaged name, folder or hub id.")
    initial: str | None = Field(
        None,
        description="Model whose transformer the student starts from, like an earlier student. Default: the teacher.",
    )
    dir: Path = Field(Path("runs/distill"), description="Run folder; students are in its model-<steps>/.")
    seed: int = Field(0, ge=0, description="Seed of data and noise.")
    device: str = Field("auto", description="auto, cpu, cuda, mps.")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch. Default: all.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast.")
    world: WorldSection = Field(default_factory=WorldSection)
    mixture: dict[str, Annotated[int, Field(ge=0)]] = Field(
        default_factory=lambda: {"generate": 12, "edit": 6, "perceive": 6, "control": 2, "compose": 4, "caption": 4,
                                 "answer": 4, "infill": 2},
        description="Samples of each task in an update; texts are held where they are.",
    )  # fmt: skip
    guidance: dict[str, float] = Field(default_factory=dict, description="Scale by task. Default: the model's own.")
    shift: float | None = Field(
        None, gt=0, description="Resolution shift of the noise levels. Default: each task's own."
    )
    budget_seconds: float | None = Field(
        None, gt=0, description="Wall clock for everything, over all sessions. Default: the counts below alone decide."
    )
    draw_share: float = Field(0.4, gt=0, lt=1, description="Share of the budget for the teacher's trajectories.")
    trajectories: int = Field(
        200, ge=2, description="Files of trajectories, each of one mixture; the first is held out."
    )
    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (10, 5), description="Student's steps in each stage, dividing those of the stage before."
    )
    updates: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (600, 600), description="Updates of each stage, at most; the budget is shared out likewise."
    )
    sampler: dict[str, Any] = Field(
        default_factory=dict,
        description="Sampler defaults of the students where they draw; under a task's name for that task alone. "
        "Default: as many unguided Euler steps as they were taught.",
    )
    draws: int = Field(4, ge=1, description="Windows of a trajectory in an update, which share its conditions.")
    weighting: Literal["arrival", "velocity"] = Field(
        "arrival",
        description="What of a window's error counts: where its step arrives, or the velocity itself at every level.",
    )
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(3e-4, gt=0)
    warmup: int = Field(20, ge=1)
    ema: float = Field(0.99, ge=0, lt=1)
    keep: float = Field(1.0, ge=0, description="Weight of the texts' divergence from the teacher; 0: none.")
    checkpoint_every: int = Field(50, ge=1)
    log_every: int = Field(20, ge=1)

    @model_validator(mode="after")
    def _tasks_exist(self) -> DistillConfig:
        if not any(count and TASKS.get(name).target == "image" for name, count in self._counts()):
            raise ValueError("mixture: at least one task that draws needs samples")
        if len(self.updates) != len(self.steps):
            raise ValueError(f"updates: {len(self.updates)} numbers for {len(self.steps)} stages (steps)")
        return self

    def _counts(self) -> list[tuple[str, int]]:
        unknown = [name for name in {**self.mixture, **self.guidance} if name not in TASKS.names]
        if unknown:
            raise ValueError(f"unknown task {', '.join(map(repr, unknown))}; known are {', '.join(TASKS.names)}")
        return list(self.mixture.items())

    def settings(self) -> DistillSettings:
        """As the distiller takes them.

        Raises:
            ConfigError: the step counts don't divide one another, or the sampler has options that can't be.
        """
        stages = tuple(Stage(*pair) for pair in zip(self.steps, self.updates, strict=True))
        names = (
            "trajectories",
            "guidance",
            "shift",
            "draws",
            "weighting",
            "budget_seconds",
            "draw_share",
            "optimizer",
            "lr",
            "warmup",
            "ema",
            "keep",
            "precision",
            "checkpoint_every",
            "log_every",
            "seed",
            "sampler",
        )
        return DistillSettings(stages=stages, **{name: getattr(self, name) for name in names})


def load_distill(path: str | Path, overrides: Sequence[str] = ()) -> DistillConfig:
    """A YAML file and ``key=value`` overrides, checked.

    Raises:
        ConfigError: unusable, with every reason.
    """
    config: DistillConfig = validate(DistillConfig, merge(read_yaml(Path(path)), parse_overrides(overrides)), str(path))
    return config


def world_source(config: DistillConfig, tokenizer: Any, limit: int) -> Source:
    """The scene world's batches. Texts that don't fit are replaced."""
    from unialignment.training.samples import fits
    from unialignment.world.presets import preset
    from unialignment.world.sprites import SpritePack
    from unialignment.world.stream import WorldStream

    pack, world = SpritePack.load(config.world.pack), config.world
    stream = WorldStream(
        pack, preset(world.preset, pack), world.split, config.seed, varied=world.varied, long=world.long
    )

    def one(task: str, index: int) -> Any:
        for attempt in range(50):
            sample = stream.sample(task, index + attempt * _ELSEWHERE)
            if fits(sample, tokenizer, limit):
                return sample
        raise InputError(f"no sample of {task} fits the teacher's texts of {limit} tokens; take it out of the mixture")

    def batches(call: int, target: str) -> list[Batch]:
        wanted = {task: count for task, count in config.mixture.items() if TASKS.get(task).target == target}
        samples = [one(task, call * count + number) for task, count in wanted.items() for number in range(count)]
        return collate(samples, tokenizer)

    return batches
