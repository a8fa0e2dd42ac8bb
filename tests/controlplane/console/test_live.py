"""Rates from heartbeats."""

from controlplane.console.live import Rates
from controlplane.ids import new_id


def test_a_rate_needs_two_heartbeats_and_stays_until_the_next() -> None:
    rates, replica = Rates(), new_id()
    assert rates.rate(replica, 1_000, 500) is None
    assert rates.rate(replica, 3_000, 700) == 100.0
    assert rates.rate(replica, 3_000, 700) == 100.0
    assert rates.rate(replica, 4_000, 700) == 0.0


def test_a_counter_or_a_clock_that_falls_starts_anew() -> None:
    rates, replica = Rates(), new_id()
    rates.rate(replica, 1_000, 500)
    assert rates.rate(replica, 2_000, 100) is None
    assert rates.rate(replica, 1_500, 200) is None
    assert rates.rate(replica, 2_500, 300) == 100.0


def test_no_more_than_so_many_are_kept() -> None:
    rates = Rates(max_kept=2)
    first, second, third = new_id(), new_id(), new_id()
    for replica in (first, second, third):
        rates.rate(replica, 1_000, 0)
    assert rates.rate(third, 2_000, 10) == 10.0
    assert rates.rate(first, 2_000, 10) is None
