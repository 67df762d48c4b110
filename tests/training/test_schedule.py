"""Progress by steps and by wall clock, across restarts; the learning rate that follows from it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unialignment.training.schedule import Progress, learning_rate_factor


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_budget_spans_restarts_but_not_the_pause_between_them() -> None:
    clock = Clock()
    first = Progress(budget_seconds=100, clock=clock)
    assert first.fraction == 0
    first.start()
    clock.now += 40
    first.step = 7
    state = first.state_dict()
    clock.now += 10_000  # machine off
    second = Progress(budget_seconds=100, clock=clock)
    second.load_state_dict(state)
    second.start()
    clock.now += 20
    assert second.step == 7
    assert second.fraction == pytest.approx(0.6)
    assert second.remaining_seconds == pytest.approx(40)
    assert not second.done
    clock.now += 40
    assert second.done and second.fraction == 1.0 and second.remaining_seconds == 0


def test_the_first_bound_ends_the_run() -> None:
    clock = Clock()
    progress = Progress(max_steps=10, budget_seconds=100, clock=clock)
    progress.start()
    progress.step = 9
    assert not progress.done
    clock.now += 95
    assert progress.fraction == pytest.approx(0.95)
    progress.step = 10
    assert progress.done


def test_a_run_needs_an_end() -> None:
    with pytest.raises(ValueError, match="budget_seconds"):
        Progress()


def test_warm_up_then_cosine_to_the_final_rate() -> None:
    def factor(step: int) -> float:
        return learning_rate_factor(step, step / 1000, warmup_steps=10, final=0.1)

    assert factor(0) == pytest.approx(0.1, rel=1e-3)
    assert factor(4) == pytest.approx(0.5, rel=1e-2)
    assert factor(9) == pytest.approx(1.0, rel=1e-3)
    assert factor(500) == pytest.approx(0.1 + 0.9 * 0.5)
    assert factor(1000) == pytest.approx(0.1)


@given(st.integers(0, 10_000), st.floats(0, 1), st.integers(0, 1000), st.sampled_from(["cosine", "linear", "constant"]))
def test_the_factor_stays_between_zero_and_one(step: int, fraction: float, warmup: int, schedule: str) -> None:
    factor = learning_rate_factor(step, fraction, warmup, schedule)  # type: ignore[arg-type]
    assert 0 < factor <= 1
    later = learning_rate_factor(max(step, warmup), min(1.0, fraction + 0.1), warmup, schedule)  # type: ignore[arg-type]
    assert later <= learning_rate_factor(max(step, warmup), fraction, warmup, schedule) + 1e-12  # type: ignore[arg-type]
