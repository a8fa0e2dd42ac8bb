"""API keys: list, create (the plaintext is shown once), look at, bind, limit, rotate, revoke."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from controlplane import ids
from controlplane.console.access import MemberRequest, member_page
from controlplane.console.forms import CreateKeyForm
from controlplane.console.key_forms import LimitsForm, ScopesForm
from controlplane.console.views.playground import is_playground_key
from controlplane.errors import ConflictError, InvalidInputError, NotFoundError
from controlplane.tenants import key_services, limit_services, selectors
from controlplane.tenants.models import ApiKey
from controlplane.tenants.rights import Permission, may

ROTATION_OVERLAP_S = 24 * 3600


@require_GET
@member_page()
def key_list(request: MemberRequest) -> HttpResponse:
    return render(request, "console/keys.html", _context(request))


@require_POST
@member_page(Permission.KEYS_WRITE)
def create_key(request: MemberRequest) -> HttpResponse:
    """Answers with the plaintext in the page: it is stored nowhere, so nothing could be redirected to."""
    organization_id = request.membership.organization_id
    form = CreateKeyForm(request.POST, projects=selectors.projects(organization_id=organization_id))
    if not form.is_valid():
        return _page(request, {**_context(request), "form": form}, status=400)
    days = form.cleaned_data["expires"]
    try:
        key, plaintext = key_services.create_api_key(
            organization_id=organization_id,
            project_id=UUID(hex=form.cleaned_data["project"]),
            name=form.cleaned_data["name"].strip(),
            created_by=request.user,
            expires_at=timezone.now() + timedelta(days=int(days)) if days else None,
        )
    except (InvalidInputError, ConflictError) as error:
        form.add_error(error.field if error.field in form.fields else None, error.message)
        return _page(request, {**_context(request), "form": form}, status=error.status)
    return _page(request, {**_context(request), "created": key, "plaintext": plaintext})


@require_GET
@member_page(Permission.KEYS_READ)
def key_detail(request: MemberRequest, key: str) -> HttpResponse:
    return _detail(request, _found(request, key))


@require_POST
@member_page(Permission.KEYS_WRITE)
def bind_key(request: MemberRequest, key: str) -> HttpResponse:
    """Replaces what the key is bound to."""
    found, form = _found(request, key), ScopesForm(request.POST)
    try:
        if not form.is_valid():
            return _detail(request, found, status=400, scopes_form=form)
        key_services.set_api_key_scopes(
            organization_id=request.membership.organization_id,
            key_id=found.id,
            scopes=form.scopes(found.bound_to),
        )
    except InvalidInputError as error:
        field = (error.field or "").split(".")[1:2]
        message = error.message.removeprefix(f"{error.field}: ")
        form.add_error(field[0] if field and field[0] in form.fields else None, message)
        return _detail(request, found, status=error.status, scopes_form=form)
    messages.success(request, "The scope is changed. Every gateway heeds it from the next second on.")
    return redirect("console:key", key)


@require_POST
@member_page(Permission.LIMITS_WRITE)
def limit_key(request: MemberRequest, key: str) -> HttpResponse:
    """Replaces the key's limits."""
    found, form = _found(request, key), LimitsForm(request.POST)
    if not form.is_valid():
        return _detail(request, found, status=400, limits_form=form)
    limit_services.set_api_key_limits(
        organization_id=request.membership.organization_id, key_id=found.id, limits=form.limits()
    )
    messages.success(request, "The limits are changed. Every gateway heeds them from the next second on.")
    return redirect("console:key", key)


@require_POST
@member_page(Permission.KEYS_WRITE)
def rotate_key(request: MemberRequest, key: str) -> HttpResponse:
    """Answers with the successor's plaintext in the page. The old key goes on for a day."""
    found = _found(request, key)
    try:
        successor, plaintext = key_services.rotate_api_key(
            organization_id=request.membership.organization_id, key_id=found.id, overlap_s=ROTATION_OVERLAP_S
        )
    except InvalidInputError as error:
        messages.error(request, error.message)
        return redirect("console:key", key)
    return _detail(request, _found(request, str(successor)), created=successor, plaintext=plaintext)


@require_http_methods(["GET", "POST"])
@member_page(Permission.KEYS_WRITE)
def revoke_key(request: MemberRequest, key: str) -> HttpResponse:
    """GET asks, POST does it. Revoking again changes nothing."""
    organization_id = request.membership.organization_id
    found = _found(request, key)
    if request.method == "POST":
        key_services.revoke_api_key(organization_id=organization_id, key_id=found.id)
        messages.success(request, f"Key “{found.name}” is revoked. Calls with it are refused from now on.")
        return redirect("console:keys")
    template = "console/_revoke_key.html" if request.headers.get("HX-Request") else "console/revoke_key.html"
    return render(request, template, {"key": found, "now": timezone.now()})


def _page(request: MemberRequest, context: dict[str, Any], status: int = 200) -> HttpResponse:
    template = "console/_keys.html" if request.headers.get("HX-Request") else "console/keys.html"
    return render(request, template, context, status=status)


def _detail(request: MemberRequest, key: ApiKey, status: int = 200, **context: Any) -> HttpResponse:
    now, role = timezone.now(), request.membership.role
    may_bind, may_limit = may(role, Permission.KEYS_WRITE), may(role, Permission.LIMITS_WRITE)
    context = {
        "now": now,
        "key": key,
        "active": key.is_active(now),
        "may_bind": may_bind,
        "may_limit": may_limit,
        "scopes_form": ScopesForm.of(key),
        "limits_form": LimitsForm.of(key.limits),
        "overlap_h": ROTATION_OVERLAP_S // 3600,
        **context,
    }
    return render(request, "console/key.html", context, status=status)


def _found(request: MemberRequest, key: str) -> ApiKey:
    return selectors.api_key(organization_id=request.membership.organization_id, key_id=_key_id(key))


def _context(request: MemberRequest) -> dict[str, Any]:
    organization_id, now = request.membership.organization_id, timezone.now()
    projects = selectors.projects(organization_id=organization_id)
    found = selectors.api_keys(organization_id=organization_id)
    return {
        "now": now,
        "form": CreateKeyForm(projects=projects),
        "projects": projects,
        "keys": _rows(found, now),
        "may_manage": may(request.membership.role, Permission.KEYS_WRITE),
    }


def _rows(found: list[ApiKey], now: datetime) -> list[tuple[ApiKey, bool, bool]]:
    """(key, active, made by the playground), newest first, the playground's last.

    Those come and go by themselves, so only the ones that still work are of interest.
    """
    rows = [(key, key.is_active(now), is_playground_key(key)) for key in found]
    return sorted((row for row in rows if row[1] or not row[2]), key=lambda row: row[2])


def _key_id(text: str) -> UUID:
    try:
        return ids.from_text(ids.Prefix.API_KEY, text)
    except ids.InvalidIdError as error:
        raise NotFoundError("no such API key", field="api_key") from error
