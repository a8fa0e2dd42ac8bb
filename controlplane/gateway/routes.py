"""Which replicas of each deployment are ready and how full, as last seen: what admission ranks its candidates
by.

A deployment is looked at when a request needs it, then once a second while requests come, and whenever its
set is announced to have changed. A stale or empty view is safe: the admission script checks slots itself, and
without a candidate it finds any free replica through the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Final

from controlplane.policy import coming
from controlplane.policy.coming import Coming
from controlplane.policy.pace import Speed
from controlplane.policy.routing import Ask, Board, Placed, ReplicaLoad
from workers.keys import CellKeys
from workers.redis_client import Client, RedisError

_POLL_S: Final = 1.0
_ACTIVE_S: Final = 30.0  # looked at for so long after the last request
_MAX_DEPLOYMENTS: Final = 10_000
_MAX_REPLICAS: Final = 1_024  # of one deployment
# Of the prefix cache of a replica that did not say. Believing four times too much cost nothing on Mooncake's
# conversations, half as much a fifth of the hits.
_CACHE_TOKENS: Final = 4_000_000
_UNKNOWN: Final = Ask(1)


class _View:
    __slots__ = (
        "again",
        "board",
        "looking",
        "overflows",
        "pace",
        "replicas",
        "shares",
        "slots",
        "starts",
        "used_at",
    )

    def __init__(self) -> None:
        self.board = Board(_CACHE_TOKENS)
        self.replicas: dict[str, ReplicaLoad] = {}
        self.shares: dict[str, int] = {}  # of canaries: of 65,536 requests, so many
        self.slots = 0  # of all of them
        self.pace: Speed | None = None  # what the performance model says of them; None: nothing
        self.starts: coming.Starts = ()  # replicas that are being started
        self.overflows = False  # there are replicas that take what would be refused
        self.used_at = 0.0
        self.looking = False
        self.again = False  # it changed while being looked at


class RouteTable:
    """Views by deployment id. Belongs to one event loop."""

    def __init__(self, redis: Client, keys: CellKeys) -> None:
        self._redis = redis
        self._keys = keys
        self._views: dict[str, _View] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._poller: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._poller = asyncio.get_running_loop().create_task(self._poll(), name="routes")

    async def close(self) -> None:
        tasks = [*self._tasks, *([self._poller] if self._poller else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def candidates(
        self, deployment: str, ask: Ask = _UNKNOWN, turn: int = 0, request: str = ""
    ) -> tuple[str, ...]:
        """Replica ids, best first for such a request; empty where nothing is known yet (a look is then under way).
        `turn` differs by request: it rotates equals. A request that is a canary's (by its id) goes there first, any
        other never; the admission script holds canaries to that, this spares it the asking."""
        view = self._views.get(deployment)
        if view is None:
            if len(self._views) >= _MAX_DEPLOYMENTS:
                self._views.clear()
            view = self._views[deployment] = _View()
            self._look(deployment, view)
        view.used_at = time.monotonic()
        ranked = view.board.rank(ask, turn=turn)
        return ranked if not view.shares else _in_arms(ranked, view.shares, request)

    def standing(self, deployment: str, replica: str, flow: str) -> tuple[int, int]:
        """Slots of all ready replicas, as last seen, and prompt tokens of this flow that wait at this one."""
        view = self._views.get(deployment)
        return (0, 0) if view is None else (view.slots, view.board.n_own_prefill(replica, flow))

    def coming(self, deployment: str, now_ms: int) -> tuple[Coming, ...]:
        """Replicas that are being started, as last told."""
        view = self._views.get(deployment)
        return coming.NONE if view is None or not view.starts else coming.of(view.starts, now_ms)

    def pace(self, deployment: str) -> Speed | None:
        """How fast the ready replicas should be, by the performance model; None where it cannot tell."""
        view = self._views.get(deployment)
        return None if view is None else view.pace

    def overflows(self, deployment: str) -> bool:
        """Whether replicas are there, as last seen, that only take what would be refused or wait too long."""
        view = self._views.get(deployment)
        return view is not None and view.overflows

    def scores(self, deployment: str, ask: Ask) -> list[tuple[ReplicaLoad, float, int, int]]:
        """What each replica would cost, as `candidates` ranks them; see Board.scores."""
        view = self._views.get(deployment)
        return [] if view is None else view.board.scores(ask)

    def bound(self, deployment: str, replica: str, ask: Ask = _UNKNOWN) -> tuple[str | None, Placed | None]:
        """A request took a slot there; the replica's machine, None if it is not known yet, and what is to be told of
        its first token."""
        view = self._views.get(deployment)
        load = None if view is None else view.replicas.get(replica)
        if view is None or load is None:
            return None, None
        load.used += 1
        if ask.adapter and load.adapters is not None:
            load.adapters.add(ask.adapter)  # it is being loaded there; the next look tells what went for it
        return load.machine, view.board.bound(replica, ask, time.monotonic())

    def heard(self, deployment: str, replica: str, ask: Ask) -> None:
        """Another gateway's request took a slot there. Its load comes with the next look."""
        view = self._views.get(deployment)
        if view is not None:
            view.board.heard(replica, ask, time.monotonic())

    def released(self, deployment: str, replica: str) -> None:
        """A request that took a slot ended."""
        view = self._views.get(deployment)
        load = None if view is None else view.replicas.get(replica)
        if load is not None and load.used > 0:
            load.used -= 1

    def on_change(self, deployment: str) -> None:
        """The set of ready replicas changed."""
        view = self._views.get(deployment)
        if view is not None:
            self._look(deployment, view)

    def _look(self, deployment: str, view: _View) -> None:
        if view.looking:
            view.again = True
            return
        view.looking = True
        task = asyncio.get_running_loop().create_task(self._look_now(deployment, view))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look_now(self, deployment: str, view: _View) -> None:
        try:
            view.again = True
            while view.again:
                view.again = False
                members, n_overflow = await asyncio.gather(
                    self._redis.call("SMEMBERS", self._keys.replicas(deployment)),
                    self._redis.call("SCARD", self._keys.overflow(deployment)),
                )
                ids = sorted(raw.decode() for raw in members)[:_MAX_REPLICAS]
                *rows, (starts,) = await asyncio.gather(
                    *(
                        self._redis.call(
                            "HMGET",
                            self._keys.replica(r),
                            "mid",
                            "used",
                            "slots",
                            "kv",
                            "ad",
                            "share",
                            "price",
                            "pace",
                        )
                        for r in ids
                    ),
                    self._redis.call("HMGET", self._keys.stage(deployment), "starts"),
                )
                view.starts = coming.parse(starts)
                view.replicas = {
                    replica: ReplicaLoad(
                        replica,
                        mid.decode(),
                        int(used or 0),
                        int(slots or 0),
                        adapters=None if held is None else set(held.decode().split()),
                        kv_tokens=int(kv or 0),
                        price=float(price or 1),
                    )
                    for replica, (mid, used, slots, kv, held, _, price, _) in zip(ids, rows, strict=True)
                    if mid
                }
                view.pace = Speed.mean([speed for row in rows if (speed := Speed.parse(row[7])) is not None])
                view.shares = {r: int(row[5]) for r, row in zip(ids, rows, strict=True) if row[5] is not None}
                view.board.see(view.replicas)
                view.slots = sum(load.slots for load in view.replicas.values())
                view.overflows = n_overflow > 0
        except RedisError:
            pass  # the old view serves until the next poll
        finally:
            view.looking = False

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            oldest = time.monotonic() - _ACTIVE_S
            for deployment, view in list(self._views.items()):
                if view.used_at < oldest:
                    del self._views[deployment]
                elif self._redis.connected:
                    with contextlib.suppress(RedisError):
                        self._look(deployment, view)


def _in_arms(ranked: tuple[str, ...], shares: dict[str, int], request: str) -> tuple[str, ...]:
    ending = int(request[-4:] or "ffff", 16)
    own = tuple(r for r in ranked if ending < shares.get(r, 0))
    return own + tuple(r for r in ranked if r not in shares)
