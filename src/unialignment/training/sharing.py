"""How the processes of a run share out an optimizer step: whole micro-batches first, then the rows of one.

A step is ``micro_batches`` micro-batches, however many processes there are, so that losses and weights do not depend on
their number. Knows nothing of models, networks or how tensors travel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unialignment.training.batching import Batch

Micro = tuple[list[Any], dict[str, int]]
"""Batches (or shares of them) of one micro-batch, and counts of replaced samples by task."""


@dataclass(frozen=True)
class Layout:
    """Which part of every step is this process's.

    With ``g = gcd(micro_batches, processes)``, the processes form ``g`` groups; each group takes ``micro_batches / g``
    whole micro-batches, and its ``processes / g`` members share the rows of each. A multiple of the number of
    processes as ``micro_batches`` means that no sample is prepared twice. Where all must go through the same passes
    together (``in_step``: every pass gathers shards of the weights), there is one group.

    Attributes:
        micro_batches: Of one optimizer step, all processes together.
        processes: How many there are.
        rank: Which of them this is.
        in_step: All share the rows of every micro-batch.
    """

    micro_batches: int
    processes: int = 1
    rank: int = 0
    in_step: bool = False

    @property
    def groups(self) -> int:
        """Groups of processes; micro-batches are shared out among these."""
        return 1 if self.in_step else math.gcd(self.micro_batches, self.processes)

    @property
    def parts(self) -> int:
        """Processes of a group; they share the rows of a micro-batch."""
        return self.processes // self.groups

    @property
    def group(self) -> int:
        """This process's group."""
        return self.rank // self.parts

    @property
    def part(self) -> int:
        """This process's place within its group."""
        return self.rank % self.parts

    @property
    def local(self) -> int:
        """Micro-batches that this process works on in a step."""
        return self.micro_batches // self.groups

    def position(self, index: int) -> int:
        """Position, in the run's sequence of micro-batches, of this process's ``index``-th."""
        step, place = divmod(index, self.local)
        return step * self.micro_batches + self.group * self.local + place

    def members(self, group: int) -> list[int]:
        """Ranks of a group."""
        return list(range(group * self.parts, (group + 1) * self.parts))


@dataclass(frozen=True)
class Share:
    """Some rows of a batch, and what is needed to compute with them as part of the whole.

    Attributes:
        batch: The rows. Where a process has fewer than the others, one is repeated with weight 0 and without pair.
        rows: ``[b]`` place of each row in the whole batch.
        valid: Bool ``[b]``, false for repeated rows.
        tasks: Task of every row of the whole batch.
        parts: Number of shares that the batch was cut into.
    """

    batch: Batch
    rows: Tensor
    valid: Tensor
    tasks: tuple[str, ...]
    parts: int

    @property
    def total(self) -> int:
        """Rows of the whole batch."""
        return len(self.tasks)

    def __len__(self) -> int:
        return len(self.batch)


def take_share(batch: Batch, part: int, parts: int) -> Share:
    """Share number ``part`` of ``parts``: consecutive rows, the same number in every share."""
    size = math.ceil(len(batch) / parts)
    wanted = torch.arange(part * size, (part + 1) * size)
    valid = wanted < len(batch)
    rows = wanted.clamp(max=len(batch) - 1)
    chosen = rows.tolist()
    changes: dict[str, Any] = {}
    for item in fields(batch):
        value = getattr(batch, item.name)
        if isinstance(value, Tensor):
            changes[item.name] = value[rows]
        elif isinstance(value, tuple) and value and isinstance(value[0], Tensor):
            changes[item.name] = tuple(each[rows] for each in value)
        elif isinstance(value, tuple) and len(value) == len(batch) and value:
            changes[item.name] = tuple(value[i] for i in chosen)
    changes["weights"] = torch.where(valid, changes["weights"], 0.0)
    changes["pair_ids"] = torch.where(valid, changes["pair_ids"], -1)
    return Share(replace(batch, **changes), rows, valid, batch.tasks, parts)


@dataclass(frozen=True)
class SharedSource:
    """Builds, inside a data worker, the producer of one process's part of every step.

    Attributes:
        source: Builds the producer of whole micro-batches by position.
        layout: Which part.
        shares: Hand out :class:`Share` objects even if every micro-batch is this process's as a whole.
    """

    source: Callable[[], Callable[[int], Micro]]
    layout: Layout
    shares: bool = True

    def __call__(self) -> Callable[[int], Micro]:
        produce, layout, shares = self.source(), self.layout, self.shares

        def part(index: int) -> Micro:
            batches, replaced = produce(layout.position(index))
            if layout.part:  # counted once in the group
                replaced = {}
            if shares:
                batches = [take_share(batch, layout.part, layout.parts) for batch in batches]
            return batches, replaced

        return part


def noise_seed(seed: int, position: int) -> int:
    """Seed of the noise of the micro-batch at ``position``: like its samples, a function of its position alone."""
    return int(np.random.SeedSequence((seed, 0xA0153, position)).generate_state(1, np.uint64)[0] >> 1)


def count_tokens(batches: Sequence[Any], pixels: int, latents: int) -> int:
    """Tokens of conditions and targets that count in some batches.

    Args:
        batches: Batches, or shares of them.
        pixels: Side of a picture token in pixels.
        latents: Side of a picture token in latents, which batches from a feature cache hold.
    """
    total = 0
    for item in batches:
        share = item if isinstance(item, Share) else None
        batch = item.batch if share is not None else item
        rows = len(batch) if share is None else int(share.valid.sum())
        side = latents if batch.encoded else pixels
        images = list(batch.sources) + ([] if batch.target_images is None else [batch.target_images])
        each = sum((image.shape[-2] // side) * (image.shape[-1] // side) for image in images)
        each += batch.prompt_ids.shape[1] + (0 if batch.target_ids is None else batch.target_ids.shape[1])
        total += rows * each
    return total
