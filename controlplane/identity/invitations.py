"""Invitations: offered by e-mail, accepted once by whoever reads that mailbox.

Called by the REST API and the console, which check who may invite whom (rights.cover). The token leaves in the mail
and nowhere else: were it shown to the inviter, they could open an account in somebody else's name.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

import structlog
from django.conf import settings
from django.db import connection, transaction
from django.urls import reverse
from django.utils import timezone as clock

from controlplane import mail
from controlplane.errors import ConflictError, InvalidInputError, NotFoundError
from controlplane.identity.models import Invitation
from controlplane.saving import insert
from controlplane.tenants import selectors, services
from controlplane.tenants.actor import act_as
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Member, Role, User
from controlplane.webhooks.services import emit

log = structlog.get_logger("corral.identity")

VALID_FOR: Final = timedelta(days=7)
RESEND_AFTER: Final = timedelta(minutes=1)
MAX_OPEN: Final = 500  # of one organization
TOKEN_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Offer:
    """An invitation as its token's holder may see it."""

    organization_id: UUID
    invitation_id: UUID
    organization_name: str
    email: str
    role: Role
    status: str
    is_suspended: bool


def invitation(*, organization_id: UUID, invitation_id: UUID) -> Invitation:
    """One invitation. Raises NotFoundError, also for another tenant's."""
    found = (
        Invitation.objects.filter(organization_id=organization_id, id=invitation_id)
        .select_related("invited_by")
        .first()
    )
    if found is None:
        raise NotFoundError("no such invitation", field="invitation")
    return found


def invite(*, organization_id: UUID, email: str, role: Role, invited_by: User | None = None) -> Invitation:
    """Offer a place and send the mail after commit.

    Raises InvalidInputError (address, too many open ones) or ConflictError (a member, or invited already).
    """
    email, now = email.strip().lower(), clock.now()
    token, digest = _new_token()
    row = Invitation(
        organization_id=organization_id,
        email=email,
        role=role,
        digest=digest,
        invited_by=invited_by,
        expires_at=now + VALID_FOR,
    )
    with tenant(organization_id):
        open_ones = Invitation.objects.filter(
            organization_id=organization_id, accepted_at=None, revoked_at=None
        )
        open_ones.filter(email=email, expires_at__lte=now).update(revoked_at=now)
        if Member.objects.filter(organization_id=organization_id, user__email=email).exists():
            raise ConflictError("this person is a member already", field="email")
        if open_ones.count() >= MAX_OPEN:
            raise InvalidInputError(
                f"there are {MAX_OPEN} open invitations: revoke some first", field="email"
            )
        insert(
            row,
            taken={
                "invitation_open_unique": ("email", "this address is invited already: resend that invitation")
            },
        )
        emit(
            organization_id=organization_id,
            kind="invitation.created",
            data={"email": email, "role": role.value},
        )
        _send_after_commit(row, token)
    log.info("invitation.created", organization=organization_id.hex, invitation=row.id.hex, role=role)
    return row


def resend(*, organization_id: UUID, invitation_id: UUID) -> Invitation:
    """A fresh token and time, by mail again; the earlier token is void.

    Raises NotFoundError, or InvalidInputError for one that was accepted, revoked or sent a moment ago.
    """
    with tenant(organization_id):
        row = _locked(organization_id, invitation_id)
        now = clock.now()
        if row.status(now) not in ("open", "expired"):
            raise InvalidInputError(f"it is {row.status(now)}: invite again", field="invitation")
        if row.sent_at is not None and now - row.sent_at < RESEND_AFTER:
            raise InvalidInputError("it was sent less than a minute ago: wait", field="invitation")
        token, row.digest = _new_token()
        row.expires_at = now + VALID_FOR
        row.save(update_fields=["digest", "expires_at"])
        _send_after_commit(row, token)
    log.info("invitation.resent", organization=organization_id.hex, invitation=invitation_id.hex)
    return row


def revoke(*, organization_id: UUID, invitation_id: UUID) -> None:
    """Take the offer back; revoking again changes nothing. Raises NotFoundError, InvalidInputError (accepted)."""
    with tenant(organization_id):
        row = _locked(organization_id, invitation_id)
        if row.accepted_at is not None:
            raise InvalidInputError("it was accepted: remove the member instead", field="invitation")
        if row.revoked_at is None:
            row.revoked_at = clock.now()
            row.save(update_fields=["revoked_at"])
    log.info("invitation.revoked", organization=organization_id.hex, invitation=invitation_id.hex)


def find_offer(token: str) -> Offer | None:
    """What a token offers; None for one that is unknown. Needs no tenant."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT organization_id, invitation_id, organization_name, email, role, status, is_suspended "
            "FROM corral_invitation(%s)",
            [_digest(token)],
        )
        row = cursor.fetchone()
    return None if row is None else Offer(row[0], row[1], row[2], row[3], Role(row[4]), row[5], row[6])


def accept(*, token: str, user: User) -> Offer:
    """Make the user a member, if the offer is theirs and stands. Once: of two who try one wins.

    Raises NotFoundError (unknown token), InvalidInputError (used, revoked, expired, another person's).
    """
    offer = _standing(token)
    if user.email != offer.email:
        raise InvalidInputError(
            f"this invitation is for {offer.email}: sign in with that address", field="email"
        )
    with tenant(offer.organization_id):
        act_as(str(user))
        _take(offer, token, user)
    return offer


def accept_as_new(*, token: str, name: str, password: str) -> tuple[Offer, User]:
    """Open an account for the address of the offer and make it a member.

    Raises what `accept` raises, and ConflictError or InvalidInputError of services.create_user.
    """
    offer = _standing(token)
    with tenant(offer.organization_id):
        user = services.create_user(email=offer.email, password=password, name=name)
        act_as(str(user))
        _take(offer, token, user)
    return offer, user


def take_open(*, organization_id: UUID, user: User) -> Role | None:
    """The role of an open invitation of this address, which is accepted by that; None without one.

    For who proved the address otherwise (an identity provider). Inside the tenant's transaction.
    """
    now = clock.now()
    row = (
        Invitation.objects.select_for_update(of=("self",))
        .filter(
            organization_id=organization_id,
            email=user.email,
            accepted_at=None,
            revoked_at=None,
            expires_at__gt=now,
        )
        .first()
    )
    if row is None:
        return None
    row.accepted_at, row.accepted_by = now, user
    row.save(update_fields=["accepted_at", "accepted_by"])
    return Role(row.role)


def _standing(token: str) -> Offer:
    offer = find_offer(token)
    if offer is None:
        raise NotFoundError("no such invitation", field="invitation")
    if offer.status != "open":
        raise InvalidInputError(f"this invitation is {offer.status}: ask for a new one", field="invitation")
    if offer.is_suspended:
        raise InvalidInputError("this organization is suspended", field="invitation")
    return offer


def _take(offer: Offer, token: str, user: User) -> None:
    now = clock.now()
    # The digest once more: whoever resent it meanwhile has made this token void.
    taken = Invitation.objects.filter(
        organization_id=offer.organization_id,
        id=offer.invitation_id,
        digest=_digest(token),
        accepted_at=None,
        revoked_at=None,
        expires_at__gt=now,
    ).update(accepted_at=now, accepted_by=user)
    if not taken:
        raise InvalidInputError("this invitation was used meanwhile: ask for a new one", field="invitation")
    if not Member.objects.filter(organization_id=offer.organization_id, user=user).exists():
        services.add_member(organization_id=offer.organization_id, user=user, role=offer.role)
    log.info(
        "invitation.accepted", organization=offer.organization_id.hex, invitation=offer.invitation_id.hex
    )


def _locked(organization_id: UUID, invitation_id: UUID) -> Invitation:
    rows = Invitation.objects.select_for_update(of=("self",))
    found = rows.filter(organization_id=organization_id, id=invitation_id).first()
    if found is None:
        raise NotFoundError("no such invitation", field="invitation")
    return found


def _new_token() -> tuple[str, bytes]:
    token = secrets.token_urlsafe(TOKEN_BYTES)
    return token, _digest(token)


def _digest(token: str) -> bytes:
    """256 random bits need no slow hash, and no pepper: nobody can guess back from it."""
    return hashlib.sha256(token.encode()).digest()


def _send_after_commit(row: Invitation, token: str) -> None:
    """A mail that cannot be sent leaves `sent_at` empty: the page says so and offers to resend."""
    organization_id, invitation_id = row.organization_id, row.id
    context = {
        "organization": selectors.organization(organization_id=organization_id).name,
        "inviter": row.invited_by and (row.invited_by.name or row.invited_by.email),
        "role": Role(row.role).value,
        "url": settings.ENV.console_url.rstrip("/") + reverse("console:accept_invitation", args=[token]),
        "expires_at": row.expires_at,
    }
    subject = f"{context['organization']} invites you to Corral"

    def send() -> None:
        if mail.send(to=row.email, subject=subject, template="identity/mail/invitation.txt", context=context):
            _note_sent(organization_id, invitation_id, clock.now())

    transaction.on_commit(send)


def _note_sent(organization_id: UUID, invitation_id: UUID, at: datetime) -> None:
    with tenant(organization_id):
        Invitation.objects.filter(organization_id=organization_id, id=invitation_id).update(sent_at=at)
