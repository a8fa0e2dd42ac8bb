"""Identity providers of an organization: reads and writes. Sign-in itself is in vouching.py."""

from __future__ import annotations

import base64
import binascii
from datetime import datetime
from typing import Final
from uuid import UUID

import structlog
from allauth.socialaccount.models import SocialAccount
from cryptography import x509
from django.db import connection

from controlplane import secretbox
from controlplane.errors import InvalidInputError, NotFoundError
from controlplane.identity import fetch, sessions
from controlplane.identity.models import IdentityProvider, ProviderKind
from controlplane.saving import check_fields, insert
from controlplane.tenants.context import tenant

log = structlog.get_logger("corral.identity")

SECRET: Final = "identity provider"  # noqa: S105 - the purpose of the box
MAX_PROVIDERS: Final = 20


def provider(*, organization_id: UUID, provider_id: UUID) -> IdentityProvider:
    """One provider. Raises NotFoundError, also for another tenant's."""
    found = IdentityProvider.objects.filter(organization_id=organization_id, id=provider_id).first()
    if found is None:
        raise NotFoundError("no such identity provider", field="identity_provider")
    return found


def find(provider_id: UUID) -> IdentityProvider | None:
    """An enabled provider of any organization, for who is not signed in yet. Needs no tenant."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT corral_identity_provider(%s)", [provider_id])
        (organization_id,) = cursor.fetchone()
    if organization_id is None:
        return None
    with tenant(organization_id):
        return IdentityProvider.objects.filter(
            organization_id=organization_id, id=provider_id, is_enabled=True
        ).first()


def of_domain(name: str) -> list[tuple[UUID, str]]:
    """(id, name) of the enabled providers of the organization that holds this domain. Needs no tenant."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT provider_id, name FROM corral_domain_providers(%s)", [name.lower()])
        return list(cursor.fetchall())


def create_provider(
    *,
    organization_id: UUID,
    kind: ProviderKind,
    name: str,
    issuer: str,
    client_id: str = "",
    client_secret: str = "",
    sso_url: str = "",
    certificate: str = "",
    next_certificate: str = "",
    groups_claim: str = "groups",
) -> IdentityProvider:
    """A new provider, enabled. Raises InvalidInputError naming the field."""
    row = IdentityProvider(
        organization_id=organization_id,
        kind=kind,
        name=name,
        issuer=issuer,
        client_id=client_id,
        sso_url=sso_url,
        certificate=_certificate(certificate),
        next_certificate=_certificate(next_certificate, "next_certificate"),
        groups_claim=groups_claim,
        secret=secretbox.seal(client_secret, purpose=SECRET) if client_secret else b"",
    )
    _check(row)
    with tenant(organization_id):
        if IdentityProvider.objects.filter(organization_id=organization_id).count() >= MAX_PROVIDERS:
            raise InvalidInputError(f"there are {MAX_PROVIDERS} providers already: delete one", field="name")
        insert(row, taken={})
    log.info("identity_provider.created", organization=organization_id.hex, provider=row.id.hex, kind=kind)
    return row


def update_provider(
    *,
    organization_id: UUID,
    provider_id: UUID,
    name: str | None = None,
    is_enabled: bool | None = None,
    issuer: str | None = None,
    client_id: str | None = None,
    client_secret: str | None = None,
    sso_url: str | None = None,
    certificate: str | None = None,
    next_certificate: str | None = None,
    groups_claim: str | None = None,
) -> IdentityProvider:
    """Change what is given; disabling ends the sessions that were vouched for. Both certificates of a SAML provider
    count until `next_certificate` is "" again.

    Raises NotFoundError, InvalidInputError.
    """
    with tenant(organization_id):
        row = provider(organization_id=organization_id, provider_id=provider_id)
        was_enabled = row.is_enabled
        given = {
            "name": name,
            "is_enabled": is_enabled,
            "issuer": issuer,
            "client_id": client_id,
            "sso_url": sso_url,
            "certificate": None if certificate is None else _certificate(certificate),
            "next_certificate": (
                None if next_certificate is None else _certificate(next_certificate, "next_certificate")
            ),
            "groups_claim": groups_claim,
            "secret": None if client_secret is None else secretbox.seal(client_secret, purpose=SECRET),
        }
        changes = {field: value for field, value in given.items() if value is not None}
        for field, value in changes.items():
            setattr(row, field, value)
        _check(row)
        check_fields(row)
        row.save(update_fields=[*changes, "updated_at"])
        if was_enabled and not row.is_enabled:
            sessions.end_vouched(organization_id=organization_id)
    log.info("identity_provider.changed", organization=organization_id.hex, fields=sorted(changes))
    return row


def delete_provider(*, organization_id: UUID, provider_id: UUID) -> None:
    """Forget the provider, whom it vouched for, and the sessions that came of it. Raises NotFoundError."""
    with tenant(organization_id):
        row = provider(organization_id=organization_id, provider_id=provider_id)
        SocialAccount.objects.filter(provider=str(row)).delete()
        row.delete()
        sessions.end_vouched(organization_id=organization_id)
    log.info("identity_provider.deleted", organization=organization_id.hex, provider=provider_id.hex)


def certificate_ends_at(text: str) -> datetime | None:
    """Of a certificate as it is kept; None for an empty one."""
    if not text:
        return None
    return x509.load_der_x509_certificate(base64.b64decode(text)).not_valid_after_utc


def secret_of(row: IdentityProvider) -> str:
    box = bytes(row.secret)
    return secretbox.unseal(box, purpose=SECRET) if box else ""


def _check(row: IdentityProvider) -> None:
    if row.kind == ProviderKind.OIDC:
        if problem := fetch.check_url(row.issuer):
            raise InvalidInputError(f"issuer: {problem}", field="issuer")
        if not row.client_id:
            raise InvalidInputError("client_id: OIDC needs one", field="client_id")
        if row.sso_url or row.certificate or row.next_certificate:
            raise InvalidInputError("sso_url and certificate are for SAML: leave them out", field="sso_url")
        return
    if problem := fetch.check_url(row.sso_url):
        raise InvalidInputError(f"sso_url: {problem}", field="sso_url")
    if not row.certificate:
        raise InvalidInputError("certificate: SAML needs what the provider signs with", field="certificate")
    if not row.issuer.strip():
        raise InvalidInputError("issuer: SAML needs the provider's entity id", field="issuer")
    if row.client_id or row.secret:
        raise InvalidInputError("client_id and client_secret are for OIDC: leave them out", field="client_id")


def _certificate(text: str, field: str = "certificate") -> str:
    """The base64 of one X.509 certificate, from PEM or base64; checked by reading it."""
    if not text.strip():
        return ""
    body = "".join(line.strip() for line in text.strip().splitlines() if "-----" not in line)
    try:
        x509.load_der_x509_certificate(base64.b64decode(body, validate=True))
    except (ValueError, binascii.Error) as error:
        raise InvalidInputError(
            f"{field}: not one X.509 certificate in PEM or base64", field=field
        ) from error
    return body
