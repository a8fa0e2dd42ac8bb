"""Buyers of machines for fleet.py: the production policy, and the rules it is compared with.

SpotHedge follows SkyServe (2411.01438 and its published autoscaler and placer); its knob is `n_extra`.
"""

from __future__ import annotations

from dataclasses import replace

from autoscaler.policy.spot import FleetView, Orders, SpotMemory, SpotSpec, buy
from autoscaler.sim.fleet import Buyer


class Corral:
    """autoscaler/policy/spot.py with its memory."""

    def __init__(self, spec: SpotSpec) -> None:
        self.spec = spec
        self.memory = SpotMemory()

    def buy(self, view: FleetView) -> Orders:
        orders, self.memory = buy(view, self.spec, self.memory)
        return orders


class OnDemandOnly:
    def buy(self, view: FleetView) -> Orders:
        n = view.n_wanted - view.n_on_demand_pending - view.n_on_demand_ready
        n_cancel = min(max(-n, 0), view.n_on_demand_pending)
        return Orders(
            launch_on_demand=max(n, 0), cancel_on_demand=n_cancel, release_on_demand=max(-n, 0) - n_cancel
        )


class SpotOnly:
    """The cheapest zone that gives; nothing else."""

    def __init__(self, retry_s: float = 60.0) -> None:
        self.retry_s = retry_s

    def buy(self, view: FleetView) -> Orders:
        n_spot = sum(o.n_pending + o.n_ready for o in view.offers)
        cancel, release = _fewer(view, n_spot, view.n_wanted)
        return Orders(_first(view, view.n_wanted - n_spot, self.retry_s), release, cancel=cancel)


class AnyZoneElseOnDemand:
    """The three-line policy: any zone with spot, else on-demand; back to spot as soon as a zone gives. `n_extra` more
    than wanted buy it availability, where a table compares at equal availability."""

    def __init__(self, n_extra: int = 0, retry_s: float = 60.0) -> None:
        self.n_extra, self.retry_s = n_extra, retry_s

    def buy(self, view: FleetView) -> Orders:
        n_goal = view.n_wanted + self.n_extra if view.n_wanted else 0
        n_spot = sum(o.n_pending + o.n_ready for o in view.offers)
        n_missing = n_goal - n_spot
        launch = _first(view, n_missing, self.retry_s)
        n_on_demand = view.n_on_demand_pending + view.n_on_demand_ready
        n_ready = sum(o.n_ready for o in view.offers)
        cancel, release = _fewer(view, n_spot, n_goal)
        return Orders(
            launch=launch,
            release=release,
            cancel=cancel,
            launch_on_demand=0 if launch else max(n_missing - n_on_demand, 0),
            release_on_demand=min(view.n_on_demand_ready, max(n_ready + view.n_on_demand_ready - n_goal, 0)),
        )


class Heeding:
    """Another buyer that is told of machines under notice as if they had gone: what a notice alone is worth to it."""

    def __init__(self, buyer: Buyer) -> None:
        self.buyer = buyer

    def buy(self, view: FleetView) -> Orders:
        offers = tuple(
            replace(o, n_ready=o.n_ready - o.n_leaving, n_leaving=0, refused_at_s=view.now_s)
            if o.n_leaving
            else o
            for o in view.offers
        )
        return self.buyer.buy(replace(view, offers=offers))


class SpotHedge:
    """Over-provision `n_extra` spot machines over zones, on-demand for what is not ready yet.

    Zones that took or refused a machine are left alone until fewer than two others remain; the next machine goes to the
    cheapest active zone that hosts none, else the cheapest active one (its published placer once filtered candidates
    the wrong way round; this is what it means to do). On-demand covers what is not ready, at most what is wanted, so
    spare machines are never bought on-demand.
    """

    def __init__(self, n_extra: int = 1) -> None:
        self.n_extra = n_extra
        self._preempted: set[str] = set()
        self._seen: dict[str, float] = {}

    def buy(self, view: FleetView) -> Orders:
        for offer in view.offers:
            at_s = offer.refused_at_s
            if at_s is not None and self._seen.get(offer.name) != at_s:
                self._seen[offer.name] = at_s
                self._preempted.add(offer.name)
            elif offer.name in self._preempted and offer.n_ready - offer.n_leaving > 0:
                self._preempted.discard(offer.name)
        if len(view.offers) - len(self._preempted) < 2:
            self._preempted.clear()
        n_goal = view.n_wanted + self.n_extra if view.n_wanted else 0
        hosted = {o.name: o.n_pending + o.n_ready for o in view.offers}
        n_spot, n_ready = sum(hosted.values()), sum(o.n_ready for o in view.offers)
        launch: dict[str, int] = {}
        active = [o for o in view.offers if o.name not in self._preempted]
        for _ in range(max(n_goal - n_spot, 0)):
            if not active:
                break
            chosen = min(active, key=lambda o: (hosted[o.name] > 0, o.usd_per_h, hosted[o.name], o.name))
            hosted[chosen.name] += 1
            launch[chosen.name] = launch.get(chosen.name, 0) + 1
        n_on_demand = min(view.n_wanted, max(0, n_goal - n_ready))
        have = view.n_on_demand_pending + view.n_on_demand_ready
        cancel, release = _fewer(view, n_spot, n_goal)
        return Orders(
            launch=tuple(launch.items()),
            release=release,
            cancel=cancel,
            launch_on_demand=max(n_on_demand - have, 0),
            # Those that have not come up go first, as its autoscaler picks them.
            cancel_on_demand=min(max(have - n_on_demand, 0), view.n_on_demand_pending),
            release_on_demand=max(view.n_on_demand_ready - n_on_demand, 0),
        )


def _first(view: FleetView, n: int, retry_s: float) -> tuple[tuple[str, int], ...]:
    if n <= 0:
        return ()
    for offer in sorted(view.offers, key=lambda o: (o.usd_per_h, o.name)):
        if offer.refused_at_s is None or view.now_s - offer.refused_at_s >= retry_s:
            return ((offer.name, n),)
    return ()


def _fewer(
    view: FleetView, n_spot: int, n_goal: int
) -> tuple[tuple[tuple[str, int], ...], tuple[tuple[str, int], ...]]:
    """(to cancel, to release) of what is too much, where most machines are: first those that have not come up."""
    n_over = n_spot - n_goal
    cancel, release = [], []
    for offer in sorted(view.offers, key=lambda o: (-o.n_pending, o.name)):
        n = min(offer.n_pending, n_over)
        if n > 0:
            cancel.append((offer.name, n))
            n_over -= n
    for offer in sorted(view.offers, key=lambda o: (-o.n_ready, o.name)):
        n = min(offer.n_ready, n_over)
        if n > 0:
            release.append((offer.name, n))
            n_over -= n
    return tuple(cancel), tuple(release)
