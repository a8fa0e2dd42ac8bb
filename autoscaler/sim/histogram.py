"""Quantiles of many durations in constant memory: logarithmic buckets of 1 % width.

The simulator records every gap between two tokens, of which an hour of traffic has millions; exact where it matters
(counts, sum), within 1 % for quantiles.
"""

from __future__ import annotations

import math
from typing import Final

_FLOOR_S: Final = 1e-6
_WIDTH: Final = math.log(1.01)
_N: Final = int(math.log(1e12) / _WIDTH) + 2  # up to 1e6 s


class Histogram:
    """Durations in seconds, each with a weight."""

    __slots__ = ("_counts", "n", "sum_s")

    def __init__(self) -> None:
        self._counts = [0] * _N
        self.n = 0
        self.sum_s = 0.0

    def add(self, value_s: float, n: int = 1) -> None:
        index = 0 if value_s <= _FLOOR_S else min(int(math.log(value_s / _FLOOR_S) / _WIDTH) + 1, _N - 1)
        self._counts[index] += n
        self.n += n
        self.sum_s += value_s * n

    def quantile(self, q: float) -> float:
        """The value below which a share `q` of the weight lies; NaN when empty."""
        if not self.n:
            return math.nan
        rank, seen = q * self.n, 0
        for index, count in enumerate(self._counts):
            seen += count
            if count and seen >= rank:
                return _FLOOR_S if index == 0 else _FLOOR_S * math.exp((index - 0.5) * _WIDTH)
        return math.nan

    @property
    def mean_s(self) -> float:
        return self.sum_s / self.n if self.n else math.nan

    def merge(self, other: Histogram) -> None:
        for index, count in enumerate(other._counts):
            self._counts[index] += count
        self.n += other.n
        self.sum_s += other.sum_s
