"""What clients saw of the two arms of a rollout since its step began: read from usage events and heartbeats.

Called by canary.py in the control worker, and by the REST API for one rollout. Reads only. Errors that a canary handed
back never reached a client and are in no usage event: they come from its own count.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from autoscaler.models import Replica, ReplicaPhase
from billing.models import UsageEvent
from controlplane.deployments.models import SloClass
from controlplane.policy.canary import Arm, Evidence, Limits, pairs
from controlplane.rollouts.models import Rollout

MAX_ROWS: Final = 20_000  # of one arm and step, the newest: far beyond where figures are told apart
# How replicas end that is nobody's fault: not of what they run.
_NOT_ITS_FAULT: Final = ("machine_lost", "machine_stopped", "no_room", "zygote_gone", "heartbeat_lost")
_CLIENTS_OWN: Final = (400, 499)  # refused for what was asked, or the client went
_FIELDS: Final = ("admitted_at", "status", "first_token_ms", "duration_ms", "n_completion_tokens")


def evidence(rollout: Rollout, slo: SloClass, n_handed_back: int) -> Evidence:
    """Both arms since `step_at`. `n_handed_back`: of this step, by the canary's own count."""
    replicas = replicas_of(rollout)
    usage = UsageEvent.objects.filter(
        organization_id=rollout.organization_id,
        deployment_id=rollout.deployment_id,
        admitted_at__gte=rollout.step_at,
        replica_id__isnull=False,
    ).order_by("-admitted_at")
    ids = [row.id for row in replicas]
    tried = list(usage.filter(replica_id__in=ids).values_list(*_FIELDS)[:MAX_ROWS])
    stable = list(usage.exclude(replica_id__in=ids).values_list(*_FIELDS)[:MAX_ROWS])
    canary = _arm(tried, slo)
    n_pairs, n_slower = pairs(_paces(tried), _paces(stable), Limits(**rollout.limits).slower_ratio)
    return Evidence(
        canary=Arm(canary.n + n_handed_back, canary.n_errors + n_handed_back, canary.n_missed),
        stable=_arm(stable, slo),
        n_pairs=n_pairs,
        n_slower=n_slower,
        n_deaths=sum(
            row.phase == ReplicaPhase.FAILED and row.reason_code not in _NOT_ITS_FAULT for row in replicas
        ),
    )


def replicas_of(rollout: Rollout) -> list[Replica]:
    """Every replica that was started for it."""
    return list(
        Replica.objects.filter(
            organization_id=rollout.organization_id,
            deployment_id=rollout.deployment_id,
            spec_digest=rollout.candidate.digest,
            created_at__gte=rollout.created_at,
        ).order_by("id")
    )


def told(found: Evidence) -> Mapping[str, int]:
    """As it is kept beside a decision."""
    return {
        "canary_requests": found.canary.n,
        "canary_errors": found.canary.n_errors,
        "canary_missed": found.canary.n_missed,
        "stable_requests": found.stable.n,
        "stable_errors": found.stable.n_errors,
        "stable_missed": found.stable.n_missed,
        "pairs": found.n_pairs,
        "slower": found.n_slower,
        "deaths": found.n_deaths,
    }


def _arm(rows: list[tuple[datetime, int, int | None, int, int]], slo: SloClass) -> Arm:
    n = n_errors = n_missed = 0
    for _, status, first_ms, duration_ms, n_tokens in rows:
        if status in _CLIENTS_OWN:
            continue
        n += 1
        if status >= 500:
            n_errors += 1
        elif _missed(first_ms, duration_ms, n_tokens, slo):
            n_missed += 1
    return Arm(n, n_errors, n_missed)


def _missed(first_ms: int | None, duration_ms: int, n_tokens: int, slo: SloClass) -> bool:
    if first_ms is None:
        return duration_ms > slo.deadline_s * 1000
    itl_ms = _itl_ms(first_ms, duration_ms, n_tokens)
    return (
        first_ms > slo.ttft_ms
        or duration_ms > slo.deadline_s * 1000
        or (itl_ms is not None and itl_ms > slo.itl_ms)
    )


def _itl_ms(first_ms: int, duration_ms: int, n_tokens: int) -> float | None:
    return (duration_ms - first_ms) / (n_tokens - 1) if n_tokens >= 2 else None


def _paces(rows: list[tuple[datetime, int, int | None, int, int]]) -> list[tuple[float, float]]:
    """(admitted, milliseconds per token after the first), oldest first."""
    found: list[tuple[float, Any]] = [
        (at.timestamp(), _itl_ms(first_ms, duration_ms, n_tokens))
        for at, status, first_ms, duration_ms, n_tokens in rows
        if status < 400 and first_ms is not None
    ]
    return sorted((at, ms) for at, ms in found if ms is not None)
