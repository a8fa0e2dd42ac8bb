"""Prompt token estimates: bounded, monotone, and drawn to the truth by what was counted."""

import random

from hypothesis import given
from hypothesis import strategies as st

from controlplane.policy import estimate
from controlplane.policy.estimate import Calibration

RATIOS = st.floats(0.1, 10)


def test_a_thousand_characters_of_prose_are_some_250_tokens() -> None:
    assert estimate.raw_tokens(1000, 1) == 257
    assert estimate.raw_tokens(1000, 0) == 250
    assert estimate.raw_tokens(0, 0) == 1


@given(st.integers(0, 10**8), st.integers(0, 10**8), st.integers(0, 1000), RATIOS)
def test_longer_text_is_never_estimated_shorter(a: int, b: int, n_messages: int, ratio: float) -> None:
    low, high = sorted((a, b))
    calibration = Calibration(ratio, 5)
    assert estimate.estimate(estimate.raw_tokens(low, n_messages), calibration) <= estimate.estimate(
        estimate.raw_tokens(high, n_messages), calibration
    )


@given(st.integers(1, 10**8), RATIOS)
def test_lower_bound_is_below_the_estimate_and_at_least_one(raw: int, ratio: float) -> None:
    estimated = estimate.estimate(raw, Calibration(ratio, 1))
    assert 1 <= estimate.lower_bound(estimated) <= estimated


def test_first_request_counts_fully_and_a_stable_ratio_is_learned() -> None:
    calibration = estimate.observe(estimate.NEW, 100, 150)
    assert (calibration.ratio, calibration.n) == (1.5, 1)
    for _ in range(50):
        calibration = estimate.observe(calibration, 200, 300)
    assert estimate.estimate(1000, calibration) == 1500


def test_money_of_long_prompts_covers_the_usual_error_and_of_short_ones_the_estimate() -> None:
    """Prompts of one kind, 1 % apart: what is held covers nearly all, and little more than that."""
    dice, calibration = random.Random(1), estimate.NEW
    n_short = n_held = 0
    for turn in range(400):
        raw = 10_000
        exact = round(11_000 * dice.gauss(1, 0.01))
        estimated = estimate.estimate(raw, calibration)
        held = estimate.upper_bound(estimated, calibration, is_roomy=False)
        if turn >= 100:
            n_short += exact > held
            n_held += held
        calibration = estimate.observe(calibration, raw, exact)
    assert n_short <= 9, "three of a hundred"
    assert n_held <= 300 * 11_000 * 1.05
    assert estimate.upper_bound(500, calibration, is_roomy=False) == 500
    assert 508 <= estimate.upper_bound(500, calibration, is_roomy=True) <= 530


def test_error_is_unlearned_as_fast_as_the_ratio() -> None:
    calibration = estimate.observe(estimate.NEW, 10_000, 20_000)
    assert estimate.upper_bound(10_000, calibration, is_roomy=False) == 15_000, "at most by half"
    for _ in range(100):
        calibration = estimate.observe(calibration, 10_000, 20_000)
    assert estimate.upper_bound(64_000, calibration, is_roomy=False) == 65_000, (
        "a sixty-fourth is always held"
    )


def test_ratio_follows_a_change_within_some_tens_of_requests() -> None:
    calibration = Calibration(1.0, 1000)
    for _ in range(60):
        calibration = estimate.observe(calibration, 100, 200)
    assert 1.9 < calibration.ratio <= 2.0


@given(st.lists(st.tuples(st.integers(-5, 10**6), st.integers(-5, 10**9)), max_size=50))
def test_ratio_stays_within_its_bounds_whatever_is_reported(counts: list[tuple[int, int]]) -> None:
    calibration = estimate.NEW
    for raw, exact in counts:
        calibration = estimate.observe(calibration, raw, exact)
    assert 0.1 <= calibration.ratio <= 10


def test_prompt_that_was_never_counted_teaches_nothing() -> None:
    assert estimate.observe(Calibration(1.2, 3), 100, 0) == Calibration(1.2, 3)


def test_an_answer_is_expected_as_long_as_those_before_and_never_longer_than_held() -> None:
    calibration = estimate.NEW
    assert estimate.expected_output(calibration, 100_000) == 64
    assert estimate.expected_output(calibration, 16) == 16
    for _ in range(200):
        calibration = estimate.observe_output(calibration, 40)
    assert estimate.expected_output(calibration, 100_000) == 40
    assert estimate.observe_output(calibration, 0) == calibration, "a failure teaches nothing"
    for _ in range(200):
        calibration = estimate.observe_output(calibration, 4)
    assert estimate.expected_output(calibration, 100_000) == 4, "old answers are forgotten"
