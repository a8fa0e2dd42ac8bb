"""Adds requests to the minutes and hours of their class. Called by intake, inside the transaction that books them.

Refusals come from gateways, which count them (controlplane/decisions/intake.py): no machine saw them. One statement for
all, in an order that all writers keep, so that none waits for another that waits for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final, NamedTuple
from uuid import UUID

from django.db.backends.base.base import BaseDatabaseWrapper

from controlplane.policy.attained import PPM, Missed, Targets, judge
from workers.contract import Slo

WIDTHS_S: Final = (60, 3_600)
MAX_NAME: Final = 16
_COUNTS: Final = ("n", "n_good", "n_failed", "n_ttft", "n_itl", "n_deadline", "n_refused", "allowed_ppm")
_ARRAYS: Final = ", ".join(["%s::bigint[]"] * len(_COUNTS))
_NAMES: Final = ", ".join(_COUNTS)
_SUMMED: Final = ", ".join(f"{name} = slo_slowindow.{name} + excluded.{name}" for name in _COUNTS)
# A machine says the name of the class: it cannot make up series.
_ADD: Final = f"""
INSERT INTO slo_slowindow (organization_id, project_id, deployment_id, slo_class, width_s, at, {_NAMES})
SELECT each.* FROM unnest(
    %s::uuid[], %s::uuid[], %s::uuid[], %s::text[], %s::int[], %s::timestamptz[], {_ARRAYS}
) AS each (organization_id, project_id, deployment_id, slo_class)
WHERE each.slo_class IN (SELECT name FROM deployments_sloclass)
ON CONFLICT (organization_id, width_s, at, slo_class, project_id, deployment_id) DO UPDATE SET {_SUMMED}
"""  # noqa: S608 - names of ours
_FIELD: Final = {Missed.FAILED: 2, Missed.TTFT: 3, Missed.ITL: 4, Missed.DEADLINE: 5}
_REFUSED: Final = 6


class Whose(NamedTuple):
    """A series of windows."""

    organization: UUID
    project: UUID
    deployment: UUID
    slo_class: str


class Finished(NamedTuple):
    """A request that was served, or should have been."""

    whose: Whose
    slo: Slo
    ended_at: datetime
    status: int
    first_token_ms: int | None
    duration_ms: int
    n_completion: int
    attempts: int


class Refused(NamedTuple):
    """Requests refused for want of capacity."""

    whose: Whose
    objective_ppm: int
    at: datetime
    n: int


def add(
    connection: BaseDatabaseWrapper, finished: Iterable[Finished], refused: Iterable[Refused] = ()
) -> None:
    """Count them. Nothing is checked again: they are new."""
    sums: dict[tuple[Whose, int, datetime], list[int]] = defaultdict(lambda: [0] * len(_COUNTS))
    for each in finished:
        slo = each.slo
        counts, missed = judge(
            Targets(slo.ttft_ms, slo.itl_ms, slo.deadline_s),
            status=each.status,
            first_token_ms=each.first_token_ms,
            duration_ms=each.duration_ms,
            n_completion=each.n_completion,
            attempts=each.attempts,
        )
        if counts:
            field = 1 if missed is None else _FIELD[missed]
            _count(sums, each.whose, each.ended_at, field, 1, slo.objective_ppm)
    for some in refused:
        _count(sums, some.whose, some.at, _REFUSED, some.n, some.objective_ppm)
    if sums:
        rows = [(*whose, width_s, at, *counts) for (whose, width_s, at), counts in sorted(sums.items())]
        with connection.cursor() as cursor:
            cursor.execute(_ADD, [list(column) for column in zip(*rows, strict=True)])


def is_plausible(slo: Slo | None) -> bool:
    """Whether a machine's word about a promise can be counted at all."""
    return (
        slo is not None
        and 0 < len(slo.name) <= MAX_NAME
        and slo.name.isascii()
        and slo.name.isprintable()
        and 0 < slo.objective_ppm < PPM
        and slo.ttft_ms > 0
        and slo.itl_ms > 0
        and slo.deadline_s > 0
    )


def begin_of(at: datetime, width_s: int) -> datetime:
    """Of the window that holds this instant."""
    second = int(at.timestamp())
    return datetime.fromtimestamp(second - second % width_s, tz=UTC)


def _count(
    sums: dict[tuple[Whose, int, datetime], list[int]],
    whose: Whose,
    at: datetime,
    field: int,
    n: int,
    objective_ppm: int,
) -> None:
    for width_s in WIDTHS_S:
        counts = sums[whose, width_s, begin_of(at, width_s)]
        counts[0] += n
        counts[field] += n
        counts[-1] += n * (PPM - objective_ppm)
