"""The interface that both diffusion processes share, so that a trainer knows neither.

Knows nothing of networks: predictions come in as tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class PathSample:
    """A point on the path from clean data to noise.

    Attributes:
        clean: The data, ``[B, C, H, W]`` latents or ``[B, L]`` token ids.
        noised: The same shape, at time ``time``.
        time: ``[B]``, 0 (clean) to 1 (noise).
        timestep: ``[B]``, what the network is told: ``1000 * time`` for pictures, 0 for text (masks say it all).
        noise: ``[B, C, H, W]`` for pictures, ``None`` for text.
        corrupted: Bool ``[B, L]``, positions that were masked, for text; ``None`` for pictures.
    """

    clean: Tensor
    noised: Tensor
    time: Tensor
    timestep: Tensor
    noise: Tensor | None = None
    corrupted: Tensor | None = None


class DiffusionPath(Protocol):
    """What a trainer needs of a diffusion process."""

    def sample_time(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Training times ``[B]`` in (0, 1)."""
        ...

    def sample_path(self, clean: Tensor, time: Tensor, generator: torch.Generator | None = None) -> PathSample:
        """Noises ``clean`` to ``time`` (``[B]``, 0-1)."""
        ...

    def loss(self, prediction: Tensor, path: PathSample) -> Tensor:
        """Per-sample loss ``[B]`` of a prediction at ``path``."""
        ...


class SeededNoise:
    """Standard normal ``[len(seeds), *shape]``, another at every call: what sampling starts from, then fresh noise.

    Sample i's is from ``seeds[i]`` alone, whatever its neighbours are. Always drawn on the CPU in float32, so that a
    seed means the same picture on every device.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self._shape = tuple(shape)

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(*self._shape, generator=generator) for generator in self._generators])


def drive(steps: Generator[tuple[Any, ...], Tensor, Tensor], answer: Callable[..., Tensor]) -> Tensor:
    """Run a solver or decoder that yields what it asks for, answering each request at once; returns its result."""
    reply = None
    while True:
        try:
            asked = steps.send(reply)  # type: ignore[arg-type]  # the first reply must be None
        except StopIteration as end:
            result: Tensor = end.value
            return result
        reply = answer(*asked)
