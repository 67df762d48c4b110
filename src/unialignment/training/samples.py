"""What every training step sees: micro-batch ``i`` as a pure function of ``i``.

Draws the mixture's samples from the scene world and collates them, inside a data worker. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unialignment.data.sample import Sample
from unialignment.errors import InputError
from unialignment.model.tokenizer import TextTokenizer
from unialignment.tasks import TASKS
from unialignment.training.batching import Batch, collate
from unialignment.training.config import TransformerConfig

VALIDATION_SEED = 20_000_003
"""Seed of the validation samples; the same for every run, so that runs compare."""

_ELSEWHERE = 1 << 40
"""Offset of the substitutes for samples that do not fit; no run is that long."""

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


def open_stream(config: TransformerConfig, split: Literal["train", "held_out"], seed: int) -> Any:
    """The world's sample stream of a configuration."""
    from unialignment.world.presets import preset
    from unialignment.world.sprites import SpritePack
    from unialignment.world.stream import WorldStream

    pack = SpritePack.load(config.world.pack)
    world = config.world
    return WorldStream(
        pack,
        preset(world.preset, pack),
        split,
        seed,
        varied=world.varied,
        long=world.long,
    )


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
        self.stream = open_stream(config, config.world.split, config.run.seed)
        self.tokenizer = TextTokenizer.from_pretrained(source.tokenizer)
        self.mixture = {task: count for task, count in config.mixture.items() if count}
        self.stride = max(self.mixture.values())
        self.cache: Any = None
        if source.teacher is not None:
            from unialignment.alignment.cache import TeacherCache

            self.cache = TeacherCache(source.teacher)

    def __call__(self, index: int) -> Micro:
        samples: list[Sample] = []
        replaced: dict[str, int] = {}
        for task, count in self.mixture.items():
            for slot in range(count):
                # One stride for all tasks: those that show the same scene at the same index meet in one micro-batch,
                # which is where the contrastive loss finds its pairs.
                number = index * self.stride + slot
                sample, tries = self.sample(task, number)
                samples.append(sample)
                if tries:
                    replaced[task] = replaced.get(task, 0) + tries
        batches = collate(
            samples,
            self.tokenizer,
            prompt_dropout=self.config.prompt_dropout,
            rng=np.random.default_rng((self.config.run.seed, 0xD0, index)),
            task_weights=dict(self.config.task_weights),
            teacher=self._teacher(samples),
        )
        return batches, replaced

    def sample(self, task: str, number: int) -> tuple[Sample, int]:
        """A sample whose texts fit, and how many did not before it.

        Raises:
            InputError: none of several samples fits.
        """
        if self.cache is not None:
            number %= self.config.teacher.pool
        for attempt in range(20):
            sample: Sample = self.stream.sample(task, number + attempt * _ELSEWHERE)
            if fits(sample, self.tokenizer, self.config.text.max_length):
                return sample if not attempt else replace(sample, pair_id=None), attempt
        raise InputError(
            f"20 {task} samples in a row have texts that do not fit: longer than text.max_length="
            f"{self.config.text.max_length} tokens or the task's canvas, or gaps in words of several tokens; "
            "raise text.max_length or text.vocab_size, or use a smaller world preset."
        )

    def _teacher(self, samples: list[Sample]) -> dict[int, tuple[Tensor, Tensor]] | None:
        if self.cache is None:
            return None
        pairs = {s.pair_id: s for s in samples if s.pair_id is not None}
        if not pairs:
            return {}
        pictures, texts = teacher_inputs(list(pairs.values()))
        images, words = self.cache.embed_images(pictures), self.cache.embed_texts(texts)
        return {pair: (images[i], words[i]) for i, pair in enumerate(pairs)}


def teacher_inputs(samples: list[Sample]) -> tuple[list[Any], list[str]]:
    """Picture and canonical caption of paired samples: what the teachers embed."""
    from unialignment.world.captions import describe_canonical

    pictures = [s.target_image if s.target_image is not None else s.sources[0] for s in samples]
    return pictures, [describe_canonical(s.meta["scene"]).text for s in samples]


def fill_teacher_cache(config: TransformerConfig, folder: Path, report: Callable[[str], None]) -> tuple[int, int]:
    """Embed the pool of paired scenes; continues where an earlier start stopped.

    Returns:
        Widths of the picture and text embeddings.
    """
    from unialignment.alignment.cache import TeacherCache
    from unialignment.alignment.teachers import load_teacher

    assert config.teacher.name is not None
    stream = open_stream(config, config.world.split, config.run.seed)
    with TeacherCache(folder, load_teacher(config.teacher.name)) as cache:
        if len(cache) < 2 * config.teacher.pool:
            report(f"Teacher {config.teacher.name}: embedding up to {config.teacher.pool} scenes, once.")
        for start in range(0, config.teacher.pool, 64):
            stop = min(start + 64, config.teacher.pool)
            pictures, texts = teacher_inputs([stream.sample("generate", i) for i in range(start, stop)])
            cache.embed_images(pictures)
            cache.embed_texts(texts)
        cache.flush()
        return cache.image_dim, cache.text_dim


def validation_samples(config: TransformerConfig, tokenizer: TextTokenizer) -> dict[str, list[Sample]]:
    """Held-out samples of every task of the mixture, the same for all runs on this world."""
    stream = open_stream(config, "held_out", VALIDATION_SEED)
    result: dict[str, list[Sample]] = {}
    for task, count in config.mixture.items():
        if not count:
            continue
        chosen: list[Sample] = []
        index = 0
        while len(chosen) < config.logging.validation_samples and index < 50 * config.logging.validation_samples:
            sample = stream.sample(task, index)
            index += 1
            if fits(sample, tokenizer, config.text.max_length):
                chosen.append(sample)
        result[task] = chosen
    return result
