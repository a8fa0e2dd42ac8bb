"""Keeps how long starts take, per provider and model, for the ETA that waiting clients are told.

Written when a replica or machine gets ready, read by the tick. Losing an update of the average is harmless.
"""

from __future__ import annotations

from uuid import UUID

from django.db import IntegrityError, transaction
from django.db.models import F

from autoscaler.models import Machine, Replica, StartTiming
from autoscaler.policy.eta import Timings, average
from autoscaler.types import StageName

MAX_MS = 24 * 3600 * 1000.0
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


def note(provider: str, model_digest: str, stage: StageName, measured_ms: float) -> None:
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
