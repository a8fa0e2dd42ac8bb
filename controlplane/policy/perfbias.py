"""What a prediction must be multiplied with so that it holds half of the time, and nine times of ten. Pure.

The performance model says what a step or a prompt should take; a real replica differs from it (driver, clocks, other
guests, a wrong data sheet), and not by the same every time. For each deployment and kind of replica one `Bias` follows
the quantiles of observed over predicted, from every measurement, without keeping any: a quantile estimate moves up by
q and down by 1 - q of a step (Robbins and Monro, 1951), on the logarithm, because errors of a time are factors.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, NamedTuple

P50: Final = 0.5
P90: Final = 0.9
# Step of the logarithm: wide at first, so that some twenty measurements overcome a factor of two; then narrow, but
# never so that a changed machine would go unnoticed.
_FIRST: Final = 0.5
_LAST: Final = 0.02
_LIMIT: Final = math.log(20)  # a factor beyond this is no bias, it is a mistake elsewhere
_PRIOR_P90: Final = math.log(1.3)  # the model's error for what it never saw, 90 % (manage.py perf_fit)


@dataclass(frozen=True, slots=True)
class Bias:
    """Logarithms of the factors for half of the cases and for nine of ten, and how many measurements they rest on."""

    log_p50: float = 0.0
    log_p90: float = _PRIOR_P90
    n: int = 0

    def seen(self, ratio: float) -> Bias:
        """After a measurement that took `ratio` times as long as predicted. ValueError unless above 0 and finite."""
        if not (math.isfinite(ratio) and ratio > 0):
            raise ValueError(f"ratio = {ratio}: observed over predicted must be above 0 and finite")
        value = max(-_LIMIT, min(_LIMIT, math.log(ratio)))
        step = max(_FIRST / math.sqrt(1 + self.n), _LAST)
        p50 = _moved(self.log_p50, value, P50, step)
        p90 = _moved(self.log_p90, value, P90, step)
        return Bias(p50, p90, self.n + 1)

    @property
    def p50(self) -> float:
        """Factor under which half of the cases lie."""
        return math.exp(self.log_p50)

    @property
    def p90(self) -> float:
        """Factor under which nine of ten lie; never below `p50`, because it rises by more and falls by less."""
        return math.exp(self.log_p90)


class Likely(NamedTuple):
    """Seconds that half of the cases stay under, and nine of ten."""

    p50_s: float
    p90_s: float


class Corrections:
    """The biases of many deployments and kinds of replica, at most `bound` of them: the one not used for longest goes.

    The key is whatever tells them apart, such as (deployment, kind of replica). What was never measured gets the
    model's own time and the error that the model has for what it never saw.
    """

    def __init__(self, bound: int = 10_000) -> None:
        if bound < 1:
            raise ValueError(f"bound = {bound}: must be at least 1")
        self._bound = bound
        self._biases: OrderedDict[tuple[str, ...], Bias] = OrderedDict()

    def likely(self, key: tuple[str, ...], predicted_s: float) -> Likely:
        """What the model says, corrected by what was seen under that key."""
        bias = self._biases.get(key)
        if bias is None:
            bias = Bias()
        else:
            self._biases.move_to_end(key)
        return Likely(predicted_s * bias.p50, predicted_s * bias.p90)

    def observe(self, key: tuple[str, ...], predicted_s: float, observed_s: float) -> None:
        """A measured time beside what the model said of it, uncorrected. ValueError unless both are above 0."""
        if predicted_s <= 0 or observed_s <= 0:
            raise ValueError(f"predicted {predicted_s} s, observed {observed_s} s: both must be above 0")
        self._biases[key] = self._biases.get(key, Bias()).seen(observed_s / predicted_s)
        self._biases.move_to_end(key)
        if len(self._biases) > self._bound:
            self._biases.popitem(last=False)

    def __len__(self) -> int:
        return len(self._biases)


def _moved(estimate: float, value: float, q: float, step: float) -> float:
    """One step towards the quantile; never past the value that caused it, so that a constant is met and kept."""
    if value > estimate:
        return min(estimate + step * q, value)
    if value < estimate:
        return max(estimate - step * (1 - q), value)
    return estimate
