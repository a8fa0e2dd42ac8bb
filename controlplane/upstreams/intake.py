"""Brings what gateways tell of shadows from the cell's stream to Postgres, and forgets what is old or too much.

Run by the control worker every two seconds (tasks.py), as the operator. A result is one row however often it is read;
after a crash between commit and delete, requests that were not copied may be counted twice.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import msgspec
import redis
from django.db import connections, transaction

from controlplane import ids
from controlplane.upstreams.models import ShadowResult
from controlplane.upstreams.wire import FIELD, Batch, Result, Skipped, decode
from workers.keys import CellKeys

BATCHES: Final = 20  # read at once
MAX_RUNS: Final = 10
KEPT: Final = timedelta(days=30)
MAX_PER_SHADOW: Final = 20_000  # rows kept
PRUNE_ROWS: Final = 20_000
_INT32: Final = (1 << 31) - 1
_ADD_SKIPS: Final = """
INSERT INTO upstreams_shadowskip AS s (organization_id, upstream_id, day, reason, n)
SELECT * FROM unnest(%s::uuid[], %s::uuid[], %s::date[], %s::text[], %s::bigint[]) ORDER BY 1, 2, 3, 4
ON CONFLICT (organization_id, upstream_id, day, reason) DO UPDATE SET n = s.n + excluded.n
"""
_CROWDED: Final = """
SELECT organization_id, upstream_id FROM upstreams_shadowresult GROUP BY 1, 2 HAVING count(*) > %s
"""


def run(client: redis.Redis, keys: CellKeys, *, using: str) -> int:
    """Read until the stream is empty, a bounded number of times; how many results were new. Raises what Redis and
    Postgres raise when away."""
    n_new = 0
    for _ in range(MAX_RUNS):
        answer: Any = client.xrange(keys.shadows, count=BATCHES)
        entries: list[tuple[bytes, dict[bytes, bytes]]] = answer
        if not entries:
            break
        batches = [batch for _, fields in entries if (batch := _decoded(fields)) is not None]
        with transaction.atomic(using=using):
            n_new += _keep(batches, using)
        client.xdel(keys.shadows, *(entry_id for entry_id, _ in entries))
        if len(entries) < BATCHES:
            break
    return n_new


def prune(*, now: datetime, using: str) -> int:
    """Forget what is old, and of each shadow what is beyond its bound; a bounded number a call."""
    rows = ShadowResult.objects.using(using)
    old = rows.filter(at__lt=now - KEPT).order_by("at").values_list("id", flat=True)[:PRUNE_ROWS]
    n = rows.filter(id__in=old).delete()[0]
    with connections[using].cursor() as cursor:
        cursor.execute("DELETE FROM upstreams_shadowskip WHERE day < %s", [(now - KEPT).date()])
        cursor.execute(_CROWDED, [MAX_PER_SHADOW])
        crowded = cursor.fetchall()
    for organization_id, upstream_id in crowded:
        mine = rows.filter(organization_id=organization_id, upstream_id=upstream_id)
        over = mine.order_by("-at").values_list("id", flat=True)[MAX_PER_SHADOW : MAX_PER_SHADOW + PRUNE_ROWS]
        n += rows.filter(id__in=list(over)).delete()[0]
    return n


def _keep(batches: list[Batch], using: str) -> int:
    made = [row for batch in batches for told in batch.results if (row := _row(told)) is not None]
    rows = {(row.upstream_id, row.request_id): row for row in made}
    known = set(
        ShadowResult.objects.using(using)
        .filter(request_id__in=[request_id for _, request_id in rows])
        .values_list("upstream_id", "request_id")
    )
    new = [row for at, row in rows.items() if at not in known]
    ShadowResult.objects.using(using).bulk_create(new, batch_size=500, ignore_conflicts=True)
    skips: Counter[tuple[UUID, UUID, date, str]] = Counter()
    for batch in batches:
        day = datetime.fromtimestamp(batch.at_ms / 1000, tz=UTC).date()
        for each in batch.skips:
            whose = (ids.from_wire(each.organization), ids.from_wire(each.upstream))
            skips[(*whose, day, Skipped(each.reason).value)] += max(each.n, 0)
    if skips:
        columns = [list(column) for column in zip(*((*whose, n) for whose, n in skips.items()), strict=True)]
        with connections[using].cursor() as cursor:
            cursor.execute(_ADD_SKIPS, columns)
    return len(new)


def _decoded(fields: dict[bytes, bytes]) -> Batch | None:
    try:
        return decode(fields[FIELD.encode()])
    except (KeyError, msgspec.DecodeError):
        return None


def _row(told: Result) -> ShadowResult | None:
    try:
        return ShadowResult(
            organization_id=ids.from_wire(told.organization),
            upstream_id=ids.from_wire(told.upstream),
            request_id=ids.from_wire(told.request),
            at=datetime.fromtimestamp(told.at_ms / 1000, tz=UTC),
            status=told.status,
            code=told.code[:40],
            finish_reason=told.finish[:12],
            first_token_ms=_bounded(told.first_token_ms),
            itl_us=_bounded(told.itl_us),
            duration_ms=_least(told.duration_ms),
            n_prompt_tokens=_least(told.n_prompt),
            n_completion_tokens=_least(told.n_completion),
            cost_nano=told.cost_nano,
            own_finish_reason=told.own_finish[:12],
            own_first_token_ms=_bounded(told.own_first_token_ms),
            own_itl_us=_bounded(told.own_itl_us),
            own_duration_ms=_bounded(told.own_duration_ms),
            own_n_completion_tokens=_bounded(told.own_n_completion),
            is_same=told.is_same,
            similarity_ppm=_bounded(told.similarity_ppm),
        )
    except (ValueError, OverflowError, OSError):
        return None


def _least(value: int) -> int:
    return min(max(value, 0), _INT32)


def _bounded(value: int | None) -> int | None:
    return None if value is None else _least(value)
