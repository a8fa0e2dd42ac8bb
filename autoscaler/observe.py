"""Builds one Observation of a deployment and the pool, from Postgres (facts) and Redis (load).

Called by tick.py in the control worker, as the operator role. Reads only. Redis being away leaves its figures
None, which the policy knows how to take; Postgres being away raises django.db.OperationalError.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from uuid import UUID

import redis
import structlog
from django.db.models import Count, Max, Q

from autoscaler import quotas, reserve, timings, weights
from autoscaler.cell import Cell, DeploymentReading, ReplicaReading
from autoscaler.config import AutoscalerConfig
from autoscaler.models import AWAKE_PHASES, LIVE_PHASES, Machine, Replica, ReplicaPhase
from autoscaler.models import MachineState as MachineRowState
from autoscaler.policy.comeback import Stopping, StopTimes
from autoscaler.policy.pool import Pool
from autoscaler.poolmodels import TAKEN_AWAY
from autoscaler.specs import candidate, engine_digest
from autoscaler.types import (
    Failure,
    MachineState,
    MachineView,
    Observation,
    ReplicaView,
    ScalerSpec,
)
from autoscaler.types import ReplicaPhase as Phase
from controlplane.deployments.models import Deployment
from infra.providers.external import ExternalProvider

log = structlog.get_logger("corral.autoscaler")

MAX_FAILURES_SEEN = 20
MAX_STOPPING_SEEN = 100
MACHINE_FAILURES_FOR = timedelta(hours=1)
# Endpoints elsewhere (external.py) are not ours to scale.
ELSEWHERE_Q = Q(machine__provider=ExternalProvider.name)
LIVE_Q = Q(replicas__phase__in=AWAKE_PHASES)  # those with a place; sleepers have beds
ASLEEP_Q = Q(replicas__phase=ReplicaPhase.SLEEPING)


def observe(
    deployment: Deployment, spec: ScalerSpec, config: AutoscalerConfig, cell: Cell, now: datetime
) -> Observation:
    """What is known of this deployment now."""
    live = Replica.objects.filter(deployment_id=deployment.id, phase__in=LIVE_PHASES)
    rows = list(live.exclude(ELSEWHERE_Q).order_by("id"))
    readings, load = _ask_redis(cell, deployment.id, rows)
    digest = engine_digest(deployment)
    tried = candidate(deployment) if spec.n_canary else None
    failures, last_good_at_s = _failures(deployment, spec, now, digest)
    machine_failures, last_machine_good_at_s = _machine_failures(config, cell.keys.cell, now)
    replicas = tuple(
        _replica_view(row, readings, digest, "" if tried is None else tried.digest) for row in rows
    )
    loading, machines = weights.look(deployment, machine_views(config, cell.keys.cell), config, cell)
    pool = Pool(machines)
    reached = quotas.why_none(deployment, cell.keys.cell, config.provider, now)
    stopping = being_stopped(config, cell.keys.cell)
    return Observation(
        now_s=now.timestamp(),
        deployment_id=deployment.id.hex,
        # What an overflow holds would wait if it were not there.
        n_queued=None if load is None else load.n_queued + load.n_overflowed,
        replicas=replicas,
        machines=pool.view(replicas, spec.max_replicas, loading),
        stopped=startable(config, cell.keys.cell, now),
        stopping=stopping,
        stop_times=(timings.stop_times(config.provider, config.machine_boot_s) if stopping else StopTimes()),
        loading=loading,
        n_machines=pool.n_machines,
        failures=failures,
        last_good_at_s=last_good_at_s,
        machine_failures=machine_failures,
        last_machine_good_at_s=last_machine_good_at_s,
        quota="" if reached is None else reached.sentence,
    )


def machine_views(config: AutoscalerConfig, cell_name: str) -> tuple[MachineView, ...]:
    """Every machine of the pool that exists, with its room; those that are being filled for the reserve have none."""
    rows = (
        Machine.objects.filter(cell=cell_name, provider=config.provider)
        .exclude(state__in=(MachineRowState.GONE, MachineRowState.STOPPING, MachineRowState.STOPPED))
        .annotate(
            n_live=Count("replicas", filter=LIVE_Q),
            n_asleep=Count("replicas", filter=ASLEEP_Q),
            emptied_at=Max("replicas__stopped_at"),
            bedded_at=Max("replicas__phase_at", filter=ASLEEP_Q),
        )
        .order_by("id")
    )
    return tuple(
        MachineView(
            id=row.id.hex,
            # One that is being started again is as one that was ordered when that began.
            state=MachineState.PENDING if row.state == MachineRowState.RESUMING else MachineState(row.state),
            resumes=row.state == MachineRowState.RESUMING,
            in_reserve=row.reserve_place is not None,
            n_free=0 if reserve.is_filling(row) else max(capacity(row, config) - row.n_live, 0),
            n_replicas=row.n_live,
            created_at_s=_begun_at(row).timestamp(),
            empty_since_s=(None if row.n_live else _latest_s((row.emptied_at, row.bedded_at, row.ready_at))),
            ends_at_s=_latest_s((row.ends_at,)),
            leaves_because=row.reason if _is_ours_to_tell(row) else "",
            ready_at_s=_latest_s((row.ready_at,)),
            n_beds=0 if reserve.is_filling(row) else max(config.sleepers_per_machine - row.n_asleep, 0),
        )
        for row in rows
    )


def _is_ours_to_tell(machine: Machine) -> bool:
    return machine.state == MachineRowState.DRAINING and machine.reason != TAKEN_AWAY


def _begun_at(row: Machine) -> datetime:
    return row.rest_at if row.state == MachineRowState.RESUMING and row.rest_at else row.created_at


def startable(config: AutoscalerConfig, cell_name: str, now: datetime) -> tuple[str, ...]:
    """Stopped machines whose zone did not refuse to start them a moment ago. Those in reserve wait for the word of the
    buying policy (launch.py)."""
    rows = Machine.objects.filter(
        cell=cell_name, provider=config.provider, state=MachineRowState.STOPPED, reserve_place=None
    )
    rows = rows.exclude(reserve.refused_lately(now)).order_by("id")
    return tuple(row.hex for row in rows.values_list("id", flat=True))


def being_stopped(config: AutoscalerConfig, cell_name: str) -> tuple[Stopping, ...]:
    """Machines that were told to stop, and can be started as soon as they are stopped."""
    rows = Machine.objects.filter(
        cell=cell_name,
        provider=config.provider,
        state=MachineRowState.STOPPING,
        rest_at__isnull=False,
        reserve_place=None,
    )
    return tuple(
        Stopping(row.id.hex, row.rest_at.timestamp(), capacity(row, config))
        for row in rows.order_by("id")[:MAX_STOPPING_SEEN]
        if row.rest_at is not None
    )


def capacity(machine: Machine, config: AutoscalerConfig) -> int:
    """Replicas a machine holds: what its agent reported, else by its GPUs, else the pool's default."""
    told = machine.capabilities.get("max_replicas")
    if isinstance(told, int) and 1 <= told <= 256:
        return told
    return machine.n_places or config.replicas_per_machine


def _ask_redis(
    cell: Cell, deployment_id: UUID, rows: list[Replica]
) -> tuple[dict[str, ReplicaReading] | None, DeploymentReading | None]:
    did = deployment_id.hex
    try:
        readings = cell.read_replicas([(row.id.hex, row.machine_id.hex, did) for row in rows])
        return readings, cell.read_deployments([did])[did]
    except redis.RedisError as error:
        log.warning("autoscaler.redis_away", deployment=did, error=type(error).__name__)
        return None, None


def _replica_view(
    row: Replica, readings: dict[str, ReplicaReading] | None, digest: str, tried: str
) -> ReplicaView:
    reading = None if readings is None else readings[row.id.hex]
    beat = None if reading is None else reading.beat
    return ReplicaView(
        id=row.id.hex,
        machine_id=row.machine_id.hex,
        phase=Phase(row.phase),
        created_at_s=row.created_at.timestamp(),
        phase_at_s=row.phase_at.timestamp(),
        slots=row.slots,
        used=None if reading is None else reading.used,
        slots_now=None if reading is None or reading.state != "ready" else reading.slots,
        beat_seq=None if beat is None else beat.seq,
        n_requests_total=0 if beat is None else beat.n_requests_total,
        outdated=bool(row.spec_digest) and row.spec_digest not in (digest, tried),
        canary=bool(tried) and row.spec_digest == tried != digest,
    )


def _failures(
    deployment: Deployment, spec: ScalerSpec, now: datetime, digest: str
) -> tuple[tuple[Failure, ...], float | None]:
    """Newest failures of this generation, oldest first; and when one last had proven itself. What became of a canary
    is for its rollout to judge."""
    recent = Replica.objects.filter(
        deployment_id=deployment.id, generation=deployment.generation, spec_digest__in=("", digest)
    ).exclude(ELSEWHERE_Q)
    last_good_at_s = None
    for row in recent.filter(ready_at__isnull=False).order_by("-ready_at")[:MAX_FAILURES_SEEN]:
        if row.ready_at is not None:
            end_s = (row.stopped_at or now).timestamp()
            if end_s - row.ready_at.timestamp() >= spec.proven_s:
                last_good_at_s = max(last_good_at_s or 0.0, end_s)
    failed = recent.filter(phase=ReplicaPhase.FAILED, stopped_at__isnull=False)
    failures = [
        Failure(
            subject_id=row.id.hex,
            at_s=row.stopped_at.timestamp(),
            code=row.reason_code or "unknown",
            message=row.reason_message,
            ready_s=(row.stopped_at - row.ready_at).total_seconds() if row.ready_at else 0.0,
        )
        for row in failed.order_by("-stopped_at")[:MAX_FAILURES_SEEN]
        if row.stopped_at is not None
    ]
    return tuple(reversed(failures)), last_good_at_s


def _machine_failures(
    config: AutoscalerConfig, cell_name: str, now: datetime
) -> tuple[tuple[Failure, ...], float | None]:
    """Machines that never came up, oldest first; and when one last did."""
    pool = Machine.objects.filter(cell=cell_name, provider=config.provider)
    failed = pool.filter(
        state=MachineRowState.GONE, ready_at__isnull=True, gone_at__gte=now - MACHINE_FAILURES_FOR
    )
    failures = [
        Failure(row.id.hex, row.gone_at.timestamp(), "machine_unavailable", row.reason)
        for row in failed.order_by("-gone_at")[:MAX_FAILURES_SEEN]
        if row.gone_at is not None
    ]
    return tuple(reversed(failures)), _latest_s([pool.aggregate(last=Max("ready_at"))["last"]])


def _latest_s(instants: Iterable[datetime | None]) -> float | None:
    known = [instant.timestamp() for instant in instants if instant is not None]
    return max(known) if known else None
