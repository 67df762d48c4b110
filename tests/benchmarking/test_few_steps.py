"""The benchmark of few-step students: its statistics, and that it times what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def few_steps(script: Any) -> Any:
    return script("few_steps")


def test_a_ratio_on_the_same_items_is_sharper_than_the_scores(few_steps: Any) -> None:
    rng = np.random.default_rng(0)
    teacher = [list(rng.uniform(0, 10, 30)) for _ in range(4)]
    value, low, high = few_steps.paired_ratio([[0.9 * score for score in group] for group in teacher], teacher)
    assert (value, low, high) == pytest.approx((0.9, 0.9, 0.9))
    shuffled = [list(rng.permutation(group)) for group in teacher]
    value, low, high = few_steps.paired_ratio(shuffled, teacher)
    assert value == pytest.approx(1.0)
    assert low < 0.95 < 1.05 < high


def test_without_items_it_times_only(few_steps: Any, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(tiny_folder), "--limit", "0", "--batch-size", "1"]
    found = few_steps.main([str(tiny_folder), *options])["rows"]
    assert set(found) == {*few_steps.SAMPLERS, str(tiny_folder)}
    assert found[few_steps.TEACHER]["teacher_over_this"]["median"] == 1.0
    # Six steps instead of twenty, counted rather than timed elsewhere: here only that it isn't slower.
    assert found["teacher, DPM-Solver++ 6"]["teacher_over_this"]["median"] > 1.0
    assert all("overall" not in row for row in found.values())
    assert str(tiny_folder) in capsys.readouterr().out


def test_bad_options(few_steps: Any) -> None:
    with pytest.raises(SystemExit):
        few_steps.main(["--limit", "3", "--batch-size", "8"])
