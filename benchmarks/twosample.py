"""Whether two samples can be told apart: Mann-Whitney U and Kolmogorov-Smirnov, an effect size, and what a sample of
this size could have shown. Pure arithmetic; `bench timing` calls it.

Formulas: Mann & Whitney 1947 with the correction for ties (Siegel & Castellan 1988, 6.4), normal approximation;
Smirnov's asymptotic distribution with Stephens' correction (1970).
"""

from __future__ import annotations

import bisect
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two samples beside each other. `auc`: how often a value of the second is above one of the first (0.5 = as often
    as not): what one look is worth to who must guess which of the two it was."""

    n: tuple[int, int]
    medians: tuple[float, float]
    median_difference: float
    difference_95: tuple[float, float]  # bootstrap
    auc: float
    p_mann_whitney: float
    p_kolmogorov_smirnov: float


def compare(first: Sequence[float], second: Sequence[float], seed: int = 1) -> Comparison:
    """Both tests, two-sided. Samples of 20 and more, or the approximations do not hold."""
    if min(len(first), len(second)) < 20:
        raise ValueError("give 20 values of each at least")
    medians = (statistics.median(first), statistics.median(second))
    auc, p_u = mann_whitney(first, second)
    return Comparison(
        n=(len(first), len(second)),
        medians=medians,
        median_difference=medians[1] - medians[0],
        difference_95=_bootstrap(first, second, seed),
        auc=auc,
        p_mann_whitney=p_u,
        p_kolmogorov_smirnov=kolmogorov_smirnov(first, second),
    )


def mann_whitney(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """(AUC of the second over the first, two-sided p)."""
    n, m = len(first), len(second)
    both = sorted([(value, 0) for value in first] + [(value, 1) for value in second])
    rank_sum, ties, at = 0.0, 0.0, 0
    while at < n + m:
        end = at
        while end < n + m and both[end][0] == both[at][0]:
            end += 1
        rank = (at + 1 + end) / 2  # of all that are equal
        rank_sum += rank * sum(which for _, which in both[at:end])
        ties += (end - at) ** 3 - (end - at)
        at = end
    u = rank_sum - m * (m + 1) / 2
    total = n + m
    variance = n * m / 12 * (total + 1 - ties / (total * (total - 1)))
    if variance <= 0:
        return 0.5, 1.0
    z = max(abs(u - n * m / 2) - 0.5, 0.0) / math.sqrt(variance)
    return u / (n * m), math.erfc(z / math.sqrt(2))


def kolmogorov_smirnov(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p of the largest distance between the two distributions."""
    a, b = sorted(first), sorted(second)
    distance = max(
        abs(bisect.bisect_right(a, value) / len(a) - bisect.bisect_right(b, value) / len(b))
        for value in (*a, *b)
    )
    root = math.sqrt(len(a) * len(b) / (len(a) + len(b)))
    x = (root + 0.12 + 0.11 / root) * distance
    if x < 0.2:
        return 1.0
    total = 2 * sum(math.exp(-2 * k * k * x * x) * (1 if k % 2 else -1) for k in range(1, 101))
    return min(1.0, max(0.0, total))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for their number (Holm 1979): each may be held against the level that one test would have."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, most = [0.0] * len(p_values), 0.0
    for at, i in enumerate(order):
        most = max(most, min(1.0, (len(p_values) - at) * p_values[i]))
        adjusted[i] = most
    return adjusted


def smallest_seen(values: Sequence[float], level: float, shifts: Sequence[float]) -> float | None:
    """The smallest of the shifts by which one half of a sample differs noticeably from the other."""
    mixed = list(values)
    random.Random(2).shuffle(mixed)
    half = len(mixed) // 2
    for shift in sorted(shifts):
        if mann_whitney(mixed[:half], [value + shift for value in mixed[half:]])[1] < level:
            return shift
    return None


def _bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    seed: int,
    rounds: int = 400,
    statistic: Callable[[Sequence[float]], float] = statistics.median,
) -> tuple[float, float]:
    dice = random.Random(seed)
    found = sorted(
        statistic(dice.choices(second, k=len(second))) - statistic(dice.choices(first, k=len(first)))
        for _ in range(rounds)
    )
    return found[int(0.025 * rounds)], found[int(0.975 * rounds) - 1]
