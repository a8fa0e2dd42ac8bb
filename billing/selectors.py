"""Reads about usage events, scoped by organization; the console and the REST API sum and list with these.

Events are found by `admitted_at` (indexed with the organization); `day`, the partition key, lies within an hour of it,
so every query with a span names a range of days too.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Final
from uuid import UUID

from django.db import connection
from django.db.models import Count, Q, QuerySet, Sum

from billing.models import UsageEvent

# 499: the client went away or pressed stop, and got what it wanted until then.
FAILED: Final = Q(status__gte=400) & ~Q(status=499)
# What a group of events adds up to.
SUMS: Final = {
    "n_requests": Count("request_id"),
    "n_failed": Count("request_id", filter=FAILED),
    "n_prompt": Sum("n_prompt_tokens"),
    "n_cached": Sum("n_cached_tokens"),
    "n_completion": Sum("n_completion_tokens"),
    "cost": Sum("cost_nano"),
}
_HOUR: Final = timedelta(hours=1)


def events(
    *, organization_id: UUID, since: datetime | None = None, until: datetime | None = None
) -> QuerySet[UsageEvent]:
    """Events admitted from `since` on and before `until`; None leaves that end open."""
    found = UsageEvent.objects.filter(organization_id=organization_id)
    if since is not None:
        found = found.filter(admitted_at__gte=since, day__gte=first_day(since))
    if until is not None:
        found = found.filter(admitted_at__lt=until, day__lte=(until.astimezone(UTC) + _HOUR).date())
    return found


def first_day(since: datetime) -> date:
    """Earliest partition that may hold a request admitted at `since` or later."""
    return (since.astimezone(UTC) - _HOUR).date()


def spent_nano(scope: str, scope_id: UUID) -> int:
    """What `key`, `prj` or `org` has spent since it is there, nano-dollars. The caller has checked whose it is."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT corral_spent(%s, %s)", [scope, scope_id])
        return int(cursor.fetchone()[0])
