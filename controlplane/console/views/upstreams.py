"""Endpoints elsewhere: how they are and what they were used for; attach, change, disable, detach, and the leave to send
prompts out. By the services that the REST API calls."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.views.decorators.http import require_GET, require_POST

from controlplane import ids
from controlplane.console import upstreams as shown
from controlplane.console.access import MemberRequest, member_page
from controlplane.console.upstream_forms import AttachForm, SettingsForm
from controlplane.deployments import selectors as deployments
from controlplane.errors import ConflictError, CorralError, InvalidInputError, NotFoundError
from controlplane.tenants.rights import Permission, may
from controlplane.upstreams import selectors, services
from controlplane.upstreams.models import Upstream
from controlplane.upstreams.services import Change

_FIELDS = {"deployment_id": "deployment"} | {
    column: name
    for name, column in (("input_usd", "input_nano_per_million"), ("output_usd", "output_nano_per_million"))
}


@require_GET
@member_page(Permission.UPSTREAMS_READ)
def upstream_list(request: MemberRequest) -> HttpResponse:
    return _list(request)


@require_POST
@member_page(Permission.UPSTREAMS_WRITE)
def attach(request: MemberRequest) -> HttpResponse:
    organization_id = request.membership.organization_id
    form = AttachForm(request.POST, deployments=deployments.deployments(organization_id=organization_id))
    if not form.is_valid():
        return _list(request, 400, form=form)
    found = form.cleaned_data
    try:
        made = services.attach(
            organization_id=organization_id,
            deployment_id=UUID(hex=found["deployment"]),
            name=found["name"].strip(),
            base_url=found["base_url"].strip(),
            model=found["model"].strip(),
            role=found["role"],
            change=form.change(),
        )
    except (InvalidInputError, ConflictError) as error:
        _blame(form, error)
        return _list(request, error.status, form=form)
    messages.success(request, f"“{made.name}” is attached. It serves within seconds.")
    return redirect("console:upstream", str(made))


@require_GET
@member_page(Permission.UPSTREAMS_READ)
def upstream_detail(request: MemberRequest, upstream: str) -> HttpResponse:
    return _detail(request, _found(request, upstream))


@require_POST
@member_page(Permission.UPSTREAMS_WRITE)
def change_upstream(request: MemberRequest, upstream: str) -> HttpResponse:
    """Its settings, or, with `enabled` (1 or 0), whether it is used at all."""
    found = _found(request, upstream)
    organization_id = request.membership.organization_id
    if "enabled" in request.POST:
        enabled = request.POST["enabled"] == "1"
        services.change_upstream(
            organization_id=organization_id, upstream_id=found.id, change=Change(enabled=enabled)
        )
        what = "enabled: it serves within seconds" if enabled else "disabled: what it answers now may end"
        messages.success(request, f"“{found.name}” is {what}.")
        return redirect("console:upstream", upstream)
    form = SettingsForm(request.POST)
    if not form.is_valid():
        return _detail(request, found, 400, form=form)
    try:
        services.change_upstream(organization_id=organization_id, upstream_id=found.id, change=form.change())
    except (InvalidInputError, ConflictError) as error:
        _blame(form, error)
        return _detail(request, _found(request, upstream), error.status, form=form)
    messages.success(request, f"“{found.name}” is changed.")
    return redirect("console:upstream", upstream)


@require_POST
@member_page(Permission.UPSTREAMS_WRITE)
def detach(request: MemberRequest, upstream: str) -> HttpResponse:
    found = _found(request, upstream)
    services.detach(organization_id=request.membership.organization_id, upstream_id=found.id)
    messages.success(request, f"“{found.name}” is detached. What it answers now may go on to its end.")
    return redirect("console:upstreams")


@require_POST
@member_page(Permission.UPSTREAMS_WRITE)
def set_consent(request: MemberRequest) -> HttpResponse:
    agreed = request.POST.get("agreed") == "1"
    services.set_consent(organization_id=request.membership.organization_id, agreed=agreed)
    messages.success(
        request,
        "Your prompts may go to endpoints that others attached."
        if agreed
        else "Your prompts stay in this house.",
    )
    return redirect("console:upstreams")


def _list(request: MemberRequest, status: int = 200, form: AttachForm | None = None) -> HttpResponse:
    organization_id = request.membership.organization_id
    known = deployments.deployments(organization_id=organization_id)
    context = {
        "upstreams": shown.rows(organization_id=organization_id, now=timezone.now()),
        "days": shown.DAYS,
        "deployments": known,
        "form": form or AttachForm(deployments=known),
        "agreed": selectors.has_agreed(organization_id=organization_id),
        "held_outside": services.held_outside(organization_id),
        "may_change": may(request.membership.role, Permission.UPSTREAMS_WRITE),
    }
    return render(request, "console/upstreams.html", context, status=status)


def _detail(request: MemberRequest, row: Upstream, status: int = 200, **context: Any) -> HttpResponse:
    organization_id, now = request.membership.organization_id, timezone.now()
    context = {
        "now": now,
        "shown": shown.rows(organization_id=organization_id, now=now, only=row)[0],
        "days": shown.DAYS,
        "form": SettingsForm.of(row),
        "may_change": may(request.membership.role, Permission.UPSTREAMS_WRITE),
        **context,
    }
    return render(request, "console/upstream.html", context, status=status)


def _blame(form: AttachForm | SettingsForm, error: CorralError) -> None:
    """At the field that is wrong."""
    name = _FIELDS.get(error.field or "", error.field)
    message = error.message.removeprefix(f"{error.field}: ")
    form.add_error(name if name in form.fields else None, message)


def _found(request: MemberRequest, upstream: str) -> Upstream:
    try:
        upstream_id = ids.from_text(ids.Prefix.UPSTREAM, upstream)
    except ids.InvalidIdError as error:
        raise NotFoundError("no such upstream", field="upstream") from error
    return selectors.upstream(organization_id=request.membership.organization_id, upstream_id=upstream_id)
