"""Edges of windows against datetime over two years: days of 23 and 25 hours, midnights that are not there."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest

from controlplane.policy.periods import QUARTER_MS, Period, buckets, edges_ms, window

HOUR_MS = 3_600_000
ZONES = (
    "UTC",
    "Europe/Berlin",
    "America/Santiago",
    "America/Havana",
    "Asia/Beirut",
    "Asia/Kathmandu",
    "Pacific/Apia",
)


def ms(at: datetime) -> int:
    return int(at.timestamp()) * 1000


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("period", [Period.DAY, Period.WEEK, Period.MONTH])
def test_every_moment_of_two_years_lies_in_one_window_and_the_windows_join(zone: str, period: Period) -> None:
    step = timedelta(hours=7)
    at, seen = datetime(2026, 1, 1, tzinfo=UTC), []
    while at < datetime(2027, 12, 31, tzinfo=UTC):
        edges = edges_ms(period, zone, ms(at))
        assert list(edges) == sorted(set(edges)) and len(edges) == 5
        assert edges[1] <= ms(at) < edges[2], (zone, at)
        assert all(edge % QUARTER_MS == 0 for edge in edges)
        seen += edges[1:3]
        at += step
    starts = sorted(set(seen))
    for before, after in pairwise(starts):
        first, last = (datetime.fromtimestamp(t / 1000, tz=ZoneInfo(zone)) for t in (before, after - 1))
        if period is Period.DAY:
            assert first.date() == last.date(), (zone, first, last)
        elif period is Period.WEEK:
            assert first.isocalendar()[:2] == last.isocalendar()[:2]
        else:
            assert (first.year, first.month) == (last.year, last.month)


def test_days_of_berlin_around_the_changes_of_its_clocks() -> None:
    for day, hours in (
        ((3, 29), 23),
        ((10, 25), 25),
        ((7, 1), 24),
    ):
        found = window(Period.DAY, "Europe/Berlin", ms(datetime(2026, *day, 12, tzinfo=UTC)))
        assert found.end_ms is not None
        assert found.end_ms - found.start_ms == hours * HOUR_MS


def test_a_midnight_that_is_skipped_is_the_jump_and_one_that_comes_twice_is_the_first() -> None:
    santiago = window(Period.DAY, "America/Santiago", ms(datetime(2026, 9, 6, 12, tzinfo=UTC)))
    assert datetime.fromtimestamp(santiago.start_ms / 1000, tz=ZoneInfo("America/Santiago")).hour == 1
    havana = window(Period.DAY, "America/Havana", ms(datetime(2026, 11, 1, 12, tzinfo=UTC)))
    assert datetime.fromtimestamp(havana.start_ms / 1000, tz=UTC) == datetime(2026, 11, 1, 4, tzinfo=UTC)


@pytest.mark.parametrize("hours", [1, 5, 24, 168, 720, 2160])
def test_a_rolling_window_is_counted_in_few_buckets_and_never_in_less_than_its_length(hours: int) -> None:
    cut = buckets(hours)
    assert cut.n <= 96 and cut.width_ms % QUARTER_MS == 0
    assert hours * HOUR_MS <= cut.n * cut.width_ms < hours * HOUR_MS + cut.width_ms
    now = ms(datetime(2026, 5, 5, 13, 7, tzinfo=UTC))
    found = window(Period.ROLLING, "UTC", now, hours)
    assert now - found.start_ms >= hours * HOUR_MS
    assert found.counter_ms <= now < found.counter_ms + cut.width_ms
