"""Service levels: what a project promises its requests where that differs from the class."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from django.db.models import Model
from ninja import Field, Query, Router, Schema

from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, page
from controlplane.api.values import Body, DeploymentId, KeyId, ProjectId, SloRuleId
from controlplane.slo import selectors, services
from controlplane.slo.models import (
    MAX_DEADLINE_S,
    MAX_ITL_MS,
    MAX_OBJECTIVE_PPM,
    MAX_TTFT_MS,
    MIN_OBJECTIVE_PPM,
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
