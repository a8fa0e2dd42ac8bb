"""Reads about webhooks, scoped by organization."""

from __future__ import annotations

from uuid import UUID

from django.db.models import QuerySet

from controlplane.errors import NotFoundError
from controlplane.webhooks.models import Delivery, Endpoint


def endpoints(*, organization_id: UUID) -> QuerySet[Endpoint]:
    return Endpoint.objects.filter(organization_id=organization_id)


def endpoint(*, organization_id: UUID, endpoint_id: UUID) -> Endpoint:
    """One endpoint. Raises NotFoundError, also for another tenant's."""
    found = endpoints(organization_id=organization_id).filter(id=endpoint_id).first()
    if found is None:
        raise NotFoundError("no such webhook", field="webhook")
    return found


def deliveries(*, organization_id: UUID, endpoint_id: UUID | None = None) -> QuerySet[Delivery]:
    """To endpoints; mail is not among them."""
    found = Delivery.objects.filter(organization_id=organization_id, endpoint__isnull=False)
    if endpoint_id is not None:
        found = found.filter(endpoint_id=endpoint_id)
    return found.select_related("event")


def delivery(*, organization_id: UUID, delivery_id: UUID) -> Delivery:
    """One delivery. Raises NotFoundError, also for another tenant's."""
    found = deliveries(organization_id=organization_id).filter(id=delivery_id).first()
    if found is None:
        raise NotFoundError("no such delivery", field="delivery")
    return found
