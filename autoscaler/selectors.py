"""Reads for API and console, scoped by organization: replicas with their phase, their machines, recent decisions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from django.db import connection
from django.db.models import QuerySet
from django.utils import timezone

from autoscaler.config import AutoscalerConfig
from autoscaler.market import STALE_AFTER
from autoscaler.models import LIVE_PHASES, Decision, Replica
from autoscaler.policy.sizes import places
from controlplane.errors import NotFoundError


@dataclass(frozen=True, slots=True)
class TenantMachine:
    """A machine as a tenant whose replicas live on it may see it. `n_replicas` are its own; `reason`: why it leaves."""

    id: UUID
    provider: str
    cell: str
    state: str
    offering: str
    n_cpus: int | None
    memory_bytes: int | None
    n_gpus: int
    created_at: datetime
    ready_at: datetime | None
    ends_at: datetime | None
    n_replicas: int
    reason: str


# Two functions, since the version before knows the columns of the first by their number.
_MY_MACHINES: Final = "SELECT * FROM corral_my_machines() JOIN corral_my_machines_reasons() USING (id)"


def machines(limit: int = 1000) -> list[TenantMachine]:
    """Machines that hold live replicas of the tenant of this transaction, newest first; of nobody without one."""
    with connection.cursor() as cursor:
        cursor.execute(f"{_MY_MACHINES} ORDER BY id DESC LIMIT %s", [limit])
        return [TenantMachine(*row) for row in cursor.fetchall()]


def machine(*, machine_id: UUID) -> TenantMachine:
    """One of them. Raises NotFoundError, also for one that holds others' replicas only."""
    with connection.cursor() as cursor:
        cursor.execute(f"{_MY_MACHINES} WHERE id = %s", [machine_id])
        row = cursor.fetchone()
    if row is None:
        raise NotFoundError("no such machine, or none of your replicas lives on it", field="machine")
    return TenantMachine(*row)


def is_mine_alone(*, machine_id: UUID) -> bool:
    """Whether every live replica on it belongs to the tenant of this transaction."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT corral_machine_is_mine_alone(%s)", [machine_id])
        return bool(cursor.fetchone()[0])


@dataclass(frozen=True, slots=True)
class MachineKind:
    """A kind of machine that may be bought: its price, and how many replicas share it."""

    price_nano_per_h: int
    n_places: int


def next_machine(config: AutoscalerConfig, cell: str) -> MachineKind:
    """One more of the pool's: on-demand rather than spot, the one whose replicas cost least each; as configured where
    nothing is sold that holds one."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT * FROM corral_machine_kinds(%s, %s, %s)",
            [cell, config.provider, timezone.now() - STALE_AFTER],
        )
        rows = cursor.fetchall()
    found = [
        (is_spot, price / n, n, price)
        for is_spot, gpu, n_gpus, price in rows
        if (n := places(config.need, gpu, n_gpus, config.replicas_per_machine))
    ]
    if not found:
        return MachineKind(config.machine_nano_per_h, config.replicas_per_machine)
    _, _, n_places, price_nano_per_h = min(found)
    return MachineKind(price_nano_per_h, n_places)


def replica(*, organization_id: UUID, replica_id: UUID) -> Replica:
    """One replica, live or ended. Raises NotFoundError, also for another tenant's."""
    found = Replica.objects.filter(organization_id=organization_id, id=replica_id).first()
    if found is None:
        raise NotFoundError("no such replica", field="replica")
    return found


def replicas(*, organization_id: UUID, deployment_id: UUID | None = None, limit: int = 100) -> list[Replica]:
    """Live replicas first, then those that ended, newest first. Machines are the house's and not shown."""
    found = Replica.objects.filter(organization_id=organization_id)
    if deployment_id is not None:
        found = found.filter(deployment_id=deployment_id)
    live = list(found.filter(phase__in=LIVE_PHASES).order_by("-created_at", "-id")[:limit])
    ended = found.exclude(phase__in=LIVE_PHASES).order_by("-created_at", "-id")
    return live + list(ended[: limit - len(live)])


def live_replicas(*, organization_id: UUID) -> QuerySet[Replica]:
    """Those that hold a place on a machine, oldest first."""
    return Replica.objects.filter(organization_id=organization_id, phase__in=LIVE_PHASES).order_by("id")


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
