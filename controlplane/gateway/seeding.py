"""What was spent before, for a cell that does not know it: from the ledger into the counters that admission compares.

Called by dispatch.py when the admission script answers `seed`: after a Redis that came back empty, at the first request
of a window, or when leased money ran out. It never decides whether a request is served: the script is asked again.
"""

from __future__ import annotations

import time
from typing import Any

from billing.money import Nano
from controlplane.gateway import endlimits
from controlplane.gateway.directory import DirectoryUnavailable, KeyDirectory
from controlplane.gateway.errors import unavailable
from controlplane.gateway.keycontext import KeyContext
from workers import scripts
from workers.keys import CellKeys
from workers.redis_client import Client, RedisError


async def seed(
    redis: Client,
    keys: CellKeys,
    directory: KeyDirectory,
    key: KeyContext,
    verdict: list[Any],
    need: Nano,
    *,
    last: bool,
) -> None:
    """Give the cell the money already booked, from the ledger: of the window budget or the end customer that the
    verdict names, or of each scope with a lifetime budget. `last`: who asks takes what there is then. ApiError (503)
    when it cannot be read or written."""
    try:
        if verdict[1] == b"bud":
            if not verdict[4]:  # the key was cached for longer than the windows it knew of
                raise DirectoryUnavailable
            budget = next(b for b in key.budgets if b.id == verdict[2].decode())
            await budget.seed(redis, keys, directory, int(verdict[3]), int(verdict[4]))
            return
        if verdict[1] == b"end":
            name, leased = verdict[2].decode(), key.ends is not None and key.ends.leased
            await endlimits.seed(redis, keys, directory, name, need, leased=leased, last=last)
            return
        for scope, scope_id, limits in key.scopes:
            if limits[4] >= 0:
                asked_ms = time.time_ns() // 1_000_000
                # A leased budget is this cell's part of it, and so is what was spent of it.
                ask = directory.spent_nano if key.lease_ms is None else directory.spent_here_nano
                spent = await ask(scope, scope_id)
                args = (keys.prefix, scope, scope_id, spent, asked_ms)
                await redis.evalsha(scripts.SEED, (), args)
    except (DirectoryUnavailable, RedisError) as error:
        raise unavailable(
            "budget_unavailable", "the budget cannot be read at the moment: try again shortly", 2.0
        ) from error
