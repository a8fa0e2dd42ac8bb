"""Endpoints elsewhere as the console shows them: how each is now, and what it was used for.

Health is what the endpoint's replica says of itself (its heartbeat), as far as it is one of the words we know: the
process speaks to the outside. Reads what the caller's organization has; Redis away is an answer, not an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from autoscaler.models import LIVE_PHASES, Replica
from controlplane.console import live
from controlplane.upstreams import selectors
from controlplane.upstreams.models import Upstream, UpstreamReplica
from controlplane.upstreams.selectors import Served

DAYS: Final = 30
_BREAKER: Final = {  # as workers/engine/upstream/breaker.py calls its states
    "open": ("left alone", "bad", "gets nothing for a while"),
    "half_open": ("on trial", "warn", "one request at a time, to find out"),
    "closed": ("serving", "warn", "the last call failed"),
}
_ERRORS: Final = {
    "upstream_failed": "it answers with errors",
    "upstream_interrupted": "it breaks answers off",
    "upstream_garbage": "its answers make no sense",
    "upstream_unreachable": "it cannot be reached",
    "upstream_refuses_us": "it refuses our key",
    "upstream_misconfigured": "it does not know the model",
    "upstream_busy": "it says it is busy",
    "upstream_timeout": "it takes too long",
}


@dataclass(frozen=True, slots=True)
class Health:
    """In a word, with its colour and the reason."""

    word: str
    tone: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class UpstreamRow:
    """One endpoint. `used` and `slots` are this second's, None where they are not known."""

    row: Upstream
    health: Health
    served: Served
    used: int | None = None
    slots: int | None = None


def rows(*, organization_id: UUID, now: datetime, only: Upstream | None = None) -> list[UpstreamRow]:
    """All endpoints of the organization by name, or only one of them."""
    found = [only] if only else list(selectors.upstreams(organization_id=organization_id).order_by("name"))
    since = now.date() - timedelta(days=DAYS - 1)
    served = selectors.served_by(organization_id=organization_id, since=since)
    replicas = _replicas(organization_id, found)
    alive = [replica for replica in replicas.values() if replica.phase in LIVE_PHASES]
    figures = live.read([], [(replica.id, replica.machine_id) for replica in alive])
    return [
        _row(upstream, replicas.get(upstream.id), figures, served.get(upstream.id, Served()))
        for upstream in found
    ]


def health_of(upstream: Upstream, replica: Replica | None, figures: live.Live) -> Health:
    """`replica`: its newest one."""
    if upstream.disabled_at is not None:
        return Health("disabled", "rest")
    if upstream.target_id is not None:
        return Health("copying", "ok", "a deployment of yours answers")
    if replica is None:
        return Health("starting", "busy")
    if replica.phase not in LIVE_PHASES:
        return Health("not running", "bad", replica.reason_message[:200])
    if replica.phase != "ready":
        return Health(str(replica.phase), "busy")
    if not figures.available:
        return Health("unknown", "rest", "live figures are away")
    seen = figures.replicas.get(replica.id)
    if seen is None or not seen.beat:
        return Health("silent", "bad", "its process has not reported for a while")
    state, _, code = seen.note.partition(" ")
    if state not in _BREAKER:
        return Health("serving", "ok")
    word, tone, meaning = _BREAKER[state]
    return Health(word, tone, f"{_ERRORS.get(code, 'its calls fail')}: {meaning}")


def _row(upstream: Upstream, replica: Replica | None, figures: live.Live, served: Served) -> UpstreamRow:
    seen = figures.replicas.get(replica.id) if replica else None
    health = health_of(upstream, replica, figures)
    if seen is None or upstream.disabled_at is not None:
        return UpstreamRow(upstream, health, served)
    return UpstreamRow(upstream, health, served, seen.used, seen.slots)


def _replicas(organization_id: UUID, upstreams: Sequence[Upstream]) -> dict[UUID, Replica]:
    """The newest of each endpoint, a live one before one that ended."""
    of = dict(
        UpstreamReplica.objects.filter(
            organization_id=organization_id, upstream_id__in=[upstream.id for upstream in upstreams]
        )
        .order_by("-replica_id")
        .values_list("replica_id", "upstream_id")[: live.MAX_READ]
    )
    found: dict[UUID, Replica] = {}
    for replica in Replica.objects.filter(organization_id=organization_id, id__in=of).order_by("-id"):
        known = found.get(of[replica.id])
        if known is None or (known.phase not in LIVE_PHASES and replica.phase in LIVE_PHASES):
            found[of[replica.id]] = replica
    return found
