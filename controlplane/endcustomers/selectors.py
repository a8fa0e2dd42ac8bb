"""Reads about limits on end customers, scoped by organization."""

from __future__ import annotations

from uuid import UUID

from django.db.models import QuerySet

from controlplane.endcustomers.models import EndCustomerLimits
from controlplane.errors import NotFoundError


def limits(*, organization_id: UUID, project_id: UUID) -> QuerySet[EndCustomerLimits]:
    return EndCustomerLimits.objects.filter(organization_id=organization_id, project_id=project_id)


def one(*, organization_id: UUID, limits_id: UUID) -> EndCustomerLimits:
    """Raises NotFoundError, also for another tenant's."""
    found = EndCustomerLimits.objects.filter(organization_id=organization_id, id=limits_id).first()
    if found is None:
        raise NotFoundError("no such limits", field="end_customer_limits")
    return found
