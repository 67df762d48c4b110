"""In which order rows are seen: every number leads to one row, without any state, and an epoch sees every row once.

A number is all that a resumed run has to know, whatever the number of ranks and workers. Knows nothing of rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6


def _mix(*values: int) -> int:
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _scramble(value: int, key: int) -> int:
    """A 64-bit integer hash (the finaliser of MurmurHash3)."""
    value = (value ^ key) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 33)) * 0xFF51AFD7ED558CCD) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 33)) * 0xC4CEB9FE1A85EC53) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 33)


def permuted(index: int, size: int, *seed: int) -> int:
    """Where a pseudo-random permutation of ``size`` items sends ``index``; nothing is stored.

    A balanced Feistel network over the next even number of bits, walked along its cycle until it falls within ``size``
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).

    Args:
        index: 0 to ``size`` - 1.
        size: Number of items.
        seed: Integers that choose the permutation.

    Raises:
        ValueError: ``index`` is out of range.
    """
    if not 0 <= index < size:
        raise ValueError(f"index={index}; expected 0 to {size - 1}")
    if size == 1:
        return 0
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    key = _mix(size, *seed)
    while True:
        left, right = index >> half, index & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (_scramble(right + (number << 56), key) & mask)
        index = (left << half) | right
        if index < size:
            return index


class Order:
    """The order of some rows, in chunks that come from one bucket each.

    Args:
        rows: Row numbers ``[N]``.
        buckets: Bucket of each row ``[N]``; ``None``: one bucket.
        chunk: Consecutive numbers that must share a bucket (the slots of a micro-batch); ignored without buckets.
        seed: Chooses the order.

    Raises:
        ValueError: there are no rows.
    """

    def __init__(self, rows: NDArray[np.int64], buckets: NDArray[np.int64] | None, chunk: int, seed: int) -> None:
        if len(rows) == 0:
            raise ValueError("an order needs at least one row")
        self.chunk, self.seed = 1 if buckets is None else max(1, chunk), seed
        if buckets is None:
            self.groups = [np.asarray(rows)]
        else:
            self.groups = [np.asarray(rows)[buckets == name] for name in np.unique(buckets)]
        # Every bucket's last chunk is filled up from its beginning: rows of small buckets come a little more often.
        self.starts = np.cumsum([0] + [-(-len(group) // self.chunk) for group in self.groups])

    @property
    def epoch_length(self) -> int:
        """Numbers in an epoch."""
        return int(self.starts[-1]) * self.chunk

    def row(self, number: int, attempt: int = 0) -> int:
        """The row at a number; with ``attempt``, a substitute from the same bucket.

        Raises:
            ValueError: a negative number.
        """
        if number < 0:
            raise ValueError(f"number={number}; expected 0 or more")
        block, slot = divmod(number, self.chunk)
        epoch, block = divmod(block, int(self.starts[-1]))
        if len(self.groups) > 1:
            block = permuted(block, int(self.starts[-1]), self.seed, epoch, 1)
        bucket = int(np.searchsorted(self.starts, block, side="right")) - 1
        group = self.groups[bucket]
        place = ((block - int(self.starts[bucket])) * self.chunk + slot) % len(group)
        return int(group[permuted(place, len(group), self.seed, epoch, bucket, 2, attempt)])


class Quota:
    """Shares numbers out among sources by weight, exactly and without state.

    Within every period, each source gets its quota (largest remainders), in an order drawn anew per period; a source's
    own numbers follow one another without gaps, so that weighting never skips or repeats its rows.

    Args:
        weights: One per source, at least one above 0.
        seed: Chooses the order within periods.
        period: Length of a period: weights are met to 1 / period.

    Raises:
        ValueError: no weight is above 0.
    """

    def __init__(self, weights: Sequence[float], seed: int, period: int = 256) -> None:
        total = sum(weights)
        if total <= 0 or any(weight < 0 for weight in weights):
            raise ValueError(f"weights={list(weights)}; expected at least one above 0 and none below")
        used = sum(weight > 0 for weight in weights)
        self.period = 1 if used == 1 else max(period, 4 * used)
        self.seed = seed
        exact = [weight / total * self.period for weight in weights]
        # A source of positive weight gets at least one number of a period: none is forgotten.
        self.counts = [max(1, int(share)) if share > 0 else 0 for share in exact]
        rest = self.period - sum(self.counts)
        by_remainder = sorted(range(len(exact)), key=lambda i: (exact[i] - self.counts[i], exact[i]), reverse=True)
        for index in by_remainder[:rest] if rest > 0 else ():
            self.counts[index] += 1
        while sum(self.counts) > self.period:
            self.counts[max(range(len(exact)), key=self.counts.__getitem__)] -= 1
        self._turns = np.repeat(np.arange(len(weights)), self.counts)
        self._period = -1
        self._drawn: NDArray[np.int64] = self._turns
        self._ranks: NDArray[np.int64] = self._turns

    def share(self, number: int) -> tuple[int, int]:
        """Source of a number, and the number's place among that source's own.

        Raises:
            ValueError: a negative number.
        """
        if number < 0:
            raise ValueError(f"number={number}; expected 0 or more")
        period, place = divmod(number, self.period)
        if period != self._period:
            self._drawn = np.random.default_rng((self.seed, 0x07A, period)).permutation(self._turns)
            self._ranks = np.empty_like(self._drawn)
            for source in range(len(self.counts)):
                chosen = self._drawn == source
                self._ranks[chosen] = np.arange(int(chosen.sum()))
            self._period = period
        source = int(self._drawn[place])
        return source, period * self.counts[source] + int(self._ranks[place])
