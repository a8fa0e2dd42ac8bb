"""The playground: the page, and the short-lived key with which the browser calls the real gateway.

The key lives an hour, belongs to one browser session, is replaced when another is asked for, and never
appears on a page. Usage made with it is billed and limited like any other.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final
from uuid import UUID

from django.conf import settings
from django.http import HttpResponse, JsonResponse
from django.shortcuts import render
from django.utils import timezone
from django.views.decorators.http import require_GET, require_POST

from controlplane import ids
from controlplane.console.access import MemberRequest, member_page
from controlplane.deployments import selectors as deployments
from controlplane.deployments.models import Deployment, Phase
from controlplane.errors import NotFoundError
from controlplane.tenants import key_services
from controlplane.tenants.models import ApiKey
from controlplane.tenants.rights import Permission, may

KEY_NAME: Final = "Playground session"
KEY_LIFE: Final = timedelta(hours=1)
_SESSION_KEY: Final = "playground_key"


def is_playground_key(key: ApiKey) -> bool:
    """Whether this page made it: by name, and by a life no longer than such a key's."""
    return (
        key.name == KEY_NAME
        and key.expires_at is not None
        and key.expires_at - key.created_at <= KEY_LIFE + timedelta(minutes=1)
    )


@require_GET
@member_page()
def playground(request: MemberRequest) -> HttpResponse:
    found = deployments.deployments(organization_id=request.membership.organization_id)
    context = {
        "deployments": found,
        "chosen": _chosen(found, request.GET.get("model", "")),
        "base_url": f"{settings.ENV.gateway_url.rstrip('/')}/v1",
        "may_chat": may(request.membership.role, Permission.MODELS_USE),
    }
    return render(request, "console/playground.html", context)


@require_POST
@member_page(Permission.MODELS_USE)
def playground_key(request: MemberRequest) -> HttpResponse:
    """A fresh key for the project of a deployment, as JSON; this session's earlier one is revoked."""
    organization_id = request.membership.organization_id
    try:
        deployment_id = ids.from_text(ids.Prefix.DEPLOYMENT, request.POST.get("deployment", ""))
        project_id = deployments.deployment(
            organization_id=organization_id, deployment_id=deployment_id
        ).project_id
    except (ids.InvalidIdError, NotFoundError):
        return JsonResponse({"error": {"message": "No such deployment. Reload the page."}}, status=404)
    expires_at = timezone.now() + KEY_LIFE
    key, plaintext = key_services.create_api_key(
        organization_id=organization_id,
        project_id=project_id,
        name=KEY_NAME,
        created_by=request.user,
        expires_at=expires_at,
    )
    _replace_earlier(request, key)
    return JsonResponse({"api_key": plaintext, "expires_at": expires_at.isoformat()})


def _chosen(found: list[Deployment], text: str) -> Deployment | None:
    """The one asked for, else the first that answers at once, else the first that does not fail."""
    order = {Phase.READY: 0, Phase.FAILED: 2}
    wanted = [deployment for deployment in found if str(deployment) == text]
    by_phase = sorted(found, key=lambda deployment: order.get(Phase(deployment.phase), 1))
    return next(iter([*wanted, *by_phase]), None)


def _replace_earlier(request: MemberRequest, key: ApiKey) -> None:
    """One playground key per session and organization."""
    organization_id = request.membership.organization_id
    held = request.session.get(_SESSION_KEY) or {}
    earlier = held.get(organization_id.hex)
    if earlier:
        key_services.revoke_api_key(organization_id=organization_id, key_id=UUID(hex=earlier))
    request.session[_SESSION_KEY] = {**held, organization_id.hex: key.id.hex}
