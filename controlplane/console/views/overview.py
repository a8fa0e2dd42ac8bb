"""The first page: what runs, how fast, and what was asked last. Refreshes itself every two seconds."""

from __future__ import annotations

from typing import Any, Final

from django.http import HttpResponse
from django.shortcuts import render
from django.utils import timezone
from django.views.decorators.http import require_GET

from controlplane.console import charts, usage
from controlplane.console.access import MemberRequest, member_page
from controlplane.console.fleet import fleet_of
from controlplane.console.pages import RETRY_AFTER_S

N_RECENT: Final = 12


@require_GET
@member_page()
def overview(request: MemberRequest) -> HttpResponse:
    return _render(request, "console/overview.html")


@require_GET
@member_page()
def overview_live(request: MemberRequest) -> HttpResponse:
    """The part of the page that changes, for polling."""
    return _render(request, "console/_overview_live.html")


def _render(request: MemberRequest, template: str) -> HttpResponse:
    context = _context(request)
    live = context["fleet"].live
    response = render(request, template, context, status=200 if live.available else 503)
    if not live.available:
        response["Retry-After"] = str(RETRY_AFTER_S)
    return response


def _context(request: MemberRequest) -> dict[str, Any]:
    now = timezone.now()
    organization_id = request.membership.organization_id
    traffic = usage.traffic(organization_id=organization_id, now=now)
    fleet = fleet_of(organization_id=organization_id, now=now)
    return {
        "now": now,
        "fleet": fleet,
        "traffic": traffic,
        "tokens_per_s": max(traffic.tokens_per_s, fleet.live.tokens_per_s),
        "requests_spark": charts.spark(traffic.requests),
        "tokens_spark": charts.spark(traffic.tokens),
        "ttft_spark": charts.spark(traffic.ttft_bins_ms),
        "spent_today_nano": usage.spent_today_nano(
            organization_id=organization_id, now=now, zone=request.membership.timezone
        ),
        "recent": usage.recent(organization_id=organization_id, limit=N_RECENT),
    }
