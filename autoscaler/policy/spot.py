"""Which spot zones to use, how many machines more, and when to pay on-demand instead: pure.

The learned part is a hazard per offer. What has held for long goes on holding: the usual hazard falls with the time an
offer has been up, and each offer's own losses say how much worse or better than usual it is (Gamma posterior, so that
one never seen is neither trusted nor shunned). From it follow what a machine hour there really costs (its price, and
what each loss costs in double-paid starts) and the share of time that its losses leave a gap; cover.py makes a shape of
the fleet out of these. A notice orders the replacement at once, before the drain. Differs from SpotHedge (SkyServe,
2411.01438) in that spares and zones are computed, not configured.

Called per tick and on every notice or loss, by the autoscaler and by the simulator with the same objects.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from autoscaler.policy.cover import Choice, shape

# Maximum likelihood over the recorded zones of 2022 and of preemption files (15 zones; those of 2023-02, which the
# tables report, give 1.24 and 1.0 h). Zones differ from it by factors of 0.6 to 1.8.
USUAL_LOSSES: Final = 1.25
USUAL_YOUNG_H: Final = 0.85
# How far ahead an offer is judged: by the next minutes alone, every offer is too young to be used at first.
AHEAD_H: Final = 6.0
# What kept 99.9 % on 50 windows of the V100 zones that no other table reports, at gaps of one to three minutes
# (`manage.py study spot-cover` tells the fit).
SHORTAGE_WORTH: Final = 100.0
PRIOR_LOSSES: Final = 4.0  # so many losses weigh as much as what is usual
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
    n_stopped: int = 0  # on-demand machines that lie stopped, those ordered first


@dataclass(frozen=True, slots=True)
class SpotSpec:
    """How the house buys. `boot_s`: order to first token. `notice_s`: warning before a loss, 0 if none comes.
    `resume_s`: order to first token of a machine that lies stopped; None: as long as a boot."""

    boot_s: float
    notice_s: float
    availability: float = 0.999
    # An hour in shortage, in hours of the whole fleet on-demand; None: what keeps the availability.
    worth: float | None = None
    retry_s: float = 60.0  # an offer that refused is asked again after this long
    max_orders: int = 64  # per call
    resume_s: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.availability < 1:
            raise ValueError(f"availability = {self.availability}: must lie between 0 and 1")
        if self.boot_s < 0 or self.notice_s < 0:
            raise ValueError("boot_s and notice_s must not be negative")

    @property
    def gap_s(self) -> float:
        """How long a loss is felt: from when a machine goes until its replacement, ordered at the notice, serves."""
        return max(self.boot_s - self.notice_s, 0.0)

    @property
    def bridged_gap_s(self) -> float:
        """The same where a stopped machine stands in until the replacement serves."""
        return (
            self.gap_s if self.resume_s is None else max(min(self.resume_s, self.boot_s) - self.notice_s, 0.0)
        )

    @property
    def shortage_worth(self) -> float:
        """What an hour in shortage is charged, in hours of the whole fleet on-demand."""
        return SHORTAGE_WORTH * 0.001 / (1 - self.availability) if self.worth is None else self.worth


@dataclass(frozen=True, slots=True)
class Learned:
    """What one offer taught: losses (all machines that go together count once) and hours held, both fading, and how
    many losses an offer of the usual kind would have had in that time."""

    n_losses: float = 0.0
    held_h: float = 0.0
    up_since_s: float | None = None
    n_usual: float = 0.0

    def losses_per_h(self, now_s: float) -> float:
        """Over the next hours: the usual hazard of an offer that has held for so long, times how much worse than usual
        this one was."""
        up_h = 0.0 if self.up_since_s is None else max(now_s - self.up_since_s, 0.0) / 3600
        return (
            usual_losses_per_h(up_h, AHEAD_H) * (self.n_losses + PRIOR_LOSSES) / (self.n_usual + PRIOR_LOSSES)
        )


_UNKNOWN: Final = Learned()


def usual_losses_per_h(up_h: float, ahead_h: float = 0.0) -> float:
    """Hazard of an offer that has given machines for so long, or its mean over the hours ahead: what has held goes on
    holding."""
    if ahead_h:
        return USUAL_LOSSES * math.log1p(ahead_h / (up_h + USUAL_YOUNG_H)) / ahead_h
    return USUAL_LOSSES / (up_h + USUAL_YOUNG_H)


@dataclass(frozen=True, slots=True)
class SpotMemory:
    at_s: float | None = None
    offers: Mapping[str, Learned] = field(default_factory=dict)
    leaving: Mapping[str, int] = field(default_factory=dict)
    ready: Mapping[str, int] = field(default_factory=dict)  # and not leaving, less what was given back since
    lost_at_s: float | None = None  # when machines were last told to go, or went


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
    n_wanted = view.n_wanted
    held = {o.name: o.n_pending + o.n_ready - o.n_leaving for o in view.offers}
    ready = {o.name: o.n_ready - o.n_leaving for o in view.offers}
    n_staying_ready = sum(ready.values())
    choices = {o.name: _choice(o, view, spec, memory) for o in view.offers}
    ranked = sorted(view.offers, key=lambda o: (choices[o.name].usd_per_h, o.name))
    goal = shape(
        n_wanted,
        [c for c in choices.values() if c.n_most > 0 and c.usd_per_h < view.on_demand_usd_per_h],
        view.on_demand_usd_per_h,
        n_wanted * view.on_demand_usd_per_h * spec.shortage_worth,
        spec.boot_s / 3600,
    )
    wanted = dict(goal.held)
    n_spares = max(sum(wanted.values()) + goal.n_on_demand - n_wanted, 0)
    reasons = [f"{n_wanted} wanted, {n_spares} spare"]

    # 1. Spot: what the shape has and is not there.
    launch = {
        o.name: min(wanted[o.name] - held[o.name], spec.max_orders)
        for o in ranked
        if wanted.get(o.name, 0) > held[o.name]
    }
    if launch:
        reasons.append("spot: " + ", ".join(f"{name} +{n}" for name, n in launch.items()))

    # 2. On-demand: what the shape has of it, and for what will not be ready in time: nothing to buy, or starting and
    #    not there.
    n_will_be = n_staying_ready + sum(o.n_pending for o in view.offers)
    n_on_demand = view.n_on_demand_ready + view.n_on_demand_pending
    n_uncovered = n_wanted - n_will_be - n_on_demand - sum(launch.values())
    launch_on_demand = min(max(n_uncovered, goal.n_on_demand - n_on_demand, 0), spec.max_orders)
    n_bridge = 0
    is_late = memory.lost_at_s is not None and view.now_s < memory.lost_at_s + spec.boot_s
    if is_late and _bridges(view, spec):
        # What was lost is on its way and late: stopped machines serve until it is there, and lie down again.
        n_bridge = min(n_wanted - n_staying_ready - n_on_demand, view.n_stopped) - launch_on_demand
    if n_bridge > 0:
        launch_on_demand += n_bridge
        reasons.append(f"on-demand +{n_bridge}: stopped machines until spot is ready")
    elif launch_on_demand:
        reasons.append(
            f"on-demand +{launch_on_demand}: no spot offer to be had"
            if n_uncovered > 0
            else f"on-demand +{launch_on_demand}: cover that no spot offer gives"
        )

    # 3. Give back what the shape does without once all that it has is ready: what an offer still may refuse stands in
    #    for nothing. On-demand first, then the worst offer.
    release_on_demand = cancel_on_demand = 0
    release: dict[str, int] = {}
    cancel: dict[str, int] = {}
    n_over = n_staying_ready + view.n_on_demand_ready - n_wanted
    is_there = (
        all(ready[name] >= n for name, n in wanted.items()) and view.n_on_demand_ready >= goal.n_on_demand
    )
    if is_there and n_over >= 0:
        release_on_demand = min(view.n_on_demand_ready - goal.n_on_demand, n_over)
        n_over -= release_on_demand
        cancel_on_demand = view.n_on_demand_pending
        for offer in reversed(ranked):
            if offer.n_pending:
                cancel[offer.name] = offer.n_pending
            n = min(ready[offer.name] - wanted.get(offer.name, 0), n_over)
            if n > 0:
                release[offer.name] = n
                n_over -= n
    if release:
        reasons.append("released: " + ", ".join(f"{name} -{n}" for name, n in release.items()))
    left = {name: n - release.get(name, 0) for name, n in ready.items()}
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
        replace(memory, ready=left),
    )


def learn(view: FleetView, memory: SpotMemory) -> SpotMemory:
    """Fade, then add the time held since the last look and the losses announced, or not announced, since."""
    passed_h = 0.0 if memory.at_s is None else max(view.now_s - memory.at_s, 0.0) / 3600
    keep = 0.5 ** (passed_h / FORGET_H)
    offers: dict[str, Learned] = {}
    lost_at_s = memory.lost_at_s
    for offer in view.offers:
        known = memory.offers.get(offer.name, Learned())
        n_losses, held_h, n_usual = known.n_losses * keep, known.held_h * keep, known.n_usual * keep
        n_held = offer.n_ready + offer.n_pending
        if n_held:
            up_h = 0.0 if known.up_since_s is None else max(view.now_s - known.up_since_s, 0.0) / 3600
            held_h += passed_h
            n_usual += passed_h * usual_losses_per_h(up_h)
        is_told = offer.n_leaving > 0 and not memory.leaving.get(offer.name, 0)
        is_lost = is_told or _took_back(offer, view.now_s, memory)
        n_losses += is_lost
        lost_at_s = view.now_s if is_lost else lost_at_s
        gives = n_held > offer.n_leaving and not is_lost
        up_since_s = (known.up_since_s if known.up_since_s is not None else view.now_s) if gives else None
        offers[offer.name] = Learned(n_losses, held_h, up_since_s, n_usual)
    leaving = {o.name: o.n_leaving for o in view.offers}
    ready = {o.name: o.n_ready - o.n_leaving for o in view.offers}
    return replace(memory, at_s=view.now_s, offers=offers, leaving=leaving, ready=ready, lost_at_s=lost_at_s)


def _took_back(offer: OfferView, now_s: float, memory: SpotMemory) -> bool:
    """Without a word: fewer are ready than at the last look, and it refused or took back since. A refusal that lies
    ahead is one that backs off."""
    at_s = offer.refused_at_s
    if memory.at_s is None or at_s is None or not memory.at_s <= at_s <= now_s:
        return False
    return offer.n_ready - offer.n_leaving < memory.ready.get(offer.name, 0)


def effective_usd_per_h(offer: OfferView, view: FleetView, spec: SpotSpec, memory: SpotMemory) -> float:
    """Price of a machine hour that serves: each loss pays a start twice, and the time without notice on-demand."""
    return _choice(offer, view, spec, memory).usd_per_h


def _choice(offer: OfferView, view: FleetView, spec: SpotSpec, memory: SpotMemory) -> Choice:
    """The offer as the cover sees it; with nothing held it can be brought to nothing while it refuses."""
    n_held = offer.n_pending + offer.n_ready - offer.n_leaving
    losses_per_h = memory.offers.get(offer.name, _UNKNOWN).losses_per_h(view.now_s)
    bridges = _bridges(view, spec)
    gap_ratio = losses_per_h * (spec.bridged_gap_s if bridges else spec.gap_s) / 3600
    on_demand_ratio = losses_per_h * spec.boot_s / 3600 if bridges else gap_ratio
    usd_per_h = (
        offer.usd_per_h * (1 + losses_per_h * spec.boot_s / 3600) + view.on_demand_usd_per_h * on_demand_ratio
    )
    n_most = max(n_held, 2 * view.n_wanted) if _may_ask(offer, view.now_s, spec) else n_held
    return Choice(offer.name, usd_per_h, gap_ratio, n_held, n_most)


def _may_ask(offer: OfferView, now_s: float, spec: SpotSpec) -> bool:
    if offer.n_leaving:
        return False
    return offer.refused_at_s is None or now_s - offer.refused_at_s >= spec.retry_s


def _bridges(view: FleetView, spec: SpotSpec) -> bool:
    """Whether on-demand machines that lie stopped, and those that are up, can stand in for all that is wanted."""
    n_reserve = view.n_stopped + view.n_on_demand_pending + view.n_on_demand_ready
    return spec.bridged_gap_s < spec.gap_s and n_reserve >= view.n_wanted
