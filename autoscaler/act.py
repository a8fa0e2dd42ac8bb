"""Carries out commands: each checked against fresh rows, rows written first, then provider or Redis told.

Called by tick.py (a deployment's commands) and reconcile.py (the pool's). Every step may be repeated: rows
carry the command's id, phases change by compare-and-set, and what Redis misses is restored from the rows.
"""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import redis
import structlog
from django.db import IntegrityError, transaction
from django.utils import timezone

from autoscaler import launch, stopping
from autoscaler.cell import Cell
from autoscaler.config import AutoscalerConfig
from autoscaler.models import AWAKE_PHASES, LIVE_PHASES, Machine, MachineState, Replica, ReplicaPhase
from autoscaler.observe import capacity
from autoscaler.siblings import siblings_of
from autoscaler.specs import candidate, desired_spec, engine_digest, replica_spec, slots, slots_of
from autoscaler.types import (
    Command,
    DrainReplica,
    LaunchMachine,
    SleepReplica,
    StartMachine,
    StartReplica,
    StopReplica,
    TerminateMachine,
    WakeReplica,
)
from controlplane import ids
from controlplane.deployments.models import Deployment
from infra.providers.base import Provider

log = structlog.get_logger("corral.autoscaler")

_MAX_REASON = 500
# What an agent needs at most from the end of the grace to the process's end, and some to spare.
HAND_BACK_S = 8.0
_TAKES_REPLICAS = (MachineState.PENDING, MachineState.ENROLLED, MachineState.RESUMING, MachineState.READY)


def act(
    command: Command, deployment: Deployment | None, provider: Provider, config: AutoscalerConfig, cell: Cell
) -> bool:
    """Carry out one command; False if fresh rows speak against it. Raises what the database raises."""
    match command:
        case LaunchMachine(command_id, n_replicas):
            keeper, owner = stopping.Keeper(config, provider, cell), _owner(deployment)
            machine = launch.launch(
                UUID(command_id),
                provider,
                config,
                cell,
                deployment,
                n_replicas=n_replicas,
                from_reserve=lambda: stopping.resume_one(keeper, owner),
            )
            return machine is not None
        case StartMachine(_, machine_id):
            return stopping.resume(
                UUID(machine_id), stopping.Keeper(config, provider, cell), _owner(deployment)
            )
        case StartReplica():
            return deployment is not None and _start(command, deployment, config, cell)
        case DrainReplica(_, replica_id, reason):
            return drain(UUID(replica_id), reason, cell)
        case StopReplica(_, replica_id, reason, failure_code):
            phase = ReplicaPhase.FAILED if failure_code else ReplicaPhase.STOPPED
            return end(UUID(replica_id), phase, failure_code, reason, cell)
        case SleepReplica(_, replica_id, reason):
            return sleep(UUID(replica_id), reason, cell)
        case WakeReplica(_, replica_id):
            return wake(UUID(replica_id), config, cell)
        case TerminateMachine(_, machine_id, reason):
            return launch.terminate(UUID(machine_id), reason, provider, cell)


def _owner(deployment: Deployment | None) -> UUID | None:
    return None if deployment is None else deployment.organization_id


def drain(replica_id: UUID, reason: str, cell: Cell) -> bool:
    """The replica takes nothing new and stops when it is done; False if it was draining or gone."""
    now = timezone.now()
    changed = Replica.objects.filter(
        id=replica_id, phase__in=[phase for phase in LIVE_PHASES if phase != ReplicaPhase.DRAINING]
    ).update(phase=ReplicaPhase.DRAINING, phase_at=now, reason_message=reason[:_MAX_REASON])
    replica = (
        Replica.objects.select_related("machine").filter(id=replica_id, phase=ReplicaPhase.DRAINING).first()
    )
    if replica is not None:
        _hurry(replica, now)
        _tell(lambda: cell.drain(replica_id.hex), replica)
        _tell(lambda: cell.set_desired(replica.machine_id.hex, desired_spec(replica)), replica)
    if changed:
        log.info("replica.draining", replica=replica_id.hex, reason=reason)
    return bool(changed)


def sleep(replica_id: UUID, reason: str, cell: Cell) -> bool:
    """The replica takes nothing new, and sleeps when it is done; False if it does not serve any more."""
    changed = Replica.objects.filter(id=replica_id, phase=ReplicaPhase.READY).update(
        phase=ReplicaPhase.SLEEPING, phase_at=timezone.now(), reason_message=reason[:_MAX_REASON]
    )
    replica = Replica.objects.filter(id=replica_id, phase=ReplicaPhase.SLEEPING).first()
    if replica is not None:
        _tell(lambda: cell.put_to_sleep(replica_id.hex), replica)
        _tell(lambda: cell.set_desired(replica.machine_id.hex, desired_spec(replica)), replica)
    if changed:
        log.info("replica.sleeps", replica=replica_id.hex, reason=reason)
    return bool(changed)


def wake(replica_id: UUID, config: AutoscalerConfig, cell: Cell) -> bool:
    """The replica is told to serve again; False if it does not sleep, or its machine has no place for it."""
    sleeper = Replica.objects.filter(id=replica_id).first()
    if sleeper is None:
        return False
    with transaction.atomic():  # as a start: two of them cannot take the same place
        machine = (
            Machine.objects.select_for_update()
            .filter(id=sleeper.machine_id, state=MachineState.READY)
            .first()
        )
        if machine is None:
            return False
        n_awake = Replica.objects.filter(machine=machine, phase__in=AWAKE_PHASES).count()
        if n_awake >= capacity(machine, config):
            return False
        changed = Replica.objects.filter(id=replica_id, phase=ReplicaPhase.SLEEPING).update(
            phase=ReplicaPhase.WAKING, phase_at=timezone.now()
        )
    replica = Replica.objects.filter(id=replica_id, phase=ReplicaPhase.WAKING).first()
    if replica is not None:
        _tell(lambda: cell.set_desired(replica.machine_id.hex, desired_spec(replica)), replica)
    if changed:
        log.info("replica.wakes", replica=replica_id.hex)
    return bool(changed)


def _hurry(replica: Replica, now: datetime) -> None:
    """On a machine under notice the grace ends early enough to hand back what is left."""
    ends_at = replica.machine.ends_at
    if ends_at is None:
        return
    left_s = (ends_at - now).total_seconds() - HAND_BACK_S
    grace_s = min(desired_spec(replica).grace_s, max(left_s, 0.0))
    replica.spec = {**replica.spec, "grace_s": grace_s}
    Replica.objects.filter(id=replica.id, phase=ReplicaPhase.DRAINING).update(spec=replica.spec)


def end(replica_id: UUID, phase: ReplicaPhase, code: str, message: str, cell: Cell) -> bool:
    """The replica is over (`phase` stopped or failed); what it ran moves on. False if it was over before."""
    now = timezone.now()
    changed = Replica.objects.filter(id=replica_id, phase__in=LIVE_PHASES).update(
        phase=phase,
        phase_at=now,
        stopped_at=now,
        reason_code=code[:64],
        reason_message=message[:_MAX_REASON],
    )
    replica = Replica.objects.filter(id=replica_id).first()
    if replica is not None:
        _tell(lambda: cell.withdraw_dead(replica_id.hex), replica)
        _tell(lambda: cell.drop_desired(replica.machine_id.hex, replica_id.hex), replica)
    if changed:
        log.info("replica.ended", replica=replica_id.hex, phase=phase.value, code=code, reason=message)
    return bool(changed)


def _start(command: StartReplica, deployment: Deployment, config: AutoscalerConfig, cell: Cell) -> bool:
    command_id, machine_id, canary = UUID(command.command_id), UUID(command.machine_id), command.canary
    tried = candidate(deployment) if canary else None
    if canary and tried is None:
        return False  # its rollout is over
    try:
        with transaction.atomic():
            machine = (
                Machine.objects.select_for_update().filter(id=machine_id, state__in=_TAKES_REPLICAS).first()
            )
            wanted = Deployment.objects.filter(
                id=deployment.id, generation=deployment.generation, deleted_at=None
            ).exists()
            if machine is None or not wanted:
                return False
            n_live = Replica.objects.filter(machine_id=machine_id, phase__in=AWAKE_PHASES).count()
            if n_live >= capacity(machine, config):
                return False
            replica_id = ids.new_id()
            replica = Replica.objects.create(
                id=replica_id,
                organization_id=deployment.organization_id,
                deployment_id=deployment.id,
                machine=machine,
                generation=deployment.generation,
                slots=slots(deployment) if tried is None else slots_of(tried.settings),
                command_id=command_id,
                spec=replica_spec(deployment, replica_id, tried),
                spec_digest=engine_digest(deployment) if tried is None else tried.digest,
                planned_source=command.source,
            )
    except IntegrityError:  # this command was carried out before
        found = Replica.objects.filter(command_id=command_id).first()
        if found is None:
            raise
        replica = found
    if replica.phase in (ReplicaPhase.STARTING, ReplicaPhase.LOADING):
        spec = desired_spec(replica)
        if spec.model_urls:
            spec.model_siblings = siblings_of(machine_id, spec.model_digest, cell, timezone.now().timestamp())
        _tell(lambda: cell.set_desired(machine_id.hex, spec), replica)
    log.info("replica.ordered", replica=replica.id.hex, deployment=deployment.id.hex, machine=machine_id.hex)
    return True


def _tell(call: object, replica: Replica) -> None:
    """Redis being away delays an order, it does not lose it: reconcile restores it from the rows."""
    try:
        call()  # type: ignore[operator]
    except redis.RedisError as error:
        log.warning("replica.order_delayed", replica=replica.id.hex, error=type(error).__name__)
