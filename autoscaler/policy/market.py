"""What the next machine should be: offers of the market in the order in which they are to be asked. Pure.

The spot part is the buying policy of the simulator (spot.py): prices weighed by what losses cost, spread over offers,
refusals respected. On-demand follows as cover, cheapest first, or comes alone where spot is not wanted or not worth it.
Called by autoscaler/market.py before a machine is ordered; the plan is stored with the machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from autoscaler.policy.sizes import Scale
from autoscaler.policy.spot import FleetView, SpotMemory, SpotSpec, buy, effective_usd_per_h

MAX_PLAN: Final = 12  # offers asked for one machine: more would only make the call longer
BACKOFF_FIRST_S: Final = 60.0
BACKOFF_MAX_S: Final = 900.0


@dataclass(frozen=True, slots=True)
class OnDemandOffer:
    """A kind that is not taken back. `refused_until_s`: it had none a moment ago; None: nothing known against it."""

    name: str
    usd_per_h: float
    refused_until_s: float | None = None


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """Names of offers, best first; empty when everything has refused lately. `retry_at_s`: when one may be asked.
    `from_reserve`: first a machine that lies stopped is started, and if one is, nothing is bought."""

    names: tuple[str, ...]
    reasons: tuple[str, ...]
    retry_at_s: float | None = None
    from_reserve: bool = False


@dataclass(frozen=True, slots=True)
class Purchase:
    """All that `plan_launch` is given, as it is stored with the machine that was ordered.

    Counts and prices are those of the scale's units: what a machine costs for each unit that `n_replicas`, for which
    there is no room, would use of it.
    """

    view: FleetView
    on_demand: tuple[OnDemandOffer, ...]
    spec: SpotSpec
    memory: SpotMemory
    spot: bool = True
    scale: Scale = field(default_factory=Scale)
    n_replicas: int = 1
    # Replicas that do on each GPU what one does on the GPU it needs; prices have it in them.
    work: Mapping[str, float] = field(default_factory=dict)

    def plan(self) -> tuple[LaunchPlan, SpotMemory]:
        plan, memory = plan_launch(self.view, self.on_demand, self.spec, self.memory, spot=self.spot)
        if self.scale.is_mixed:
            plan = replace(plan, reasons=(*plan.reasons, self._by_size(plan)))
        if self.work:
            told = ", ".join(f"{gpu} {n:.2f}" for gpu, n in sorted(self.work.items(), key=lambda w: w[1]))
            plan = replace(
                plan, reasons=(*plan.reasons, f"replicas for the same work, prices include it: {told}")
            )
        return plan, memory

    def _by_size(self, plan: LaunchPlan) -> str:
        """The best of each size in the plan, at what a replica that is wanted pays for it."""
        usd = {o.name: effective_usd_per_h(o, self.view, self.spec, self.memory) for o in self.view.offers}
        usd |= {o.name: o.usd_per_h for o in self.on_demand}
        best: dict[int, tuple[float, str]] = {}
        for name in plan.names:
            n = self.scale.places[name]
            best[n] = min(best.get(n, (usd[name], name)), (usd[name], name))
        sizes = ", ".join(f"{name} {usd:.4f} $/h (holds {n})" for n, (usd, name) in sorted(best.items()))
        unit = "each" if self.scale.unit == 1 else f"every {self.scale.unit}"
        return f"for {unit} of {self.n_replicas} replicas without room: {sizes}"


def plan_launch(
    view: FleetView,
    on_demand: tuple[OnDemandOffer, ...],
    spec: SpotSpec,
    memory: SpotMemory,
    *,
    spot: bool = True,
) -> tuple[LaunchPlan, SpotMemory]:
    """The plan for one machine more than the pool has, and what the policy remembers now.

    `view.n_wanted` counts the machines that are wanted, this one included. `spot` False: on-demand only.
    """
    orders, memory = buy(view, spec, memory)
    told = []
    spot_names: list[str] = []
    if spot and view.offers:
        usable = {
            o.name: o for o in view.offers if not o.n_leaving and not _refused(o.refused_at_s, view, spec)
        }
        worth = sorted(
            (effective_usd_per_h(o, view, spec, memory), o.name)
            for o in usable.values()
            if effective_usd_per_h(o, view, spec, memory) < view.on_demand_usd_per_h
        )
        first = [name for name, _ in orders.launch if name in usable]
        spot_names = first + [name for _, name in worth if name not in first]
        if worth:
            shown = ", ".join(f"{name} {usd:.4f} $/h" for usd, name in worth[:3])
            told.append(f"spot by price and learned losses: {shown}")
        else:
            told.append(
                f"no spot offer is usable below on-demand ({len(view.offers) - len(usable)} of {len(view.offers)} "
                "refused or leaving)"
            )
    free = sorted(
        (o for o in on_demand if o.refused_until_s is None or view.now_s >= o.refused_until_s),
        key=lambda o: (o.usd_per_h, o.name),
    )
    if free:
        told.append(f"on-demand as cover: {free[0].name} {free[0].usd_per_h:.4f} $/h")
    # Cover keeps its place however many spot offers there are.
    n_cover = min(len(free), MAX_PLAN // 3 if spot_names else MAX_PLAN)
    names = (*spot_names[: MAX_PLAN - n_cover], *(o.name for o in free[:n_cover]))
    # On-demand for what was lost, or because no spot is to be had: as in the simulator, what lies stopped comes first.
    # Cover beside spot that is to be had is not what this machine is for.
    is_late = memory.lost_at_s is not None and view.now_s < memory.lost_at_s + spec.boot_s
    is_ordered = orders.launch_on_demand > 0 and (is_late or not orders.launch)
    from_reserve = is_ordered and view.n_stopped > 0
    why = (f"from the reserve: {orders.reasons[-1]}",) if from_reserve else ()
    if names:
        return LaunchPlan(names, (*why, *told), from_reserve=from_reserve), memory
    waits = [o.refused_until_s for o in on_demand if o.refused_until_s is not None]
    waits += [o.refused_at_s + spec.retry_s for o in view.offers if spot and o.refused_at_s is not None]
    reasons = (*why, "every offer refused lately")
    return LaunchPlan((), reasons, min(waits, default=None), from_reserve), memory


def backoff_s(n_refusals: int) -> float:
    """How long an offer is left alone after it refused so many times in a row: a minute, doubling to a quarter hour."""
    return float(min(BACKOFF_FIRST_S * 2 ** max(n_refusals - 1, 0), BACKOFF_MAX_S))


def one_more(view: FleetView, n: int = 1) -> FleetView:
    """The same pool with `n` more wanted than it has or has ordered."""
    held = sum(o.n_pending + o.n_ready - o.n_leaving for o in view.offers)
    return replace(view, n_wanted=held + view.n_on_demand_pending + view.n_on_demand_ready + n)


def _refused(refused_at_s: float | None, view: FleetView, spec: SpotSpec) -> bool:
    return refused_at_s is not None and view.now_s - refused_at_s < spec.retry_s
