"""Suspending an organization and lifting it. The house's alone: `manage.py suspend`, as operator.

From the commit on its keys and tokens get 403 `organization_suspended`, its console can be read and not used, and no
machine is bought for it; after `suspension_grace_s` its replicas end (autoscaler/policy/replicas.py). What was admitted
before runs to its end. Gateways hear of it on Redis at once, and within half a second by the change notes, also those
that cached a deployment of it for the keys of others. Nothing is deleted.
"""

from __future__ import annotations

from uuid import UUID

import structlog
from django.db import IntegrityError, transaction
from django.utils import timezone as clock

from controlplane.deployments.models import Grant
from controlplane.errors import ConflictError, InvalidInputError
from controlplane.lifecycle.models import Suspension
from controlplane.tenants import invalidation, services
from controlplane.tenants.context import tenant

log = structlog.get_logger("corral.lifecycle")
MAX_REASON = 300


def suspend(*, organization_id: UUID, reason: str) -> Suspension:
    """Begin. Raises ConflictError if it is suspended, InvalidInputError without a reason, NotFoundError."""
    reason = reason.strip()
    if not 1 <= len(reason) <= MAX_REASON:
        raise InvalidInputError(f"reason: say why in 1 to {MAX_REASON} characters", field="reason")
    with tenant(organization_id):
        services.suspend_organization(organization_id=organization_id, suspended=True)
        try:
            with transaction.atomic():
                row = Suspension.objects.create(organization_id=organization_id, reason=reason)
        except IntegrityError as error:
            raise ConflictError("this organization is suspended already: lift that first") from error
        invalidation.publish_after_commit(*_guests(organization_id))
    return row


def lift(*, organization_id: UUID) -> None:
    """End. Raises ConflictError if it is not suspended, NotFoundError."""
    with tenant(organization_id):
        ended = Suspension.objects.filter(organization_id=organization_id, lifted_at=None)
        if not ended.update(lifted_at=clock.now()):
            raise ConflictError("this organization is not suspended")
        services.suspend_organization(organization_id=organization_id, suspended=False)
        invalidation.publish_after_commit(*_guests(organization_id))


def reason_of(*, organization_id: UUID) -> str:
    """Why it is suspended; empty where it is not, or nobody said."""
    row = Suspension.objects.filter(organization_id=organization_id, lifted_at=None).first()
    return row.reason if row else ""


def _guests(organization_id: UUID) -> list[str]:
    """Those who may call its deployments: their keys have cached them."""
    rows = Grant.objects.filter(organization_id=organization_id).values_list("grantee_id", flat=True)
    return [invalidation.organization_ref(grantee_id) for grantee_id in rows.distinct()]
