"""Webhooks: endpoints that are told of events, what was sent to them, replays, and new secrets (shown once)."""

from __future__ import annotations

from typing import Any, Final
from uuid import UUID

from django import forms
from django.contrib import messages
from django.core.paginator import Paginator
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.views.decorators.http import require_GET, require_POST

from controlplane import ids
from controlplane.console.access import MemberRequest, member_page
from controlplane.errors import ConflictError, CorralError, InvalidInputError, NotFoundError
from controlplane.outbound import MAX_URL
from controlplane.tenants.rights import Permission, may
from controlplane.webhooks import selectors, services
from controlplane.webhooks.catalogue import CATALOGUE
from controlplane.webhooks.models import Endpoint

PER_PAGE: Final = 50


class WebhookForm(forms.Form):
    """An endpoint. No kind ticked: all of them."""

    url = forms.CharField(
        label="Address",
        max_length=MAX_URL,
        widget=forms.TextInput(
            attrs={"placeholder": "https://example.org/corral", "autocomplete": "off", "spellcheck": "false"}
        ),
    )
    description = forms.CharField(
        label="What it is for",
        max_length=200,
        required=False,
        widget=forms.TextInput(attrs={"placeholder": "e.g. pages the team", "autocomplete": "off"}),
    )
    events = forms.MultipleChoiceField(
        label="Events",
        required=False,
        choices=[(kind.name, kind.name) for kind in CATALOGUE.values()],
        widget=forms.CheckboxSelectMultiple,
    )

    @classmethod
    def of(cls, row: Endpoint) -> WebhookForm:
        return cls(initial={"url": row.url, "description": row.description, "events": row.events})


@require_GET
@member_page(Permission.WEBHOOKS_READ)
def webhook_list(request: MemberRequest) -> HttpResponse:
    return _list(request)


@require_POST
@member_page(Permission.WEBHOOKS_WRITE)
def create_webhook(request: MemberRequest) -> HttpResponse:
    """Answers with the secret in the page: it is shown this once."""
    form = WebhookForm(request.POST)
    if not form.is_valid():
        return _list(request, 400, form=form)
    try:
        made, secret = services.create_endpoint(
            organization_id=request.membership.organization_id, **form.cleaned_data
        )
    except (InvalidInputError, ConflictError) as error:
        _blame(form, error)
        return _list(request, error.status, form=form)
    return _detail(request, made, secret=secret, is_new=True)


@require_GET
@member_page(Permission.WEBHOOKS_READ)
def webhook_detail(request: MemberRequest, webhook: str) -> HttpResponse:
    return _detail(request, _found(request, webhook))


@require_POST
@member_page(Permission.WEBHOOKS_WRITE)
def change_webhook(request: MemberRequest, webhook: str) -> HttpResponse:
    """Its address and kinds; with `enabled` (1 or 0) whether it is told at all; with `delete`, gone."""
    found, organization_id = _found(request, webhook), request.membership.organization_id
    if "delete" in request.POST:
        services.delete_endpoint(organization_id=organization_id, endpoint_id=found.id)
        messages.success(request, f"The webhook {found.url} is gone, with what was kept of its deliveries.")
        return redirect("console:webhooks")
    if "enabled" in request.POST:
        enabled = request.POST["enabled"] == "1"
        services.update_endpoint(organization_id=organization_id, endpoint_id=found.id, enabled=enabled)
        messages.success(
            request, "It is told again from now on." if enabled else "It is told nothing until you enable it."
        )
        return redirect("console:webhook", webhook)
    form = WebhookForm(request.POST)
    if not form.is_valid():
        return _detail(request, found, 400, form=form)
    try:
        services.update_endpoint(organization_id=organization_id, endpoint_id=found.id, **form.cleaned_data)
    except InvalidInputError as error:
        _blame(form, error)
        return _detail(request, found, error.status, form=form)
    messages.success(request, "The webhook is changed.")
    return redirect("console:webhook", webhook)


@require_POST
@member_page(Permission.WEBHOOKS_WRITE)
def rotate_secret(request: MemberRequest, webhook: str) -> HttpResponse:
    """Answers with the new secret in the page; the one before signs too for a day."""
    found, secret = services.rotate_secret(
        organization_id=request.membership.organization_id, endpoint_id=_found(request, webhook).id
    )
    return _detail(request, found, secret=secret)


@require_POST
@member_page(Permission.WEBHOOKS_WRITE)
def try_webhook(request: MemberRequest, webhook: str) -> HttpResponse:
    services.try_endpoint(
        organization_id=request.membership.organization_id, endpoint_id=_found(request, webhook).id
    )
    messages.success(request, "A webhook.test is on its way: reload in a moment to see what came of it.")
    return redirect("console:webhook", webhook)


@require_POST
@member_page(Permission.WEBHOOKS_WRITE)
def replay_delivery(request: MemberRequest, delivery: str) -> HttpResponse:
    row = services.replay(
        organization_id=request.membership.organization_id,
        delivery_id=_id(ids.Prefix.DELIVERY, delivery, "delivery"),
    )
    messages.success(request, f"{row.event.kind} is sent again, under the same webhook-id.")
    return redirect("console:webhook", ids.to_text(ids.Prefix.WEBHOOK, _endpoint_id(row.endpoint_id)))


def _list(request: MemberRequest, status: int = 200, form: WebhookForm | None = None) -> HttpResponse:
    organization_id = request.membership.organization_id
    context = {
        "now": timezone.now(),
        "webhooks": selectors.standings(organization_id=organization_id),
        "form": form or WebhookForm(),
        "may_change": may(request.membership.role, Permission.WEBHOOKS_WRITE),
    }
    return render(request, "console/webhooks.html", context, status=status)


def _detail(request: MemberRequest, row: Endpoint, status: int = 200, **context: Any) -> HttpResponse:
    organization_id = request.membership.organization_id
    sent = selectors.deliveries(organization_id=organization_id, endpoint_id=row.id).order_by("-id")
    context = {
        "now": timezone.now(),
        "webhook": row,
        "deliveries": Paginator(sent, PER_PAGE).get_page(request.GET.get("page")),
        "form": WebhookForm.of(row),
        "overlap_h": int(services.OVERLAP.total_seconds()) // 3600,
        "may_change": may(request.membership.role, Permission.WEBHOOKS_WRITE),
        **context,
    }
    return render(request, "console/webhook.html", context, status=status)


def _blame(form: WebhookForm, error: CorralError) -> None:
    message = error.message.removeprefix(f"{error.field}: ")
    form.add_error(error.field if error.field in form.fields else None, message)


def _found(request: MemberRequest, webhook: str) -> Endpoint:
    return selectors.endpoint(
        organization_id=request.membership.organization_id,
        endpoint_id=_id(ids.Prefix.WEBHOOK, webhook, "webhook"),
    )


def _endpoint_id(endpoint_id: UUID | None) -> UUID:
    assert endpoint_id is not None  # `deliveries` leaves mail out
    return endpoint_id


def _id(prefix: ids.Prefix, text: str, what: str) -> UUID:
    try:
        return ids.from_text(prefix, text)
    except ids.InvalidIdError as error:
        raise NotFoundError(f"no such {what}", field=what) from error
