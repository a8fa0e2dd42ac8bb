"""The Postgres side of intake: usage events, exactly one row per request.

Called by intake only, on a connection of the operator role. One statement and one commit per batch; a batch
that was booked before changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from django.db import DataError, IntegrityError, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from billing.models import PriceVersion, UsageEvent, Witness
from billing.money import NanoPerMillion, Rates
from billing.rating import FREE
from billing.vetting import Usage
from controlplane.slo import rollup
from controlplane.upstreams import rollup as upstreams

# (column, PostgreSQL type), in the order of _values.
_COLUMNS: Final = (
    ("day", "date"),
    ("request_id", "uuid"),
    ("organization_id", "uuid"),
    ("project_id", "uuid"),
    ("api_key_id", "uuid"),
    ("deployment_id", "uuid"),
    ("replica_id", "uuid"),
    ("machine_id", "uuid"),
    ("model", "text"),
    ("n_prompt_tokens", "int"),
    ("n_cached_tokens", "int"),
    ("n_completion_tokens", "int"),
    ("attempts", "int"),
    ("finish_reason", "text"),
    ("status", "int"),
    ("admitted_at", "timestamptz"),
    ("first_token_ms", "int"),
    ("duration_ms", "int"),
    ("price_version_id", "uuid"),
    ("cost_nano", "bigint"),
    ("witness", "text"),
    ("received_at", "timestamptz"),
    ("end_customer", "text"),
    ("counted_by", "text"),
)
_TABLE: Final = UsageEvent._meta.db_table
_NAMES: Final = ", ".join(name for name, _ in _COLUMNS)
_ARRAYS: Final = ", ".join(f"%s::{kind}[]" for _, kind in _COLUMNS)
# Arrays, not VALUES: one short statement however many rows, and each value bound with its type.
_INSERT: Final = " ".join(
    (
        f"INSERT INTO {_TABLE} ({_NAMES}) SELECT * FROM unnest({_ARRAYS})",  # noqa: S608
        "ON CONFLICT DO NOTHING RETURNING request_id",
    )
)

# "Last used" is for people; a minute's precision spares an update per request.
_TOUCH_KEYS: Final = """
UPDATE tenants_apikey AS k SET last_used_at = used.at
FROM (SELECT * FROM unnest(%s::uuid[], %s::timestamptz[]) AS u(id, at) ORDER BY id) AS used
WHERE k.id = used.id AND (k.last_used_at IS NULL OR k.last_used_at < used.at - interval '1 minute')
"""


@dataclass(frozen=True, slots=True)
class Rated:
    """Usage with its price."""

    usage: Usage
    cost_nano: int


@dataclass(frozen=True, slots=True)
class Booked:
    """Which requests this call booked, which were there before, and which rows the database refused."""

    new: frozenset[UUID]
    repeated: frozenset[UUID]
    refused: frozenset[UUID]


class Books:
    """Usage events in one database."""

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        self._connection = connection

    def rates(self, version_ids: set[UUID]) -> dict[UUID, Rates]:
        """Rates of those price versions that exist; FREE is one."""
        versions = PriceVersion.objects.using(self._connection.alias).filter(id__in=version_ids)
        found = {
            version.id: Rates(
                input=NanoPerMillion(version.input_nano_per_million),
                cached=NanoPerMillion(version.cached_nano_per_million),
                output=NanoPerMillion(version.output_nano_per_million),
            )
            for version in versions
        }
        if FREE in version_ids:
            found[FREE] = Rates(NanoPerMillion(0), NanoPerMillion(0), NanoPerMillion(0))
        return found

    def ensure_partitions(self, days_ahead: int) -> int:
        """Partitions exist from yesterday to `days_ahead`; how many were made."""
        with self._connection.cursor() as cursor:
            cursor.execute("SELECT corral_ensure_usage_partitions(%s)", [days_ahead])
            return int(cursor.fetchone()[0])

    def book(self, rated: Sequence[Rated], received_at: datetime) -> Booked:
        """Store each request's usage once. On return it is committed.

        Where the database refuses the batch for a value in it, rows are tried one by one, so that a bad one
        cannot hold up the others. Everything else (connection, timeout) passes through: nothing is known
        then.
        """
        given = frozenset(item.usage.request_id for item in rated)
        try:
            with self._atomic():
                new = self._insert(rated, received_at)
            return Booked(new=new, repeated=given - new, refused=frozenset())
        except (DataError, IntegrityError):
            pass
        new, refused = frozenset[UUID](), frozenset[UUID]()
        for item in rated:
            try:
                with self._atomic():
                    new |= self._insert([item], received_at)
            except (DataError, IntegrityError):
                refused |= {item.usage.request_id}
        return Booked(new=new, repeated=given - new - refused, refused=refused)

    def touch_keys(self, usages: Sequence[Usage]) -> None:
        """Move `last_used_at` of the API keys forward; never earlier than what is stored, to the minute."""
        latest: dict[UUID, datetime] = {}
        for usage in usages:
            latest[usage.api_key_id] = max(usage.admitted_at, latest.get(usage.api_key_id, usage.admitted_at))
        with self._connection.cursor() as cursor:
            cursor.execute(_TOUCH_KEYS, [list(latest.keys()), list(latest.values())])

    def _atomic(self) -> AbstractContextManager[Any]:
        return transaction.atomic(using=self._connection.alias)

    def _insert(self, rated: Sequence[Rated], received_at: datetime) -> frozenset[UUID]:
        rows = [_values(item, received_at) for item in rated]
        with self._connection.cursor() as cursor:
            cursor.execute(_INSERT, [list(column) for column in zip(*rows, strict=True)])
            new = frozenset(row[0] for row in cursor.fetchall())
        # In the same transaction: what is booked once is counted once.
        rollup.add(self._connection, (done for item in rated if (done := _finished(item, new)) is not None))
        elsewhere = [each for item in rated if (each := _elsewhere(item, new)) is not None]
        if elsewhere:
            upstreams.add(self._connection, elsewhere)
        return new


def _elsewhere(rated: Rated, new: frozenset[UUID]) -> upstreams.Served | None:
    """The request as an endpoint elsewhere served it; None where none did, or it was booked before."""
    usage, event = rated.usage, rated.usage.event
    if not event.counted_by or usage.request_id not in new or usage.replica_id is None:
        return None
    return upstreams.Served(
        usage.replica_id,
        usage.day,
        event.status,
        event.counted_by,
        event.n_prompt,
        event.n_cached,
        usage.n_completion,
        rated.cost_nano,
    )


def _finished(rated: Rated, new: frozenset[UUID]) -> rollup.Finished | None:
    """The request as its promise sees it; None where it was booked before, or nobody knows what was promised."""
    usage, event = rated.usage, rated.usage.event
    slo = event.slo
    if slo is None or usage.request_id not in new or not rollup.is_plausible(slo):
        return None
    whose = rollup.Whose(usage.organization_id, usage.project_id, usage.deployment_id, slo.name)
    return rollup.Finished(
        whose=whose,
        slo=slo,
        ended_at=usage.admitted_at + timedelta(milliseconds=event.duration_ms),
        status=event.status,
        first_token_ms=event.first_token_ms,
        duration_ms=event.duration_ms,
        n_completion=usage.n_completion,
        attempts=event.attempts,
    )


def _values(rated: Rated, received_at: datetime) -> tuple[object, ...]:
    usage, event = rated.usage, rated.usage.event
    return (
        usage.day,
        usage.request_id,
        usage.organization_id,
        usage.project_id,
        usage.api_key_id,
        usage.deployment_id,
        usage.replica_id,
        usage.machine_id,
        event.model,
        event.n_prompt,
        event.n_cached,
        usage.n_completion,
        event.attempts,
        event.finish_reason.value,
        event.status,
        usage.admitted_at,
        event.first_token_ms,
        event.duration_ms,
        usage.price_version_id,
        rated.cost_nano,
        (Witness.SPOOL if usage.delivery.from_spool else Witness.STREAM).value,
        received_at,
        event.end_customer,
        event.counted_by,
    )
