"""Asks machines to fetch model versions before they are told to serve them. Called by reconcile.py, each pass.

Reads rows and shelves, decides by policy/prefetch.py, writes one field per machine into its part of Redis. The agent
fetches when nothing else is fetched there, and takes the field away; a field that is left is asked for again by nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

import structlog
from django.db.models import Count, Q

from autoscaler.cell import Cell
from autoscaler.models import Machine, MachineState
from autoscaler.policy.prefetch import Room, Wanted, prefetches
from autoscaler.siblings import siblings_of
from autoscaler.specs import signed_files
from controlplane.deployments.models import ModelVersion
from workers.contract import PrefetchSpec

log = structlog.get_logger("corral.autoscaler")

LATELY: Final = timedelta(days=1)
MAX_VERSIONS: Final = 50
MAX_MACHINES: Final = 200


def order(cell: Cell, provider: str, now: datetime) -> int:
    """How many machines were asked. Nothing is read of Redis where no deployment's weights are in a bucket."""
    versions = _versions(now)
    if not versions:
        return 0
    rows = Machine.objects.filter(
        cell=cell.keys.cell, provider=provider, state=MachineState.READY, ends_at=None
    ).order_by("id")[:MAX_MACHINES]
    by_digest = {version.digest: version for version in versions}
    asked = prefetches(_rooms([row.id.hex for row in rows], cell), _wanted(versions))
    for mid, digest in asked:
        source = by_digest[digest].source_uri
        spec = PrefetchSpec(
            digest=digest,
            source=source,
            urls=signed_files(source, digest),
            siblings=siblings_of(UUID(mid), digest, cell, now.timestamp()),
        )
        cell.ask_prefetch(mid, spec)
        log.info("machine.prefetch", machine=mid, digest=digest)
    return len(asked)


def filled(machine_ids: Sequence[str], cell: Cell, now: datetime) -> frozenset[str]:
    """Those of these machines on which nothing is left to fetch; all of them where nothing lies in a bucket."""
    versions = _versions(now)
    if not versions:
        return frozenset(machine_ids)
    rooms = _rooms(machine_ids, cell)
    wanted = _wanted(versions)
    unfilled = {mid for mid, _ in prefetches(rooms, wanted)}
    return frozenset(room.machine_id for room in rooms if not room.asked and room.machine_id not in unfilled)


def _rooms(machine_ids: Sequence[str], cell: Cell) -> list[Room]:
    return [
        Room(mid, frozenset(shelf.digests), cell.read_prefetches(mid), shelf.free_bytes)
        for mid, shelf in cell.read_shelves(machine_ids).items()
    ]


def _wanted(versions: Sequence[ModelVersion]) -> list[Wanted]:
    return [
        Wanted(v.digest, v.size_bytes, v.n_starts)  # type: ignore[attr-defined]
        for v in versions
    ]


def _versions(now: datetime) -> list[ModelVersion]:
    """Those that a deployment serves from a bucket, with the starts of their replicas."""
    started = Q(deployments__replicas__created_at__gte=now - LATELY)
    return list(
        ModelVersion.objects.filter(source_uri__startswith="s3://", deployments__deleted_at=None)
        .exclude(deployments=None)
        .annotate(n_starts=Count("deployments__replicas", filter=started, distinct=True))
        .order_by("-n_starts", "size_bytes", "digest")[:MAX_VERSIONS]
    )
