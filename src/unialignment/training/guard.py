"""Judges each step by its gradient norm: what is not finite, or far above the recent median, is not applied.

Knows nothing of models; it is handed a number and remembers the last accepted ones.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from unialignment.errors import StorageError
from unialignment.training.sharing import Share

WINDOW = 128
ENOUGH = 64
"""Accepted steps that the median is taken over, and how many there must be before spikes are looked for."""


class StepGuard:
    """Decides which steps to skip, and counts them.

    Args:
        factor: Skip a step whose gradient norm exceeds this many times the recent median; ``None``: only those that
            are not finite.
        limit: Skipped steps after which the run should stop.
    """

    def __init__(self, factor: float | None, limit: int) -> None:
        self.factor = factor
        self.limit = limit
        self.skipped = 0
        self.recent: deque[float] = deque(maxlen=WINDOW)

    def judge(self, norm: float) -> str | None:
        """Why a step with this gradient norm is to be skipped (and counted), or ``None``: take it."""
        reason = None
        if not math.isfinite(norm):
            reason = "its loss or gradient is not finite"
        elif self.factor is not None and len(self.recent) >= ENOUGH:
            usual = statistics.median(self.recent)
            if norm > self.factor * usual:
                reason = f"its gradient norm {norm:.4g} is {norm / max(usual, 1e-30):.0f} times the usual {usual:.4g}"
        if reason is None:
            self.recent.append(norm)
        else:
            self.skipped += 1
        return reason

    @property
    def exhausted(self) -> bool:
        """Whether more steps were skipped than the limit allows."""
        return self.skipped > self.limit

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"skipped": self.skipped, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.skipped = int(state["skipped"])
        self.recent = deque(state["recent"], maxlen=WINDOW)


def describe(batches: Sequence[Any], tokenizer: Any) -> list[dict[str, Any]]:
    """What batches (or shares of them) consist of, for people: tasks, texts and pairs of every sample."""
    result = []
    for item in batches:
        batch = item.batch if isinstance(item, Share) else item
        prompts = tokenizer.decode(batch.prompt_ids) if batch.prompt_ids.shape[1] else [""] * len(batch)
        targets = [None] * len(batch) if batch.target_ids is None else tokenizer.decode(batch.target_ids)
        for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            if isinstance(item, Share) and not bool(item.valid[row]):
                continue
            entry = {"task": batch.tasks[row], "kind": batch.kinds[row], "prompt": prompt}
            if target is not None:
                entry["target"] = target
            if int(batch.pair_ids[row]) >= 0:
                entry["pair"] = int(batch.pair_ids[row])
            result.append(entry)
    return result


def record(folder: Path, entry: dict[str, Any]) -> Path:
    """Add a skipped step to ``skipped.jsonl``; non-finite numbers as ``null``.

    Raises:
        StorageError: it could not be written.
    """
    path = folder / "skipped.jsonl"
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean, ensure_ascii=False) + "\n")
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {error.strerror or error}.") from error
    return path


def write_batches(path: Path, micros: Sequence[Sequence[Any]]) -> None:
    """The tensors of a step's micro-batches, as safetensors: ``<micro-batch>.<batch>.<field>``.

    Raises:
        StorageError: it could not be written.
    """
    tensors: dict[str, Tensor] = {}
    for i, batches in enumerate(micros):
        for j, item in enumerate(batches):
            batch = item.batch if isinstance(item, Share) else item
            for name, value in vars(batch).items():
                if isinstance(value, Tensor):
                    tensors[f"{i}.{j}.{name}"] = value.detach().cpu().contiguous()
                elif name == "sources":
                    for k, source in enumerate(value):
                        tensors[f"{i}.{j}.{name}.{k}"] = source.detach().cpu().contiguous()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {error.strerror or error}.") from error
