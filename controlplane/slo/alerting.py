"""Raises and ends alerts about error budgets that burn too fast, tells of them, and shows rates as metrics.

Run by the control worker every half minute (tasks.py), as the operator. An alert is one row per project and class while
it lasts; whoever is told is told once when it begins and once when it ends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

import structlog
from django.db import IntegrityError, connections, transaction

from controlplane import ids
from controlplane.policy.attained import ALERTS, PAGE, WINDOWS, Alert, Counts, budget_left, burn_rate, burning
from controlplane.slo import metrics
from controlplane.slo.attainment import HOUR_S, HOURS_KEPT, MINUTE_S, MINUTES_KEPT
from controlplane.slo.models import SloAlert, SloWindow

log = structlog.get_logger("corral.slo")

EVENT: Final = "slo.burn"
# A page becomes a ticket when its short windows are quiet: a rate around its threshold must not ring twice a minute.
ENDS_BELOW: Final = 0.9
PRUNE_ROWS: Final = 20_000
_SPANS: Final = sorted(set(WINDOWS.values()))
# One pass over three days of minutes, for all tenants.
_COLUMNS: Final = ", ".join(
    f"sum({name}) FILTER (WHERE at >= %s)" for _ in _SPANS for name in ("n", "n_good", "allowed_ppm")
)
_SUMS: Final = f"""
SELECT organization_id, project_id, slo_class, {_COLUMNS}
FROM slo_slowindow WHERE width_s = 60 AND at >= %s GROUP BY 1, 2, 3
"""  # noqa: S608 - names of ours


@dataclass(frozen=True, slots=True)
class Burning:
    """A series with its windows, by their length in seconds."""

    organization_id: UUID
    project_id: UUID
    slo_class: str
    windows: dict[int, Counts]


Tell = Callable[[UUID, str, dict[str, Any]], None]


def look(*, now: datetime, tell: Tell, using: str) -> int:
    """One look at everybody; how many alerts began or ended. `tell(organization, event, data)` may be lost."""
    found = _series(now, using)
    _show(found)
    open_alerts = {
        (alert.project_id, alert.slo_class): alert
        for alert in SloAlert.objects.using(using).filter(ended_at=None)
    }
    n_changes = 0
    for series in found:
        alert = open_alerts.pop((series.project_id, series.slo_class), None)
        if alert is None:
            n_changes += _begin(series, now, tell, using)
        elif _is_over(alert, series):
            n_changes += _end(alert, now, tell, using) + _begin(series, now, tell, using)
    for alert in open_alerts.values():  # nothing was asked for in three days
        n_changes += _end(alert, now, tell, using)
    return n_changes


def prune(*, now: datetime, using: str) -> int:
    """Forget windows that are no longer kept, a bounded number a call."""
    n = 0
    for width_s, kept in ((MINUTE_S, MINUTES_KEPT), (HOUR_S, HOURS_KEPT)):
        old = SloWindow.objects.using(using).filter(width_s=width_s, at__lt=now - kept).order_by("at")
        n += (
            SloWindow.objects.using(using)
            .filter(id__in=old.values_list("id", flat=True)[:PRUNE_ROWS])
            .delete()[0]
        )
    return n


def _series(now: datetime, using: str) -> list[Burning]:
    begins = [now - timedelta(seconds=span) for span in _SPANS]
    params = [begin for begin in begins for _ in range(3)]
    with connections[using].cursor() as cursor:
        cursor.execute(_SUMS, [*params, begins[-1]])
        rows = cursor.fetchall()
    return [
        Burning(
            organization,
            project,
            slo_class,
            {
                span: Counts(*(int(value or 0) for value in sums[3 * i : 3 * i + 3]))
                for i, span in enumerate(_SPANS)
            },
        )
        for organization, project, slo_class, *sums in rows
    ]


def _begin(series: Burning, now: datetime, tell: Tell, using: str) -> int:
    alert = burning(series.windows)
    if alert is None:
        return 0
    long = series.windows[alert.long_s]
    row = SloAlert(
        organization_id=series.organization_id,
        project_id=series.project_id,
        slo_class=series.slo_class,
        severity=alert.severity,
        burn_rate=burn_rate(long),
        window_s=alert.long_s,
        started_at=now,
    )
    try:
        with transaction.atomic(using=using):  # told if it is kept
            row.save(using=using, force_insert=True)
            tell(series.organization_id, EVENT, data_of(row))
    except IntegrityError:  # another worker was quicker
        return 0
    log.warning(
        "slo.burning",
        organization=series.organization_id.hex,
        project=series.project_id.hex,
        slo_class=series.slo_class,
        severity=alert.severity,
        burn_rate=round(row.burn_rate, 2),
    )
    return 1


def _is_over(row: SloAlert, series: Burning) -> bool:
    """Nothing burns, or something else: graver at once, milder when the short windows of its severity are quiet."""
    current = burning(series.windows)
    if current is None:
        return True
    if current.severity == row.severity:
        return False
    if current.severity == PAGE:
        return True
    own = [alert for alert in ALERTS if alert.severity == row.severity]
    return all(burn_rate(series.windows[a.short_s]) < ENDS_BELOW * a.rate for a in own)


def _end(row: SloAlert, now: datetime, tell: Tell, using: str) -> int:
    row.ended_at = now
    with transaction.atomic(using=using):
        if not SloAlert.objects.using(using).filter(id=row.id, ended_at=None).update(ended_at=now):
            return 0
        tell(row.organization_id, EVENT, data_of(row))
    log.info("slo.burnt_out", organization=row.organization_id.hex, slo_class=row.slo_class)
    return 1


def data_of(row: SloAlert) -> dict[str, Any]:
    """What a webhook says of an alert (controlplane/webhooks/catalogue.py)."""
    names = {seconds: name for name, seconds in WINDOWS.items()}
    return {
        "alert_id": str(row),
        "state": "burning" if row.ended_at is None else "ended",
        "project_id": ids.to_text(ids.Prefix.PROJECT, row.project_id),
        "slo_class": row.slo_class,
        "severity": row.severity,
        "window": names.get(row.window_s, str(row.window_s)),
        "burn_rate": round(row.burn_rate, 2),
        "started_at": row.started_at.isoformat(),
        "ended_at": "" if row.ended_at is None else row.ended_at.isoformat(),
    }


def _show(found: list[Burning]) -> None:
    """Per class, over all tenants: labels must stay few."""
    sums: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0, 0])
    worst: dict[tuple[str, int], float] = defaultdict(float)
    n_burning: dict[str, int] = defaultdict(int)
    for series in found:
        for span, counts in series.windows.items():
            total = sums[series.slo_class, span]
            for i, value in enumerate(counts):
                total[i] += value
            worst[series.slo_class, span] = max(worst[series.slo_class, span], burn_rate(counts))
        alert: Alert | None = burning(series.windows)
        if alert is not None:
            n_burning[alert.severity] += 1
    names = {seconds: name for name, seconds in WINDOWS.items()}
    for (slo_class, span), parts in sums.items():
        counts = Counts(*parts)
        labels = (slo_class, names[span])
        metrics.ATTAINMENT.labels(*labels).set(counts.n_good / counts.n if counts.n else 1.0)
        metrics.BURN_RATE.labels(*labels).set(burn_rate(counts))
        metrics.WORST_BURN_RATE.labels(*labels).set(worst[slo_class, span])
        if span == _SPANS[-1]:
            left = budget_left(counts)
            metrics.BUDGET_LEFT.labels(slo_class).set(1.0 if left is None else left)
    for severity in {alert.severity for alert in ALERTS}:
        metrics.BURNING.labels(severity).set(n_burning[severity])
