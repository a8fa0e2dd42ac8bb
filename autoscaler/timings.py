"""Keeps how long starts take, per provider and model, for the ETA that waiting clients are told.

Written when a replica or machine gets ready, read by the tick. Losing an update of the average is harmless.
"""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from django.db import IntegrityError, transaction
from django.db.models import F

from autoscaler.models import Machine, Replica, StartTiming
from autoscaler.policy.comeback import StopTimes
from autoscaler.policy.eta import Timings, average
from autoscaler.policy.startup import Tier
from autoscaler.types import StageName

MAX_MS = 24 * 3600 * 1000.0
GIB = 1 << 30
MIN_READING_S = 0.05
STOP_STAGE = "stopping_machine"  # from the order until the provider shows it stopped
UNKNOWN_STOP_S = 30.0  # until one was stopped: EC2 lets the system shut down, which takes seconds to a minute
UNKNOWN_RESUME_RATIO = 0.7  # of a boot, until a machine has come back: no image, no weights to fetch
INIT_STAGE = "engine_init"  # of a start: what it takes beside its weights
UNKNOWN_START_S = 5.0  # until a replica has been started


def read(provider: str, model_digest: str) -> Timings:
    """Averages of this model on this provider."""
    rows = StartTiming.objects.filter(provider=provider, model_digest__in=("", model_digest))
    found = {row.stage: row.average_ms for row in rows}
    return Timings(
        launching_machine=found.get(StageName.LAUNCHING_MACHINE),
        starting_replica=found.get(StageName.STARTING_REPLICA),
        loading_model=found.get(StageName.LOADING_MODEL),
        waking_replica=found.get(StageName.WAKING_REPLICA),
        starting_machine=found.get(StageName.STARTING_MACHINE),
    )


def usual_start_s(provider: str) -> float:
    """From the order of a replica to its readiness on a warm machine, mean over the models started so far."""
    rows = StartTiming.objects.filter(
        provider=provider, stage__in=(StageName.STARTING_REPLICA, StageName.LOADING_MODEL)
    )
    by_model: dict[str, float] = {}
    for row in rows:
        by_model[row.model_digest] = by_model.get(row.model_digest, 0.0) + row.average_ms / 1000
    return sum(by_model.values()) / len(by_model) if by_model else UNKNOWN_START_S


def usual_boot_s(provider: str) -> float | None:
    """From the order of a machine to its readiness; None: none has been measured."""
    found = StartTiming.objects.filter(provider=provider, stage=StageName.LAUNCHING_MACHINE).first()
    return None if found is None else found.average_ms / 1000


def note(provider: str, model_digest: str, stage: str, measured_ms: float) -> None:
    """One more measurement; absurd ones (a stopped clock) are dropped."""
    if not 0 <= measured_ms <= MAX_MS:
        return
    found = StartTiming.objects.filter(provider=provider, model_digest=model_digest, stage=stage)
    known = found.first()
    if known is not None:
        found.update(average_ms=average(known.average_ms, measured_ms), n=F("n") + 1)
        return
    try:
        with transaction.atomic():
            StartTiming.objects.create(
                provider=provider, model_digest=model_digest, stage=stage, average_ms=measured_ms
            )
    except IntegrityError:
        pass  # somebody was first; the next measurement counts


def note_machine(machine_id: UUID) -> None:
    """A machine has become ready."""
    machine = Machine.objects.get(id=machine_id)
    if machine.ready_at is not None:
        elapsed_ms = (machine.ready_at - machine.created_at).total_seconds() * 1000
        note(machine.provider, "", StageName.LAUNCHING_MACHINE, elapsed_ms)


def usual_resume_s(provider: str) -> float | None:
    """From the order to start a stopped machine to its readiness; None: none has been measured."""
    found = StartTiming.objects.filter(provider=provider, stage=StageName.STARTING_MACHINE).first()
    return None if found is None else found.average_ms / 1000


def stop_times(provider: str, unknown_boot_s: float) -> StopTimes:
    """What stopping a machine, starting it again and buying another take; `unknown_boot_s` until one has booted."""
    found = StartTiming.objects.filter(provider=provider, stage=STOP_STAGE).first()
    boot_s, resume_s = usual_boot_s(provider), usual_resume_s(provider)
    boot_s = unknown_boot_s if boot_s is None else boot_s
    return StopTimes(
        stop_s=UNKNOWN_STOP_S if found is None else found.average_ms / 1000,
        resume_s=boot_s * UNKNOWN_RESUME_RATIO if resume_s is None else resume_s,
        boot_s=boot_s,
    )


def note_stopped(machine: Machine, now: datetime) -> None:
    """A machine that was told to stop is stopped."""
    if machine.rest_at is not None:
        note(machine.provider, "", STOP_STAGE, (now - machine.rest_at).total_seconds() * 1000)


def note_resumed(machine: Machine, now: datetime) -> None:
    """A stopped machine has come back."""
    if machine.rest_at is not None:
        elapsed_ms = (now - machine.rest_at).total_seconds() * 1000
        note(machine.provider, "", StageName.STARTING_MACHINE, elapsed_ms)


def note_woken(replica: Replica, elapsed_ms: float) -> None:
    """A replica serves again, so long after it was told to wake."""
    digest = str(replica.spec.get("model_digest", ""))
    note(replica.machine.provider, digest, StageName.WAKING_REPLICA, elapsed_ms)


def note_replica(replica: Replica, stages_ms: dict[str, int]) -> None:
    """A replica has become ready; `stages_ms` as its front measured them (fetch, fork, load, …)."""
    if replica.ready_at is None or replica.machine.ready_at is None:
        return
    provider, digest = replica.machine.provider, str(replica.spec.get("model_digest", ""))
    begun_at = max(replica.created_at, replica.machine.ready_at)
    total_ms = (replica.ready_at - begun_at).total_seconds() * 1000
    load_ms = min(float(max(stages_ms.get("load", 0), 0)), total_ms)
    note(provider, digest, StageName.LOADING_MODEL, load_ms)
    note(provider, digest, StageName.STARTING_REPLICA, total_ms - load_ms)
    if replica.planned_source:
        _note_reading(replica, Tier(replica.planned_source), stages_ms, total_ms / 1000)


def speeds(provider: str) -> dict[Tier, float]:
    """Bytes a second by where weights came from, as far as measured."""
    rows = StartTiming.objects.filter(provider=provider, model_digest="", stage__in=map(_stage, Tier))
    found = {row.stage: row.average_ms for row in rows}
    return {tier: 1000 * GIB / found[_stage(tier)] for tier in Tier if found.get(_stage(tier), 0) > 0}


def init_s(provider: str, model_digest: str) -> float:
    """What a start takes beside the weights; 0 until measured."""
    found = StartTiming.objects.filter(provider=provider, model_digest=model_digest, stage=INIT_STAGE).first()
    return 0.0 if found is None else found.average_ms / 1000


def _note_reading(replica: Replica, tier: Tier, stages_ms: dict[str, int], total_s: float) -> None:
    """How fast the weights came, or what the start took beside them.

    A fetch says its own duration, or went on beside the load. Of weights that were here only the whole is known: those
    in memory tell what the rest takes, and with that known those on disk tell how fast the disk is.
    """
    provider, digest = replica.machine.provider, str(replica.spec.get("model_digest", ""))
    size_bytes = replica.deployment.model_version.size_bytes
    if not size_bytes or replica.deployment.model_version.digest != digest:
        return
    if tier in (Tier.STORE, Tier.SIBLING):
        seconds = stages_ms.get("fetch", stages_ms.get("load", 0)) / 1000
    elif tier is Tier.DISK and init_s(provider, digest):
        seconds = total_s - init_s(provider, digest)
    else:
        note(provider, digest, INIT_STAGE, total_s * 1000)
        return
    if seconds >= MIN_READING_S:  # else they were here already
        note(provider, "", _stage(tier), 1000 * seconds * GIB / size_bytes)


def _stage(tier: Tier) -> str:
    return f"gib_from_{tier.value}"
