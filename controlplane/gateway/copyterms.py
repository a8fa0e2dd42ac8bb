"""As whom, and on which terms, a copy of a request is sent to a shadow.

Called by shadows.py for each copy. A copy is the shadow's own request: its bounds stand where a key's limits stand, so
that admission holds them in the same atomic call, over all gateways; no limit of the caller counts it. Pure, but for
the clock that a budget's window goes by.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from billing.money import NanoPerMillion, Rates
from billing.rating import FREE
from controlplane.gateway import windows
from controlplane.gateway.directory import BudgetRow, Limits, ShadowRow
from controlplane.gateway.keycontext import Deployment, KeyContext
from controlplane.policy.flows import TOKEN
from controlplane.policy.ordering import QueueOrder
from controlplane.policy.periods import Period
from controlplane.policy.promises import CLASSES

_PATIENT: Final = CLASSES[-1]
_NO_LIMIT: Final = -1
_WEIGHT: Final = 100
_MAX_NAME: Final = 64


def deployment_of(shadow: ShadowRow, key: KeyContext) -> Deployment | None:
    """What answers the copy. Of a second deployment at its price of who can wait; None where the caller's key may not
    use that one."""
    if shadow.target:
        found = next((d for d in key.deployments.values() if d.id == shadow.target and not d.adapter), None)
        if found is None:
            return None
        patient = found.classes.get(_PATIENT.name, found)
        return replace(patient, slo=None, predicts=False, shadows=(), classes={})
    return Deployment(
        id=shadow.id,
        name=f"shadow:{shadow.name}"[:_MAX_NAME],
        context_tokens=shadow.max_model_len,
        price_version=FREE.hex,
        rates=Rates(
            NanoPerMillion(shadow.input_nano_per_million),
            NanoPerMillion(shadow.cached_nano_per_million),
            NanoPerMillion(shadow.output_nano_per_million),
        ),
        promise=_PATIENT,
        slo=None,
        own_class=_PATIENT.name,
        predicts=False,
        queue_order=QueueOrder.EDF,
        window=2_000 * TOKEN,
        created_at_s=0,
    )


def context_of(shadow: ShadowRow, key: KeyContext) -> KeyContext:
    """Who sends it: the shadow, for its organization. What a second deployment charges is money of the project and
    organization, so their budgets hold; nothing else of theirs counts a copy."""
    own = (shadow.rpm, _NO_LIMIT, _NO_LIMIT, shadow.slots, _NO_LIMIT)
    is_ours = bool(shadow.target)
    budgets = {scope: limits[4] for scope, _, limits in key.scopes} if is_ours else {}
    scopes: tuple[tuple[str, str, Limits], ...] = (
        ("key", shadow.id, own),
        ("prj", shadow.project, _only(budgets.get("prj", _NO_LIMIT))),
        ("org", shadow.organization, _only(budgets.get("org", _NO_LIMIT))),
    )
    day = BudgetRow(shadow.id, shadow.name, "key", shadow.budget_nano, Period.DAY, "UTC")
    return KeyContext(
        key=shadow.id,
        lookup="",
        project=shadow.project,
        organization=shadow.organization,
        zero_retention=True,  # its body and its answer are gone with its end
        expires_at_ms=None,
        revoked=False,
        suspended=False,
        deployments={},
        scopes=scopes,
        scope_args=tuple(arg for _, scope_id, limits in scopes for arg in (scope_id, *limits, _WEIGHT)),
        budgeted=True,
        budgets=(*windows.of((day,)), *(b for b in key.budgets if is_ours and b.scope != "key")),
        ends=None,
        lease_ms=key.lease_ms if is_ours else None,
        unleased=False,
    )


def _only(budget_nano: int) -> Limits:
    return (_NO_LIMIT, _NO_LIMIT, _NO_LIMIT, _NO_LIMIT, budget_nano)
