"""Figures and rows of usage events for the console, scoped by organization and bounded by time and count.

Called by views inside the tenant's transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final
from uuid import UUID
from zoneinfo import ZoneInfo

from django.db import connection
from django.db.models import QuerySet, Sum
from django.db.models.functions import TruncDate

from billing.models import UsageEvent
from billing.selectors import FAILED, SUMS, events, first_day

BINS: Final = 60
BIN_S: Final = 10
WINDOW: Final = timedelta(seconds=BINS * BIN_S)
RATE_OVER_S: Final = 60
MAX_EXPORT_ROWS: Final = 100_000


@dataclass(frozen=True, slots=True)
class Traffic:
    """The last ten minutes, in bins of ten seconds (oldest first), by the moment a request ended.

    `running_…` are of the bin that is not over, `running_s` seconds old: charts leave it out, rates do not.
    """

    requests: tuple[int, ...]
    tokens: tuple[int, ...]  # completion tokens
    running_requests: int
    running_tokens: int
    running_s: float
    n_failed: int
    ttft_p50_ms: int | None
    ttft_p95_ms: int | None
    ttft_bins_ms: tuple[float, ...]

    @property
    def requests_per_s(self) -> float:
        """Over the last minute and the running bin."""
        return self._rate(self.requests, self.running_requests)

    @property
    def tokens_per_s(self) -> float:
        """Completion tokens over the last minute and the running bin."""
        return self._rate(self.tokens, self.running_tokens)

    @property
    def n_requests(self) -> int:
        return sum(self.requests) + self.running_requests

    @property
    def n_tokens(self) -> int:
        return sum(self.tokens) + self.running_tokens

    def _rate(self, bins: tuple[int, ...], running: int) -> float:
        return (sum(bins[-RATE_OVER_S // BIN_S :]) + running) / (RATE_OVER_S + self.running_s)


@dataclass(frozen=True, slots=True)
class DayModel:
    """Usage of one model on one calendar day of the organization."""

    day: date
    model: str
    n_requests: int
    n_failed: int
    n_prompt: int
    n_cached: int
    n_completion: int
    cost_nano: int


@dataclass(frozen=True, slots=True)
class Filters:
    """Which requests to list. Empty = any."""

    model: str = ""
    outcome: str = ""  # ok | failed
    key_id: UUID | None = None
    before: datetime | None = None


_TRAFFIC: Final = """
SELECT bin, count(*), sum(n_completion_tokens), count(*) FILTER (WHERE status >= 400 AND status <> 499),
       percentile_cont(0.5) WITHIN GROUP (ORDER BY first_token_ms),
       grouping(bin),
       percentile_cont(0.95) WITHIN GROUP (ORDER BY first_token_ms)
FROM (
    SELECT floor(
               extract(epoch FROM admitted_at + duration_ms * interval '1 millisecond' - %(since)s) / %(bin_s)s
           ) AS bin,
           n_completion_tokens, status, first_token_ms
    FROM billing_usageevent
    WHERE organization_id = %(organization)s AND day >= %(day)s AND admitted_at >= %(admitted)s
      AND (%(deployment)s::uuid IS NULL OR deployment_id = %(deployment)s)
) AS ended
WHERE bin >= 0
GROUP BY GROUPING SETS ((bin), ())
"""
# A request belongs to the window by its end; one that ran longer than this before it is not looked for.
_LONGEST: Final = timedelta(minutes=15)


def traffic(*, organization_id: UUID, now: datetime, deployment_id: UUID | None = None) -> Traffic:
    """Rates and latencies of the last ten minutes."""
    running_since = datetime.fromtimestamp(now.timestamp() // BIN_S * BIN_S, tz=UTC)
    since = running_since - WINDOW
    requests, tokens, ttft = [0] * (BINS + 1), [0] * (BINS + 1), [0.0] * (BINS + 1)
    n_failed, p50, p95 = 0, None, None
    with connection.cursor() as cursor:
        cursor.execute(
            _TRAFFIC,
            {
                "since": since,
                "bin_s": BIN_S,
                "organization": organization_id,
                "day": first_day(since - _LONGEST),
                "admitted": since - _LONGEST,
                "deployment": deployment_id,
            },
        )
        for bin_number, n, n_tokens, failed, median, is_total, high in cursor.fetchall():
            if is_total:
                n_failed, p50, p95 = failed, median, high
            elif bin_number <= BINS:
                index = int(bin_number)
                requests[index], tokens[index], ttft[index] = n, int(n_tokens or 0), float(median or 0)
    return Traffic(
        requests=tuple(requests[:BINS]),
        tokens=tuple(tokens[:BINS]),
        running_requests=requests[BINS],
        running_tokens=tokens[BINS],
        running_s=(now - running_since).total_seconds(),
        n_failed=n_failed,
        ttft_p50_ms=None if p50 is None else round(p50),
        ttft_p95_ms=None if p95 is None else round(p95),
        ttft_bins_ms=tuple(ttft[:BINS]),
    )


def spent_today_nano(*, organization_id: UUID, now: datetime, zone: str) -> int:
    """Cost of the requests admitted since midnight in the organization's zone."""
    midnight = now.astimezone(ZoneInfo(zone)).replace(hour=0, minute=0, second=0, microsecond=0)
    found = events(organization_id=organization_id, since=midnight).aggregate(total=Sum("cost_nano"))
    return int(found["total"] or 0)


def recent(
    *,
    organization_id: UUID,
    limit: int,
    filters: Filters = Filters(),
    deployment_id: UUID | None = None,
    since: datetime | None = None,
) -> list[UsageEvent]:
    """Requests, newest first, at most `limit`."""
    found = _filtered(events(organization_id=organization_id, since=since), filters)
    if deployment_id is not None:
        found = found.filter(deployment_id=deployment_id)
    return list(found.order_by("-admitted_at", "-request_id")[:limit])


def by_day(*, organization_id: UUID, first: date, zone: str) -> list[DayModel]:
    """Usage per calendar day (in `zone`) and model from `first` on, newest day first."""
    tz = ZoneInfo(zone)
    since = datetime(first.year, first.month, first.day, tzinfo=tz)
    rows: Any = (  # the stubs do not know columns from a dict
        events(organization_id=organization_id, since=since)
        .values("model", on=TruncDate("admitted_at", tzinfo=tz))
        .annotate(**SUMS)
        .order_by("-on", "model")
    )
    return [
        DayModel(
            day=row["on"],
            model=row["model"],
            n_requests=row["n_requests"],
            n_failed=row["n_failed"],
            n_prompt=row["n_prompt"],
            n_cached=row["n_cached"],
            n_completion=row["n_completion"],
            cost_nano=int(row["cost"]),
        )
        for row in rows
    ]


def total(rows: Sequence[DayModel]) -> DayModel:
    """All rows as one; its day and model mean nothing."""
    return DayModel(
        day=date.min,
        model="",
        n_requests=sum(row.n_requests for row in rows),
        n_failed=sum(row.n_failed for row in rows),
        n_prompt=sum(row.n_prompt for row in rows),
        n_cached=sum(row.n_cached for row in rows),
        n_completion=sum(row.n_completion for row in rows),
        cost_nano=sum(row.cost_nano for row in rows),
    )


def export(*, organization_id: UUID, since: datetime, filters: Filters) -> Iterator[UsageEvent]:
    """Requests since a moment, newest first, at most MAX_EXPORT_ROWS."""
    found = _filtered(events(organization_id=organization_id, since=since), filters)
    return found.order_by("-admitted_at", "-request_id")[:MAX_EXPORT_ROWS].iterator(chunk_size=2_000)


def _filtered(found: QuerySet[UsageEvent], filters: Filters) -> QuerySet[UsageEvent]:
    if filters.model:
        found = found.filter(model=filters.model)
    if filters.outcome:
        found = found.filter(FAILED if filters.outcome == "failed" else ~FAILED)
    if filters.key_id is not None:
        found = found.filter(api_key_id=filters.key_id)
    if filters.before is not None:
        found = found.filter(admitted_at__lt=filters.before)
    return found
