"""What serves a tenant: its replicas, the machines they live on, and the autoscaler's decisions about them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import redis
from ninja import Field, Query, Router, Schema

from autoscaler import explaining, selectors
from autoscaler.cell.readings import ReplicaReading
from autoscaler.house import build_cell
from autoscaler.longoperations import DRAIN_MACHINE, DRAIN_REPLICA, MAX_S
from autoscaler.models import LIVE_PHASES, Decision, MachineState, Replica, ReplicaPhase
from controlplane import ids
from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, matching, page
from controlplane.api.resources.operations import OperationOut, operation_out
from controlplane.api.values import DecisionId, DeploymentId, MachineId, ReplicaId
from controlplane.errors import ConflictError, NotPermittedError
from controlplane.operations import services as operations
from controlplane.tenants.rights import Permission

router = Router(tags=["fleet"])
# Machines and offers that were weighed are the house's, and others' replicas live on them.
_OWN_QUESTIONS = ("replicas", "retire")


class ReplicaOut(Schema):
    """One engine process that serves one deployment."""

    id: ReplicaId
    deployment_id: DeploymentId
    machine_id: MachineId
    phase: ReplicaPhase
    reason_code: str = Field(description="Why it failed; empty otherwise")
    reason_message: str
    generation: int = Field(description="The deployment's generation that it was started for")
    slots: int = Field(description="Requests its engine batches")
    n_running: int | None = Field(description="Requests it runs now; null where that cannot be asked")
    created_at: datetime
    ready_at: datetime | None
    stopped_at: datetime | None


class ReplicaQuery(PageQuery):
    """Which replicas."""

    deployment_id: DeploymentId | None = None
    phase: ReplicaPhase | None = None
    live: bool | None = Field(
        default=None, description="true: those that have not ended; false: those that have"
    )


class MachineOut(Schema):
    """A machine that some of your replicas live on. Of others on it nothing is told."""

    id: MachineId
    provider: str
    cell: str
    state: MachineState
    offering: str = Field(description="What it was bought as; empty for a machine of the house")
    n_cpus: int | None
    memory_bytes: int | None
    n_gpus: int
    n_replicas: int = Field(description="Live replicas of yours on it")
    created_at: datetime
    ready_at: datetime | None
    ends_at: datetime | None = Field(description="It is taken away or given up then, at the latest")
    reason: str = Field(description="Why it leaves; empty while it does not")


class Machines(Schema):
    """All of them, newest first."""

    data: list[MachineOut]


class AlternativeOut(Schema):
    """One thing that a decision could have chosen."""

    question: str = Field(description="replicas: how many there should be; retire: which one goes")
    subject: str = Field(description="The number or the replica it is about")
    chosen: bool
    why: str


class DecisionOut(Schema):
    """What the autoscaler decided for one deployment at one moment."""

    id: DecisionId
    deployment_id: DeploymentId
    at: datetime
    reasons: list[str] = Field(description="One sentence each, with numbers")
    commands: list[dict[str, Any]] = Field(description="What it ordered; none: it only noted a change")
    n_queued: int | None = Field(description="Requests that waited; null where that could not be asked")
    n_replicas: int = Field(description="Live replicas it saw")
    policy_version: str = Field(description="Digest of the policy that decided; empty before it was kept")
    alternatives: list[AlternativeOut] = Field(description="What it weighed, what it chose among")


class ReplayOut(Schema):
    """A decision made again: its stored inputs given to the policy of now."""

    decision_id: DecisionId
    same: bool
    differences: list[str] = Field(description="Of orders, reasons and memory those that come out otherwise")
    policy_version_then: str
    policy_version_now: str
    words: str


class DecisionQuery(PageQuery):
    """Which decisions."""

    deployment_id: DeploymentId | None = None


def machine_out(row: selectors.TenantMachine) -> MachineOut:
    return MachineOut(
        id=row.id,
        provider=row.provider,
        cell=row.cell,
        state=MachineState(row.state),
        offering=row.offering,
        n_cpus=row.n_cpus,
        memory_bytes=row.memory_bytes,
        n_gpus=row.n_gpus,
        n_replicas=row.n_replicas,
        created_at=row.created_at,
        ready_at=row.ready_at,
        ends_at=row.ends_at,
        reason=row.reason,
    )


def decision_out(row: Decision) -> DecisionOut:
    """The observation names machines of the whole pool: only what is the tenant's own is told."""
    seen = row.observation
    return DecisionOut(
        id=row.id,
        deployment_id=row.deployment_id,
        at=row.at,
        reasons=[str(reason) for reason in row.reasons],
        commands=row.commands,
        n_queued=seen.get("n_queued"),
        n_replicas=len(seen.get("replicas") or ()),
        policy_version=row.policy_version,
        alternatives=[
            AlternativeOut(**{name: each[name] for name in AlternativeOut.model_fields})
            for each in row.alternatives
            if each.get("question") in _OWN_QUESTIONS
        ],
    )


@operation(router, "GET", "/replicas", Permission.DEPLOYMENTS_READ, Page[ReplicaOut])
def list_replicas(request: ApiRequest, query: Query[ReplicaQuery]) -> Page[ReplicaOut]:
    """Replicas, newest first, those that ended included."""
    rows = Replica.objects.filter(organization_id=request.caller.organization_id)
    rows = matching(rows, deployment_id=query.deployment_id, phase=query.phase)
    if query.live is not None:
        rows = rows.filter(phase__in=LIVE_PHASES) if query.live else rows.exclude(phase__in=LIVE_PHASES)
    found = page(rows, query, lambda row: row)
    readings = _read(found.data)
    shown = [_replica_out(row, readings) for row in found.data]
    return Page[ReplicaOut](data=shown, next_cursor=found.next_cursor)


@operation(router, "GET", "/replicas/{replica_id}", Permission.DEPLOYMENTS_READ, ReplicaOut)
def get_replica(request: ApiRequest, replica_id: ReplicaId) -> ReplicaOut:
    """One replica."""
    row = _replica(request, replica_id)
    return _replica_out(row, _read([row]))


@operation(
    router, "POST", "/replicas/{replica_id}/drain", Permission.DEPLOYMENTS_WRITE, OperationOut, status=202
)
def drain_replica(request: ApiRequest, replica_id: ReplicaId) -> OperationOut:
    """Let a replica finish what it runs, then end it. The autoscaler starts another one if load wants it."""
    row = _replica(request, replica_id)
    if row.phase not in LIVE_PHASES:
        raise ConflictError("this replica has ended", field="replica_id")
    return _begin(request, DRAIN_REPLICA, str(row))


@operation(router, "GET", "/machines", Permission.DEPLOYMENTS_READ, Machines)
def list_machines(request: ApiRequest) -> Machines:
    """The machines that your replicas live on, newest first, at most 1,000."""
    return Machines(data=[machine_out(row) for row in selectors.machines()])


@operation(router, "GET", "/machines/{machine_id}", Permission.DEPLOYMENTS_READ, MachineOut)
def get_machine(request: ApiRequest, machine_id: MachineId) -> MachineOut:
    """One machine that your replicas live on."""
    return machine_out(selectors.machine(machine_id=machine_id))


@operation(
    router, "POST", "/machines/{machine_id}/drain", Permission.DEPLOYMENTS_WRITE, OperationOut, status=202
)
def drain_machine(request: ApiRequest, machine_id: MachineId) -> OperationOut:
    """Move everything off a machine and give it back. Only for a machine that serves nobody but you."""
    selectors.machine(machine_id=machine_id)
    if not selectors.is_mine_alone(machine_id=machine_id):
        raise NotPermittedError(
            "this machine is not yours to drain: drain your replicas on it", field="machine_id"
        )
    return _begin(request, DRAIN_MACHINE, ids.to_text(ids.Prefix.MACHINE, machine_id))


@operation(router, "GET", "/decisions", Permission.DEPLOYMENTS_READ, Page[DecisionOut])
def list_decisions(request: ApiRequest, query: Query[DecisionQuery]) -> Page[DecisionOut]:
    """Decisions of the autoscaler, newest first."""
    rows = Decision.objects.filter(organization_id=request.caller.organization_id)
    rows = matching(rows, deployment_id=query.deployment_id)
    return page(rows, query, decision_out)


@operation(router, "GET", "/decisions/{decision_id}", Permission.DEPLOYMENTS_READ, DecisionOut)
def get_decision(request: ApiRequest, decision_id: DecisionId) -> DecisionOut:
    """One decision of the autoscaler: what it saw, ordered and why."""
    organization_id = request.caller.organization_id
    return decision_out(selectors.decision(organization_id=organization_id, decision_id=decision_id))


@operation(router, "GET", "/decisions/{decision_id}/replay", Permission.DEPLOYMENTS_READ, ReplayOut)
def replay_decision(request: ApiRequest, decision_id: DecisionId) -> ReplayOut:
    """The same decision made again on its stored inputs: whether the policy of now gives the same result."""
    row = selectors.decision(organization_id=request.caller.organization_id, decision_id=decision_id)
    found = explaining.replay(row)
    return ReplayOut(
        decision_id=row.id,
        same=found.same,
        differences=list(found.differences),
        policy_version_then=found.policy_then,
        policy_version_now=found.policy_now,
        words=found.words,
    )


def _begin(request: ApiRequest, kind: str, subject: str) -> OperationOut:
    begun = operations.begin(
        organization_id=request.caller.organization_id, kind=kind, subject=subject, max_s=MAX_S[kind]
    )
    request.operation_id = begun.id
    return operation_out(begun)


def _replica(request: ApiRequest, replica_id: UUID) -> Replica:
    return selectors.replica(organization_id=request.caller.organization_id, replica_id=replica_id)


def _read(rows: Sequence[Replica]) -> dict[str, ReplicaReading] | None:
    live = [row for row in rows if row.phase in LIVE_PHASES]
    try:
        return build_cell().read_replicas(
            [(row.id.hex, row.machine_id.hex, row.deployment_id.hex) for row in live]
        )
    except redis.RedisError:
        return None


def _replica_out(row: Replica, readings: dict[str, ReplicaReading] | None) -> ReplicaOut:
    reading = None if readings is None else readings.get(row.id.hex)
    n_running = reading.used if reading else None if row.phase in LIVE_PHASES else 0
    return ReplicaOut(
        id=row.id,
        deployment_id=row.deployment_id,
        machine_id=row.machine_id,
        phase=ReplicaPhase(row.phase),
        reason_code=row.reason_code,
        reason_message=row.reason_message,
        generation=row.generation,
        slots=row.slots,
        n_running=n_running,
        created_at=row.created_at,
        ready_at=row.ready_at,
        stopped_at=row.stopped_at,
    )
