"""Deployments of an organization with their replicas: what rows say, and how they live this second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from django.db.models import Q

from autoscaler import selectors as machines
from autoscaler.models import LIVE_PHASES, Decision, Replica
from controlplane.console import live
from controlplane.deployments import selectors
from controlplane.deployments.models import Deployment

# A replica that ended stays in sight for so long: why it failed is what one looks for.
ENDED_SHOWN: Final = timedelta(minutes=10)
MAX_REPLICAS: Final = 200


@dataclass(frozen=True, slots=True)
class ReplicaRow:
    """A replica with its live figures (None when Redis knows nothing of it)."""

    replica: Replica
    deployment_name: str
    live: live.ReplicaLive | None
    leaves_because: str = ""  # its machine leaves

    @property
    def is_live(self) -> bool:
        return self.replica.phase in LIVE_PHASES

    @property
    def is_held_back(self) -> bool:
        """Given fewer slots than its engine could run, to keep its promise on latency."""
        return self.is_live and self.live is not None and 0 < self.live.slots < self.replica.slots


@dataclass(frozen=True, slots=True)
class DeploymentRow:
    """A deployment with its replicas and queue."""

    deployment: Deployment
    replicas: tuple[ReplicaRow, ...]
    n_queued: int
    stage: live.Stage | None

    @property
    def n_ready(self) -> int:
        return sum(row.replica.phase == "ready" for row in self.replicas)

    @property
    def n_live(self) -> int:
        return sum(row.is_live for row in self.replicas)

    @property
    def used(self) -> int:
        return sum(row.live.used for row in self.replicas if row.live)

    @property
    def slots(self) -> int:
        return sum(row.live.slots for row in self.replicas if row.live and row.replica.phase == "ready")

    @property
    def tokens_per_s(self) -> float:
        return sum(row.live.tokens_per_s or 0.0 for row in self.replicas if row.live)


@dataclass(frozen=True, slots=True)
class Fleet:
    """All deployments asked for, by name."""

    deployments: tuple[DeploymentRow, ...]
    live: live.Live

    @property
    def replicas(self) -> tuple[ReplicaRow, ...]:
        return tuple(replica for row in self.deployments for replica in row.replicas)

    @property
    def n_ready(self) -> int:
        return sum(row.n_ready for row in self.deployments)


def fleet_of(*, organization_id: UUID, now: datetime, deployment_id: UUID | None = None) -> Fleet:
    """Every live deployment of the organization, or only one. Raises NotFoundError for one it does not have."""
    deployments = (
        selectors.deployments(organization_id=organization_id)
        if deployment_id is None
        else [selectors.deployment(organization_id=organization_id, deployment_id=deployment_id)]
    )
    replicas = _replicas(organization_id, [deployment.id for deployment in deployments], now)
    figures = live.read(
        [deployment.id for deployment in deployments],
        [(replica.id, replica.machine_id) for replica in replicas if replica.phase in LIVE_PHASES],
    )
    leaving = {machine.id: machine.reason for machine in machines.machines()} if replicas else {}
    return Fleet(tuple(_row(deployment, replicas, figures, leaving) for deployment in deployments), figures)


def decisions(*, organization_id: UUID, deployment_id: UUID, limit: int) -> list[Decision]:
    """The last decisions about a deployment, newest first."""
    found = Decision.objects.filter(organization_id=organization_id, deployment_id=deployment_id)
    return list(found.only("id", "at", "commands", "reasons").order_by("-at")[:limit])


def _replicas(organization_id: UUID, deployment_ids: Sequence[UUID], now: datetime) -> list[Replica]:
    shown = Q(phase__in=LIVE_PHASES) | Q(stopped_at__gt=now - ENDED_SHOWN)
    found = Replica.objects.filter(shown, organization_id=organization_id, deployment_id__in=deployment_ids)
    return list(found.order_by("-created_at")[:MAX_REPLICAS])


def _row(
    deployment: Deployment, replicas: Sequence[Replica], figures: live.Live, leaving: Mapping[UUID, str]
) -> DeploymentRow:
    return DeploymentRow(
        deployment=deployment,
        replicas=tuple(
            ReplicaRow(
                replica,
                deployment.name,
                figures.replicas.get(replica.id),
                leaving.get(replica.machine_id, "") if replica.phase in LIVE_PHASES else "",
            )
            for replica in replicas
            if replica.deployment_id == deployment.id
        ),
        n_queued=figures.queued.get(deployment.id, 0),
        stage=figures.stages.get(deployment.id),
    )
