"""Requests that wait, in flows: who has had how much service, and what waits where. Pure.

fairness.py files requests here, charges their flows and asks whose turn it is; workers/lua/lib_flows.lua is the same in
the cell. Per band: organization, in it project, in it key, each with a virtual counter of the service it received per
weight (VTC, arXiv:2401.00588). It knows no replicas and no slots, and never decides which of several heads goes.
"""

from __future__ import annotations

from typing import Final, TypeVar

from controlplane.policy.flows import ORDINARY_WEIGHT, Flow, Request, service, virtual
from controlplane.policy.ranking import Ranking

# The same numbers as in lib_flows.lua and lib_queue.lua.
BESIDE: Final = 8  # flows of a level that a prediction looks at; the others are taken like the last of these
CANDIDATES: Final = 8

_ORG, _PROJECT, _KEY = 0, 1, 2

# A place of a flow: (level, band, parent). Its members are organizations, projects or keys.
Place = tuple[int, int, str]
_K = TypeVar("_K")


class WaitingFlows:
    """The flows of one deployment's queue. Counters in counter units (TOKEN = one prompt token), slot times in ms."""

    def __init__(self, window: int = 0) -> None:
        """`window` in counter units: flows so near to the least are equals."""
        self.window = window
        self.bands: dict[int, Ranking] = {}  # waiting requests by instant of admission
        self.keys: dict[tuple[int, str], Ranking] = {}  # waiting requests of a key, by order key
        self.active: dict[Place, Ranking] = {}  # flows that wait, by counter
        self.counters: dict[tuple[Place, str], int] = {}
        self.left: dict[Place, int] = {}  # counter of the last flow that left
        self.n_waiting: dict[str, int] = {}  # by organization
        self.slot_ms: dict[tuple[Place, str], int] = {}  # predicted slot time that waits, by flow
        self.cost: dict[tuple[Place, str], int] = {}  # what that will add to its counter
        self.band_ms: dict[int, int] = {}  # and by band

    # -- what happens

    def join(self, request: Request, now_ms: int) -> None:
        """It waits from now on; flows that had nothing waiting are lifted to the least beside them."""
        flow = request.flow
        for place, name, _ in self._places(flow):
            active = self.active.setdefault(place, Ranking())
            if name not in active:
                least = active.least()
                base = self.left.get(place, 0) if least is None else least
                counter = max(self.counters.get((place, name), 0), base)
                self.counters[place, name] = counter
                active.put(name, counter)
        self.keys.setdefault((flow.band, flow.key), Ranking()).put(request.id, request.order_key)
        self.bands.setdefault(flow.band, Ranking()).put(request.id, now_ms)
        self.n_waiting[flow.organization] = self.n_waiting.get(flow.organization, 0) + 1
        self._waits(request, 1)

    def leave(self, request: Request) -> None:
        """Out of the queue; flows that have nothing left leave, and note at which counter."""
        flow = request.flow
        waiting = self.keys.get((flow.band, flow.key))
        if waiting is None or not waiting.drop(request.id):
            return  # resumed requests wait outside the flows
        self.bands[flow.band].drop(request.id)
        self.n_waiting[flow.organization] -= 1
        if not self.n_waiting[flow.organization]:
            del self.n_waiting[flow.organization]
        self._waits(request, -1)
        under = waiting
        if not under:
            del self.keys[flow.band, flow.key]
        for place, name, _ in reversed(self._places(flow)):
            if under:
                return
            active = self.active[place]
            self.left[place] = self.counters[place, name]
            active.drop(name)
            if not active:
                del self.active[place]
            under = active

    def charge(self, flow: Flow, before: int, after: int, *, waits: bool) -> None:
        """Move a request's charge (tenths). While nothing waits (`waits`) the flow counts as one that joins and leaves
        in this instant: it is lifted, and is the last that left."""
        if before == after:
            return
        for place, name, weight in self._places(flow):
            left = self.left.get(place, 0)
            counter = self.counters.get((place, name), left)
            if not waits:
                counter = max(counter, left)
            counter += virtual(after, weight) - virtual(before, weight)
            self.counters[place, name] = counter
            active = self.active.get(place)
            if not waits:
                self.left[place] = counter
            elif active and name in active:
                active.put(name, counter)

    def sweep(self) -> None:
        """Forget counters that say no more than none would: those of flows at or below where a newcomer starts."""
        for place, name in list(self.counters):
            active = self.active.get(place)
            if active and name in active:
                continue
            base = active.least() if active else self.left.get(place, 0)
            if self.counters[place, name] <= (base or 0):
                del self.counters[place, name]

    # -- who may go next

    def heads(self, band: int) -> list[str]:
        """Ids of requests to choose from: one for each flow within the window, at the first level with several."""
        organizations = self._within((_ORG, band, ""))
        if len(organizations) > 1:
            return [self._head(band, name) for name in organizations]
        projects = self._within((_PROJECT, band, organizations[0]))
        if len(projects) > 1:
            return [self._head(band, organizations[0], name) for name in projects]
        keys = self._within((_KEY, band, projects[0]))
        return [self._head(band, organizations[0], projects[0], name) for name in keys]

    def _within(self, place: Place) -> list[str]:
        active = self.active[place]
        lowest = active.lowest(CANDIDATES)
        limit = active.score(lowest[0]) + self.window
        return [name for name in lowest if active.score(name) <= limit]

    def _head(self, band: int, organization: str, project: str = "", key: str = "") -> str:
        project = project or self.active[_PROJECT, band, organization].first()
        key = key or self.active[_KEY, band, project].first()
        return self.keys[band, key].first()

    def is_within(self, flow: Flow) -> bool:
        """Whether this flow, which waits, has at no level had more than the window allows."""
        for place, name, _ in self._places(flow):
            active = self.active[place]
            if active.score(name) > active.score(active.first()) + self.window:
                return False
        return True

    # -- what a newcomer finds

    def ahead_ms(self, flow: Flow) -> int:
        """Slot time of the waiting requests that will probably go before one that joins this flow now.

        What waits in its own key; of each flow beside it, at each level, what will be served until its counter is where
        ours will be then, and the window beyond; and all of the bands before. Who waits now counts, not who will come.
        """
        levels = self._places(flow)
        ahead = self.slot_ms.get((levels[_KEY][0], flow.key), 0)
        for level in (_KEY, _PROJECT, _ORG):
            place, name, _ = levels[level]
            active = self.active.get(place)
            if not active:
                continue
            lowest = active.lowest(BESIDE + 1)
            beside = [other for other in lowest if other != name][:BESIDE]
            own_ms = self.slot_ms.get((place, name), 0)
            reach = max(self.counters.get((place, name), 0), active.score(lowest[0])) + self.window
            if own_ms:
                reach += int(float(self.cost.get((place, name), 0)) * ahead / own_ms)
            above = levels[level - 1]
            total = self.slot_ms.get((above[0], above[1]), 0) if level else self.band_ms.get(flow.band, 0)
            rest, share = total - own_ms, 0.0
            for other in beside:
                ms, cost = self.slot_ms.get((place, other), 0), self.cost.get((place, other), 0)
                share = min(max(reach - active.score(other), 0) / cost, 1.0) if cost else 1.0
                rest -= ms
                ahead += int(ms * share)
            if rest > 0 and len(beside) == BESIDE:
                ahead += int(rest * share)
        return ahead + sum(ms for band, ms in self.band_ms.items() if band < flow.band)

    def within_share(self, flow: Flow, most_ms: int) -> bool:
        """Whether others wait beside this organization in its band, and it has no more slot time waiting than `most_ms`
        of its share of the slots by weight: then it is late because of them, and to refuse it would give them its share
        as well."""
        place, name, weight = self._places(flow)[_ORG]
        active = self.active.get(place)
        n_others = len(active) - (name in active) if active else 0
        if not n_others:
            return False
        own_ms = self.slot_ms.get((place, name), 0)
        return own_ms + own_ms * n_others * ORDINARY_WEIGHT // weight <= most_ms

    @staticmethod
    def _places(flow: Flow) -> tuple[tuple[Place, str, int], ...]:
        """(place, name there, weight) from the organization down."""
        return (
            ((_ORG, flow.band, ""), flow.organization, flow.weights[0]),
            ((_PROJECT, flow.band, flow.organization), flow.project, flow.weights[1]),
            ((_KEY, flow.band, flow.project), flow.key, flow.weights[2]),
        )

    def _waits(self, request: Request, by: int) -> None:
        """Adds to what waits, or takes from it; what is 0 is forgotten."""
        flow, ms = request.flow, by * request.slot_ms
        tenths = service(request.n_prompt, 0, request.n_expected)
        for place, name, weight in self._places(flow):
            _add(self.slot_ms, (place, name), ms)
            _add(self.cost, (place, name), by * virtual(tenths, weight))
        _add(self.band_ms, flow.band, ms)


def _add(sums: dict[_K, int], key: _K, more: int) -> None:
    now = sums.get(key, 0) + more
    if now:
        sums[key] = now
    else:
        sums.pop(key, None)
