"""People of the organization: members, and invitations to become one."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.views.decorators.http import require_GET, require_POST

from controlplane import ids
from controlplane.console.access import MemberRequest, member_page
from controlplane.console.forms import InviteForm
from controlplane.errors import ConflictError, InvalidInputError, NotFoundError
from controlplane.identity import invitations
from controlplane.identity.models import Invitation
from controlplane.scim import selectors as directory
from controlplane.tenants import selectors
from controlplane.tenants.models import Role
from controlplane.tenants.rights import PERMISSIONS, Permission, cover, may

SHOWN_INVITATIONS = 100


@require_GET
@member_page(Permission.MEMBERS_READ)
def people(request: MemberRequest) -> HttpResponse:
    return render(request, "console/people.html", _context(request))


@require_POST
@member_page(Permission.MEMBERS_WRITE)
def invite(request: MemberRequest) -> HttpResponse:
    """Only roles that do not exceed the inviter's own are in the form, and no others are taken."""
    form = InviteForm(request.POST, roles=_roles(request))
    status = 400
    if form.is_valid():
        try:
            row = invitations.invite(
                organization_id=request.membership.organization_id,
                email=form.cleaned_data["email"],
                role=Role(form.cleaned_data["role"]),
                invited_by=request.user,
            )
        except (InvalidInputError, ConflictError) as error:
            form.add_error(error.field if error.field in form.fields else None, error.message)
            status = error.status
        else:
            messages.success(
                request, f"{row.email} is invited as {row.role}. The link in the mail works once."
            )
            return redirect("console:people")
    return render(request, "console/people.html", {**_context(request), "form": form}, status=status)


@require_POST
@member_page(Permission.MEMBERS_WRITE)
def resend(request: MemberRequest, invitation: str) -> HttpResponse:
    organization_id, invitation_id = request.membership.organization_id, _invitation_id(invitation)
    row = invitations.invitation(organization_id=organization_id, invitation_id=invitation_id)
    given = PERMISSIONS[Role(row.role)]
    cover(request.membership.role, None, given, what=f"the role {row.role}", field="role")
    invitations.resend(organization_id=organization_id, invitation_id=invitation_id)
    messages.success(request, f"{row.email} gets a new link; the earlier one no longer works.")
    return redirect("console:people")


@require_POST
@member_page(Permission.MEMBERS_WRITE)
def revoke(request: MemberRequest, invitation: str) -> HttpResponse:
    organization_id, invitation_id = request.membership.organization_id, _invitation_id(invitation)
    row = invitations.invitation(organization_id=organization_id, invitation_id=invitation_id)
    invitations.revoke(organization_id=organization_id, invitation_id=invitation_id)
    messages.success(request, f"The invitation of {row.email} is revoked.")
    return redirect("console:people")


def _context(request: MemberRequest) -> dict[str, Any]:
    organization_id, now = request.membership.organization_id, timezone.now()
    waiting = Invitation.objects.filter(organization_id=organization_id, accepted_at=None, revoked_at=None)
    return {
        "now": now,
        "members": selectors.members(organization_id=organization_id),
        "provisioned": directory.active_users(organization_id=organization_id),
        "invitations": [
            (row, row.status(now)) for row in waiting.order_by("-created_at", "-id")[:SHOWN_INVITATIONS]
        ],
        "form": InviteForm(roles=_roles(request)),
        "may_invite": may(request.membership.role, Permission.MEMBERS_WRITE),
        "may_see_sign_in": may(request.membership.role, Permission.SIGN_IN_READ),
    }


def _roles(request: MemberRequest) -> list[Role]:
    own = PERMISSIONS[request.membership.role]
    return [role for role in Role if PERMISSIONS[role] <= own]


def _invitation_id(text: str) -> UUID:
    try:
        return ids.from_text(ids.Prefix.INVITATION, text)
    except ids.InvalidIdError as error:
        raise NotFoundError("no such invitation", field="invitation") from error
