"""Orders: permutations are permutations, epochs are whole, weights are met without skipping or repeating a row."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unialignment.data.order import Order, Quota, permuted


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**63), st.integers(0, 9))
def test_a_permutation_reaches_every_place_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(i, size, seed, epoch) for i in range(size)) == list(range(size))


def test_permutations_differ_by_seed_and_look_random() -> None:
    size = 2000
    first, second = ([permuted(i, size, seed) for i in range(size)] for seed in (1, 2))
    assert first != second
    assert abs(np.corrcoef(np.arange(size), first)[0, 1]) < 0.1
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10
    with pytest.raises(ValueError, match="expected 0 to 1999"):
        permuted(size, size)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.integers(1, 7), st.integers(0, 99))
def test_chunks_share_a_bucket_and_an_epoch_sees_all_rows(buckets: list[int], chunk: int, seed: int) -> None:
    rows = np.arange(len(buckets)) * 10
    order = Order(rows, np.array(buckets), chunk, seed)
    seen = [order.row(number) for number in range(2 * order.epoch_length)]
    by_row = dict(zip(rows.tolist(), buckets, strict=True))
    for start in range(0, len(seen), chunk):
        assert len({by_row[row] for row in seen[start : start + chunk]}) == 1
    for epoch in (seen[: order.epoch_length], seen[order.epoch_length :]):
        assert set(epoch) == set(rows.tolist())
    # Only the last chunk of a bucket is filled up with rows that came before.
    assert order.epoch_length - len(rows) < chunk * len(set(buckets))


def test_without_buckets_an_epoch_has_no_repetition_and_the_next_another_order() -> None:
    order = Order(np.arange(50), None, 8, seed=3)
    first, second = ([order.row(epoch * 50 + i) for i in range(50)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert order.row(7, attempt=1) != order.row(7)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 9))
def test_quotas_follow_weights_and_number_every_source_without_gaps(weights: list[float], seed: int) -> None:
    quota = Quota(weights, seed)
    shares = [quota.share(number) for number in range(3 * quota.period)]
    counts = Counter(source for source, _ in shares)
    for source, weight in enumerate(weights):
        assert sorted(inner for s, inner in shares if s == source) == list(range(counts[source]))
        assert counts[source] >= 3
        assert counts[source] / len(shares) == pytest.approx(weight / sum(weights), abs=len(weights) / quota.period)
    again = Quota(weights, seed)
    assert [again.share(number) for number in reversed(range(3 * quota.period))] == shares[::-1]


def test_a_source_of_weight_zero_is_never_drawn() -> None:
    quota = Quota([0.0, 2.0, 1.0], 0)
    assert {quota.share(number)[0] for number in range(600)} == {1, 2}
    with pytest.raises(ValueError, match="at least one above 0"):
        Quota([0.0], 0)
