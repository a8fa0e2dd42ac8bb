"""Brings what gateways decided from the cell's stream to Postgres, and forgets what is old or too much.

Run by the control worker every two seconds (tasks.py), as the operator. A batch is kept, its refusals counted, and the
mark of how far was read moved in one transaction: a crash repeats nothing. A tenant's rows are bounded per run and in
all, so that a flood of refusals costs what a trickle costs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import msgspec
import redis
import structlog
from django.db import connections, transaction

from controlplane import ids
from controlplane.decisions.models import DecisionMark, Outcome, RequestDecision
from controlplane.decisions.wire import FIELD, Batch, Decision, decode
from controlplane.slo import rollup
from workers.keys import CellKeys

log = structlog.get_logger("corral.decisions")

BATCHES: Final = 20  # read at once
MAX_RUNS: Final = 10
MAX_PER_TENANT_RUN: Final = 500  # rows of one read
MAX_PER_TENANT: Final = 20_000  # rows kept
KEPT: Final = timedelta(days=7)
PRUNE_ROWS: Final = 50_000
_START: Final = "0-0"


@dataclass(slots=True)
class Tally:
    """What a run did."""

    n_kept: int = 0
    n_over: int = 0  # beyond what one tenant may have
    n_bad: int = 0


def run(client: redis.Redis, keys: CellKeys, *, using: str) -> Tally:
    """Read until the stream is empty, a bounded number of times. Raises what Redis and Postgres raise when away."""
    tally = Tally()
    for _ in range(MAX_RUNS):
        if not _pass(client, keys, tally, using):
            break
    return tally


def _pass(client: redis.Redis, keys: CellKeys, tally: Tally, using: str) -> bool:
    """One read; whether there may be more."""
    with transaction.atomic(using=using):
        mark, _ = DecisionMark.objects.using(using).get_or_create(
            cell=keys.cell, defaults={"entry_id": _START}
        )
        # Whoever else reads now waits here, and then reads on from where we stopped.
        mark = DecisionMark.objects.using(using).select_for_update().get(cell=keys.cell)
        answer: Any = client.xrange(keys.decisions, min=f"({mark.entry_id}", count=BATCHES)
        entries: list[tuple[bytes, dict[bytes, bytes]]] = answer
        if not entries:
            return False
        batches = [batch for _, fields in entries if (batch := _decoded(fields, tally)) is not None]
        rows = _bounded([row for batch in batches for row in map(_row, batch.decisions) if row], tally)
        RequestDecision.objects.using(using).bulk_create(rows, batch_size=500)
        rollup.add(connections[using], (), _refused(batches))
        mark.entry_id = entries[-1][0].decode()
        mark.save(using=using, update_fields=["entry_id"])
        tally.n_kept += len(rows)
    # Committed: the entries are only in the way now, and the mark says so if this is lost.
    client.xdel(keys.decisions, *(entry_id for entry_id, _ in entries))
    return len(entries) == BATCHES


def forget_mark_of_another(client: redis.Redis, keys: CellKeys, *, using: str) -> None:
    """A Redis that was emptied may count from an earlier instant: its entries would be taken for read ones."""
    with transaction.atomic(using=using):
        mark = DecisionMark.objects.using(using).select_for_update().filter(cell=keys.cell).first()
        newest: Any = client.xrevrange(keys.decisions, count=1)
        if mark is not None and newest and _order(newest[0][0].decode()) < _order(mark.entry_id):
            mark.entry_id = _START
            mark.save(using=using, update_fields=["entry_id"])


def prune(*, now: datetime, using: str) -> int:
    """Forget what is old, and of each tenant what is beyond its bound; a bounded number a call."""
    rows = RequestDecision.objects.using(using)
    old = rows.filter(at__lt=now - KEPT).order_by("at").values_list("id", flat=True)[:PRUNE_ROWS]
    n = rows.filter(id__in=old).delete()[0]
    with connections[using].cursor() as cursor:
        cursor.execute(
            "SELECT organization_id FROM decisions_requestdecision GROUP BY 1 HAVING count(*) > %s",
            [MAX_PER_TENANT],
        )
        crowded = [row[0] for row in cursor.fetchall()]
    for organization_id in crowded:
        mine = rows.filter(organization_id=organization_id)
        last = mine.order_by("-id").values_list("id", flat=True)[MAX_PER_TENANT - 1]
        over = mine.filter(id__lt=last).order_by("id").values_list("id", flat=True)[:PRUNE_ROWS]
        n += rows.filter(id__in=over).delete()[0]
    return n


def _decoded(fields: dict[bytes, bytes], tally: Tally) -> Batch | None:
    try:
        return decode(fields[FIELD.encode()])
    except (KeyError, msgspec.DecodeError):
        tally.n_bad += 1
        return None


def _row(told: Decision) -> RequestDecision | None:
    try:
        return RequestDecision(
            organization_id=ids.from_wire(told.organization),
            request_id=ids.from_wire(told.request),
            project_id=ids.from_wire(told.project),
            api_key_id=ids.from_wire(told.key),
            deployment_id=ids.from_wire(told.deployment) if told.deployment else None,
            model=told.model[:64],
            outcome=Outcome(told.outcome),
            code=told.code[:40],
            status=told.status,
            slo_class=told.slo_class[: rollup.MAX_NAME],
            at=datetime.fromtimestamp(told.at_ms / 1000, tz=UTC),
            facts=msgspec.to_builtins(told.facts),
        )
    except (ValueError, OverflowError, OSError):
        return None


def _bounded(rows: list[RequestDecision], tally: Tally) -> list[RequestDecision]:
    n_of: Counter[UUID] = Counter()
    kept = []
    for row in rows:
        n_of[row.organization_id] += 1
        if n_of[row.organization_id] <= MAX_PER_TENANT_RUN:
            kept.append(row)
        else:
            tally.n_over += 1
    return kept


def _refused(batches: list[Batch]) -> list[rollup.Refused]:
    found = []
    for batch in batches:
        at = datetime.fromtimestamp(batch.at_ms / 1000, tz=UTC)
        for each in batch.refusals:
            if not (each.n > 0 and 0 < each.objective_ppm < 1_000_000):
                continue
            whose = rollup.Whose(
                ids.from_wire(each.organization),
                ids.from_wire(each.project),
                ids.from_wire(each.deployment),
                each.slo_class,
            )
            found.append(rollup.Refused(whose, each.objective_ppm, at, each.n))
    return found


def _order(entry_id: str) -> tuple[int, ...]:
    return tuple(int(part) for part in entry_id.split("-"))


def connect(url: str, timeout_s: float) -> Any:
    """A client whose every call ends in time."""
    return redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
