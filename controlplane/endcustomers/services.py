"""Writes about limits on end customers. Gateways hear of each after commit."""

from __future__ import annotations

from dataclasses import asdict
from typing import Final
from uuid import UUID

import structlog

from controlplane.endcustomers import selectors
from controlplane.endcustomers.models import EndCustomerLimits
from controlplane.errors import ConflictError, InvalidInputError
from controlplane.tenants import invalidation
from controlplane.tenants import selectors as tenants
from controlplane.tenants.context import tenant
from controlplane.tenants.end_customers import LENGTH, SHAPE
from controlplane.tenants.limits import Limits
from controlplane.tenants.models import Project

log = structlog.get_logger("corral.endcustomers")

# Customers of a project with limits of their own: gateways keep them with each key.
MAX_LIMITED: Final = 1_000


def set_limits(
    *,
    organization_id: UUID,
    project_id: UUID,
    limits: Limits,
    end_customer: str | None = None,
    customer: str = "",
) -> EndCustomerLimits:
    """Replace all five limits of one customer, by the id that programs send or by its pseudonym, or (neither) of each
    that has none of its own. Raises NotFoundError, InvalidInputError and ConflictError (too many)."""
    for field, message in limits.problems():
        raise InvalidInputError(message, field=field)
    if end_customer is not None and customer:
        raise InvalidInputError(
            "customer: it is the pseudonym of an end_customer: send one of the two", field="customer"
        )
    if end_customer is not None:
        customer = selectors.customer_of(organization_id=organization_id, end_customer=end_customer)
    elif SHAPE.match(customer) is None:
        raise InvalidInputError(
            f"customer: must be a pseudonym as usage shows it, {LENGTH} hex digits", field="customer"
        )
    with tenant(organization_id):
        tenants.project(organization_id=organization_id, project_id=project_id)
        Project.objects.select_for_update(no_key=True).get(id=project_id)
        known = selectors.limits(organization_id=organization_id, project_id=project_id)
        if not known.filter(customer=customer).exists() and known.count() > MAX_LIMITED:
            raise ConflictError(
                f"{MAX_LIMITED} customers of this project have limits of their own: delete some"
            )
        row, _ = EndCustomerLimits.objects.update_or_create(
            organization_id=organization_id, project_id=project_id, customer=customer, defaults=asdict(limits)
        )
        invalidation.publish_after_commit(invalidation.project_ref(project_id))
    log.info("end_customer_limits.set", organization=organization_id.hex, limits=row.id.hex)
    return row


def clear_limits(*, organization_id: UUID, limits_id: UUID) -> None:
    """That customer is limited as all others are; or, of the limits of all, nobody is. Raises NotFoundError."""
    with tenant(organization_id):
        row = selectors.one(organization_id=organization_id, limits_id=limits_id)
        row.delete()
        invalidation.publish_after_commit(invalidation.project_ref(row.project_id))
    log.info("end_customer_limits.cleared", organization=organization_id.hex, limits=limits_id.hex)
