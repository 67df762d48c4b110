"""Reading judges' answers and score arithmetic, against cases worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unialignment.evaluation.agreement import krippendorff_alpha
from unialignment.evaluation.scoring import Refusal, UnparsableAnswer, overall, parse

READABLE = [
    ('{"reasoning": "fine", "score": [8, 6]}', [8, 6]),
    ('```json\n{"reasoning": "fine", "score": [8, 6]}\n```', [8, 6]),
    ('```\n{"score": [8, 6]}\n```', [8, 6]),
    ('Sure! {"score": [8, 6]} I hope that 10 out of 10 people agree.', [8, 6]),
    ('The source {a dog} became {"score": [8.5, 6]}', [8.5, 6]),
    ('{"score": [3, 3]} On reflection: {"score": [8, 6]}', [8, 6]),
    ("{'reasoning': 'it isn\\'t', 'score': [8, 6],}", [8, 6]),
    ('{"score": ["8/10", "6"]}', [8, 6]),
    ('{"score": "8, 6"}', [8, 6]),
    ('{"Score": {"success": 8, "preservation": 6}}', [8, 6]),
    ('||V^=^V||\n{"score": [8, 6]}\n||V^=^V||', [8, 6]),
    ('<think>maybe {"score": [1, 1]}</think>{"score": [8, 6]}', [8, 6]),
    ('{"reasoning": "cut off quotes " here", "score": [8, 6]}', [8, 6]),
    ("**Score:** [8, 6]\nBecause of the light.", [8, 6]),
    ("[8, 6]", [8, 6]),
    ("```\n[8, 6]\n```", [8, 6]),
]


@pytest.mark.parametrize(("text", "scores"), READABLE)
def test_readable_answers(text: str, scores: list[float]) -> None:
    found = parse(text, 2)
    assert list(found.values) == scores
    assert found.note == ""


@pytest.mark.parametrize("text", ["7", "7/10", "Score: 7", " **7**. ", '{"score": 7}', '{"score": [7]}', "7 out of 10"])
def test_a_single_number_stands_for_the_lowest_and_is_noted(text: str) -> None:
    found = parse(text, 2)
    assert found.lowest == 7
    assert found.note == "1 of 2 scores"
    assert parse(text, 1).note == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The picture is nice.",
        "I count 3 dogs and 2 cats.",
        '{"reasoning": "the list is missing"}',
        '{"score": []}',
        '{"score": null}',
        '{"score": [true, false]}',
        '{"score": [[8], 6]}',
        '{"score": ["good", 6]}',
        '{"score": [NaN, 6]}',
        '{"score": [8, 6, 4]}',
        '{"score": [85, 60]}',
        '{"score": [-1, 6]}',
        "-3",
        "11",
    ],
)
def test_unreadable_answers_are_said_to_be(text: str) -> None:
    with pytest.raises(UnparsableAnswer):
        parse(text, 2)


def test_the_published_protocol_clamps_and_takes_the_lowest_of_any_number() -> None:
    assert parse('{"score": [85, 6]}', 2, strict=False).values == (10, 6)
    assert parse('{"score": [8, 6, 4]}', 2, strict=False).lowest == 4
    assert parse('{"score": [-1]}', 1, strict=False).note == "clamped"


@pytest.mark.parametrize("text", ["I'm sorry, but I can't help with that.", "As an AI I do not rate faces."])
def test_refusals_are_told_from_unreadable_answers(text: str) -> None:
    with pytest.raises(Refusal):
        parse(text, 2)


def test_a_polite_answer_with_scores_is_no_refusal() -> None:
    assert parse('I\'m sorry to say it failed. {"score": [1, 2]}', 2).lowest == 1


@given(st.text(max_size=300))
def test_any_text_gives_scores_in_range_or_unparsable(text: str) -> None:
    try:
        found = parse(text, 2)
    except UnparsableAnswer:
        return
    assert all(0 <= value <= 10 for value in found.values)


def test_overall_is_the_geometric_mean() -> None:
    assert overall(9, 4) == 6
    assert overall(0, 10) == 0
    assert overall(8, 6) == pytest.approx(6.9282, abs=1e-4)


def test_alpha_of_a_case_worked_by_hand() -> None:
    # Values 1 2 | 3 3: within units (1 + 1 + 0 + 0) / 4 = 0.5; all ordered pairs: 2 * (1 + 4 + 4 + 1 + 1 + 0) = 22,
    # divided by 4 * 3. alpha = 1 - 0.5 / (22 / 12) = 8 / 11.
    assert krippendorff_alpha([(1, 2), (3, 3)]) == pytest.approx(8 / 11)


def test_alpha_of_krippendorffs_own_example() -> None:
    # Krippendorff (2011), data with missing values of four observers; interval alpha 0.849.
    nan = math.nan
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, nan, nan, nan],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nan, 3],
        [nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nan],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nan],
    ]
    assert krippendorff_alpha(list(zip(*observers, strict=True))) == pytest.approx(0.849, abs=5e-4)


def test_alpha_is_undefined_without_variation_or_pairs() -> None:
    assert krippendorff_alpha([(10, 10), (10, 10)]) is None
    assert krippendorff_alpha([(1, None), (None, 2)]) is None
