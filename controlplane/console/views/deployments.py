"""The list of deployments, and one of them in detail."""

from __future__ import annotations

from typing import Any, Final

from django.conf import settings
from django.http import HttpResponse
from django.shortcuts import render
from django.utils import timezone
from django.views.decorators.http import require_GET

from controlplane import ids
from controlplane.adapters import selectors as adapters
from controlplane.adapters.models import AdapterState
from controlplane.console import charts, usage
from controlplane.console.access import MemberRequest, member_page
from controlplane.console.decisions import told
from controlplane.console.fleet import decisions, fleet_of
from controlplane.console.pages import RETRY_AFTER_S
from controlplane.errors import NotFoundError

N_DECISIONS: Final = 8
N_DECISIONS_READ: Final = 200  # equal ones in a row are shown as one
N_RECENT: Final = 8
N_ADAPTERS: Final = 128  # that a deployment may have, and refused ones as far as they fit


@require_GET
@member_page()
def deployment_list(request: MemberRequest) -> HttpResponse:
    now = timezone.now()
    fleet = fleet_of(organization_id=request.membership.organization_id, now=now)
    return _render(request, "console/deployments.html", {"fleet": fleet, "now": now})


@require_GET
@member_page()
def deployment_detail(request: MemberRequest, deployment: str) -> HttpResponse:
    return _render(request, "console/deployment.html", _context(request, deployment))


@require_GET
@member_page()
def deployment_live(request: MemberRequest, deployment: str) -> HttpResponse:
    """The part of the page that changes, for polling."""
    return _render(request, "console/_deployment_live.html", _context(request, deployment))


def _render(request: MemberRequest, template: str, context: dict[str, Any]) -> HttpResponse:
    available = context["fleet"].live.available
    response = render(request, template, context, status=200 if available else 503)
    if not available:
        response["Retry-After"] = str(RETRY_AFTER_S)
    return response


def _context(request: MemberRequest, text: str) -> dict[str, Any]:
    try:
        deployment_id = ids.from_text(ids.Prefix.DEPLOYMENT, text)
    except ids.InvalidIdError as error:
        raise NotFoundError("no such deployment", field="deployment") from error
    organization_id, now = request.membership.organization_id, timezone.now()
    fleet = fleet_of(organization_id=organization_id, now=now, deployment_id=deployment_id)
    traffic = usage.traffic(organization_id=organization_id, now=now, deployment_id=deployment_id)
    deployment = fleet.deployments[0].deployment
    max_loras, max_rank = adapters.lora_room(deployment)
    rows = adapters.adapters(organization_id=organization_id).filter(deployment_id=deployment_id)
    held = [
        {"row": row, "why_not": adapters.why_not_served(row)}
        for row in rows.exclude(state=AdapterState.RETIRED).order_by("name", "id")[:N_ADAPTERS]
    ]
    return {
        "adapters": held,
        "max_loras": max_loras,
        "max_lora_rank": max_rank,
        "now": now,
        "fleet": fleet,
        "row": fleet.deployments[0],
        "deployment": deployment,
        "traffic": traffic,
        "tokens_per_s": max(traffic.tokens_per_s, fleet.live.tokens_per_s),
        "requests_spark": charts.spark(traffic.requests),
        "tokens_spark": charts.spark(traffic.tokens),
        "ttft_spark": charts.spark(traffic.ttft_bins_ms),
        "decisions": told(
            decisions(organization_id=organization_id, deployment_id=deployment_id, limit=N_DECISIONS_READ),
            limit=N_DECISIONS,
        ),
        "recent": usage.recent(organization_id=organization_id, deployment_id=deployment_id, limit=N_RECENT),
        "base_url": f"{settings.ENV.gateway_url.rstrip('/')}/v1",
    }
