"""Writes about webhooks: events and who is to be told of them, endpoints, and replays.

`emit` is called by services of other apps in the transaction of what happened, in the tenant's or the operator's role.
What is sent when is in sending.py.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

import structlog
from django.conf import settings
from django.db.models import F
from django.utils import timezone

from controlplane import ids, outbound, secretbox
from controlplane.errors import ConflictError, InvalidInputError
from controlplane.saving import insert
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Member, Organization, Role
from controlplane.webhooks import selectors
from controlplane.webhooks.catalogue import CATALOGUE
from controlplane.webhooks.models import Delivery, Endpoint, EndpointState, Event, State

log = structlog.get_logger("corral.webhooks")

MAX_ENDPOINTS: Final = 16  # of an organization
MAX_DATA_BYTES: Final = 16_384
MAX_MAILED: Final = 20  # people told of one event
OVERLAP: Final = timedelta(hours=24)  # how long a replaced secret goes on signing
PURPOSE: Final = "webhook secret"
_SECRET_BYTES: Final = 32


def emit(
    *, organization_id: UUID, kind: str, data: Mapping[str, Any], fence: str | None = None
) -> Event | None:
    """Note what happened, with a delivery for each endpoint that listens and each person who is mailed.

    Inside the caller's transaction: it is told if that commits. With `fence` once only: None where it was noted
    before, or where nobody is to be told. Raises ValueError for data that its kind does not have: a bug of ours.
    """
    described = CATALOGUE[kind]
    if data.keys() != described.fields.keys() or len(json.dumps(dict(data))) > MAX_DATA_BYTES:
        raise ValueError(f"{kind}: the data does not fit its description in the catalogue")
    listening = Endpoint.objects.filter(organization_id=organization_id, disabled_at=None)
    endpoints = [endpoint for endpoint in listening if not endpoint.events or kind in endpoint.events]
    emails = _mailed(organization_id) if described.is_mailed else []
    if not endpoints and not emails and fence is None:
        return None
    event = Event(organization_id=organization_id, kind=kind, data=dict(data), fence=fence)
    Event.objects.bulk_create([event], ignore_conflicts=fence is not None)
    if fence is not None and not Event.objects.filter(id=event.id).exists():
        return None
    now = timezone.now()
    told = [
        *(
            Delivery(event=event, endpoint=endpoint, organization_id=organization_id, next_at=now)
            for endpoint in endpoints
        ),
        *(
            Delivery(event=event, email=email, organization_id=organization_id, next_at=now)
            for email in emails
        ),
    ]
    Delivery.objects.bulk_create(told)
    log.info("event.noted", organization=organization_id.hex, kind=kind, n_told=len(told))
    return event


def create_endpoint(
    *, organization_id: UUID, url: str, events: Sequence[str] = (), description: str = ""
) -> tuple[Endpoint, str]:
    """A new endpoint and its secret, shown once. Raises InvalidInputError and ConflictError (too many)."""
    _check_url(url)
    _check_events(events)
    secret = new_secret()
    made = Endpoint(
        organization_id=organization_id, url=url, events=sorted(set(events)), description=description
    )  # fmt: skip
    with tenant(organization_id):
        Organization.objects.select_for_update(no_key=True).get(id=organization_id)
        if Endpoint.objects.filter(organization_id=organization_id).count() >= MAX_ENDPOINTS:
            raise ConflictError(f"there are {MAX_ENDPOINTS} endpoints already: delete one first")
        insert(made, taken={})
        EndpointState.objects.create(
            endpoint=made,
            organization_id=organization_id,
            sealed_secret=secretbox.seal(secret, purpose=PURPOSE),
        )
    log.info("webhook.created", organization=organization_id.hex, webhook=made.id.hex)
    return made, secret


def update_endpoint(
    *,
    organization_id: UUID,
    endpoint_id: UUID,
    url: str | None = None,
    events: Sequence[str] | None = None,
    description: str | None = None,
    enabled: bool | None = None,
) -> Endpoint:
    """Change what is given; enabling forgets its failures. Raises NotFoundError, InvalidInputError."""
    if url is not None:
        _check_url(url)
    if events is not None:
        _check_events(events)
    with tenant(organization_id):
        found = selectors.endpoint(organization_id=organization_id, endpoint_id=endpoint_id)
        if url is not None:
            found.url = url
        if events is not None:
            found.events = sorted(set(events))
        if description is not None:
            found.description = description
        if enabled is True:
            found.disabled_at, found.disabled_reason = None, ""
            EndpointState.objects.filter(endpoint=found).update(failing_since=None)
        elif enabled is False and found.disabled_at is None:
            found.disabled_at, found.disabled_reason = timezone.now(), "by hand"
        found.save()
    return found


def rotate_secret(*, organization_id: UUID, endpoint_id: UUID) -> tuple[Endpoint, str]:
    """A new secret, shown once; for a day the one before signs too. Raises NotFoundError."""
    secret = new_secret()
    with tenant(organization_id):
        found = selectors.endpoint(organization_id=organization_id, endpoint_id=endpoint_id)
        now = timezone.now()
        EndpointState.objects.filter(endpoint=found).update(
            sealed_secret_before=F("sealed_secret"),
            secret_before_until=now + OVERLAP,
            sealed_secret=secretbox.seal(secret, purpose=PURPOSE),
        )
        found.rotated_at = now
        found.save()
    log.info("webhook.rotated", organization=organization_id.hex, webhook=endpoint_id.hex)
    return found, secret


def delete_endpoint(*, organization_id: UUID, endpoint_id: UUID) -> None:
    """Gone, with its deliveries. Raises NotFoundError."""
    with tenant(organization_id):
        selectors.endpoint(organization_id=organization_id, endpoint_id=endpoint_id).delete()
    log.info("webhook.deleted", organization=organization_id.hex, webhook=endpoint_id.hex)


def try_endpoint(*, organization_id: UUID, endpoint_id: UUID) -> Delivery:
    """Have it sent a `webhook.test`, whatever it listens to. Raises NotFoundError."""
    with tenant(organization_id):
        found = selectors.endpoint(organization_id=organization_id, endpoint_id=endpoint_id)
        event = Event.objects.create(
            organization_id=organization_id, kind="webhook.test", data={"sentence": "hello"}
        )
        return Delivery.objects.create(
            organization_id=organization_id, event=event, endpoint=found, next_at=timezone.now()
        )


def replay(*, organization_id: UUID, delivery_id: UUID) -> Delivery:
    """Send it again, under the same id, whatever became of it. Raises NotFoundError."""
    with tenant(organization_id):
        found = selectors.delivery(organization_id=organization_id, delivery_id=delivery_id)
        Delivery.objects.filter(id=found.id).update(
            state=State.PENDING, n_attempts=0, next_at=timezone.now(), last_error="", last_status=None
        )
        found.refresh_from_db()
    return found


def new_secret() -> str:
    """In the form of Standard Webhooks."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def secrets_of(endpoint: Endpoint) -> list[str]:
    """What signs now, newest first. Raises SealError."""
    kept = EndpointState.objects.get(endpoint=endpoint)
    found = [secretbox.unseal(bytes(kept.sealed_secret), purpose=PURPOSE)]
    until = kept.secret_before_until
    if kept.sealed_secret_before is not None and until is not None and until > timezone.now():
        found.append(secretbox.unseal(bytes(kept.sealed_secret_before), purpose=PURPOSE))
    return found


def _mailed(organization_id: UUID) -> list[str]:
    members = Member.objects.filter(organization_id=organization_id, role__in=(Role.OWNER, Role.BILLING))
    found = members.filter(user__is_active=True).order_by("id").values_list("user__email", flat=True)
    return list(found[:MAX_MAILED])


def _check_url(url: str) -> None:
    """Shape, and an address that stands in the URL itself. What its name leads to is judged at each call."""
    try:
        to = outbound.target(url)
    except outbound.RefusedAddressError as error:
        raise InvalidInputError(f"url: {error}", field="url") from error
    allowed = settings.ENV.outbound_allow
    try:
        reason = outbound.why_not(to.host, allowed)
    except ValueError:
        reason = None  # a name
    if to.host == "localhost" and not allowed:
        reason = "localhost is not a public address"
    if reason is not None:
        raise InvalidInputError(f"url: {reason}", field="url")


def _check_events(events: Sequence[str]) -> None:
    for name in events:
        if name not in CATALOGUE:
            raise InvalidInputError(
                f"events: {name[:40]!r} is no kind of event; there are {', '.join(CATALOGUE)}", field="events"
            )


def key_data(key_id: UUID, name: str, project_id: UUID) -> dict[str, str]:
    """Data of the events about API keys."""
    return {
        "key_id": ids.to_text(ids.Prefix.API_KEY, key_id),
        "name": name,
        "project_id": ids.to_text(ids.Prefix.PROJECT, project_id),
    }
