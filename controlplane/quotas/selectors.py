"""Reads about quotas: what holds for an organization, what for a cell, and what a tenant uses of its own."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from django.db import connection
from django.db.models import Q

from controlplane.policy import periods
from controlplane.policy.periods import Period
from controlplane.quotas.models import Quota, QuotaKind
from controlplane.tenants import selectors as tenants

_SECONDS_PER_HOUR = 3600


@dataclass(frozen=True, slots=True)
class Limit:
    """What holds for an organization: the lower of its own limit and the house's ceiling. None: no limit."""

    kind: QuotaKind
    own: int | None = None
    ceiling: int | None = None

    @property
    def limit(self) -> int | None:
        return min((each for each in (self.own, self.ceiling) if each is not None), default=None)


@dataclass(frozen=True, slots=True)
class Use:
    """Of machines bought for somebody."""

    n_machines: int
    nano_per_h: int
    gpu_s: float

    def of(self, kind: QuotaKind) -> int:
        """In the unit of the quota; GPU-hours rounded up."""
        if kind is QuotaKind.MACHINES:
            return self.n_machines
        if kind is QuotaKind.SPEND_RATE:
            return self.nano_per_h
        return int(-(-self.gpu_s // _SECONDS_PER_HOUR))


def limits(*, organization_id: UUID) -> list[Limit]:
    """Every kind, with what is set."""
    rows = list(Quota.objects.filter(organization_id=organization_id))
    own = {row.kind: row.limit for row in rows if not row.by_house}
    ceilings = {row.kind: row.limit for row in rows if row.by_house}
    return [Limit(kind, own.get(kind.value), ceilings.get(kind.value)) for kind in QuotaKind]


def house_limits(cell: str) -> list[Quota]:
    """Of the whole house and of this cell. Needs the operator role."""
    return list(Quota.objects.filter(organization=None).filter(Q(cell="") | Q(cell=cell)).order_by("id"))


def since(kind: QuotaKind, zone: str, now: datetime) -> datetime:
    """Start of the window whose hours count; now where none do."""
    if kind.period is None:
        return now
    start_ms = periods.window(Period(kind.period), zone, int(now.timestamp() * 1000)).start_ms
    return datetime.fromtimestamp(start_ms / 1000, tz=UTC)


def own_use(*, organization_id: UUID, kind: QuotaKind, now: datetime) -> int:
    """What the organization of this transaction uses."""
    zone = tenants.organization(organization_id=organization_id).timezone
    with connection.cursor() as cursor:
        cursor.execute("SELECT * FROM corral_own_machine_use(%s)", [since(kind, zone, now)])
        return Use(*cursor.fetchone()).of(kind)


def use(*, organization_id: UUID | None, cell: str, since: datetime) -> Use:
    """Of one organization, or of a cell ('' = all) where it is None. Needs the operator role."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT * FROM corral_machine_use(%s, %s, %s)", [organization_id, cell, since])
        return Use(*cursor.fetchone())
