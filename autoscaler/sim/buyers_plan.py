"""A buyer that follows purchase plans with a bounded tail: greedy, or the mixed-integer programme.

Offers are valued and their losses learned as in production (policy/spot.py); how many of each is the plan's
(policy/diversify.py, autoscaler/purchase.py), made again when what it depends on has changed. Machines that the plan
does without go only when enough others are ready.
"""

from __future__ import annotations

from autoscaler.policy.diversify import Need, Plan, greedy
from autoscaler.policy.spot import (
    FleetView,
    Learned,
    Orders,
    SpotMemory,
    SpotSpec,
    effective_usd_per_h,
    learn,
)
from autoscaler.policy.tail import Offer, events
from autoscaler.purchase import plan

ON_DEMAND = "on-demand"


class Planned:
    """`time_limit_s` of the programme per plan; 0: greedy only."""

    def __init__(self, spec: SpotSpec, time_limit_s: float = 0.0) -> None:
        self.spec, self.time_limit_s = spec, time_limit_s
        self.memory = SpotMemory()
        self._known: tuple[object, Plan] | None = None

    def buy(self, view: FleetView) -> Orders:
        self.memory = learn(view, self.memory)
        held = {o.name: o.n_pending + o.n_ready - o.n_leaving for o in view.offers}
        n_on_demand = view.n_on_demand_pending + view.n_on_demand_ready
        open_ = {o.name for o in view.offers if not o.n_leaving and self._may_ask(o.refused_at_s, view.now_s)}
        wanted = self._plan(view, held, open_).machines["fleet"] if view.n_wanted else {}
        launch = {
            name: min(n - held[name], self.spec.max_orders)
            for name, n in wanted.items()
            if name in open_ and n > held[name]
        }
        n_staying = sum(o.n_ready - o.n_leaving for o in view.offers)
        n_coming = sum(o.n_pending for o in view.offers) + sum(launch.values())
        n_cover = max(wanted.get(ON_DEMAND, 0), view.n_wanted - n_staying - n_coming)
        n_spare = n_staying + view.n_on_demand_ready - view.n_wanted
        release_on_demand = min(max(view.n_on_demand_ready - wanted.get(ON_DEMAND, 0), 0), max(n_spare, 0))
        n_spare -= release_on_demand
        release: dict[str, int] = {}
        for offer in sorted(view.offers, key=lambda o: (-o.usd_per_h, o.name)):
            over = min(held[offer.name] - wanted.get(offer.name, 0), offer.n_ready - offer.n_leaving, n_spare)
            if over > 0:
                release[offer.name] = over
                n_spare -= over
        launch_on_demand = min(max(n_cover - n_on_demand, 0), self.spec.max_orders)
        cancel: dict[str, int] = {}
        n_cancel_on_demand = 0
        n_ready = n_staying + view.n_on_demand_ready - release_on_demand
        if n_ready >= view.n_wanted:  # what still starts is for the plan only
            n_cancel_on_demand = min(max(n_on_demand - n_cover, 0), view.n_on_demand_pending)
            for offer in view.offers:
                over = held[offer.name] - release.get(offer.name, 0) - wanted.get(offer.name, 0)
                if min(over, offer.n_pending) > 0:
                    cancel[offer.name] = min(over, offer.n_pending)
        return Orders(
            tuple(launch.items()),
            tuple(release.items()),
            launch_on_demand,
            release_on_demand,
            tuple(cancel.items()),
            n_cancel_on_demand,
        )

    def _may_ask(self, refused_at_s: float | None, now_s: float) -> bool:
        return refused_at_s is None or now_s - refused_at_s >= self.spec.retry_s

    def _plan(self, view: FleetView, held: dict[str, int], open_: set[str]) -> Plan:
        offers = [Offer(ON_DEMAND, "", view.on_demand_usd_per_h, view.n_wanted)]
        for o in view.offers:
            known = self.memory.offers.get(o.name, Learned())
            # Two digits: what was learned in the last minute is no reason for another plan.
            usd = float(f"{effective_usd_per_h(o, view, self.spec, self.memory):.2g}")
            n_most = 2 * view.n_wanted + 1 if o.name in open_ else max(held[o.name], 0)
            offers.append(Offer(o.name, o.name, usd, n_most, float(f"{known.losses_per_h(view.now_s):.2g}")))
        need = Need("fleet", view.n_wanted, {o.name: 1 for o in offers}, self.spec.availability)
        asked = (need, tuple(offers))
        if self._known is None or self._known[0] != asked:
            found = events(offers, self.spec.boot_s - self.spec.notice_s)
            made = greedy([need], offers, found)
            if self.time_limit_s > 0:
                made = plan([need], offers, found, time_limit_s=self.time_limit_s)
            self._known = (asked, made)
        return self._known[1]
