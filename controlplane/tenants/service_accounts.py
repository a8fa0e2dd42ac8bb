"""Service accounts and the tokens of the management API: reads and writes, each inside one organization.

Who may call is the surface's question (rights.py). A token's plaintext exists only in the answer that made it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import structlog
from django.conf import settings
from django.db import connection
from django.utils import timezone as clock

from controlplane.errors import InvalidInputError, NotFoundError
from controlplane.saving import insert
from controlplane.tenants import api_keys as key_text
from controlplane.tenants.context import tenant
from controlplane.tenants.models import ManagementToken, Role, ServiceAccount
from controlplane.tenants.rights import PERMISSIONS, Permission

log = structlog.get_logger("corral.tenants")
MAX_TOKENS = 32  # alive, of one account


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a management token speaks for. `scopes` None: all that the role may."""

    organization_id: UUID
    token_id: UUID
    service_account_id: UUID
    role: Role
    scopes: frozenset[Permission] | None
    suspended_at: datetime | None


def find_caller(text: str) -> Caller | None:
    """The caller behind a token; None for anything that is none, has ended or belongs to a deleted account.

    Needs no tenant. A wrong secret, an unknown lookup part and a key of the other kind take the same steps.
    """
    peppers = settings.ENV.key_peppers
    found = key_text.presented(peppers, text)
    if not found:
        return None
    key = found[0]
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT organization_id, token_id, service_account_id, role, scopes, suspended_at "
            "FROM corral_management_token_known(%s, %s)",
            [key.lookup, [digest.hex() for digest in key.digests]],
        )
        row = cursor.fetchone()
        if row is not None and peppers.previous:  # kept under the present one from now on, if it is not
            old, (_, fresh, present) = key_text.digest(peppers.previous, text), key.target
            cursor.execute(
                "SELECT corral_token_move(%s, %s, %s, %s)", [key.lookup, old.hex(), fresh.hex(), present]
            )
    if row is None:
        return None
    granted = None if row[4] is None else json.loads(row[4])
    scopes = None if granted is None else frozenset(p for p in Permission if p.value in granted)
    return Caller(row[0], row[1], row[2], Role(row[3]), scopes, row[5])


def service_account(*, organization_id: UUID, account_id: UUID) -> ServiceAccount:
    """One account that was not deleted. Raises NotFoundError, also for another tenant's."""
    found = ServiceAccount.objects.filter(
        organization_id=organization_id, id=account_id, deleted_at=None
    ).first()
    if found is None:
        raise NotFoundError("no such service account", field="service_account")
    return found


def create_service_account(*, organization_id: UUID, name: str, role: Role) -> ServiceAccount:
    """A new account. Raises InvalidInputError (name) or ConflictError (name)."""
    account = ServiceAccount(organization_id=organization_id, name=name.strip(), role=role)
    with tenant(organization_id):
        insert(
            account,
            taken={"serviceaccount_name_unique": ("name", f"there is a service account {name!r} already")},
        )
    log.info("service_account.created", organization=organization_id.hex, account=account.id.hex, role=role)
    return account


def delete_service_account(*, organization_id: UUID, account_id: UUID) -> None:
    """End an account and every token of it. Raises NotFoundError."""
    with tenant(organization_id):
        account = service_account(organization_id=organization_id, account_id=account_id)
        now = clock.now()
        ManagementToken.objects.filter(
            organization_id=organization_id, service_account=account, revoked_at=None
        ).update(revoked_at=now)
        account.deleted_at = now
        account.save(update_fields=["deleted_at"])
    log.info("service_account.deleted", organization=organization_id.hex, account=account_id.hex)


def create_token(
    *,
    organization_id: UUID,
    account_id: UUID,
    name: str,
    scopes: Iterable[str] | None = None,
    expires_at: datetime | None = None,
) -> tuple[ManagementToken, str]:
    """A new token and its plaintext, which exists nowhere after this call: show it once.

    Raises NotFoundError (account), InvalidInputError (name, scopes the role does not have, an expiry that has passed,
    too many tokens).
    """
    if expires_at is not None and expires_at <= clock.now():
        raise InvalidInputError("expires_at: must be in the future", field="expires_at")
    new = key_text.generate(settings.ENV.key_pepper, key_text.MANAGEMENT)
    with tenant(organization_id):
        account = service_account(organization_id=organization_id, account_id=account_id)
        alive = ManagementToken.objects.filter(
            organization_id=organization_id, service_account=account, revoked_at=None
        )
        if alive.count() >= MAX_TOKENS:
            raise InvalidInputError(
                f"the account has {MAX_TOKENS} tokens: revoke one first", field="service_account"
            )
        token = ManagementToken(
            organization_id=organization_id,
            service_account=account,
            name=name.strip(),
            scopes=_scopes(scopes, Role(account.role)),
            lookup=new.lookup,
            digest=new.digest,
            pepper=key_text.pepper_id(settings.ENV.key_pepper),
            last4=new.last4,
            expires_at=expires_at,
        )
        insert(token, taken={})
    log.info("token.created", organization=organization_id.hex, account=account_id.hex, token_id=token.id.hex)
    return token, new.plaintext


def revoke_token(*, organization_id: UUID, token_id: UUID) -> ManagementToken:
    """End a token for good; one that is revoked already stays as it is. Raises NotFoundError."""
    with tenant(organization_id):
        revoked = ManagementToken.objects.filter(
            organization_id=organization_id, id=token_id, revoked_at=None
        ).update(revoked_at=clock.now())
        token = ManagementToken.objects.filter(organization_id=organization_id, id=token_id).first()
        if token is None:
            raise NotFoundError("no such token", field="token")
    if revoked:
        log.info("token.revoked", organization=organization_id.hex, token_id=token.id.hex)
    return token


def _scopes(scopes: Iterable[str] | None, role: Role) -> list[str] | None:
    if scopes is None:
        return None
    wanted = sorted(set(scopes))
    allowed = PERMISSIONS[role]
    for scope in wanted:
        if scope not in set(Permission):
            raise InvalidInputError(
                f"scopes: {scope!r} is unknown; known: {', '.join(Permission)}", field="scopes"
            )
        if scope not in allowed:
            raise InvalidInputError(f"scopes: the role {role.value} has no {scope}", field="scopes")
    if not wanted:
        raise InvalidInputError(
            "scopes: name at least one, or leave it out for all of the role's", field="scopes"
        )
    return wanted
