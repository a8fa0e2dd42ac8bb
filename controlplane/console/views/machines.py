"""Machines that the organization's replicas live on: what they are, which of them leave and why, what lives there."""

from __future__ import annotations

from collections import defaultdict
from typing import Final
from uuid import UUID

from django.http import HttpResponse
from django.shortcuts import render
from django.utils import timezone
from django.views.decorators.http import require_GET

from autoscaler import selectors
from autoscaler.models import Replica
from controlplane.console.access import MemberRequest, member_page
from controlplane.deployments import selectors as deployments
from controlplane.tenants.rights import Permission

SHOWN: Final = 200


@require_GET
@member_page(Permission.DEPLOYMENTS_READ)
def machine_list(request: MemberRequest) -> HttpResponse:
    organization_id = request.membership.organization_id
    rows = selectors.machines(SHOWN + 1)
    names = {row.id: row.name for row in deployments.deployments(organization_id=organization_id)}
    living: dict[UUID, list[Replica]] = defaultdict(list)
    for replica in selectors.live_replicas(organization_id=organization_id):
        living[replica.machine_id].append(replica)
    context = {
        "now": timezone.now(),
        "machines": [
            (row, [(replica, names.get(replica.deployment_id, "")) for replica in living[row.id]])
            for row in rows[:SHOWN]
        ],
        "is_cut": len(rows) > SHOWN,
    }
    return render(request, "console/machines.html", context)
