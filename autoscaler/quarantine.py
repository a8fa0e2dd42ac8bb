"""A machine that an operator distrusts leaves like one with a sick GPU; and may stay after all, while nothing drains.

Called by `manage.py quarantine`, beside the control worker, which does all the work: it hears that a machine leaves,
orders successors, drains and ends it. Who did it and why is kept as a decision of the pool that nobody changes, and why
is told to those whose replicas live there.
"""

from __future__ import annotations

import time
from datetime import datetime
from typing import Final
from uuid import UUID

import structlog
from django.db import IntegrityError, transaction
from django.utils import timezone

from autoscaler import health, launch, pooldecisions, stopping
from autoscaler.models import (
    LIVE_PHASES,
    Machine,
    MachineState,
    PoolDecision,
    PoolDecisionKind,
    Replica,
    ReplicaPhase,
)
from autoscaler.tick import House
from controlplane import ids
from controlplane.errors import ConflictError, InvalidInputError, NotFoundError

log = structlog.get_logger("corral.autoscaler")

BY_HAND: Final = f"{health.SICK}by hand: "  # begins the reason of a machine that leaves for this
MAX_REASON: Final = 300
NOTICE_GONE_WITHIN_S: Final = 10.0  # its agent looks five times a second and beats once
_POLL_S: Final = 0.1
_SERVES: Final = (MachineState.ENROLLED, MachineState.READY)


def quarantine(
    machine_id: UUID, reason: str, by: str, house: House, now: datetime | None = None
) -> PoolDecision:
    """Nothing new is placed on it, successors serve before anything drains, then it ends; a stopped one ends at once.

    Raises InvalidInputError without a reason, NotFoundError, ConflictError for one that has not come up or leaves
    already.
    """
    reason, now = reason.strip(), now or timezone.now()
    if not reason or len(reason) > MAX_REASON:
        raise InvalidInputError(f"reason: say why, in at most {MAX_REASON} characters", field="reason")
    machine = _find(machine_id, house)
    if machine.state in stopping.RESTING:
        if not launch.terminate(machine.id, f"{BY_HAND}{reason}", house.provider, house.cell):
            raise ConflictError("somebody else does something with this machine: try again", field="machine")
        return _keep("quarantine", machine, reason, by, house, now)
    if machine.state == MachineState.DRAINING:
        raise ConflictError(
            f"this machine leaves already: {machine.reason or 'it is drained'}", field="machine"
        )
    if machine.state not in _SERVES:
        raise ConflictError(f"this machine is {machine.state}: wait until it has come up", field="machine")
    health.quarantine(machine, f"{BY_HAND.removeprefix(health.SICK)}{reason}", house)
    if not Machine.objects.filter(id=machine.id, reason__startswith=BY_HAND).exists():
        raise ConflictError("somebody else does something with this machine: try again", field="machine")
    return _keep("quarantine", machine, reason, by, house, now)


def lift(machine_id: UUID, by: str, house: House, now: datetime | None = None) -> PoolDecision:
    """It stays. Raises NotFoundError; ConflictError where it is not quarantined by hand, where what runs there drains
    already, where its successor has the pool's last place, or where its provider takes it away for reasons of its own.
    """
    machine = _find(machine_id, house)
    _check_may_stay(machine)
    if machine.provider_ref:
        house.provider.staying(machine.provider_ref)
    _wait_for_silence_about_an_end(machine, house)
    with transaction.atomic():
        locked = Machine.objects.select_for_update().get(id=machine.id)
        _check_may_stay(locked)
        _take_place(locked, house)
    log.warning("machine.stays", machine=machine.id.hex, by=by)
    return _keep("lift", machine, machine.reason.removeprefix(BY_HAND), by, house, now or timezone.now())


def deployments_on(machine_id: UUID) -> list[UUID]:
    """Those to be decided anew now."""
    live = Replica.objects.filter(machine_id=machine_id, phase__in=LIVE_PHASES)
    return list(live.order_by("deployment_id").values_list("deployment_id", flat=True).distinct())


def _find(machine_id: UUID, house: House) -> Machine:
    found = Machine.objects.filter(
        id=machine_id, cell=house.cell.keys.cell, provider=house.provider.name
    ).exclude(state=MachineState.GONE)
    machine = found.first()
    if machine is None:
        raise NotFoundError("no such machine in this pool, or it is gone already", field="machine")
    return machine


def _check_may_stay(machine: Machine) -> None:
    if machine.state != MachineState.DRAINING or not machine.reason.startswith(BY_HAND):
        raise ConflictError("this machine is not quarantined by hand", field="machine")
    if Replica.objects.filter(machine_id=machine.id, phase=ReplicaPhase.DRAINING).exists():
        raise ConflictError("what runs on this machine drains already: let it go", field="machine")


def _wait_for_silence_about_an_end(machine: Machine, house: House) -> None:
    """Its agent beats no end any more; or the watcher would have it leave again at once."""
    deadline_s = time.monotonic() + NOTICE_GONE_WITHIN_S
    while True:
        beat = house.cell.read_agents([machine.id.hex])[machine.id.hex]
        if beat is None or beat.ends_in_ms is None:
            return
        if time.monotonic() >= deadline_s:
            raise ConflictError("its provider takes this machine away: it cannot stay", field="machine")
        time.sleep(_POLL_S)


def _take_place(machine: Machine, house: House) -> None:
    """A place of the pool again, in the caller's transaction."""
    pool = Machine.objects.filter(cell=machine.cell, provider=machine.provider).exclude(
        state=MachineState.GONE
    )
    taken = set(pool.values_list("pool_slot", flat=True))
    state = MachineState.READY if machine.ready_at else MachineState.ENROLLED
    for slot in range(house.config.max_machines):
        if slot in taken:
            continue
        try:
            with transaction.atomic():
                Machine.objects.filter(id=machine.id).update(
                    state=state, ends_at=None, pool_slot=slot, reason=""
                )
        except IntegrityError:  # somebody took the place
            continue
        return
    raise ConflictError(
        "its successor has the pool's last place: let it go, or raise CORRAL_MAX_MACHINES", field="machine"
    )


def _keep(what: str, machine: Machine, reason: str, by: str, house: House, now: datetime) -> PoolDecision:
    told = f"{'quarantined' if what == 'quarantine' else 'may stay'} by {by}: {reason}"
    return pooldecisions.keep(
        PoolDecisionKind.OPERATOR,
        cell=machine.cell,
        provider=machine.provider,
        inputs={"by": by, "machine_id": machine.id.hex, "state": str(machine.state), "reason": reason},
        outcome={what: ({"machine_id": machine.id.hex, "why": reason},)},
        alternatives=(),
        reasons=(f"{ids.to_text(ids.Prefix.MACHINE, machine.id)} {told}",),
        now=now,
    )
