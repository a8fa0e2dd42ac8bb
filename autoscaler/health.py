"""Machines with a sick GPU leave: nothing new is placed on them, successors come first, then they drain and end.

Called by a task every few seconds. The agents' beats are read, policy/gpuhealth.py judges, what it orders is stored as
a decision of the pool with its reason, and the machine is treated as one under notice (records.machine_leaves). A
machine is believed about itself only.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final
from uuid import UUID

import msgspec
import redis
import structlog
from django.utils import timezone

from autoscaler import pooldecisions, records
from autoscaler.models import Machine, MachineState, PoolDecisionKind
from autoscaler.policy.gpuhealth import GpuState, HealthInputs, MachineHealth, judge
from autoscaler.tick import House
from workers.contract import Heartbeat

log = structlog.get_logger("corral.autoscaler")

SICK: Final = "quarantined: "  # begins the reason of a machine that leaves for this
MAX_GPUS: Final = 64  # of one machine; what says more is not believed
_LIVE: Final = (MachineState.ENROLLED, MachineState.READY, MachineState.DRAINING)


def look(house: House, now: datetime | None = None) -> set[UUID]:
    """One pass over the provider's machines in the cell; the deployments to tick."""
    now = now or timezone.now()
    cell, provider = house.cell.keys.cell, house.provider.name
    rows = {
        row.id.hex: row
        for row in Machine.objects.filter(cell=cell, provider=provider, state__in=_LIVE).order_by("id")
    }
    try:
        beats = house.cell.read_agents(list(rows))
    except redis.RedisError as error:
        log.warning("machine.health_unknown", error=type(error).__name__)
        return set()
    inputs = HealthInputs(
        tuple(
            MachineHealth(mid, _gpus(beats.get(mid)), row.state == MachineState.DRAINING)
            for mid, row in rows.items()
        )
    )
    orders = judge(inputs)
    if not orders.quarantine:
        return set()
    row = pooldecisions.keep(
        PoolDecisionKind.HEALTH,
        cell=cell,
        provider=provider,
        inputs=inputs,
        outcome=orders,
        alternatives=(),
        reasons=orders.reasons,
        now=now,
    )
    touched: set[UUID] = set()
    for each in orders.quarantine:
        touched |= quarantine(rows[each.machine_id], each.why, house)
    log.error(
        "pool.machines_quarantined", decision=str(row), n=len(orders.quarantine), reasons=orders.reasons
    )
    return touched


def quarantine(machine: Machine, why: str, house: House) -> set[UUID]:
    """It leaves within `quarantine_s`, as if its provider took it away; the deployments to tick. May be repeated."""
    within_s = house.config.quarantine_s
    if machine.provider_ref:
        house.provider.leaving(machine.provider_ref, within_s)
    return set(records.machine_leaves(machine.id, round(within_s * 1000), f"{SICK}{why}"[:500]))


def _gpus(beat: Heartbeat | None) -> tuple[GpuState, ...]:
    if beat is None:
        return ()
    return tuple(GpuState(**msgspec.structs.asdict(gpu)) for gpu in beat.gpus[:MAX_GPUS])
