"""Brings a deployment's LoRA adapters to the machines that serve it, and takes them away when they are retired.

Called at the end of every tick, which comes at once when an adapter becomes ready or is retired (its change is
published). Machines get what they need to fetch it, nothing that opens more. Nothing happens for a deployment whose
engine takes no adapters.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

import redis
import structlog

from autoscaler.cell import Cell
from autoscaler.models import LIVE_PHASES, Replica
from controlplane.adapters import selectors
from controlplane.deployments.models import Deployment
from infra.objectstore import EXPIRES_S, Place, signed_urls
from workers.contract import AdapterSpec
from workers.modelcache.adapter import FILES

log = structlog.get_logger("corral.autoscaler")

FRESH_S: Final = EXPIRES_S // 2  # of signed URLs; then they are signed anew


def deliver(deployment: Deployment, cell: Cell, now: datetime) -> int:
    """How many entries changed. Redis being away delays it to the next tick."""
    max_loras, _ = selectors.lora_room(deployment)
    if not max_loras:
        return 0
    machines = (
        Replica.objects.filter(deployment_id=deployment.id, phase__in=LIVE_PHASES)
        .order_by("machine_id")
        .values_list("machine_id", flat=True)
        .distinct()
    )
    rows = {row.id.hex: row for row in selectors.served(deployment)}
    now_ms = int(now.timestamp() * 1000)

    def spec_of(name: str) -> AdapterSpec:
        row = rows[name]
        urls = {}
        if row.source_uri.startswith("s3://"):
            urls = signed_urls(Place.parse(row.source_uri), row.digest, FILES)
        return AdapterSpec(
            deployment=deployment.id.hex,
            digest=row.digest,
            source=row.source_uri,
            n_bytes=row.size_bytes,
            urls=urls,
            at_ms=now_ms,
        )

    n_changed = 0
    try:
        for machine_id in machines:
            n_changed += cell.bring_adapters(
                machine_id.hex, deployment.id.hex, rows, spec_of, now_ms - FRESH_S * 1000
            )
    except redis.RedisError as error:
        log.warning("adapters.not_delivered", deployment=deployment.id.hex, error=type(error).__name__)
    if n_changed:
        log.info("adapters.delivered", deployment=deployment.id.hex, n_changed=n_changed)
    return n_changed
