"""Grants: who may call a deployment besides the keys of its own project. `manage.py share` gives them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from ninja import Field, Query, Router, Schema

from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, matching, page
from controlplane.api.values import DeploymentId, GrantId, OrganizationId, ProjectId
from controlplane.deployments import sharing
from controlplane.deployments.models import Grant
from controlplane.tenants.rights import Permission

router = Router(tags=["grants"])


class GrantOut(Schema):
    """Leave to call a deployment."""

    id: GrantId
    deployment_id: DeploymentId
    name: str = Field(description="The `model` that the grantee's programs send")
    owner_id: OrganizationId
    grantee_id: OrganizationId
    project_id: ProjectId | None = Field(description="Only this project of the grantee; null: all of them")
    created_at: datetime


class GrantQuery(PageQuery):
    """Which grants."""

    deployment_id: DeploymentId | None = None


def grant_out(row: Grant) -> GrantOut:
    return GrantOut(
        id=row.id,
        deployment_id=row.deployment_id,
        name=row.name,
        owner_id=row.organization_id,
        grantee_id=row.grantee_id,
        project_id=row.project_id,
        created_at=row.created_at,
    )


class GrantHeldQuery(PageQuery):
    """Which grants."""

    name: Annotated[str, Field(max_length=64)] | None = Field(default=None, description="Of the deployment")
    project_id: ProjectId | None = None


@operation(router, "GET", "/grants", Permission.DEPLOYMENTS_READ, Page[GrantOut])
def list_grants(request: ApiRequest, query: Query[GrantQuery]) -> Page[GrantOut]:
    """Grants that you gave, newest first."""
    rows = Grant.objects.filter(organization_id=request.caller.organization_id)
    rows = matching(rows, deployment_id=query.deployment_id)
    return page(rows, query, grant_out)


@operation(router, "GET", "/grants-held", Permission.DEPLOYMENTS_READ, Page[GrantOut])
def list_grants_held(request: ApiRequest, query: Query[GrantHeldQuery]) -> Page[GrantOut]:
    """Grants that others gave you, newest first: what your keys may call besides your own deployments."""
    rows = Grant.objects.filter(grantee_id=request.caller.organization_id)
    rows = matching(rows, name=query.name, project_id=query.project_id)
    return page(rows, query, grant_out)


@operation(router, "DELETE", "/grants/{grant_id}", Permission.DEPLOYMENTS_WRITE, None, status=204)
def withdraw_grant(request: ApiRequest, grant_id: GrantId) -> None:
    """Take leave back. Running answers end in peace, the next request is refused."""
    sharing.withdraw(organization_id=request.caller.organization_id, grant_id=grant_id)
