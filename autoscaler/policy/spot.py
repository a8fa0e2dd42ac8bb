"""Which spot zones to use, how many machines more, and when to pay on-demand instead: pure.

The learned part is a hazard per offer: how often it takes machines back, from the time we held it up and the times it
went (Gamma posterior, so that a zone never seen is neither trusted nor shunned). From it follow three numbers: what a
machine hour there really costs (its price, and what each loss costs in double-paid starts), whether moving back from
on-demand pays before the offer is likely to go again, and how many spares keep the chance of a shortage within the
availability target. A notice orders the replacement at once, before the drain. Differs from SpotHedge (SkyServe,
2411.01438) in that spares and zones are computed, not configured.

Called per tick and on every notice or loss, by the autoscaler and by the simulator with the same objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

PRIOR_LOSSES: Final = 1.0
PRIOR_HELD_H: Final = 2.0  # with the loss above: one in two hours, what V100 zones show at their median
FORGET_H: Final = 72.0  # half-life of what was learned: zones change by the day


@dataclass(frozen=True, slots=True)
class OfferView:
    """Machines of one spot offer (type and zone). `n_leaving` of the ready ones have been told to go."""

    name: str
    usd_per_h: float
    n_pending: int = 0
    n_ready: int = 0
    n_leaving: int = 0
    # Since when it last refused or took back a machine, and since when it has given without either.
    refused_at_s: float | None = None


@dataclass(frozen=True, slots=True)
class FleetView:
    """What is there at one instant. `n_wanted` machines should be ready."""

    now_s: float
    n_wanted: int
    offers: tuple[OfferView, ...]
    on_demand_usd_per_h: float
    n_on_demand_pending: int = 0
    n_on_demand_ready: int = 0


@dataclass(frozen=True, slots=True)
class SpotSpec:
    """How the house buys. `boot_s`: order to first token. `notice_s`: warning before a loss, 0 if none comes."""

    boot_s: float
    notice_s: float
    availability: float = 0.999
    max_spares: int = 4
    retry_s: float = 60.0  # an offer that refused is asked again after this long
    max_orders: int = 64  # per call

    def __post_init__(self) -> None:
        if not 0 < self.availability < 1:
            raise ValueError(f"availability = {self.availability}: must lie between 0 and 1")
        if self.boot_s < 0 or self.notice_s < 0:
            raise ValueError("boot_s and notice_s must not be negative")


@dataclass(frozen=True, slots=True)
class Learned:
    """What one offer taught: losses (all machines that go together count once) and hours held, both fading."""

    n_losses: float = 0.0
    held_h: float = 0.0
    up_since_s: float | None = None

    @property
    def losses_per_h(self) -> float:
        return (self.n_losses + PRIOR_LOSSES) / (self.held_h + PRIOR_HELD_H)


@dataclass(frozen=True, slots=True)
class SpotMemory:
    at_s: float | None = None
    offers: Mapping[str, Learned] = field(default_factory=dict)
    leaving: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Orders:
    """What to buy and to give back. Offers in order of preference; a refusal is tried on the next by the caller, or
    seen as `refused_at_s` by the next call."""

    launch: tuple[tuple[str, int], ...] = ()
    release: tuple[tuple[str, int], ...] = ()
    launch_on_demand: int = 0
    release_on_demand: int = 0
    # Of those that have not become ready: machines that nobody waits for any more.
    cancel: tuple[tuple[str, int], ...] = ()
    cancel_on_demand: int = 0
    reasons: tuple[str, ...] = ()


def buy(view: FleetView, spec: SpotSpec, memory: SpotMemory) -> tuple[Orders, SpotMemory]:
    """Orders for this instant, and what to remember."""
    memory = learn(view, memory)
    now_s = view.now_s
    held = {o.name: o.n_pending + o.n_ready - o.n_leaving for o in view.offers}
    n_ready = sum(o.n_ready for o in view.offers)
    n_staying_ready = sum(o.n_ready - o.n_leaving for o in view.offers)
    n_spot = sum(held.values())
    ranked = sorted(view.offers, key=lambda o: (effective_usd_per_h(o, view, spec, memory), o.name))
    usable = [o for o in ranked if _may_ask(o, now_s, spec)]
    worth = [o for o in usable if effective_usd_per_h(o, view, spec, memory) < view.on_demand_usd_per_h]
    n_spares = spares(held, spec, memory) if view.n_wanted else 0
    if worth:  # spares that cost more than spot saves would make on-demand the cheaper house
        saved = view.on_demand_usd_per_h / max(worth[0].usd_per_h, 1e-9) - 1
        n_spares = min(n_spares, int(view.n_wanted * saved))
    reasons = [f"{view.n_wanted} wanted, {n_spares} spare"]

    # 1. Spot up to what is wanted and spare, best offer first, spread so far as the spares need it.
    n_missing = view.n_wanted + n_spares - n_spot
    launch: dict[str, int] = {}
    if n_missing > 0 and worth:
        share = _share_limit(view.n_wanted, n_spares, spec)
        for offer in worth:
            if n_missing <= 0:
                break
            n = min(n_missing, max(share - held[offer.name], 0), spec.max_orders)
            if n:
                launch[offer.name] = n
                n_missing -= n
        if n_missing > 0:  # fewer offers than the spread would like
            launch[worth[0].name] = launch.get(worth[0].name, 0) + n_missing
        reasons.append("spot: " + ", ".join(f"{name} +{n}" for name, n in launch.items()))

    # 2. On-demand for what will not be ready in time: nothing to buy, or starting and not there.
    n_will_be = n_staying_ready + sum(o.n_pending for o in view.offers)
    n_on_demand = view.n_on_demand_ready + view.n_on_demand_pending
    n_uncovered = view.n_wanted - n_will_be - n_on_demand - sum(launch.values())
    launch_on_demand = min(max(n_uncovered, 0), spec.max_orders)
    if launch_on_demand:
        reasons.append(f"on-demand +{launch_on_demand}: no spot offer to be had")

    # 3. Give back what is more than wanted once it is ready: on-demand first, then the worst offer.
    n_over = n_staying_ready + view.n_on_demand_ready - view.n_wanted - n_spares
    release_on_demand = 0
    if view.n_on_demand_ready:
        release_on_demand = min(
            view.n_on_demand_ready, max(n_staying_ready + view.n_on_demand_ready - view.n_wanted, 0)
        )
        n_over -= release_on_demand
    # What is ready suffices: cover that still starts would come too late to be of use.
    n_spare_ready = n_staying_ready + view.n_on_demand_ready - release_on_demand - view.n_wanted
    cancel_on_demand = view.n_on_demand_pending if n_spare_ready >= 0 and not launch_on_demand else 0
    cancel: dict[str, int] = {}
    release: dict[str, int] = {}
    n_surplus = n_spot - view.n_wanted - n_spares
    for offer in reversed(ranked):
        n = min(offer.n_pending, n_surplus)
        if n > 0 and n_staying_ready >= view.n_wanted:
            cancel[offer.name] = n
            n_surplus -= n
    for offer in reversed(ranked):
        if n_surplus <= 0 or n_over <= 0:
            break
        n = min(offer.n_ready - offer.n_leaving, n_surplus, n_over)
        if n > 0:
            release[offer.name] = n
            n_surplus -= n
            n_over -= n
    if release:
        reasons.append("released: " + ", ".join(f"{name} -{n}" for name, n in release.items()))
    assert n_ready >= 0
    return (
        Orders(
            tuple(launch.items()),
            tuple(release.items()),
            launch_on_demand,
            release_on_demand,
            tuple(cancel.items()),
            cancel_on_demand,
            tuple(reasons),
        ),
        memory,
    )


def learn(view: FleetView, memory: SpotMemory) -> SpotMemory:
    """Fade, then add the time held since the last look and the losses announced since."""
    passed_h = 0.0 if memory.at_s is None else max(view.now_s - memory.at_s, 0.0) / 3600
    keep = 0.5 ** (passed_h / FORGET_H)
    offers: dict[str, Learned] = {}
    for offer in view.offers:
        known = memory.offers.get(offer.name, Learned())
        n_losses, held_h = known.n_losses * keep, known.held_h * keep
        if offer.n_ready + offer.n_pending:
            held_h += passed_h
        was_leaving = memory.leaving.get(offer.name, 0)
        is_lost = offer.n_leaving > was_leaving
        if is_lost and not was_leaving:
            n_losses += 1
        gives = offer.n_ready - offer.n_leaving > 0
        up_since_s = (known.up_since_s if known.up_since_s is not None else view.now_s) if gives else None
        offers[offer.name] = Learned(n_losses, held_h, up_since_s)
    leaving = {o.name: o.n_leaving for o in view.offers}
    return replace(memory, at_s=view.now_s, offers=offers, leaving=leaving)


def effective_usd_per_h(offer: OfferView, view: FleetView, spec: SpotSpec, memory: SpotMemory) -> float:
    """Price of a machine hour that serves: each loss pays a start twice, and the time without notice on-demand."""
    losses_per_h = memory.offers.get(offer.name, Learned()).losses_per_h
    boot_h = spec.boot_s / 3600
    uncovered_h = max(spec.boot_s - spec.notice_s, 0.0) / 3600
    return (
        offer.usd_per_h * (1 + losses_per_h * boot_h) + view.on_demand_usd_per_h * losses_per_h * uncovered_h
    )


def spares(held: Mapping[str, int], spec: SpotSpec, memory: SpotMemory) -> int:
    """Machines more than wanted, so that the expected time in shortage stays within the availability target.

    A loss leaves a gap of boot_s - notice_s, as large as what the offer held. Notice that comes in time needs none.
    """
    gap_h = max(spec.boot_s - spec.notice_s, 0.0) / 3600
    if gap_h == 0:
        return 0
    gaps = sorted(
        ((n, memory.offers.get(name, Learned()).losses_per_h * gap_h) for name, n in held.items() if n),
        reverse=True,
    )
    for n_spares in range(spec.max_spares):
        shortage = sum(share for n, share in gaps if n > n_spares)
        if shortage <= 1 - spec.availability:
            return n_spares
    return spec.max_spares


def _share_limit(n_wanted: int, n_spares: int, spec: SpotSpec) -> int:
    """Most machines of one offer: what the spares can stand in for, or everything where notice suffices."""
    if spec.notice_s >= spec.boot_s:
        return n_wanted + n_spares
    return max(n_spares, -(-n_wanted // 3))


def _may_ask(offer: OfferView, now_s: float, spec: SpotSpec) -> bool:
    if offer.n_leaving:
        return False
    return offer.refused_at_s is None or now_s - offer.refused_at_s >= spec.retry_s
