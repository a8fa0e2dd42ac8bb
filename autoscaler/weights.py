"""What there is to know of where a deployment's weights lie, for placement: called by observe.py. Reads only.

Machines say what they hold (`m:*:models`); replicas that are being started say what links are busy with; speeds are
what starts took before (timings.py), or what a machine of any kind does until one was measured.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Final

import redis
import structlog

from autoscaler import timings
from autoscaler.cell import Cell
from autoscaler.config import AutoscalerConfig
from autoscaler.models import Replica, ReplicaPhase
from autoscaler.policy.startup import Tier
from autoscaler.types import Loading, MachineView
from controlplane.deployments.models import Deployment

log = structlog.get_logger("corral.autoscaler")

# Bytes a second until measured: memory to a GPU over PCIe 4, a local NVMe disk, 10 Gbit/s.
UNMEASURED_BPS: Final = {Tier.RAM: 10e9, Tier.DISK: 1.5e9, Tier.SIBLING: 1.2e9, Tier.STORE: 1.2e9}
MAX_ASKED: Final = 500  # machines whose shelves are looked at
MAX_UNDER_WAY: Final = 1000


def look(
    deployment: Deployment, machines: tuple[MachineView, ...], config: AutoscalerConfig, cell: Cell
) -> tuple[Loading | None, tuple[MachineView, ...]]:
    """(what loading takes, the machines with what they hold of it); (None, as they were) where there is nothing to
    load, nobody to load it, or Redis is away."""
    version = deployment.model_version
    open_ids = [m.id for m in machines if m.ends_at_s is None][:MAX_ASKED]
    if not version.size_bytes or not open_ids:
        return None, machines
    try:
        shelves = cell.read_shelves(open_ids)
    except redis.RedisError as error:
        log.warning("weights.redis_away", error=type(error).__name__)
        return None, machines
    nic, disk, store = _under_way(cell.keys.cell)
    seen = []
    for machine in machines:
        shelf = shelves.get(machine.id)
        seen.append(
            replace(
                machine,
                in_ram=shelf is not None and version.digest in shelf.resident,
                on_disk=shelf is not None and version.digest in shelf.digests,
                sends=shelf is not None and bool(shelf.url and shelf.key),
                nic_bytes=nic.get(machine.id, 0.0),
                disk_bytes=disk.get(machine.id, 0.0),
            )
        )
    speeds = {**UNMEASURED_BPS, **timings.speeds(config.provider)}
    boot_s = timings.usual_boot_s(config.provider)
    loading = Loading(
        size_bytes=version.size_bytes,
        ram_bps=speeds[Tier.RAM],
        disk_bps=speeds[Tier.DISK],
        nic_bps=max(speeds[Tier.SIBLING], speeds[Tier.STORE]),
        store_bps=speeds[Tier.STORE],
        store_bytes=store,
        init_s=timings.init_s(config.provider, version.digest),
        boot_s=config.machine_boot_s if boot_s is None else boot_s,
    )
    return loading, tuple(seen)


def _under_way(cell_name: str) -> tuple[dict[str, float], dict[str, float], float]:
    """Bytes that replicas under way have still to load: by machine over its network and from its disk, and from the
    store. What of them has come already is not known, so all of it counts until they serve."""
    rows = Replica.objects.filter(
        phase__in=(ReplicaPhase.STARTING, ReplicaPhase.LOADING), machine__cell=cell_name
    ).exclude(planned_source="")
    nic: dict[str, float] = defaultdict(float)
    disk: dict[str, float] = defaultdict(float)
    store = 0.0
    for machine_id, source, size_bytes in rows.values_list(
        "machine_id", "planned_source", "deployment__model_version__size_bytes"
    )[:MAX_UNDER_WAY]:
        if source in (Tier.STORE, Tier.SIBLING):
            nic[machine_id.hex] += size_bytes
        if source == Tier.DISK:
            disk[machine_id.hex] += size_bytes
        if source == Tier.STORE:
            store += size_bytes
    return nic, disk, store
