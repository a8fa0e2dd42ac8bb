"""One turn of the pool: observe its machines and the market, plan, store, act. Beside the deployments' own ticks.

Called by a task every few seconds. It buys what stands in for on-demand machines or lies ready as a spare, and gives up
what is not needed; deployments order their growth themselves. Several callers at once are fine: one of them writes the
pool's memory and acts. A provider with one kind of machine and no price has nothing to weigh.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

import redis
import structlog
from django.db.models import Count, F, Max
from django.utils import timezone

from autoscaler import launch, market, pooldecisions, prefetch, reserve, stopping, timings
from autoscaler.codec import to_json
from autoscaler.config import AutoscalerConfig
from autoscaler.models import (
    LIVE_PHASES,
    Machine,
    MachineState,
    Offer,
    PoolDecision,
    PoolDecisionKind,
    PoolState,
    Replica,
    ReplicaPhase,
)
from autoscaler.observe import LIVE_Q, capacity, startable
from autoscaler.policy import alternatives
from autoscaler.policy.disruption import Budget, Buyable, Held, Thrift
from autoscaler.policy.ident import command_id
from autoscaler.policy.ladder import Rung, Stakes
from autoscaler.policy.poolplan import PoolInputs, PoolMachine, PoolOrders, Stopped, plan_pool
from autoscaler.policy.poolrest import NOTHING, STOPPED, WARM, RestInputs
from autoscaler.policy.reserve import ReserveInputs
from autoscaler.policy.sizes import Scale
from autoscaler.policy.spot import FleetView, SpotMemory, SpotSpec, effective_usd_per_h
from autoscaler.tick import House
from controlplane.deployments.models import Deployment
from infra.providers.base import ProviderError

log = structlog.get_logger("corral.autoscaler")

_MAX_ALTERNATIVES: Final = 6  # offers asked for one machine of the pool's own


def turn(house: House, now: datetime | None = None) -> set[UUID]:
    """One turn; the deployments to tick, because they have replicas on a machine that is given up."""
    now = now or timezone.now()
    cell, provider = house.cell.keys.cell, house.provider.name
    offers = market.usable(market.fresh(house.provider, cell, now), house.config)
    if not offers:
        return set()
    state, _ = PoolState.objects.get_or_create(cell=cell, provider=provider)
    inputs = observe(house, offers, state, now)
    orders, learned, memory = plan_pool(inputs)
    kept = PoolState.objects.filter(pk=state.pk, version=state.version).update(
        memory=market.memory_to(learned), pool_memory=to_json(memory), version=F("version") + 1
    )
    if not kept or orders.is_quiet:  # somebody else has just looked; or there is nothing to do
        return set()
    row = pooldecisions.keep(
        PoolDecisionKind.POOL,
        cell=cell,
        provider=provider,
        inputs=inputs,
        outcome=orders,
        alternatives=alternatives.of_pool(inputs, orders),
        reasons=orders.reasons,
        now=now,
    )
    return _act(row, orders, inputs, house, now)


def observe(house: House, offers: list[Offer], state: PoolState, now: datetime) -> PoolInputs:
    """The pool as plan_pool() takes it. Reads only."""
    config, cell = house.config, house.cell.keys.cell
    spec, scale = market.spot_spec(config), market.scale_of(offers, config)
    learned = market.memory_from(state.memory)
    all_rows = (
        Machine.objects.filter(cell=cell, provider=house.provider.name)
        .exclude(state__in=(MachineState.GONE, *stopping.RESTING))
        .annotate(n_live=Count("replicas", filter=LIVE_Q))
        .order_by("id")
    )
    rows = [row for row in all_rows if row.given_up_at is None and not reserve.is_filling(row)]
    by_name = {o.name: o for o in offers}
    stopped = _stopped(house, now)
    n_stopping = Machine.objects.filter(
        cell=cell, provider=house.provider.name, state=MachineState.STOPPING, reserve_place=None
    ).count()
    can = house.config.stopped_nano_per_h > 0
    may_stop = tuple(
        row.id.hex
        for row in rows
        if can and row.reserve_place is None and stopping.may_stop(row, house.provider)
    )
    machines = tuple(_machine(row, by_name, house) for row in rows)
    n_wanted = sum(scale.needed(m.held.n_replicas) for m in machines if not m.held.is_leaving)
    view = market.fleet_view(
        offers, cell, house.provider.name, spec, now, scale, n_wanted, n_reserve=config.spot_reserve
    )
    view = replace(view, n_wanted=n_wanted)
    buyable = tuple(
        Buyable(
            name=o.name,
            usd_per_h=_price(o, view, spec, learned, scale),
            n_places=scale.places[o.name],
            fits=_fits(o, config),
        )
        for o in offers
        if (config.spot or not o.is_spot) and (o.refused_until is None or o.refused_until <= now)
    )
    return PoolInputs(
        view=view,
        machines=machines,
        offers=buyable,
        spec=spec,
        learned=learned,
        budget=Budget(max_share=config.disruption_share, max_per_window=config.disruptions_per_h),
        thrift=Thrift(),
        memory=market.pool_memory_from(state.pool_memory),
        n_room=config.max_machines - sum(1 for row in all_rows if row.pool_slot is not None),
        max_spares=config.max_spares,
        cover=_cover([o for o in buyable if not by_name[o.name].is_spot], scale, n_wanted),
        spot=config.spot,
        # What serves on a machine that is given up is work all the same.
        rest=_rest(
            house,
            sum(row.n_live for row in all_rows),
            machines,
            buyable,
            bool(may_stop or stopped or n_stopping),
        ),
        stopped=stopped,
        n_stopping=n_stopping,
        may_stop=may_stop,
        scale=scale,
        reserve=_reserve(house, now),
    )


def _reserve(house: House, now: datetime) -> ReserveInputs:
    """What there is of it. While Redis is away nobody knows what lies on a disk."""
    cell, provider = house.cell.keys.cell, house.provider
    rows = reserve.rows(cell, provider.name)
    n = house.config.spot_reserve if provider.stops else 0
    up = [row.id.hex for row in rows if row.state == MachineState.READY]
    filled: frozenset[str] = frozenset()
    try:
        filled = prefetch.filled(up, house.cell, now) if up else filled
    except redis.RedisError as error:
        log.warning("pool.redis_away", error=type(error).__name__)
    return ReserveInputs(n, tuple(reserve.member(row, row.id.hex in filled, now) for row in rows))


def _cover(fixed: list[Buyable], scale: Scale, n_wanted: int) -> str:
    """What is not taken back at the least for each unit that is used; '' where nothing is sold."""
    return min(((o.usd_per_h / scale.useful(o.name, n_wanted), o.name) for o in fixed), default=(0.0, ""))[1]


def _stopped(house: House, now: datetime) -> tuple[Stopped, ...]:
    cell, provider = house.cell.keys.cell, house.provider.name
    usable = startable(house.config, cell, now)
    rows = Machine.objects.filter(
        cell=cell, provider=provider, state=MachineState.STOPPED, reserve_place=None
    ).order_by("id")
    return tuple(
        Stopped(row.id.hex, (now - (row.rest_at or now)).total_seconds(), row.id.hex in usable)
        for row in rows
    )


def _rest(
    house: House,
    n_live: int,
    machines: tuple[PoolMachine, ...],
    offers: tuple[Buyable, ...],
    may_stop: bool,
) -> RestInputs:
    """The rungs of this pool at their prices of now, and what waking from them takes by what starts took before."""
    config, provider = house.config, house.provider.name
    ended = Replica.objects.filter(machine__provider=provider, machine__cell=house.cell.keys.cell)
    slept = ended.filter(phase=ReplicaPhase.SLEEPING).aggregate(last=Max("phase_at"))["last"]
    ends = [each for each in (ended.aggregate(last=Max("stopped_at"))["last"], slept) if each is not None]
    emptied_at = None if n_live else max(ends, default=None)
    prices = [m.held.usd_per_h for m in machines] or [o.usd_per_h for o in offers]
    rungs: tuple[Rung, ...] = ()
    is_wanted = Deployment.objects.filter(
        cell=house.cell.keys.cell, deleted_at=None, max_replicas__gt=0
    ).exists()
    if config.warm_ladder and is_wanted and prices and min(prices) > 0:
        start_s, boot_s = timings.usual_start_s(provider), timings.usual_boot_s(provider)
        boot_s = max(config.machine_boot_s - start_s, 0.0) if boot_s is None else boot_s
        rungs = (Rung(WARM, min(prices), start_s), Rung(NOTHING, 0.0, boot_s + start_s))
        if may_stop:
            resume_s = timings.usual_resume_s(provider)
            resume_s = boot_s * timings.UNKNOWN_RESUME_RATIO if resume_s is None else resume_s
            usd_per_h = config.stopped_nano_per_h / market.NANO
            rungs = (rungs[0], Rung(STOPPED, usd_per_h, resume_s + start_s), rungs[1])
    stakes = Stakes(config.late_after_s, config.late_usd, config.late_usd_per_s, min(prices, default=0.0))
    return RestInputs(n_live, None if emptied_at is None else emptied_at.timestamp(), rungs, stakes)


def _machine(row: Machine, by_name: dict[str, Offer], house: House) -> PoolMachine:
    name = row.offering or next(iter(row.launch_plan), "")
    offer = by_name.get(name)
    usd_per_h = (row.price_nano_per_h if offer is None else offer.price_nano_per_h) / market.NANO
    n_live: int = row.n_live  # type: ignore[attr-defined]
    held = Held(
        id=row.id.hex,
        usd_per_h=usd_per_h,
        n_replicas=n_live,
        n_places=capacity(row, house.config),
        fits="" if offer is None else _fits(offer, house.config),
        is_ready=row.state in (MachineState.READY, MachineState.DRAINING),
        is_leaving=row.state == MachineState.DRAINING,
        # A start is paid for twice, at the price of its place.
        move_usd=n_live * house.config.machine_boot_s / 3600 * usd_per_h,
        replaces="" if row.replaces is None else row.replaces.hex,
    )
    return PoolMachine(held, name, name.startswith("spot/"))


def _price(offer: Offer, view: FleetView, spec: SpotSpec, learned: SpotMemory, scale: Scale) -> float:
    """Of a machine, with what losses cost, for spot."""
    for each in view.offers:
        if each.name == offer.name:
            usd_per_h = effective_usd_per_h(each, view, spec, learned)
            return usd_per_h * scale.useful(offer.name, view.n_wanted)
    return offer.price_nano_per_h / market.NANO


def _fits(offer: Offer, config: AutoscalerConfig) -> str:
    """Replicas move between all machines that hold one by their GPUs; where nobody says what a replica needs, between
    those with the same GPUs, or without any, within one type."""
    if config.need.gpu:
        return config.accelerator
    return f"{offer.n_gpus}x{offer.gpu}" if offer.n_gpus else offer.instance_type


# -- acting


def _act(row: PoolDecision, orders: PoolOrders, inputs: PoolInputs, house: House, now: datetime) -> set[UUID]:
    by_price = sorted(inputs.offers, key=lambda o: (o.usd_per_h, o.name))
    spot = {o.name: o.n_places for o in by_price if o.name.startswith("spot/")}
    n_replicas = {m.held.id: m.held.n_replicas for m in inputs.machines}
    for number, wanted in enumerate(orders.buy):
        n_least = n_replicas.get(wanted.replaces, spot.get(wanted.offer, 0))
        others = [name for name, n in spot.items() if name != wanted.offer and n >= n_least]
        others = others if wanted.offer in spot else []
        stand_in = launch.StandIn(
            (wanted.offer, *others[: _MAX_ALTERNATIVES - 1]),
            UUID(hex=wanted.replaces) if wanted.replaces else None,
            wanted.reserve_place,
        )
        token = UUID(hex=command_id(str(row), number, "buy"))
        try:
            launch.launch(token, house.provider, house.config, house.cell, None, stand_in)
        except ProviderError as error:
            log.warning("pool.not_bought", offer=wanted.offer, code=error.code, error=str(error))
    touched: set[UUID] = set()
    for each in orders.give_up:
        touched |= give_up(UUID(hex=each.machine_id), each.why, house, now)
    keeper = stopping.Keeper(house.config, house.provider, house.cell)
    for each in orders.stop:
        stopping.stop(UUID(hex=each.machine_id), each.why, keeper, now)
    for machine_id in orders.start:
        stopping.resume(UUID(hex=machine_id), keeper, now=now)
    for each in orders.end:
        launch.terminate(UUID(hex=each.machine_id), each.why, house.provider, house.cell)
    for each in orders.cancel:
        launch.terminate(UUID(hex=each.machine_id), each.why, house.provider, house.cell)
    log.info(
        "pool.turn",
        decision=str(row),
        n_bought=len(orders.buy),
        n_given_up=len(orders.give_up),
        n_cancelled=len(orders.cancel),
        reasons=orders.reasons,
    )
    return touched


def give_up(machine_id: UUID, why: str, house: House, now: datetime) -> set[UUID]:
    """Nothing new is placed on it and its replicas move, as if its provider had given notice; reconcile ends it when it
    is empty. Answers the deployments that have to move; empty if somebody else did something with it.
    """
    changed = Machine.objects.filter(id=machine_id, state=MachineState.READY, given_up_at=None).update(
        state=MachineState.DRAINING,
        given_up_at=now,
        ends_at=now + timedelta(seconds=house.config.give_up_grace_s),
        pool_slot=None,
        reason=f"given up: {why}"[:500],
    )
    if not changed:
        return set()
    log.info("machine.given_up", machine=machine_id.hex, reason=why)
    live = Replica.objects.filter(machine_id=machine_id, phase__in=LIVE_PHASES)
    return set(live.values_list("deployment_id", flat=True))
