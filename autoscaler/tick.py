"""One tick of one deployment: lease, observe, decide, store, act, tell. The heart of the autoscaler's loop.

Called by the watcher (events), by Celery (every few seconds) and by tests; several callers at once are
fine, one of them gets the lease. A decision is stored before it is acted on, so that everything ever done can
be replayed.
"""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import redis
import structlog
from django.db import transaction
from django.db.models import F, Q
from django.utils import timezone

from autoscaler import adapters, means, quotas, stopping, timings
from autoscaler.act import act
from autoscaler.cell import Cell
from autoscaler.codec import from_json, to_json, union_from_json
from autoscaler.config import AutoscalerConfig
from autoscaler.models import Decision as DecisionRow
from autoscaler.models import ScalerState
from autoscaler.observe import observe
from autoscaler.policy import alternatives
from autoscaler.policy.decide import decide
from autoscaler.policy.eta import Timings, eta_ms
from autoscaler.policy.starts import COMING, starts
from autoscaler.policyversion import policy_version
from autoscaler.specs import scaler_spec
from autoscaler.types import (
    COMMANDS,
    Command,
    Decision,
    DeploymentPhase,
    LaunchMachine,
    Observation,
    ScalerMemory,
    ScalerSpec,
    StageName,
    StartMachine,
)
from controlplane import ids
from controlplane.deployments.models import Deployment, Phase
from controlplane.deployments.status import record_phase
from controlplane.policy.coming import text as starts_text
from infra.providers.base import Provider
from workers.contract import Stage

log = structlog.get_logger("corral.autoscaler")

# A machine bought in one round takes replicas in the next.
MAX_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class House:
    """What every tick needs besides the deployment."""

    config: AutoscalerConfig
    provider: Provider
    cell: Cell


@dataclass(frozen=True, slots=True)
class TickResult:
    """`busy`: somebody else holds the lease, nothing was done. `decision` is the last round's."""

    busy: bool = False
    decision: Decision | None = None


def tick(deployment_id: UUID, house: House, now: datetime | None = None) -> TickResult:
    """Decide for one deployment of this cell and carry it out. Raises django.db errors when Postgres is away.

    `now` is for tests that walk a clock; the lease always runs on the real one.
    """
    deployment = (
        Deployment.objects.select_related("model_version", "organization").filter(id=deployment_id).first()
    )
    if deployment is None or deployment.cell != house.cell.keys.cell:
        return TickResult()
    lease = _Lease.take(deployment, house.config)
    if lease is None:
        return TickResult(busy=True)
    try:
        decision = None
        for _ in range(MAX_ROUNDS):
            decision = _round(deployment, house, lease, now or timezone.now())
            ordered = any(isinstance(c, LaunchMachine | StartMachine) for c in decision.commands)
            if not ordered and not _has_stopped(decision, house, now or timezone.now()):
                break
        adapters.deliver(deployment, house.cell, now or timezone.now())
        return TickResult(decision=decision)
    finally:
        lease.release()


def _has_stopped(decision: Decision, house: House, now: datetime) -> bool:
    """Whether a machine that this decision waits for can be started now."""
    keeper = stopping.Keeper(house.config, house.provider, house.cell)
    awaited = decision.memory.awaited
    return bool(awaited) and stopping.look(awaited, keeper, now)


def replay(row: DecisionRow) -> Decision:
    """What `decide` says today to what the row says it was given. Raises CodecError where that cannot be read."""
    return decide(
        from_json(Observation, row.observation),
        from_json(ScalerSpec, row.spec),
        from_json(ScalerMemory, row.memory_in),
    )


def stored_commands(row: DecisionRow) -> tuple[Command, ...]:
    """The commands as they were ordered."""
    return tuple(union_from_json(COMMANDS, value) for value in row.commands)


def _round(deployment: Deployment, house: House, lease: _Lease, now: datetime) -> Decision:
    spec = scaler_spec(deployment, house.config)
    memory = from_json(ScalerMemory, lease.memory)
    observation = observe(deployment, spec, house.config, house.cell, now)
    decision = decide(observation, spec, memory)
    bound = means.granted(deployment, decision.wanted, house.config, house.cell.keys.cell, now)
    if bound is not None:
        observation, spec = means.limited(observation, spec, bound)
        decision = decide(observation, spec, memory)
    phase_changed = record_phase(
        deployment_id=deployment.id,
        phase=Phase(decision.status.phase.value),
        last_error=decision.status.last_error,
    )
    with transaction.atomic():
        lease.keep(to_json(decision.memory))
        waits_anew = decision.memory.awaited != memory.awaited
        # A quiet tick that repeats the last one leaves no row.
        if decision.commands or phase_changed or waits_anew:
            _store(deployment, now, observation, spec, memory, decision)
    if observation.quota and observation.quota in decision.reasons:
        reached = quotas.why_none(deployment, house.cell.keys.cell, house.config.provider, now)
        if reached is not None:
            quotas.tell(deployment, reached, now)
    for command in decision.commands:
        done = act(command, deployment, house.provider, house.config, house.cell)
        log.info(
            "autoscaler.command",
            deployment=deployment.id.hex,
            kind=command.KIND,
            command=command.command_id,
            done=done,
            reasons=decision.reasons,
        )
    _publish_stage(deployment, observation, spec, decision, house)
    return decision


def _store(
    deployment: Deployment,
    now: datetime,
    observation: Observation,
    spec: ScalerSpec,
    memory: ScalerMemory,
    decision: Decision,
) -> None:
    DecisionRow.objects.create(
        organization_id=deployment.organization_id,
        deployment_id=deployment.id,
        tick_id=ids.new_id(),
        observation=to_json(observation),
        spec=to_json(spec),
        memory_in=to_json(memory),
        commands=[to_json(command) for command in decision.commands],
        memory_out=to_json(decision.memory),
        reasons=list(decision.reasons),
        alternatives=to_json(alternatives.of_decision(observation, spec, decision)),
        policy_version=policy_version(),
        at=now,
    )


def _publish_stage(
    deployment: Deployment, observation: Observation, spec: ScalerSpec, decision: Decision, house: House
) -> None:
    """Tell waiting clients where they stand: on every change, and again while somebody waits. And gateways, when which
    replicas will be there."""
    status, cell, did = decision.status, house.cell, deployment.id.hex
    try:
        *last, told = cell.last_told(did)
        if status.stage is None:
            if any((*last, told)):
                cell.forget_stage(did)
            return
        averages: Timings | None = None
        if any(r.phase in COMING for r in observation.replicas):
            averages = timings.read(house.config.provider, deployment.model_version.digest)
            coming = starts_text(starts(observation, spec, averages))
        else:
            coming = ""
        if coming != told:
            cell.tell_starts(did, coming)
        is_news = last != [status.stage.value, status.code]
        somebody_waits = bool(observation.n_queued) and status.stage is not StageName.READY
        if not is_news and not somebody_waits:
            return
        averages = averages or timings.read(house.config.provider, deployment.model_version.digest)
        in_stage_s = observation.now_s - (status.stage_since_s or observation.now_s)
        cell.publish_stage(
            Stage(
                deployment=did,
                stage=status.stage.value,
                eta_ms=eta_ms(status.stage, in_stage_s, averages),
                code=status.code,
                message=_client_message(status.phase, status.code, status.last_error),
                retry_after_s=status.retry_after_s,
                at_ms=round(observation.now_s * 1000),
            )
        )
    except redis.RedisError as error:
        log.warning("autoscaler.stage_not_published", deployment=did, error=type(error).__name__)


def _client_message(phase: DeploymentPhase, code: str, last_error: str) -> str:
    if phase is DeploymentPhase.DELETED:
        return "this deployment was deleted"
    return last_error if code else ""


class _Lease:
    """The row lease of one deployment's scaler: compare-and-set, never a database lock.

    Taken by version; `owner` is unique to this tick, so while the row names it the lease is ours.
    """

    def __init__(self, deployment_id: UUID, owner: str, memory: dict[str, Any]) -> None:
        self.memory = memory
        self._rows = ScalerState.objects.filter(deployment_id=deployment_id, lease_owner=owner)

    @classmethod
    def take(cls, deployment: Deployment, config: AutoscalerConfig) -> _Lease | None:
        """None while somebody else holds it."""
        state, _ = ScalerState.objects.get_or_create(
            deployment_id=deployment.id, defaults={"organization_id": deployment.organization_id}
        )
        now = timezone.now()
        owner = f"{socket.gethostname()[:20]}:{os.getpid()}:{uuid.uuid4().hex[:12]}"
        taken = (
            ScalerState.objects.filter(deployment_id=deployment.id, version=state.version)
            .filter(Q(lease_until=None) | Q(lease_until__lt=now))
            .update(
                version=state.version + 1,
                lease_owner=owner,
                lease_until=now + timedelta(seconds=config.lease_s),
            )
        )
        return cls(deployment.id, owner, dict(state.memory)) if taken else None

    def keep(self, memory: dict[str, Any]) -> None:
        """Store the memory. Raises LeaseLostError when somebody took over: then nothing may be acted on."""
        if not self._rows.update(version=F("version") + 1, memory=memory):
            raise LeaseLostError("somebody else decides for this deployment now")
        self.memory = memory

    def release(self) -> None:
        self._rows.update(version=F("version") + 1, lease_owner="", lease_until=None)


class LeaseLostError(RuntimeError):
    """Another worker decides for this deployment now; the next tick will."""
