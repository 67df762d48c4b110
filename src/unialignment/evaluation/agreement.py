"""How far judges agree: Krippendorff's alpha for interval data. Knows nothing of judges."""

from __future__ import annotations

import math
from collections.abc import Sequence


def krippendorff_alpha(units: Sequence[Sequence[float | None]]) -> float | None:
    """Krippendorff's alpha with the interval metric (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability").

    alpha = 1 - D_o / D_e, with D_o the mean squared difference of values within units and D_e that of all pairable
    values: 1 is perfect agreement, 0 what chance gives, below 0 systematic disagreement.

    Args:
        units: One sequence for each item: a value for each judge, ``None`` or nan where a judge gave none.

    Returns:
        Alpha, or ``None`` if it is undefined: no item with two values, or all values the same.
    """
    pairable = []
    for unit in units:
        values = [float(value) for value in unit if value is not None and not math.isnan(value)]
        if len(values) >= 2:
            pairable.append(values)
    everything = [value for values in pairable for value in values]
    count = len(everything)
    if count < 2:
        return None
    expected = _squared_differences(everything) / (count * (count - 1))
    if expected <= 1e-12 * max(1.0, max(abs(value) for value in everything) ** 2):
        return None
    observed = sum(_squared_differences(values) / (len(values) - 1) for values in pairable) / count
    return 1 - observed / expected


def _squared_differences(values: Sequence[float]) -> float:
    """Sum over all ordered pairs: sum (a - b)^2 = 2 n sum (a - mean)^2."""
    mean = math.fsum(values) / len(values)
    return 2 * len(values) * math.fsum((value - mean) ** 2 for value in values)
