"""Exponential moving average of a model's weights. Knows nothing of training loops or files.

Sharded weights have sharded averages. The decay is warmed up (``(1 + n) / (10 + n)`` until it reaches the set value),
so that the average of a short run is not its initialisation. Buffers are copied, not averaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unialignment.training.parallel import local_tensor


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
        # Looked up once: walking the module tree at every step would cost more than the update of a small model.
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shadow: dict[str, Tensor] = {n: p.detach().clone().float() for n, p in self._parameters.items()}

    def current_decay(self) -> float:
        """Decay that the next :meth:`update` uses."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model's present weights; call after each optimizer step."""
        weight = 1.0 - self.current_decay()
        if self.shadow:
            # Of sharded weights each process averages its own part.
            values = [local_tensor(p.detach()).float() for p in self._parameters.values()]
            torch._foreach_lerp_([local_tensor(s) for s in self.shadow.values()], values, weight)
        self.updates += 1

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Overwrite the model's weights with the average."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.shadow[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model has the averaged weights; afterwards exactly its own again."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(own[name])

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
        for name in self.shadow:
            value = state[f"shadow.{name}"]
            assert isinstance(value, Tensor)
            if value.shape != self.shadow[name].shape:
                expected = tuple(self.shadow[name].shape)
                raise ValueError(f"EMA of {name}: shape {tuple(value.shape)}, expected {expected}.")
            self.shadow[name].copy_(value)
