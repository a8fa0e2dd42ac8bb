"""Which replicas a request should try, best first: pure.

A gateway keeps one `Board` per deployment: what it last saw of the replicas, and what it gave them itself since. The
admission script takes the first candidate that has a free slot at that instant, so a stale view costs a detour, never a
wrong placement. `rank` filters, scores and picks in one pass; the simulator runs the same class (sim/routers.py).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from controlplane.policy.affinity import PrefixMap

# Each costs the admission script one HMGET; beyond them the queue finds any free slot.
MAX_CANDIDATES: Final = 8
_KV_FULL: Final = 0.95
_RECENT_FLOOR: Final = 100_000.0  # tokens on average, below which shares of recent work mean nothing
_MAX_EXPONENT: Final = 50.0


@dataclass(frozen=True, slots=True)
class RouteWeights:
    """What a placement costs, in prompt tokens computed. Fitted on the first half of the Mooncake conversation trace
    (`manage.py study routing` measures on the second and on others).

    A prompt token computed here costs `fresh`, and more where it does harm: `crowd` for each request that runs there
    (its next token waits meanwhile), `share` x the replica's recent work over the mean (its cache is overwritten
    faster, and work stays even). A request that runs there costs `seat`: more context is read at every step. Recent is
    `recent_s` seconds. An adapter that must be loaded costs `adapter_tokens`.
    """

    fresh: float = 4.0
    crowd: float = 0.5
    share: float = 15.0
    seat: float = 2_000.0
    recent_s: float = 60.0
    adapter_tokens: float = 10_000.0


@dataclass(slots=True)
class ReplicaLoad:
    """A ready replica as last seen. `used` and `slots` count requests; the caller may move `used` between
    looks. `kv_used_ratio`: what running requests hold of its memory; `price`: time (performance model) and money of a
    token there over those of the best replica; `adapters`: those in its memory, None where nobody knows; `kv_tokens`:
    what its memory holds, 0 where it did not say."""

    replica: str
    machine: str
    used: int
    slots: int
    kv_used_ratio: float = 0.0
    price: float = 1.0
    adapters: set[str] | None = None
    kv_tokens: int = 0


@dataclass(slots=True)
class Ask:
    """What routing wants to know of a request. `prefixes`: its beginnings, shortest first, each known to end after so
    many tokens (`ends`); empty for a short prompt. `flow`: whose it is."""

    n_prompt: int
    prefixes: Sequence[object] = ()
    ends: Sequence[int] = ()
    adapter: str = ""
    flow: str = ""


@dataclass(slots=True)
class Placed:
    """A request given to a replica, until its first token."""

    replica: str
    n_fresh: int
    is_waiting: bool = True
    n_before: int = 0  # prompt tokens that waited there for their first token
    flow: str = ""


@dataclass(slots=True)
class _Book:
    """What this gateway gave a replica: prompt tokens without a first token yet, in all and of each flow, and recent
    work (scaled)."""

    n_prefill: int = 0
    recent: float = 0.0
    placed: deque[Placed] = field(default_factory=deque)
    flows: dict[str, int] = field(default_factory=dict)


class Board:
    """One gateway's view of a deployment. `cache_tokens`: what the prefix cache of a replica holds that does not say so
    itself; 0: no affinity."""

    def __init__(
        self, cache_tokens: int, weights: RouteWeights | None = None, max_prefixes: int = 4_096
    ) -> None:
        self.weights = weights or RouteWeights()
        self.loads: Mapping[str, ReplicaLoad] = {}
        self.prefixes = PrefixMap(cache_tokens, max_prefixes) if cache_tokens > 0 else None
        self._books: dict[str, _Book] = {}
        # Recent work is scaled by e^((now - since) / recent_s), so that only adding costs anything.
        self._since_s, self._scale = 0.0, 1.0

    def see(self, loads: Mapping[str, ReplicaLoad]) -> None:
        """A new look at the replicas. Those that are not in it are gone, with what their caches held."""
        self.loads = loads
        for gone in self._books.keys() - loads.keys():
            del self._books[gone]
            if self.prefixes is not None:
                self.prefixes.forget(gone)

    def rank(self, ask: Ask, limit: int = MAX_CANDIDATES, *, turn: int = 0) -> tuple[str, ...]:
        """Ids of at most `limit` replicas, the least cost first. Equal costs go by recent work, then in an order that
        `turn` (any number that differs by request) rotates, so that gateways with the same view do not follow each
        other. Full replicas come last: one may have freed a slot since it was seen. One without slots does not come."""
        costs = self._costs(ask, turn)
        if limit == 1:
            return (min(costs)[4],) if costs else ()
        costs.sort()
        return tuple(entry[4] for entry in costs[:limit])

    def scores(self, ask: Ask) -> list[tuple[ReplicaLoad, float, int, int]]:
        """(replica, cost, prompt tokens that wait there, prompt tokens that its cache holds) as `rank` sees them, best
        first: for people who ask why."""
        held = self.prefixes.matches(ask.prefixes) if self.prefixes is not None and ask.prefixes else {}
        return [
            (
                self.loads[replica],
                cost,
                self.n_prefill(replica),
                ask.ends[held[replica] - 1] if replica in held else 0,
            )
            for _, cost, _, _, replica in sorted(self._costs(ask, 0))
        ]

    def _costs(self, ask: Ask, turn: int) -> list[tuple[bool, float, float, int, str]]:
        """(is full, cost, recent work, place in the turn, replica), in no order."""
        loads = self.loads
        if not loads:
            return []
        w, books, n_prompt = self.weights, self._books, ask.n_prompt
        held = self.prefixes.matches(ask.prefixes) if self.prefixes is not None and ask.prefixes else {}
        total = sum(book.recent for book in books.values())
        mean = max(total / len(loads), _RECENT_FLOOR * self._scale)
        share = w.share / mean
        costs = []
        n, at = len(loads), turn % len(loads)
        most_slots = max(load.slots for load in loads.values())
        for load in loads.values():
            at = at + 1 if at + 1 < n else 0
            if load.slots <= 0:
                continue
            book = books.get(load.replica)
            n_fresh = n_prompt - ask.ends[held[load.replica] - 1] if load.replica in held else n_prompt
            if book is None:
                n_waiting, recent = 0, 0.0
            else:
                if book.placed and not book.placed[0].is_waiting:
                    _settle(book)
                n_waiting, recent = book.n_prefill, book.recent
            used = load.used * most_slots / load.slots  # fewer slots: each of its requests weighs more
            cost = n_waiting + n_fresh * (w.fresh + w.crowd * used + share * recent) + w.seat * used
            if load.adapters is not None and ask.adapter and ask.adapter not in load.adapters:
                cost += w.adapter_tokens
            is_full = load.used >= load.slots or load.kv_used_ratio >= _KV_FULL
            costs.append((is_full, cost * load.price, recent, at, load.replica))
        return costs

    def n_prefill(self, replica: str) -> int:
        """Prompt tokens given to it whose first token is awaited."""
        book = self._books.get(replica)
        return 0 if book is None else book.n_prefill

    def n_own_prefill(self, replica: str, flow: str) -> int:
        """Those of this flow."""
        book = self._books.get(replica)
        return 0 if book is None else book.flows.get(flow, 0)

    def bound(self, replica: str, ask: Ask, now_s: float) -> Placed:
        """The request took a slot there. What comes back is told of the first token by `started`."""
        book = self._books.get(replica)
        if book is None:
            book = self._books[replica] = _Book()
        n_fresh = self._known(replica, ask)
        placed = Placed(replica, n_fresh, True, book.n_prefill, ask.flow)
        book.n_prefill += n_fresh
        book.flows[ask.flow] = book.flows.get(ask.flow, 0) + n_fresh
        book.recent += n_fresh * self._grow(now_s)
        book.placed.append(placed)
        return placed

    def heard(self, replica: str, ask: Ask, now_s: float) -> None:
        """Another gateway placed a request there: what the cache holds since, and the work it was."""
        if replica not in self.loads:
            return
        book = self._books.get(replica)
        if book is None:
            book = self._books[replica] = _Book()
        book.recent += self._known(replica, ask) * self._grow(now_s)

    def _known(self, replica: str, ask: Ask) -> int:
        """Prompt tokens that it will have to compute; its cache will hold them from now on."""
        if self.prefixes is None or not ask.prefixes:
            return ask.n_prompt
        n = self.prefixes.held(replica, ask.prefixes)
        load = self.loads.get(replica)
        self.prefixes.note(replica, ask.prefixes, ask.ends, 0 if load is None else load.kv_tokens)
        return ask.n_prompt - (ask.ends[n - 1] if n else 0)

    @staticmethod
    def started(placed: Placed) -> None:
        """Its first token came, or it is over: its prompt is computed."""
        placed.is_waiting = False

    def _grow(self, now_s: float) -> float:
        exponent = (now_s - self._since_s) / self.weights.recent_s
        if exponent > _MAX_EXPONENT:
            shrink = math.exp(-exponent)
            for book in self._books.values():
                book.recent *= shrink
            self._since_s, exponent = now_s, 0.0
        self._scale = math.exp(exponent)
        return self._scale


def _settle(book: _Book) -> None:
    """Prompts are computed in order, so what has begun stands at the front."""
    placed, flows = book.placed, book.flows
    while placed and not placed[0].is_waiting:
        done = placed.popleft()
        book.n_prefill -= done.n_fresh
        left = flows[done.flow] - done.n_fresh
        if left > 0:
            flows[done.flow] = left
        else:
            del flows[done.flow]
