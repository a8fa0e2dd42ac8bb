"""Shared deployments: which of ours others may call, taken back here, and which of others' our keys may call."""

from __future__ import annotations

from typing import Final
from uuid import UUID

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.views.decorators.http import require_GET, require_POST

from controlplane import ids
from controlplane.console.access import MemberRequest, member_page
from controlplane.deployments import selectors, sharing
from controlplane.errors import NotFoundError
from controlplane.tenants import selectors as tenants
from controlplane.tenants.rights import Permission, may

SHOWN: Final = 200


@require_GET
@member_page(Permission.DEPLOYMENTS_READ)
def shared(request: MemberRequest) -> HttpResponse:
    organization_id = request.membership.organization_id
    projects: dict[UUID | None, str] = {
        each.id: each.name for each in tenants.projects(organization_id=organization_id)
    }
    given = selectors.grants_given(organization_id=organization_id)[:SHOWN]
    held = selectors.grants_held(organization_id=organization_id)[:SHOWN]
    context = {
        "now": timezone.now(),
        "given": [(row, row.grantee_id == organization_id, projects.get(row.project_id)) for row in given],
        "held": [(row, projects.get(row.project_id)) for row in held],
        "may_change": may(request.membership.role, Permission.DEPLOYMENTS_WRITE),
    }
    return render(request, "console/sharing.html", context)


@require_POST
@member_page(Permission.DEPLOYMENTS_WRITE)
def withdraw(request: MemberRequest, grant: str) -> HttpResponse:
    try:
        grant_id = ids.from_text(ids.Prefix.GRANT, grant)
    except ids.InvalidIdError as error:
        raise NotFoundError("no such grant", field="grant") from error
    sharing.withdraw(organization_id=request.membership.organization_id, grant_id=grant_id)
    messages.success(request, "Taken back: running answers end in peace, the next request is refused.")
    return redirect("console:sharing")
