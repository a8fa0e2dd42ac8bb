"""What a tenant's money lasts for: how many replicas a deployment may have while its organization's budget runs out.

Called by tick.py with what a decision wants. The rule is the simulator's (policy/ration.py): replicas of one tenant
together cost no more an hour than what is left pays for `HORIZON_H`; the least valuable go first. Only hard budgets of
the whole organization count: those of a project or key bound their requests, not what stands for everybody. Reads only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final
from uuid import UUID

from django.db.models import Count, Q

from autoscaler import market
from autoscaler.config import AutoscalerConfig
from autoscaler.models import LIVE_PHASES, Replica
from autoscaler.policy.fleet import at_most
from autoscaler.policy.ration import Caps, Demand, Purse, ration
from autoscaler.types import Observation, ScalerSpec
from controlplane.budgets import selectors as budgets
from controlplane.budgets.models import Budget
from controlplane.deployments.models import Deployment

HORIZON_H: Final = 1.0
NANO: Final = 1e9


@dataclass(frozen=True, slots=True)
class Means:
    """`n` replicas are granted; `why` fewer than wanted."""

    n: int
    why: str


def granted(
    deployment: Deployment, n_wanted: int, config: AutoscalerConfig, cell: str, now: datetime
) -> Means | None:
    """None where no budget speaks against what is wanted. A query where the organization has none."""
    if n_wanted <= 0 or deployment.deleted_at is not None:
        return None
    left = _usd_left(deployment.organization_id, now)
    if left is None:
        return None
    tenant, own = str(deployment.organization), deployment.id.hex
    each = market.replica_usd_per_h(config, cell, now)
    demands = [Demand(own, tenant, n_wanted, each, n_least=min(deployment.min_replicas, n_wanted))]
    demands += [Demand(did, tenant, n, each, n_least=min(least, n)) for did, n, least in _others(deployment)]
    found = ration(demands, [Purse(tenant, left)], Caps(horizon_h=HORIZON_H))
    n = found.n[own]
    if n >= n_wanted:
        return None
    why = next(reason for reason in found.reasons if reason.startswith(f"{own}: ")).removeprefix(f"{own}: ")
    if n == 0 and left > 0:  # requests are admitted as long as there is money, so somebody has to serve them
        n, why = 1, f"{why}; one serves as long as there is money"
    return Means(n, f"budget: {why}") if n < n_wanted else None


def limited(observation: Observation, spec: ScalerSpec, means: Means) -> tuple[Observation, ScalerSpec]:
    """What decide() is given instead: the grant as its bound, and the reason to tell."""
    return replace(observation, means=means.why), at_most(spec, means.n)


def _usd_left(organization_id: UUID, now: datetime) -> float | None:
    """The least that any of the organization's hard budgets has left; None without one. Requests that run count when
    they are booked."""
    found = budgets.budgets(organization_id=organization_id)
    whole: list[Budget] = list(found.filter(hard=True, project=None, api_key=None, model=""))
    if not whole:
        return None
    return min(b.budget.limit_nano - b.spent_nano for b in budgets.standings(whole, now)) / NANO


def _others(deployment: Deployment) -> list[tuple[str, int, int]]:
    """(id, live replicas, least) of the organization's other deployments that have any."""
    rows = (
        Replica.objects.filter(organization_id=deployment.organization_id, phase__in=LIVE_PHASES)
        .filter(~Q(deployment_id=deployment.id))
        .values("deployment_id", "deployment__min_replicas")
        .annotate(n=Count("id"))
        .order_by("deployment_id")
    )
    return [(row["deployment_id"].hex, row["n"], row["deployment__min_replicas"]) for row in rows]
