"""The fair queue of one deployment, as the cell's scripts keep it: who gets the next free slot. Pure.

The simulator runs this class; workers/lua/lib_flows.lua and lib_queue.lua are the same rules in the cell, and
tests/workers/test_fair_queue.py holds the two together on random histories. The rules, in order:

1. Requests whose replica was lost go first. They were charged when they were first bound.
2. The lowest band goes next, except that every `AGED_TURN`-th time it is the turn of a band whose oldest
   request has waited `age_ms` for each band before it.
3. In the band the organization with the least service per weight goes next, in it the project, in it the key
   (virtual token counters, VTC, arXiv:2401.00588, in a hierarchy); of a key the request with the lowest order
   key.
4. Flows within `window` of the least are equals: the lowest order key of their heads goes first, but one behind it
   goes before it if it has more prefixes cached on the replica (DLPM, arXiv:2501.14312), unless the first has all of
   its own, or none to have because its prompt is short.
5. A request that has waited long goes before all others of its band, if the flows it is in lie within the window.
   Long is `age_ms`, and where waits are longer than that, AGE_FOLLOWS times the usual one: in a long backlog everybody
   has waited `age_ms`, and to promote everybody would undo rule 4. AGE_MOST times `age_ms` is long in any case.

Service is charged at dispatch, predicted; more as it is produced; exactly at the end. A request that found a
free slot is charged at its end, if somebody waits then: else it took nothing from anybody. A flow that begins
to wait is lifted to the least counter that waits beside it, or to that of the last to leave: idleness earns no
credit. So the counters of two flows that wait all the time stay within `window + U` of each other, where U is
the largest charge of one request per weight; what was charged wrongly of the requests under way comes on top
until it is made good. Every operation takes O(log n) of the requests that wait; a dispatch looks at each replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

from controlplane.policy.flows import ANY_MS, ORDINARY_WEIGHT, Flow, Replica, Request, service, virtual
from controlplane.policy.prefix import cached_tokens, n_of_prompt
from controlplane.policy.ranking import Ranking

# The same numbers as in lib_queue.lua.
CANDIDATES: Final = 8
BESIDE: Final = 8  # flows of a level that a prediction looks at; the others are taken like the last of these
AGED_TURN: Final = 8
AGE_FOLLOWS: Final = 4
AGE_MOST: Final = 16
WAIT_SHARE: Final = 8  # one over the weight of the latest wait in the usual one

_BAND_SPAN: Final = 10**13  # more than any instant in ms
_ORG, _PROJECT, _KEY = 0, 1, 2

# A place of a flow: (level, band, parent). Its members are organizations, projects or keys.
_Place = tuple[int, int, str]
Binding = tuple[str, str]  # request, replica
_K = TypeVar("_K")


class FairQueue:
    """One deployment's queue and slots. Methods that may fill slots answer the bindings made, in order."""

    def __init__(self, *, bound: int = 2_000, window: int = 0, age_ms: int = 30_000) -> None:
        """`window` in counter units (TOKEN = one prompt token), `bound` in requests."""
        self.bound = bound
        self.window = window
        self.age_ms = age_ms
        self.replicas: dict[str, Replica] = {}
        self.requests: dict[str, Request] = {}  # those not settled
        self.turn = 0
        self.usual_wait_ms = 0  # moving average over dispatches
        self._resumed = Ranking()  # by instant of admission
        self._bands: dict[int, Ranking] = {}  # waiting requests by instant of admission
        self._keys: dict[tuple[int, str], Ranking] = {}  # waiting requests of a key, by order key
        self._active: dict[_Place, Ranking] = {}  # flows that wait, by counter
        self._counters: dict[tuple[_Place, str], int] = {}
        self._left: dict[_Place, int] = {}  # counter of the last flow that left
        self._n_waiting: dict[str, int] = {}  # by organization
        self._slot_ms: dict[tuple[_Place, str], int] = {}  # predicted slot time that waits, by flow
        self._cost: dict[tuple[_Place, str], int] = {}  # what that will add to its counter
        self._band_ms: dict[int, int] = {}  # and by band

    # -- what happens

    def admit(
        self,
        request: Request,
        now_ms: int,
        candidates: Sequence[str] = (),
        *,
        most_ahead_ms: int = ANY_MS,
        most_own_ms: int = -1,
    ) -> tuple[str, list[Binding]]:
        """('bound' | 'queued' | 'full' | 'late', bindings). It never overtakes: with anything waiting it waits, too.

        Late: no slot is free, more than `most_ahead_ms` of slot time waits before it, and that is not because of
        others alone: see `within_share` for `most_own_ms`.
        """
        request.admitted_at_ms = now_ms
        if not len(self):
            for replica in candidates:
                if self.is_free(replica):
                    self.requests[request.id] = request
                    self.replicas[replica].prefixes.note(request.prefixes, now_ms)
                    self._bind(request, replica)
                    return "bound", [(request.id, replica)]
        if not self._has_room(request.flow.organization):
            return "full", []
        ahead_ms = self.ahead_ms(request.flow) if len(self) else 0
        if ahead_ms > most_ahead_ms and self._is_taken() and not self.within_share(request.flow, most_own_ms):
            return "late", []
        self.requests[request.id] = request
        self._join(request, now_ms)
        bindings = self.pump(now_ms)
        return ("bound" if request.replica else "queued"), bindings

    def settle(
        self, request_id: str, now_ms: int, *, n_prompt: int, n_cached: int, n_output: int
    ) -> list[Binding]:
        """It ended, with these exact counts."""
        request = self.requests.pop(request_id)
        if request.replica:
            self.replicas[request.replica].running.discard(request_id)
        else:
            self._leave(request)
        if request.charged or len(self):
            self._charge(request.flow, request.charged, service(n_prompt, n_cached, n_output))
        return self.pump(now_ms)

    def produced(self, request_id: str, n_output: int) -> None:
        """It has put out `n_output` tokens so far: charged as they come, once beyond what was expected."""
        request = self.requests[request_id]
        more = n_output - request.n_expected
        before = request.charged
        if more > 0 and (before or len(self)):
            request.charged = (
                before + service(0, 0, more) if before else service(request.n_prompt, 0, n_output)
            )
            self._charge(request.flow, before, request.charged)
            request.n_expected = n_output

    def cancel(self, request_id: str) -> None:
        """Its client has gone: it waits no longer. A bound one runs until it is settled."""
        request = self.requests[request_id]
        if not request.replica:
            self._leave(request)

    def enrol(self, replica: str, slots: int, now_ms: int) -> list[Binding]:
        """A replica is ready, or has another number of slots."""
        known = self.replicas.setdefault(replica, Replica(slots))
        known.slots, known.routed = slots, True
        return self.pump(now_ms)

    def drain(self, replica: str) -> None:
        """It gets nothing new."""
        self.replicas[replica].routed = False

    def lose(self, replica: str, now_ms: int) -> list[Binding]:
        """It died: what it ran goes to the head of the queue."""
        lost = self.replicas[replica]
        lost.routed = False
        lost.prefixes.clear()
        return self.requeue(replica, tuple(lost.running), now_ms)

    def requeue(self, replica: str, request_ids: Sequence[str], now_ms: int) -> list[Binding]:
        """These requests never reached it, or died with it: they go to the head of the queue."""
        for request_id in request_ids:
            request = self.requests[request_id]
            request.replica = ""
            self.replicas[replica].running.discard(request_id)
            self._resumed.put(request_id, request.admitted_at_ms)
        return self.pump(now_ms)

    def sweep(self) -> None:
        """Forget counters that say no more than none would: those of flows at or below where a newcomer
        starts."""
        for place, name in list(self._counters):
            active = self._active.get(place)
            if active and name in active:
                continue
            base = active.least() if active else self._left.get(place, 0)
            if self._counters[place, name] <= (base or 0):
                del self._counters[place, name]

    # -- what is seen

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._resumed) + sum(len(band) for band in self._bands.values())

    def is_free(self, replica: str) -> bool:
        known = self.replicas.get(replica)
        return known is not None and known.is_free

    def counters(self) -> dict[tuple[int, int, str, str], int]:
        """(level, band, parent, name) -> counter, of every flow that is remembered."""
        return {(*place, name): value for (place, name), value in self._counters.items()}

    def last_left(self) -> dict[_Place, int]:
        """(level, band, parent) -> counter of the last flow that left there."""
        return dict(self._left)

    def active(self) -> dict[_Place, dict[str, int]]:
        """(level, band, parent) -> counters of the flows that wait."""
        return {place: ranking.items() for place, ranking in self._active.items() if ranking}

    def waiting(self) -> dict[str, dict[str, int]]:
        """'resumed' and '<band>': requests by admission; '<band>:<key>': requests by order key."""
        found = {"resumed": self._resumed.items()} if self._resumed else {}
        found |= {str(band): ranking.items() for band, ranking in self._bands.items() if ranking}
        found |= {f"{band}:{key}": ranking.items() for (band, key), ranking in self._keys.items() if ranking}
        return found

    def n_waiting(self) -> dict[str, int]:
        """Requests in flows by organization; resumed ones are in none."""
        return dict(self._n_waiting)

    def slot_ms(self) -> dict[tuple[int, int, str, str], int]:
        """(level, band, parent, name) -> predicted slot time that waits there."""
        return {(*place, name): value for (place, name), value in self._slot_ms.items()}

    def band_ms(self) -> dict[int, int]:
        """The same by band."""
        return dict(self._band_ms)

    def waiting_cost(self) -> dict[tuple[int, int, str, str], int]:
        """(level, band, parent, name) -> what the requests that wait there will add to its counter."""
        return {(*place, name): value for (place, name), value in self._cost.items()}

    def ahead_ms(self, flow: Flow) -> int:
        """Slot time of the waiting requests that will probably go before one that joins this flow now.

        What waits in its own key; of each flow beside it, at each level, what will be served until its counter is where
        ours will be then, and the window beyond; and all of the bands before. Who waits now counts, not who will come.
        """
        levels = self._places(flow)
        ahead = self._slot_ms.get((levels[_KEY][0], flow.key), 0)
        for level in (_KEY, _PROJECT, _ORG):
            place, name, _ = levels[level]
            active = self._active.get(place)
            if not active:
                continue
            lowest = active.lowest(BESIDE + 1)
            beside = [other for other in lowest if other != name][:BESIDE]
            own_ms = self._slot_ms.get((place, name), 0)
            reach = max(self._counters.get((place, name), 0), active.score(lowest[0])) + self.window
            if own_ms:
                reach += int(float(self._cost.get((place, name), 0)) * ahead / own_ms)
            above = levels[level - 1]
            total = self._slot_ms.get((above[0], above[1]), 0) if level else self._band_ms.get(flow.band, 0)
            rest, share = total - own_ms, 0.0
            for other in beside:
                ms, cost = self._slot_ms.get((place, other), 0), self._cost.get((place, other), 0)
                share = min(max(reach - active.score(other), 0) / cost, 1.0) if cost else 1.0
                rest -= ms
                ahead += int(ms * share)
            if rest > 0 and len(beside) == BESIDE:
                ahead += int(rest * share)
        return ahead + sum(ms for band, ms in self._band_ms.items() if band < flow.band)

    def within_share(self, flow: Flow, most_ms: int) -> bool:
        """Whether others wait beside this organization in its band, and it has no more slot time waiting than `most_ms`
        of its share of the slots by weight: then it is late because of them, and to refuse it would give them its share
        as well."""
        place, name, weight = self._places(flow)[_ORG]
        active = self._active.get(place)
        n_others = len(active) - (name in active) if active else 0
        if not n_others:
            return False
        own_ms = self._slot_ms.get((place, name), 0)
        return own_ms + own_ms * n_others * ORDINARY_WEIGHT // weight <= most_ms

    # -- slots

    def _is_taken(self) -> bool:
        """There are replicas that take requests, and none has a free slot."""
        routed = [replica for replica in self.replicas.values() if replica.routed]
        return bool(routed) and not any(replica.is_free for replica in routed)

    def pump(self, now_ms: int) -> list[Binding]:
        """Bind waiting requests while there is a free slot, one a round and replica by id. (The cell binds at
        most 256 a call.)"""
        bindings: list[Binding] = []
        if not len(self):
            return bindings
        free = sorted(name for name, replica in self.replicas.items() if replica.is_free)
        while free:
            still = []
            for replica in free:
                if not self.replicas[replica].is_free:
                    continue
                request = self._take(replica, now_ms)
                if request is None:
                    return bindings
                self._bind(request, replica)
                bindings.append((request.id, replica))
                still.append(replica)
            free = still
        return bindings

    def _take(self, replica: str, now_ms: int) -> Request | None:
        """The request this replica gets, out of the queue and charged."""
        if self._resumed:
            request = self.requests[self._resumed.first()]
            self._resumed.drop(request.id)
            return request
        band = self._next_band(now_ms)
        if band is None:
            return None
        index = self.replicas[replica].prefixes
        overdue = self._overdue(band, now_ms)
        heads = sorted(self._heads(band), key=lambda r: (r.order_key, r.id)) if overdue is None else [overdue]
        best, best_n = None, -1
        for request in heads:
            n = index.longest(request.prefixes)
            if n > best_n:
                best, best_n = request, n
                if n == len(request.prefixes):  # nothing to gain by passing it over
                    break
        assert best is not None
        n_cached = cached_tokens(n_of_prompt(best.prefixes, best_n), best.n_prompt)
        best.charged = service(best.n_prompt, n_cached, best.n_expected)
        self._charge(best.flow, 0, best.charged)
        self._leave(best)
        index.note(best.prefixes, now_ms)
        waited_ms = max(now_ms - best.admitted_at_ms, 0)
        self.usual_wait_ms += (waited_ms - self.usual_wait_ms) // WAIT_SHARE
        return best

    def _bind(self, request: Request, replica: str) -> None:
        request.replica = replica
        self.replicas[replica].running.add(request.id)

    # -- choosing

    @property
    def patience_ms(self) -> int:
        """After how long a request goes before all others of its band."""
        return min(max(self.age_ms, AGE_FOLLOWS * self.usual_wait_ms), AGE_MOST * self.age_ms)

    def _next_band(self, now_ms: int) -> int | None:
        lowest: int | None = None
        aged, worst = None, -1
        for band in sorted(band for band, ranking in self._bands.items() if ranking):
            if lowest is None:
                lowest = band
                continue
            oldest = self._bands[band].least()
            assert oldest is not None
            overdue_ms = now_ms - oldest - self.age_ms * (band - lowest)
            if overdue_ms > worst:
                aged, worst = band, overdue_ms
        if aged is None:
            return lowest
        self.turn += 1
        if self.turn < AGED_TURN:
            return lowest
        self.turn = 0
        return aged

    def _overdue(self, band: int, now_ms: int) -> Request | None:
        """The oldest request of the band, if it has waited `patience_ms` and no flow it is in has had more than the
        window allows."""
        oldest = self.requests[self._bands[band].first()]
        if now_ms - oldest.admitted_at_ms < self.patience_ms:
            return None
        for place, name, _ in self._places(oldest.flow):
            active = self._active[place]
            if active.score(name) > active.score(active.first()) + self.window:
                return None
        return oldest

    def _heads(self, band: int) -> list[Request]:
        """Requests to choose from: one for each flow within the window, at the first level that has
        several."""
        organizations = self._within((_ORG, band, ""))
        if len(organizations) > 1:
            return [self._head(band, name) for name in organizations]
        projects = self._within((_PROJECT, band, organizations[0]))
        if len(projects) > 1:
            return [self._head(band, organizations[0], name) for name in projects]
        keys = self._within((_KEY, band, projects[0]))
        return [self._head(band, organizations[0], projects[0], name) for name in keys]

    def _within(self, place: _Place) -> list[str]:
        active = self._active[place]
        lowest = active.lowest(CANDIDATES)
        limit = active.score(lowest[0]) + self.window
        return [name for name in lowest if active.score(name) <= limit]

    def _head(self, band: int, organization: str, project: str = "", key: str = "") -> Request:
        project = project or self._active[_PROJECT, band, organization].first()
        key = key or self._active[_KEY, band, project].first()
        return self.requests[self._keys[band, key].first()]

    # -- flows

    def _has_room(self, organization: str) -> bool:
        """An organization may hold three times what it leaves free (Choudhury and Hahne 1998)."""
        n = len(self)
        return n < self.bound and self._n_waiting.get(organization, 0) < 3 * (self.bound - n)

    @staticmethod
    def _places(flow: Flow) -> tuple[tuple[_Place, str, int], ...]:
        """(place, name there, weight) from the organization down."""
        return (
            ((_ORG, flow.band, ""), flow.organization, flow.weights[0]),
            ((_PROJECT, flow.band, flow.organization), flow.project, flow.weights[1]),
            ((_KEY, flow.band, flow.project), flow.key, flow.weights[2]),
        )

    def _charge(self, flow: Flow, before: int, after: int) -> None:
        """Move a request's charge (tenths). While nothing waits the flow counts as one that joins and leaves
        in this instant: it is lifted, and is the last that left."""
        if before == after:
            return
        waits = bool(len(self))
        for place, name, weight in self._places(flow):
            left = self._left.get(place, 0)
            counter = self._counters.get((place, name), left)
            if not waits:
                counter = max(counter, left)
            counter += virtual(after, weight) - virtual(before, weight)
            self._counters[place, name] = counter
            active = self._active.get(place)
            if not waits:
                self._left[place] = counter
            elif active and name in active:
                active.put(name, counter)

    def _join(self, request: Request, now_ms: int) -> None:
        flow = request.flow
        for place, name, _ in self._places(flow):
            active = self._active.setdefault(place, Ranking())
            if name not in active:
                least = active.least()
                base = self._left.get(place, 0) if least is None else least
                counter = max(self._counters.get((place, name), 0), base)
                self._counters[place, name] = counter
                active.put(name, counter)
        self._keys.setdefault((flow.band, flow.key), Ranking()).put(request.id, request.order_key)
        self._bands.setdefault(flow.band, Ranking()).put(request.id, now_ms)
        self._n_waiting[flow.organization] = self._n_waiting.get(flow.organization, 0) + 1
        self._waits(request, 1)

    def _leave(self, request: Request) -> None:
        """Out of the queue; flows that have nothing left leave, and note at which counter."""
        flow = request.flow
        self._resumed.drop(request.id)
        waiting = self._keys.get((flow.band, flow.key))
        if waiting is None or not waiting.drop(request.id):
            return  # resumed requests wait outside the flows
        self._bands[flow.band].drop(request.id)
        self._n_waiting[flow.organization] -= 1
        if not self._n_waiting[flow.organization]:
            del self._n_waiting[flow.organization]
        self._waits(request, -1)
        under = waiting
        if not under:
            del self._keys[flow.band, flow.key]
        for place, name, _ in reversed(self._places(flow)):
            if under:
                return
            active = self._active[place]
            self._left[place] = self._counters[place, name]
            active.drop(name)
            if not active:
                del self._active[place]
            under = active

    def _waits(self, request: Request, by: int) -> None:
        """Adds to what waits, or takes from it; what is 0 is forgotten."""
        flow, ms = request.flow, by * request.slot_ms
        tenths = service(request.n_prompt, 0, request.n_expected)
        for place, name, weight in self._places(flow):
            _add(self._slot_ms, (place, name), ms)
            _add(self._cost, (place, name), by * virtual(tenths, weight))
        _add(self._band_ms, flow.band, ms)


def _add(sums: dict[_K, int], key: _K, more: int) -> None:
    now = sums.get(key, 0) + more
    if now:
        sums[key] = now
    else:
        sums.pop(key, None)
