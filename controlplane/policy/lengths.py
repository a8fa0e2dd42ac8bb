"""How long the answers of one (tenant, model) are: quantiles that follow them, and whether they can be relied on. Pure.

Kept by the gateway in a tenant's calibration (estimate.py), moved at the end of every answer; read where requests of a
deployment are served shortest first. Concerns order only: charges use the mean, holds the worst case.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

_LOW, _MIDDLE, _HIGH = 0.1, 0.5, 0.9
COVERAGE: Final = _HIGH - _LOW
# An interval that covers fewer than this (moving average) misleads. Chance alone, at 80 % and the weight below, comes
# as low about once in ten thousand answers.
RELIABLE: Final = 0.65
_COVERAGE_WEIGHT: Final = 0.02
_ENOUGH: Final = 8  # answers before quantiles are believed
_FIRST_SPREAD: Final = 1.5  # octaves around the first answer
_SLOWEST_STEP: Final = 0.12  # octaves, so that a change is followed within some tens of answers


@dataclass(frozen=True, slots=True)
class AnswerLengths:
    """Quantiles in octaves (log2(1 + tokens)) after `n` answers. `coverage`: how often an answer fell between the outer
    two; `text_coverage`: how often into what the length model said of its text."""

    low: float = 0.0
    middle: float = 0.0
    high: float = 0.0
    n: int = 0
    coverage: float = COVERAGE
    text_coverage: float = COVERAGE

    @property
    def is_reliable(self) -> bool:
        return self.n >= _ENOUGH and self.coverage >= RELIABLE

    @property
    def trusts_text(self) -> bool:
        return self.text_coverage >= RELIABLE


UNKNOWN: Final = AnswerLengths()


def observe(known: AnswerLengths, n_output: int, said: tuple[float, float] | None = None) -> AnswerLengths:
    """After an answer of `n_output` tokens; `said`: the interval in tokens that the length model gave for it.

    Each quantile steps up by its level or down by what is left of one (quantile tracking): whatever the answers do, in
    the long run the share below it is its level. None counts nothing: the request failed.
    """
    if n_output <= 0:
        return known
    value = math.log2(1 + n_output)
    text_coverage = known.text_coverage
    if said is not None:
        text_coverage += _COVERAGE_WEIGHT * ((said[0] <= n_output <= said[1]) - text_coverage)
    if not known.n:
        return AnswerLengths(
            value - _FIRST_SPREAD, value, value + _FIRST_SPREAD, 1, known.coverage, text_coverage
        )
    step = max(1 / math.sqrt(known.n), _SLOWEST_STEP)
    low = known.low + step * (_LOW - (value < known.low))
    middle = known.middle + step * (_MIDDLE - (value < known.middle))
    high = known.high + step * (_HIGH - (value < known.high))
    inside = known.low <= value <= known.high
    coverage = known.coverage + _COVERAGE_WEIGHT * (inside - known.coverage)
    return AnswerLengths(min(low, middle), middle, max(high, middle), known.n + 1, coverage, text_coverage)


def likely(known: AnswerLengths, at_most: int, said: float | None = None) -> int:
    """Output tokens to order by: what the text says (`said`, its median) where that has been right, else the tenant's
    median where its answers can be told at all, else what it may take. At least 1."""
    if said is not None and known.trusts_text:
        return max(1, min(round(said), at_most))
    if not known.is_reliable:
        return max(1, at_most)
    median = round(math.exp2(min(known.middle, 40.0))) - 1
    return max(1, min(median, at_most))
