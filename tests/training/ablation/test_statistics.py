"""Tests over a few seeds: hand-computed cases, exactness, and what no data can show."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unialignment.errors import InputError
from unialignment.training.ablation.statistics import holm, paired, sign_flip_test, spread

numbers = st.lists(st.floats(-100, 100), min_size=1, max_size=7)


def test_spread_by_hand() -> None:
    found = spread([1.0, 2.0, 6.0])
    # mean 3; deviations -2, -1, 3; variance (4 + 1 + 9) / 2 = 7; t(0.975, 2) = 4.302653
    assert found.mean == 3.0 and found.count == 3
    assert found.deviation == pytest.approx(math.sqrt(7))
    assert found.high == pytest.approx(3 + 4.302653 * math.sqrt(7 / 3), rel=1e-6)
    assert found.low == pytest.approx(3 - 4.302653 * math.sqrt(7 / 3), rel=1e-6)


def test_one_seed_has_no_spread() -> None:
    found = paired([0.5], [0.25])
    assert (found.difference.deviation, found.t, found.p_t) == (None, None, None)
    assert (found.p_exact, found.p_least) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.0, 2.0, 3.0], 2 / 8),  # only +++ and --- reach 6
        ([1.0, 2.0, -3.0], 1.0),  # the sum is 0
        ([5.0, 1.0, -1.0], 6 / 8),  # sums of +-5 +-1 +-1: 7, 5, 5, 3 and their negatives; 6 of 8 are at least 5 in size
        ([0.0, 0.0], 1.0),
        ([0.3, 0.1, 0.2, 0.4], 2 / 16),
    ],
)
def test_sign_flips_by_hand(differences: list[float], expected: float) -> None:
    assert sign_flip_test(differences) == pytest.approx(expected)


def test_rounding_does_not_break_ties() -> None:
    # 0.1 + 0.2 - 0.3 is not 0 in floating point, and neither are its permutations the same
    assert sign_flip_test([0.1, 0.2, -0.3]) == 1.0


@given(numbers)
def test_sign_flips_are_symmetric_and_bounded(differences: list[float]) -> None:
    p = sign_flip_test(differences)
    assert p == sign_flip_test([-value for value in differences]) == sign_flip_test(differences[::-1])
    assert 2 / 2 ** len(differences) - 1e-12 <= p <= 1 or len(differences) == 1


def test_paired_t_by_hand() -> None:
    found = paired([3.0, 5.0, 10.0], [2.0, 3.0, 4.0])
    # differences 1, 2, 6 as above: t = 3 / sqrt(7 / 3); two degrees of freedom: p = 1 - t / sqrt(t^2 + 2)
    t = 3 / math.sqrt(7 / 3)
    assert found.t == pytest.approx(t)
    assert found.p_t == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert found.p_exact == found.p_least == 0.25


def test_pairing_matters() -> None:
    """Seeds differ more than arms do; only the pairing shows the arm's effect."""
    base = [0.1, 0.5, 0.9]
    assert paired([0.12, 0.52, 0.921], base).p_t < 0.01
    with pytest.raises(InputError, match="one pair per seed"):
        paired([1.0], [1.0, 2.0])


def test_no_spread_gives_no_t() -> None:
    found = paired([1.0, 1.0], [0.0, 0.0])
    assert found.t is None and found.p_t is None and found.p_exact == 0.5


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == pytest.approx({"b": 1.0, "a": 1.0})


@pytest.mark.parametrize("values", [[], [float("nan")], [1.0, float("inf")]])
def test_what_is_no_number_is_refused(values: list[float]) -> None:
    with pytest.raises(InputError):
        spread(values)


def test_too_many_for_enumeration() -> None:
    with pytest.raises(InputError, match="at most 20"):
        sign_flip_test([1.0] * 21)
