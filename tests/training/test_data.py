"""Prefetching: order, determinism, restarts, and what happens when a worker fails or dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from unialignment.errors import AssetError, UniAlignmentError
from unialignment.training.data import Prefetcher


@dataclass(frozen=True)
class Source:
    """Produces (index, tensor, process); misbehaves at one index if told to."""

    fail_at: int = -1
    kind: str = ""
    size: int = 3

    def __call__(self) -> Callable[[int], tuple[int, torch.Tensor, int]]:
        def produce(index: int) -> tuple[int, torch.Tensor, int]:
            if index == self.fail_at:
                if self.kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise AssetError("no sprites") if self.kind == "asset" else KeyError("bug")
            return index, torch.full((self.size,), float(index)), os.getpid()

        return produce


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_start_do_not_depend_on_workers(workers: int) -> None:
    with Prefetcher(Source(), start=5, workers=workers, depth=2) as loader:
        items = [next(loader) for _ in range(7)]
        assert loader.position == 12
    assert [index for index, _, _ in items] == list(range(5, 12))
    assert all(torch.equal(tensor, torch.full((3,), float(index))) for index, tensor, _ in items)
    processes = {pid for _, _, pid in items}
    assert processes == {os.getpid()} if workers == 0 else os.getpid() not in processes and len(processes) == 2


def test_a_users_mistake_in_a_worker_keeps_its_type() -> None:
    with Prefetcher(Source(1, "asset")) as loader:
        next(loader)
        with pytest.raises(AssetError, match="no sprites"):
            next(loader)


def test_a_bug_in_a_worker_shows_its_traceback() -> None:
    with Prefetcher(Source(0, "bug")) as loader, pytest.raises(RuntimeError, match="KeyError"):
        next(loader)


def test_a_worker_that_is_killed_is_replaced_without_a_trace() -> None:
    said: list[str] = []
    # An item is far larger than a pipe holds: the worker is killed in the midst of handing one over.
    with Prefetcher(Source(size=1 << 20), start=4, workers=1, depth=2, report=said.append) as loader:
        items = [next(loader)]
        first = items[0][2]
        os.kill(first, signal.SIGKILL)
        items += [next(loader) for _ in range(5)]
    assert [index for index, _, _ in items] == list(range(4, 10))
    assert all(bool((tensor == index).all()) for index, tensor, _ in items)
    assert items[-1][2] != first
    assert len(said) == 1 and "exit code -9" in said[0] and "another takes its place" in said[0]


def test_a_worker_that_can_only_die_ends_the_run_with_a_clear_error() -> None:
    said: list[str] = []
    # What a worker had ready when it died dies with it, so it may be item 0 that never arrives.
    wanted = r"before either handed over micro-batch [01]\. Nothing that was saved is lost.*data\.workers"
    with Prefetcher(Source(1, "kill"), report=said.append) as loader, pytest.raises(UniAlignmentError, match=wanted):
        for _ in range(2):
            next(loader)
    assert 1 <= len(said) <= 2


def test_closing_ends_the_workers() -> None:
    loader = Prefetcher(Source())
    process = next(loader)[2]
    loader.close()
    loader.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
