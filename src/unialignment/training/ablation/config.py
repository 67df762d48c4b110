"""What an ablation is: a shared training configuration, arms that change it, seeds, compute, and what is measured.

Every run that follows from it is resolved and validated before the first one starts. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from unialignment.errors import ConfigError
from unialignment.training.config import (
    Section,
    TransformerConfig,
    merge,
    parse_overrides,
    read_yaml,
    validate,
)

MANAGED = {
    "run": ("name", "dir", "seed", "max_steps", "budget_seconds", "fresh"),
    "teacher": ("cache",),
}
"""Training keys that the ablation sets itself, by section."""


class ComputeSection(Section):
    """What every run may spend; exactly one of the two."""

    steps: int | None = Field(None, ge=1, description="Optimizer steps of each run.")
    seconds: float | None = Field(
        None, gt=0, description="Wall-clock seconds of training of each run, instead of steps."
    )

    @model_validator(mode="after")
    def _one(self) -> ComputeSection:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError("give compute.steps or compute.seconds, one of them")
        return self


class ArmSection(Section):
    """One arm: changes to the shared training configuration."""

    title: str = Field(min_length=1, description="A few words for tables and the figure.")
    baseline: str | None = Field(None, description="Arm that this one is compared with, seed by seed.")
    train: dict[str, Any] = Field(default_factory=dict, description="Changes to the shared training configuration.")


class MeasureSection(Section):
    """What is measured of each finished run."""

    limit: int = Field(32, ge=1, description="Held-out items per task.")
    tasks: tuple[str, ...] = Field(("caption", "answer", "generate", "edit"), description="Tasks that are judged.")
    seed: int = Field(0, ge=0, description="Seed of scenes and samplers; the same for all runs.")
    steps: int | None = Field(None, ge=1, description="Denoising steps for pictures. Default: each task's own.")
    guidance_scale: float | None = Field(None, ge=1, description="Guidance for pictures. Default: each task's own.")
    batch_size: int = Field(16, ge=1, description="Items per pipeline call.")
    pool: int = Field(100, ge=2, description="Pairs among which retrieval looks for the right one.")
    leak: bool = Field(True, description="Measure whether the contrastive loss can be solved without the picture.")


class AblationConfig(Section):
    """A whole ablation."""

    kind: Literal["ablation"] = "ablation"
    name: str = Field("ablation", min_length=1, description="Title of table and figure.")
    dir: Path = Field(Path("runs/ablation"), description="Folder of the runs, one below it for each arm and seed.")
    report: Path = Field(Path("docs/ablation"), description="Folder of table, figure and raw records.")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="Seeds of weights, data and noise.")
    jobs: int = Field(1, ge=1, description="Runs at once, each a process of its own with one thread.")
    compute: ComputeSection
    train: dict[str, Any] = Field(description="Configuration of `unialign train` that all arms share.")
    arms: dict[str, ArmSection] = Field(min_length=1, description="Arms by name.")
    measure: MeasureSection = Field(default_factory=MeasureSection)
    metrics: tuple[str, ...] = Field(
        ("vqa.accuracy", "caption.objects", "retrieval.r1", "validation.generate"),
        min_length=1,
        description="Metrics that are compared and tested, the most important first.",
    )

    @model_validator(mode="after")
    def _fits(self) -> AblationConfig:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: each may occur once")
        for name, arm in self.arms.items():
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"arms: {name!r} names a folder; use letters, digits, - and _")
            if arm.baseline is not None and (arm.baseline not in self.arms or arm.baseline == name):
                raise ValueError(f"arms.{name}.baseline: no other arm is called {arm.baseline!r}")
        return self


@dataclass(frozen=True)
class Run:
    """One training run of an ablation.

    Attributes:
        arm: Name of its arm.
        seed: Its seed.
        folder: Where everything of it lives.
        config: Its complete training configuration.
    """

    arm: str
    seed: int
    folder: Path
    config: TransformerConfig

    @property
    def name(self) -> str:
        """``<arm>-<seed>``, unique within the ablation."""
        return f"{self.arm}-{self.seed}"


def load_ablation(path: str | Path, overrides: Iterable[str] = ()) -> AblationConfig:
    """Read, override and validate an ablation, every run of it included.

    Args:
        path: YAML file.
        overrides: ``key=value`` strings with dotted keys, e.g. ``compute.steps=100`` or ``train.model.flavour=nano``.

    Raises:
        ConfigError: with what was given, what was expected and how to fix it.
    """
    path = Path(path)
    data = merge(read_yaml(path), parse_overrides(overrides))
    config: AblationConfig = validate(AblationConfig, data, str(path))
    list(plan(config))
    return config


def plan(config: AblationConfig) -> Iterator[Run]:
    """Every run, seed by seed, so that an unfinished ablation still has whole rows to compare.

    Raises:
        ConfigError: a run's training configuration is unusable.
    """
    for seed in config.seeds:
        for arm in config.arms:
            yield resolve(config, arm, seed)


def resolve(config: AblationConfig, arm: str, seed: int) -> Run:
    """The run of an arm and a seed.

    Raises:
        ConfigError: its training configuration is unusable, or sets what the ablation sets itself.
    """
    changes = config.arms[arm].train
    for where, data in (("train", config.train), (f"arms.{arm}.train", changes)):
        for section, keys in MANAGED.items():
            given = data.get(section)
            taken = sorted(set(given) & set(keys)) if isinstance(given, dict) else []
            if taken:
                raise ConfigError(
                    f"{where}.{section}.{taken[0]} is set for each run by the ablation; leave it out (length: compute, "
                    "seeds: seeds, folders: dir)."
                )
    folder = config.dir / f"{arm}-{seed}"
    own: dict[str, Any] = {
        "kind": "transformer",
        "run": {
            "name": f"{arm}-{seed}",
            "dir": str(folder),
            "seed": seed,
            "max_steps": config.compute.steps,
            "budget_seconds": config.compute.seconds,
        },
        "teacher": {"cache": str(config.dir / "teacher" / f"seed-{seed}")},
    }
    merged = merge(merge(config.train, changes), own)
    # One tokenizer for all runs, trained once.
    if not (merged.get("text") or {}).get("tokenizer") and not (merged.get("model") or {}).get("initial"):
        merged = merge(merged, {"text": {"tokenizer": str(config.dir / "tokenizer")}})
    return Run(arm, seed, folder, validate(TransformerConfig, merged, f"arm {arm!r}"))
