"""Reads about budgets, scoped by organization, with what was spent in the present window."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from django.db import DEFAULT_DB_ALIAS, connections
from django.db.models import QuerySet

from controlplane.budgets.models import Budget
from controlplane.errors import NotFoundError
from controlplane.policy import periods
from controlplane.policy.periods import Period, Window


@dataclass(frozen=True, slots=True)
class Standing:
    """A budget and its present window. `spent_nano` is what was booked: requests that run now are not in it."""

    budget: Budget
    spent_nano: int
    window_start: datetime
    window_end: datetime | None

    @property
    def percent(self) -> float:
        if not self.budget.limit_nano:
            return 100.0 if self.spent_nano else 0.0
        return 100 * self.spent_nano / self.budget.limit_nano


def budgets(*, organization_id: UUID) -> QuerySet[Budget]:
    return Budget.objects.filter(organization_id=organization_id).select_related(
        "organization", "project", "api_key"
    )


def budget(*, organization_id: UUID, budget_id: UUID) -> Budget:
    """One budget. Raises NotFoundError, also for another tenant's."""
    found = budgets(organization_id=organization_id).filter(id=budget_id).first()
    if found is None:
        raise NotFoundError("no such budget", field="budget")
    return found


def standings(found: Iterable[Budget], now: datetime) -> list[Standing]:
    """Each with what was spent in its window."""
    return [standing(each, now) for each in found]


def standing(found: Budget, now: datetime) -> Standing:
    window = window_of(found, now)
    end = None if window.end_ms is None else _instant(window.end_ms)
    return Standing(found, spent_nano(found, window, now), _instant(window.start_ms), end)


def window_of(found: Budget, now: datetime) -> Window:
    return periods.window(
        Period(found.period), found.organization.timezone, int(now.timestamp() * 1000), found.rolling_hours
    )


def spent_nano(
    found: Budget, window: Window, now: datetime, *, cell: str = "", using: str = DEFAULT_DB_ALIAS
) -> int:
    """Booked for requests admitted in the window, in one cell or all."""
    until_ms = window.end_ms or int(now.timestamp() * 1000) + periods.QUARTER_MS
    with connections[using].cursor() as cursor:
        cursor.execute(
            "SELECT (corral_budget_spent(%s, %s, %s, 0, %s) ->> %s)::bigint",
            [found.id, window.start_ms, until_ms, cell, str(window.start_ms)],
        )
        return int(cursor.fetchone()[0] or 0)


def _instant(at_ms: int) -> datetime:
    return datetime.fromtimestamp(at_ms / 1000, tz=UTC)
