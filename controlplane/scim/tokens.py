"""Tokens of directories: made by who may change how people sign in, shown once, good for /scim/v2 of their
organization and nothing else.

A token can give people whatever role the sign-in policy gives a group; so surfaces let nobody make one who could not
give those roles (`roles_it_can_give`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

import structlog
from django.conf import settings
from django.db import connection
from django.db.models import Q
from django.utils import timezone as clock

from controlplane.errors import InvalidInputError, NotFoundError
from controlplane.identity import policies
from controlplane.saving import insert
from controlplane.scim.models import ScimToken
from controlplane.tenants import api_keys as key_text
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Role

log = structlog.get_logger("corral.scim")

MAX_TOKENS: Final = 10  # alive; two are enough to change one without a gap
USE_NOTED_EVERY: Final = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Directory:
    """Who a token speaks for."""

    organization_id: UUID
    token_id: UUID
    suspended_at: datetime | None


def find_directory(text: str) -> Directory | None:
    """The directory behind a token; None for anything that is none or has ended. Needs no tenant.

    A wrong secret and an unknown lookup part take the same steps (service_accounts.find_caller).
    """
    peppers = settings.ENV.key_peppers
    if key_text.lookup_of(text, key_text.SCIM) is None:
        return None
    (key,) = key_text.presented(peppers, text)
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT organization_id, token_id, suspended_at FROM corral_scim_token_known(%s, %s)",
            [key.lookup, [digest.hex() for digest in key.digests]],
        )
        row = cursor.fetchone()
        if row is not None and peppers.previous:  # kept under the present one from now on, if it is not
            old, (_, fresh, present) = key_text.digest(peppers.previous, text), key.target
            cursor.execute(
                "SELECT corral_scim_token_move(%s, %s, %s, %s)", [key.lookup, old.hex(), fresh.hex(), present]
            )
    return None if row is None else Directory(*row)


def roles_it_can_give(*, organization_id: UUID) -> frozenset[Role]:
    """What people can become by a directory's word, as the sign-in policy is now. Inside the tenant."""
    policy = policies.policy(organization_id=organization_id)
    return frozenset({Role(policy.default_role), *map(Role, policy.group_roles.values())})


def tokens(*, organization_id: UUID, limit: int = 50) -> list[ScimToken]:
    """Newest first, ended ones included; at most `limit`."""
    rows = ScimToken.objects.filter(organization_id=organization_id)
    return list(rows.order_by("-created_at", "-id")[:limit])


def create_token(
    *, organization_id: UUID, name: str, expires_at: datetime | None = None
) -> tuple[ScimToken, str]:
    """A new token and its plaintext, which exists nowhere after this call: show it once.

    Raises InvalidInputError (name, an expiry that has passed, too many tokens).
    """
    now = clock.now()
    if expires_at is not None and expires_at <= now:
        raise InvalidInputError("expires_at: must be in the future", field="expires_at")
    new = key_text.generate(settings.ENV.key_pepper, key_text.SCIM)
    row = ScimToken(
        organization_id=organization_id,
        name=name.strip(),
        lookup=new.lookup,
        digest=new.digest,
        pepper=key_text.pepper_id(settings.ENV.key_pepper),
        last4=new.last4,
        expires_at=expires_at,
    )
    with tenant(organization_id):
        alive = ScimToken.objects.filter(organization_id=organization_id, revoked_at=None)
        if alive.filter(Q(expires_at=None) | Q(expires_at__gt=now)).count() >= MAX_TOKENS:
            raise InvalidInputError(f"name: there are {MAX_TOKENS} tokens: revoke one first", field="name")
        insert(row, taken={})
    log.info("scim_token.created", organization=organization_id.hex, token_id=row.id.hex)
    return row, new.plaintext


def revoke_token(*, organization_id: UUID, token_id: UUID) -> ScimToken:
    """End a token for good; one that is revoked already stays as it is. Raises NotFoundError."""
    with tenant(organization_id):
        rows = ScimToken.objects.filter(organization_id=organization_id, id=token_id)
        revoked = rows.filter(revoked_at=None).update(revoked_at=clock.now())
        row = rows.first()
        if row is None:
            raise NotFoundError("no such SCIM token", field="token")
    if revoked:
        log.info("scim_token.revoked", organization=organization_id.hex, token_id=row.id.hex)
    return row


def note_use(directory: Directory) -> None:
    """When it was last used, to the minute: people see whether their directory still speaks. Inside its tenant."""
    now = clock.now()
    ScimToken.objects.filter(
        Q(last_used_at=None) | Q(last_used_at__lt=now - USE_NOTED_EVERY), id=directory.token_id
    ).update(last_used_at=now)
