"""Projects: parts of an organization with their own keys, deployments, share of the queue and limits."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.db.models import Model
from ninja import Query, Router, Schema

from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, matching, page
from controlplane.api.values import Body, LimitsValue, Name, ProjectId, Slug, Weight, limits_of
from controlplane.tenants import limit_services, selectors, services
from controlplane.tenants.models import Project
from controlplane.tenants.rights import Permission

router = Router(tags=["projects"])


class ProjectOut(Schema):
    """A part of the organization."""

    id: ProjectId
    name: str
    slug: str
    weight: int
    zero_retention: bool
    limits: LimitsValue
    created_at: datetime


class NewProject(Body):
    """A project to be."""

    name: Name
    slug: Slug
    weight: Weight = 100
    zero_retention: bool = False
    limits: LimitsValue = LimitsValue()


class ProjectChange(Body):
    """What is left out stays as it is."""

    name: Name | None = None
    weight: Weight | None = None
    zero_retention: bool | None = None


class ProjectQuery(PageQuery):
    """Which projects."""

    slug: Slug | None = None


def project_out(row: Project) -> ProjectOut:
    return ProjectOut(
        id=row.id,
        name=row.name,
        slug=row.slug,
        weight=row.weight,
        zero_retention=row.zero_retention,
        limits=limits_of(row),
        created_at=row.created_at,
    )


def _current(request: ApiRequest, project_id: ProjectId, **_: object) -> tuple[Model, Any]:
    organization_id = request.caller.organization_id
    return selectors.project(organization_id=organization_id, project_id=project_id), project_out


@operation(router, "GET", "/projects", Permission.PROJECTS_READ, Page[ProjectOut])
def list_projects(request: ApiRequest, query: Query[ProjectQuery]) -> Page[ProjectOut]:
    """Projects, newest first."""
    rows = Project.objects.filter(organization_id=request.caller.organization_id)
    rows = matching(rows, slug=query.slug)
    return page(rows, query, project_out)


@operation(router, "POST", "/projects", Permission.PROJECTS_WRITE, ProjectOut, status=201)
def create_project(request: ApiRequest, body: NewProject) -> ProjectOut:
    """Create a project."""
    return project_out(
        services.create_project(
            organization_id=request.caller.organization_id,
            name=body.name,
            slug=body.slug,
            weight=body.weight,
            zero_retention=body.zero_retention,
            limits=body.limits.as_limits(),
        )
    )


@operation(router, "GET", "/projects/{project_id}", Permission.PROJECTS_READ, ProjectOut)
def get_project(request: ApiRequest, project_id: ProjectId) -> ProjectOut:
    """One project."""
    organization_id = request.caller.organization_id
    return project_out(selectors.project(organization_id=organization_id, project_id=project_id))


@operation(router, "PATCH", "/projects/{project_id}", Permission.PROJECTS_WRITE, ProjectOut, current=_current)
def change_project(request: ApiRequest, project_id: ProjectId, body: ProjectChange) -> ProjectOut:
    """Change a project's name, weight or retention."""
    return project_out(
        services.update_project(
            organization_id=request.caller.organization_id,
            project_id=project_id,
            **body.model_dump(exclude_unset=True),
        )
    )


@operation(
    router, "PUT", "/projects/{project_id}/limits", Permission.LIMITS_WRITE, ProjectOut, current=_current
)
def set_project_limits(request: ApiRequest, project_id: ProjectId, body: LimitsValue) -> ProjectOut:
    """Replace all limits of a project."""
    organization_id = request.caller.organization_id
    limit_services.set_project_limits(
        organization_id=organization_id, project_id=project_id, limits=body.as_limits()
    )
    return project_out(selectors.project(organization_id=organization_id, project_id=project_id))
