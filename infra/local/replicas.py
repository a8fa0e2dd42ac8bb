"""Replicas of the running stack and their slots, as its Redis holds them; for `manage.py status`.

Reads only, bounded, and never fails: a stack whose Redis does not answer has other troubles to show.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from infra.local.environment import SAVED
from infra.local.privatefile import read_json
from workers.contract import Heartbeat
from workers.keys import CellKeys

MAX_REPLICAS: Final = 50
_MAX_SCANS: Final = 100
_TIMEOUT_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class ReplicaSlots:
    """`given` slots of at most `ceiling`, of which `used` are taken; `why` they were changed last ('' : never)."""

    replica: str
    used: int
    given: int
    ceiling: int
    why: str = ""


def read_slots(var: Path) -> list[ReplicaSlots]:
    """Replicas that take requests, by id; none when Redis cannot be asked."""
    saved = read_json(var / SAVED) or {}
    if "CORRAL_REDIS_URL" not in saved:
        return []
    client: Any = redis.Redis.from_url(
        str(saved["CORRAL_REDIS_URL"]),
        socket_timeout=_TIMEOUT_S,
        socket_connect_timeout=_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )
    try:
        return sorted(_read(client, CellKeys(str(saved.get("CORRAL_CELL", "c0")))), key=lambda r: r.replica)
    except (redis.RedisError, OSError):
        return []
    finally:
        client.close()


def _read(client: Any, keys: CellKeys) -> list[ReplicaSlots]:
    found: list[ReplicaSlots] = []
    cursor = 0
    for _ in range(_MAX_SCANS):
        cursor, names = client.scan(cursor, match=keys.replica("?" * 32), count=1000)
        for name in names:
            rid = name.decode().rpartition(":")[2]
            state, mid, used, given, why = client.hmget(name, "state", "mid", "used", "slots", "why")
            if state == b"ready" and len(found) < MAX_REPLICAS:
                beat = client.get(keys.machine(mid.decode()).heartbeat(rid))
                ceiling = max(_ceiling(beat), int(given or 0))
                found.append(
                    ReplicaSlots(rid, int(used or 0), int(given or 0), ceiling, (why or b"").decode())
                )
        if cursor == 0:
            break
    return found


def _ceiling(beat: bytes | None) -> int:
    """Slots that the replica's engine batches; 0 when it does not say."""
    try:
        return msgspec.json.decode(beat, type=Heartbeat).slots if beat else 0
    except msgspec.DecodeError:
        return 0
