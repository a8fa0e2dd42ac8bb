"""Attainment, error budgets and burn rates of an organization, from the windows that intake fills.

Called by the REST API, the console and the alerting task. What was asked for is summed in the database; what it means
is in controlplane/policy/attained.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from django.db.models import QuerySet, Sum

from controlplane.policy.attained import WINDOWS, Counts
from controlplane.slo.models import SloAlert, SloWindow
from controlplane.slo.rollup import begin_of

MINUTE_S: Final = 60
HOUR_S: Final = 3_600
MINUTES_KEPT: Final = timedelta(days=4)  # the longest alerting window is three
HOURS_KEPT: Final = timedelta(days=100)
_MISSES: Final = ("n_failed", "n_ttft", "n_itl", "n_deadline", "n_refused")
_SUMMED: Final = ("n", "n_good", "allowed_ppm", *_MISSES)


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose requests; None: of all."""

    organization_id: UUID
    project_id: UUID | None = None
    deployment_id: UUID | None = None
    slo_class: str | None = None


@dataclass(frozen=True, slots=True)
class Attained:
    """One class in one span: counts, and misses by kind."""

    slo_class: str
    counts: Counts
    misses: dict[str, int]


def attained(scope: Scope, *, since: datetime, until: datetime) -> list[Attained]:
    """By class, in the order of their names. Spans beyond the minutes kept begin with a whole hour."""
    rows = (
        _windows(scope, since, until)
        .values("slo_class")
        .annotate(**{f"sum_{name}": Sum(name) for name in _SUMMED})
        .order_by("slo_class")
    )
    found: list[dict[str, Any]] = list(rows)  # type: ignore[arg-type]
    return [
        Attained(
            row["slo_class"],
            Counts(row["sum_n"], row["sum_n_good"], row["sum_allowed_ppm"]),
            {name.removeprefix("n_"): row[f"sum_{name}"] for name in _MISSES},
        )
        for row in found
    ]


def rates(scope: Scope, *, now: datetime) -> dict[str, dict[str, Counts]]:
    """Class -> name of the window -> its counts, of all windows that alerts look at."""
    found: dict[str, dict[str, Counts]] = {}
    for name, seconds in WINDOWS.items():
        for row in attained(scope, since=now - timedelta(seconds=seconds), until=now):
            found.setdefault(row.slo_class, {})[name] = row.counts
    return found


@dataclass(frozen=True, slots=True)
class Hour:
    """One hour of one class, for a chart."""

    at: datetime
    slo_class: str
    n: int
    n_good: int


def hours(scope: Scope, *, since: datetime, until: datetime) -> list[Hour]:
    """The hours of a span that had requests, oldest first."""
    rows = (
        _where(scope, HOUR_S)
        .filter(at__gte=begin_of(since, HOUR_S), at__lt=until)
        .values("at", "slo_class")
        .annotate(total=Sum("n"), good=Sum("n_good"))
        .order_by("at", "slo_class")
    )
    return [Hour(row["at"], row["slo_class"], row["total"], row["good"]) for row in rows]


def alerts(scope: Scope, *, limit: int = 50) -> list[SloAlert]:
    """The latest alerts, open ones among them."""
    found = SloAlert.objects.filter(organization_id=scope.organization_id)
    if scope.project_id is not None:
        found = found.filter(project_id=scope.project_id)
    if scope.slo_class is not None:
        found = found.filter(slo_class=scope.slo_class)
    return list(found.order_by("-started_at", "-id")[:limit])


def _windows(scope: Scope, since: datetime, until: datetime) -> QuerySet[SloWindow, Any]:
    width_s = MINUTE_S if until - since <= MINUTES_KEPT - timedelta(hours=1) else HOUR_S
    return _where(scope, width_s).filter(at__gte=begin_of(since, width_s), at__lt=until)


def _where(scope: Scope, width_s: int) -> QuerySet[SloWindow, Any]:
    found = SloWindow.objects.filter(organization_id=scope.organization_id, width_s=width_s)
    names: Sequence[str] = ("project_id", "deployment_id", "slo_class")
    wanted = {name: value for name in names if (value := getattr(scope, name)) is not None}
    return found.filter(**wanted)
