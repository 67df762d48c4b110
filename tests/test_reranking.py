"""Best-of-N: which pictures are kept, with what they are compared, and the expectation over subsets."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unialignment.errors import InputError
from unialignment.reranking import Reranker, expected_best_of

SMALL = {"num_inference_steps": 1, "seed": 0}


def test_all_drawn_can_be_kept_best_first(tiny_pipeline) -> None:
    every = tiny_pipeline.generate("the dog", num_images_per_prompt=4, best_of=4, **SMALL)
    assert sorted(every.seeds) == [0, 1, 2, 3]
    assert every.scores == sorted(every.scores, reverse=True) and len(set(every.scores)) == 4
    two = tiny_pipeline.generate("the dog", num_images_per_prompt=2, best_of=4, **SMALL)
    assert two.seeds == every.seeds[:2]


def test_the_order_does_not_depend_on_the_batch(tiny_pipeline) -> None:
    options = {"num_images_per_prompt": 3, "best_of": 3, **SMALL}
    both = tiny_pipeline.generate(["the dog", "a red apple"], batch_size=2, **options)
    alone = tiny_pipeline.generate("a red apple", **options)
    assert both.seeds[3:] == alone.seeds
    np.testing.assert_allclose(both.scores[3:], alone.scores, atol=1e-5)


def test_edits_may_be_compared_with_what_they_should_show(tiny_pipeline) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    options = {"num_images_per_prompt": 4, "best_of": 4, **SMALL}
    told = tiny_pipeline.edit("replace the dog by a cat", picture, best_of_text="a cat", **options)
    texts = tiny_pipeline.embed_text(["a cat", "replace the dog by a cat"])
    pictures = tiny_pipeline.edit("replace the dog by a cat", picture, num_images_per_prompt=4, **SMALL).images
    # What was decoded is scored from its latents; the picture itself is close to them, not equal.
    by_seed = dict(zip(told.seeds, told.scores))
    assert len(pictures) == 4 and told.settings["best_of_text"] == "a cat"
    plain = tiny_pipeline.edit("replace the dog by a cat", picture, **options)
    assert by_seed != dict(zip(plain.seeds, plain.scores))
    assert not np.allclose(texts[0], texts[1])
    same = tiny_pipeline.edit("replace the dog by a cat", picture, best_of_text=["replace the dog by a cat"], **options)
    assert same.scores == plain.scores


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"best_of_text": "a cat"}, "best_of=2 or more"),
        ({"best_of_text": "a cat", "best_of": 1}, "best_of=2 or more"),
        ({"best_of_text": ["a cat", "a dog"], "best_of": 2}, "2 texts for 1 inputs"),
        ({"best_of_text": " ", "best_of": 2}, "best_of_text"),
    ],
)
def test_mistakes_are_named(tiny_pipeline, options, message) -> None:
    with pytest.raises(InputError, match=message):
        tiny_pipeline.generate("the dog", **options, **SMALL)


def test_without_a_prompt_there_is_nothing_to_compare_with(tiny_pipeline) -> None:
    with pytest.raises(InputError, match="say what the pictures should show"):
        tiny_pipeline.generate(None, best_of=2, **SMALL)
    told = tiny_pipeline.generate(None, best_of=2, best_of_text="a dog", **SMALL)
    assert len(told.images) == 1


def test_equal_scores_keep_their_order(tiny_pipeline) -> None:
    ranking = Reranker(tiny_pipeline, ["the dog", "a cat"], 3)
    ranking.scores[:] = ranking.scores.new_tensor([1, 1, 2, 5, 4, 5])
    assert ranking.best(2) == [2, 0, 3, 5]


def test_expectation_by_hand() -> None:
    # best of 2 among scores 3 > 2 > 1: the first wins two of three pairs, the second one
    assert expected_best_of([1, 3, 2], [0.0, 1.0, 0.5], 2) == pytest.approx((1 + 1 + 0.5) / 3)
    assert expected_best_of([1, 3, 2], [0.0, 1.0, 0.5], 3) == 1.0
    assert expected_best_of([1, 3, 2], [0.0, 1.0, 0.5], 1) == pytest.approx(0.5)
    # a ranking that says nothing gives the plain mean, for every n
    assert [expected_best_of([1, 1, 1], [0.0, 1.0, 0.5], n) for n in (1, 2, 3)] == pytest.approx([0.5] * 3)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=6), st.data())
def test_expectation_is_the_mean_over_all_subsets(pairs, data) -> None:
    n = data.draw(st.integers(1, len(pairs)))
    scores, values = zip(*pairs)

    def best(subset):
        top = max(scores[i] for i in subset)
        tied = [values[i] for i in subset if scores[i] == top]
        return sum(tied) / len(tied)

    every = [best(subset) for subset in combinations(range(len(pairs)), n)]
    assert expected_best_of(scores, values, n) == pytest.approx(sum(every) / len(every))


@pytest.mark.parametrize("n", [0, 3])
def test_no_such_n(n) -> None:
    with pytest.raises(InputError, match="best of"):
        expected_best_of([1, 2], [1, 2], n)


def test_the_evaluation_passes_it_to_what_a_prompt_describes() -> None:
    from unialignment.evaluation.cli import _settings

    assert _settings(None, None) == {}
    assert _settings(None, None, 4) == {"generate": {"best_of": 4}, "edit": {"best_of": 4}}
    assert _settings(5, None, 4)["edit"] == {"num_inference_steps": 5, "best_of": 4}
    assert _settings(5, None, 4)["perceive"] == {"num_inference_steps": 5}
