"""Reads for API and console, scoped by organization: replicas with their phase, and recent decisions."""

from __future__ import annotations

from uuid import UUID

from autoscaler.models import LIVE_PHASES, Decision, Replica
from controlplane.errors import NotFoundError


def replicas(*, organization_id: UUID, deployment_id: UUID | None = None, limit: int = 100) -> list[Replica]:
    """Live replicas first, then those that ended, newest first. Machines are the house's and not shown."""
    found = Replica.objects.filter(organization_id=organization_id)
    if deployment_id is not None:
        found = found.filter(deployment_id=deployment_id)
    live = list(found.filter(phase__in=LIVE_PHASES).order_by("-created_at", "-id")[:limit])
    ended = found.exclude(phase__in=LIVE_PHASES).order_by("-created_at", "-id")
    return live + list(ended[: limit - len(live)])


def decisions(*, organization_id: UUID, deployment_id: UUID, limit: int = 50) -> list[Decision]:
    """The newest decisions about a deployment."""
    found = Decision.objects.filter(organization_id=organization_id, deployment_id=deployment_id)
    return list(found.order_by("-at", "-id")[:limit])


def decision(*, organization_id: UUID, decision_id: UUID) -> Decision:
    """One decision, to be shown or replayed. Raises NotFoundError, also for another tenant's."""
    found = Decision.objects.filter(organization_id=organization_id, id=decision_id).first()
    if found is None:
        raise NotFoundError("no such decision", field="decision")
    return found
