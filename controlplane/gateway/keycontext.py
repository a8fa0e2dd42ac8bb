"""What a verified key is to a request: its tenant, its limits, and the deployments that it may call.

`context_of` builds it from a directory record whenever auth.py reads a key, so that nothing is looked up per request;
everything after authentication reads it. It asks nobody, caches nothing, and must never know a secret: whether the
key was the right one is decided in auth.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from billing.money import Rates
from controlplane.gateway import endlimits, windows
from controlplane.gateway.directory import (
    AdapterRow,
    DeploymentRow,
    KeyRecord,
    LeaseRow,
    Limits,
    ShadowRow,
    SloBook,
)
from controlplane.gateway.endlimits import EndLimits
from controlplane.gateway.keybounds import Bounds, bounds_of, callable_names
from controlplane.gateway.windows import WindowBudget
from controlplane.policy.flows import TOKEN
from controlplane.policy.ordering import QueueOrder
from controlplane.policy.promises import CLASSES, Promise, Rule, promises
from controlplane.policy.shares import scaled
from workers.contract import Slo

# Without a word of the deployment's owner those are refused early who would notice: they wait for the first word.
_PREDICTED_TTFT_MS = 5_000
_PREDICTS = {"predicted": True, "bounded": False}


@dataclass(frozen=True, slots=True)
class Deployment:
    """A deployment as a request sees it. Ids are bare hex."""

    id: str
    name: str
    context_tokens: int
    price_version: str
    rates: Rates
    promise: Promise
    slo: Slo | None  # the same, as it travels with a request; None: nothing is promised
    own_class: str  # the deployment's own, whatever the default here is
    predicts: bool  # refuses what would probably miss its target
    queue_order: QueueOrder
    window: int  # of fairness, in counter units: within it a request may go where its prompt is cached
    created_at_s: int
    # The LoRA adapter that answers, and the name of the deployment it is one of; empty for the model as it is.
    adapter: str = ""
    base: str = ""
    # What is sent copies of its requests, where the key's organization agreed to that (shadows.py).
    shadows: tuple[ShadowRow, ...] = ()
    # The same for each service class that a request may name, with its promise and price.
    classes: dict[str, Deployment] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class KeyContext:
    """A verified key: its tenant, limits and what it may call. Ids are bare hex."""

    key: str
    lookup: str
    project: str
    organization: str
    zero_retention: bool
    expires_at_ms: int | None
    revoked: bool
    suspended: bool
    deployments: dict[str, Deployment]
    # (scope, id, limits) for key, project, organization; and the same with the weights in the fair queue,
    # flattened for the admission script.
    scopes: tuple[tuple[str, str, Limits], ...]
    scope_args: tuple[str | int, ...]
    # Whether any of them has a budget, with a window or without.
    budgeted: bool
    # Budgets with windows.
    budgets: tuple[WindowBudget, ...]
    # Limits of its project on end customers; None: there are none.
    ends: EndLimits | None
    # While there are several cells the limits are this cell's part of them, for `lease_ms` from the question on.
    # Without a lease that counts, nothing limited is served.
    lease_ms: int | None
    unleased: bool
    # Where it may be used from and for what; None: anywhere, for everything. Models out of its scope are no deployments
    # of it.
    bounds: Bounds | None = None
    models_bound: bool = False
    # It could not be read again: what it does not name may exist all the same.
    stale: bool = False


def context_of(record: KeyRecord) -> KeyContext:
    """The context behind a directory record."""
    key, project, organization = record.key, record.project, record.organization
    lease = record.lease
    scopes = (
        ("key", key.id, _part(key.limits.values(), "key", lease)),
        ("prj", project.id, _part(project.limits.values(), "prj", lease)),
        ("org", organization.id, _part(organization.limits.values(), "org", lease)),
    )
    ends = endlimits.of(record.end_customers, project.id, None if lease is None else lease.ppm)
    is_limited = ends is not None or bool(record.budgets)
    is_limited = is_limited or any(limit >= 0 for _, _, limits in scopes for limit in limits)
    weights = (key.weight, project.weight, organization.weight)
    classes = tuple(each.promise() for each in record.slo.classes) or CLASSES
    rules = tuple(each.rule() for each in record.slo.rules)
    served = {
        row.name: _deployment(row, key.id, classes, rules, record.slo, record.shadows)
        for row in record.deployments
    }
    if record.adapters:
        served |= _adapted(record.adapters, served)
    scopes_row = key.scopes
    bound_models = None if scopes_row is None else scopes_row.models
    deployments = served
    if bound_models is not None or key.aliases:
        names = callable_names(served, bound_models, key.aliases or {})
        deployments = {name: served[of] for name, of in names.items()}
    return KeyContext(
        key=key.id,
        lookup=key.lookup,
        project=project.id,
        organization=organization.id,
        zero_retention=project.zero_retention,
        expires_at_ms=key.expires_at_ms,
        revoked=key.revoked_at_ms is not None,
        suspended=organization.suspended_at_ms is not None,
        deployments=deployments,
        scopes=scopes,
        scope_args=tuple(
            arg
            for (_, scope_id, limits), weight in zip(scopes, weights, strict=True)
            for arg in (scope_id, *limits, weight)
        ),
        budgeted=bool(record.budgets) or any(limits[4] >= 0 for _, _, limits in scopes),
        budgets=windows.of(record.budgets),
        ends=ends,
        lease_ms=lease.left_ms if lease is not None and is_limited else None,
        unleased=lease is not None and is_limited and lease.left_ms <= 0,
        bounds=None if scopes_row is None else bounds_of(scopes_row),
        models_bound=bound_models is not None,
    )


def _deployment(
    row: DeploymentRow,
    key: str,
    classes: tuple[Promise, ...],
    rules: tuple[Rule, ...],
    book: SloBook,
    shadows: tuple[ShadowRow, ...],
) -> Deployment:
    promise, allowed = promises(row.slo.promise(), row.id, key, classes, rules)
    copied = tuple(shadow for shadow in shadows if shadow.deployment == row.id) if shadows else ()
    prices = book.prices.get(row.id, {})
    each = {
        name: Deployment(
            id=row.id,
            name=row.name,
            context_tokens=row.max_model_len,
            price_version=(price := prices.get(name, row.price)).version,
            rates=price.rates(),
            promise=promised,
            slo=Slo(name, promised.ttft_ms, promised.itl_ms, promised.deadline_s, promised.objective_ppm),
            own_class=row.slo.name,
            predicts=_PREDICTS.get(book.admission.get(row.id, ""), promised.ttft_ms < _PREDICTED_TTFT_MS),
            queue_order=row.queue_order,
            window=row.locality_window_tokens * TOKEN,
            created_at_s=row.created_at_ms // 1000,
            shadows=copied,
        )
        for name, promised in allowed.items()
    }
    for one in each.values():
        one.classes.update(each)
    return each[promise.name]


def _adapted(rows: Iterable[AdapterRow], served: Mapping[str, Deployment]) -> dict[str, Deployment]:
    """Deployments once more for each of their adapters, under its name."""
    bases = {deployment.id: deployment for deployment in served.values()}
    found = {}
    for row in rows:
        base = bases.get(row.deployment)
        if base is None:
            continue
        at_s = row.created_at_ms // 1000
        each = {
            name: replace(
                one, name=row.name, adapter=row.id, base=base.name, created_at_s=at_s, classes={}, shadows=()
            )
            for name, one in base.classes.items()
        }
        for one in each.values():
            one.classes.update(each)
        found[row.name] = each[base.promise.name]
    return found


def _part(limits: Limits, scope: str, lease: LeaseRow | None) -> Limits:
    """This cell's part of a scope's limits."""
    if lease is None:
        return limits
    rpm, input_tpm, output_tpm, concurrency = (scaled(limit, lease.ppm) for limit in limits[:4])
    budget = limits[4] if limits[4] < 0 else lease.budgets.get(scope, 0)
    return rpm, input_tpm, output_tpm, concurrency, budget
