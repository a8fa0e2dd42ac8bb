"""Gives back what a cell was leased of end customers' money and does not use.

Run by the control worker of each cell after its shares (tenants/tasks.py), as operator. A lease is granted when a
request asks (corral_lease_end, controlplane/gateway/endlimits.py) and admits for a minute; here it shrinks to what was
spent once nothing of it runs. Must never give back what a request of this cell still holds.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

import redis

from controlplane.endcustomers.models import EndCustomerLease
from workers.keys import CellKeys

DATABASE: Final = "operator"
PER_RUN: Final = 1_000  # leases that a run looks at, oldest first; the others wait for the next
# What was admitted ends and is booked within: a request's time (GatewayConfig.request_timeout_s) and half as much. As
# long is the money of a cell that died out of reach.
SETTLES: Final = timedelta(seconds=900)


def give_back(cell: str, client: redis.Redis, now: datetime) -> int:
    """Returns how many were given back. Raises what Redis and Postgres raise when they are away; call again later."""
    leases = EndCustomerLease.objects.using(DATABASE).filter(cell=cell)
    leases.filter(counts_until__lt=now).delete()
    lapsed = list(leases.filter(expires_at__lt=now, returned_at=None).order_by("expires_at")[:PER_RUN])
    pipeline = client.pipeline(transaction=False)
    keys = CellKeys(cell)
    for lease in lapsed:
        pipeline.hmget(keys.limits("end", f"{lease.project_id.hex}.{lease.customer}"), "spent", "held")
    n_returned = 0
    counters: list[list[Any]] = pipeline.execute()
    for lease, (spent, held) in zip(lapsed, counters, strict=True):
        if spent is None:  # lost by this Redis: nobody knows what runs, so it counts until its time is over
            continue
        change: dict[str, Any] = {"counts_until": now + SETTLES}
        if int(held or 0) == 0:
            change |= {"granted": min(int(spent), lease.granted), "returned_at": now}
            n_returned += 1
        # Unless it was granted anew meanwhile.
        leases.filter(id=lease.id, expires_at=lease.expires_at).update(**change)
    return n_returned
