"""Mail domains of an organization: claimed, then proven by a TXT record. Identity providers may vouch for these alone.

An organization that could vouch for any address could sign in as anybody; so the proof comes first, and a domain has
one holder.
"""

from __future__ import annotations

import re
import secrets
from typing import Final
from uuid import UUID

import dns.exception
import dns.resolver
import structlog
from django.db import IntegrityError, transaction
from django.utils import timezone as clock

from controlplane.errors import ConflictError, CorralError, InvalidInputError, NotFoundError
from controlplane.identity.models import Domain
from controlplane.saving import insert
from controlplane.tenants.context import tenant

log = structlog.get_logger("corral.identity")

RECORD: Final = "_corral"  # the TXT record is at _corral.<domain>
MAX_DOMAINS: Final = 50
LOOKUP_TIMEOUT_S: Final = 4.0
_SHAPE: Final = re.compile(
    r"(?=.{4,253}\Z)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z][a-z0-9-]{0,61}[a-z0-9]\Z"
)


class NotProvenError(CorralError):
    """The record is not there (yet)."""

    status = 409
    code = "domain_not_proven"


def of_address(email: str) -> str:
    """The domain of an e-mail address, in lower case."""
    return email.rpartition("@")[2].lower()


def record_of(domain: Domain) -> tuple[str, str]:
    """Name and text of the TXT record that proves it."""
    return f"{RECORD}.{domain.name}", f"corral-verification={domain.token}"


def domain(*, organization_id: UUID, domain_id: UUID) -> Domain:
    """One domain. Raises NotFoundError, also for another tenant's."""
    found = Domain.objects.filter(organization_id=organization_id, id=domain_id).first()
    if found is None:
        raise NotFoundError("no such domain", field="domain")
    return found


def is_verified(*, organization_id: UUID, email: str) -> bool:
    """Whether the organization holds the domain of this address. Inside its tenant."""
    return Domain.objects.filter(
        organization_id=organization_id, name=of_address(email), verified_at__isnull=False
    ).exists()


def claim(*, organization_id: UUID, name: str) -> Domain:
    """A domain to be proven. Raises InvalidInputError (name, too many) or ConflictError (claimed already)."""
    name = name.strip().lower().rstrip(".")
    if not _SHAPE.match(name):
        raise InvalidInputError(f"name: {name[:80]!r} is no domain such as example.org", field="name")
    row = Domain(organization_id=organization_id, name=name, token=secrets.token_hex(16))
    with tenant(organization_id):
        if Domain.objects.filter(organization_id=organization_id).count() >= MAX_DOMAINS:
            raise InvalidInputError(f"name: there are {MAX_DOMAINS} domains already", field="name")
        insert(row, taken={"domain_claim_unique": ("name", "the organization has this domain already")})
    log.info("domain.claimed", organization=organization_id.hex, domain=row.id.hex)
    return row


def verify(*, organization_id: UUID, domain_id: UUID) -> Domain:
    """Look the record up now. Raises NotProvenError (naming record and text) or ConflictError (held by another)."""
    with tenant(organization_id):
        row = domain(organization_id=organization_id, domain_id=domain_id)
    if row.verified_at is not None:
        return row
    name, text = record_of(row)
    if text not in _texts(name):
        raise NotProvenError(
            f"there is no TXT record {name} that says {text}: records take a while to spread"
        )
    return mark_verified(organization_id=organization_id, domain_id=domain_id)


def mark_verified(*, organization_id: UUID, domain_id: UUID) -> Domain:
    """Without a look: for the house, where it knows by other means (`manage.py verify_domain`)."""
    with tenant(organization_id):
        row = domain(organization_id=organization_id, domain_id=domain_id)
        row.verified_at = clock.now()
        try:
            with transaction.atomic():
                row.save(update_fields=["verified_at"])
        except IntegrityError as error:
            raise ConflictError("another organization holds this domain", field="name") from error
    log.info("domain.verified", organization=organization_id.hex, domain=domain_id.hex)
    return row


def remove(*, organization_id: UUID, domain_id: UUID) -> None:
    """Give a domain up: its people can no longer be vouched for."""
    with tenant(organization_id):
        domain(organization_id=organization_id, domain_id=domain_id).delete()
    log.info("domain.removed", organization=organization_id.hex, domain=domain_id.hex)


def _resolver() -> dns.resolver.Resolver:
    return dns.resolver.Resolver()


def _texts(name: str) -> set[str]:
    try:
        answer = _resolver().resolve(name, "TXT", lifetime=LOOKUP_TIMEOUT_S)
    except dns.exception.DNSException:
        return set()
    return {b"".join(record.strings).decode("utf-8", "replace") for record in answer}
