"""Rows follow what agents report: phases of replicas, machines that answer.

Called by the recorder (watch/recorder.py) and nothing else. Every change is compare-and-set on the phase, so
a report that comes twice, late or out of order changes nothing. A machine is believed about its own replicas
only.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

import structlog
from django.db import transaction
from django.db.models import Subquery
from django.utils import timezone

from autoscaler import timings
from autoscaler.act import drain, end
from autoscaler.cell import Cell
from autoscaler.models import LIVE_PHASES, Machine, MachineState, Replica, ReplicaPhase
from autoscaler.poolmodels import TAKEN_AWAY
from controlplane.deployments.models import Deployment
from workers.contract import MACHINE_STOPPED, ReplicaStatus
from workers.contract import ReplicaPhase as Reported

log = structlog.get_logger("corral.autoscaler")

MAX_NOTICE_MS = 24 * 3600 * 1000


def replica_reported(machine_id: UUID, status: ReplicaStatus, cell: Cell) -> UUID | None:
    """Bring the row up to the report; the deployment to tick when something changed."""
    replica = (
        Replica.objects.select_related("machine")
        .filter(id=UUID(hex=status.replica), machine_id=machine_id)
        .first()
    )
    if replica is None:
        return None
    if status.phase in (Reported.LOADING, Reported.READY) and replica.machine.state in (
        MachineState.ENROLLED,
        MachineState.RESUMING,
    ):
        machine_answers(machine_id)  # it starts replicas, so it is ready, whatever its next beat says
        replica.machine.refresh_from_db()
    if status.phase is Reported.LOADING:
        changed = _advance(replica, (ReplicaPhase.STARTING,), ReplicaPhase.LOADING)
    elif status.phase is Reported.READY:
        changed = _ready(replica, status)
    elif status.phase is Reported.DRAINING:
        changed = drain(replica.id, status.message or "its machine asked for it", cell)
    elif status.phase is Reported.FAILED:
        message = status.message or "the agent gave no reason"
        changed = end(replica.id, ReplicaPhase.FAILED, status.code or "unknown", message, cell)
    elif status.phase is Reported.STOPPED:
        changed = _stopped(replica, status, cell)
    else:
        changed = False
    return replica.deployment_id if changed else None


def replica_lost(replica_id: UUID, code: str, message: str, cell: Cell) -> UUID | None:
    """The watcher gave it up; the deployment to tick when the row did not know yet."""
    replica = Replica.objects.filter(id=replica_id).first()
    if replica is None:
        return None
    if replica.phase in (ReplicaPhase.DRAINING, ReplicaPhase.SLEEPING):
        changed = end(replica_id, ReplicaPhase.STOPPED, code, message, cell)
    else:
        changed = end(replica_id, ReplicaPhase.FAILED, code, message, cell)
    return replica.deployment_id if changed else None


def machine_leaves(machine_id: UUID, ends_in_ms: int, reason: str = TAKEN_AWAY) -> list[UUID]:
    """Its provider takes it away, or it is replaced: nothing new is placed on it, and its place in the pool is free.

    Answers the deployments that have replicas on it. A machine can only say so of itself.
    """
    now = timezone.now()
    ends_at = now + timedelta(milliseconds=min(max(ends_in_ms, 0), MAX_NOTICE_MS))
    changed = Machine.objects.filter(
        id=machine_id, state__in=(MachineState.ENROLLED, MachineState.READY)
    ).update(state=MachineState.DRAINING, ends_at=ends_at, pool_slot=None, reason=reason)
    if not changed:  # a recommendation to leave has become a notice: the end is nearer than was said
        changed = Machine.objects.filter(
            id=machine_id, state=MachineState.DRAINING, ends_at__gt=ends_at + timedelta(seconds=1)
        ).update(ends_at=ends_at)
    if not changed:
        return []
    log.warning("machine.leaves", machine=machine_id.hex, ends_in_ms=ends_in_ms)
    live = Replica.objects.filter(machine_id=machine_id, phase__in=LIVE_PHASES)
    return list(live.order_by("deployment_id").values_list("deployment_id", flat=True).distinct())


def machine_answers(machine_id: UUID) -> list[UUID]:
    """Its agent beats: the machine is ready. Answers the deployments that may wait for it."""
    now = timezone.now()
    back = Machine.objects.filter(id=machine_id, state=MachineState.RESUMING).first()
    if back is not None:
        timings.note_resumed(back, now)
    changed = Machine.objects.filter(
        id=machine_id, state__in=(MachineState.ENROLLED, MachineState.RESUMING)
    ).update(state=MachineState.READY, ready_at=now)
    if not changed:
        return []
    log.info("machine.ready", machine=machine_id.hex)
    if back is None:
        timings.note_machine(machine_id)
    live = Deployment.objects.filter(
        deleted_at=None, cell=Subquery(Machine.objects.filter(id=machine_id).values("cell"))
    )
    return list(live.values_list("id", flat=True))


def _advance(replica: Replica, before: tuple[ReplicaPhase, ...], phase: ReplicaPhase) -> bool:
    changed = Replica.objects.filter(id=replica.id, phase__in=before).update(
        phase=phase, phase_at=timezone.now()
    )
    return bool(changed)


def _ready(replica: Replica, status: ReplicaStatus) -> bool:
    now = timezone.now()
    with transaction.atomic():
        if replica.phase == ReplicaPhase.WAKING:
            return _woken(replica, now)
        changed = Replica.objects.filter(
            id=replica.id, phase__in=(ReplicaPhase.STARTING, ReplicaPhase.LOADING)
        ).update(phase=ReplicaPhase.READY, phase_at=now, ready_at=now)
        if changed:
            replica.ready_at = now
            timings.note_replica(replica, status.stages_ms)
    if changed:
        log.info("replica.ready", replica=replica.id.hex, stages_ms=status.stages_ms)
    return bool(changed)


def _woken(replica: Replica, now: datetime) -> bool:
    """`ready_at` stays: since then it is known to be good."""
    changed = Replica.objects.filter(id=replica.id, phase=ReplicaPhase.WAKING).update(
        phase=ReplicaPhase.READY, phase_at=now, reason_message=""
    )
    if changed:
        elapsed_ms = (now - replica.phase_at).total_seconds() * 1000
        timings.note_woken(replica, elapsed_ms)
        log.info("replica.woke", replica=replica.id.hex, elapsed_ms=round(elapsed_ms))
    return bool(changed)


def _stopped(replica: Replica, status: ReplicaStatus, cell: Cell) -> bool:
    """A stop that nobody ordered counts as a failure, or a replica that always stops would start for ever.

    A machine that was stopped, with all that it ran, is none: `down` and `up` may follow each other at will.
    """
    if replica.phase == ReplicaPhase.DRAINING or status.code == MACHINE_STOPPED:
        return end(replica.id, ReplicaPhase.STOPPED, status.code, status.message or "drained", cell)
    message = status.message or "stopped from outside: somebody ended the process"
    return end(replica.id, ReplicaPhase.FAILED, status.code or "stopped", message, cell)
