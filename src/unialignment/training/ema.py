"""Exponential moving average of a model's weights. Knows nothing of training loops or files.

The decay is warmed up (``(1 + n) / (10 + n)`` until it reaches the set value), so that the average of a short run
is not its initialisation. Buffers are copied, not averaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Keeps ``average <- decay * average + (1 - decay) * weight`` for every trainable parameter.

    Args:
        model: The model to follow. Its frozen parameters are not copied.
        decay: Final decay, 0-1; 0 makes the average equal to the weights.
        warmup: Whether the decay grows with the number of updates.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"The EMA decay must be in [0, 1), not {decay}.")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        parameters = dict(model.named_parameters())
        self.shadow: dict[str, Tensor] = {name: parameters[name].detach().clone().float() for name in self._names}

    def current_decay(self) -> float:
        """Decay that the next :meth:`update` uses."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's present weights; call after each optimizer step."""
        weight = 1.0 - self.current_decay()
        parameters = dict(model.named_parameters())
        averages = [self.shadow[name] for name in self._names]
        values = [parameters[name].detach().to(self.shadow[name].dtype) for name in self._names]
        if averages:
            torch._foreach_lerp_(averages, values, weight)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's weights with the average."""
        parameters = dict(model.named_parameters())
        for name in self._names:
            parameters[name].copy_(self.shadow[name].to(parameters[name].dtype))

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model has the averaged weights; afterwards exactly its own again."""
        parameters = dict(model.named_parameters())
        own = {name: parameters[name].detach().clone() for name in self._names}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name in self._names:
                    parameters[name].copy_(own[name])

    def state_dict(self) -> dict[str, Tensor | int]:
        """The averages and the number of updates."""
        return {"updates": self.updates, **{f"shadow.{name}": value for name, value in self.shadow.items()}}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Inverse of :meth:`state_dict`.

        Raises:
            KeyError: an average is missing.
            ValueError: an average has another shape than the model's parameter.
        """
        self.updates = int(state["updates"])
        for name in self._names:
            value = state[f"shadow.{name}"]
            assert isinstance(value, Tensor)
            if value.shape != self.shadow[name].shape:
                raise ValueError(f"EMA of {name}: shape {tuple(value.shape)}, expected {tuple(self.shadow[name].shape)}.")
            self.shadow[name].copy_(value)
