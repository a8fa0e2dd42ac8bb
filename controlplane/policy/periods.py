"""When a budget's window begins and ends: pure.

Called by gateways for the edges that the admission script compares with, by the budgets' services for what was spent
since, and by the task that sends alerts. The calendar is that of a time zone: a day has 23 to 25 hours. Where midnight
is skipped by a change of the clocks the window begins when the clocks jump; where it comes twice, the first time.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from typing import Final
from zoneinfo import ZoneInfo

# What was spent is summed per quarter of an hour, and every zone's midnight falls on one.
QUARTER_MS: Final = 900_000
# A rolling window is counted in at most so many buckets, and forgets one of them at a time.
MAX_BUCKETS: Final = 96
MAX_ROLLING_HOURS: Final = 24 * 90
_END_OF_TIME_MS: Final = 4_102_444_800_000  # the year 2100


class Period(StrEnum):
    """What a budget is per."""

    TOTAL = "total"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    ROLLING = "rolling"


@dataclass(frozen=True, slots=True)
class Buckets:
    """How a rolling window is counted: what was spent lies in the present bucket or the `n` before it."""

    width_ms: int
    n: int


@dataclass(frozen=True, slots=True)
class Window:
    """From `start_ms` on; `end_ms` is None where it has none that is known (rolling, total). `counter_ms` names the
    window in the counter: its start, or the start of a rolling budget's latest bucket."""

    start_ms: int
    end_ms: int | None
    counter_ms: int


def buckets(rolling_hours: int) -> Buckets:
    """As narrow as the bound on their number allows, whole quarters of an hour."""
    length_ms = rolling_hours * 3_600_000
    n_quarters = -(-length_ms // (MAX_BUCKETS * QUARTER_MS))
    width_ms = n_quarters * QUARTER_MS
    return Buckets(width_ms, -(-length_ms // width_ms))


def edges_ms(
    period: Period, zone: str, now_ms: int, *, n_before: int = 1, n_after: int = 3
) -> tuple[int, ...]:
    """Starts of windows near now, ascending: `n_before` before the present one's, its own, and `n_after` after it."""
    if period is Period.TOTAL:
        return 0, _END_OF_TIME_MS
    tz = ZoneInfo(zone)
    today = datetime.fromtimestamp(now_ms / 1000, tz=UTC).astimezone(tz).date()
    first = _first_day(period, today)
    # Around a change of the clocks the date alone may be one window off.
    found = [_start_ms(_shifted(period, first, n), tz) for n in range(-n_before - 1, n_after + 2)]
    present = max(i for i, start in enumerate(found) if start <= now_ms)
    return tuple(found[max(present - n_before, 0) : present + n_after + 1])


def window(period: Period, zone: str, now_ms: int, rolling_hours: int | None = None) -> Window:
    """The window that counts now."""
    if period is Period.ROLLING:
        cut = buckets(rolling_hours or 1)
        latest = now_ms - now_ms % cut.width_ms
        return Window(latest - cut.n * cut.width_ms, None, latest)
    if period is Period.TOTAL:
        return Window(0, None, 0)
    start, end = edges_ms(period, zone, now_ms, n_before=0, n_after=1)
    return Window(start, end, start)


def _first_day(period: Period, day: date) -> date:
    if period is Period.WEEK:
        return day - timedelta(days=day.weekday())
    return day.replace(day=1) if period is Period.MONTH else day


def _shifted(period: Period, first: date, n: int) -> date:
    if period is Period.MONTH:
        years, month = divmod(first.month - 1 + n, 12)
        return date(first.year + years, month + 1, 1)
    return first + timedelta(days=n * (7 if period is Period.WEEK else 1))


def _start_ms(day: date, tz: ZoneInfo) -> int:
    # Skipped: read with the offset before, which is the jump. Twice: the first.
    return int(datetime(day.year, day.month, day.day, tzinfo=tz).timestamp()) * 1000
