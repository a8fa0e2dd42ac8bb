"""Writes about budgets. Gateways hear of each change by its note (migrations/0001) and, faster, by pub/sub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from uuid import UUID

import structlog
from django.db.models import Q
from django.utils import timezone

from controlplane.budgets import selectors
from controlplane.budgets.models import Budget, BudgetAlert
from controlplane.errors import ConflictError, InvalidInputError
from controlplane.policy.periods import MAX_ROLLING_HOURS, Period
from controlplane.saving import check_fields, insert
from controlplane.tenants import invalidation
from controlplane.tenants import selectors as tenants
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Organization

log = structlog.get_logger("corral.budgets")

# A request falls under those of its key, project and organization: this bounds what admission compares.
MAX_PER_SUBJECT: Final = 8
MAX_THRESHOLDS: Final = 10
MAX_THRESHOLD: Final = 1_000
MAX_NANO: Final = (1 << 63) - 1


def create_budget(
    *,
    organization_id: UUID,
    name: str,
    limit_nano: int,
    period: Period,
    rolling_hours: int | None = None,
    hard: bool = True,
    project_id: UUID | None = None,
    api_key_id: UUID | None = None,
    model: str = "",
    thresholds: Sequence[int] = (50, 80, 100),
) -> Budget:
    """A budget of the key, else of the project, else of the organization; counts from its window's beginning.

    Raises InvalidInputError, NotFoundError (project, key) and ConflictError (too many for this subject).
    """
    _check(limit_nano, thresholds)
    if project_id is not None and api_key_id is not None:
        raise InvalidInputError(
            "api_key_id: name a key or a project, or neither, not both", field="api_key_id"
        )
    if period is Period.ROLLING:
        if rolling_hours is None or not 1 <= rolling_hours <= MAX_ROLLING_HOURS:
            raise InvalidInputError(
                f"rolling_hours: a rolling budget reaches back 1 to {MAX_ROLLING_HOURS} hours",
                field="rolling_hours",
            )
    elif rolling_hours is not None:
        raise InvalidInputError("rolling_hours: only with the period rolling", field="rolling_hours")
    made = Budget(
        organization_id=organization_id, name=name, limit_nano=limit_nano, period=period.value, hard=hard,
        rolling_hours=rolling_hours, project_id=project_id, api_key_id=api_key_id, model=model,
        thresholds=list(thresholds),
    )  # fmt: skip
    with tenant(organization_id):
        if project_id is not None:
            tenants.project(organization_id=organization_id, project_id=project_id)
        if api_key_id is not None:
            tenants.api_key(organization_id=organization_id, key_id=api_key_id)
        # Two at once must not both be the last that fits.
        Organization.objects.select_for_update(no_key=True).get(id=organization_id)
        of_subject = Q(project_id=project_id) if project_id is not None else Q(project_id__isnull=True)
        of_subject &= Q(api_key_id=api_key_id) if api_key_id is not None else Q(api_key_id__isnull=True)
        same = Budget.objects.filter(of_subject, organization_id=organization_id)
        if same.count() >= MAX_PER_SUBJECT:
            raise ConflictError(
                f"there are {MAX_PER_SUBJECT} budgets for this subject already: delete one first"
            )
        insert(made, taken={})
        _announce(made)
    log.info("budget.created", organization=organization_id.hex, budget=made.id.hex)
    return made


def update_budget(
    *,
    organization_id: UUID,
    budget_id: UUID,
    name: str | None = None,
    limit_nano: int | None = None,
    hard: bool | None = None,
    thresholds: Sequence[int] | None = None,
) -> Budget:
    """Change what is given; subject and window stay. Alerts that a higher limit makes untrue may be sent again.

    Raises NotFoundError, InvalidInputError.
    """
    _check(limit_nano or 0, thresholds or ())
    given = {
        "name": name,
        "limit_nano": limit_nano,
        "hard": hard,
        "thresholds": thresholds and list(thresholds),
    }
    with tenant(organization_id):
        found = selectors.budget(organization_id=organization_id, budget_id=budget_id)
        for field, value in given.items():
            if value is not None:
                setattr(found, field, value)
        check_fields(found)
        found.save()
        if limit_nano is not None:
            standing = selectors.standing(found, timezone.now())
            BudgetAlert.objects.filter(
                budget=found, window_start__gte=standing.window_start, threshold__gt=int(standing.percent)
            ).delete()
        _announce(found)
    log.info("budget.changed", organization=organization_id.hex, budget=budget_id.hex)
    return found


def delete_budget(*, organization_id: UUID, budget_id: UUID) -> None:
    """Nothing is refused for it any more. Raises NotFoundError."""
    with tenant(organization_id):
        found = selectors.budget(organization_id=organization_id, budget_id=budget_id)
        _announce(found)
        found.delete()
    log.info("budget.deleted", organization=organization_id.hex, budget=budget_id.hex)


def _check(limit_nano: int, thresholds: Sequence[int]) -> None:
    if not 0 <= limit_nano <= MAX_NANO:
        raise InvalidInputError(f"limit_nano={limit_nano}: must be from 0 to {MAX_NANO}", field="limit_nano")
    if len(thresholds) > MAX_THRESHOLDS or any(not 1 <= each <= MAX_THRESHOLD for each in thresholds):
        raise InvalidInputError(
            f"thresholds: at most {MAX_THRESHOLDS} whole percentages from 1 to {MAX_THRESHOLD}",
            field="thresholds",
        )
    if list(thresholds) != sorted(set(thresholds)):
        raise InvalidInputError("thresholds: each once, in ascending order", field="thresholds")


def _announce(budget: Budget) -> None:
    if budget.api_key is not None:
        ref = invalidation.key_ref(budget.api_key.lookup)
    elif budget.project_id is not None:
        ref = invalidation.project_ref(budget.project_id)
    else:
        ref = f"lim:{budget.organization_id.hex}"
    invalidation.publish_after_commit(ref)
