"""Means, intervals and paired tests over a handful of seeds.

Arms are compared seed by seed: data order and initial weights follow from the seed, so differences within a seed are
less noisy than differences between means. Two tests stand beside each other: Student's t, which trusts that differences
are normal, and an exact sign-flip permutation test, which trusts only that their signs are exchangeable under the null
and therefore can't be smaller than ``2 / 2**n``. Knows nothing of runs or metrics.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from unialignment.errors import InputError

MOST_FLIPPED = 20
"""Differences up to which all sign assignments are enumerated."""


@dataclass(frozen=True)
class Spread:
    """Mean over seeds.

    Attributes:
        mean: Mean.
        deviation: Standard deviation over seeds (``n - 1``); ``None`` for one seed.
        low: Lower end of the 95 % t interval of the mean; ``None`` for one seed.
        high: Upper end.
        count: Seeds.
    """

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Paired:
    """An arm against its baseline, seed by seed.

    Attributes:
        difference: Mean of arm minus baseline, with its deviation and 95 % t interval.
        t: Student's t of the differences; ``None`` where it is not defined (one seed, or no spread).
        p_t: Its two-sided p.
        p_exact: Two-sided p of the exact sign-flip permutation test.
        p_least: Smallest p that the exact test could give with this many seeds.
    """

    difference: Spread
    t: float | None
    p_t: float | None
    p_exact: float
    p_least: float


def spread(values: Sequence[float], confidence: float = 0.95) -> Spread:
    """Mean, standard deviation and t interval.

    Raises:
        InputError: no values, or one that is not finite.
    """
    array = _finite(values)
    mean, count = float(array.mean()), len(array)
    if count == 1:
        return Spread(mean, None, None, None, 1)
    from scipy import stats

    deviation = float(array.std(ddof=1))
    reach = float(stats.t.ppf(0.5 + confidence / 2, count - 1)) * deviation / math.sqrt(count)
    return Spread(mean, deviation, mean - reach, mean + reach, count)


def paired(values: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Compare two arms over the same seeds, in the same order.

    Raises:
        InputError: the numbers of values differ, or there are none.
    """
    if len(values) != len(baseline):
        raise InputError(f"paired comparison of {len(values)} and {len(baseline)} values; expected one pair per seed")
    differences = _finite(values) - _finite(baseline)
    found = spread(differences.tolist())
    t = p = None
    if found.deviation:
        from scipy import stats

        t = found.mean / (found.deviation / math.sqrt(found.count))
        p = float(2 * stats.t.sf(abs(t), found.count - 1))
    exact = sign_flip_test(differences.tolist())
    return Paired(found, t, p, exact, 2.0 / 2**found.count if found.count > 1 else 1.0)


def sign_flip_test(differences: Sequence[float]) -> float:
    """Two-sided exact permutation test of "the differences are symmetric about 0".

    The p is the share of all ``2**n`` sign assignments whose sum is at least as far from 0 as the one observed, which
    is among them.

    Raises:
        InputError: no differences, or more than :data:`MOST_FLIPPED`.
    """
    array = _finite(differences)
    if len(array) > MOST_FLIPPED:
        raise InputError(f"{len(array)} differences; the exact test enumerates at most {MOST_FLIPPED}")
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(array))))
    sums = np.abs(signs @ array)
    observed = abs(float(array.sum()))
    slack = 1e-12 * float(np.abs(array).sum())  # sums that are equal on paper
    return float((sums >= observed - slack).mean())


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction of p values for having looked at all of them."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (name, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p) - rank) * value))
        adjusted[name] = largest
    return adjusted


def _finite(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise InputError("no values to summarise; expected one for each seed")
    if not np.isfinite(array).all():
        raise InputError("a value that is not finite; leave that seed out")
    return array
