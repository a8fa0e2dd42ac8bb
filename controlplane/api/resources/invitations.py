"""Invitations: places in the organization, offered by e-mail. Nobody invites above their own rights."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from django.utils import timezone
from ninja import Field, Query, Router, Schema

from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, page
from controlplane.api.values import Body, InvitationId, UserId
from controlplane.identity import invitations
from controlplane.identity.models import Invitation
from controlplane.tenants.models import Role
from controlplane.tenants.rights import PERMISSIONS, Permission, cover

router = Router(tags=["members"])


class InvitationOut(Schema):
    """An offered place. Its token is in the mail alone."""

    id: InvitationId
    email: str
    role: Role
    status: Literal["open", "accepted", "revoked", "expired"]
    invited_by: UserId | None = Field(description="The person; null where a token did it")
    created_at: datetime
    sent_at: datetime | None = Field(
        description="When the mail server took the mail; null: not yet, or it refused"
    )
    expires_at: datetime


class InvitationQuery(PageQuery):
    """Which invitations."""

    email: Annotated[str, Field(max_length=254)] | None = None
    status: Literal["open", "accepted", "revoked", "expired"] | None = None


class NewInvitation(Body):
    """Whom to invite as what."""

    email: Annotated[str, Field(min_length=3, max_length=254, examples=["ada@example.org"])]
    role: Role


def invitation_out(row: Invitation) -> InvitationOut:
    return InvitationOut(
        id=row.id,
        email=row.email,
        role=Role(row.role),
        status=row.status(timezone.now()),  # type: ignore[arg-type]
        invited_by=row.invited_by_id,
        created_at=row.created_at,
        sent_at=row.sent_at,
        expires_at=row.expires_at,
    )


@operation(router, "GET", "/invitations", Permission.MEMBERS_READ, Page[InvitationOut])
def list_invitations(request: ApiRequest, query: Query[InvitationQuery]) -> Page[InvitationOut]:
    """Invitations, newest first, those that ended included."""
    rows = Invitation.objects.filter(organization_id=request.caller.organization_id)
    if query.email is not None:
        rows = rows.filter(email=query.email.lower())
    if query.status == "accepted":
        rows = rows.exclude(accepted_at=None)
    elif query.status == "revoked":
        rows = rows.exclude(revoked_at=None)
    elif query.status is not None:
        rows = rows.filter(accepted_at=None, revoked_at=None)
        late = {"expires_at__lte": timezone.now()}
        rows = rows.filter(**late) if query.status == "expired" else rows.exclude(**late)
    return page(rows, query, invitation_out)


@operation(router, "POST", "/invitations", Permission.MEMBERS_WRITE, InvitationOut, status=201)
def create_invitation(request: ApiRequest, body: NewInvitation) -> InvitationOut:
    """Invite somebody by e-mail. The link works once, for a week; the role may not exceed the caller's rights."""
    _covers(request, body.role)
    organization_id = request.caller.organization_id
    return invitation_out(
        invitations.invite(organization_id=organization_id, email=body.email, role=body.role)
    )


@operation(router, "GET", "/invitations/{invitation_id}", Permission.MEMBERS_READ, InvitationOut)
def get_invitation(request: ApiRequest, invitation_id: InvitationId) -> InvitationOut:
    """One invitation."""
    organization_id = request.caller.organization_id
    return invitation_out(
        invitations.invitation(organization_id=organization_id, invitation_id=invitation_id)
    )


@operation(router, "POST", "/invitations/{invitation_id}/resend", Permission.MEMBERS_WRITE, InvitationOut)
def resend_invitation(request: ApiRequest, invitation_id: InvitationId) -> InvitationOut:
    """Send a fresh link, good for a week from now; the earlier one is void."""
    organization_id = request.caller.organization_id
    row = invitations.invitation(organization_id=organization_id, invitation_id=invitation_id)
    _covers(request, Role(row.role))
    return invitation_out(invitations.resend(organization_id=organization_id, invitation_id=invitation_id))


@operation(router, "DELETE", "/invitations/{invitation_id}", Permission.MEMBERS_WRITE, None, status=204)
def revoke_invitation(request: ApiRequest, invitation_id: InvitationId) -> None:
    """Take an invitation back. Revoking again changes nothing."""
    invitations.revoke(organization_id=request.caller.organization_id, invitation_id=invitation_id)


def _covers(request: ApiRequest, role: Role) -> None:
    cover(
        request.caller.role,
        request.caller.scopes,
        PERMISSIONS[role],
        what=f"the role {role.value}",
        field="role",
    )
