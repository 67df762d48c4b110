"""Caches of conditions put together: the same values, and never there twice where nobody else holds them."""

from __future__ import annotations

import pytest
import torch

from unialignment.memory import MemoryTracker
from unialignment.model.cache import ConditionCache, TransformerOutput

LAYERS, ROOM = 6, 5


def make(batch: int, length: int, masked: bool = False) -> ConditionCache:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    tensors = [torch.randn(batch, 2, length, 8, generator=generator) for _ in range(2 * LAYERS)]
    mask = torch.arange(length).expand(batch, -1) < length - 1 if masked else None
    return ConditionCache(tuple(tensors[:LAYERS]), tuple(tensors[LAYERS:]), mask, TransformerOutput())


@pytest.mark.parametrize("lengths", [(7,), (7, 7), (7, 4)])
def test_consuming_changes_no_value(lengths: tuple[int, ...]) -> None:
    def parts() -> list:
        chosen = [None, torch.tensor([1, 0, 1])]
        return [(make(2, n, masked=n == 4), index) for n, index in zip(lengths, chosen, strict=False)]

    kept, given = parts(), parts()
    expected, found = ConditionCache.assemble(kept, ROOM), ConditionCache.assemble(given, ROOM, consume=True)
    assert len(kept) == len(lengths) and not given
    for name in ("keys", "values"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(expected, name), getattr(found, name), strict=True))
    assert (expected.mask is None) == (found.mask is None)
    assert expected.mask is None or torch.equal(expected.mask, found.mask)
    assert found.room is not None and found.room[0][0].shape[2] == max(lengths) + ROOM


def test_consumed_caches_are_freed_block_by_block() -> None:
    peaks = []
    for consume in (False, True):
        with torch.no_grad(), MemoryTracker() as tracker:
            parts = [
                (
                    ConditionCache(
                        tuple(torch.zeros(2, 2, 50, 8) for _ in range(LAYERS)),
                        tuple(torch.zeros(2, 2, 50, 8) for _ in range(LAYERS)),
                        None,
                        TransformerOutput(),
                    ),
                    None,
                )
            ]
            ConditionCache.assemble(parts, ROOM, consume=consume)
        peaks.append(tracker.peak / (2 * LAYERS * 2 * 2 * 50 * 8 * 4))
    assert peaks[0] > 2.0
    assert peaks[1] < 1.1 + 2 / LAYERS
