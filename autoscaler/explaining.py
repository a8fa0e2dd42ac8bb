"""One decision explained: what was seen, what was passed over, what was ordered and why; and decided again today.

Called by `manage.py explain` and, for a tenant's own decisions, by the REST API. Reads only. Decisions of a deployment
and of a pool are told alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from autoscaler import pooldecisions
from autoscaler import tick as ticking
from autoscaler.codec import CodecError, to_json
from autoscaler.models import Decision, PoolDecision
from autoscaler.policyversion import policy_version


@dataclass(frozen=True, slots=True)
class Replayed:
    """The same inputs given to the present policy. `differences`: what comes out otherwise; empty: all is equal."""

    policy_then: str
    policy_now: str
    differences: tuple[str, ...]

    @property
    def same(self) -> bool:
        return not self.differences

    @property
    def words(self) -> str:
        """One sentence; where something differs, whether that was to be expected."""
        if self.same:
            by = "the same policy" if self.policy_then == self.policy_now else "a later policy"
            return f"decided again on the stored inputs by {by}: the same result"
        what = ", ".join(self.differences)
        if not self.policy_then:
            return f"the present policy decides otherwise ({what}); which one decided then was not kept"
        if self.policy_then != self.policy_now:
            return f"the policy has changed since, and decides otherwise today: {what}"
        return f"the same policy decides otherwise: {what}. That is a defect: inputs that it used were not stored"


@dataclass(frozen=True, slots=True)
class Explanation:
    """A decision whole, as JSON values, with its replay. `about`: the deployment's name, or the pool's."""

    id: str
    kind: str  # tick, or what PoolDecisionKind knows
    about: str
    at: str
    policy_version: str
    inputs: dict[str, Any]
    reasons: list[str]
    alternatives: list[dict[str, Any]]
    orders: list[Any]
    purchases: list[str]
    link: str  # on the REST API, for a tenant's own
    replayed: Replayed

    def as_json(self) -> dict[str, Any]:
        told = {name: getattr(self, name) for name in self.__slots__ if name != "replayed"}
        again = self.replayed
        return told | {
            "replay": {
                "same": again.same,
                "differences": list(again.differences),
                "policy_version": again.policy_now,
                "words": again.words,
            }
        }


def find(decision_id: UUID) -> Decision | PoolDecision | None:
    """As the operator sees it."""
    row = Decision.objects.select_related("deployment").filter(id=decision_id).first()
    return row or PoolDecision.objects.filter(id=decision_id).first()


def explain(row: Decision | PoolDecision) -> Explanation:
    """All that was kept, and what the present policy says to it."""
    if isinstance(row, Decision):
        launched = [c["command_id"] for c in row.commands if c.get("kind") == "launch_machine"]
        purchases = PoolDecision.objects.filter(command_id__in=[UUID(hex=each) for each in launched])
        return Explanation(
            id=str(row),
            kind="tick",
            about=row.deployment.name,
            at=row.at.isoformat(),
            policy_version=row.policy_version,
            inputs={"observation": row.observation, "spec": row.spec, "memory": row.memory_in},
            reasons=row.reasons,
            alternatives=row.alternatives,
            orders=row.commands,
            purchases=[str(each) for each in purchases.order_by("at")],
            link=f"/api/v1/decisions/{row}",
            replayed=replay(row),
        )
    return Explanation(
        id=str(row),
        kind=row.kind,
        about=f"{row.provider} pool of {row.cell}",
        at=row.at.isoformat(),
        policy_version=row.policy_version,
        inputs=row.inputs,
        reasons=row.reasons,
        alternatives=row.alternatives,
        orders=[row.outcome],
        purchases=[],
        link="",
        replayed=replay(row),
    )


def replay(row: Decision | PoolDecision) -> Replayed:
    """Decide again and compare orders, reasons and what was remembered."""
    if isinstance(row, Decision):
        stored = {"orders": row.commands, "reasons": row.reasons, "memory": row.memory_out}
        differences = _compare(stored, lambda: _again(row))
    else:
        differences = _compare({"outcome": row.outcome}, lambda: {"outcome": pooldecisions.replay(row)})
    return Replayed(row.policy_version, policy_version(), differences)


def _again(row: Decision) -> dict[str, Any]:
    decision = ticking.replay(row)
    return {
        "orders": [to_json(command) for command in decision.commands],
        "reasons": list(decision.reasons),
        "memory": to_json(decision.memory),
    }


def _compare(stored: dict[str, Any], again: Callable[[], dict[str, Any]]) -> tuple[str, ...]:
    try:
        found = again()
    except CodecError as error:
        return (f"its inputs cannot be read any more ({error})",)
    return tuple(name for name, value in stored.items() if found[name] != value)
