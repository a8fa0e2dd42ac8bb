"""Budgets with what was spent, and the quotas on machines: seen by all members, changed by those who may."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.views.decorators.http import require_GET, require_POST

from billing.money import MoneyFormatError, Nano, format_usd, parse_usd
from controlplane import ids
from controlplane.budgets import selectors, services
from controlplane.budgets.selectors import Standing
from controlplane.console.access import MemberRequest, member_page
from controlplane.console.forms import BudgetForm
from controlplane.errors import ConflictError, InvalidInputError, NotFoundError
from controlplane.policy.periods import Period
from controlplane.quotas import selectors as quotas
from controlplane.quotas.models import QuotaKind
from controlplane.tenants import selectors as tenants
from controlplane.tenants.rights import Permission, may

SHOWN: Final = 200
_WORDS: Final = {
    QuotaKind.MACHINES: "Machines",
    QuotaKind.SPEND_RATE: "Spending on machines an hour",
    QuotaKind.GPU_HOURS_DAY: "GPU-hours today",
    QuotaKind.GPU_HOURS_WEEK: "GPU-hours this week",
    QuotaKind.GPU_HOURS_MONTH: "GPU-hours this month",
}


@dataclass(frozen=True, slots=True)
class QuotaRow:
    """One quota in words."""

    what: str
    used: str
    limit: str
    percent: int
    is_ceiling: bool


@require_GET
@member_page(Permission.USAGE_READ)
def budget_list(request: MemberRequest) -> HttpResponse:
    return render(request, "console/budgets.html", _context(request))


@require_POST
@member_page(Permission.LIMITS_WRITE)
def create_budget(request: MemberRequest) -> HttpResponse:
    organization_id = request.membership.organization_id
    form = BudgetForm(request.POST, projects=tenants.projects(organization_id=organization_id))
    status = 400
    if form.is_valid():
        values = form.cleaned_data
        period, _, hours = values["period"].partition(":")
        try:
            made = services.create_budget(
                organization_id=organization_id,
                name=values["name"].strip(),
                limit_nano=parse_usd(values["limit"]),
                period=Period(period),
                rolling_hours=int(hours) if hours else None,
                hard=values["kind"] == "hard",
                project_id=UUID(hex=values["project"]) if values["project"] else None,
            )
        except (InvalidInputError, ConflictError, MoneyFormatError) as error:
            message = error.message if isinstance(error, (InvalidInputError, ConflictError)) else str(error)
            form.add_error("limit" if isinstance(error, MoneyFormatError) else None, message)
            status = getattr(error, "status", 400)
        else:
            messages.success(request, f"The budget “{made.name}” counts from now on.")
            return redirect("console:budgets")
    return render(request, "console/budgets.html", {**_context(request), "form": form}, status=status)


@require_POST
@member_page(Permission.LIMITS_WRITE)
def change_budget(request: MemberRequest, budget: str) -> HttpResponse:
    """Another limit, or, with `delete`, none any more."""
    organization_id, budget_id = request.membership.organization_id, _budget_id(budget)
    found = selectors.budget(organization_id=organization_id, budget_id=budget_id)
    if "delete" in request.POST:
        services.delete_budget(organization_id=organization_id, budget_id=budget_id)
        messages.success(request, f"The budget “{found.name}” is gone: nothing is refused for it any more.")
        return redirect("console:budgets")
    try:
        amount = parse_usd(request.POST.get("limit", ""))
    except MoneyFormatError as error:
        raise InvalidInputError(f"limit: {error}", field="limit") from error
    services.update_budget(organization_id=organization_id, budget_id=budget_id, limit_nano=amount)
    messages.success(request, f"The budget “{found.name}” is {format_usd(amount)} now.")
    return redirect("console:budgets")


def _context(request: MemberRequest) -> dict[str, Any]:
    organization_id, now = request.membership.organization_id, timezone.now()
    rows = selectors.budgets(organization_id=organization_id).order_by("-id")[:SHOWN]
    return {
        "now": now,
        "zone": request.membership.timezone,
        "budgets": [
            (standing, _tone(standing), _window(standing)) for standing in selectors.standings(rows, now)
        ],
        "quotas": _quotas(organization_id),
        "form": BudgetForm(projects=tenants.projects(organization_id=organization_id)),
        "may_change": may(request.membership.role, Permission.LIMITS_WRITE),
    }


def _tone(standing: Standing) -> str:
    if standing.percent >= 100:
        return "bad" if standing.budget.hard else "warn"
    return "warn" if standing.percent >= 80 else "ok"


def _window(standing: Standing) -> str:
    budget = standing.budget
    if budget.period == Period.ROLLING:
        hours = budget.rolling_hours or 0
        return f"last {hours // 24} days" if hours % 24 == 0 and hours > 24 else f"last {hours} hours"
    return "in all" if budget.period == Period.TOTAL else f"this {budget.period}"


def _quotas(organization_id: UUID) -> list[QuotaRow]:
    now, found = timezone.now(), []
    for each in quotas.limits(organization_id=organization_id):
        if each.limit is None:
            continue
        used = quotas.own_use(organization_id=organization_id, kind=each.kind, now=now)
        is_money = each.kind is QuotaKind.SPEND_RATE
        used_words, limit_words = (format_usd(Nano(n)) if is_money else f"{n:,}" for n in (used, each.limit))
        percent = min(100 * used // each.limit, 100) if each.limit else 100
        is_ceiling = each.own is None or (each.ceiling is not None and each.ceiling < each.own)
        found.append(QuotaRow(_WORDS[each.kind], used_words, limit_words, percent, is_ceiling))
    return found


def _budget_id(text: str) -> UUID:
    try:
        return ids.from_text(ids.Prefix.BUDGET, text)
    except ids.InvalidIdError as error:
        raise NotFoundError("no such budget", field="budget") from error
