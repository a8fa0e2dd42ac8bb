"""Reads about limits on end customers, scoped by organization."""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

from django.conf import settings
from django.db.models import QuerySet, Sum

from billing.models import UsageEvent
from controlplane.endcustomers.models import EndCustomerLimits
from controlplane.errors import InvalidInputError, NotFoundError
from controlplane.tenants.end_customers import MAX_ID, pseudonym


def limits(*, organization_id: UUID, project_id: UUID | None = None) -> QuerySet[EndCustomerLimits]:
    """Of one project, or of all."""
    found = EndCustomerLimits.objects.filter(organization_id=organization_id)
    return found if project_id is None else found.filter(project_id=project_id)


def customer_of(*, organization_id: UUID, end_customer: str) -> str:
    """The pseudonym of whom a tenant's programs call so. Raises InvalidInputError."""
    named = end_customer.strip()
    if not 0 < len(named) <= MAX_ID:
        raise InvalidInputError(
            f"end_customer: send its id as your programs do, 1 to {MAX_ID} characters", field="end_customer"
        )
    return pseudonym(settings.ENV.digest_secret, organization_id.hex, named)


def spent_nano(*, organization_id: UUID, rows: Iterable[EndCustomerLimits]) -> dict[UUID, int]:
    """Booked for the customers that these limits are of, by the limits' id; nothing for those of each. One question."""
    of = {(row.project_id, row.customer): row.id for row in rows if row.customer}
    if not of:
        return {}
    found = (
        UsageEvent.objects.filter(
            organization_id=organization_id,
            project_id__in={project for project, _ in of},
            end_customer__in={customer for _, customer in of},
        )
        .order_by()
        .values_list("project_id", "end_customer")
        .annotate(spent=Sum("cost_nano"))
    )
    booked = {(project, customer): spent for project, customer, spent in found}
    return {limits_id: booked.get(who, 0) for who, limits_id in of.items()}


def one(*, organization_id: UUID, limits_id: UUID) -> EndCustomerLimits:
    """Raises NotFoundError, also for another tenant's."""
    found = EndCustomerLimits.objects.filter(organization_id=organization_id, id=limits_id).first()
    if found is None:
        raise NotFoundError("no such limits", field="end_customer_limits")
    return found
