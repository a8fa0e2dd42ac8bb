"""Which machines of the cell hold a model version, and leave to fetch it there. Called by act.py at a replica's start.

A cell's machines are of one region and one private network (docs/decisions.md). Only machines that are there to stay
are named, a few of them and other ones for other machines, so that a burst of starts spreads. Nobody is believed:
ranges are verified by who fetches them, and the object store stands behind.
"""

from __future__ import annotations

import hashlib
from typing import Final
from urllib.parse import urlsplit
from uuid import UUID

import redis
import structlog

from autoscaler.cell import Cell
from autoscaler.models import Machine, MachineState
from workers.modelcache.share import version_url
from workers.modelcache.ticket import LIFE_S, query

log = structlog.get_logger("corral.autoscaler")

MAX_ASKED: Final = 200  # machines whose shelves are looked at, newest first
MAX_NAMED: Final = 3


def siblings_of(machine_id: UUID, digest: str, cell: Cell, now_s: float) -> list[str]:
    """URLs of the version at other machines, `{name}` for a file's; empty where none has it or Redis is away."""
    rows = (
        Machine.objects.filter(cell=cell.keys.cell, state=MachineState.READY, ends_at=None)
        .exclude(id=machine_id)
        .order_by("-ready_at")
        .values_list("id", flat=True)[:MAX_ASKED]
    )
    try:
        shelves = cell.read_shelves([row.hex for row in rows])
    except redis.RedisError as error:
        log.warning("siblings.redis_away", error=type(error).__name__)
        return []
    holders = [
        (_spread(machine_id, holder), shelf)
        for holder, shelf in shelves.items()
        if digest in shelf.digests and shelf.key and _is_plain(shelf.url)
    ]
    ends_at_s = int(now_s) + LIFE_S
    return [
        version_url(shelf.url, digest, query(shelf.key, digest, ends_at_s))
        for _, shelf in sorted(holders, key=lambda each: each[0])[:MAX_NAMED]
    ]


def _spread(machine_id: UUID, holder: str) -> bytes:
    return hashlib.sha256(f"{machine_id.hex}:{holder}".encode()).digest()


def _is_plain(url: str) -> bool:
    """A machine may say what it likes: only an address is taken from it, never a path."""
    try:
        parts = urlsplit(url)
        return (
            parts.scheme == "http"
            and bool(parts.hostname)
            and parts.port is not None
            and url == (f"http://{parts.netloc}")
        )
    except ValueError:
        return False
