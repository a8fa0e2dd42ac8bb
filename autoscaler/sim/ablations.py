"""The production bundle with one ingredient taken away, for the ablation table; nothing here runs in the house.

Each takes away from outside what autoscaler/policy/spot.py or replicas.py does, so that the policies carry no switches
of their own for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from autoscaler.policy.spot import FleetView, Orders, SpotSpec
from autoscaler.sim.buyers import Corral
from autoscaler.sim.fleet import Buyer
from autoscaler.sim.policies import CORRAL, policy
from autoscaler.sim.scenario import Policy


class Unlearning(Corral):
    """No hazard is learned: every offer stays what the prior says."""

    def buy(self, view: FleetView) -> Orders:
        orders = super().buy(view)
        self.memory = replace(self.memory, offers={})
        return orders


class Uncovered(Corral):
    """Nothing on-demand, whatever is missing."""

    def buy(self, view: FleetView) -> Orders:
        return replace(super().buy(view), launch_on_demand=0)


class Together(Corral):
    """All machines of an order where the first of them goes; spares as computed."""

    def buy(self, view: FleetView) -> Orders:
        orders = super().buy(view)
        if not orders.launch:
            return orders
        return replace(orders, launch=((orders.launch[0][0], sum(n for _, n in orders.launch)),))


class Deaf(Corral):
    """Notices are not heard: replacements are ordered when the machines are gone."""

    def buy(self, view: FleetView) -> Orders:
        return super().buy(replace(view, offers=tuple(replace(o, n_leaving=0) for o in view.offers)))


class Ageless(Corral):
    """An offer that has held for a day is taken for one that came up a minute ago."""

    def buy(self, view: FleetView) -> Orders:
        orders = super().buy(view)
        young = {name: replace(learned, up_since_s=None) for name, learned in self.memory.offers.items()}
        self.memory = replace(self.memory, offers=young)
        return orders


def _buyer(make: Callable[[SpotSpec], Buyer], worth: float | None = None) -> Policy:
    return replace(CORRAL, buyer=lambda s: make(SpotSpec(s.terms.boot_s, s.terms.notice_s, worth=worth)))


# What is off, and the bundle without it.
ABLATIONS: dict[str, Policy] = {
    "nothing (the production bundle)": CORRAL,
    "fair queue (one line for all)": policy("fcfs"),
    "routing by board (fewest running instead)": policy("least-load"),
    "forecast": policy("corral:forecast=0"),
    "room for the usual load": policy("corral:usual_s=0"),
    "panic window": policy("corral:panic_ratio=1e9"),
    "persistence (shrinks at once)": policy("corral:scale_down_delay_s=15:spare_ratio=0"),
    "hazard learning": _buyer(Unlearning),
    "on-demand cover": _buyer(Uncovered),
    "diversification": _buyer(Together),
    "hazard by age": _buyer(Ageless),
    "cover for losses": _buyer(Corral, worth=0.0),
    "heeding notices": _buyer(Deaf),
    "spot machines at all": policy("on-demand"),
}
