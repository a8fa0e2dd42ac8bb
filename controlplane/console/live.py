"""What runs this second, from Redis: queues, slots, heartbeats, and what waiting clients are told.

Called by the overview and the deployment page, every two seconds per open page: one round trip, bounded by
the number of deployments and replicas shown. Redis away is an answer (`available` False), not an error: the
rest of the page comes from Postgres. Reads only ids that the caller selected within its tenant.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final
from uuid import UUID

import msgspec
import redis
from django.conf import settings
from redis.backoff import NoBackoff
from redis.retry import Retry

from workers.contract import Heartbeat
from workers.keys import CellKeys

TIMEOUT_S: Final = 1.0
MAX_READ: Final = 500  # deployments or replicas of one page

_beat_decoder = msgspec.json.Decoder(Heartbeat)


@dataclass(frozen=True, slots=True)
class ReplicaLive:
    """A replica now. `beat`: it has a heartbeat. `tokens_per_s` is None until two of them were seen. `slots_why`: the
    sentence with which its slots were changed last. `itl_p95_ms` 0: no tokens lately. `note`: how an
    endpoint elsewhere is treated, and why.
    """

    used: int = 0
    slots: int = 0
    beat: bool = False
    n_waiting: int = 0
    kv_used_ratio: float = 0.0
    tokens_per_s: float | None = None
    slots_why: str = ""
    itl_p95_ms: float = 0.0
    note: str = ""

    @property
    def kv_used_percent(self) -> int:
        return round(self.kv_used_ratio * 100)


@dataclass(frozen=True, slots=True)
class Stage:
    """What clients that wait for a deployment are told."""

    name: str
    eta_ms: int | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class Live:
    """Live figures by id; ids that Redis does not know have none."""

    available: bool
    queued: Mapping[UUID, int] = field(default_factory=dict)
    stages: Mapping[UUID, Stage] = field(default_factory=dict)
    replicas: Mapping[UUID, ReplicaLive] = field(default_factory=dict)

    @property
    def n_queued(self) -> int:
        return sum(self.queued.values())

    @property
    def n_in_flight(self) -> int:
        return sum(replica.used for replica in self.replicas.values())

    @property
    def n_slots(self) -> int:
        return sum(replica.slots for replica in self.replicas.values())

    @property
    def tokens_per_s(self) -> float:
        return sum(replica.tokens_per_s or 0.0 for replica in self.replicas.values())


def read(deployment_ids: Sequence[UUID], replicas: Sequence[tuple[UUID, UUID]]) -> Live:
    """Live figures of these deployments and (replica, machine) pairs; at most MAX_READ of each are read."""
    deployment_ids, replicas = deployment_ids[:MAX_READ], replicas[:MAX_READ]
    keys = CellKeys(settings.ENV.cell)
    try:
        pipeline = _client().pipeline(transaction=False)
        for deployment_id in deployment_ids:
            pipeline.zcard(keys.queue(deployment_id.hex))
            pipeline.hgetall(keys.stage(deployment_id.hex))
        for replica_id, machine_id in replicas:
            pipeline.hmget(keys.replica(replica_id.hex), "used", "slots", "why")
            pipeline.get(keys.machine(machine_id.hex).heartbeat(replica_id.hex))
        answers = iter(pipeline.execute())
    except redis.RedisError:
        return Live(available=False)
    queued: dict[UUID, int] = {}
    stages: dict[UUID, Stage] = {}
    for deployment_id in deployment_ids:
        queued[deployment_id] = int(next(answers))
        stage = _stage(next(answers))
        if stage is not None:
            stages[deployment_id] = stage
    found = {replica_id: _replica(replica_id, next(answers), next(answers)) for replica_id, _ in replicas}
    return Live(available=True, queued=queued, stages=stages, replicas=found)


def _replica(replica_id: UUID, slots: list[bytes | None], beat: bytes | None) -> ReplicaLive:
    used, n_slots = (int(value or 0) for value in slots[:2])
    why = (slots[2] or b"").decode("utf-8", "replace")
    try:
        heartbeat = _beat_decoder.decode(beat) if beat else None
    except msgspec.DecodeError:  # a machine may write anything here
        heartbeat = None
    if heartbeat is None:
        return ReplicaLive(used=used, slots=n_slots, slots_why=why)
    return ReplicaLive(
        used=used,
        slots=n_slots or heartbeat.slots,
        beat=True,
        n_waiting=heartbeat.n_waiting,
        kv_used_ratio=min(max(heartbeat.kv_used_ratio, 0.0), 1.0),
        tokens_per_s=RATES.rate(replica_id, heartbeat.at_ms, heartbeat.n_tokens_total),
        slots_why=why,
        itl_p95_ms=max(heartbeat.itl_p95_ms, 0.0),
        note=heartbeat.note[:80],
    )


def _stage(fields: Mapping[bytes, bytes]) -> Stage | None:
    name = fields.get(b"stage", b"").decode("utf-8", "replace")
    if not name:
        return None
    eta = fields.get(b"eta_ms", b"")
    return Stage(
        name=name,
        eta_ms=int(eta) if eta.isdigit() else None,
        message=fields.get(b"message", b"").decode("utf-8", "replace"),
    )


class Rates:
    """Tokens per second of each replica, from the counters of its last two different heartbeats.

    Kept per process and bounded: the least recently seen replica goes first. Safe between threads.
    """

    def __init__(self, max_kept: int = 4096) -> None:
        self._max_kept = max_kept
        self._lock = threading.Lock()
        self._last: OrderedDict[UUID, tuple[int, int, float | None]] = OrderedDict()

    def rate(self, replica_id: UUID, at_ms: int, n_total: int) -> float | None:
        """Rate since the heartbeat before this one, None for the first; the same again changes nothing."""
        with self._lock:
            last = self._last.get(replica_id)
            # First seen, or its clock or process began anew.
            if last is None or at_ms < last[0] or n_total < last[1]:
                entry: tuple[int, int, float | None] = (at_ms, n_total, None)
            elif at_ms == last[0]:
                entry = last
            else:
                entry = (at_ms, n_total, (n_total - last[1]) * 1000 / (at_ms - last[0]))
            self._last[replica_id] = entry
            self._last.move_to_end(replica_id)
            while len(self._last) > self._max_kept:
                self._last.popitem(last=False)
            return entry[2]


RATES: Final = Rates()


@cache
def _client() -> Any:
    return redis.Redis.from_url(
        settings.ENV.redis_url,
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        max_connections=16,
    )
