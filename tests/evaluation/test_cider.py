"""CIDEr-D against cases worked out by hand from the paper's formulas."""

from __future__ import annotations

import math

import pytest

from unialignment.evaluation.cider import cider


def test_the_reference_itself_scores_ten() -> None:
    texts = ["a cat sits on a mat", "two dogs run over the field"]
    assert cider(texts, [[text] for text in texts]) == pytest.approx([10, 10])


def test_one_shared_word_by_hand() -> None:
    # Two items, every n-gram in one of them only: each weighs its count times log 2, which cancels in the cosine.
    # 1-grams: one of three shared, 1 / (sqrt 3 * sqrt 3). Longer n-grams: none. Lengths are equal.
    scores = cider(["red fox jumps", "x"], [["red hen sleeps"], ["blue"]])
    assert scores[0] == pytest.approx(10 * (1 / 3) / 4)
    assert scores[1] == 0


def test_counts_are_clipped_and_lengths_penalised() -> None:
    # 1-grams: candidate (4, 0), reference (1, 1): min(4, 1) * 1 over 4 * sqrt 2. 2-grams: none shared.
    # Lengths differ by two.
    score = cider(["red red red red", "blue"], [["red fox"], ["blue"]])[0]
    assert score == pytest.approx(10 * (1 / (4 * math.sqrt(2))) / 4 * math.exp(-4 / 72))


def test_what_every_reference_says_weighs_nothing() -> None:
    # "on" is in both references: log(2 / 2) = 0.
    assert cider(["on", "on"], [["on red"], ["on blue"]]) == [0, 0]


def test_several_references_are_averaged() -> None:
    alone = cider(["red fox", "y"], [["red fox"], ["blue hen"]])[0]
    both = cider(["red fox", "y"], [["red fox", "grey cat"], ["blue hen"]])[0]
    assert (alone, both) == (pytest.approx(5), pytest.approx(2.5))  # two lengths of n-gram of four are there


def test_case_and_punctuation_do_not_matter() -> None:
    assert cider(["Red, fox!", "y"], [["red fox"], ["blue"]])[0] == pytest.approx(5)


def test_unpaired_input_is_refused() -> None:
    with pytest.raises(ValueError, match="one caption and at least one reference"):
        cider(["a"], [[]])
