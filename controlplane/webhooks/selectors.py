"""Reads about webhooks, scoped by organization."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from django.db.models import Count, Max, Q, QuerySet

from controlplane.errors import NotFoundError
from controlplane.webhooks.models import Delivery, Endpoint, EndpointState, State


@dataclass(frozen=True, slots=True)
class Standing:
    """An endpoint and how it fares, as far as deliveries are kept. `failing_since`: nothing arrived since."""

    row: Endpoint
    failing_since: datetime | None
    n_waiting: int
    n_delivered: int
    n_given_up: int
    delivered_at: datetime | None


def endpoints(*, organization_id: UUID) -> QuerySet[Endpoint]:
    return Endpoint.objects.filter(organization_id=organization_id)


def endpoint(*, organization_id: UUID, endpoint_id: UUID) -> Endpoint:
    """One endpoint. Raises NotFoundError, also for another tenant's."""
    found = endpoints(organization_id=organization_id).filter(id=endpoint_id).first()
    if found is None:
        raise NotFoundError("no such webhook", field="webhook")
    return found


def standings(*, organization_id: UUID) -> list[Standing]:
    """Of all endpoints, newest first."""
    rows = endpoints(organization_id=organization_id).annotate(
        n_waiting=Count("deliveries", filter=Q(deliveries__state=State.PENDING)),
        n_delivered=Count("deliveries", filter=Q(deliveries__state=State.DELIVERED)),
        n_given_up=Count("deliveries", filter=Q(deliveries__state=State.FAILED)),
        delivered_at=Max("deliveries__delivered_at"),
    )
    kept = EndpointState.objects.filter(organization_id=organization_id)
    failing = dict(kept.values_list("endpoint_id", "failing_since"))
    return [
        Standing(row, failing.get(row.id), row.n_waiting, row.n_delivered, row.n_given_up, row.delivered_at)
        for row in rows.order_by("-id")
    ]


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
