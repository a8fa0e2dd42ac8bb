"""Erasing an organization: asked for by an owner, done by the control worker after a time in which it can be cancelled.

In this order, each step safe to repeat: suspended, and quiet until nothing of it can run; the files of its adapters
deleted; its Redis scrubbed; every row of it deleted, its bills left as facts without names, people who belong nowhere
else deleted (corral_erase, one transaction); its audit log sealed and then redacted: each entry keeps who, when and
what kind of change, and the digest that its link was made from, so that the chain still verifies; what was in it is
gone, and so is the salt without which nobody can check a guess against that digest.

Kept: usage and prices (the law wants them), the chain, and the erasure itself. Text in them is overwritten (KEPT).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

import redis
import structlog
from django.conf import settings
from django.contrib.sessions.models import Session
from django.db import IntegrityError, connection, transaction
from django.utils import timezone

from autoscaler.models import LIVE_PHASES, Replica
from controlplane.adapters import purging
from controlplane.audit import sealing
from controlplane.deployments.models import Deployment
from controlplane.errors import ConflictError, InvalidInputError, NotFoundError
from controlplane.lifecycle.models import Erasure, ErasureState
from controlplane.lifecycle.scrub import scrub
from controlplane.scim.models import ScimUser
from controlplane.tenants import selectors, services
from controlplane.tenants.actor import act_as
from controlplane.tenants.context import tenant
from controlplane.tenants.models import ApiKey, Member, Project, User
from workers.keys import CellKeys

log = structlog.get_logger("corral.lifecycle")

GRACE: Final = timedelta(days=14)
MAX_GRACE: Final = timedelta(days=90)
# A request runs 10 minutes at most and is kept for 15 more; the rest is for clocks.
QUIET: Final = timedelta(minutes=30)
# Tables whose rows stay, and what their texts become: `erased`, or with `id` behind it where they must differ.
KEPT: Final[dict[str, dict[str, str]]] = {
    "billing_usageevent": {"model": "erased", "end_customer": "erased"},
    "billing_priceversion": {"name": "id"},
    "audit_entry": {},
    "audit_seal": {},
    "lifecycle_erasure": {},
}
_OPEN: Final = (ErasureState.REQUESTED, ErasureState.ERASING)
REDIS_TIMEOUT_S: Final = 5.0


def request(*, organization_id: UUID, confirm: str, grace: timedelta = GRACE) -> Erasure:
    """Ask for it, or for another time. `confirm`: the organization's slug.

    Raises InvalidInputError, or ConflictError once it has begun.
    """
    with tenant(organization_id):
        found = selectors.organization(organization_id=organization_id)
        if confirm != found.slug:
            raise InvalidInputError("confirm: send the organization's slug to erase it", field="confirm")
        if not timedelta(0) <= grace <= MAX_GRACE:
            raise InvalidInputError(f"grace_days: set 0 to {MAX_GRACE.days}", field="grace_days")
        due_at = timezone.now() + grace
        asked = Erasure.objects.filter(organization_id=organization_id).exclude(state=ErasureState.CANCELLED)
        if not asked.filter(state=ErasureState.REQUESTED).update(due_at=due_at):
            try:
                with transaction.atomic():
                    Erasure.objects.create(
                        organization_id=organization_id, requested_by=_actor(), due_at=due_at
                    )
            except IntegrityError as error:
                raise ConflictError("the erasure has begun") from error
        row = asked.get()
    log.warning("erasure.requested", organization=organization_id.hex, due_at=row.due_at.isoformat())
    return row


def current(*, organization_id: UUID) -> Erasure:
    """The one under way. Raises NotFoundError."""
    found = Erasure.objects.filter(organization_id=organization_id, state__in=_OPEN).first()
    if found is None:
        raise NotFoundError("no erasure was asked for", field="erasure")
    return found


def cancel(*, organization_id: UUID) -> None:
    """Take it back. Raises NotFoundError, or ConflictError once it has begun."""
    with tenant(organization_id):
        found = current(organization_id=organization_id)
        taken_back = Erasure.objects.filter(id=found.id, state=ErasureState.REQUESTED).update(
            state=ErasureState.CANCELLED, ended_at=timezone.now()
        )
        if not taken_back:
            raise ConflictError("the erasure has begun: it cannot be taken back")


def due(now: datetime) -> list[UUID]:
    """Organizations whose erasure has something to do, as operator."""
    begun = Erasure.objects.filter(state=ErasureState.ERASING, quiet_until__lte=now)
    asked = Erasure.objects.filter(state=ErasureState.REQUESTED, due_at__lte=now)
    return list((begun | asked).order_by("due_at").values_list("organization_id", flat=True)[:100])


def advance(organization_id: UUID, *, quiet: timedelta = QUIET) -> bool:
    """Go on as far as possible now, as operator; whether it is done.

    Raises what Postgres and Redis raise when away, and ObjectStoreError.
    """
    row = current(organization_id=organization_id)
    if row.state == ErasureState.REQUESTED:
        with transaction.atomic():
            begun = Erasure.objects.filter(id=row.id, state=ErasureState.REQUESTED).update(
                state=ErasureState.ERASING, quiet_until=timezone.now() + quiet
            )
            if not begun:
                return False
            services.suspend_organization(organization_id=organization_id, suspended=True)
        row = current(organization_id=organization_id)
    if row.quiet_until is None or row.quiet_until > timezone.now():
        return False
    if Replica.objects.filter(organization_id=organization_id, phase__in=LIVE_PHASES).exists():
        return False  # its replicas drain since the suspension; the autoscaler must see their end first
    purging.purge_organization(organization_id, timezone.now())
    _scrub(organization_id)  # first: what lies there is found by the rows' ids
    _delete_rows(organization_id)
    if not _redact(organization_id):
        return False
    Erasure.objects.filter(id=row.id).update(state=ErasureState.ERASED, ended_at=timezone.now())
    log.warning("erasure.done", organization=organization_id.hex)
    return True


def _names(organization_id: UUID) -> list[str]:
    found: list[UUID] = []
    for model in (Project, ApiKey, Deployment):
        found += model._default_manager.filter(organization_id=organization_id).values_list("id", flat=True)
    return [each.hex for each in found]


def _delete_rows(organization_id: UUID) -> None:
    with transaction.atomic():
        act_as("erasure")
        people: set[UUID] = set()
        elsewhere: set[UUID] = set()
        for model in (Member, ScimUser):  # whom a directory has deactivated has an entry, and no place
            mine = model._default_manager.filter(organization_id=organization_id)
            people |= set(mine.values_list("user_id", flat=True))
        for model in (Member, ScimUser):
            others = model._default_manager.exclude(organization_id=organization_id).filter(
                user_id__in=people
            )
            elsewhere |= set(others.values_list("user_id", flat=True))
        people -= elsewhere
        with connection.cursor() as cursor:
            cursor.execute("SELECT corral_erase(%s, %s)", [organization_id, json.dumps(KEPT)])
        _end_sessions(people)
        User.objects.filter(id__in=people).delete()


def _end_sessions(people: Iterable[UUID]) -> None:
    wanted = {str(each) for each in people}
    gone = [
        session.pk
        for session in Session.objects.iterator(chunk_size=1000)
        if session.get_decoded().get("_auth_user_id") in wanted
    ]
    Session.objects.filter(pk__in=gone).delete()


def _scrub(organization_id: UUID) -> None:
    client = redis.Redis.from_url(
        settings.ENV.redis_url,
        socket_connect_timeout=REDIS_TIMEOUT_S,
        socket_timeout=REDIS_TIMEOUT_S,
    )
    with client:
        keys = CellKeys(settings.ENV.cell)
        scrub(client, keys, organization=organization_id.hex, names=_names(organization_id))


def _redact(organization_id: UUID) -> bool:
    """Seal what is settled, then redact it; whether nothing is left that could not be sealed yet."""
    while sealing.seal(organization_id):
        pass
    while batch := sealing.redactable(organization_id):
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT corral_redact(%s, %s, %s)",
                [organization_id, [each.pk for each in batch], [sealing.digest_of(each) for each in batch]],
            )
    return not sealing.has_unsealed(organization_id)


def _actor() -> str:
    with connection.cursor() as cursor:
        cursor.execute("SELECT coalesce(nullif(current_setting('corral.actor', true), ''), current_user)")
        found: Any = cursor.fetchone()
    return str(found[0])[:64]
