"""Adds requests that an endpoint elsewhere served to its day: counts, what it took, what was earned. Called by intake,
in the transaction that books them. One statement for all; what names no replica of an endpoint adds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from typing import Final, NamedTuple
from uuid import UUID

from django.db.backends.base.base import BaseDatabaseWrapper

from workers.engine.upstream.counting import BY_UPSTREAM

# Rounded half up, request by request: an estimate of somebody else's bill, no amount that we charge.
_EXACT: Final = (
    "(each.n_prompt - each.n_cached) * r.input_nano_per_million + each.n_cached * r.cached_nano_per_million "
    "+ each.n_completion * r.output_nano_per_million"
)
_COUNTS: Final = ", ".join(["%s::bigint[]"] * 4)
_ADD: Final = f"""
INSERT INTO upstreams_upstreamday AS d (organization_id, upstream_id, day, n_requests, n_failed, n_counted_here,
    n_prompt_tokens, n_cached_tokens, n_completion_tokens, cost_nano, revenue_nano)
SELECT r.organization_id, r.upstream_id, each.day, count(*), count(*) FILTER (WHERE each.failed),
    count(*) FILTER (WHERE each.here), sum(each.n_prompt), sum(each.n_cached), sum(each.n_completion),
    sum(round(({_EXACT})::numeric / 1000000)), sum(each.revenue)
FROM unnest(%s::uuid[], %s::date[], %s::boolean[], %s::boolean[], {_COUNTS})
    AS each (replica_id, day, failed, here, n_prompt, n_cached, n_completion, revenue)
JOIN upstreams_upstreamreplica r USING (replica_id)
GROUP BY r.organization_id, r.upstream_id, each.day ORDER BY 1, 2, 3
ON CONFLICT (organization_id, upstream_id, day) DO UPDATE SET
    n_requests = d.n_requests + excluded.n_requests, n_failed = d.n_failed + excluded.n_failed,
    n_counted_here = d.n_counted_here + excluded.n_counted_here,
    n_prompt_tokens = d.n_prompt_tokens + excluded.n_prompt_tokens,
    n_cached_tokens = d.n_cached_tokens + excluded.n_cached_tokens,
    n_completion_tokens = d.n_completion_tokens + excluded.n_completion_tokens,
    cost_nano = d.cost_nano + excluded.cost_nano, revenue_nano = d.revenue_nano + excluded.revenue_nano
"""  # noqa: S608 - names of ours


class Served(NamedTuple):
    """A request that a replica of an endpoint ended."""

    replica_id: UUID
    day: date
    status: int
    counted_by: str
    n_prompt: int
    n_cached: int
    n_completion: int
    revenue_nano: int


def add(connection: BaseDatabaseWrapper, served: Iterable[Served]) -> None:
    """Count them. Nothing is checked again: they are new."""
    rows = [
        (
            each.replica_id,
            each.day,
            each.status >= 500,
            each.counted_by != BY_UPSTREAM,
            each.n_prompt,
            each.n_cached,
            each.n_completion,
            each.revenue_nano,
        )
        for each in served
    ]
    if rows:
        with connection.cursor() as cursor:
            cursor.execute(_ADD, [list(column) for column in zip(*rows, strict=True)])
