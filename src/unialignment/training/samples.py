"""What every training step sees: micro-batch ``i`` as a pure function of ``i``.

Draws the mixture's samples from the scene world or from the user's own data and collates them, inside a data worker.
Knows nothing of models.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from unialignment.data.layouts import PAIR_TASKS
from unialignment.data.mixture import DataSettings, SourceSpec, UserStream
from unialignment.data.quarantine import BadRow, Quarantine
from unialignment.data.sample import Sample
from unialignment.errors import AssetError, ConfigError, InputError
from unialignment.model.tokenizer import TextTokenizer
from unialignment.tasks import TASKS
from unialignment.training.batching import Batch, collate
from unialignment.training.config import SourceSection, TrainedWorldSection, TransformerConfig
from unialignment.training.world_samples import WorldSamples, open_stream

VALIDATION_SEED = 20_000_003
"""Seed of the validation samples; the same for every run, so that runs compare."""

Micro = tuple[list[Batch], dict[str, int]]
"""Batches of one micro-batch, and the number of samples replaced because a text did not fit, by task."""


def move(batch: Batch, device: torch.device) -> Batch:
    """The batch with all its tensors on a device."""
    if device.type == "cpu":
        return batch
    changes: dict[str, Any] = {}
    for item in fields(batch):
        value = getattr(batch, item.name)
        if isinstance(value, Tensor):
            changes[item.name] = value.to(device, non_blocking=True)
        elif item.name == "sources":
            changes[item.name] = tuple(source.to(device, non_blocking=True) for source in value)
    return replace(batch, **changes)


def fits(sample: Sample, tokenizer: TextTokenizer, limit: int) -> bool:
    """Whether a sample's texts fit: the prompt into ``limit`` tokens with its end, the target into its canvas.

    A text with gaps fits if its gaps can be told from its words, token by token.
    """
    task = TASKS.get(sample.task)
    if task.gaps:
        # Collating finds the gaps by tokens, which needs each missing word to be a single one.
        try:
            return bool(collate([sample], tokenizer))
        except InputError:
            return False
    # Every token has at least one character, so that short texts need no count.
    if len(sample.prompt) >= limit and tokenizer.encode([sample.prompt])[0].shape[1] >= limit:
        return False
    text = sample.target_text or ""
    if task.target == "image" or len(text) <= task.target_length:
        return True
    return tokenizer.encode([text])[0].shape[1] <= task.target_length


QUARANTINE = "quarantine.jsonl"
"""List of unusable rows, in the run folder."""


def source_specs(sections: tuple[SourceSection, ...]) -> list[SourceSpec]:
    """Sources of a configuration as the data room's plain values."""
    return [SourceSpec(**dict(section)) for section in sections]


def data_settings(config: TransformerConfig) -> DataSettings:
    """How a configuration turns rows into samples."""
    names = ("resolution", "buckets", "bucket_step", "max_ratio", "fit", "max_pixels", "held_out", "shuffle_block")
    return DataSettings(**{name: getattr(config.data, name) for name in names})


def open_data(
    config: TransformerConfig,
    tokenizer: TextTokenizer | None = None,
    split: Literal["train", "held_out"] = "train",
    pool: int | None = None,
    quarantine: Quarantine | None = None,
) -> Any:
    """What samples are drawn from: the world's stream, or the user's sources.

    Args:
        config: The configuration.
        tokenizer: Says which words ``infill`` can leave out.
        split: ``held_out``: the rows or scenes for validation.
        pool: Scenes of the world to draw from, where something is kept for each.
        quarantine: Told of bad rows; ``None``: the run's own, in its folder.

    Raises:
        AssetError, InputError, ConfigError: a source can't be used.
    """
    data = config.data
    seed = config.run.seed if split == "train" else VALIDATION_SEED
    counts = {task: count for task, count in config.mixture.items() if count}
    # Validation shows the preset's scenes as they are.
    changed = config.world if split == "train" else TrainedWorldSection()
    beyond = changed.others or changed.others_copied
    world = (
        WorldSamples(
            open_stream(config, config.world.split if split == "train" else split, seed),
            counts,
            pool,
            changed.jitter,
            open_stream(config, config.world.split, seed, others=True) if beyond else None,
            changed.others,
            changed.others_copied,
            changed.recolored,
            changed.open_styles,
            changed.relit,
            open_stream(config, config.world.split, seed, own_styles=True) if split == "train" else None,
        )
        if not data.sources or any(source.format == "world" for source in data.sources)
        else None
    )
    if not data.sources:
        return world
    chunks = counts if split == "train" else dict.fromkeys(counts, 1)
    own = split == "held_out" and data.validation
    return UserStream(
        source_specs(data.validation if own else data.sources),
        data_settings(config),
        chunks,
        seed,
        None if own else split,
        quarantine or Quarantine(config.run.folder / QUARANTINE, data.max_bad),
        data.exclude,
        config.run.folder / "data-position",
        world=None if world is None else lambda: world,
        whole=None if tokenizer is None else tokenizer.is_whole,
    )


def picture_side(config: TransformerConfig, held_out: dict[str, list[Sample]]) -> int:
    """Side in pixels of the (square) pictures that the model is built for."""
    if config.data.sources:
        return config.data.resolution
    first = next(iter(held_out.values()))[0]
    picture = first.target_image if first.target_image is not None else first.sources[0]
    return int(picture.shape[0])


DATA_IDENTITY = ("sources", "held_out", "resolution", "buckets", "bucket_step", "max_ratio", "fit", "exclude",
                 "shuffle_block")  # fmt: skip
"""Keys of the data section that the meaning of a data position depends on."""


def check_same_data(now: dict[str, Any], then: dict[str, Any]) -> None:
    """Refuses to resume a run on other data: its position would lose its meaning.

    Args:
        now: The configuration as plain values.
        then: The checkpoint's.

    Raises:
        ConfigError: a key that matters has changed.
    """
    before = then.get("data", {})
    if not now["data"]["sources"] and not before.get("sources"):
        return
    changed = [key for key in DATA_IDENTITY if now["data"][key] != before.get(key)]
    if changed:
        raise ConfigError(
            f"the run was begun with another data.{changed[0]}: its position in the data would lose its meaning. Use a "
            "new run.dir, or run.fresh=true to start over in this one."
        )


def training_texts(config: TransformerConfig, limit: int) -> Any:
    """Texts of the user's sources for training a tokenizer, or ``None`` where there are no sources.

    The corpus is part of the tokenizer's identity, so its order doesn't follow the run's seed.
    """
    own = tuple(source for source in config.data.sources if source.format != "world")
    if not own:
        return None

    def opened(chunks: dict[str, int]) -> UserStream:
        return UserStream(source_specs(own), data_settings(config), chunks, 0, "train", excluded=config.data.exclude)

    served = {task: count for task, count in config.mixture.items() if count}
    if len(own) < len(config.data.sources):
        for task in tuple(served):
            try:
                opened({task: served[task]})
            except AssetError:
                del served[task]  # the sprite world serves it
    return opened(served).texts(limit)


@dataclass(frozen=True)
class StepSource:
    """Builds the producer of micro-batches inside a data worker.

    Attributes:
        config: The run's configuration.
        tokenizer: Folder of the run's tokenizer.
        teacher: Folder of the teacher's filled cache, or ``None``.
    """

    config: TransformerConfig
    tokenizer: Path
    teacher: Path | None = None

    def __call__(self) -> Callable[[int], Micro]:
        torch.set_num_threads(1)
        return StepProducer(self)


class StepProducer:
    """Micro-batch ``i``: the mixture's samples, collated."""

    def __init__(self, source: StepSource) -> None:
        config = source.config
        self.config = config
        self.tokenizer = TextTokenizer.from_pretrained(source.tokenizer)
        self.mixture = {task: count for task, count in config.mixture.items() if count}
        self.cache: Any = None
        if source.teacher is not None and config.data.cache is None:
            from unialignment.alignment.cache import TeacherCache

            self.cache = TeacherCache(source.teacher)
        self.features: Any = None
        pool = config.teacher.pool if self.cache is not None else None
        if config.data.cache is not None:
            from unialignment.training.caching import open_features

            self.features = open_features(config, self.tokenizer)
            pool = self.features.meta["pool"]
        self.stream = open_data(config, self.tokenizer, pool=pool)

    def __call__(self, index: int) -> Micro:
        samples: list[Sample] = []
        replaced: dict[str, int] = {}
        blind = self._blind(index)
        for task, slot in self.slots():
            sample, tries = self.sample(task, self.number(task, index, slot))
            samples.append(sample if not blind[len(samples)] else replace(sample, sources=(), pair_id=None))
            for reason, count in tries.items():
                replaced[reason] = replaced.get(reason, 0) + count
        batches = collate(
            samples,
            self.tokenizer,
            prompt_dropout=self.config.prompt_dropout,
            rng=np.random.default_rng((self.config.run.seed, 0xD0, index)),
            task_weights=dict(self.config.task_weights),
            teacher=self._teacher(samples),
            encoded=self.features is not None,
        )
        if self.features is not None and self.features.count("prompt"):
            batches = [self._with_prompts(batch) for batch in batches]
        return batches, replaced

    def _with_prompts(self, batch: Batch) -> Batch:
        """The batch with its prompts' embeddings from the cache."""
        if not batch.prompt_ids.shape[1]:
            return batch
        from unialignment.training.features import prompt_key

        rows = [self.features.get("prompt", prompt_key(i, m)) for i, m in zip(batch.prompt_ids, batch.prompt_mask)]
        embeds = rows[0].new_zeros(len(rows), batch.prompt_ids.shape[1], rows[0].shape[1])
        for row, value in enumerate(rows):
            embeds[row, : len(value)] = value
        return replace(batch, prompt_embeds=embeds)

    def _blind(self, index: int) -> list[bool]:
        """Which samples of a micro-batch are read without their pictures (``source_dropout``)."""
        share = self.config.source_dropout
        rng = np.random.default_rng((self.config.run.seed, 0x5D, index))
        return [share > 0 and TASKS.get(task).target == "text" and rng.random() < share for task, _ in self.slots()]

    def slots(self) -> list[tuple[str, int]]:
        """Task and place of every sample of a micro-batch."""
        return [(task, slot) for task, count in self.mixture.items() for slot in range(count)]

    def number(self, task: str, index: int, slot: int) -> int:
        """The number, among a task's samples, of a slot of micro-batch ``index``."""
        return int(index * self.stream.chunks[task] + slot)

    def sample(self, task: str, number: int) -> tuple[Sample, dict[str, int]]:
        """A sample whose row can be read and whose texts fit, and how many could not or did not before it.

        Raises:
            InputError: none of several samples fits.
            AssetError: too many rows of the user's data are unusable.
        """
        tries: dict[str, int] = {}
        last: Exception | None = None
        for attempt in range(20):
            try:
                sample = self._draw(task, number, attempt)
            except BadRow as error:
                last = error
                tries[f"{task} (unusable row)"] = tries.get(f"{task} (unusable row)", 0) + 1
                continue
            if fits(sample, self.tokenizer, self.config.text.max_length):
                return sample if not attempt else replace(sample, pair_id=None), tries
            tries[task] = tries.get(task, 0) + 1
        if last is not None:
            raise AssetError(
                f"20 rows in a row could not be used for {task}; the last: {last}. Check the data with "
                "`unialign data check`."
            )
        raise InputError(
            f"20 {task} samples in a row have texts that do not fit: longer than text.max_length="
            f"{self.config.text.max_length} tokens or the task's canvas, or gaps in words of several tokens; "
            "raise text.max_length or text.vocab_size, or use a smaller world preset."
        )

    def _draw(self, task: str, number: int, attempt: int) -> Sample:
        """A sample, with latents in place of pictures where there is a feature cache."""
        if self.features is None:
            sample: Sample = self.stream.sample(task, number, attempt)
            return sample
        sample, keys = self.stream.bare(task, number, attempt)
        absent = [key for key in keys if not self.features.has("latent", key)]
        if absent:  # when the cache was made, the row was unusable, or had texts that don't fit
            raise BadRow(str(self.features.folder), absent[0], "not in the feature cache")
        latents = [self.features.get("latent", key) for key in keys]
        target = latents.pop(0) if TASKS.get(task).target == "image" else None
        return replace(sample, target_image=cast(Any, target), sources=cast(Any, tuple(latents)))

    def _teacher(self, samples: list[Sample]) -> dict[int, tuple[Tensor, Tensor]] | None:
        if self.features is not None and self.config.teacher.name is not None:
            found = {}
            for sample in samples:
                if sample.pair_id is not None and sample.pair_id not in found:
                    image = self.features.get("teacher_image", sample.meta["pictures"][0])
                    found[sample.pair_id] = image, self.features.get("teacher_text", teacher_text(sample))
            return found
        if self.cache is None:
            return None
        pairs = {s.pair_id: s for s in samples if s.pair_id is not None}
        if not pairs:
            return {}
        pictures, texts = teacher_inputs(list(pairs.values()))
        images, words = self.cache.embed_images(pictures), self.cache.embed_texts(texts)
        return {pair: (images[i], words[i]) for i, pair in enumerate(pairs)}


def teacher_inputs(samples: list[Sample]) -> tuple[list[Any], list[str]]:
    """Picture and (canonical) caption of paired samples: what the teachers embed."""
    pictures = [s.target_image if s.target_image is not None else s.sources[0] for s in samples]
    return pictures, [teacher_text(sample) for sample in samples]


def teacher_text(sample: Sample) -> str:
    """The caption of a paired sample that a text teacher embeds."""
    if "scene" not in sample.meta:
        return str(sample.meta["caption"])
    from unialignment.world.captions import describe_canonical

    return describe_canonical(sample.meta["scene"]).text


def paired_samples(config: TransformerConfig, report: Callable[[str], None]) -> Any:
    """Every sample that a teacher has to embed, once: the pool of scenes and the paired rows of own data.

    Raises:
        ConfigError: a source is streamed.
    """
    sources = config.data.sources
    if any(source.streaming for source in sources):
        raise ConfigError("teacher.name needs data that can be read more than once: set streaming=false, or no teacher")
    if not sources or any(source.format == "world" for source in sources):
        stream = open_stream(config, config.world.split, config.run.seed)
        report(f"Teacher {config.teacher.name}: embedding up to {config.teacher.pool} scenes, once.")
        for index in range(config.teacher.pool):
            yield stream.sample("generate", index)
    if sources:
        chunks = {task: count for task, count in config.mixture.items() if count}
        stream = open_data(config)
        task = next((task for task in PAIR_TASKS if task in chunks), None)
        if task is not None:
            report(f"Teacher {config.teacher.name}: embedding the rows of {task}, once.")
            yield from stream.every(task)


def fill_teacher_cache(config: TransformerConfig, folder: Path, report: Callable[[str], None]) -> tuple[int, int]:
    """Embed the pool of paired scenes; continues where an earlier start stopped.

    Returns:
        Widths of the picture and text embeddings.
    """
    from unialignment.alignment.cache import TeacherCache
    from unialignment.alignment.teachers import load_teacher

    assert config.teacher.name is not None
    if config.data.cache is not None:
        from unialignment.training.features import read_meta

        widths = read_meta(config.data.cache).get("teacher_dims") or (0, 0)
        if not all(widths):
            raise ConfigError(
                f"the feature cache {config.data.cache} was made without a teacher; make it with teacher.name="
                f"{config.teacher.name} or leave teacher.name out"
            )
        return int(widths[0]), int(widths[1])
    with TeacherCache(folder, load_teacher(config.teacher.name)) as cache:
        for group in batched(paired_samples(config, report), 64):
            pictures, texts = teacher_inputs(group)
            cache.embed_images(pictures)
            cache.embed_texts(texts)
        cache.flush()
        return cache.image_dim, cache.text_dim


def batched(items: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """Lists of up to ``size`` consecutive items."""
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def validation_samples(config: TransformerConfig, tokenizer: TextTokenizer) -> dict[str, list[Sample]]:
    """Held-out samples of every task of the mixture, the same for all runs on this data.

    Raises:
        AssetError: own data has no held-out rows for a task.
    """
    stream = open_data(config, tokenizer, "held_out")
    result: dict[str, list[Sample]] = {}
    for task, count in config.mixture.items():
        if not count:
            continue
        chosen: list[Sample] = []
        index = 0
        most = 50 * config.logging.validation_samples
        limit = min(most, stream.epoch_length(task) or most)
        while len(chosen) < config.logging.validation_samples and index < limit:
            index += 1
            try:
                sample = stream.sample(task, index - 1)
            except BadRow:
                continue
            if fits(sample, tokenizer, config.text.max_length):
                chosen.append(sample)
        if not chosen:
            raise AssetError(
                f"none of the {limit} held-out samples of {task} can be used: their texts don't fit the model's canvas "
                "or their rows can't be read. Check the data with `unialign data check`."
            )
        result[task] = chosen
    return result
