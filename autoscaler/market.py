"""The market a pool buys from: prices as rows, refusals remembered with back-off, the plan for the next machine.

Called by launch.py (plan, refusals) and by the task that refreshes prices. Decides nothing itself: policy/market.py
does. A provider with one kind of machine only (the local one) has no offers, and its plans are empty.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from types import MappingProxyType
from uuid import UUID

import structlog
from django.db.models import F
from django.utils import timezone

from autoscaler import gpuwork, pooldecisions, reserve, timings
from autoscaler.codec import CodecError, from_json
from autoscaler.config import AutoscalerConfig
from autoscaler.models import Machine, MachineState, Offer, PoolDecisionKind, PoolState
from autoscaler.policy import alternatives
from autoscaler.policy.market import LaunchPlan, OnDemandOffer, Purchase, backoff_s, one_more
from autoscaler.policy.poolplan import PoolMemory
from autoscaler.policy.poolrest import NOTHING, WARM
from autoscaler.policy.sizes import Scale, places
from autoscaler.policy.spot import FleetView, Learned, OfferView, SpotMemory, SpotSpec
from controlplane.deployments.models import Deployment
from infra.providers.base import Offering, Provider, Refusal

log = structlog.get_logger("corral.autoscaler")

STALE_AFTER = timedelta(minutes=30)  # an offer that the provider has not listed for so long is not bought
NANO = 1e9
NO_WORK: Mapping[str, float] = MappingProxyType({})
# What happens without a price: a pool of on-demand only has no on-demand price to beat.
_NO_PRICE_USD = 1e6


def refresh(provider: Provider, cell: str, now: datetime | None = None) -> int:
    """Write what the provider sells now; how many offers. What it no longer lists goes stale by itself."""
    now = now or timezone.now()
    offerings = provider.offerings()
    Offer.objects.bulk_create(
        [
            Offer(
                cell=cell,
                provider=provider.name,
                name=o.name,
                instance_type=o.instance_type,
                zone=o.zone,
                is_spot=o.is_spot,
                gpu=o.gpu,
                n_gpus=o.n_gpus,
                price_nano_per_h=o.price_nano_per_h,
                priced_at=now,
            )
            for o in offerings
        ],
        update_conflicts=True,
        unique_fields=["cell", "provider", "name"],
        update_fields=["price_nano_per_h", "priced_at", "gpu", "n_gpus"],
    )
    return len(offerings)


def plan(
    provider: Provider,
    config: AutoscalerConfig,
    cell: str,
    now: datetime | None = None,
    command_id: UUID | None = None,
    n_replicas: int = 1,
    deployment: Deployment | None = None,
) -> LaunchPlan | None:
    """What the next machine of this pool may be, for so many replicas without room; None where the provider has one
    kind only. Of a deployment: at what its requests cost on each kind of GPU.

    With the command that orders it the decision is kept.
    """
    now = now or timezone.now()
    offers = fresh(provider, cell, now)
    if not offers and refresh(provider, cell, now):
        offers = fresh(provider, cell, now)
    if not offers:
        return None
    offers = usable(offers, config)
    if not offers:
        return LaunchPlan((), (f"nothing on sale holds a replica that runs on {config.accelerator}",))
    spec, scale = spot_spec(config), scale_of(offers, config)
    n_missing = scale.needed(n_replicas)
    work = {}
    if deployment is not None and config.need.gpu:
        known = gpuwork.replicas_for_the_same(deployment, {o.gpu for o in offers}, config.need, now)
        work = {gpu: n for gpu, n in known.items() if math.isfinite(n)}
        able = [o for o in offers if o.gpu in work]
        offers, work = (able, work) if able else (offers, {})
    state, _ = PoolState.objects.get_or_create(cell=cell, provider=provider.name)
    view = fleet_view(offers, cell, provider.name, spec, now, scale, n_missing, work, config.spot_reserve)
    view = one_more(view, n_missing)
    on_demand = on_demand_offers(offers, scale, n_missing, work)
    purchase = Purchase(
        view, on_demand, spec, memory_from(state.memory), config.spot, scale, n_replicas, work
    )
    chosen, memory = purchase.plan()
    if command_id is not None:
        pooldecisions.keep(
            PoolDecisionKind.PURCHASE,
            cell=cell,
            provider=provider.name,
            inputs=purchase,
            outcome=chosen,
            alternatives=alternatives.of_purchase(purchase, chosen),
            reasons=chosen.reasons,
            now=now,
            command_id=command_id,
        )
    # Somebody else planned meanwhile: they have learned the same.
    PoolState.objects.filter(pk=state.pk, version=state.version).update(
        memory=memory_to(memory), version=F("version") + 1
    )
    return chosen


def spot_spec(config: AutoscalerConfig) -> SpotSpec:
    """How this house buys: with a reserve of stopped machines by what starting one took so far."""
    spec = SpotSpec(boot_s=config.machine_boot_s, notice_s=config.spot_notice_s)
    if not config.spot_reserve:
        return spec
    resume_s = timings.usual_resume_s(config.provider)
    if resume_s is None:
        return replace(spec, resume_s=config.machine_boot_s * timings.UNKNOWN_RESUME_RATIO)
    return replace(spec, resume_s=resume_s + timings.usual_start_s(config.provider))


def places_of(offer: Offer, config: AutoscalerConfig) -> int:
    """Replicas that a machine of it holds; 0: none runs there."""
    return places(config.need, offer.gpu, offer.n_gpus, config.replicas_per_machine)


def usable(offers: Iterable[Offer], config: AutoscalerConfig) -> list[Offer]:
    """Those that hold a replica."""
    return [o for o in offers if places_of(o, config)]


def scale_of(offers: Iterable[Offer], config: AutoscalerConfig) -> Scale:
    """Of usable offers: what policies count them in."""
    return Scale.of({o.name: places_of(o, config) for o in offers})


def least_places(names: Iterable[str], cell: str, provider: str, config: AutoscalerConfig) -> int:
    """What a machine holds at least that may be any of these; 0 where its GPUs do not say."""
    if not config.need.gpu:
        return 0
    offers = Offer.objects.filter(cell=cell, provider=provider, name__in=list(names))
    return min((places_of(o, config) for o in offers), default=0)


def on_demand_offers(
    offers: Iterable[Offer], scale: Scale, n_missing: int, work: Mapping[str, float] = NO_WORK
) -> tuple[OnDemandOffer, ...]:
    """Those that are not taken back, as the policy sees them: at the price of a unit that is used."""
    return tuple(
        OnDemandOffer(
            o.name,
            o.price_nano_per_h / NANO / scale.useful(o.name, n_missing) * work.get(o.gpu, 1.0),
            o.refused_until.timestamp() if o.refused_until else None,
        )
        for o in offers
        if not o.is_spot
    )


def fleet_view(
    offers: Iterable[Offer],
    cell: str,
    provider: str,
    spec: SpotSpec,
    now: datetime,
    scale: Scale,
    n_used: int,
    work: Mapping[str, float] = NO_WORK,
    n_reserve: int = 0,
) -> FleetView:
    """The pool as the buying policy sees it, without machines that we give up, in units of the scale. Prices are those
    of a unit where so many would be used, and of the work that one does on the GPU it needs. `n_wanted` is left 0.
    Of the reserve (of `n_reserve`) counts what lies stopped, and as on-demand what was started again.
    """
    rows = (
        Machine.objects.filter(cell=cell, provider=provider, given_up_at=None)
        .exclude(state__in=(MachineState.GONE, MachineState.STOPPING, MachineState.STOPPED))
        .exclude(reserve.FILLING_Q)
    )
    pending: Counter[str] = Counter()
    ready: Counter[str] = Counter()
    leaving: Counter[str] = Counter()
    for row in rows.only("offering", "state", "ends_at", "launch_plan", "ready_at"):
        name = row.offering or next(iter(row.launch_plan), "")
        if row.ready_at is None or row.state == MachineState.RESUMING:
            pending[name] += 1
        else:
            ready[name] += 1
            leaving[name] += row.ends_at is not None
    known = list(offers)
    fixed = [o for o in known if not o.is_spot]

    def usd_per_h(o: Offer) -> float:
        return o.price_nano_per_h / NANO / scale.useful(o.name, n_used) * work.get(o.gpu, 1.0)

    return FleetView(
        now_s=now.timestamp(),
        n_wanted=0,
        offers=tuple(
            OfferView(
                o.name,
                usd_per_h(o),
                pending[o.name] * scale.units(o.name),
                ready[o.name] * scale.units(o.name),
                leaving[o.name] * scale.units(o.name),
                # The policy counts a fixed time from a refusal; ours grows with their number.
                o.refused_until.timestamp() - spec.retry_s if o.refused_until else None,
            )
            for o in known
            if o.is_spot
        ),
        on_demand_usd_per_h=min((usd_per_h(o) for o in fixed), default=_NO_PRICE_USD),
        n_on_demand_pending=sum(pending[o.name] * scale.units(o.name) for o in fixed),
        n_on_demand_ready=sum(ready[o.name] * scale.units(o.name) for o in fixed),
        n_stopped=reserve.n_stopped(cell, provider, n_reserve, scale, now) if n_reserve else 0,
    )


def offerings_of(names: Iterable[str], cell: str, provider: str) -> tuple[Offering, ...]:
    """The offers of a stored plan, in its order; one that is not listed any more is bought all the same."""
    prices = dict(
        Offer.objects.filter(cell=cell, provider=provider, name__in=list(names)).values_list(
            "name", "price_nano_per_h"
        )
    )
    found = []
    for name in names:
        kind, zone, instance_type = name.split("/", 2)
        found.append(
            Offering(
                instance_type=instance_type,
                zone=zone,
                is_spot=kind == "spot",
                price_nano_per_h=prices.get(name, 0),
            )
        )
    return tuple(found)


def price_nano_per_h(name: str, cell: str, provider: str) -> int:
    """Of an offer as last listed; 0 for none."""
    found = Offer.objects.filter(cell=cell, provider=provider, name=name).values_list(
        "price_nano_per_h", flat=True
    )
    return found.first() or 0


def replica_usd_per_h(config: AutoscalerConfig, cell: str, now: datetime) -> float:
    """A replica's share of one more machine: of the cheapest on-demand offer for it, else of any; as configured where
    nothing is on sale."""
    rows = Offer.objects.filter(cell=cell, provider=config.provider, priced_at__gt=now - STALE_AFTER)
    prices = [(o.is_spot, o.price_nano_per_h / places_of(o, config)) for o in usable(rows, config)]
    nano = min(prices)[1] if prices else config.machine_nano_per_h / config.replicas_per_machine
    return nano / NANO


def n_gpus(name: str, cell: str, provider: str) -> int:
    """Of an offer as last listed; 0 for none."""
    found = Offer.objects.filter(cell=cell, provider=provider, name=name)
    return found.values_list("n_gpus", flat=True).first() or 0


def kept_warm(config: AutoscalerConfig, cell: str, provider: str) -> tuple[int, float]:
    """(empty machines that stay however long they are empty, seconds that the others are kept), by the pool's last
    turn: its spares; and while it has no work, what the warm ladder says."""
    found = (
        PoolState.objects.filter(cell=cell, provider=provider).values_list("pool_memory", flat=True).first()
    )
    memory = pool_memory_from(found or {})
    if memory.rest.rung == NOTHING:
        return 0, 0.0
    return max(memory.n_spares, int(memory.rest.rung == WARM)), config.machine_keep_warm_s


def pool_memory_from(stored: Mapping[str, object]) -> PoolMemory:
    """An empty memory for what is not one."""
    try:
        return from_json(PoolMemory, stored)
    except CodecError:
        return PoolMemory()


def note_refusals(refusals: Iterable[Refusal], cell: str, provider: str, now: datetime | None = None) -> None:
    """These offers had nothing: they are left alone for a while, longer each time."""
    now = now or timezone.now()
    for refusal in refusals:
        offer = Offer.objects.filter(cell=cell, provider=provider, name=refusal.offering).first()
        if offer is None:
            continue
        until = now + timedelta(seconds=backoff_s(offer.n_refusals + 1))
        # Two ticks that were refused at once count as one.
        changed = Offer.objects.filter(pk=offer.pk, n_refusals=offer.n_refusals).update(
            n_refusals=F("n_refusals") + 1,
            refused_at=now,
            refused_until=until,
            refusal_code=refusal.code[:80],
        )
        if changed:
            log.warning("offer.refused", offer=refusal.offering, code=refusal.code, until=until.isoformat())


def note_taken_back(machine: Machine, now: datetime) -> None:
    """A spot machine went without a word, and its offer is left alone as if it had refused: as in the simulator, that
    is how the policy sees a loss that nobody announced, and that what was lost is to be stood in for."""
    if machine.ready_at is None or machine.ends_at is not None or not machine.offering.startswith("spot/"):
        return
    note_refusals((Refusal(machine.offering, "TakenBack"),), machine.cell, machine.provider, now)


def note_given(name: str, cell: str, provider: str) -> None:
    """This offer gave a machine: what it refused before is forgotten."""
    Offer.objects.filter(cell=cell, provider=provider, name=name).exclude(n_refusals=0).update(
        n_refusals=0, refused_until=None
    )


def memory_to(memory: SpotMemory) -> dict[str, object]:
    """JSON form of what the policy learned."""
    return {
        "at_s": memory.at_s,
        "offers": {
            name: [learned.n_losses, learned.held_h, learned.up_since_s, learned.n_usual]
            for name, learned in memory.offers.items()
        },
        "leaving": dict(memory.leaving),
        "ready": dict(memory.ready),
        "lost_at_s": memory.lost_at_s,
    }


def memory_from(stored: Mapping[str, object]) -> SpotMemory:
    """Of `memory_to`; an empty memory for what is not one, since a forgotten hazard costs little."""
    try:
        offers = {name: Learned(*values) for name, values in dict(stored["offers"]).items()}  # type: ignore[call-overload]
        return SpotMemory(
            stored["at_s"],  # type: ignore[arg-type]
            offers,
            dict(stored["leaving"]),  # type: ignore[call-overload]
            dict(stored.get("ready") or {}),  # type: ignore[call-overload]
            stored.get("lost_at_s"),  # type: ignore[arg-type]
        )
    except (KeyError, TypeError, ValueError):
        return SpotMemory()


def fresh(provider: Provider, cell: str, now: datetime) -> list[Offer]:
    """Offers that the provider listed lately, by name."""
    rows = Offer.objects.filter(cell=cell, provider=provider.name, priced_at__gt=now - STALE_AFTER)
    return list(rows.order_by("name"))
