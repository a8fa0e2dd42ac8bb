"""Intervals that cover what they promise: conformalised quantile regression, by class. Pure.

CQR (Romano, Patterson, Candès, arXiv:1905.03222) with Mondrian classes (one margin for each): whatever the quantile
model is worth, an answer drawn like those it was calibrated on falls inside with the promised chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MIN_SCORES = 30  # below that a class has no margin of its own


def score(low: float, high: float, value: float) -> float:
    """How far the value lies outside the interval; negative inside, by the distance to the nearer end."""
    return max(low - value, value - high)


def margin(scores: Sequence[float], coverage: float) -> float:
    """What to widen intervals by (negative: narrow them), so that a new value is covered with that chance.

    The finite-sample quantile, interpolated between neighbours so that coverage is met, not exceeded by up to one
    part in n. ValueError without scores, or where they are too few for such a coverage.
    """
    ordered = sorted(scores)
    place = coverage * (len(ordered) + 1) - 1
    if not ordered or place > len(ordered) - 1:
        raise ValueError(f"{len(ordered)} scores: too few for a coverage of {coverage:g}")
    below = max(math.floor(place), 0)
    above = min(below + 1, len(ordered) - 1)
    share = max(place - below, 0.0)
    return ordered[below] * (1 - share) + ordered[above] * share
