"""Webhooks: endpoints that are told of events, and what was delivered to them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from django.db.models import Model
from ninja import Field, Query, Router, Schema

from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, matching, page
from controlplane.api.values import Body, DeliveryId, EventId, WebhookId
from controlplane.outbound import MAX_URL
from controlplane.tenants.rights import Permission
from controlplane.webhooks import selectors, services
from controlplane.webhooks.catalogue import CATALOGUE
from controlplane.webhooks.models import Delivery, Endpoint, State

router = Router(tags=["webhooks"])
_Url = Annotated[str, Field(min_length=8, max_length=MAX_URL, examples=["https://example.org/corral"])]
_Events = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=40)]],
    Field(
        max_length=len(CATALOGUE),
        description="Kinds to be told of; none: all",
        examples=[["budget.threshold"]],
    ),
]


class WebhookOut(Schema):
    """An endpoint."""

    id: WebhookId
    url: str
    description: str
    events: list[str] = Field(description="Kinds it is told of; none: all")
    enabled: bool
    disabled_at: datetime | None
    disabled_reason: str
    rotated_at: datetime | None = Field(
        description="When its secret was replaced; the old one signs for a day more"
    )
    created_at: datetime


class CreatedWebhook(WebhookOut):
    """An endpoint with its secret, which is shown this once."""

    secret: str = Field(
        description="Signs what is sent, as Standard Webhooks describes", examples=["whsec_MfKQ9r8G"]
    )


class NewWebhook(Body):
    """An endpoint to be. Its address must be public, unless the operator allows others."""

    url: _Url
    events: _Events = Field(default=[])
    description: Annotated[str, Field(max_length=200)] = ""


class WebhookChange(Body):
    """What is left out stays as it is."""

    url: _Url | None = None
    events: _Events | None = None
    description: Annotated[str, Field(max_length=200)] | None = None
    enabled: bool | None = Field(default=None, description="true also forgets its failures")


class Rotation(Body):
    """Nothing needs saying."""


class WebhookQuery(PageQuery):
    """Which endpoints."""

    url: Annotated[str, Field(max_length=MAX_URL)] | None = None
    enabled: bool | None = None


class DeliveryQuery(PageQuery):
    """Which deliveries."""

    state: State | None = None
    kind: Annotated[str, Field(max_length=40)] | None = Field(default=None, description="Of the event")


class DeliveryOut(Schema):
    """One event for one endpoint."""

    id: DeliveryId
    webhook_id: WebhookId
    event_id: EventId = Field(description="Sent as `webhook-id`, the same at every try")
    kind: str
    data: dict[str, Any]
    state: State
    n_attempts: int
    next_at: datetime | None = Field(description="When it is tried (again); null once it is over")
    last_status: int | None
    last_error: str
    created_at: datetime
    delivered_at: datetime | None


def _facts(row: Endpoint) -> dict[str, Any]:
    return {
        "id": row.id,
        "url": row.url,
        "description": row.description,
        "events": row.events,
        "enabled": row.disabled_at is None,
        "disabled_at": row.disabled_at,
        "disabled_reason": row.disabled_reason,
        "rotated_at": row.rotated_at,
        "created_at": row.created_at,
    }


def webhook_out(row: Endpoint) -> WebhookOut:
    return WebhookOut(**_facts(row))


def delivery_out(row: Delivery) -> DeliveryOut:
    return DeliveryOut(
        id=row.id,
        webhook_id=row.endpoint_id,
        event_id=row.event_id,
        kind=row.event.kind,
        data=row.event.data,
        state=State(row.state),
        n_attempts=row.n_attempts,
        next_at=row.next_at if row.state == State.PENDING else None,
        last_status=row.last_status,
        last_error=row.last_error,
        created_at=row.created_at,
        delivered_at=row.delivered_at,
    )


def _current(request: ApiRequest, webhook_id: WebhookId, **_: object) -> tuple[Model, Any]:
    organization_id = request.caller.organization_id
    return selectors.endpoint(organization_id=organization_id, endpoint_id=webhook_id), webhook_out


@operation(router, "GET", "/webhooks", Permission.WEBHOOKS_READ, Page[WebhookOut])
def list_webhooks(request: ApiRequest, query: Query[WebhookQuery]) -> Page[WebhookOut]:
    """Endpoints, newest first."""
    rows = selectors.endpoints(organization_id=request.caller.organization_id)
    rows = matching(rows, url=query.url)
    if query.enabled is not None:
        rows = rows.filter(disabled_at__isnull=query.enabled)
    return page(rows, query, webhook_out)


@operation(router, "POST", "/webhooks", Permission.WEBHOOKS_WRITE, CreatedWebhook, status=201)
def create_webhook(request: ApiRequest, body: NewWebhook) -> CreatedWebhook:
    """Create an endpoint. The secret in the answer is shown this once; it signs every call."""
    made, secret = services.create_endpoint(
        organization_id=request.caller.organization_id,
        url=body.url,
        events=body.events,
        description=body.description,
    )
    return CreatedWebhook(**_facts(made), secret=secret)


@operation(router, "GET", "/webhooks/{webhook_id}", Permission.WEBHOOKS_READ, WebhookOut)
def get_webhook(request: ApiRequest, webhook_id: WebhookId) -> WebhookOut:
    """One endpoint."""
    return webhook_out(
        selectors.endpoint(organization_id=request.caller.organization_id, endpoint_id=webhook_id)
    )


@operation(router, "PATCH", "/webhooks/{webhook_id}", Permission.WEBHOOKS_WRITE, WebhookOut, current=_current)
def change_webhook(request: ApiRequest, webhook_id: WebhookId, body: WebhookChange) -> WebhookOut:
    """Change an endpoint, disable it, or enable it again."""
    return webhook_out(
        services.update_endpoint(
            organization_id=request.caller.organization_id,
            endpoint_id=webhook_id,
            **body.model_dump(exclude_unset=True),
        )
    )


@operation(
    router, "DELETE", "/webhooks/{webhook_id}", Permission.WEBHOOKS_WRITE, None, status=204, current=_current
)
def delete_webhook(request: ApiRequest, webhook_id: WebhookId) -> None:
    """Delete an endpoint and what is kept of its deliveries."""
    services.delete_endpoint(organization_id=request.caller.organization_id, endpoint_id=webhook_id)


@operation(
    router, "POST", "/webhooks/{webhook_id}/rotate", Permission.WEBHOOKS_WRITE, CreatedWebhook, status=201
)
def rotate_webhook_secret(request: ApiRequest, webhook_id: WebhookId, body: Rotation) -> CreatedWebhook:
    """Replace the secret. For a day every call carries the signatures of both."""
    found, secret = services.rotate_secret(
        organization_id=request.caller.organization_id, endpoint_id=webhook_id
    )
    return CreatedWebhook(**_facts(found), secret=secret)


@operation(router, "POST", "/webhooks/{webhook_id}/test", Permission.WEBHOOKS_WRITE, DeliveryOut, status=201)
def try_webhook(request: ApiRequest, webhook_id: WebhookId, body: Rotation) -> DeliveryOut:
    """Send a `webhook.test`, whatever the endpoint listens to."""
    return delivery_out(
        services.try_endpoint(organization_id=request.caller.organization_id, endpoint_id=webhook_id)
    )


@operation(router, "GET", "/webhooks/{webhook_id}/deliveries", Permission.WEBHOOKS_READ, Page[DeliveryOut])
def list_deliveries(
    request: ApiRequest, webhook_id: WebhookId, query: Query[DeliveryQuery]
) -> Page[DeliveryOut]:
    """What was, or will be, sent to an endpoint, newest first; kept for a month."""
    organization_id = request.caller.organization_id
    selectors.endpoint(organization_id=organization_id, endpoint_id=webhook_id)
    rows = selectors.deliveries(organization_id=organization_id, endpoint_id=webhook_id)
    rows = matching(rows, state=query.state, event__kind=query.kind)
    return page(rows, query, delivery_out)


@operation(
    router, "POST", "/deliveries/{delivery_id}/replay", Permission.WEBHOOKS_WRITE, DeliveryOut, status=201
)
def replay_delivery(request: ApiRequest, delivery_id: DeliveryId, body: Rotation) -> DeliveryOut:
    """Send it again, under the same `webhook-id`."""
    return delivery_out(
        services.replay(organization_id=request.caller.organization_id, delivery_id=delivery_id)
    )
