"""The fair queue of one deployment, as the cell's scripts keep it: who gets the next free slot. Pure.

The simulator runs this class; workers/lua/lib_queue.lua is the same in the cell (what it knows of the flows is in
waitingflows.py), and tests/workers/test_fair_queue.py holds the two together on random histories. The rules, in order:

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
from typing import Final

from controlplane.policy.flows import ANY_MS, Replica, Request, service
from controlplane.policy.prefix import cached_tokens, n_of_prompt
from controlplane.policy.ranking import Ranking
from controlplane.policy.waitingflows import WaitingFlows

# The same numbers as in lib_queue.lua.
AGED_TURN: Final = 8
AGE_FOLLOWS: Final = 4
AGE_MOST: Final = 16
WAIT_SHARE: Final = 8  # one over the weight of the latest wait in the usual one

Binding = tuple[str, str]  # request, replica


class FairQueue:
    """One deployment's queue and slots. Methods that may fill slots answer the bindings made, in order."""

    def __init__(self, *, bound: int = 2_000, window: int = 0, age_ms: int = 30_000) -> None:
        """`window` in counter units (TOKEN = one prompt token), `bound` in requests."""
        self.bound = bound
        self.age_ms = age_ms
        self.replicas: dict[str, Replica] = {}
        self.requests: dict[str, Request] = {}  # those not settled
        self.turn = 0
        self.usual_wait_ms = 0  # moving average over dispatches
        self.flows = WaitingFlows(window)
        self._resumed = Ranking()  # by instant of admission

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
        others alone: see `WaitingFlows.within_share` for `most_own_ms`.
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
        ahead_ms = self.flows.ahead_ms(request.flow) if len(self) else 0
        is_late = ahead_ms > most_ahead_ms and self._is_taken()
        if is_late and not self.flows.within_share(request.flow, most_own_ms):
            return "late", []
        self.requests[request.id] = request
        self.flows.join(request, now_ms)
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
            self._resumed.drop(request_id)
            self.flows.leave(request)
        if request.charged or len(self):
            charged = service(n_prompt, n_cached, n_output)
            self.flows.charge(request.flow, request.charged, charged, waits=len(self) > 0)
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
            self.flows.charge(request.flow, before, request.charged, waits=len(self) > 0)
            request.n_expected = n_output

    def cancel(self, request_id: str) -> None:
        """Its client has gone: it waits no longer. A bound one runs until it is settled."""
        request = self.requests[request_id]
        if not request.replica:
            self._resumed.drop(request_id)
            self.flows.leave(request)

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

    # -- what is seen

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._resumed) + sum(len(band) for band in self.flows.bands.values())

    def is_free(self, replica: str) -> bool:
        known = self.replicas.get(replica)
        return known is not None and known.is_free

    def waiting(self) -> dict[str, dict[str, int]]:
        """'resumed' and '<band>': requests by admission; '<band>:<key>': requests by order key."""
        found = {"resumed": self._resumed.items()} if self._resumed else {}
        flows = self.flows
        found |= {str(band): ranking.items() for band, ranking in flows.bands.items() if ranking}
        found |= {f"{band}:{key}": ranking.items() for (band, key), ranking in flows.keys.items() if ranking}
        return found

    # -- slots

    def _has_room(self, organization: str) -> bool:
        """An organization may hold three times what it leaves free (Choudhury and Hahne 1998)."""
        n = len(self)
        return n < self.bound and self.flows.n_waiting.get(organization, 0) < 3 * (self.bound - n)

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
        if overdue is None:
            found = [self.requests[name] for name in self.flows.heads(band)]
            heads = sorted(found, key=lambda r: (r.order_key, r.id))
        else:
            heads = [overdue]
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
        self.flows.charge(best.flow, 0, best.charged, waits=True)
        self.flows.leave(best)
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
        bands = self.flows.bands
        lowest: int | None = None
        aged, worst = None, -1
        for band in sorted(band for band, ranking in bands.items() if ranking):
            if lowest is None:
                lowest = band
                continue
            oldest = bands[band].least()
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
        oldest = self.requests[self.flows.bands[band].first()]
        if now_ms - oldest.admitted_at_ms < self.patience_ms:
            return None
        return oldest if self.flows.is_within(oldest.flow) else None
