"""Quantiles of observed over predicted, tracked without keeping what was observed."""

from __future__ import annotations

import math
import random

import pytest

from controlplane.policy.perfbias import Bias, Corrections, Likely


def after(ratios: list[float], bias: Bias | None = None) -> Bias:
    bias = bias or Bias()
    for ratio in ratios:
        bias = bias.seen(ratio)
    return bias


@pytest.mark.parametrize(("centre", "spread"), [(1.0, 0.1), (1.8, 0.2), (0.6, 0.4)])
def test_half_and_nine_tenths_of_what_comes_next_lie_below_their_factors(
    centre: float, spread: float
) -> None:
    dice = random.Random(3)
    bias, n_half, n_nine = Bias(), 0, 0
    for _ in range(4000):
        ratio = centre * math.exp(dice.gauss(0, spread))
        n_half += ratio <= bias.p50
        n_nine += ratio <= bias.p90
        bias = bias.seen(ratio)
    assert n_half / 4000 == pytest.approx(0.5, abs=0.03)
    assert n_nine / 4000 == pytest.approx(0.9, abs=0.02)


def test_a_machine_that_becomes_slower_is_noticed() -> None:
    bias = after([1.0] * 500)
    assert bias.p50 == pytest.approx(1.0, abs=0.01)
    assert after([2.0] * 100, bias).p50 == pytest.approx(2.0, rel=0.05)


def test_twenty_measurements_overcome_a_factor_of_two() -> None:
    assert after([2.0] * 20).p50 == pytest.approx(2.0, rel=0.1)


def test_nine_tenths_never_lie_below_half_and_a_constant_is_kept() -> None:
    bias = after([0.5] * 300)
    assert bias.p90 >= bias.p50 == pytest.approx(0.5)
    assert bias.seen(0.5).p50 == bias.p50
    assert after([1e-9] * 2000).p50 >= 1 / 20.001


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="ratio"):
        Bias().seen(ratio)


def test_corrections_are_kept_apart_and_bounded() -> None:
    found = Corrections(bound=2)
    for _ in range(50):
        found.observe(("a", "l4"), 1.0, 3.0)
        found.observe(("a", "h100"), 1.0, 0.5)
    assert found.likely(("a", "l4"), 2.0).p50_s == pytest.approx(6.0, rel=0.05)
    assert found.likely(("a", "h100"), 2.0).p50_s == pytest.approx(1.0, rel=0.05)
    assert found.likely(("b", "l4"), 2.0) == Likely(2.0, 2.0 * Bias().p90)  # never measured
    assert len(found) == 2
    found.likely(("a", "l4"), 1.0)
    found.observe(("c", "l4"), 1.0, 1.0)  # the one not used for longest goes
    assert len(found) == 2
    assert found.likely(("a", "h100"), 2.0).p50_s == 2.0
    assert found.likely(("a", "l4"), 2.0).p50_s == pytest.approx(6.0, rel=0.05)
    with pytest.raises(ValueError, match="above 0"):
        found.observe(("a", "l4"), 0.0, 1.0)
