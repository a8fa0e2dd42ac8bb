"""Whether one machine more would break a quota: asked before any is bought, and again in the transaction of its row.

Called by launch.py, which holds the lock so that two ticks or cells never both take the last place; by observe.py,
so that the decision and whoever waits know the reason; and by tick.py, to tell the tenant. What counts are machines by
the deployment they were bought for. GPU-hours that a running machine will use are not foreseen: the quota stops the
next launch, not a machine that runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from django.db import connection

from autoscaler.models import Offer
from controlplane.deployments.models import Deployment
from controlplane.quotas import selectors
from controlplane.quotas.models import QuotaKind
from controlplane.webhooks.services import emit

CODE: Final = "quota_reached"
_LOCK: Final = int.from_bytes(hashlib.sha256(b"corral quotas").digest()[:8], "big", signed=True)
_UNITS: Final = {QuotaKind.MACHINES: "machines", QuotaKind.SPEND_RATE: "dollars an hour"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one more machine would add."""

    n_gpus: int = 0
    price_nano_per_h: int = 0

    def added(self, kind: QuotaKind) -> int:
        """The least by which it grows; of GPU-hours a first one, if it has any."""
        if kind is QuotaKind.MACHINES:
            return 1
        if kind is QuotaKind.SPEND_RATE:
            return self.price_nano_per_h
        return 1 if self.n_gpus else 0


@dataclass(frozen=True, slots=True)
class Reached:
    """The quota that speaks against it. `is_house`: not the tenant's business by how much."""

    kind: QuotaKind
    limit: int
    used: int
    is_house: bool

    @property
    def sentence(self) -> str:
        if self.is_house:
            return "quota_reached: the house buys no more machines at present; ask its operator"
        if self.kind is QuotaKind.SPEND_RATE:
            used, limit = (f"{amount / 1e9:.2f}" for amount in (self.used, self.limit))
        else:
            used, limit = str(self.used), str(self.limit)
        what = _UNITS.get(self.kind) or f"GPU-hours of this {self.kind.value.removeprefix('gpu_hours_')}"
        return f"quota_reached: {used} of {limit} {what} are used; an owner or admin can raise the quota"


def lock() -> None:
    """Until the transaction ends nobody else checks and buys. Launches are rare, and this takes milliseconds."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_LOCK])


def reached(
    organization_id: UUID | None, zone: str, cell: str, wanted: Wanted, now: datetime
) -> Reached | None:
    """The first quota that one machine more would break; None if there is none. A query where none is set."""
    if organization_id is not None:
        for each in selectors.limits(organization_id=organization_id):
            if each.limit is None:
                continue
            used = selectors.use(
                organization_id=organization_id, cell="", since=selectors.since(each.kind, zone, now)
            ).of(each.kind)
            if wanted.added(each.kind) and used + wanted.added(each.kind) > each.limit:
                return Reached(each.kind, each.limit, used, is_house=False)
    for row in selectors.house_limits(cell):
        kind = QuotaKind(row.kind)
        used = selectors.use(organization_id=None, cell=row.cell, since=selectors.since(kind, "UTC", now)).of(
            kind
        )
        if wanted.added(kind) and used + wanted.added(kind) > row.limit:
            return Reached(kind, row.limit, used, is_house=True)
    return None


def that_fit(
    names: Iterable[str], organization_id: UUID | None, zone: str, cell: str, provider: str, now: datetime
) -> tuple[list[str], Wanted, Reached | None]:
    """Of the offers those that break no quota, in their order; the most that one of them adds; what broke the first."""
    offers = {o.name: o for o in Offer.objects.filter(cell=cell, provider=provider, name__in=list(names))}
    fitting, most, broken = [], Wanted(), None
    for name in names:
        offer = offers.get(name)
        wanted = Wanted() if offer is None else Wanted(offer.n_gpus, offer.price_nano_per_h)
        found = reached(organization_id, zone, cell, wanted, now)
        if found is None:
            fitting.append(name)
            most = Wanted(
                max(most.n_gpus, wanted.n_gpus), max(most.price_nano_per_h, wanted.price_nano_per_h)
            )
        else:
            broken = broken or found
    return fitting, most, None if fitting else broken


def why_none(deployment: Deployment, cell: str, provider: str, now: datetime) -> Reached | None:
    """The quota that even the least of the offers would break; None if one machine more may be bought."""
    offers = Offer.objects.filter(cell=cell, provider=provider).order_by("price_nano_per_h", "n_gpus").first()
    wanted = Wanted() if offers is None else Wanted(offers.n_gpus, offers.price_nano_per_h)
    return reached(deployment.organization_id, deployment.organization.timezone, cell, wanted, now)


def tell(deployment: Deployment, found: Reached, now: datetime) -> None:
    """An event, once an hour and quota. The house's own are not the tenant's business."""
    if found.is_house:
        return
    emit(
        organization_id=deployment.organization_id,
        kind="quota.reached",
        data={
            "kind": found.kind.value,
            "limit": found.limit,
            "used": found.used,
            "deployment_id": str(deployment),
        },
        fence=f"quota:{found.kind.value}:{now:%Y%m%d%H}",
    )
