"""The organization that the token belongs to."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.db.models import Model
from ninja import Router, Schema

from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.values import Body, LimitsValue, Name, OrganizationId, Weight, limits_of
from controlplane.tenants import limit_services, selectors, services
from controlplane.tenants.models import Organization
from controlplane.tenants.rights import Permission

router = Router(tags=["organization"])


class OrganizationOut(Schema):
    """A tenant: what is billed, limited and isolated."""

    id: OrganizationId
    name: str
    slug: str
    timezone: str
    weight: int
    limits: LimitsValue
    created_at: datetime


class OrganizationChange(Body):
    """What is left out stays as it is."""

    name: Name | None = None
    timezone: str | None = None
    weight: Weight | None = None


def organization_out(row: Organization) -> OrganizationOut:
    return OrganizationOut(
        id=row.id,
        name=row.name,
        slug=row.slug,
        timezone=row.timezone,
        weight=row.weight,
        limits=limits_of(row),
        created_at=row.created_at,
    )


def _current(request: ApiRequest, **_: object) -> tuple[Model, Any]:
    return selectors.organization(organization_id=request.caller.organization_id), organization_out


@operation(router, "GET", "/organization", Permission.ORGANIZATION_READ, OrganizationOut)
def get_organization(request: ApiRequest) -> OrganizationOut:
    """The organization."""
    return organization_out(selectors.organization(organization_id=request.caller.organization_id))


@operation(router, "PATCH", "/organization", Permission.ORGANIZATION_WRITE, OrganizationOut, current=_current)
def change_organization(request: ApiRequest, body: OrganizationChange) -> OrganizationOut:
    """Change the organization's name, time zone or weight."""
    return organization_out(
        services.update_organization(
            organization_id=request.caller.organization_id, **body.model_dump(exclude_unset=True)
        )
    )


@operation(router, "PUT", "/organization/limits", Permission.LIMITS_WRITE, OrganizationOut, current=_current)
def set_organization_limits(request: ApiRequest, body: LimitsValue) -> OrganizationOut:
    """Replace all limits of the organization."""
    organization_id = request.caller.organization_id
    limit_services.set_organization_limits(organization_id=organization_id, limits=body.as_limits())
    return organization_out(selectors.organization(organization_id=organization_id))
