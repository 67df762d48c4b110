"""Memory of tensors: counted while code runs, on real tensors, or on fake ones that have shapes but no storage.

Knows nothing of models.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all storages that come into being within the block and are still alive.

    Scratch memory inside an operator isn't seen, and neither is what an allocator holds in reserve.

    Args:
        ignore: Tensors (parameters, inputs) that exist already; views of them are no new memory.

    Attributes:
        now: Bytes alive.
        peak: The most there ever were.
    """

    def __init__(self, ignore: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}
        for tensor in ignore:
            self._note(tensor, counted=False)

    def _note(self, tensor: Tensor, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counted else 0
        self._known[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note what it returns."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value)
        return result


def tensors_of(*modules: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [t for module in modules for t in (*module.parameters(), *module.buffers())]


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, by their shapes and types."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measured_peak(run: Callable[[], Any]) -> tuple[int, int]:
    """What the CPU's allocator hands out while ``run`` runs, by PyTorch's profiler: the truth to check predictions by.

    Returns:
        The peak, and what is left at the end, in bytes above the beginning.
    """
    from torch.profiler import ProfilerActivity, profile

    gc.collect()  # what is left from before must not be freed, and counted, meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = run()
    now = peak = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    del kept
    return peak, now
