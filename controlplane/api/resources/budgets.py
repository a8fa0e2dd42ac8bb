"""Budgets: what a key, a project or the organization may spend per window, and what it has spent so far."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, ClassVar

from django.db.models import Model
from django.utils import timezone
from ninja import Field, Query, Router, Schema

from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, matching, page
from controlplane.api.values import MAX_64, Body, BudgetId, KeyId, Name, ProjectId
from controlplane.budgets import selectors, services
from controlplane.budgets.models import Budget
from controlplane.policy.periods import MAX_ROLLING_HOURS, Period
from controlplane.tenants.rights import Permission

router = Router(tags=["budgets"])
_Limit = Annotated[
    int, Field(ge=0, le=MAX_64, description="Money per window, nano-dollars", examples=[50_000_000_000])
]
_Hours = Annotated[int, Field(ge=1, le=MAX_ROLLING_HOURS)]
_Thresholds = Annotated[
    list[Annotated[int, Field(ge=1, le=services.MAX_THRESHOLD)]],
    Field(
        max_length=services.MAX_THRESHOLDS, description="Percent of the limit at which to alert, ascending"
    ),
]


class BudgetOut(Schema):
    """A budget and how its present window stands. Requests that run now are not in what was spent."""

    etag_leaves_out: ClassVar[frozenset[str]] = frozenset({"spent_nano", "window_start", "window_end"})

    id: BudgetId
    name: str
    project_id: ProjectId | None = Field(description="Null: of a key, or of the whole organization")
    key_id: KeyId | None
    model: str = Field(description="Deployment name it is about; empty: all")
    limit_nano: int
    hard: bool = Field(description="Refuses what does not fit; a soft budget only alerts")
    period: Period
    rolling_hours: int | None
    thresholds: list[int]
    spent_nano: int = Field(description="Booked for requests admitted in the present window")
    window_start: datetime
    window_end: datetime | None = Field(description="When it begins anew; null for rolling and total")
    created_at: datetime


class NewBudget(Body):
    """A budget to be: of a key, of a project, or, where neither is named, of the organization."""

    name: Name
    limit_nano: _Limit
    period: Period = Field(description="Calendar windows are those of the organization's time zone")
    rolling_hours: _Hours | None = Field(default=None, description="How far a rolling budget reaches back")
    hard: bool = True
    project_id: ProjectId | None = None
    key_id: KeyId | None = None
    model: Annotated[str, Field(max_length=64)] = ""
    thresholds: _Thresholds = Field(default=[50, 80, 100])


class BudgetChange(Body):
    """What is left out stays as it is. Subject and window stay in any case."""

    name: Name | None = None
    limit_nano: _Limit | None = None
    hard: bool | None = None
    thresholds: _Thresholds | None = None


class BudgetsQuery(PageQuery):
    """Which budgets."""

    project_id: ProjectId | None = None
    key_id: KeyId | None = None


def budget_out(row: Budget) -> BudgetOut:
    standing = selectors.standing(row, timezone.now())
    return BudgetOut(
        id=row.id,
        name=row.name,
        project_id=row.project_id,
        key_id=row.api_key_id,
        model=row.model,
        limit_nano=row.limit_nano,
        hard=row.hard,
        period=Period(row.period),
        rolling_hours=row.rolling_hours,
        thresholds=row.thresholds,
        spent_nano=standing.spent_nano,
        window_start=standing.window_start,
        window_end=standing.window_end,
        created_at=row.created_at,
    )


def _current(request: ApiRequest, budget_id: BudgetId, **_: object) -> tuple[Model, Any]:
    return selectors.budget(organization_id=request.caller.organization_id, budget_id=budget_id), budget_out


@operation(router, "GET", "/budgets", Permission.USAGE_READ, Page[BudgetOut])
def list_budgets(request: ApiRequest, query: Query[BudgetsQuery]) -> Page[BudgetOut]:
    """Budgets with what was spent so far, newest first."""
    rows = selectors.budgets(organization_id=request.caller.organization_id)
    rows = matching(rows, project_id=query.project_id, api_key_id=query.key_id)
    return page(rows, query, budget_out)


@operation(router, "POST", "/budgets", Permission.LIMITS_WRITE, BudgetOut, status=201)
def create_budget(request: ApiRequest, body: NewBudget) -> BudgetOut:
    """Create a budget. It counts from the beginning of its present window: what was spent since then is in it."""
    organization_id = request.caller.organization_id
    made = services.create_budget(
        organization_id=organization_id,
        name=body.name,
        limit_nano=body.limit_nano,
        period=body.period,
        rolling_hours=body.rolling_hours,
        hard=body.hard,
        project_id=body.project_id,
        api_key_id=body.key_id,
        model=body.model,
        thresholds=body.thresholds,
    )
    return budget_out(made)


@operation(router, "GET", "/budgets/{budget_id}", Permission.USAGE_READ, BudgetOut)
def get_budget(request: ApiRequest, budget_id: BudgetId) -> BudgetOut:
    """One budget with what was spent so far."""
    return budget_out(selectors.budget(organization_id=request.caller.organization_id, budget_id=budget_id))


@operation(router, "PATCH", "/budgets/{budget_id}", Permission.LIMITS_WRITE, BudgetOut, current=_current)
def change_budget(request: ApiRequest, budget_id: BudgetId, body: BudgetChange) -> BudgetOut:
    """Raise or lower a budget, rename it, or change when it alerts. Gateways go by it within a second."""
    return budget_out(
        services.update_budget(
            organization_id=request.caller.organization_id,
            budget_id=budget_id,
            **body.model_dump(exclude_unset=True),
        )
    )


@operation(
    router, "DELETE", "/budgets/{budget_id}", Permission.LIMITS_WRITE, None, status=204, current=_current
)
def delete_budget(request: ApiRequest, budget_id: BudgetId) -> None:
    """Delete a budget: nothing is refused for it any more."""
    services.delete_budget(organization_id=request.caller.organization_id, budget_id=budget_id)
