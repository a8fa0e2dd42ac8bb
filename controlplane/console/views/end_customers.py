"""Limits on a tenant's own customers: who has which, what they have spent of their money. For those who set limits."""

from __future__ import annotations

from typing import Any, Final, cast
from uuid import UUID

from django import forms
from django.contrib import messages
from django.core.paginator import Paginator
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.utils.http import urlencode
from django.views.decorators.http import require_GET, require_POST

from controlplane import ids
from controlplane.console.access import MemberRequest, member_page
from controlplane.console.key_forms import LimitsForm
from controlplane.endcustomers import selectors, services
from controlplane.endcustomers.models import EndCustomerLimits
from controlplane.errors import ConflictError, InvalidInputError, NotFoundError
from controlplane.tenants import selectors as tenants
from controlplane.tenants.end_customers import MAX_ID
from controlplane.tenants.rights import Permission

PER_PAGE: Final = 50


class NewLimitsForm(LimitsForm):
    """Limits and whose they are. Without an id: of each customer that has none of its own."""

    end_customer = forms.CharField(
        label="Customer",
        max_length=MAX_ID,
        required=False,
        help_text="As your programs send it in safety_identifier or user. Empty: each customer without its own.",
        widget=forms.TextInput(
            attrs={"placeholder": "e.g. cust-4711", "autocomplete": "off", "spellcheck": "false"}
        ),
    )
    project = forms.TypedChoiceField(label="Project")
    field_order = ("end_customer", "project")

    def __init__(self, *args: Any, organization_id: UUID, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        field = cast(forms.TypedChoiceField, self.fields["project"])
        projects = tenants.projects(organization_id=organization_id)
        field.choices = [(project.id.hex, project.name) for project in projects]


@require_GET
@member_page(Permission.LIMITS_WRITE)
def end_customers(request: MemberRequest) -> HttpResponse:
    return _list(request)


@require_POST
@member_page(Permission.LIMITS_WRITE)
def limit_end_customer(request: MemberRequest) -> HttpResponse:
    """Sets all five limits: what was set for the same customer before is replaced."""
    organization_id = request.membership.organization_id
    form = NewLimitsForm(request.POST, organization_id=organization_id)
    if not form.is_valid():
        return _list(request, 400, form=form)
    project_id = UUID(hex=form.cleaned_data.pop("project"))
    end_customer = form.cleaned_data.pop("end_customer") or None
    try:
        services.set_limits(
            organization_id=organization_id,
            project_id=project_id,
            limits=form.limits(),
            end_customer=end_customer,
        )
    except (InvalidInputError, ConflictError) as error:
        field = error.field if error.field in form.fields else None
        form.add_error(field, error.message.removeprefix(f"{error.field}: "))
        return _list(request, error.status, form=form)
    whom = f"“{end_customer}” has" if end_customer else "All customers without limits of their own have"
    messages.success(request, f"{whom} these limits from the next second on.")
    return redirect("console:end_customers")


@require_GET
@member_page(Permission.LIMITS_WRITE)
def end_customer(request: MemberRequest, limits: str) -> HttpResponse:
    return _detail(request, _found(request, limits))


@require_POST
@member_page(Permission.LIMITS_WRITE)
def change_end_customer(request: MemberRequest, limits: str) -> HttpResponse:
    """Other limits, or, with `delete`, none of its own any more."""
    organization_id, found = request.membership.organization_id, _found(request, limits)
    if "delete" in request.POST:
        services.clear_limits(organization_id=organization_id, limits_id=found.id)
        messages.success(
            request,
            "The limits are gone: this customer has those of all others now."
            if found.customer
            else "The limits are gone: only customers with limits of their own are limited now.",
        )
        return redirect("console:end_customers")
    form = LimitsForm(request.POST)
    if not form.is_valid():
        return _detail(request, found, 400, form=form)
    services.set_limits(
        organization_id=organization_id,
        project_id=found.project_id,
        limits=form.limits(),
        customer=found.customer,
    )
    messages.success(request, "The limits are changed. Every gateway heeds them from the next second on.")
    return redirect("console:end_customer", limits)


def _list(request: MemberRequest, status: int = 200, form: NewLimitsForm | None = None) -> HttpResponse:
    organization_id = request.membership.organization_id
    named, project = request.GET.get("customer", "").strip(), _project_id(request.GET.get("project", ""))
    rows = selectors.limits(organization_id=organization_id, project_id=project).select_related("project")
    if 0 < len(named) <= MAX_ID:
        rows = rows.filter(
            customer__in=(named, selectors.customer_of(organization_id=organization_id, end_customer=named))
        )
    page = Paginator(rows.order_by("-id"), PER_PAGE).get_page(request.GET.get("page"))
    spent = selectors.spent_nano(organization_id=organization_id, rows=page.object_list)
    context = {
        "now": timezone.now(),
        "rows": [(row, spent.get(row.id)) for row in page.object_list],
        "page": page,
        "query": urlencode({"customer": named, "project": project.hex if project else ""}),
        "named": named,
        "project": project.hex if project else "",
        "projects": tenants.projects(organization_id=organization_id),
        "form": form or NewLimitsForm(organization_id=organization_id),
    }
    return render(request, "console/end_customers.html", context, status=status)


def _detail(
    request: MemberRequest, row: EndCustomerLimits, status: int = 200, form: LimitsForm | None = None
) -> HttpResponse:
    organization_id = request.membership.organization_id
    spent = selectors.spent_nano(organization_id=organization_id, rows=[row])
    context = {
        "now": timezone.now(),
        "row": row,
        "spent_nano": spent.get(row.id),
        "form": form or LimitsForm.of(row.limits),
    }
    return render(request, "console/end_customer.html", context, status=status)


def _project_id(text: str) -> UUID | None:
    try:
        return UUID(hex=text)
    except ValueError:
        return None


def _found(request: MemberRequest, limits: str) -> EndCustomerLimits:
    try:
        limits_id = ids.from_text(ids.Prefix.END_CUSTOMER_LIMITS, limits)
    except ids.InvalidIdError as error:
        raise NotFoundError("no such limits", field="end_customer_limits") from error
    return selectors.one(organization_id=request.membership.organization_id, limits_id=limits_id)
