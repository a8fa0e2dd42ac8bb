"""What a decision could have been instead: counts that its rules wanted, machines, replicas and offers it weighed.

Told beside a decision and stored with it, so that whoever asks why finds what was passed over and what spoke against
it. Says nothing that the decision's inputs do not hold. Called by tick.py and market.py once a decision is to be kept.
Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from autoscaler.policy.forecast import forecast
from autoscaler.policy.load import mean
from autoscaler.policy.market import LaunchPlan, Purchase
from autoscaler.policy.nearness import nearness
from autoscaler.policy.placement import RANK, preference
from autoscaler.policy.poolplan import PoolInputs, PoolOrders
from autoscaler.policy.poolrest import next_rest
from autoscaler.policy.retire import missed_least
from autoscaler.policy.spot import effective_usd_per_h
from autoscaler.policy.usual import level
from autoscaler.types import (
    Decision,
    DrainReplica,
    LaunchMachine,
    MachineView,
    Observation,
    ReplicaPhase,
    ScalerSpec,
    StartReplica,
    StopReplica,
)

MAX_EACH: Final = 24  # machines, replicas or offers told of: the chosen first, then the next best


@dataclass(frozen=True, slots=True)
class Alternative:
    """One answer to `question` (replicas, machine, retire, offer, give_up, rest). `subject`: the id or number it is
    about."""

    question: str
    subject: str
    chosen: bool
    why: str


def of_decision(observation: Observation, spec: ScalerSpec, decision: Decision) -> tuple[Alternative, ...]:
    """Counts, machines and replicas that this decision of a deployment weighed, in that order."""
    return (
        *_counts(observation, spec, decision),
        *_machines(observation, spec, decision),
        *_victims(observation, decision),
    )


def of_purchase(purchase: Purchase, plan: LaunchPlan) -> tuple[Alternative, ...]:
    """Every offer of the market: its place in the plan, its price with what losses cost, or what kept it out."""
    view, spec = purchase.view, purchase.spec
    place = {name: n for n, name in enumerate(plan.names, start=1)}
    found: list[tuple[float, Alternative]] = []
    for offer in view.offers:
        usd = effective_usd_per_h(offer, view, spec, purchase.memory)
        why = f"{offer.usd_per_h:.4f} $/h, {usd:.4f} with what its losses cost"
        if offer.name in place:
            why += f"; asked as number {place[offer.name]}"
        elif not purchase.spot:
            why += "; spot is switched off"
        elif offer.n_leaving:
            why += f"; {offer.n_leaving} machines of it are being taken back"
        elif offer.refused_at_s is not None and view.now_s - offer.refused_at_s < spec.retry_s:
            why += (
                f"; it refused, and is asked again in {offer.refused_at_s + spec.retry_s - view.now_s:.0f} s"
            )
        elif usd >= view.on_demand_usd_per_h:
            why += f"; on-demand is not dearer at {view.on_demand_usd_per_h:.4f}"
        else:
            why += "; the plan is full"
        found.append((usd, Alternative("offer", offer.name, offer.name in place, why)))
    for kind in purchase.on_demand:
        why = f"{kind.usd_per_h:.4f} $/h"
        if kind.name in place:
            why += f"; asked as number {place[kind.name]}"
        elif kind.refused_until_s is not None and view.now_s < kind.refused_until_s:
            why += f"; it refused, and is asked again in {kind.refused_until_s - view.now_s:.0f} s"
        else:
            why += "; cheaper cover comes first"
        found.append((kind.usd_per_h, Alternative("offer", kind.name, kind.name in place, why)))
    found.sort(key=lambda f: (place.get(f[1].subject, math.inf), f[0], f[1].subject))
    return tuple(alternative for _, alternative in found[:MAX_EACH])


def of_pool(inputs: PoolInputs, orders: PoolOrders) -> tuple[Alternative, ...]:
    """Every machine of the pool that stays or goes, and the offers that could stand in."""
    gone = {g.machine_id: g.why for g in (*orders.give_up, *orders.cancel)}
    stood_in_for = {m.held.replaces for m in inputs.machines if m.held.replaces}
    found = []
    for machine in sorted(inputs.machines, key=lambda m: (m.held.id not in gone, m.held.id))[:MAX_EACH]:
        held = machine.held
        why = (
            f"{machine.offering}, {held.usd_per_h:.4f} $/h, {held.n_replicas} of {held.n_places} places taken"
        )
        if held.is_leaving:
            why += "; its provider takes it away"
        elif not held.is_ready:
            why += "; not ready yet"
        elif held.id in stood_in_for:
            why += "; its replacement is on its way"
        if held.id in gone:
            why += f"; {gone[held.id]}"
        found.append(Alternative("give_up", held.id, held.id in gone, why))
    bought = [b.offer for b in orders.buy]
    for offer in sorted(inputs.offers, key=lambda o: (o.name not in bought, o.usd_per_h, o.name))[:MAX_EACH]:
        why = f"{offer.usd_per_h:.4f} $/h with what its losses cost, {offer.n_places} places"
        found.append(Alternative("offer", offer.name, offer.name in bought, why))
    resting, _ = next_rest(inputs.rest, inputs.view.now_s, inputs.memory.rest)
    for rung in inputs.rest.rungs if resting.rung else ():
        why = f"{rung.usd_per_h:.4f} $/h, {rung.wake_s:.0f} s to the first token"
        found.append(Alternative("rest", rung.name, rung.name == resting.rung, why))
    return tuple(found)


def _counts(observation: Observation, spec: ScalerSpec, decision: Decision) -> list[Alternative]:
    memory, now_s = decision.memory, observation.now_s
    samples = [s for s in memory.samples if s.at_s > now_s - spec.stable_window_s]
    if not samples:
        return []
    slots = mean([s.slots or spec.slots for s in samples])
    stable = mean([s.known for s in samples])
    short = mean([s.known for s in samples if s.at_s > now_s - spec.panic_window_s])
    n_live = sum(1 for r in observation.replicas if r.phase is not ReplicaPhase.DRAINING)
    told = [
        (n_live, "as many as there are"),
        (
            _replicas(stable, slots * spec.target_ratio),
            f"{stable:.1f} requests on average of {spec.stable_window_s:g} s",
        ),
        (
            _replicas(short, slots * spec.target_ratio),
            f"{short:.1f} requests on average of {spec.panic_window_s:g} s",
        ),
    ]
    if memory.forecast is not None and spec.lead_s > 0:
        ahead = forecast(now_s, spec.lead_s, memory.forecast)
        if ahead is not None:
            high = ahead.high(spec.n_deviations)
            told.append(
                (_replicas(high, slots), f"{high:.1f} requests foretold in {spec.lead_s:g} s ({ahead.rule})")
            )
    usual = level(spec.usual_share, memory.usual, spec.usual_s / 4) if spec.usual_s > 0 else None
    if usual is not None:
        high = usual + spec.usual_deviations * math.sqrt(usual)
        told.append((_replicas(high, slots), f"{usual:.1f} requests are usual, and room for their bursts"))
    told.append((spec.min_replicas, "the least its owner allows"))
    told.append((spec.max_replicas, "the most its owner allows"))
    return [Alternative("replicas", str(n), n == decision.wanted, why) for n, why in told]


def _replicas(load: float, each: float) -> int:
    return math.ceil(load / each - 1e-9)


def _machines(observation: Observation, spec: ScalerSpec, decision: Decision) -> list[Alternative]:
    starts = [c.machine_id for c in decision.commands if isinstance(c, StartReplica)]
    launches = any(isinstance(c, LaunchMachine) for c in decision.commands)
    if not starts and not launches:
        return []

    near = nearness(observation)

    def rank(machine: MachineView) -> tuple[bool, bool, int, tuple[int, int, str]]:
        fits = machine.state in RANK and machine.n_free > 0
        steps = near[machine.id].steps if near and fits else 0
        return machine.id not in starts, not fits, steps, preference(machine) if fits else (0, 0, machine.id)

    found = []
    for machine in sorted(observation.machines, key=rank)[:MAX_EACH]:
        why = f"{machine.state.value}, {machine.n_free} places free, {machine.n_replicas} replicas on it"
        if near:
            best = near[machine.id]
            sender = f" {best.start.sibling}" if best.start.sibling else ""
            why += (
                f", {best.seconds:.1f} s to serve there with the weights from {best.start.tier.value}{sender}"
            )
        if machine.ends_at_s is not None:
            why += f", taken away in {max(machine.ends_at_s - observation.now_s, 0):.0f} s"
        found.append(Alternative("machine", machine.id, machine.id in starts, why))
    if launches or observation.n_machines < spec.max_machines:
        why = f"one machine more: {observation.n_machines} of {spec.max_machines} exist"
    else:
        why = f"no machine more: {observation.n_machines} of {spec.max_machines} exist"
    if observation.quota:
        why += f"; {observation.quota}"
    return [*found, Alternative("machine", "", launches, why)]


def _victims(observation: Observation, decision: Decision) -> list[Alternative]:
    gone = {c.replica_id: c.reason for c in decision.commands if isinstance(c, DrainReplica | StopReplica)}
    if not gone:
        return []
    ordered = sorted(missed_least(observation.replicas), key=lambda r: r.id not in gone)[:MAX_EACH]
    found = []
    for replica in ordered:
        used = "unseen" if replica.used is None else f"{replica.used} of {replica.slots} slots taken"
        why = f"{replica.phase.value}, {used}" + (", outdated" if replica.outdated else "")
        found.append(Alternative("retire", replica.id, replica.id in gone, why))
    return found
