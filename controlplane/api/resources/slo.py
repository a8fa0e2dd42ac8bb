"""Service levels: what a project promises its requests, what it kept, and how fast its error budget burns."""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, Final

from django.db.models import Model
from django.utils import timezone
from ninja import Field, Query, Router, Schema

from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, matching, page
from controlplane.api.values import Body, DeploymentId, KeyId, ProjectId, SloAlertId, SloRuleId
from controlplane.policy.attained import PPM, WINDOWS, Counts, budget_left, burn_rate, burning
from controlplane.slo import attainment, selectors, services
from controlplane.slo.attainment import Scope
from controlplane.slo.models import (
    MAX_DEADLINE_S,
    MAX_ITL_MS,
    MAX_OBJECTIVE_PPM,
    MAX_TTFT_MS,
    MIN_OBJECTIVE_PPM,
    SloAlert,
    SloRule,
)
from controlplane.tenants.rights import Permission

router = Router(tags=["service levels"])
_Class = Annotated[str, Field(min_length=1, max_length=16, examples=["batch"])]
_Ttft = Annotated[int, Field(ge=1, le=MAX_TTFT_MS)]
_Itl = Annotated[int, Field(ge=1, le=MAX_ITL_MS)]
_Deadline = Annotated[int, Field(ge=1, le=MAX_DEADLINE_S)]
_Objective = Annotated[int, Field(ge=MIN_OBJECTIVE_PPM, le=MAX_OBJECTIVE_PPM)]


class SloRuleOut(Schema):
    """What a class means for a project's requests. Null: what the class says itself, or all keys or deployments."""

    id: SloRuleId
    project_id: ProjectId
    slo_class: str
    key_id: KeyId | None
    deployment_id: DeploymentId | None
    is_default: bool = Field(description="Requests that name no class get this one")
    ttft_ms: int | None
    itl_ms: int | None
    deadline_s: int | None
    objective_ppm: int | None = Field(description="Millionths of the requests that must meet all targets")
    created_at: datetime


class NewSloRule(Body):
    """A rule to be. It also lets the project's requests name the class, where the deployment's own is a lower one."""

    project_id: ProjectId
    slo_class: _Class
    key_id: KeyId | None = None
    deployment_id: DeploymentId | None = None
    is_default: bool = False
    ttft_ms: _Ttft | None = None
    itl_ms: _Itl | None = None
    deadline_s: _Deadline | None = None
    objective_ppm: _Objective | None = None


class SloRuleChange(Body):
    """What is left out stays as it is; null of a target: what the class says itself. What it is about stays."""

    is_default: bool = False
    ttft_ms: _Ttft | None = None
    itl_ms: _Itl | None = None
    deadline_s: _Deadline | None = None
    objective_ppm: _Objective | None = None


class RulesQuery(PageQuery):
    """Which rules."""

    project_id: ProjectId | None = None


def rule_out(row: SloRule) -> SloRuleOut:
    return SloRuleOut(
        id=row.id,
        project_id=row.project_id,
        slo_class=row.slo_class_id,
        key_id=row.api_key_id,
        deployment_id=row.deployment_id,
        is_default=row.is_default,
        ttft_ms=row.ttft_ms,
        itl_ms=row.itl_ms,
        deadline_s=row.deadline_s,
        objective_ppm=row.objective_ppm,
        created_at=row.created_at,
    )


def _current(request: ApiRequest, rule_id: SloRuleId, **_: object) -> tuple[Model, Any]:
    return selectors.rule(organization_id=request.caller.organization_id, rule_id=rule_id), rule_out


@operation(router, "GET", "/slo-rules", Permission.DEPLOYMENTS_READ, Page[SloRuleOut])
def list_slo_rules(request: ApiRequest, query: Query[RulesQuery]) -> Page[SloRuleOut]:
    """Rules about service classes, newest first."""
    rows = selectors.rules(organization_id=request.caller.organization_id, project_id=query.project_id)
    return page(rows, query, rule_out)


@operation(router, "POST", "/slo-rules", Permission.DEPLOYMENTS_WRITE, SloRuleOut, status=201)
def create_slo_rule(request: ApiRequest, body: NewSloRule) -> SloRuleOut:
    """Say what a class means for a project's requests: its targets, and whether it is the default."""
    made = services.create_rule(
        organization_id=request.caller.organization_id,
        project_id=body.project_id,
        slo_class=body.slo_class,
        api_key_id=body.key_id,
        deployment_id=body.deployment_id,
        is_default=body.is_default,
        ttft_ms=body.ttft_ms,
        itl_ms=body.itl_ms,
        deadline_s=body.deadline_s,
        objective_ppm=body.objective_ppm,
    )
    return rule_out(made)


@operation(
    router,
    "PATCH",
    "/slo-rules/{rule_id}",
    Permission.DEPLOYMENTS_WRITE,
    SloRuleOut,
    current=_current,
)
def change_slo_rule(request: ApiRequest, rule_id: SloRuleId, body: SloRuleChange) -> SloRuleOut:
    """Change the targets of a rule, or whether its class is the default."""
    changed = services.change_rule(
        organization_id=request.caller.organization_id,
        rule_id=rule_id,
        change=body.model_dump(exclude_unset=True),
    )
    return rule_out(changed)


@operation(
    router,
    "DELETE",
    "/slo-rules/{rule_id}",
    Permission.DEPLOYMENTS_WRITE,
    None,
    status=204,
    current=_current,
)
def delete_slo_rule(request: ApiRequest, rule_id: SloRuleId) -> None:
    """The class means again what it says itself."""
    services.delete_rule(organization_id=request.caller.organization_id, rule_id=rule_id)


SPANS: Final = {
    "5m": timedelta(minutes=5),
    "1h": timedelta(hours=1),
    "6h": timedelta(hours=6),
    "1d": timedelta(days=1),
    "3d": timedelta(days=3),
    "7d": timedelta(days=7),
    "30d": timedelta(days=30),
    "90d": timedelta(days=90),
}


class Window(StrEnum):
    """Spans of attainment."""

    M5 = "5m"
    H1 = "1h"
    H6 = "6h"
    D1 = "1d"
    D3 = "3d"
    D7 = "7d"
    D30 = "30d"
    D90 = "90d"


class AttainmentQuery(Schema):
    """Whose requests, in which span until now."""

    slo_class: str | None = Field(default=None, alias="class", max_length=16)
    project_id: ProjectId | None = None
    deployment_id: DeploymentId | None = None
    window: Window = Window.D30


class Misses(Schema):
    """Requests that did not keep their promise, by the part that failed first."""

    failed: int = Field(description="Ended by a failure of ours")
    ttft: int = Field(description="First token too late")
    itl: int = Field(description="Too slow between tokens, on average over the answer")
    deadline: int = Field(description="Last token too late")
    refused: int = Field(description="Refused for want of capacity")


class BurnRates(Schema):
    """Share of misses over the share that the objective allows; 1 uses the budget up in its 30 days."""

    m5: float = Field(serialization_alias="5m")
    m30: float = Field(serialization_alias="30m")
    h1: float = Field(serialization_alias="1h")
    h6: float = Field(serialization_alias="6h")
    d3: float = Field(serialization_alias="3d")


class AttainedOut(Schema):
    """One class. Requests that their client did wrong, or ended early, do not count."""

    slo_class: str
    n_requests: int
    n_good: int
    attainment: float | None = Field(description="Good over all; null without requests")
    objective: float | None = Field(description="As in force when they were admitted, on average")
    misses: Misses
    budget_requests: float = Field(description="Misses that the objective allows in the span")
    budget_left: float | None = Field(description="Share of them that is left, below 0 when overdrawn")
    burn_rates: BurnRates
    burning: str | None = Field(
        description="Severity of the alert that these rates give: page, ticket or null"
    )


class AttainmentOut(Schema):
    """Attainment by class."""

    since: datetime
    until: datetime
    data: list[AttainedOut]


class SloAlertOut(Schema):
    """An error budget that burns too fast, or did."""

    id: SloAlertId
    project_id: ProjectId
    slo_class: str
    severity: str
    burn_rate: float = Field(description="In its window, when it began")
    window_s: int
    started_at: datetime
    ended_at: datetime | None


def alert_out(row: SloAlert) -> SloAlertOut:
    return SloAlertOut(
        id=row.id,
        project_id=row.project_id,
        slo_class=row.slo_class,
        severity=row.severity,
        burn_rate=row.burn_rate,
        window_s=row.window_s,
        started_at=row.started_at,
        ended_at=row.ended_at,
    )


class SloAlertQuery(PageQuery):
    """Which alerts."""

    project_id: ProjectId | None = None
    slo_class: Annotated[str, Field(max_length=16)] | None = None
    open: bool | None = Field(default=None, description="true: those without an end; false: those that ended")


@operation(router, "GET", "/slo/attainment", Permission.USAGE_READ, AttainmentOut)
def get_attainment(request: ApiRequest, query: Query[AttainmentQuery]) -> AttainmentOut:
    """Share of requests that kept their promise, error budget and burn rates, by class. Some seconds behind."""
    until = timezone.now()
    since = until - SPANS[query.window]
    scope = Scope(
        request.caller.organization_id,
        query.project_id,
        query.deployment_id,
        None if query.slo_class is None else query.slo_class,
    )
    rates = attainment.rates(scope, now=until)
    rows = attainment.attained(scope, since=since, until=until)
    return AttainmentOut(
        since=since, until=until, data=[_attained(row, rates.get(row.slo_class, {})) for row in rows]
    )


@operation(router, "GET", "/slo/alerts", Permission.USAGE_READ, Page[SloAlertOut])
def list_slo_alerts(request: ApiRequest, query: Query[SloAlertQuery]) -> Page[SloAlertOut]:
    """Alerts about error budgets, newest first; those without an end are open."""
    rows = SloAlert.objects.filter(organization_id=request.caller.organization_id)
    rows = matching(rows, project_id=query.project_id, slo_class=query.slo_class)
    if query.open is not None:
        rows = rows.filter(ended_at__isnull=query.open)
    return page(rows, query, alert_out)


def _attained(row: attainment.Attained, rates: dict[str, Counts]) -> AttainedOut:
    counts = row.counts
    none = Counts(0, 0, 0)
    windows = {WINDOWS[name]: rates.get(name, none) for name in WINDOWS}
    alert = burning(windows)
    return AttainedOut(
        slo_class=row.slo_class,
        n_requests=counts.n,
        n_good=counts.n_good,
        attainment=counts.n_good / counts.n if counts.n else None,
        objective=1 - counts.allowed_ppm / counts.n / PPM if counts.n else None,
        misses=Misses(**row.misses),
        budget_requests=counts.allowed_ppm / PPM,
        budget_left=budget_left(counts),
        burn_rates=BurnRates(
            m5=burn_rate(windows[300]),
            m30=burn_rate(windows[1_800]),
            h1=burn_rate(windows[3_600]),
            h6=burn_rate(windows[21_600]),
            d3=burn_rate(windows[259_200]),
        ),
        burning=None if alert is None else alert.severity,
    )
