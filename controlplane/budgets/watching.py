"""Looks after budgets: thresholds that were crossed are told once, and counters learn what only the ledger knows.

Run by the control worker every few seconds (tasks.py), as operator. Looks at the budgets of organizations that spent
lately, and now and then at all; what it writes may be written twice at once: the alert's unique row is the fence.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

import redis
import structlog
from django.db import connection, transaction
from django.db.models import Exists, OuterRef, QuerySet

from billing.models import Spend
from controlplane.budgets import selectors
from controlplane.budgets.models import Budget, BudgetAlert
from controlplane.policy import periods
from controlplane.policy.periods import Period
from controlplane.webhooks.services import emit
from workers.keys import CellKeys
from workers.scripts import TRUE_UP

log = structlog.get_logger("corral.budgets")

# A request counts at its admission; hardly one is booked so long after it. The look at all finds the others.
LATELY: Final = timedelta(minutes=45)
LOOK_AT_ALL_EVERY_S: Final = 600
PAGE: Final = 500


def watched(now: datetime, *, everything: bool) -> QuerySet[Budget]:
    """Budgets worth a look."""
    found = Budget.objects.select_related("organization").order_by("id")
    if everything:
        return found
    spent = Spend.objects.filter(organization_id=OuterRef("organization_id"), quarter__gte=now - LATELY)
    return found.filter(Exists(spent))


def watch(
    now: datetime, *, everything: bool = False, client: redis.Redis | None = None, cell: str = ""
) -> int:
    """One look; how many alerts were made. With `client` the counters of that cell are trued up."""
    n = 0
    last: UUID | None = None
    while True:
        found = watched(now, everything=everything)
        page = list(found.filter(id__gt=last)[:PAGE] if last else found[:PAGE])
        for budget in page:
            standing = selectors.standing(budget, now)
            n += alert(standing)
            if client is not None and budget.hard:
                true_up(budget, now, client, cell, only_cell=_several_cells())
        if len(page) < PAGE:
            return n
        last = page[-1].id


def alert(standing: selectors.Standing) -> int:
    """A row and an event for each threshold that was crossed and not told of yet."""
    budget = standing.budget
    crossed = _crossed(budget.thresholds, standing)
    if not crossed:
        return 0
    # A rolling window has no beginning: a threshold is told again on another day.
    start = standing.window_start
    if budget.period == Period.ROLLING:
        start = (standing.window_start + timedelta(hours=budget.rolling_hours or 0)).replace(
            hour=0, minute=0, second=0, microsecond=0
        )
    known = set(
        BudgetAlert.objects.filter(budget=budget, window_start=start).values_list("threshold", flat=True)
    )
    n = 0
    for threshold in sorted(crossed - known):
        with transaction.atomic():
            made = BudgetAlert(
                organization_id=budget.organization_id, budget=budget, window_start=start, threshold=threshold,
                spent_nano=standing.spent_nano, limit_nano=budget.limit_nano,
            )  # fmt: skip
            BudgetAlert.objects.bulk_create([made], ignore_conflicts=True)
            if not BudgetAlert.objects.filter(id=made.id).exists():
                continue  # somebody else was first
            emit(
                organization_id=budget.organization_id,
                kind="budget.exhausted" if threshold >= 100 else "budget.threshold",
                data={
                    "budget_id": str(budget),
                    "name": budget.name,
                    "hard": budget.hard,
                    "threshold": threshold,
                    "spent_nano": standing.spent_nano,
                    "limit_nano": budget.limit_nano,
                    "window_start": standing.window_start.isoformat(),
                    "window_end": standing.window_end.isoformat() if standing.window_end else "",
                },
            )
        n += 1
        log.info("budget.threshold", budget=budget.id.hex, threshold=threshold)
    return n


def true_up(budget: Budget, now: datetime, client: redis.Redis, cell: str, *, only_cell: bool) -> int:
    """Add to the cell's counter what it has missed; nano-dollars."""
    window = selectors.window_of(budget, now)
    booked = selectors.spent_nano(budget, window, now, cell=cell if only_cell else "")
    if not booked:
        return 0
    width_ms = periods.buckets(budget.rolling_hours or 1).width_ms if budget.period == Period.ROLLING else 0
    keys = CellKeys(cell)
    missing = int(
        client.eval(TRUE_UP.source, 0, keys.prefix, budget.id.hex, window.counter_ms, width_ms, booked)
    )
    if missing:
        log.warning("budget.trued_up", budget=budget.id.hex, missing_nano=missing)
    return missing


def _crossed(thresholds: Iterable[int], standing: selectors.Standing) -> set[int]:
    # In integers: 80 % of an amount is 80 %, not a little less.
    spent, limit = standing.spent_nano, standing.budget.limit_nano
    return {each for each in thresholds if spent and 100 * spent >= each * limit}


def _several_cells() -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) > 1 FROM tenants_cell")
        return bool(cursor.fetchone()[0])
