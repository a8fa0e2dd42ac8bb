"""Limits on a tenant's own customers, by project: of each of them, and of single ones."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from django.db.models import Model
from ninja import Field, Query, Router, Schema

from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, matching, page
from controlplane.api.values import EndCustomerLimitsId, LimitsValue, ProjectId
from controlplane.endcustomers import selectors, services
from controlplane.endcustomers.models import EndCustomerLimits
from controlplane.tenants import selectors as tenants
from controlplane.tenants.end_customers import LENGTH, MAX_ID
from controlplane.tenants.limits import Limits
from controlplane.tenants.rights import Permission

router = Router(tags=["end customers"])


class EndCustomerLimitsOut(Schema):
    """Limits of one customer, or of each that has none of its own."""

    id: EndCustomerLimitsId
    project_id: ProjectId
    customer: str = Field(
        description="Its pseudonym, as in usage; empty: each customer that has no limits of its own",
        max_length=LENGTH,
    )
    limits: LimitsValue
    created_at: datetime


class NewEndCustomerLimits(LimitsValue):
    """All five limits: those left out are none."""

    end_customer: Annotated[str, Field(min_length=1, max_length=MAX_ID, pattern=r"\S")] | None = Field(
        default=None,
        description="The id that your programs send as safety_identifier, user or X-Corral-End-Customer; only a "
        "pseudonym of it is kept. Null: each customer that has no limits of its own",
        examples=["cust-4711"],
    )
    customer: Annotated[str, Field(pattern=rf"^[0-9a-f]{{{LENGTH}}}$")] | None = Field(
        default=None,
        description="In place of end_customer: its pseudonym, as usage and lists show it",
        examples=[None],
    )


class EndCustomerLimitsQuery(PageQuery):
    """Which limits."""

    project_id: ProjectId | None = None
    end_customer: Annotated[str, Field(min_length=1, max_length=MAX_ID, pattern=r"\S")] | None = Field(
        default=None, description="Those of one customer, by the id that your programs send"
    )
    customer: Annotated[str, Field(pattern=rf"^([0-9a-f]{{{LENGTH}}})?$")] | None = Field(
        default=None, description="By its pseudonym; empty: those for each customer without its own"
    )


def limits_out(row: EndCustomerLimits) -> EndCustomerLimitsOut:
    return EndCustomerLimitsOut(
        id=row.id,
        project_id=row.project_id,
        customer=row.customer,
        limits=LimitsValue(
            rpm=row.rpm,
            input_tpm=row.input_tpm,
            output_tpm=row.output_tpm,
            max_concurrency=row.max_concurrency,
            budget_nano=row.budget_nano,
        ),
        created_at=row.created_at,
    )


def _current(request: ApiRequest, limits_id: EndCustomerLimitsId, **_: object) -> tuple[Model, Any]:
    found = selectors.one(organization_id=request.caller.organization_id, limits_id=limits_id)
    return found, limits_out


@operation(router, "GET", "/end-customer-limits", Permission.PROJECTS_READ, Page[EndCustomerLimitsOut])
def list_all_end_customer_limits(
    request: ApiRequest, query: Query[EndCustomerLimitsQuery]
) -> Page[EndCustomerLimitsOut]:
    """Limits on end customers, of all projects, newest first."""
    organization_id = request.caller.organization_id
    rows = selectors.limits(organization_id=organization_id, project_id=query.project_id)
    if query.end_customer is not None:
        whose = selectors.customer_of(organization_id=organization_id, end_customer=query.end_customer)
        rows = rows.filter(customer=whose)
    rows = matching(rows, customer=query.customer)
    return page(rows, query, limits_out)


@operation(
    router,
    "GET",
    "/end-customer-limits/{limits_id}",
    Permission.PROJECTS_READ,
    EndCustomerLimitsOut,
)
def get_end_customer_limits(request: ApiRequest, limits_id: EndCustomerLimitsId) -> EndCustomerLimitsOut:
    """One of them."""
    return limits_out(selectors.one(organization_id=request.caller.organization_id, limits_id=limits_id))


@operation(
    router,
    "GET",
    "/projects/{project_id}/end-customer-limits",
    Permission.PROJECTS_READ,
    Page[EndCustomerLimitsOut],
)
def list_end_customer_limits(
    request: ApiRequest, project_id: ProjectId, query: Query[PageQuery]
) -> Page[EndCustomerLimitsOut]:
    """Limits on a project's end customers, newest first."""
    organization_id = request.caller.organization_id
    tenants.project(organization_id=organization_id, project_id=project_id)
    return page(selectors.limits(organization_id=organization_id, project_id=project_id), query, limits_out)


@operation(
    router,
    "PUT",
    "/projects/{project_id}/end-customer-limits",
    Permission.LIMITS_WRITE,
    EndCustomerLimitsOut,
)
def set_end_customer_limits(
    request: ApiRequest, project_id: ProjectId, body: NewEndCustomerLimits
) -> EndCustomerLimitsOut:
    """Limit one end customer, or each that has no limits of its own. They count beside those of key, project and
    organization, for requests that name a customer."""
    values = body.model_dump()
    end_customer, customer = values.pop("end_customer"), values.pop("customer")
    row = services.set_limits(
        organization_id=request.caller.organization_id,
        project_id=project_id,
        limits=Limits(**values),
        end_customer=end_customer,
        customer=customer or "",
    )
    return limits_out(row)


@operation(
    router,
    "DELETE",
    "/end-customer-limits/{limits_id}",
    Permission.LIMITS_WRITE,
    None,
    status=204,
    current=_current,
)
def clear_end_customer_limits(request: ApiRequest, limits_id: EndCustomerLimitsId) -> None:
    """Take limits away: a single customer is limited as all are then."""
    services.clear_limits(organization_id=request.caller.organization_id, limits_id=limits_id)
