"""Keeps what was decided for a pool: inputs, outcome, what was passed over, and by which policy; decides it again.

Called by market.py (purchases), pool.py (the pool's own turn), health.py (sick machines), quarantine.py (an operator's
own orders), and by whoever explains. The house's alone: no tenant sees these rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any
from uuid import UUID

from autoscaler.codec import from_json, to_json
from autoscaler.models import PoolDecision, PoolDecisionKind
from autoscaler.policy.alternatives import Alternative
from autoscaler.policy.gpuhealth import HealthInputs, judge
from autoscaler.policy.market import Purchase
from autoscaler.policy.poolplan import PoolInputs, plan_pool
from autoscaler.policyversion import policy_version


def keep(
    kind: PoolDecisionKind,
    *,
    cell: str,
    provider: str,
    inputs: object,
    outcome: object,
    alternatives: tuple[Alternative, ...],
    reasons: Iterable[str],
    now: datetime,
    command_id: UUID | None = None,
) -> PoolDecision:
    """Store one. `inputs` and `outcome` are frozen dataclasses of the policy's."""
    return PoolDecision.objects.create(
        cell=cell,
        provider=provider,
        kind=kind,
        command_id=command_id,
        inputs=to_json(inputs),
        outcome=to_json(outcome),
        alternatives=to_json(alternatives),
        reasons=list(reasons),
        policy_version=policy_version(),
        at=now,
    )


def replay(row: PoolDecision) -> Any:
    """The outcome, as JSON, that the present policy gives to the stored inputs. Raises CodecError where they cannot be
    read."""
    if row.kind == PoolDecisionKind.POOL:
        return to_json(plan_pool(from_json(PoolInputs, row.inputs))[0])
    if row.kind == PoolDecisionKind.HEALTH:
        return to_json(judge(from_json(HealthInputs, row.inputs)))
    if row.kind == PoolDecisionKind.OPERATOR:
        return row.outcome  # a person decided
    return to_json(from_json(Purchase, row.inputs).plan()[0])
