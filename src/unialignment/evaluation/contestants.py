"""Who is judged: the model, and the references that tell what its numbers mean.

Ceilings are what a perfect model would score (the ground truth, and the ground truth after the autoencoder); floors are
what one scores without looking (the source copied, or the target of some other item). All have one interface. Knows
nothing of how outputs are judged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from unialignment.data.sample import Sample
from unialignment.errors import InputError
from unialignment.evaluation.judge import Output


class Contestant(Protocol):
    """Produces outputs for items of one task."""

    def outputs(self, samples: Sequence[Sample], seed: int) -> list[Output | None]:
        """One output per item; ``None`` where this contestant does not apply.

        Args:
            samples: Items, all of one task.
            seed: Item ``i`` is sampled with seed ``seed + i``.
        """
        ...


class ModelContestant:
    """The model itself, through its pipeline.

    Args:
        pipe: A loaded ``UniAlignmentPipeline``.
        batch_size: Items per call.
        settings: Sampler settings by task (``{"generate": {"num_inference_steps": 20}}``), over the defaults.
    """

    def __init__(self, pipe: Any, batch_size: int = 16, settings: dict[str, dict[str, Any]] | None = None) -> None:
        self.pipe, self.batch_size, self.settings = pipe, batch_size, settings or {}
        self.shortened = 0
        """Prompts that were longer than the model reads, of which it was given the beginning."""

    def outputs(self, samples: Sequence[Sample], seed: int) -> list[Output | None]:
        """See :class:`Contestant`."""
        self.shortened += sum(self.read(sample) != sample.prompt for sample in samples)
        return list(self.produce(samples, [seed + index for index in range(len(samples))]))

    def read(self, sample: Sample) -> str:
        """What the model is given of a prompt: all of it, unless it is too long."""
        return readable(self.pipe, sample.prompt) if sample.task in ("generate", "edit") else sample.prompt

    def produce(self, samples: Sequence[Sample], seeds: Sequence[int]) -> list[Output]:
        """One output per item, each sampled with a seed of its own."""
        if not samples:
            return []
        task = samples[0].task
        sources = [list(sample.sources) for sample in samples]
        result = self.pipe.run(
            task,
            [self.read(sample) or None for sample in samples],
            sources if any(sources) else None,
            kind=None,
            seed=list(seeds),
            batch_size=self.batch_size,
            progress=False,
            **self.settings.get(task, {}),
        )
        if hasattr(result, "texts"):
            return list(result.texts)
        return [np.asarray(image.convert("RGB")) for image in result.images]


class Truth:
    """The ground truth: what a perfect model would produce."""

    def outputs(self, samples: Sequence[Sample], seed: int) -> list[Output | None]:
        """See :class:`Contestant`."""
        return [sample.target_image if sample.target_image is not None else sample.target_text for sample in samples]


class Reconstruction:
    """The true picture after the model's image autoencoder: the best that any decoder of those latents can show.

    Args:
        pipe: The pipeline, of which ``autoencoder`` is used.
        batch_size: Pictures per call.
    """

    def __init__(self, pipe: Any, batch_size: int = 32) -> None:
        self.pipe, self.batch_size = pipe, batch_size

    def outputs(self, samples: Sequence[Sample], seed: int) -> list[Output | None]:
        """See :class:`Contestant`."""
        if not samples or samples[0].target_image is None:
            return [None] * len(samples)
        targets = [sample.target_image for sample in samples if sample.target_image is not None]
        results: list[Output | None] = []
        for start in range(0, len(targets), self.batch_size):
            results += reconstruct(self.pipe, targets[start : start + self.batch_size])
        return results


class CopySource:
    """Gives back the first source unchanged: the floor of "did anything happen at all"."""

    def outputs(self, samples: Sequence[Sample], seed: int) -> list[Output | None]:
        """See :class:`Contestant`."""
        return [sample.sources[0] if sample.target_image is not None and sample.sources else None for sample in samples]


class RandomOther:
    """The target of another item of the same task and kind: the floor of plausible output without looking."""

    def outputs(self, samples: Sequence[Sample], seed: int) -> list[Output | None]:
        """See :class:`Contestant`."""
        rng = np.random.default_rng(seed)
        results: list[Output | None] = []
        for index, sample in enumerate(samples):
            others = [i for i, other in enumerate(samples) if i != index and other.kind == sample.kind]
            if not others:
                results.append(None)
                continue
            chosen = samples[others[int(rng.integers(len(others)))]]
            results.append(chosen.target_image if chosen.target_image is not None else chosen.target_text)
        return results


class Commonest:
    """The most frequent true answer among the items of the same kind: the floor of knowing the questions alone."""

    def outputs(self, samples: Sequence[Sample], seed: int) -> list[Output | None]:
        """See :class:`Contestant`."""
        if not samples or samples[0].task != "answer":
            return [None] * len(samples)
        answers: dict[str, Counter[str]] = {}
        for sample in samples:
            answers.setdefault(sample.kind, Counter())[sample.target_text or ""] += 1
        return [answers[sample.kind].most_common(1)[0][0] for sample in samples]


def readable(pipe: Any, text: str) -> str:
    """The longest run of a text's first words that a model can read, which is all of it but for very long prompts.

    Raises:
        InputError: Not even the first word can be read.
    """
    check = getattr(pipe, "check_length", None)
    if check is None:
        return text
    words = text.split()
    for count in range(len(words) + 1, 0, -1):
        shorter = text if count > len(words) else " ".join(words[:count])
        try:
            check(shorter)
            return shorter
        except InputError:
            continue
    raise InputError(f"no word of {text[:40]!r} can be read by this model")


def reconstruct(pipe: Any, images: Sequence[np.ndarray]) -> list[Output]:
    """Pictures ``[R, R, 3]`` uint8 after encoding and decoding by the pipeline's autoencoder."""
    import torch

    autoencoder = pipe.autoencoder
    values = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        decoded = autoencoder.decode(autoencoder.encode(values))
    return list(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
