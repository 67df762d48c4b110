"""Run configurations: YAML plus ``key=value`` overrides, validated before anything is built.

Two kinds exist: ``kind: autoencoder`` and ``kind: transformer``. Every field has its type, default and meaning here,
and here only. Unknown keys are refused with the nearest known name. Knows nothing of models or data.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from unialignment.errors import ConfigError
from unialignment.tasks import TASKS


def _on_off(value: Any) -> Any:
    """YAML reads a bare ``on`` as true; the configuration means the word."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


Compile = Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_off)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _known_task(name: str, section: str) -> None:
    if name not in TASKS.names:
        near = difflib.get_close_matches(name, TASKS.names, n=1, cutoff=0.4)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{section}: unknown task {name!r}{hint} (known: {', '.join(TASKS.names)})")


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class RunSection(Section):
    """Where a run lives, how long it lasts, how it computes."""

    name: str = Field("run", min_length=1, description="Name of the run, for titles.")
    dir: Path | None = Field(None, description="Run folder. Default: runs/<name>.")
    seed: int = Field(0, ge=0, description="Seed of weights, data and noise.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps.")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch. Default: all.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast. Measure it on a CPU.")
    compile: Compile = Field("off", description="torch.compile: auto measures both at the start and keeps the faster.")
    activation_checkpointing: bool = Field(
        False, description="Recompute each block in the backward pass: much less memory, about a third slower."
    )
    budget_seconds: float | None = Field(None, gt=0, description="Wall-clock length of the run, restarts included.")
    max_steps: int | None = Field(None, ge=1, description="Length of the run in optimizer steps.")
    checkpoint_minutes: float = Field(5.0, gt=0, description="Minutes between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints to keep.")
    keep_best: int = Field(
        0, ge=0, description="Checkpoints of the best validations to keep besides; the best's weights: model-best."
    )
    fresh: bool = Field(False, description="Start over, removing the run folder's checkpoints, instead of resuming.")
    max_skipped_steps: int = Field(50, ge=0, description="Steps skipped by the guard before the run stops.")
    spike_factor: float | None = Field(
        20.0, gt=1, description="Skip steps whose gradient norm is this many times the recent median; null: never."
    )
    parallel: Literal["auto", "ddp", "fsdp"] = Field(
        "auto", description="With several processes: copies of the model, or its shards. auto: what the launcher says."
    )
    timeout_minutes: float = Field(30.0, gt=0, description="How long processes wait for one another.")

    @model_validator(mode="after")
    def _has_end(self) -> RunSection:
        if self.budget_seconds is None and self.max_steps is None:
            raise ValueError("give run.budget_seconds (seconds), run.max_steps, or both")
        return self

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.dir if self.dir is not None else Path("runs") / self.name


class WorldSection(Section):
    """Which part of the scene world is seen."""

    preset: str = Field("nano", description="World preset: nano, small or full.")
    pack: Path | None = Field(None, description="Sprite pack. Default: the user's cache.")
    split: Literal["train", "held_out"] = Field("train", description="Split to train on.")
    varied: Fraction = Field(0.5, description="Share of freely worded prompts; the others are canonical captions.")
    long: Fraction = Field(0.0, description="Share of long captions among the freely worded prompts.")


class TrainedWorldSection(WorldSection):
    """What scenes a transformer is trained on."""

    styles: list[str] | None = Field(
        None,
        min_length=1,
        description="Drawing styles trained on; one named twice is twice as frequent. Default: the preset's.",
    )
    questions: list[str] | None = Field(
        None,
        min_length=1,
        description="Kinds of questions; one named twice is twice as frequent. Default: all.",
    )
    jitter: float = Field(
        0.0,
        ge=0,
        description="Strength of random changes to what is read: turns, tones, noise; mirrored, recoloured drawings.",
    )
    others: Fraction = Field(
        0.0,
        description="Share of what is read whose objects are any of the sprite pack's classes, not the preset's alone.",
    )
    others_copied: Fraction = Field(
        0.0,
        description="The same share of what is edited, composed and perceived: what was never shown has to be copied.",
    )
    open_styles: bool = Field(
        False,
        description="Of classes that the split withholds a drawing of, styles aren't learned: read aloud, they would "
        "teach that no other exists.",
    )
    relit: Fraction = Field(
        0.0,
        description="Share of what is read (with world.jitter) whose drawings get another hand's ways: light from one "
        "side, an outline, more or less detail. Styles aren't learned from these.",
    )
    recolored: Fraction = Field(
        0.0,
        description="Share of edits and compositions in which objects that stay are mirrored and recoloured alike in "
        "sources and target: they can't be known by heart.",
    )


class OptimizerSection(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon", "adamw8bit"] = Field(
        "adamw",
        description="muon: orthogonalised momentum for the blocks' matrices, AdamW for the rest. adamw8bit: AdamW in a "
        "quarter of the memory; needs bitsandbytes and CUDA.",
    )
    lr: float = Field(1e-3, gt=0, description="Base learning rate.")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.99), description="AdamW betas.")
    eps: float = Field(1e-8, gt=0)
    momentum: Fraction = Field(0.95, description="Muon's momentum.")
    weight_decay: float = Field(0.01, ge=0, description="Not applied to norms, biases and embeddings.")
    warmup_steps: int = Field(200, ge=0, description="Steps of linear warm-up.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Shape over the run's progress.")
    final: Fraction = Field(0.02, description="Learning rate at the end, as a fraction of lr.")
    clip: float | None = Field(1.0, gt=0, description="Largest gradient norm; null: no clipping.")


class EmaSection(Section):
    """Average of the weights."""

    decay: float = Field(0.999, ge=0, lt=1, description="Final decay; 0: no averaging.")
    warmup: bool = Field(True, description="Grow the decay with the number of updates.")


class DataSection(Section):
    """How samples reach the training step."""

    workers: int = Field(1, ge=0, description="Background processes; 0: prepare samples in the training process.")
    prefetch: int = Field(4, ge=1, description="Batches kept ready per worker.")


class SourceSection(Section):
    """One source of a user's own data."""

    path: str = Field("", description="File, folder, pattern such as 'shards/*.tar', or a data set's name.")
    format: Literal["auto", "jsonl", "parquet", "webdataset", "dataset", "world"] = Field(
        "auto", description="auto: by the files' ending. dataset: a saved or named data set. world: the sprite world."
    )
    split: str = Field("train", min_length=1, description="Split of a named data set.")
    streaming: bool = Field(False, description="Read forward only, nothing copied to disk.")
    tasks: tuple[str, ...] | None = Field(
        None, min_length=1, description="Only these tasks; says what picture-to-picture rows are for (default: edit)."
    )
    weight: float = Field(1.0, gt=0, description="Share among the sources that serve a task.")
    root: Path | None = Field(None, description="Folder of the pictures. Default: the manifest's.")
    columns: dict[str, str] = Field(default_factory=dict, description="Our column names to theirs.")

    @model_validator(mode="after")
    def _fits(self) -> SourceSection:
        if self.format != "world" and not self.path:
            raise ValueError("path: name a file, folder, pattern or data set (or use format: world)")
        if self.format == "world" and (self.path or self.streaming):
            raise ValueError("format=world takes neither path nor streaming; the world section says which world")
        for task in self.tasks or ():
            _known_task(task, "tasks")
        return self


class SamplesSection(DataSection):
    """How samples reach the training step, and where they come from if not from the sprite world alone."""

    sources: tuple[SourceSection, ...] = Field((), description="Own data; empty: the sprite world.")
    validation: tuple[SourceSection, ...] = Field((), description="Own held-out data. Default: held-out rows.")
    held_out: float = Field(0.02, ge=0, lt=1, description="Share of local rows kept for validation.")
    resolution: int = Field(64, ge=8, description="Side of own pictures in pixels; with buckets, of the square one.")
    buckets: bool = Field(False, description="Keep about the shape of own pictures instead of cutting squares.")
    bucket_step: int = Field(16, ge=1, description="Sides of buckets are multiples of this many pixels.")
    max_ratio: float = Field(2.0, ge=1, description="Longest side of a bucket over its shortest.")
    fit: Literal["crop", "pad"] = Field("crop", description="Fill the frame and cut, or show all on white.")
    max_pixels: int = Field(100_000_000, ge=1, description="Own pictures with more pixels are refused by their header.")
    max_bad: Fraction = Field(0.1, description="Share of unusable rows past which the run stops.")
    exclude: Path | None = Field(None, description="Quarantine list of rows to leave out.")
    shuffle_block: int = Field(256, ge=1, description="Rows shuffled among one another in streamed data.")
    cache: Path | None = Field(None, description="Feature cache made by unialign cache.")

    @model_validator(mode="after")
    def _sizes(self) -> SamplesSection:
        if self.sources and self.buckets and self.resolution % self.bucket_step:
            raise ValueError(f"resolution={self.resolution} must be a multiple of bucket_step={self.bucket_step}")
        if any(source.format == "world" for source in self.validation):
            raise ValueError("validation takes own data; for the sprite world alone leave data.sources empty")
        return self


class AutoencoderLossSection(Section):
    """Arguments of ``WorldAutoencoder.training_loss``."""

    latent_noise: float = Field(0.2, ge=0, description="Largest noise on the latents, in units of their spread.")
    edge_weight: float = Field(0.5, ge=0, description="Weight of the difference of image gradients.")
    square_weight: float = Field(1.0, ge=0, description="Weight of the squared error.")
    moment_weight: float = Field(1e-3, ge=0, description="Pull of the latents towards mean 0 and variance 1.")


class AutoencoderMixSection(Section):
    """What pictures a batch consists of; relative weights."""

    scenes: float = Field(0.65, ge=0)
    maps: float = Field(0.25, ge=0, description="Depth, edge and segmentation maps.")
    singles: float = Field(0.10, ge=0, description="One sprite, or a plain background.")


class AutoencoderConfig(Section):
    """A run that trains the image autoencoder."""

    kind: Literal["autoencoder"] = "autoencoder"
    run: RunSection
    world: WorldSection = Field(default_factory=WorldSection)
    model: dict[str, Any] = Field(default_factory=dict, description="Arguments of WorldAutoencoder.")
    batch_size: int = Field(32, ge=1, description="Pictures per step.")
    channels_last: bool = Field(True, description="Memory layout; usually faster for convolutions.")
    mix: AutoencoderMixSection = Field(default_factory=AutoencoderMixSection)
    loss: AutoencoderLossSection = Field(default_factory=AutoencoderLossSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    ema: EmaSection = Field(default_factory=EmaSection)
    data: DataSection = Field(default_factory=DataSection)
    validation_pictures: int = Field(48, ge=1, description="Held-out pictures per kind.")
    validation_minutes: float = Field(4.0, gt=0)
    log_every: int = Field(20, ge=1, description="Steps between log lines.")
    initial: Path | None = Field(None, description="Weights folder to start from.")
    decoder_only: bool = Field(
        False, description="Train the decoder of `initial` alone: its latents, and so its transformers, stay valid."
    )

    @model_validator(mode="after")
    def _no_more_than_it_does(self) -> AutoencoderConfig:
        for name, unused in (("keep_best", 0), ("activation_checkpointing", False), ("parallel", "auto")):
            if getattr(self.run, name) != unused:
                raise ValueError(
                    f"run.{name} does nothing with kind: autoencoder, which trains in one process and keeps its newest "
                    "checkpoints; leave it out"
                )
        return self


class TransformerModelSection(Section):
    """What is trained."""

    flavour: str = Field("nano", description="Named sizes: tiny, nano, small, base.")
    transformer: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of UniAlignmentTransformer that differ from the flavour's."
    )
    initial: Path | None = Field(None, description="Model folder whose weights to start from, e.g. an earlier stage's.")


class LoraSection(Section):
    """Train a small change of the weights instead of the weights."""

    rank: int = Field(0, ge=0, description="Inner width of the change; 0: train all weights.")
    alpha: float | None = Field(None, gt=0, description="Scale numerator. Default: the rank.")
    targets: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        min_length=1,
        description="Ends of the names of the layers that are changed.",
    )
    base_precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Type in which the frozen weights are held; bf16 needs run.precision=bf16."
    )


class TextSection(Section):
    """Tokenizer and text embedder."""

    tokenizer: Path | None = Field(None, description="Tokenizer folder. Default: trained on the world's language.")
    vocab_size: int = Field(1024, ge=64, description="Tokens of a tokenizer trained here.")
    corpus: int = Field(20000, ge=100, description="Texts it is trained on.")
    embedding_dim: int | None = Field(None, ge=8, description="Width of token vectors. Default: the transformer's.")
    max_length: int = Field(
        128, ge=8, description="Longest text in tokens; positions of `model.initial` are extended to it."
    )


class AutoencoderSection(Section):
    """The frozen image autoencoder."""

    path: Path | None = Field(None, description="Weights folder; null: pixels.")


class TeacherSection(Section):
    """Frozen encoders for intrinsic alignment; their embeddings are computed once, before training."""

    name: str | None = Field(None, description="package, or a transformers model folder; null: no intrinsic loss.")
    pool: int = Field(20000, ge=1, description="Number of distinct scenes that paired tasks then draw from.")
    cache: Path | None = Field(None, description="Folder of the embeddings. Default: teacher/ in the run folder.")


class LossSection(Section):
    """Weights of the losses (DESIGN section 4)."""

    image: float = Field(1.0, ge=0)
    text: float = Field(0.2, ge=0)
    cross: float = Field(0.05, ge=0, description="Contrastive loss between conditions.")
    intrinsic: float = Field(0.1, ge=0, description="Alignment with the teacher; needs teacher.name.")
    temperature: float = Field(0.07, gt=0)
    cross_form: Literal["condition", "published"] = "condition"
    feature_layer: int | None = Field(None, ge=1, description="Block of the intrinsic loss. Default: a third.")
    per_token: bool = False
    published_projector: bool = False
    projector_dim: int = Field(512, ge=8)
    draws: int = Field(1, ge=1, description="Noise levels per target and step, sharing one encoding of its conditions.")
    negatives: Literal["micro_batch", "step"] = Field(
        "micro_batch", description="What a contrastive pair is told apart from; step: all of the step's (GradCache)."
    )


class FlowSection(Section):
    """Diffusion of pictures. Whether the network predicts velocity or x is model.transformer.prediction."""

    logit_mean: float = Field(0.0, description="Mean of logit(sigma); above 0: more high noise.")
    logit_std: float = Field(1.0, gt=0)
    shift: float = Field(1.0, gt=0, description="Resolution shift.")
    loss_space: Literal["velocity", "sample"] = "velocity"
    weight_floor: Fraction = Field(0.0, description="With sample space: weight 1 / max(sigma, floor)^2; 0: weight 1.")


class MaskedSection(Section):
    """Diffusion of text."""

    epsilon: float = Field(1e-3, gt=0, lt=1)
    weighting: Literal["elbo", "uniform"] = "elbo"
    padding: Fraction = Field(1.0, description="Weight of positions behind a text's end: most of a short answer's.")


class LoggingSection(Section):
    """What is recorded, and how often."""

    tensorboard: bool = True
    trackers: tuple[Literal["wandb", "trackio"], ...] = Field((), description="Further trackers to write to.")
    gradient_norms_every: int | None = Field(
        None, ge=1, description="Steps between measurements of each loss's own gradient norm; null: never."
    )
    log_every: int = Field(20, ge=1, description="Steps between log lines.")
    validation_minutes: float = Field(5.0, gt=0, description="Minutes between validations.")
    validation_steps: int | None = Field(None, ge=1, description="Steps between validations, instead of minutes.")
    validation_samples: int = Field(32, ge=1, description="Held-out samples per task.")
    samples: bool = Field(True, description="Draw and decode a few samples per task at each validation.")
    samples_per_task: int = Field(4, ge=1)
    sampling_steps: int = Field(12, ge=1)
    guidance_scale: float = Field(3.0, ge=1)


class TransformerConfig(Section):
    """A run that trains the unified transformer."""

    kind: Literal["transformer"] = "transformer"
    run: RunSection
    world: TrainedWorldSection = Field(default_factory=TrainedWorldSection)
    model: TransformerModelSection = Field(default_factory=TransformerModelSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    text: TextSection = Field(default_factory=TextSection)
    autoencoder: AutoencoderSection = Field(default_factory=AutoencoderSection)
    teacher: TeacherSection = Field(default_factory=TeacherSection)
    mixture: dict[str, Annotated[int, Field(ge=0)]] = Field(
        default_factory=lambda: {"generate": 8, "edit": 6, "perceive": 6, "control": 2, "compose": 4, "caption": 8,
                                 "answer": 6, "infill": 2},
        description="Samples of each task in a micro-batch.",
    )  # fmt: skip
    task_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="Loss weight by task; 1 where absent."
    )
    prompt_dropout: Fraction = Field(0.1, description="Share of image targets trained without prompt, for guidance.")
    source_dropout: Fraction = Field(
        0.0,
        description="Share of text targets trained without pictures: what texts are likely anyway, to guide away from.",
    )
    micro_batches: int = Field(
        1, ge=1, description="Micro-batches per optimizer step, of all processes together; gradients are averaged."
    )
    loss: LossSection = Field(default_factory=LossSection)
    flow: FlowSection = Field(default_factory=FlowSection)
    masked: MaskedSection = Field(default_factory=MaskedSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    ema: EmaSection = Field(default_factory=EmaSection)
    data: SamplesSection = Field(default_factory=SamplesSection)
    logging: LoggingSection = Field(default_factory=LoggingSection)
    sampling: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Sampler defaults by task, stored with the weights."
    )

    @model_validator(mode="after")
    def _has_samples(self) -> TransformerConfig:
        if not any(self.mixture.values()):
            raise ValueError("mixture: at least one task needs samples")
        if self.lora.rank and self.model.initial is None:
            raise ValueError("lora.rank: a LoRA changes a trained model, name one with model.initial")
        if self.lora.rank and self.lora.base_precision == "bf16" and self.run.precision != "bf16":
            raise ValueError("lora.base_precision=bf16 needs run.precision=bf16")
        if self.world.jitter and (self.data.cache is not None or self.teacher.name is not None):
            kept = "a feature cache (data.cache)" if self.data.cache is not None else "a teacher (teacher.name)"
            raise ValueError(f"world.jitter shows a picture anew each time, {kept} keeps it as it was: use only one")
        for name in ("others", "others_copied", "recolored"):
            if getattr(self.world, name) and self.teacher.name is not None:
                raise ValueError(
                    f"world.{name}: a teacher's embeddings are kept of the preset's scenes as they are: set it to 0"
                )
        for section in ("mixture", "task_weights"):
            for name in getattr(self, section):
                _known_task(name, section)
        return self


# --------------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """``["optimizer.lr=5e-4"]`` to ``{"optimizer": {"lr": "5e-4"}}``; values are YAML.

    Raises:
        ConfigError: an override has no ``=`` or its value is not YAML.
    """
    result: dict[str, Any] = {}
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"Override {item!r} is not of the form key=value, for example optimizer.lr=5e-4.")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"The value of override {item!r} is not valid YAML: {_one_line(error)}.") from None
        *parents, last = key.strip().split(".")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"Override {item!r} contradicts an earlier override of {parent!r}.")
        old = node.get(last)
        # A section given as a whole adds to what single keys of it have said.
        node[last] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` laid over it, section by section."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a dictionary.

    Raises:
        ConfigError: it is missing, not readable, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1, cutoff=0.4)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"No configuration file {path}.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the configuration {path}: {error}.") from None
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_one_line(error)}.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold 'section: ...' entries, not {type(data).__name__}.")
    return data


def validate(model: type[Section], data: dict[str, Any], origin: str = "the configuration") -> Any:
    """``data`` as an instance of ``model``.

    Raises:
        ConfigError: with one clause per problem, unknown keys with the nearest known name.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [_explain(model, problem) for problem in error.errors()]
        raise ConfigError(f"In {origin}: " + "; ".join(problems) + ".") from None


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields, sections included."""
    for name, info in model.model_fields.items():
        yield prefix + name
        section = _section(info.annotation)
        if section is not None:
            yield from known_keys(section, f"{prefix}{name}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        candidates = list(typing.get_args(annotation))
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _explain(model: type[BaseModel], problem: Any) -> str:
    location = ".".join(str(part) for part in problem["loc"]) or "the whole"
    if problem["type"] == "extra_forbidden":
        known = list(known_keys(model))
        parent = location.rpartition(".")[0]
        last = location.rpartition(".")[2]
        siblings = [k for k in known if k.rpartition(".")[0] == parent]
        by_name = {k.rpartition(".")[2]: k for k in reversed(known)}
        near = (
            difflib.get_close_matches(location, siblings, n=1, cutoff=0.7)
            or [by_name[n] for n in difflib.get_close_matches(last, by_name, n=1, cutoff=0.75)]
            or difflib.get_close_matches(location, known, n=1, cutoff=0.5)
        )
        where = f"section {parent!r}" if parent else "the top level"
        hint = f"did you mean {near[0]!r}? " if near else ""
        names = ", ".join(key.rpartition(".")[2] for key in siblings)
        return f"unknown key {location!r} ({hint}{where} has: {names})"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = "" if isinstance(given, dict) else f", not {given!r}"
    return f"{location}: {message[:1].lower()}{message[1:]}{shown}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


KINDS: dict[str, type[Section]] = {"autoencoder": AutoencoderConfig, "transformer": TransformerConfig}
"""Configuration class by the value of ``kind``."""


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Any:
    """Read, override and validate a configuration.

    Args:
        path: YAML file.
        overrides: ``key=value`` strings with dotted keys; values are YAML.

    Returns:
        An instance of the class that ``kind`` names in :data:`KINDS`.

    Raises:
        ConfigError: with what was given, what was expected and how to fix it.
    """
    path = Path(path)
    data = merge(read_yaml(path), parse_overrides(overrides))
    kind = data.get("kind", "transformer")
    if kind not in KINDS:
        raise ConfigError(f"In {path}: kind must be one of {', '.join(sorted(KINDS))}, not {kind!r}.")
    return validate(KINDS[kind], data, str(path))


def to_yaml(config: Section) -> str:
    """The resolved configuration, all defaults included, as YAML that :func:`load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
