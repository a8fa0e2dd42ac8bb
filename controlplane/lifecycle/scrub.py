"""Takes what a tenant left in the cell's Redis away: requests with their bodies and journals, counters, queues, keys of
idempotency. Called by erasure.py, when the tenant has been suspended for longer than anything of it can run.

What lies there expires by itself a quarter of an hour after a request's end; this does not wait for it. Another cell's
Redis is not reached from here: there that quarter of an hour, which has passed by then, is what counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec
import redis

from workers.keys import CellKeys
from workers.records import decode_admitted

_BATCH: Final = 500


def scrub(client: redis.Redis, keys: CellKeys, *, organization: str, names: Iterable[str]) -> int:
    """How many keys went. `names`: bare hex ids of its projects, keys and deployments. Safe to repeat."""
    requests = {
        request
        for key in client.scan_iter(f"{keys.prefix}req:*", count=_BATCH)
        if _organization(client, key) == organization
        for request in [key.decode().rpartition(":")[2]]
    }
    mine = {organization, *names, *requests}
    gone = [
        key
        for key in client.scan_iter(f"{keys.prefix}*", count=_BATCH)
        if not mine.isdisjoint(key.decode("utf-8", "replace").split(":"))
    ]
    for at in range(0, len(gone), _BATCH):
        client.unlink(*gone[at : at + _BATCH])
    return len(gone)


def _organization(client: redis.Redis, key: bytes) -> str:
    packed: Any = client.hget(key, "adm")
    try:
        return decode_admitted(packed).organization if packed else ""
    except msgspec.DecodeError:
        return ""
