"""What counts as kept, how budgets burn, and when that is an alert."""

from __future__ import annotations

import pytest

from controlplane.policy.attained import (
    ALERTS,
    PPM,
    Counts,
    Missed,
    Targets,
    budget_left,
    burn_rate,
    burning,
    judge,
)

TARGETS = Targets(ttft_ms=1_000, itl_ms=100, deadline_s=30)
GOOD = {"status": 200, "first_token_ms": 1_000, "duration_ms": 2_900, "n_completion": 20}


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, (True, None)),
        ({"first_token_ms": 1_001}, (True, Missed.TTFT)),
        ({"duration_ms": 2_901}, (True, Missed.ITL)),
        ({"duration_ms": 30_001, "n_completion": 1_000}, (True, Missed.DEADLINE)),
        ({"n_completion": 1}, (True, None)),
        # An earlier attempt made the first token: only the deadline can be judged.
        ({"first_token_ms": None, "attempts": 2}, (True, None)),
        ({"first_token_ms": None, "attempts": 2, "duration_ms": 31_000}, (True, Missed.DEADLINE)),
        ({"status": 503, "first_token_ms": None}, (True, Missed.FAILED)),
        ({"status": 400, "first_token_ms": None}, (False, None)),
        ({"status": 499}, (True, None)),
        ({"status": 499, "first_token_ms": 1_500}, (True, Missed.TTFT)),
        ({"status": 499, "first_token_ms": None, "duration_ms": 900}, (False, None)),
        ({"status": 499, "first_token_ms": None, "duration_ms": 1_100}, (True, Missed.TTFT)),
        ({"status": 499, "first_token_ms": None, "duration_ms": 1_100, "attempts": 2}, (False, None)),
    ],
)
def test_a_request_is_judged_by_all_that_it_was_promised(
    changed: dict[str, int | None], verdict: tuple[bool, Missed | None]
) -> None:
    assert judge(TARGETS, **(GOOD | changed)) == verdict  # type: ignore[arg-type]


def counts(n: int, n_bad: int, objective: float = 0.99) -> Counts:
    return Counts(n, n - n_bad, round(n * (1 - objective) * PPM))


def test_a_burn_rate_of_one_uses_the_budget_up_exactly() -> None:
    assert burn_rate(counts(1_000, 10)) == pytest.approx(1)
    assert budget_left(counts(1_000, 10)) == pytest.approx(0)
    assert burn_rate(counts(1_000, 500)) == pytest.approx(50)
    assert budget_left(counts(1_000, 20)) == pytest.approx(-1)
    assert (burn_rate(counts(0, 0)), budget_left(counts(0, 0))) == (0.0, None)


def test_objectives_that_differ_add_up_by_request() -> None:
    """90 % for a hundred requests and 99 % for as many allow eleven misses."""
    assert burn_rate(Counts(200, 189, 10 * PPM + PPM)) == pytest.approx(1)


def test_the_alerts_are_those_of_the_workbook() -> None:
    assert [(a.severity, round(a.rate, 3), a.long_s // a.short_s) for a in ALERTS] == [
        ("page", 14.4, 12),
        ("page", 6.0, 12),
        ("ticket", 1.0, 12),
    ]


QUIET = counts(1_000, 0)


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ({}, None),
        ({3_600: counts(1_000, 145), 300: counts(100, 15)}, 14.4),
        ({3_600: counts(1_000, 145)}, None),  # over already: the short window is quiet
        ({300: counts(100, 90)}, None),  # just begun: not enough of the budget is gone
        ({3_600: counts(1_000, 143), 300: counts(100, 15)}, None),
        ({21_600: counts(1_000, 61), 1_800: counts(100, 7)}, 6.0),
        ({259_200: counts(1_000, 11), 21_600: counts(1_000, 11)}, 1.0),
        ({3_600: counts(10, 10), 300: counts(10, 10)}, None),  # too few to say
        ({3_600: counts(20, 2, 0.999), 300: counts(20, 2, 0.999)}, None),
    ],
)
def test_both_windows_must_burn(windows: dict[int, Counts], expected: float | None) -> None:
    every = dict.fromkeys((300, 1_800, 3_600, 21_600, 259_200), QUIET) | windows
    found = burning(every)
    assert (None if found is None else pytest.approx(found.rate)) == expected
