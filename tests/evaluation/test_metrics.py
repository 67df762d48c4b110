"""Metrics against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unialignment.evaluation import metrics


def test_estimate_of_constant_has_no_width() -> None:
    result = metrics.estimate([0.5] * 7)
    assert (result.value, result.low, result.high, result.count) == (0.5, 0.5, 0.5, 7)


def test_estimate_leaves_nan_out_and_repeats() -> None:
    values = [1.0, 0.0, float("nan"), 1.0, 0.0]
    first, second = metrics.estimate(values, seed=3), metrics.estimate(values, seed=3)
    assert first == second
    assert first.count == 4
    assert first.value == 0.5


def test_estimate_interval_matches_normal_theory() -> None:
    values = np.tile([0.0, 1.0], 200)
    result = metrics.estimate(values)
    half_width = 1.96 * math.sqrt(0.25 / 400)
    assert result.low == pytest.approx(0.5 - half_width, abs=0.01)
    assert result.high == pytest.approx(0.5 + half_width, abs=0.01)


def test_estimate_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        metrics.estimate([float("nan")])


def test_names_are_compared_as_multisets() -> None:
    assert metrics.contains_all(["dog", "dog", "cat"], ["dog", "dog"])
    assert not metrics.contains_all(["dog", "cat"], ["dog", "dog"])
    assert metrics.same_names(["cat", "dog"], ["dog", "cat"])
    assert not metrics.same_names(["cat", "dog", "dog"], ["dog", "cat"])


def test_psnr_by_hand() -> None:
    black = np.zeros((2, 2, 3), np.uint8)
    other = black.copy()
    other[0, 0] = 255  # a quarter of the pixels is wrong by the whole range: 10 log10(4)
    assert metrics.psnr(black, other) == pytest.approx(10 * math.log10(4))
    outside = np.array([[False, True], [True, True]])
    assert metrics.psnr(black, other, outside) == metrics.MAX_PSNR
    assert math.isnan(metrics.psnr(black, other, np.zeros((2, 2), bool)))


def test_psnr_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="equal shapes"):
        metrics.psnr(np.zeros((2, 2)), np.zeros((2, 3)))


def test_iou_by_hand() -> None:
    first, second = np.zeros((2, 3), np.uint8), np.zeros((2, 3), np.uint8)
    first[:, :2] = 255  # 4 pixels
    second[:, 1:] = 255  # 4 pixels, 2 shared, 6 together
    assert metrics.iou(first, second) == pytest.approx(2 / 6)
    assert metrics.iou(np.zeros((2, 2)), np.zeros((2, 2))) == 1.0
    assert metrics.iou(first, np.zeros((2, 3))) == 0.0


def test_depth_delta1_by_hand() -> None:
    target = np.array([[0, 100, 100, 200]], np.uint8)
    prediction = np.array([[255, 124, 126, 161]], np.uint8)  # ratios 1.24, 1.26, 1.242; the background does not count
    assert metrics.depth_delta1(prediction, target) == pytest.approx(2 / 3)
    assert metrics.depth_delta1(np.zeros_like(target), target) == 0.0
    assert math.isnan(metrics.depth_delta1(target, np.zeros_like(target)))


def test_edge_f1_tolerates_one_pixel_but_not_two() -> None:
    target = np.zeros((9, 9), np.uint8)
    target[:, 4] = 255
    assert metrics.edge_f1(np.roll(target, 1, axis=1), target) == 1.0
    assert metrics.edge_f1(np.roll(target, 2, axis=1), target) == 0.0


def test_edge_f1_by_hand() -> None:
    target, prediction = np.zeros((5, 9), np.uint8), np.zeros((5, 9), np.uint8)
    target[2, 0] = target[2, 8] = 255
    prediction[2, 0] = 255  # precision 1, recall 1/2
    assert metrics.edge_f1(prediction, target) == pytest.approx(2 / 3)
    assert metrics.edge_f1(np.zeros_like(target), target) == 0.0


def test_dilate_is_a_square() -> None:
    mask = np.zeros((5, 5), bool)
    mask[2, 2] = True
    assert metrics.dilate(mask, 1).sum() == 9
    assert metrics.dilate(mask, 0).sum() == 1


def test_recall_at_by_hand() -> None:
    similarity = np.array([[0.9, 0.1, 0.0], [0.5, 0.4, 0.3], [0.0, 0.1, 0.2]])
    assert metrics.recall_at(similarity).tolist() == [1.0, 0.0, 1.0]


def test_collapsed_embedding_retrieves_nothing() -> None:
    assert metrics.recall_at(np.ones((4, 4))).sum() == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_interval_encloses_most_and_stays_in_range(values: list[float]) -> None:
    result = metrics.estimate(values, resamples=50)
    assert min(values) - 1e-9 <= result.low <= result.high <= max(values) + 1e-9


def test_recall_at_5_and_ties() -> None:
    similarity = np.eye(8)
    similarity[0] = [0.5, 0.9, 0.8, 0.7, 0.6, 0.1, 0.1, 0.1]  # fifth
    similarity[1] = [0.9, 0.5, 0.8, 0.7, 0.6, 0.5, 0.1, 0.1]  # shares the fifth place: a miss
    assert metrics.recall_at(similarity, 5).tolist() == [1, 0, 1, 1, 1, 1, 1, 1]


def test_weighted_shares_are_pooled() -> None:
    values = [metrics.share_found(["a"], ["a", "b", "b"]), metrics.share_found(["c"], ["c"])]
    assert [float(value) for value in values] == [pytest.approx(1 / 3), 1]
    pooled = metrics.estimate(values)
    assert (pooled.value, pooled.count) == (0.5, 2)  # two of four things
    assert pooled.low < 0.5 < pooled.high


def test_mean_of_groups_weighs_groups_alike() -> None:
    found = metrics.mean_of_groups([[0.0] * 9, [10.0]])
    assert (found.value, found.low, found.high, found.count) == (5, 5, 5, 10)
    with pytest.raises(ValueError, match="every group"):
        metrics.mean_of_groups([[1.0], []])


def test_abs_rel_by_hand() -> None:
    target = np.array([[0, 100], [200, 0]], np.uint8)
    given = np.array([[255, 150], [100, 255]], np.uint8)
    assert metrics.depth_abs_rel(given, target) == pytest.approx(0.5)
    assert np.isnan(metrics.depth_abs_rel(given, np.zeros((2, 2), np.uint8)))
