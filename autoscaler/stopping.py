"""The stop/start rung: a machine that nobody needs now keeps its disk, weights and credentials, and costs storage only.

Called by act.py and pool.py with an order, and by reconcile.py with what the provider says. The row says what is wanted
before the provider is asked (`stopping`, `resuming`), so whoever dies in between leaves an intent that the next pass of
reconcile carries out; each step may be repeated. Spot machines of one-time requests cannot be stopped by us, on-demand
ones can. A stopped machine has no Redis user and no place in the pool; it gets both back before it is started.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

import redis
import structlog
from django.db import IntegrityError, transaction
from django.db.models import F, Q
from django.utils import timezone

from autoscaler import launch, reserve, timings
from autoscaler.cell import Cell
from autoscaler.config import AutoscalerConfig
from autoscaler.models import AWAKE_PHASES, Machine, MachineState, Replica
from autoscaler.reserve import NO_ROOM
from infra.providers.base import CapacityError, Provider, ProviderError, ProviderMachine, ProviderState

log = structlog.get_logger("corral.autoscaler")


@dataclass(frozen=True, slots=True)
class Keeper:
    """What of the house (tick.House, which stands above act.py) stopping and starting needs."""

    config: AutoscalerConfig
    provider: Provider
    cell: Cell


RESTING: Final = (MachineState.STOPPING, MachineState.STOPPED)
_MAX_REASON: Final = 500
LOOK_EVERY_S: Final = 2.0  # a stop takes some ten seconds; a tick comes every five and with every event


def may_stop(machine: Machine, provider: Provider) -> bool:
    """On-demand, at a provider that can."""
    return provider.stops and bool(machine.provider_ref) and not machine.offering.startswith("spot/")


def stop(machine_id: UUID, why: str, house: Keeper, now: datetime | None = None) -> bool:
    """Have it stopped; False if a replica serves on it, it cannot be, or somebody else is doing something with it. What
    sleeps there ends."""
    with transaction.atomic():
        machine = Machine.objects.select_for_update().filter(_is_free(house), id=machine_id).first()
        if machine is None or not may_stop(machine, house.provider):
            return False
        if Replica.objects.filter(machine_id=machine_id, phase__in=AWAKE_PHASES).exists():
            return False
        launch.end_sleepers(machine_id, why)
        Machine.objects.filter(id=machine_id).update(
            state=MachineState.STOPPING,
            rest_at=now or timezone.now(),
            pool_slot=None,
            reason=why[:_MAX_REASON],
            ends_at=None,
            given_up_at=None,
            launched_for=None if machine.reserve_place is not None else F("launched_for"),
        )
        if machine.reserve_place is not None:  # it will be stood in for anew
            Machine.objects.filter(replaces=machine_id).update(replaces=None)
    log.info("machine.stopping", machine=machine_id.hex, reason=why)
    _shut_down(machine, house)
    return True


def _is_free(house: Keeper) -> Q:
    """Up, and nobody's to take away; of the reserve also what we moved everything off to lay it down again."""
    up = Q(state=MachineState.READY, ends_at=None, given_up_at=None)
    n = house.config.spot_reserve
    return up | Q(state=MachineState.DRAINING, given_up_at__isnull=False, reserve_place__lt=n)


def resume_one(
    house: Keeper, organization_id: UUID | None = None, now: datetime | None = None
) -> Machine | None:
    """Start a machine of the reserve; None if none lies there, or none has room in its zone."""
    now, cell = now or timezone.now(), house.cell.keys.cell
    for row in reserve.startable(cell, house.provider.name, house.config.spot_reserve, now):
        if resume(row.id, house, organization_id, now):
            return Machine.objects.get(id=row.id)
    return None


def resume(
    machine_id: UUID, house: Keeper, organization_id: UUID | None = None, now: datetime | None = None
) -> bool:
    """Have a stopped machine started again; False if it is not stopped, the pool has no place, or its zone no room."""
    now = now or timezone.now()
    is_reserve = Machine.objects.filter(id=machine_id, reserve_place__isnull=False).exists()
    free = launch.free_slots(house.cell.keys.cell, house.provider, house.config)
    for slot in [None] if is_reserve else free:
        try:
            with transaction.atomic():
                changed = Machine.objects.filter(id=machine_id, state=MachineState.STOPPED).update(
                    state=MachineState.RESUMING, rest_at=now, pool_slot=slot, launched_for=organization_id
                )
        except IntegrityError:  # somebody took the place
            continue
        if not changed:
            return False
        log.info("machine.resuming", machine=machine_id.hex)
        return _start(Machine.objects.get(id=machine_id), house, now)
    return False


def look(machine_ids: Iterable[str], house: Keeper, now: datetime) -> bool:
    """Whether one of these, which somebody waits for, has stopped by now. Asks the provider, all control workers
    together once in LOOK_EVERY_S at most; what nobody waits for is left to reconcile.
    """
    rows = {
        row.provider_ref: row
        for row in Machine.objects.filter(
            id__in=[UUID(mid) for mid in machine_ids], state=MachineState.STOPPING
        ).exclude(provider_ref="")
    }
    try:
        if not rows or not house.cell.may_look(round(LOOK_EVERY_S * 1000)):
            return False
        listed = house.provider.describe()
    except (ProviderError, redis.RedisError) as error:
        log.warning("machine.not_looked_at", error=type(error).__name__)
        return False
    stopped = [s.ref for s in listed if s.ref in rows and s.state is ProviderState.STOPPED]
    for ref in stopped:
        _arrive(rows[ref], now)
    return bool(stopped)


def follow(row: Machine, seen: ProviderMachine, house: Keeper, now: datetime) -> str:
    """Carry out what its row wants and its provider does not show yet; why the machine is given up, or ''.

    What does not succeed in time is tried no longer: it would be paid for and serve nobody.
    """
    waited_s = 0.0 if row.rest_at is None else (now - row.rest_at).total_seconds()
    is_over = waited_s > house.config.machine_pending_timeout_s
    if row.state in RESTING:
        if seen.state is ProviderState.STOPPED:
            _arrive(row, now)
        elif is_over and row.state == MachineState.STOPPING:  # it still runs, or hangs
            return f"could not be stopped in {waited_s:.0f} s"
        elif seen.state is ProviderState.RUNNING and _settled(row, house, now):
            _shut_down(row, house)
    elif is_over:
        return f"was started again and did not come up in {waited_s:.0f} s"
    elif seen.state is ProviderState.STOPPED and _settled(row, house, now):
        _start(row, house, now)
    return ""


def _settled(row: Machine, house: Keeper, now: datetime) -> bool:
    """The list may be older than the order: asked again only when it no longer can be."""
    return row.rest_at is None or (now - row.rest_at).total_seconds() >= house.provider.lists_after_s


def _shut_down(machine: Machine, house: Keeper) -> None:
    try:
        house.cell.delete_machine(machine.id.hex)
    except redis.RedisError as error:
        log.warning("machine.not_cleaned", machine=machine.id.hex, error=type(error).__name__)
    try:
        house.provider.stop(machine.provider_ref)
    except ProviderError as error:  # reconcile asks again
        log.warning("machine.not_stopped", machine=machine.id.hex, code=error.code, error=str(error))


def _start(machine: Machine, house: Keeper, now: datetime) -> bool:
    try:
        if machine.redis_password_digest:
            house.cell.set_user(machine.id.hex, *machine.password_digests)
        house.provider.start(machine.provider_ref)
    except CapacityError as error:
        log.warning("machine.not_started", machine=machine.id.hex, code=error.code, error=str(error))
        Machine.objects.filter(id=machine.id, state=MachineState.RESUMING).update(
            state=MachineState.STOPPED, rest_at=now, pool_slot=None, reason=f"{NO_ROOM}{error}"[:_MAX_REASON]
        )
        return False
    except (ProviderError, redis.RedisError) as error:  # reconcile asks again
        log.warning("machine.start_delayed", machine=machine.id.hex, error=type(error).__name__)
    return True


def _arrive(row: Machine, now: datetime) -> None:
    stopping = Machine.objects.filter(id=row.id, state=MachineState.STOPPING)
    if stopping.update(state=MachineState.STOPPED):
        log.info("machine.stopped", machine=row.id.hex)
        timings.note_stopped(row, now)
