"""Quantiles that follow a tenant's answers, and when they are not relied on."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from controlplane.policy import estimate
from controlplane.policy.lengths import UNKNOWN, AnswerLengths, likely, observe


def after(values: list[int], known: AnswerLengths = UNKNOWN) -> AnswerLengths:
    for value in values:
        known = observe(known, value)
    return known


def drawn(seed: int, n: int, centre: float = 8.0, spread: float = 1.0) -> list[int]:
    chance = random.Random(seed)
    return [max(1, round(2 ** chance.gauss(centre, spread)) - 1) for _ in range(n)]


def test_quantiles_come_to_those_of_the_answers_and_cover_four_in_five() -> None:
    known, n_inside = after(drawn(1, 200)), 0
    for value in drawn(2, 2000):
        n_inside += known.low <= math.log2(1 + value) <= known.high
        known = observe(known, value)
    assert 0.77 < n_inside / 2000 < 0.83
    assert abs(known.coverage - 0.8) < 0.15
    assert abs(known.middle - 8.0) < 0.6
    assert known.low < 7.3 < 8.7 < known.high
    assert known.is_reliable


def test_a_change_is_followed_within_some_tens_of_answers() -> None:
    known = after(drawn(3, 300, centre=5.0, spread=0.3))
    known = after(drawn(4, 80, centre=9.0, spread=0.3), known)
    assert 8.3 < known.middle < 9.7


def test_order_goes_by_the_median_once_it_is_known_and_by_the_limit_before() -> None:
    assert likely(UNKNOWN, 500) == 500
    assert likely(after([100] * 7), 500) == 500
    known = after([100] * 50)
    assert 85 < likely(known, 500) < 115
    assert likely(known, 20) == 20
    assert likely(UNKNOWN, 0) == 1


def test_where_intervals_fail_the_limit_counts_until_they_hold_again() -> None:
    """Answers that jump away from wherever the quantiles go."""
    known = after([100] * 50)
    n = 0
    while known.is_reliable:
        known = observe(known, 10_000 if known.high < 10 else 1)
        n += 1
        assert n < 200, "it never noticed"
    assert likely(known, 700) == 700
    known = after([100] * 200, known)
    assert known.is_reliable


def test_the_text_counts_while_what_it_says_comes_true() -> None:
    known = after([100] * 50)
    assert likely(known, 500, said=30.4) == 30
    for _ in range(30):
        known = observe(known, 100, said=(10.0, 40.0))
    assert not known.trusts_text
    assert 85 < likely(known, 500, said=30.4) < 115, "the tenant's own median instead"
    for _ in range(120):
        known = observe(known, 100, said=(80.0, 140.0))
    assert likely(known, 500, said=99.0) == 99


def test_a_failure_teaches_nothing_and_the_calibration_carries_the_lengths() -> None:
    assert observe(UNKNOWN, 0) is UNKNOWN
    calibration = estimate.observe_length(estimate.NEW, 63, said=(1.0, 2.0))
    assert calibration.lengths.middle == 6.0
    assert calibration.lengths.text_coverage < 0.8
    assert estimate.observe(calibration, 10, 12).lengths == calibration.lengths
    assert estimate.observe_output(calibration, 63).lengths == calibration.lengths


@given(st.lists(st.integers(-1, 10**9), max_size=60), st.integers(0, 10**9))
def test_whatever_is_reported_quantiles_are_ordered_and_the_answer_is_within_its_limit(
    values: list[int], at_most: int
) -> None:
    known = after(values)
    assert known.low <= known.middle <= known.high
    assert 0 <= known.coverage <= 1
    assert 1 <= likely(known, at_most) <= max(at_most, 1)
