"""One request as its tenant may see it: what was decided, what was billed, and where it stands now.

Called by the REST API, the console and `manage.py explain`. Everything is scoped by the organization; what the cell's
Redis says counts only if its record names that organization.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any, Final
from uuid import UUID

import msgspec
import redis
from django.conf import settings
from redis.backoff import NoBackoff
from redis.retry import Retry

from billing.models import UsageEvent
from controlplane import ids
from controlplane.decisions.models import RequestDecision
from controlplane.errors import NotFoundError
from workers.keys import CellKeys
from workers.records import decode_admitted

MAX_DECISIONS: Final = 20  # of one request
REDIS_TIMEOUT_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Live:
    """What the cell's Redis says of it. `stage`: queued, running, ended."""

    stage: str
    replica: str = ""
    attempt: int = 0
    n_before: int | None = None  # waiting requests that were admitted before it
    deployment: str = ""
    admitted_at_ms: int = 0
    # What its deployment does while nothing serves: waking, launching_machine, starting_replica, loading_model; empty
    # where a replica serves and it waits for a slot. Milliseconds until one is expected to; None: cannot be told.
    waits_for: str = ""
    eta_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """All that is known of a request."""

    id: UUID
    decisions: tuple[RequestDecision, ...]  # oldest first
    booked: UsageEvent | None
    live: Live | None

    @property
    def stage(self) -> str:
        """refused | queued | running | ended."""
        if self.booked is not None:
            return "ended"
        if self.live is not None:
            return self.live.stage
        if self.decisions and self.decisions[-1].outcome == "refused":
            return "refused"
        return "ended" if self.decisions else "unknown"


def request(*, organization_id: UUID, request_id: UUID) -> Request:
    """Raises NotFoundError where nothing is known of it, also for another tenant's."""
    decisions = RequestDecision.objects.filter(organization_id=organization_id, request_id=request_id)
    booked = UsageEvent.objects.filter(
        organization_id=organization_id, day=ids.day_of(request_id), request_id=request_id
    ).first()
    live = None if booked is not None else _live(organization_id, request_id)
    found = Request(request_id, tuple(decisions.order_by("id")[:MAX_DECISIONS]), booked, live)
    if found.stage == "unknown":
        raise NotFoundError(
            "no such request: admitted ones are known while they run and once they are booked, refused ones for a week",
            field="request_id",
        )
    return found


def request_of(text: str) -> UUID:
    """The id behind `req_…`. Raises NotFoundError."""
    try:
        found = ids.from_text(ids.Prefix.REQUEST, text)
        ids.day_of(found)
    except (ValueError, OverflowError, OSError):
        raise NotFoundError(
            "no such request: an id looks like req_<32 hex digits>", field="request_id"
        ) from None
    return found


def _live(organization_id: UUID, request_id: UUID) -> Live | None:
    """None where Redis knows nothing of it, is away, or it is another tenant's."""
    keys = CellKeys(settings.ENV.cell)
    client = _client(settings.ENV.redis_url)
    try:
        state, adm, rid, attempt = client.hmget(
            keys.request(request_id.hex), "state", "adm", "rid", "attempt"
        )
        if state is None or adm is None:
            return None
        admitted = decode_admitted(adm)
        if admitted.organization != organization_id.hex:
            return None
        n_before, waits_for, eta_ms = None, "", None
        if state == b"queued":
            n_before = client.zrank(keys.queue(admitted.deployment), request_id.hex)
            waits_for, eta_ms = _waits_for(
                client.hmget(keys.stage(admitted.deployment), "stage", "eta_ms", "at_ms")
            )
    except (redis.RedisError, msgspec.DecodeError):
        return None
    stages = {b"queued": "queued", b"bound": "running"}
    return Live(
        stage=stages.get(state, "ended"),
        replica=(rid or b"").decode(),
        attempt=int(attempt or 0),
        n_before=n_before,
        deployment=admitted.deployment,
        admitted_at_ms=admitted.admitted_at_ms,
        waits_for=waits_for,
        eta_ms=eta_ms,
    )


def _waits_for(told: list[bytes | None]) -> tuple[str, int | None]:
    """Of the stage as last announced: its name, and what is left of its ETA now."""
    stage, eta_ms, at_ms = ((value or b"").decode() for value in told)
    if stage in ("", "ready", "failed"):
        return "", None
    if not eta_ms:
        return stage, None
    passed_ms = time.time() * 1000 - int(at_ms or 0)
    return stage, max(int(eta_ms) - round(passed_ms), 0)


@cache
def _client(url: str) -> Any:
    return redis.Redis.from_url(
        url,
        socket_timeout=REDIS_TIMEOUT_S,
        socket_connect_timeout=REDIS_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        max_connections=8,
    )
